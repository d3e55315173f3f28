"""Every criterion that ranks channels, on networks of every kind.

Scores are finite and a plan of them is exact, or a sentence says why there are none.

pytest tests/test_criteria_everywhere.py                # a spread of architectures
pytest tests/test_criteria_everywhere.py --zoo any.csv  # the quick half of the zoo
"""

import re

import pytest
import torch
from test_zoo import assert_untouched, copied_values, distance, state, tensors
from torch import nn
from zoo import CASES, randomise

import prune_nb.criteria.methods  # noqa: F401  (which registers all)
from prune_nb.budgets.allocation import allocate
from prune_nb.core import UserError
from prune_nb.criteria.core import METHODS, collector_of, score
from prune_nb.nested import batch_size

CHANNELS = [m for m in METHODS if collector_of(m).ranks == "groups"]
SPREAD = [
    "prune_nb/lenet",
    "small/resnet",
    "small/resnext",
    "small/densenet",
    "small/mobilenet_v2",
    "small/shufflenet",
    "small/squeezenet",
    "small/vit",
    "small/swin",
    "small/convnext",
    "transformers/bert",
    "transformers/gpt2",
    "gated_recurrent",
    "long_short_term_memory",
    "functional_convolution",
    "bare_matrices",
    "transposed_grouped",
    "grouped",
    "layer_in_a_loop",
    "shared_tower",
    "three_dimensions",
    "dict_of_outputs",
    "transformer_layer",
    "grouped_query_expand",
    "squeeze_excite",
]
# a pass for every unit, or large factors: on small networks alone
SLOW = {"oracle", "gate_obd", "taylor_second_order"}
SLOW |= {m for m in CHANNELS if METHODS[m].needs == "kfac_filters"}
NORMS = {"bn_scale", "taylor_bn"}  # which look at normalizations
DISTANCES = {"redundancy_graph", "fpgm", "fpgm_l1", "fpgm_cosine", "fpgm_mix"}  # from other filters


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    names = [n for n in SPREAD if n in CASES]
    if metafunc.config.getoption("--zoo"):
        names = [n for n, c in CASES.items() if "quick" in c.tags]
    metafunc.parametrize("case", [CASES[n] for n in names], ids=lambda c: c.name)


def squares(outputs, targets):
    """Return a loss of any outputs."""
    return sum(t.square().mean() for t in tensors(outputs) if t.is_floating_point())


def targets(inputs):
    """Return as many targets as there are examples: rows of tensors, or images in a list."""
    lists = [x for x in inputs if isinstance(x, list)] if isinstance(inputs, tuple) else []
    return torch.zeros(len(lists[0]) if lists else batch_size(inputs))


def try_methods(model, data, methods) -> tuple[dict, dict]:
    """Return (scores by method, sentences of those that have none) of one kind of statistic."""
    options = dict(loss=squares, fisher="empirical", progress=False)
    sentences = {}
    while methods:
        try:
            return score(model, data, methods, **options), sentences
        except UserError as e:
            message = str(e)
        method = re.search(r"No layer is left to prune with '(\w+)'", message)
        refused = [method[1]] if method else methods
        sentences |= dict.fromkeys(refused, message)
        methods = [m for m in methods if m not in refused]
    return {}, sentences


def scores_of(model, data) -> tuple[dict, dict]:
    """Return (scores by method, sentences of those that have none), a call for each statistic."""
    found, sentences = {}, {}
    units = sum(g.saliency.numel() for g in score(model, data, "group_l1").groups.values())
    methods = [m for m in CHANNELS if units <= 64 or m not in SLOW]
    for kind in dict.fromkeys(METHODS[m].needs for m in CHANNELS):
        some = [m for m in methods if METHODS[m].needs == kind]
        scores, refused = try_methods(model, data, some)
        found |= scores
        sentences |= refused
    return found, sentences


def assert_valid_scores(method, scores):
    for g in scores.groups.values():
        assert g.saliency.isfinite().all(), method
        assert g.saliency.dtype == torch.float64, method
        assert len(g.saliency) == g.group.units, method
        assert METHODS[method].measures == "loss" or (g.saliency >= 0).all(), method
    assert all(isinstance(why, str) and len(why) > 10 for why in scores.skipped.values())


