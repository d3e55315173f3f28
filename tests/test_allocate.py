"Every method, budget and way of allocation on three networks: the target is hit, or refused with what can be reached. Limits hold for any saliencies. The multiplier beside the best of all choices."

import functools
import inspect
import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import mobilenet_v2

import prune_nb.api
from prune_nb.budgets.allocation import HOW, Budget, allocate
from prune_nb.core import UserError
from prune_nb.criteria.core import METHODS, GroupScores, Scores, score
from prune_nb.models import create_model
from prune_nb.profile import count_macs, count_params
from prune_nb.surgery.verify import max_relative_difference

RATIOS = (0.3, 0.5, 0.8)


class Attention(nn.Module):
    "Patches, two heads, a multilayer perceptron of two layers, a class."

    def __init__(self, width=32, heads=2):
        super().__init__()
        self.heads, self.patches, self.qkv, self.out = (
            heads,
            nn.Conv2d(3, width, 8, 8),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.first, self.second, self.norms, self.head = (
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
            nn.ModuleList(nn.LayerNorm(width) for _ in range(2)),
            nn.Linear(width, 10),
        )

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        b, t, c = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(
            nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
        return self.head((x + self.second(self.first(self.norms[1](x)).relu())).mean(1))


NETWORKS = dict(
    resnet20=lambda: create_model("resnet20x0.5", 10, 3, 16, seed=0),
    mobilenet_v2=lambda: mobilenet_v2(num_classes=10, width_mult=0.25),
    attention=Attention,
)


@functools.cache
def network(name):
    "(Network, inputs of one example, scores of every method), with one pass for each kind of statistic."
    torch.manual_seed(0)
    model, x = (
        NETWORKS[name]().eval(),
        torch.randn(8, 3, 16 if name == "resnet20" else 32, 16 if name == "resnet20" else 32),
    )
    return model, x[:1], score(model, [(x, torch.arange(8))], list(METHODS), progress=False)


@functools.cache
def budget(name, method, how=None):
    return Budget(network(name)[2][method], how)


def hit(choice, scores, ratio, of) -> bool:
    "Whether the target is met: to 1 % of the whole, or to a unit."
    if of != "units":
        return abs(1 - choice.settings[of] / getattr(scores, of) - ratio) <= 0.01
    units = sum(len(g.saliency) for g in scores.groups.values()) or sum(
        sum(l.saliency.shape) for l in scores.layers.values()
    )
    return (
        choice.settings["units_removed"] == int(ratio * units + 1e-9)
        or abs(choice.settings["units_removed"] / units - ratio) <= 0.01
    )


def check(name, method, how, of):
    "Hit or refused, and no more is left of what is removed more of."
    b, scores, left = budget(name, method, how), network(name)[2][method], []
    for ratio in RATIOS:
        try:
            choice = b.choose(ratio, of)
        except UserError as e:
            assert any(
                words in str(e) for words in ("can be reached", "the nearest", "no units to count")
            ) and "\n" not in str(e)
            continue
        assert hit(choice, scores, ratio, of)
        left.append(
            choice.settings.get("units_removed", 0) * -1 if of == "units" else choice.settings[of]
        )
    assert left == sorted(left, reverse=True)
    return left


@pytest.mark.parametrize("of", ["params", "macs", "units"])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_target_is_hit_or_refused(name, method, of):
    left = check(name, method, None, of)
    if method == "l1" and name != "attention":
        assert len(left) == len(RATIOS)  # what has channels enough refuses none of them


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", ["l2", "taylor_gate", "eigendamage", "curvature_tucker"])
def test_every_way_hits_or_refuses(name, method, how):
    if method == "curvature_tucker" and how in ("global", "per_cost"):
        with pytest.raises(UserError, match="Valid: multiplier, uniform"):
            budget(name, method, how)
        return
    for of in ("params", "macs"):
        check(name, method, how, of)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_counts_are_those_of_the_network_that_is_cut(name, method):
    model, x, _ = network(name)
    try:
        plan = budget(name, method).plan(0.3, "macs")
    except UserError:
        pytest.skip("cannot be met")
    small = plan.apply(model)
    assert (plan.settings["params"], plan.settings["macs"]) == (
        count_params(small),
        count_macs(small, x),
    )
    if method in ("l1", "eigendamage"):
        assert max_relative_difference(small, plan.masked(model), x) <= 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_settings_are_enough_to_do_it_again(method):
    scores = network("resnet20")[2][method]
    limits = dict(floors={"*": 3}, caps={"stage3.*": 0.4}, round_to=2, ignore=["stage1.0.*"])
    plan = allocate(scores, 0.2, "macs", **limits)
    again = allocate(
        scores,
        **{k: v for k, v in plan.settings.items() if k in inspect.signature(allocate).parameters},
    )
    assert again.as_dict() == plan.as_dict() and limits.items() <= plan.settings.items()


@pytest.mark.parametrize("of", ["params", "macs"])
@pytest.mark.parametrize("ratio", [0.3, 0.5])
@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_multiplier_predicts_the_least_loss(name, ratio, of):
    losses = {how: budget(name, "eigendamage", how).choose(ratio, of).predicted for how in HOW}
    assert losses["multiplier"] == min(losses.values())


# any saliencies


@functools.cache
def tiny():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(10, 10, 3, groups=10),
        nn.Conv2d(10, 16, 1),
        nn.ReLU(),
        nn.Conv2d(16, 7, 3),
        nn.Flatten(),
        nn.Linear(7 * 16, 12),
        nn.Linear(12, 5),
    ).eval()
    x = torch.randn(1, 3, 8, 8)
    return model, x, score(model, x, "l1")


def with_saliency(scores, values) -> Scores:
    "The same groups with saliencies drawn anew."
    groups = {
        k: GroupScores(
            g.group, torch.tensor(values[: len(g.saliency)], dtype=torch.float64).roll(n)
        )
        for n, (k, g) in enumerate(scores.groups.items())
    }
    return Scores(
        "l1",
        {},
        scores.model,
        scores.params,
        scores.macs,
        groups=groups,
        costs=scores.costs,
        settings=dict(measures="loss"),
    )


saliencies = st.lists(
    st.sampled_from([0.0, 1e-9, 0.5, 1.0, 2.0, 1e6]) | st.floats(0, 10), min_size=16, max_size=16
)


@settings(derandomize=True, deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))
@given(
    values=saliencies,
    ratio=st.floats(0, 0.95),
    of=st.sampled_from(["units", "params", "macs"]),
    how=st.sampled_from(HOW),
    cap=st.floats(0, 1),
    floor=st.integers(1, 12),
    round_to=st.integers(1, 5),
    kept=st.sampled_from([(), ("0",), ("3", "7")]),
)
def test_limits_hold_and_counts_are_exact(values, ratio, of, how, cap, floor, round_to, kept):
    model, x, scores = tiny()
    scores = with_saliency(scores, values)
    try:
        plan = allocate(
            scores, ratio, of, cap=cap, how=how, floors={"*": floor}, round_to=round_to, ignore=kept
        )
    except UserError as e:
        assert "can be reached" in str(e) or "the nearest steps" in str(e)
        return
    small = plan.apply(model)
    assert (plan.settings["params"], plan.settings["macs"]) == (
        count_params(small),
        count_macs(small, x),
    )
    if of == "units":
        assert plan.settings["units_removed"] in range(
            int(ratio * 45 - 0.45), int(ratio * 45 + 0.45) + 1
        )
    else:
        assert abs(1 - plan.settings[of] / getattr(scores, of) - ratio) <= 0.01
    for k, c in plan.cuts.items():
        stays, s = c.units - len(c.removed), scores.groups[k].saliency
        assert (
            1 <= floor <= stays and len(c.removed) <= cap * c.units + 1e-6 and stays % round_to == 0
        )
        assert s[c.removed].max() <= min(s[i] for i in range(c.units) if i not in c.removed)
    touched = {n.rpartition(".")[0] for c in plan.cuts.values() for n in c.members}
    assert not touched & set(kept)


