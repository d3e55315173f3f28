"""Cut a random half of every group of every network of the zoo: exact, and nothing else changed.

pytest tests/test_zoo.py                      # the quick half
pytest tests/test_zoo.py --zoo zoo.csv        # all, with a table
pytest tests/test_zoo.py --zoo zoo.csv -k timm   # a part of them, their rows renewed
"""

import contextlib
import copy
import csv
import dataclasses
import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from zoo import CASES, Case, randomise

from prune_nb.core import UserError, generator, untouched
from prune_nb.profile import attention_fastpath_off, call, count_params
from prune_nb.surgery.channels import plain_network
from prune_nb.surgery.plan import Plan, load_plan
from prune_nb.surgery.verify import max_relative_difference, random_like
from prune_nb.tracing.coupling import Coupling, trace

COLUMNS = """
    case groups units removed params_before params_after difference changed seconds refusal error
    """.split()


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    every = metafunc.config.getoption("--zoo")
    chosen = [c for c in CASES.values() if every or "quick" in c.tags]
    metafunc.parametrize("case", chosen, ids=lambda c: c.name)


@pytest.fixture
def row(request, case) -> Iterator[dict]:
    """Collect the row of a case; write it into the table, whether the test passes or not."""
    row = dict.fromkeys(COLUMNS, "") | dict(case=case.name)
    yield row
    path = request.config.getoption("--zoo")
    if path:
        write_row(path, row)


