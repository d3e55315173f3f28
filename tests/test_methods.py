"Every method that is registered goes the whole way on a small trained network; one that a user writes in a cell does too."

import functools

import pytest
import torch
from conftest import guard

from prune_nb.api import prune
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


@pytest.fixture(scope="module")
def digits():
    "(Network, data): a small residual network that knows the digits a little."
    data = load_data("digits", batch_size=64, train_size=512)
    model = create_model("resnet20x0.5", 10, 1, 8, seed=0)
    fit(model, data.train, 2, 0.1)
    model.zero_grad()
    return model, data


def left(result, model, data, of) -> float:
    count = (lambda m: count_macs(m, data.example)) if of == "macs" else count_params
    return count(result.model) / count(model)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_exactly(digits, method):
    (model, data), of = digits, ("params", "macs")[list(METHODS).index(method) % 2]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = prune(model, data.train.plain(256), method, ratio=0.4, of=of, progress=False)
    assert result.difference <= 1e-5 and result.verify() <= 1e-5 and result.plan.method == method
    assert abs(left(result, model, data, of) - 0.6) <= 0.01
    assert (
        result.plan.settings[of]
        == dict(params=count_params(result.model), macs=count_macs(result.model, data.example))[of]
    )
    assert result.report.loc["total", "params_after"] == count_params(result.model)
    assert max_relative_difference(result.model, model, data.example) > 1e-3
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and all(
        p.grad is None for p in model.parameters()
    )


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_saved_whole(digits, method, tmp_path):
    model, data = digits
    scores = score(model, data.train.plain(64), method, progress=False)
    save_scores(scores, tmp_path / "scores.safetensors")
    again = load_scores(tmp_path / "scores.safetensors")
    one, two = (allocate(s, 0.3, "params") for s in (scores, again))
    assert (
        one.settings == two.settings
        and one.cuts == two.cuts
        and one.layers.keys() == two.layers.keys()
    )
    for k, l in one.layers.items():  # the layout of a matrix in memory changes the last digit
        assert dict(vars(l), predicted=0) == dict(
            vars(two.layers[k]), predicted=0
        ) and l.predicted == pytest.approx(two.layers[k].predicted, rel=1e-6)


@pytest.mark.parametrize("method", [m for m in METHODS if not collector_of(m).targets])
def test_weights_need_no_data(digits, method):
    model, data = digits
    plan = allocate(score(model, data.example, method), 0.5, "macs")
    assert abs(plan.settings["macs"] / count_macs(model, data.example) - 0.5) <= 0.01


@pytest.mark.parametrize(
    "form", [lambda x: x, lambda x: (x,), lambda x: dict(input=x)], ids=["tensor", "tuple", "dict"]
)
def test_example_inputs_are_any_that_the_network_takes(digits, form):
    model, data = digits
    result = prune(model, form(data.example), "l1", ratio=0.5)
    assert abs(left(result, model, data, "macs") - 0.5) <= 0.01 and result.verify() <= 1e-5


@pytest.mark.parametrize("method", [m for m in METHODS if collector_of(m).targets])
def test_others_say_that_they_need_it(digits, method):
    with pytest.raises(UserError, match=f"Example inputs are not enough for '{method}'"):
        prune(digits[0], digits[1].example, method)


@functools.cache
def scored(name):
    model, x = create_model(name, 10, 1, 8, seed=0), torch.randn(1, 1, 8, 8)
    return model, x, score(model, x, "l2")


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("of", ["units", "params", "macs"])
@pytest.mark.parametrize("name", ["resnet20x0.5", "lenet", "densenet40x0.25"])
def test_budget_is_met_or_refused(name, of, ratio):
    model, x, scores = scored(name)
    try:
        plan = allocate(scores, ratio, of)
    except UserError as e:
        assert "can be reached" in str(e) or "nearest steps" in str(e)
        return
    small = plan.apply(model)
    assert (plan.settings["params"], plan.settings["macs"]) == (
        count_params(small),
        count_macs(small, x),
    )
    if of != "units":
        assert abs(1 - plan.settings[of] / getattr(scores, of) - ratio) <= 0.01
    assert all(len(c.removed) < c.units for c in plan.cuts.values())