@settings(derandomize=True, deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
@given(
    values=saliencies,
    how=st.sampled_from(HOW),
    of=st.sampled_from(["units", "params", "macs"]),
    loss=st.floats(0, 40),
)
def test_a_loss_is_never_exceeded(values, how, of, loss):
    scores = with_saliency(tiny()[2], values)
    plan = allocate(scores, of=of, how=how, loss=loss)
    assert plan.predicted_loss_change <= loss + 1e-9
    if how == "global":  # nothing more fits
        left = [
            float(
                np.sort(
                    [
                        v
                        for i, v in enumerate(g.saliency.tolist())
                        if i not in (plan.cuts[k].removed if k in plan.cuts else ())
                    ]
                )[0]
            )
            for k, g in scores.groups.items()
            if (len(plan.cuts[k].removed) if k in plan.cuts else 0)
            < int(0.95 * len(g.saliency) + 1e-9)
        ]
        assert not left or plan.predicted_loss_change + min(left) > loss


@settings(derandomize=True, deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
@given(values=saliencies, threshold=st.floats(0, 10))
def test_a_threshold_takes_what_is_below(values, threshold):
    scores = with_saliency(tiny()[2], values)
    plan = allocate(scores, threshold=threshold, cap=1.0)
    for k, g in scores.groups.items():
        gone = plan.cuts[k].removed if k in plan.cuts else []
        assert (
            gone == np.flatnonzero(g.saliency.numpy() <= threshold).tolist()
            or len(gone) == len(g.saliency) - 1
            and (g.saliency <= threshold).all()
        )


# against all choices that there are


def every_choice(scores) -> tuple:
    "(Counts, parameters, loss) of all numbers of units that can go of three groups."
    sizes = [len(g.saliency) for g in scores.groups.values()]
    sums = [np.r_[0, np.cumsum(np.sort(g.saliency.numpy()))] for g in scores.groups.values()]
    counts = list(itertools.product(*(range(n) for n in sizes)))
    return (
        counts,
        np.array([scores.costs.count(c, "params") for c in counts]),
        np.array([sum(s[n] for s, n in zip(sums, c)) for c in counts]),
    )


@pytest.mark.parametrize("seed", range(6))
def test_multiplier_beside_the_best_of_all_choices(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(9, 14),
        nn.ReLU(),
        nn.Linear(14, 11),
        nn.ReLU(),
        nn.Linear(11, 13),
        nn.ReLU(),
        nn.Linear(13, 6),
    )
    scores = with_saliency(score(model, torch.randn(1, 9), "l1"), (torch.rand(16) ** 3).tolist())
    _, params, losses = every_choice(scores)
    largest = max(float(g.saliency.max()) for g in scores.groups.values())
    for ratio in (0.2, 0.4, 0.6):
        found = {how: allocate(scores, ratio, "params", cap=1.0, how=how) for how in HOW}
        best = {how: losses[params <= p.settings["params"]].min() for how, p in found.items()}
        gap = {how: found[how].predicted_loss_change - best[how] for how in HOW}
        assert min(gap.values()) >= -1e-9 and gap["multiplier"] <= max(
            0.1 * largest, 0.05 * best["multiplier"]
        )