def write_row(path: str, row: dict):
    """Add a row to a table, or renew it."""
    rows = {}
    if os.path.exists(path):
        with open(path) as f:
            rows = {r["case"]: r for r in csv.DictReader(f)}
    rows[row["case"]] = row
    with open(path, "w") as f:
        table = csv.DictWriter(f, COLUMNS)
        table.writeheader()
        table.writerows(rows[name] for name in CASES if name in rows)


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` after so many seconds of processor time."""

    def stop(*_):
        raise TimeoutError(f"more than {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# Outputs and inputs


def tensors(outputs: object) -> list[torch.Tensor]:
    """Return every tensor in nested containers, fields of data classes too."""
    if torch.is_tensor(outputs):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    elif dataclasses.is_dataclass(outputs):
        outputs = [getattr(outputs, f.name) for f in dataclasses.fields(outputs)]
    found = []
    if isinstance(outputs, (tuple, list)):
        for o in outputs:
            found += tensors(o)
    return found


def float_outputs(model: nn.Module, inputs: object) -> list[torch.Tensor]:
    """Return all outputs of floating point."""
    return [t for t in tensors(call(model, inputs)) if t.is_floating_point()]


def in_evaluation(model: nn.Module) -> nn.Module:
    """Set evaluation mode, also of a graph module, which may refuse `eval()`."""
    for m in model.modules():
        m.training = False
    return model


@torch.no_grad()
def distance(a: nn.Module, b: nn.Module, inputs: object) -> float:
    """Return what `max_relative_difference` does, over every output, whatever it is in."""
    with untouched(a), untouched(b):
        xs, ys = (float_outputs(in_evaluation(m), inputs) for m in (a, b))
    assert ys, "no output to compare"
    if [t.shape for t in xs] != [t.shape for t in ys]:
        return float("inf")
    pairs = [(x, y) for x, y in zip(xs, ys) if y.numel()]
    return max(float((x - y).abs().max() / y.abs().max().clamp_min(1e-30)) for x, y in pairs)


def with_each(inputs: object, change: Callable) -> object:
    """Return inputs with every tensor changed."""
    if torch.is_tensor(inputs):
        return change(inputs)
    if isinstance(inputs, dict):
        return {k: with_each(v, change) for k, v in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(with_each(v, change) for v in inputs)
    return inputs


def as_double(inputs: object) -> object:
    """Return inputs in float64."""
    return with_each(inputs, lambda t: t.double() if t.is_floating_point() else t)


@torch.no_grad()
def larger_batch(model: nn.Module, inputs: object) -> object:
    """Return one example more, where `model` takes it; else the same."""
    more = with_each(inputs, lambda t: torch.cat([t, t[:1]]))
    try:
        call(model, more)
    except Exception:
        return inputs
    return more


# What must not change


def copied_values(model: nn.Module) -> dict:
    """Return a copy of the state of a model."""
    state = model.state_dict()
    return {k: v.clone() if torch.is_tensor(v) else v for k, v in state.items()}


def state(model: nn.Module) -> dict:
    """Return all that must not change but values: modes, gradients, hooks, random numbers."""
    hooks = []
    for m in model.modules():
        tables = (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
        hooks.append([len(table) for table in tables])
    return dict(
        modes=[(n, m.training) for n, m in model.named_modules()],
        trained=[(n, p.requires_grad, p.grad is None) for n, p in model.named_parameters()],
        random=torch.get_rng_state().tolist(),
        keys=[sorted(vars(m)) for m in model.modules()],
        hooks=hooks,
    )


def same_value(a: object, b: object) -> bool:
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def assert_untouched(model: nn.Module, before: dict, values: dict):
    """Assert that a model is as its `state` and its values were."""
    after, new = state(model), copied_values(model)
    assert values.keys() == new.keys(), "names of values changed"
    assert all(same_value(v, new[k]) for k, v in values.items()), "values changed"
    for what in before:
        assert before[what] == after[what], f"{what} changed"


def tied_names(model: nn.Module) -> set[frozenset]:
    """Return the names of each parameter that has several."""
    names = {}
    for n, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(n)
    return {frozenset(n) for n in names.values() if len(n) > 1}


def names_with_gradient(model: nn.Module, inputs: object) -> set[str]:
    """Return names of parameters that a backward pass reaches; take a step of SGD after it."""
    model.zero_grad(set_to_none=True)
    outs = float_outputs(in_evaluation(model), inputs)
    outs = [t for t in outs if t.requires_grad and t.numel()]
    if outs:
        sum(t.square().mean() for t in outs).backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3).step()
    return {n for n, p in model.named_parameters() if p.grad is not None}


# The cut


def random_half(coupling: Coupling, case: Case) -> dict:
    """Return group -> a random half of its units; at least one is kept."""
    removed = {}
    for g in coupling.groups:
        if g.units > 1:
            order = torch.randperm(g.units, generator=generator(0, case.name, g.name))
            removed[g.name] = sorted(order[: g.units // 2].tolist())
    return removed


@torch.no_grad()
def zeroed(model: nn.Module, plan: Plan) -> nn.Module:
    """Return the original with zeros in the removed places of its parameters."""
    out = copy.deepcopy(model)
    named = dict(out.named_parameters(remove_duplicate=False))
    for name, dims in plan.removed.items():
        for dim, positions in dims.items():
            if name in named:
                named[name].data.index_fill_(dim, torch.as_tensor(positions), 0)
    return out


def place_sizes(model: nn.Module, places: tuple) -> dict:
    """Return `parameter:dimension` -> size."""
    named = dict(model.named_parameters(remove_duplicate=False))
    sizes = {}
    for place in places:
        name, _, dim = place.rpartition(":")
        sizes[place] = named[name].shape[int(dim)]
    return sizes


def tensor_shapes(model: nn.Module) -> dict:
    """Return the shapes of everything in the state of a model."""
    return {k: v.shape for k, v in model.state_dict().items() if torch.is_tensor(v)}


# The checks


def check_computes_the_mask(case: Case, row: dict, plan: Plan, model, small, x):
    """Assert that the small network computes what the masked one does, and not the original."""
    masked = plan.masked(model)
    row["difference"] = distance(small, masked, x)
    row["changed"] = distance(masked, model, x)
    assert row["difference"] <= case.tolerance, "the mask computes something else"
    assert row["changed"] > 1e-5, "the mask changes nothing: this proves nothing"
    if not case.kept:
        zeros = distance(small, zeroed(model, plan), x)
        assert zeros <= 1e-5, "zeros in the weights compute something else"


def check_is_like_the_original(model: nn.Module, small: nn.Module):
    """Assert that ties, modes, trained parameters and hooks are the original's."""
    assert tied_names(small) == tied_names(model), "ties broken"
    theirs, ours = state(model), state(small)
    for what in ("modes", "trained", "hooks"):
        assert theirs[what] == ours[what], f"{what} of the small network are different"


def check_plan_on_disk(plan: Plan, model: nn.Module, small: nn.Module, path: Path):
    """Assert that a plan that was saved and loaded makes the same network."""
    path.write_text(json.dumps(plan.as_dict()))
    again = load_plan(path)
    assert json.dumps(again.as_dict()) == path.read_text()
    assert tensor_shapes(again.apply(model)) == tensor_shapes(small)


def check_places(case: Case, coupling: Coupling, model: nn.Module, small: nn.Module):
    """Assert that the places that a case names were cut, or not."""
    sizes, cut = (place_sizes(m, case.expect + case.frozen) for m in (model, small))
    uncut = [p for p in case.expect if cut[p] >= sizes[p]]
    assert not uncut, f"not cut: {uncut}, {coupling.frozen.to_dict('records')}"
    wrongly_cut = [p for p in case.frozen if cut[p] != sizes[p]]
    assert not wrongly_cut, f"cut: {wrongly_cut}"


def check_other_inputs(case: Case, plan: Plan, model, small, x):
    """Assert exactness on random inputs, a larger batch and in float64."""
    masked = plan.masked(model)
    assert max_relative_difference(small, masked, x) <= 1e-5
    assert max_relative_difference(small, masked, random_like(x, generator(0, "zoo"))) <= 1e-5
    larger = distance(small, masked, larger_batch(model, x))
    assert larger <= 1e-5, "another batch size is computed differently"
    if case.double:
        double = model.double()
        difference = distance(plan.apply(double), plan.masked(double), as_double(x))
        assert difference <= 1e-10, "not exact in float64"
        model.float()


def check_surgery(case: Case, row: dict, tmp_path: Path):
    """Trace a network of the zoo, cut half of everything and check what came of it."""
    model, x = plain_network(randomise(case.build())), case.inputs()
    before, values = state(model), copied_values(model)
    row["params_before"], start = count_params(model), time.process_time()
    try:
        coupling = trace(model, x)
    except UserError as e:
        row["refusal"] = str(e)
        assert_untouched(model, before, values)
        assert case.refusable and "does not run" not in str(e), f"refused: {e}"
        return
    removed = random_half(coupling, case)
    reasons = list(dict.fromkeys(coupling.frozen.reason))
    in_words = all(isinstance(r, str) and len(r) > 10 for r in reasons)
    assert in_words, f"a reason is words, not {reasons}"
    units = sum(g.units for g in coupling.groups)
    row |= dict(groups=len(coupling.groups), units=units, removed=sum(map(len, removed.values())))
    if not any(removed.values()):
        row["refusal"] = "; ".join(reasons)
        assert_untouched(model, before, values)
        assert case.refusable and reasons, f"nothing can be cut: {reasons}"
        return
    plan = coupling.plan(removed)
    small = plan.apply(model)
    row |= dict(seconds=round(time.process_time() - start, 3), params_after=count_params(small))
    plan.masked(model)
    assert_untouched(model, before, values)
    del values
    assert row["params_after"] < row["params_before"]
    check_computes_the_mask(case, row, plan, model, small, x)
    check_is_like_the_original(model, small)
    check_plan_on_disk(plan, model, small, tmp_path / "plan.json")
    check_places(case, coupling, model, small)
    left = row["params_after"] / row["params_before"]
    assert left <= case.left, f"{left:.0%} of the parameters left: {reasons}"
    if "quick" in case.tags:
        check_other_inputs(case, plan, model, small, x)
    assert names_with_gradient(model, x) <= names_with_gradient(small, x), "lost a gradient"


def test_surgery(case, row, tmp_path):
    with warnings.catch_warnings(), attention_fastpath_off(), at_most(case.seconds):
        warnings.simplefilter("ignore")
        try:
            check_surgery(case, row, tmp_path)
        except BaseException as e:
            row["error"] = f"{type(e).__name__}: {e}".splitlines()[0][:300]
            raise


def test_traces_share_nothing():
    """Defect D6: what the trace of one network found is not in that of the next."""
    first, second = CASES["squeeze_excite"], CASES["dense_block"]
    alone = [g.name for g in trace(second.build(), second.inputs()).groups]
    trace(first.build(), first.inputs())
    assert [g.name for g in trace(second.build(), second.inputs()).groups] == alone
