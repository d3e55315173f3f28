"""Every criterion that ranks channels, on networks of every kind: scores are finite and a plan of them is exact, or a sentence says why there are none.

pytest tests/test_criteria_everywhere.py                # a spread of architectures
pytest tests/test_criteria_everywhere.py --zoo any.csv  # the quick half of the zoo
"""

import re

import pytest
import torch
from test_zoo import assert_same, distance, state, tensors
from torch import nn
from zoo import CASES, randomise

from prune_nb.budgets.allocation import allocate
from prune_nb.core import UserError
from prune_nb.criteria import methods  # which registers all
from prune_nb.criteria.core import METHODS, collector_of, score
from prune_nb.curvature.kfac import batch_size

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
SLOW = {"oracle", "gate_obd", "taylor_second_order"} | {
    m for m in CHANNELS if METHODS[m].needs == "kfac_filters"
}  # a pass for every unit, or large factors: on small networks alone
NORMS = {"bn_scale", "taylor_bn"}  # which look at normalisations


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        names = (
            [n for n, c in CASES.items() if "quick" in c.tags]
            if metafunc.config.getoption("--zoo")
            else [n for n in SPREAD if n in CASES]
        )
        metafunc.parametrize("case", [CASES[n] for n in names], ids=lambda c: c.name)


def squares(outputs, targets):
    "A loss of anything that comes out."
    return sum(t.square().mean() for t in tensors(outputs) if t.is_floating_point())


def targets(inputs):
    "As many as there are examples: tensors' first dimension, or images in a list."
    lists = [x for x in inputs if isinstance(x, list)] if isinstance(inputs, tuple) else []
    return torch.zeros(len(lists[0]) if lists else batch_size(inputs))


def scores_of(model, data) -> tuple[dict, dict]:
    "(Scores by method, sentences of those that have none); all methods of a kind of statistic in one call."
    found, sentences, units = (
        {},
        {},
        sum(g.saliency.numel() for g in score(model, data, "group_l1").groups.values()),
    )
    for kind in dict.fromkeys(METHODS[m].needs for m in CHANNELS):
        methods = [m for m in CHANNELS if METHODS[m].needs == kind]
        if units > 64:
            methods = [m for m in methods if m not in SLOW]
        while methods:
            try:
                found |= score(
                    model, data, methods, loss=squares, fisher="empirical", progress=False
                )
            except UserError as e:
                why = re.search(r"No layer is left to prune with '(\w+)'", str(e)), str(e)
            else:
                break
            sentences |= {m: why[1] for m in methods if not why[0] or m == why[0][1]}
            methods = [m for m in methods if m not in sentences]
    return found, sentences


@pytest.mark.filterwarnings("ignore")
def test_scores_are_finite_and_plans_exact(case):
    model, x = randomise(case.build()), case.inputs()
    data, before = [(x, targets(x))], state(model)
    found, sentences = scores_of(model, data)
    assert_same(before, state(model))
    assert found.keys() | sentences.keys() >= set(CHANNELS) - SLOW and all(
        len(s) > 40 for s in sentences.values()
    )
    for method, scores in found.items():
        assert all(
            g.saliency.isfinite().all()
            and g.saliency.dtype == torch.float64
            and len(g.saliency) == g.group.units
            for g in scores.groups.values()
        ), method
        assert METHODS[method].measures == "loss" or all(
            (g.saliency >= 0).all() for g in scores.groups.values()
        ), method
        assert all(isinstance(why, str) and len(why) > 10 for why in scores.skipped.values())
        plan = allocate(scores, 0.5, "units")
        assert plan.cuts and distance(plan.apply(model), plan.masked(model), x) <= case.tolerance, (
            method
        )


def test_what_the_spread_is_for():
    "Attention heads are scored by every criterion that sees weights, gradients or inputs of layers; by their maps where queries are a layer of their own."
    vit, bert = (CASES[n] for n in ("small/vit", "transformers/bert"))
    for case, unseen in ((vit, {"redundancy_graph"}), (bert, set())):
        unseen |= NORMS
        model, x = case.build(), case.inputs()
        heads = next(
            g
            for g in score(model, x, "l1").groups.values()
            if g.group.units == 4 and any("attention" in n for n in g.group.members)
        ).group.name
        found, sentences = scores_of(model, [(x, targets(x))])
        assert {
            m for m, s in found.items() if heads not in s.groups
        } == unseen - sentences.keys() and all(
            "nothing that" in found[m].skipped[heads] for m in unseen & found.keys()
        )


class Dead(nn.Module):
    "The third channel of the first layer is zero in every respect, as is the whole of the second layer."

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.c, self.head = (
            nn.Conv2d(2, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, 5, 3),
            nn.Conv2d(6, 4, 1),
            nn.Linear(9, 3),
        )
        with torch.no_grad():
            for t in (
                self.a.weight[2],
                self.a.bias[2],
                self.norm.weight[2],
                self.norm.bias[2],
                self.c.weight[:, 2],
                self.b.weight,
                self.b.bias,
                self.head.weight[:, :5],
            ):
                t.zero_()

    def forward(self, x):
        x = self.norm(self.a(x)).relu()
        return self.head(
            torch.cat([self.b(x).relu().mean((2, 3)), self.c(x).relu().mean((2, 3))], 1)
        )


def dead():
    torch.manual_seed(0)
    return Dead(), [(torch.randn(4, 2, 6, 6), torch.randint(3, (4,)))]


@pytest.mark.parametrize("method", CHANNELS)
def test_what_is_dead_has_a_value(method):
    model, data = dead()
    groups = score(model, data, method, progress=False).groups
    assert all(g.saliency.isfinite().all() for g in groups.values())
    if method not in (
        "random",
        "redundancy_graph",
        "fpgm",
        "fpgm_l1",
        "fpgm_cosine",
        "fpgm_mix",
    ):  # distances from others, which a dead filter has too
        assert groups["a"].saliency.abs().argmin() == 2 and abs(groups["a"].saliency[2]) < 1e-12
    if "b" in groups and method not in ("random", "redundancy_graph"):
        assert len(set(groups["b"].saliency.tolist())) == 1


@pytest.mark.parametrize("method", CHANNELS)
def test_inputs_of_zeros(method):
    model, data = dead()
    assert all(
        g.saliency.isfinite().all()
        for g in score(
            model, [(0 * data[0][0], data[0][1])], method, progress=False
        ).groups.values()
    )


@pytest.mark.parametrize("method", CHANNELS)
def test_no_data_is_told(method):
    with pytest.raises(UserError, match="gave no|no batch|no example|nothing"):
        score(dead()[0], [], method, progress=False)


@pytest.mark.parametrize("method", [m for m in CHANNELS if m != "random"])
def test_what_is_no_number_is_told(method):
    model, data = dead()
    with torch.no_grad():
        model.a.weight[0], model.norm.weight[0] = float("nan"), float("nan")
    with pytest.raises(UserError, match="finite|nan"):
        score(model, data, method, progress=False)


@pytest.mark.parametrize("method", [m for m in CHANNELS if METHODS[m].needs == "gradients"])
def test_a_loss_without_a_gradient_is_told(method):
    model, data = dead()
    for loss in (lambda out, y: torch.zeros(()), lambda out, y: out.detach().sum()):
        with pytest.raises(UserError, match="does not depend on the network's parameters"):
            score(model, data, method, loss=loss, progress=False)
    with torch.no_grad():
        groups = score(model, data, method, progress=False).groups  # called where gradients are off
    assert any(g.saliency.any() for g in groups.values())
