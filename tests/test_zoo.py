"""Half of the units of every group of every network of the zoo, drawn at random, cut: exact, and nothing else changed.

pytest tests/test_zoo.py                      # the quick half
pytest tests/test_zoo.py --zoo zoo.csv        # all, with a table; -k timm: a part of them, their rows renewed
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

import pytest
import torch
from torch import nn
from zoo import CASES, Case, randomise

from prune_nb.core import UserError, generator, untouched
from prune_nb.profile import attention_fastpath_off, call, count_params
from prune_nb.surgery.plan import load_plan
from prune_nb.surgery.verify import max_relative_difference, random_like
from prune_nb.tracing.coupling import trace

COLUMNS = [
    "case",
    "groups",
    "units",
    "removed",
    "params_before",
    "params_after",
    "difference",
    "changed",
    "seconds",
    "refusal",
    "error",
]


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        chosen = [
            c for c in CASES.values() if metafunc.config.getoption("--zoo") or "quick" in c.tags
        ]
        metafunc.parametrize("case", chosen, ids=lambda c: c.name)


@pytest.fixture
def row(request, case):
    "What there is to say of a case; into the table, whether the test passes or not."
    row = dict.fromkeys(COLUMNS, "") | dict(case=case.name)
    yield row
    if not (path := request.config.getoption("--zoo")):
        return
    rows = {}
    if os.path.exists(path):
        with open(path) as f:
            rows = {r["case"]: r for r in csv.DictReader(f)}
    rows[case.name] = row
    with open(path, "w") as f:
        table = csv.DictWriter(f, COLUMNS)
        table.writeheader()
        table.writerows(rows[name] for name in CASES if name in rows)


@contextlib.contextmanager
def at_most(seconds):
    "Raise `TimeoutError` after so many seconds of processor time."

    def stop(*_):
        raise TimeoutError(f"more than {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def tensors(outputs) -> list:
    "Every tensor in nested containers, fields of data classes too."
    if torch.is_tensor(outputs):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    elif dataclasses.is_dataclass(outputs):
        outputs = [getattr(outputs, f.name) for f in dataclasses.fields(outputs)]
    return [t for o in outputs for t in tensors(o)] if isinstance(outputs, (tuple, list)) else []


def floats(model, inputs):
    return [t for t in tensors(call(model, inputs)) if t.is_floating_point()]


def evaluated(model):
    "In evaluation mode, also a graph module, which may refuse `eval()`."
    for m in model.modules():
        m.training = False
    return model


@torch.no_grad()
def distance(a, b, inputs) -> float:
    "As `max_relative_difference`, of every tensor that comes out, whatever it is in."
    with untouched(a), untouched(b):
        xs, ys = (floats(evaluated(m), inputs) for m in (a, b))
    assert ys, "no output to compare"
    if [t.shape for t in xs] != [t.shape for t in ys]:
        return float("inf")
    return max(
        float((x - y).abs().max() / y.abs().max().clamp_min(1e-30))
        for x, y in zip(xs, ys)
        if y.numel()
    )


def state(model, values=True) -> dict:
    "All that must not change: values, modes, what is trained, gradients, hooks, random numbers."
    return dict(
        values={k: v.clone() if torch.is_tensor(v) else v for k, v in model.state_dict().items()}
        if values
        else {},
        modes=[(n, m.training) for n, m in model.named_modules()],
        trained=[(n, p.requires_grad, p.grad is None) for n, p in model.named_parameters()],
        random=torch.get_rng_state(),
        keys=[sorted(vars(m)) for m in model.modules()],
        hooks=[
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
    )


def assert_same(before, after):
    for what in before:
        if what == "values":
            assert before[what].keys() == after[what].keys() and all(
                torch.equal(a, b) if torch.is_tensor(a) else a == b
                for a, b in zip(before[what].values(), after[what].values())
            ), "values changed"
        elif what == "random":
            assert torch.equal(before[what], after[what]), "random numbers were drawn"
        else:
            assert before[what] == after[what], f"{what} changed"


def ties(model) -> set:
    "Names of one and the same parameter, together."
    names = {}
    for n, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(n)
    return {frozenset(n) for n in names.values() if len(n) > 1}


def half(coupling, case) -> dict:
    "Group -> a random half of its units; at least one stays."
    return {
        g.name: sorted(
            torch.randperm(g.units, generator=generator(0, case.name, g.name))[
                : g.units // 2
            ].tolist()
        )
        for g in coupling.groups
        if g.units > 1
    }


@torch.no_grad()
def zeroed(model, plan) -> nn.Module:
    "The original with zeros in the removed places of its parameters, by the plan's own list of places."
    out = copy.deepcopy(model)
    named = dict(out.named_parameters(remove_duplicate=False))
    for name, dims in plan.removed.items():
        for dim, at in dims.items():
            if name in named:
                named[name].data.index_fill_(dim, torch.as_tensor(at), 0)
    return out


def with_gradient(model, inputs) -> set:
    "Names of parameters that a backward pass reaches; a step of SGD follows it."
    model.zero_grad(set_to_none=True)
    outs = [t for t in floats(evaluated(model), inputs) if t.requires_grad and t.numel()]
    if outs:
        sum(t.square().mean() for t in outs).backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3).step()
    return {n for n, p in model.named_parameters() if p.grad is not None}


def changed(inputs, change):
    "Inputs with every tensor changed."
    if torch.is_tensor(inputs):
        return change(inputs)
    if isinstance(inputs, dict):
        return {k: changed(v, change) for k, v in inputs.items()}
    return (
        type(inputs)(changed(v, change) for v in inputs)
        if isinstance(inputs, (tuple, list))
        else inputs
    )


def as_double(inputs):
    return changed(inputs, lambda t: t.double() if t.is_floating_point() else t)


@torch.no_grad()
def larger_batch(model, inputs):
    "Half as many examples again, where `model` takes them; else the same."
    more = changed(inputs, lambda t: torch.cat([t, t[:1]]))
    try:
        call(model, more)
    except Exception:
        return inputs
    return more


def places(model, names) -> dict:
    "`parameter:dimension` -> size."
    named = dict(model.named_parameters(remove_duplicate=False))
    return {p: named[p.rpartition(":")[0]].shape[int(p.rpartition(":")[2])] for p in names}


def surgery(case: Case, row: dict, tmp_path):
    model, x = randomise(case.build()), case.inputs()
    row["params_before"], before, start = count_params(model), state(model), time.process_time()
    try:
        coupling = trace(model, x)
    except UserError as e:
        row["refusal"] = str(e)
        assert_same(before, state(model))
        assert case.refusable and "does not run" not in str(e), f"refused: {e}"
        return
    removed = half(coupling, case)
    reasons = list(dict.fromkeys(coupling.frozen.reason))
    assert all(isinstance(r, str) and len(r) > 10 for r in reasons), (
        f"a reason is words, not {reasons}"
    )
    row |= dict(
        groups=len(coupling.groups),
        units=sum(g.units for g in coupling.groups),
        removed=sum(map(len, removed.values())),
    )
    if not any(removed.values()):
        row["refusal"] = "; ".join(reasons)
        assert_same(before, state(model))
        assert case.refusable and reasons, f"nothing can be cut: {reasons}"
        return
    plan = coupling.plan(removed)
    small = plan.apply(model)
    row |= dict(seconds=round(time.process_time() - start, 3), params_after=count_params(small))
    masked = plan.masked(model)
    assert_same(before, state(model))
    del before
    assert row["params_after"] < row["params_before"]

    row["difference"] = distance(small, masked, x)
    row["changed"] = distance(masked, model, x)
    assert row["difference"] <= case.tolerance, "the mask computes something else"
    assert row["changed"] > 1e-5, "the mask changes nothing: this proves nothing"
    if not case.kept:
        assert distance(small, zeroed(model, plan), x) <= 1e-5, (
            "zeros in the weights compute something else"
        )
    assert ties(small) == ties(model), "ties broken"
    theirs, ours = (state(m, values=False) for m in (model, small))
    for what in ("modes", "trained", "hooks"):
        assert theirs[what] == ours[what], f"{what} of the small network are others"

    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.as_dict()))
    again = load_plan(path)
    assert json.dumps(again.as_dict()) == path.read_text()
    assert {
        k: v.shape for k, v in again.apply(model).state_dict().items() if torch.is_tensor(v)
    } == {k: v.shape for k, v in small.state_dict().items() if torch.is_tensor(v)}

    sizes, cut = places(model, case.expect + case.frozen), places(small, case.expect + case.frozen)
    assert not (stayed := [p for p in case.expect if cut[p] >= sizes[p]]), (
        f"not cut: {stayed}, {coupling.frozen.to_dict('records')}"
    )
    assert not (gone := [p for p in case.frozen if cut[p] != sizes[p]]), f"cut: {gone}"

    assert (left := row["params_after"] / row["params_before"]) <= case.left, (
        f"{left:.0%} of the parameters left: {reasons}"
    )

    if "quick" in case.tags:
        assert (
            max_relative_difference(small, masked, x) <= 1e-5
            and max_relative_difference(small, masked, random_like(x, generator(0, "zoo"))) <= 1e-5
        )
        assert distance(small, masked, larger_batch(model, x)) <= 1e-5, (
            "another batch size is computed otherwise"
        )
        if case.double:
            assert (
                distance(plan.apply(model.double()), plan.masked(model), as_double(x)) <= 1e-10
            ), "not exact in float64"
            model.float()
    assert with_gradient(model, x) <= with_gradient(small, x), "parameters without a gradient"


def test_surgery(case, row, tmp_path):
    with warnings.catch_warnings(), attention_fastpath_off(), at_most(case.seconds):
        warnings.simplefilter("ignore")
        try:
            surgery(case, row, tmp_path)
        except BaseException as e:
            row["error"] = f"{type(e).__name__}: {e}".splitlines()[0][:300]
            raise


def test_traces_share_nothing():
    "D6: what one network's trace found is not the next one's."
    first, second = CASES["squeeze_excite"], CASES["dense_block"]
    alone = [g.name for g in trace(second.build(), second.inputs()).groups]
    trace(first.build(), first.inputs())
    assert [g.name for g in trace(second.build(), second.inputs()).groups] == alone
