"""Prune a small trained network with every registered method, and with a criterion written by a user."""

import functools

import pytest
import torch
from conftest import guard
from torch import nn

from prune_nb.api import Result, prune
from prune_nb.budgets.allocation import allocate
from prune_nb.core import UserError
from prune_nb.criteria.core import (
    METHODS,
    collector_of,
    find_method,
    load_scores,
    method_ids,
    save_scores,
    score,
)
from prune_nb.data import load_data
from prune_nb.models import create_model
from prune_nb.profile import count_macs, count_params
from prune_nb.surgery.verify import max_relative_difference
from prune_nb.tracing.coupling import trace
from prune_nb.train import fit

NEED_LOSS = [m for m in METHODS if collector_of(m).targets]
NEED_NO_LOSS = [m for m in METHODS if not collector_of(m).targets]
NEED_GRADIENTS = [m for m, c in METHODS.items() if c.needs in ("gradients", "gates")]


@pytest.fixture(scope="module")
def digits():
    """Return a small residual network that knows the digits a little, and the data."""
    data = load_data("digits", batch_size=64, train_size=512)
    model = create_model("resnet20x0.5", 10, 1, 8, seed=0)
    fit(model, data.train, 2, 0.1)
    model.zero_grad()
    return model, data


def remaining_share(result: Result, model, data, cost: str) -> float:
    """Return the share of the parameters or multiply-accumulates that is left."""
    if cost == "macs":
        return count_macs(result.model, data.example) / count_macs(model, data.example)
    return count_params(result.model) / count_params(model)


def set_trainable(model, value: bool):
    for p in model.parameters():
        p.requires_grad_(value)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_exactly(digits, method):
    model, data = digits
    cost = ("params", "macs")[list(METHODS).index(method) % 2]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = prune(model, data.train.plain(256), method, ratio=0.4, cost=cost, progress=False)
    assert result.difference <= 1e-5 and result.verify() <= 1e-5
    assert result.plan.method == method
    assert abs(remaining_share(result, model, data, cost) - 0.6) <= 0.01
    counted = {
        "params": count_params(result.model),
        "macs": count_macs(result.model, data.example),
    }
    assert result.plan.settings[cost] == counted[cost]
    assert result.report.loc["total", "params_after"] == counted["params"]
    assert max_relative_difference(result.model, model, data.example) > 1e-3
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_saved_whole(digits, method, tmp_path):
    model, data = digits
    scores = score(model, data.train.plain(64), method, progress=False)
    save_scores(scores, tmp_path / "scores.safetensors")
    again = load_scores(tmp_path / "scores.safetensors")
    one, two = (allocate(s, 0.3, "params") for s in (scores, again))
    assert one.settings == two.settings
    assert one.cuts == two.cuts
    assert one.layers.keys() == two.layers.keys()
    for name, first in one.layers.items():
        second = two.layers[name]
        assert dict(vars(first), predicted=0) == dict(vars(second), predicted=0)
        # the layout of a matrix in memory changes the last digit
        assert first.predicted == pytest.approx(second.predicted, rel=1e-6)


@pytest.mark.parametrize("method", NEED_NO_LOSS)
def test_weights_need_no_data(digits, method):
    model, data = digits
    plan = allocate(score(model, data.example, method), 0.5, "macs")
    assert abs(plan.settings["macs"] / count_macs(model, data.example) - 0.5) <= 0.01


FORMS = dict(tensor=lambda x: x, tuple=lambda x: (x,), dict=lambda x: {"input": x})


@pytest.mark.parametrize("form", FORMS)
def test_example_inputs_take_every_form_that_the_network_takes(digits, form):
    model, data = digits
    result = prune(model, FORMS[form](data.example), "l1", ratio=0.5)
    assert abs(remaining_share(result, model, data, "macs") - 0.5) <= 0.01
    assert result.verify() <= 1e-5


@pytest.mark.parametrize("method", NEED_LOSS)
def test_methods_that_need_the_loss_refuse_example_inputs(digits, method):
    model, data = digits
    with pytest.raises(UserError, match=f"Example inputs are not enough for '{method}'"):
        prune(model, data.example, method)


@functools.cache
def scored(name):
    model, x = create_model(name, 10, 1, 8, seed=0), torch.randn(1, 1, 8, 8)
    return model, x, score(model, x, "l2")


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("cost", ["units", "params", "macs"])
@pytest.mark.parametrize("name", ["resnet20x0.5", "lenet", "densenet40x0.25"])
def test_budget_is_met_or_refused(name, cost, ratio):
    model, x, scores = scored(name)
    try:
        plan = allocate(scores, ratio, cost)
    except UserError as e:
        assert "can be reached" in str(e) or "nearest steps" in str(e)
        return
    small = plan.apply(model)
    predicted = plan.settings["params"], plan.settings["macs"]
    assert predicted == (count_params(small), count_macs(small, x))
    if cost != "units":
        assert abs(1 - plan.settings[cost] / getattr(scores, cost) - ratio) <= 0.01
    assert all(len(c.removed) < c.units for c in plan.cuts.values())