@pytest.mark.filterwarnings("ignore")
def test_scores_are_finite_and_plans_exact(case):
    model, x = randomise(case.build()), case.inputs()
    data, before, values = [(x, targets(x))], state(model), copied_values(model)
    found, sentences = scores_of(model, data)
    assert_untouched(model, before, values)
    assert found.keys() | sentences.keys() >= set(CHANNELS) - SLOW
    assert all(len(s) > 40 for s in sentences.values())
    for method, scores in found.items():
        assert_valid_scores(method, scores)
        plan = allocate(scores, 0.5, "units")
        assert plan.cuts, method
        assert distance(plan.apply(model), plan.masked(model), x) <= case.tolerance, method


def attention_heads(model, x) -> str:
    """Return the name of the first group of four attention heads."""
    for name, g in score(model, x, "l1").groups.items():
        if g.group.units == 4 and any("attention" in n for n in g.group.members):
            return name


@pytest.mark.parametrize(
    "name, unseen", [("small/vit", {"redundancy_graph", *NORMS}), ("transformers/bert", NORMS)]
)
def test_attention_heads_are_scored(name, unseen):
    """Every criterion that sees weights, gradients or inputs of layers scores them.

    Criteria of maps do where queries are a layer by themselves, as in BERT.
    """
    case = CASES[name]
    model, x = case.build(), case.inputs()
    heads = attention_heads(model, x)
    found, sentences = scores_of(model, [(x, targets(x))])
    without = {m for m, s in found.items() if heads not in s.groups}
    assert without == unseen - sentences.keys()
    assert all("nothing that" in found[m].skipped[heads] for m in without)


class Dead(nn.Module):
    """The third channel of the first layer, and the whole of the second layer, are zero."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 5, 3)
        self.c = nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(9, 3)
        third = [self.a.weight[2], self.a.bias[2], self.norm.weight[2], self.norm.bias[2]]
        third.append(self.c.weight[:, 2])
        second_layer = [self.b.weight, self.b.bias, self.head.weight[:, :5]]
        with torch.no_grad():
            for t in [*third, *second_layer]:
                t.zero_()

    def forward(self, x):
        x = self.norm(self.a(x)).relu()
        maps = self.b(x).relu(), self.c(x).relu()
        return self.head(torch.cat([m.mean((2, 3)) for m in maps], 1))


def dead():
    torch.manual_seed(0)
    return Dead(), [(torch.randn(4, 2, 6, 6), torch.randint(3, (4,)))]


@pytest.mark.parametrize("method", CHANNELS)
def test_dead_channels_have_a_value(method):
    model, data = dead()
    groups = score(model, data, method, progress=False).groups
    assert all(g.saliency.isfinite().all() for g in groups.values())
    if method != "random" and method not in DISTANCES:  # a dead filter has distances too
        assert groups["a"].saliency.abs().argmin() == 2
        assert abs(groups["a"].saliency[2]) < 1e-12
    if "b" in groups and method not in ("random", "redundancy_graph"):
        assert len(set(groups["b"].saliency.tolist())) == 1


@pytest.mark.parametrize("method", CHANNELS)
def test_inputs_of_zeros(method):
    model, [(x, y)] = dead()
    groups = score(model, [(0 * x, y)], method, progress=False).groups
    assert all(g.saliency.isfinite().all() for g in groups.values())


@pytest.mark.parametrize("method", CHANNELS)
def test_missing_data_are_reported(method):
    with pytest.raises(UserError, match="gave no|no batch|no example|nothing"):
        score(dead()[0], [], method, progress=False)


@pytest.mark.parametrize("method", [m for m in CHANNELS if m != "random"])
def test_values_that_are_not_finite_are_reported(method):
    model, data = dead()
    with torch.no_grad():
        model.a.weight[0], model.norm.weight[0] = float("nan"), float("nan")
    with pytest.raises(UserError, match="finite|nan"):
        score(model, data, method, progress=False)


@pytest.mark.parametrize("method", [m for m in CHANNELS if METHODS[m].needs == "gradients"])
def test_losses_without_a_gradient_are_reported(method):
    model, data = dead()
    for loss in (lambda out, y: torch.zeros(()), lambda out, y: out.detach().sum()):
        with pytest.raises(UserError, match="does not depend on the network's parameters"):
            score(model, data, method, loss=loss, progress=False)
    with torch.no_grad():
        groups = score(model, data, method, progress=False).groups  # called where gradients are off
    assert any(g.saliency.any() for g in groups.values())
