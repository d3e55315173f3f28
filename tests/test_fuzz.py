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
LIMIT = 1e-6  # of the largest output, in float64: small differences may grow in normalisations
SHARE_REFUSED = 0.4  # of a block; more, and the fuzzer says little


def pytest_generate_tests(metafunc):
    if "block" in metafunc.fixturenames:
        count = metafunc.config.getoption("--fuzz")
        metafunc.parametrize("block", range(0, count, 25))


def outputs_of(model: nn.Module, inputs: object) -> list[torch.Tensor]:
    """Return what a network gives, with the same draws for every network."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return leaves_of(model.eval()(inputs))


def in_double(task: Task, model: nn.Module) -> list[torch.Tensor]:
    """Return what a network gives in float64."""
    inputs = task.example
    return outputs_of(model.double(), inputs.double() if inputs.is_floating_point() else inputs)


def distance(xs: list, ys: list) -> float:
    """Return the largest difference over all outputs, relative to the largest value of each.

    An output below a millionth of the largest is rounding, as the mean of what was centred.
    """
    assert xs and [(x.shape, x.dtype) for x in xs] == [(y.shape, y.dtype) for y in ys]
    pairs = [(x, y) for x, y in zip(xs, ys) if x.is_floating_point() or x.is_complex()]
    largest = max(float(y.abs().max()) for _, y in pairs)
    worst = 0.0
    for x, y in pairs:
        size = max(float(y.abs().max()), 1e-6 * largest, 1e-20)
        worst = max(worst, float((x - y).abs().max()) / size)
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


def product(parts: nn.Sequential) -> torch.Tensor:
    """Return the kernel that layers one after another have together; all but one are pointwise."""
    whole = None
    for part in parts:
        kernel = part.weight.detach().double()
        kernel = kernel.flatten(2) if kernel.dim() > 2 else kernel[..., None]
        if whole is None:
            whole = kernel
        elif kernel.shape[2] == 1:
            whole = torch.einsum("or,rit->oit", kernel[..., 0], whole)
        else:
            whole = torch.einsum("ort,ri->oit", kernel, whole[..., 0])
    return whole


def multiplied(model: nn.Module, small: nn.Module, layers: list) -> nn.Module:
    """Return a copy of `model` with the kernels of the factorised layers, multiplied together."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for name in layers:
            weight = model.get_submodule(name).weight
            weight.copy_(product(small.get_submodule(name)).view_as(weight))
    return model


def check_values(task: Task, result) -> None:
    """Compare with the original by rules that know nothing of the package's own mask."""
    model, small = task.build(), result.plan.apply(task.build())
    own, state = dict(model.state_dict()), small.state_dict()
    if result.plan.layers:
        expected = in_double(task, multiplied(model, small, list(result.plan.layers)))
        assert distance(in_double(task, small), expected) <= LIMIT
        return
    if not result.plan.updates:
        for name, value in state.items():
            assert torch.equal(value, without(own[name], result.plan.removed.get(name, {}))), name
    if not task.mixes:
        expected = in_double(task, silenced(model, result.plan.removed))
        assert distance(in_double(task, small), expected) <= LIMIT


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


def nearest_share(refusal: str) -> float:
    """Return a share that the sentence of a refused budget says can be removed; 0 where none."""
    shares = [float(number) / 100 for number in re.findall(r"([0-9.]+)%", refusal)[1:]]
    share = max(shares, default=0.0)
    return 0.8 * share if "can be reached" in refusal else share


def prune_near(task: Task, method: str, ratio: float):
    """Prune by about `ratio`: by a step that a small network has."""
    options = dict(cost="params", loss=task.loss, progress=False)
    if task.loss:
        options["fisher"] = "empirical"
    for _ in range(3):
        try:
            return prune(task.build(), task.batches, method, ratio, **options)
        except UserError as refusal:
            ratio = nearest_share(str(refusal))
            if not ratio:
                raise
    return prune(task.build(), task.batches, method, ratio, **options)


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
    assert len(refused) <= SHARE_REFUSED * 25, "\n".join(refused)
