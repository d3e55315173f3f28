"""What criteria say about units, against the loss without them, on a network trained on digits.

Also nbs/oracle.ipynb.
"""

import copy

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, execute, guard
from torch import nn

from prune_nb.api import prune
from prune_nb.core import UserError
from prune_nb.criteria.core import METHODS, score
from prune_nb.criteria.oracle import random_sets, set_oracle, set_saliency, unit_oracle
from prune_nb.data import load_data
from prune_nb.experiment.oracle import correlations
from prune_nb.models import create_model
from prune_nb.surgery.export import load_weights
from prune_nb.surgery.plan import KeepDirections, Plan
from prune_nb.tracing.coupling import trace
from prune_nb.train import evaluate

LENET = ROOT / "tests/data/lenet-digits.safetensors"
GATES = [m for m, c in METHODS.items() if c.needs == "gates"]


@pytest.fixture(scope="module")
def lenet():
    """Return (network with the weights in tests/data, all training images).

    The weights are fixed: those of a network trained on the spot depend on the processor, and with
    them every correlation below.
    """
    data = load_data("digits", batch_size=64)
    model = load_weights(create_model("lenet", 10, 1, 8), LENET).eval()
    assert evaluate(model, data.test)["accuracy"] > 0.9
    return model, data.train.plain()


@pytest.fixture(scope="module")
def scores(lenet):
    return score(*lenet, GATES, progress=False)


@pytest.fixture(scope="module")
def truth(lenet):
    return unit_oracle(*lenet, progress=False)


def test_oracle_is_the_loss_of_the_cut_network(lenet, truth):
    model, images = lenet
    coupling = trace(model, images.images[:1] * images.scale - images.shift)
    base = evaluate(model, images)["loss"]
    assert len(truth) == sum(g.units for g in coupling.groups)
    assert truth.rise.notna().all()
    for r in truth.sample(6, random_state=0).itertuples():
        small = coupling.plan({r.group: [r.unit]}).apply(model)
        assert evaluate(small, images)["loss"] - base == pytest.approx(r.rise, abs=1e-5)


# Measured with the fixed weights, less a margin that rounding does not cross.
CORRELATIONS = {
    "gate_obd": dict(pearson=0.95, pearson_layers=0.85, spearman=0.7),
    "taylor_second_order": dict(pearson=0.95, pearson_layers=0.95, spearman=0.95),
}


@pytest.mark.parametrize("method", CORRELATIONS)
def test_second_order_predicts_the_loss_without_single_units(scores, truth, method):
    found = correlations(scores[method], truth)
    for name, least in CORRELATIONS[method].items():
        assert found[name] > least, name
    assert scores[method].settings["measures"] == "loss"


@pytest.mark.parametrize("part", ["gate_obd", "taylor_gate_example"])
def test_whole_quadratic_model_ranks_units_better_than_its_parts(scores, truth, part):
    """Curvature alone, or slopes alone. (Over all units a few large ones decide Pearson's.)"""
    whole = correlations(scores["taylor_second_order"], truth)
    alone = correlations(scores[part], truth)
    for name in ("spearman", "kendall", "pearson_layers", "spearman_layers", "kendall_layers"):
        assert whole[name] > alone[name] + 0.05, name


@pytest.mark.parametrize(
    "layer, side", [("fc1", "rows"), ("fc1", "cols"), ("fc2", "rows"), ("fc2", "cols")]
)
def test_directions_of_eigendamage_predict_the_loss_without_them(lenet, layer, side):
    """Silence rows and columns of a linear layer in its eigenbasis, one at a time.

    (For convolutions, where positions are taken for independent, the correlation is about a half.)
    """
    model, images = lenet
    scores = score(model, images, "eigendamage", fisher="exact", progress=False)
    found, base = scores.layers[layer], evaluate(model, images)["loss"]
    predicted = getattr(found, side)
    largest = predicted.argsort(descending=True)[:24].tolist()

    def measured(i):
        kept = dict(rows=list(range(found.weight[0])), cols=list(range(found.weight[1])))
        kept[side].remove(i)
        directions = KeepDirections(kept["rows"], kept["cols"], "both", found.weight, 0.0)
        plan = Plan("one direction", scores.model, {layer: directions}, bases=scores.bases)
        return evaluate(plan.masked(model), images)["loss"] - base

    truth = torch.tensor([measured(i) for i in largest]).double()
    assert torch.corrcoef(torch.stack([predicted[largest].double(), truth]))[0, 1] > 0.9


def test_sets_of_units(lenet, scores):
    model, images = lenet
    coupling = trace(model, next(iter(images))[0][:1])
    sets = random_sets(coupling, (1, 5), 5)
    found = set_oracle(model, images, sets, progress=False)
    saliency = set_saliency(scores["oracle"], sets[:5])
    assert saliency == pytest.approx(found.rise[:5].tolist(), rel=1e-5, abs=1e-6)
    base = evaluate(model, images)["loss"]
    pruned = evaluate(coupling.plan(sets[7]).apply(model), images)["loss"]
    assert pruned - base == pytest.approx(found.rise[7], abs=1e-5)


class Counted:
    """Batches that count how often they were iterated over."""

    def __init__(self, batches):
        self.batches, self.times = batches, 0

    def __iter__(self):
        self.times += 1
        return iter(self.batches)


