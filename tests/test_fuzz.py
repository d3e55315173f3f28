"""Prune networks drawn from a grammar: exact by values, trained a step, saved and loaded, or refused.

pytest tests/test_fuzz.py                # 300 networks
pytest tests/test_fuzz.py --fuzz 5000    # as many as asked
"""

import copy
import re
from random import Random

import pytest
import torch
from grammar import Task, draw, leaves_of
from torch import nn

from prune_nb import load, prune, save
from prune_nb.core import UserError

METHODS = """
    l1 group_l2 fpgm random taylor_output taylor_weight gate_obd kron_obd
    eigendamage curvature_tucker
    """.split()
LIMITS = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 0.1}  # of the largest output
SHARE_REFUSED = 0.35  # more, and the fuzzer says little


def pytest_generate_tests(metafunc):
    if "block" in metafunc.fixturenames:
        count = metafunc.config.getoption("--fuzz")
        metafunc.parametrize("block", range(0, count, 25))


def outputs_of(model: nn.Module, inputs: object) -> list[torch.Tensor]:
    """Return what a network gives, with the same draws for every network."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return leaves_of(model.eval()(inputs))


def distance(xs: list, ys: list) -> float:
    """Return the largest difference relative to the largest value, over all outputs."""
    assert xs and [(x.shape, x.dtype) for x in xs] == [(y.shape, y.dtype) for y in ys]
    worst = 0.0
    for x, y in zip(xs, ys):
        if x.is_floating_point() or x.is_complex():
            worst = max(worst, float((x - y).abs().max() / y.abs().max().clamp_min(1e-20)))
    return worst


def without(t: torch.Tensor, positions: dict) -> torch.Tensor:
    """Return a tensor less the positions along its dimensions."""
    for dim, gone in positions.items():
        kept = [i for i in range(t.shape[dim]) if i not in set(gone)]
        t = t.index_select(dim, torch.tensor(kept, dtype=torch.long))
    return t


def silenced(model: nn.Module, removed: dict) -> nn.Module:
    """Return a copy with zeros wherever the plan cuts a parameter or buffer."""
    model = copy.deepcopy(model)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name in tensors.keys() & removed.keys():
            for dim, gone in removed[name].items():
                tensors[name].index_fill_(dim, torch.tensor(gone), 0)
    return model


def check_values(task: Task, result) -> None:
    """Compare with the original by rules that know nothing of the package's own mask."""
    model, small = task.build(), result.plan.apply(task.build())
    own, state = dict(model.state_dict()), small.state_dict()
    if result.plan.layers:
        assert distance(outputs_of(small, task.example), outputs_of(model, task.example)) < 1e3
        return
    if not any(cut.update for cut in result.plan.cuts.values() if hasattr(cut, "update")):
        for name, value in state.items():
            assert torch.equal(value, without(own[name], result.plan.removed.get(name, {}))), name
    if not task.mixes:
        expected = outputs_of(silenced(model, result.plan.removed), task.example)
        assert distance(outputs_of(small, task.example), expected) <= LIMITS[task.dtype]


def train_a_step(task: Task, model: nn.Module) -> None:
    """Train one step in training mode, all gradients finite."""
    model.train().requires_grad_(True)
    inputs, targets = task.batches[0]
    loss = task.loss or nn.functional.cross_entropy
    value = loss(model(inputs), targets)
    value.backward()
    assert value.isfinite()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                assert p.grad.isfinite().all()
                p -= 0.01 * p.grad


def prune_near(task: Task, method: str, ratio: float):
    """Prune by about `ratio`: by the nearest step that a small network has."""
    options = dict(cost="params", loss=task.loss, progress=False)
    if task.loss:
        options["fisher"] = "empirical"
    try:
        return prune(task.build(), task.batches, method, ratio, **options)
    except UserError as refusal:
        steps = re.search(r"nearest steps? removes? ([0-9.]+)%", str(refusal))
        if not steps or not float(steps[1]):
            raise
    return prune(task.build(), task.batches, method, float(steps[1]) / 100, **options)


def attempt(task: Task, method: str, ratio: float, folder) -> str:
    """Return "" where all is well, or the sentence of the refusal."""
    try:
        result = prune_near(task, method, ratio)
    except UserError as refusal:
        assert len(str(refusal)) <= 600, str(refusal)
        return str(refusal)
    check_values(task, result)
    before = outputs_of(result.model, task.example)
    assert [t.shape for t in before] == [t.shape for t in outputs_of(task.build(), task.example)]
    train_a_step(task, result.model)
    save(result, folder)
    again = load(folder, task.build)
    assert distance(outputs_of(again, task.example), outputs_of(result.model, task.example)) == 0
    return ""


@pytest.mark.filterwarnings("ignore")
def test_any_network_is_pruned_exactly_or_refused_in_words(block, tmp_path):
    refused, wrong = [], []
    for seed in range(block, block + 25):
        task, dice = draw(seed), Random(-1 - seed)
        method, ratio = dice.choice(METHODS), dice.choice([0.2, 0.4, 0.6])
        try:
            why = attempt(task, method, ratio, tmp_path / str(seed))
        except Exception as e:
            wrong.append(f"{seed}: {method} {ratio:g}, {task.name}: {type(e).__name__}: {e}")
            continue
        if why:
            refused.append(f"{seed}: {method} {ratio:g}, {task.name}: {why}")
    print(*refused, sep="\n")
    assert not wrong, "\n".join(wrong)