def test_a_user_writes_a_criterion(digits):
    "What a cell of a notebook would hold."
    from prune_nb.criteria.core import register

    @register
    class LargestWeight:
        "The largest weight of a unit's filters."

        name, needs, measures = "largest_weight", "weights", "size"

        def __call__(self, member):
            return member.rows().abs().amax(1) if member.side == "outputs" else None

    model, data = digits
    try:
        assert (
            "largest_weight" in METHODS
            and guard(method="largest_weight").method == "largest_weight"
        )
        result = prune(model, data.example, "largest_weight", ratio=0.5)
        assert result.verify() <= 1e-5 and abs(left(result, model, data, "macs") - 0.5) <= 0.01
        group, saliency = (
            result.scores.groups["stage1.0.conv1"].group,
            result.scores.groups["stage1.0.conv1"].saliency,
        )
        want = model.stage1[0].conv1.weight.detach().abs().flatten(1).amax(1).double()
        assert torch.allclose(saliency, want / want.mean()) and group.units == len(want)
    finally:
        del METHODS["largest_weight"]
    with pytest.raises(UserError, match="Valid: eigendamage"):
        find_method("largest_weight")


def test_numbers_of_the_taylor_code():
    assert {"22", "0", "31", "2", "3", "30", "1"} <= set(method_ids())
    assert guard(method=22).method == "taylor_gate" and guard(method="l1").method == "l1"


def test_copies_of_a_filter_with_the_other_sign_are_no_copies():
    "Distances between filters, not between their magnitudes."
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    with torch.no_grad():
        net[0].weight[1:] = net[0].weight[0] + 0.01 * torch.randn(5, 4)
        net[0].weight[5] *= -1
    assert int(score(net, torch.randn(1, 4), "fpgm").groups["0"].saliency.argmax()) == 5


@pytest.mark.parametrize("method", ["l1", "fpgm", "random", "bn_scale"])
def test_frozen_parameters_take_part(digits, method):
    model, data = digits
    found = score(model, data.example, method).groups
    for p in model.parameters():
        p.requires_grad_(False)
    try:
        again = score(model, data.example, method).groups
    finally:
        for p in model.parameters():
            p.requires_grad_(True)
    assert all(torch.equal(g.saliency, again[k].saliency) for k, g in found.items())


@pytest.mark.parametrize(
    "method", [m for m, c in METHODS.items() if c.needs in ("gradients", "gates")]
)
def test_a_parameter_without_gradient_counts_as_zero(method):
    "A branch that the loss does not see; everything else is scored."

    class Branch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.unseen, self.b = (
                torch.nn.Linear(3, 6),
                torch.nn.BatchNorm1d(6),
                torch.nn.Linear(6, 4),
                torch.nn.Linear(6, 2),
            )

        def forward(self, x):
            h = self.norm(self.a(x)).relu()
            return self.b(h), self.unseen(h)

    net, data = Branch(), [(torch.randn(8, 3), torch.randint(2, (8,)))]
    net.train()
    saliency = (
        score(
            net,
            data,
            method,
            loss=lambda out, y: torch.nn.functional.cross_entropy(out[0], y),
            progress=False,
        )
        .groups["a"]
        .saliency
    )
    assert saliency.isfinite().all() and saliency.max() > 0 and net.training


def test_papermill_takes_the_criteria_of_a_notebook():
    "nbs/own_criterion.ipynb, whose cell nobody has run here."
    known = dict(METHODS)
    try:
        assert guard(criteria="nbs/own_criterion.ipynb", method="peak").method == "peak"
        assert METHODS.keys() - known.keys() == {"largest_weight", "peak"}
    finally:
        METHODS.clear()
        METHODS.update(known)
    with pytest.raises(UserError, match="Invalid method 'peak'"):
        guard(method="peak")
    with pytest.raises(
        UserError, match="Cannot load criteria from 'nbs/none.ipynb': FileNotFoundError"
    ):
        guard(criteria="nbs/none.ipynb", method="peak")
    with pytest.raises(UserError, match="'nbs/index.ipynb' registers no criterion"):
        guard(criteria="nbs/index.ipynb")


def test_masks_are_no_method(digits):
    with pytest.raises(UserError, match="magnitude_masks"):
        prune(*digits[:1], digits[1].example, "magnitude")


def test_a_threshold_gives_what_was_published(digits):
    "The kept filters of a group are less alike than the threshold, every one that went was as alike as that to another of its group; what is kept in the file is enough."
    model, data = digits
    scores = score(model, data.train.plain(100), "redundancy_graph", progress=False)
    counts = []
    for threshold in (0.6, 0.7, 0.8):
        gone = METHODS["redundancy_graph"].removed_at(scores, threshold)
        counts.append(sum(map(len, gone.values())))
        for k, units in gone.items():
            similarity = scores.groups[k].details["similarity"].clone().fill_diagonal_(0)
            stay = [u for u in range(len(similarity)) if u not in units]
            assert (
                similarity[stay][:, stay].max() < threshold
                and (similarity[units].amax(1) >= threshold).all()
            )
        plan = trace(model, data.example).plan(gone)
        assert max_relative_difference(plan.apply(model), plan.masked(model), data.example) <= 1e-5
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[2]