def test_all_criteria_of_gates_share_one_pass(lenet):
    model = copy.deepcopy(lenet[0]).double()
    data = Counted([(x.double(), y) for x, y in list(lenet[1])[:2]])
    together = score(model, data, GATES, progress=False)
    assert data.times == 2  # one for the example that is traced
    for m in GATES:
        alone = score(model, data.batches, m, progress=False).groups["fc1"].saliency
        saliency = together[m].groups["fc1"].saliency
        assert torch.allclose(saliency, alone, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("method", GATES)
def test_examples_do_not_depend_on_batches(lenet, method):
    """Means over examples are the same in batches of 64 and of 25."""
    model, images = lenet
    x, y = (torch.cat(t)[:100] for t in zip(*images))
    one, two = (
        score(model, list(zip(x.split(n), y.split(n))), method, progress=False).groups
        for n in (64, 25)
    )
    for g in one:
        assert torch.allclose(one[g].saliency, two[g].saliency, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", GATES)
def test_invalid_losses_are_reported(lenet, method):
    model, images = lenet
    with pytest.raises(UserError, match="The loss does not depend on the network's parameters"):
        score(model, images, method, loss=lambda out, y: torch.ones(()), progress=False)
    with pytest.raises(UserError, match="The loss of a batch is nan"):
        score(model, images, method, loss=lambda out, y: out.sum() * float("nan"), progress=False)
    with pytest.raises(UserError, match="the data gave no batch"):
        score(model, [], method, progress=False)


@pytest.mark.parametrize("method", GATES)
def test_dead_units_and_a_dead_group_are_worth_nothing(method):
    layers = nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)
    net = nn.Sequential(*layers)
    data = [(torch.randn(8, 3), torch.randint(2, (8,)))]
    with torch.no_grad():
        net[0].bias[2] = -100  # a unit
        net[2].bias[:] = -100  # all units of the second group
    found = score(net, data, method, progress=False).groups
    assert all(found[g].saliency.abs().max() <= 1e-6 for g in ("0", "2"))
    with torch.no_grad():
        net[2].bias[:] = 1
    found = score(net, data, method, progress=False).groups
    assert abs(found["0"].saliency[2]) <= 1e-6
    assert found["2"].saliency.abs().max() > 0


def test_oracle_prunes(lenet, truth):
    model, images = lenet
    result = prune(model, images, "oracle", ratio=0.2, of="units", progress=False)
    removed = set()
    for name, cut in result.plan.cuts.items():
        removed |= {(name, u) for u in cut.removed}
    least = truth.nsmallest(len(removed), "rise")
    assert removed == set(zip(least.group, least.unit))
    assert result.verify() <= 1e-5


def small_transformer(name):
    if name == "vit":
        net = torchvision.models.VisionTransformer(16, 8, 1, 2, 16, 24, num_classes=5)
    else:
        sizes = [4, 4], 8, [1, 1], [2, 4], [2, 2]
        net = torchvision.models.SwinTransformer(*sizes, num_classes=5)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval()


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_attention(name):
    """Gates on heads and streams of torchvision's transformers agree with the surgery."""
    torch.manual_seed(0)
    net = small_transformer(name)
    x, y = torch.randn(4, 3, 16, 16), torch.randint(5, (4,))
    table = unit_oracle(net, [(x, y)], units=2, progress=False)
    net.requires_grad_(False)
    coupling, base = trace(net, x), F.cross_entropy(net(x), y)
    assert set(table.group) == {g.name for g in coupling.groups}
    for r in table.itertuples():
        pruned = coupling.plan({r.group: [r.unit]}).apply(net)
        increase = float(F.cross_entropy(pruned(x), y) - base)
        assert increase == pytest.approx(r.rise, abs=2e-4)
    for method in ("gate_obd", "taylor_second_order", "taylor_gate_example"):
        for g in score(net, [(x, y)], method, progress=False).groups.values():
            assert g.saliency.isfinite().all()
            assert g.saliency.abs().max() > 0


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oracle")
    path = folder / "table.csv"
    options = dict(model="lenet", checkpoint=LENET, samples=256, ratios="0.5", sets=5)
    return execute(folder, "oracle", **options, table=path), path


def test_notebook_puts_every_criterion_beside_the_truth(study):
    done, path = study
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(path).set_index("method")
    assert set(table.index) == set(METHODS)
    assert table.loc["oracle", "pearson"] == table.loc["oracle", "kendall_layers"] == 1
    assert table.loc["taylor_second_order", "pearson"] > 0.9 > table.loc["random", "pearson"] + 0.4
    assert table.loc[["eigendamage", "l1", "oracle"], "accuracy at macs -0.5"].notna().all()
    assert sum("application/vnd.plotly.v1+json" in o.get("data", {}) for o in done.outputs) == 4


def test_wrong_parameters_stop_the_notebook():
    assert guard("oracle", methods="22 l1", units=4).names() == ["taylor_gate", "l1"]
    with pytest.raises(UserError, match="Invalid method 'l7'"):
        guard("oracle", methods="l1 l7")
    with pytest.raises(UserError, match="Invalid parameter 'unit'"):
        guard("oracle", unit=4)