def test_a_user_writes_a_criterion(digits):
    """Register what a cell of a notebook would hold, and prune with it."""
    from prune_nb.criteria.core import register

    @register
    class LargestWeight:
        """Score a unit by the largest weight of its filters."""

        name, needs, measures = "largest_weight", "weights", "size"

        def __call__(self, member):
            return member.rows().abs().amax(1) if member.side == "outputs" else None

    model, data = digits
    try:
        assert "largest_weight" in METHODS
        assert guard(method="largest_weight").method == "largest_weight"
        result = prune(model, data.example, "largest_weight", ratio=0.5)
        assert result.verify() <= 1e-5
        assert abs(remaining_share(result, model, data, "macs") - 0.5) <= 0.01
        found = result.scores.groups["stage1.0.conv1"]
        weight = model.stage1[0].conv1.weight.detach()
        expected = weight.abs().flatten(1).amax(1).double()
        assert torch.allclose(found.saliency, expected / expected.mean())
        assert found.group.units == len(expected)
    finally:
        del METHODS["largest_weight"]
    with pytest.raises(UserError, match="Valid: taylor_weight, .* more\\."):
        find_method("largest_weight")


def test_numbers_of_the_taylor_code_are_names_of_methods():
    assert {"22", "0", "31", "2", "3", "30", "1"} <= set(method_ids())
    assert guard(method=22).method == "taylor_gate"
    assert guard(method="l1").method == "l1"


def test_a_filter_of_opposite_sign_is_not_a_copy():
    """Compare filters, not their magnitudes."""
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        net[0].weight[1:] = net[0].weight[0] + 0.01 * torch.randn(5, 4)
        net[0].weight[5] *= -1
    saliency = score(net, torch.randn(1, 4), "fpgm").groups["0"].saliency
    assert int(saliency.argmax()) == 5


@pytest.mark.parametrize("method", ["l1", "fpgm", "random", "bn_scale"])
def test_frozen_parameters_are_scored_too(digits, method):
    model, data = digits
    found = score(model, data.example, method).groups
    set_trainable(model, False)
    try:
        again = score(model, data.example, method).groups
    finally:
        set_trainable(model, True)
    for name, group in found.items():
        assert torch.equal(group.saliency, again[name].saliency)


class Branch(nn.Module):
    """A network whose second output the loss does not see."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 6)
        self.norm = nn.BatchNorm1d(6)
        self.unseen = nn.Linear(6, 4)
        self.b = nn.Linear(6, 2)

    def forward(self, x):
        h = self.norm(self.a(x)).relu()
        return self.b(h), self.unseen(h)


@pytest.mark.parametrize("method", NEED_GRADIENTS)
def test_a_parameter_without_gradient_counts_as_zero(method):
    """Score everything else of a network with a branch that the loss does not see."""

    def loss(outputs, targets):
        return nn.functional.cross_entropy(outputs[0], targets)

    net, data = Branch(), [(torch.randn(8, 3), torch.randint(2, (8,)))]
    net.train()
    scores = score(net, data, method, loss=loss, progress=False)
    saliency = scores.groups["a"].saliency
    assert saliency.isfinite().all() and saliency.max() > 0
    assert net.training


def test_papermill_takes_the_criteria_of_a_notebook():
    """Load the criteria of a notebook whose cells have not been run here."""
    known = dict(METHODS)
    try:
        assert (
            guard(criteria="nbs/tutorials/04_custom_criterion.ipynb", method="peak").method
            == "peak"
        )
        assert METHODS.keys() - known.keys() == {"largest_weight", "peak"}
    finally:
        METHODS.clear()
        METHODS.update(known)
    with pytest.raises(UserError, match="Invalid method 'peak'"):
        guard(method="peak")
    missing = "Cannot load criteria from 'nbs/none.ipynb': FileNotFoundError"
    with pytest.raises(UserError, match=missing):
        guard(criteria="nbs/none.ipynb", method="peak")
    with pytest.raises(UserError, match="'nbs/index.ipynb' registers no criterion"):
        guard(criteria="nbs/index.ipynb")


def test_magnitude_masks_are_not_a_method(digits):
    model, data = digits
    with pytest.raises(UserError, match="magnitude_masks"):
        prune(model, data.example, "magnitude")


def test_a_threshold_keeps_filters_that_are_unlike(digits):
    """Hold the threshold of the redundancy graph to its definition.

    The kept filters of a group are less alike than the threshold, and every removed one was as
    alike as that to another filter of its group. The details in the scores are enough to check it.
    """
    model, data = digits
    scores = score(model, data.train.plain(100), "redundancy_graph", progress=False)
    counts = []
    for threshold in (0.6, 0.7, 0.8):
        removed = METHODS["redundancy_graph"].removed_at(scores, threshold)
        counts.append(sum(map(len, removed.values())))
        for name, units in removed.items():
            similarity = scores.groups[name].details["similarity"].clone().fill_diagonal_(0)
            kept = [u for u in range(len(similarity)) if u not in units]
            assert similarity[kept][:, kept].max() < threshold
            assert (similarity[units].amax(1) >= threshold).all()
        plan = trace(model, data.example).plan(removed)
        assert max_relative_difference(plan.apply(model), plan.masked(model), data.example) <= 1e-5
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[2]
