"Second-order criteria against loops, dense Fisher blocks and what is measured; the updates of filters that stay, on several kinds of networks."

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap

from prune_nb.api import prune
from prune_nb.budgets.allocation import allocate
from prune_nb.criteria.core import load_scores, save_scores, score
from prune_nb.criteria.obd import inverse, mixture, row_losses
from prune_nb.curvature.kfac import collect
from prune_nb.models import create_model
from prune_nb.surgery.menu import selection_losses
from prune_nb.surgery.plan import composed, load_plan, save_plan
from prune_nb.surgery.quadratic import metric
from prune_nb.surgery.tucker import tucker
from prune_nb.surgery.verify import max_relative_difference

torch.set_num_threads(1)
FILTERS = ["c_obd", "c_obs", "kron_obd", "kron_obs"]


class Net(nn.Module):
    "A convolution with a bias, a depthwise and a 1x1 one."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = (
            nn.Conv2d(2, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, groups=4, bias=False),
            nn.Conv2d(4, 5, 1),
            nn.Linear(5, 3),
        )

    def forward(self, x):
        return self.head(self.c(self.b(self.a(x).tanh()).tanh()).tanh().mean((2, 3)))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    net = Net().double()
    data = [
        (torch.randn(12, 2, 5, 5, dtype=torch.float64), torch.randint(3, (12,))) for _ in range(2)
    ]
    return net, data, score(net, data, FILTERS, fisher="exact", progress=False)


def example_gradients(net, x, labels):
    "Name -> the gradient of every example for a label, by torch.func."
    params = {k: p.detach() for k, p in net.named_parameters()}

    def loss(p, x, y):
        return nn.functional.cross_entropy(functional_call(net, p, (x[None],)), y[None])

    return vmap(grad(loss), (None, 0, 0))(params, x, labels)


def test_c_obd_is_the_exact_diagonal(small):
    "Fisher of every weight from single examples and all labels, summed in loops over filters."
    net, data, scores = small
    x = torch.cat([x for x, _ in data])
    p = net(x).softmax(1).detach()
    fisher = {}
    for c in range(3):
        for k, g in example_gradients(net, x, torch.full((len(x),), c)).items():
            fisher[k] = fisher.get(k, 0) + (
                p[:, c].view(-1, *[1] * (g.dim() - 1)) * g.square()
            ).mean(0)
    own = {k: p.detach() for k, p in net.named_parameters()}

    def filter_cost(layer, i):
        return sum(
            float((0.5 * own[f"{layer}.{part}"][i] ** 2 * fisher[f"{layer}.{part}"][i]).sum())
            for part in ("weight", "bias")
            if f"{layer}.{part}" in own
        )

    for layers in (("a", "b"), ("c",)):  # the depthwise convolution goes with what it reads
        group = scores["c_obd"].groups[layers[0]]
        want = [sum(filter_cost(l, i) for l in layers) for i in range(group.group.units)]
        assert group.saliency.tolist() == pytest.approx(want, rel=1e-8)


def patches(x, layer):
    "Groups x (N P) x D: what the filters read, a one for the bias."
    p = (
        nn.functional.unfold(x, layer.kernel_size, padding=layer.padding)
        .transpose(1, 2)
        .reshape(-1, layer.groups, layer.weight[0].numel())
    )
    return (
        torch.cat([p, torch.ones_like(p[..., :1])], 2) if layer.bias is not None else p
    ).transpose(0, 1)


def test_kron_criteria_are_loops_over_dense_factors(small):
    "Factors summed position by position, the inverse of the whole Kronecker product, filter by filter."
    net, data, scores = small
    x = torch.cat([x for x, _ in data])
    reads, outs = {}, {}
    hooks = [
        m.register_forward_hook(
            lambda m, i, o, n=n: (
                reads.update({n: i[0].detach()}) or o.retain_grad() or outs.update({n: o})
            )
        )
        for n, m in net.named_children()
        if n != "head"
    ]
    logits = net(x)
    for h in hooks:
        h.remove()
    p, G = logits.softmax(1).detach(), {}
    for c in range(3):
        net.zero_grad()
        [o.__setattr__("grad", None) for o in outs.values()]
        (nn.functional.log_softmax(logits, 1)[:, c] * p[:, c].sqrt()).sum().backward(
            retain_graph=True
        )
        for n, o in outs.items():
            g = o.grad.movedim(1, 3).reshape(-1, len(net.get_submodule(n).weight))
            G[n] = G.get(n, 0) + g.T @ g / len(x)
    net.zero_grad()
    costs = {m: {} for m in ("kron_obd", "kron_obs", "c_obs")}
    for n in outs:
        layer = net.get_submodule(n)
        a = patches(reads[n], layer)
        w = torch.cat(
            [
                layer.weight.detach().flatten(1),
                *([layer.bias.detach()[:, None]] if layer.bias is not None else []),
            ],
            1,
        )
        size = len(w) // layer.groups
        for i in range(len(w)):
            b, k = divmod(i, size)
            A, own = a[b].T @ a[b] / len(a[b]), slice(b * size, (b + 1) * size)
            Gb = G[n][own, own]
            root = lambda M, mean: M + 1e-3**0.5 * mean * torch.eye(len(M))
            means = (
                torch.stack([(t.T @ t / len(t)).diagonal().mean() for t in a]).mean(),
                G[n].diagonal().mean(),
            )
            H = torch.linalg.inv(torch.kron(root(Gb, means[1]), root(A, means[0])))
            quadratic = sum(
                w[i, j] * A[j, l] * w[i, l] for j in range(len(A)) for l in range(len(A))
            )
            costs["kron_obd"].setdefault(n, []).append(float(0.5 * Gb[k, k] * quadratic))
            costs["kron_obs"].setdefault(n, []).append(
                float(0.5 * quadratic / torch.linalg.inv(root(Gb, means[1]))[k, k])
            )
            costs["c_obs"].setdefault(n, []).append(
                float(
                    sum(
                        0.5 * w[i, j] ** 2 / H[k * len(A) + j, k * len(A) + j]
                        for j in range(len(A))
                    )
                )
            )
    for m, found in costs.items():
        for layers in (("a", "b"), ("c",)):
            group = scores[m].groups[layers[0]]
            assert group.saliency.tolist() == pytest.approx(
                [sum(found[l][i] for l in layers) for i in range(group.group.units)], rel=1e-6
            )


def random_layer(seed, n, d, mixing):
    g = torch.Generator().manual_seed(seed)
    spd = lambda m, k: (
        (
            t := torch.randn(m, m + 2, generator=g, dtype=torch.float64)
            + k * torch.randn(1, m + 2, generator=g, dtype=torch.float64)
        )
        @ t.T
        / m
    )
    return spd(n, mixing), spd(d, mixing), torch.randn(n, d, generator=g, dtype=torch.float64)


def quadratic(G, A, D):
    return float(0.5 * (G @ D @ A * D).sum())


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(2, 9),
    d=st.integers(1, 6),
    mixing=st.floats(0, 3),
    share=st.floats(0.1, 0.9),
    damping=st.sampled_from([0.0, 1e-3, 0.1]),
)
def test_joint_update_loses_least(seed, n, d, mixing, share, damping):
    "In the damped model never more than the summed updates of single filters, deletion, or the update moved at random; the cost told is that of the change made."
    G, A, W = random_layer(seed, n, d, mixing)
    gone = list(range(max(1, min(n - 1, round(share * n)))))
    stay = list(range(len(gone), n))
    Gd = G + damping**0.5 * G.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    inv = inverse(G, damping)
    D = mixture(G, gone, damping) @ W - W
    want = -inv[:, gone] @ torch.linalg.inv(inv[gone][:, gone]) @ W[gone]
    assert torch.allclose(D, want, rtol=1e-7, atol=1e-9 * float(W.abs().max()))
    summed = -(inv[:, gone] / inv.diagonal()[gone]) @ W[gone]
    summed[gone] = -W[gone]
    deleted = torch.zeros_like(W)
    deleted[gone] = -W[gone]
    moved = D.clone()
    moved[stay] += 0.01 * torch.randn(
        len(stay), d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    best = quadratic(Gd, A, D)
    assert all(best <= quadratic(Gd, A, other) * (1 + 1e-9) for other in (summed, deleted, moved))
    assert float(row_losses(G, W @ A @ W.T, mixture(G, gone, damping)).sum()) == pytest.approx(
        quadratic(G, A, D), rel=1e-8
    )


def test_summed_updates_can_lose_more_than_deletion():
    "Two of three filters go. The sum of single updates, which each count on the other, is worse than none; that it lies between joint update and deletion holds for most layers, not for all."
    G = torch.tensor(
        [[2.9, -1.36, 0.89], [-1.36, 1.17, -0.06], [0.89, -0.06, 1.16]], dtype=torch.float64
    )
    W, A, gone = (
        torch.tensor([[-0.19], [2.2], [-0.77]], dtype=torch.float64),
        torch.eye(1, dtype=torch.float64),
        [0, 1],
    )
    inv = inverse(G, 0.0)
    summed = -(inv[:, gone] / inv.diagonal()[gone]) @ W[gone]
    summed[gone] = -W[gone]
    deleted = torch.zeros_like(W)
    deleted[gone] = -W[gone]
    joint, deleted, summed = (
        quadratic(G, A, D) for D in (mixture(G, gone, 0.0) @ W - W, deleted, summed)
    )
    assert joint < deleted < summed


@pytest.mark.parametrize("method", ["kron_obd", "kron_obs", "c_obs"])
def test_predicted_is_measured_where_the_loss_is_quadratic(method):
    """Two linear layers and a Gaussian likelihood: the targets are the outputs and noise of the covariance that the likelihood has, each with every input. The Fisher of the first layer is then the product of its factors,
    the loss quadratic in its filters, and every plan does what it predicts, whatever the damping.
    """
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4)).double()
    M = (t := draw(4, 7)) @ t.T
    noise = 2 * torch.linalg.cholesky(torch.linalg.inv(M)).T  # rows with the mean square M^-1
    x, noise = draw(9, 5).repeat_interleave(8, 0), torch.cat([noise, -noise]).repeat(9, 1)
    data = [(x, net(x).detach() + noise)]
    loss = lambda out, y: 0.5 * ((out - y) @ M * (out - y)).sum(1).mean()
    scores = score(net, data, method, fisher="empirical", loss=loss, progress=False)
    before = loss(net(x), data[0][1])
    for ratio in (0.2, 0.5, 0.8):
        plan = allocate(scores, ratio)
        change = float((loss(plan.apply(net)(x), data[0][1]) - before).detach())
        assert plan.predicted_loss_change == pytest.approx(change, rel=1e-9) and change > 0
        found = plan.settings["predicted"]
        assert found["joint"] == plan.predicted_loss_change <= found["deletion"] * (1 + 1e-9)
        deleted = float(
            (loss(load_plan_without_updates(plan).apply(net)(x), data[0][1]) - before).detach()
        )
        assert deleted == pytest.approx(found["deletion"], rel=1e-9)


@pytest.fixture
def silent_unit():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        net[0].weight[2] = 0
        net[0].bias[2] = -1.0  # never fires: no gradient comes back
        net[2].weight[:, 3] = 0  # nobody listens
    return net, [(torch.randn(20, 4), torch.randint(3, (20,)))]


@pytest.mark.parametrize("method", FILTERS)
def test_units_without_statistics_have_a_value(silent_unit, method):
    "Never NaN: by deletion 0, by OBS what the damping gives, less than any other; in a layer without any gradient all 0."
    net, data = silent_unit
    s = score(net, data, method, progress=False).groups["0"].saliency
    assert s.isfinite().all() and set(s.argsort()[:2].tolist()) == {2, 3}
    if method.endswith("obd"):
        assert s[2] == s[3] == 0
    with torch.no_grad():
        net[2].weight.zero_()
    s = score(net, data, method, progress=False)
    assert (s.groups["0"].saliency == 0).all()
    assert prune(net, data, method, ratio=0.4, of="units", progress=False).verify() <= 1e-5


class Heads(nn.Module):
    "Attention with separate projections of two heads, and one of torch's own."

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.own, self.up, self.down, self.head = (
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 12),
            nn.Linear(12, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        split = lambda t: t.unflatten(2, (-1, 4)).transpose(1, 2)
        x = x + self.o(
            nn.functional.scaled_dot_product_attention(
                *(split(f(x)) for f in (self.q, self.k, self.v))
            )
            .transpose(1, 2)
            .flatten(2)
        )
        x = x + self.own(x, x, x, need_weights=False)[0]
        return self.head((x + self.down(self.up(x).relu())).mean(1))


class Mobile(nn.Module):
    def __init__(self):
        super().__init__()
        conv = lambda i, o, k, g=1: nn.Sequential(
            nn.Conv2d(i, o, k, padding=k // 2, groups=g, bias=False), nn.BatchNorm2d(o), nn.ReLU6()
        )
        self.stem, self.blocks, self.head = (
            conv(1, 8, 3),
            nn.ModuleList(
                nn.Sequential(conv(8, 16, 1), conv(16, 16, 3, 16), nn.Conv2d(16, 8, 1))
                for _ in range(2)
            ),
            nn.Linear(8, 10),
        )

    def forward(self, x):
        x = self.stem(x)
        for b in self.blocks:
            x = x + b(x)
        return self.head(x.mean((2, 3)))


NETS = {
    "resnet20": lambda: create_model("resnet20x0.5", 10, 1, 8, seed=0),
    "densenet": lambda: create_model("densenet40x0.25", 10, 1, 8, seed=0),
    "mobile": Mobile,
    "heads": Heads,
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", ["kron_obs", "c_obs"])
def test_updated_networks_are_exact(net, method, tmp_path):
    "Pruned and masked original compute the same, on a second network of this kind too; saved, loaded and composed with another plan as well."
    torch.manual_seed(0)
    model, other = (NETS[net]().eval() for _ in range(2))
    x = torch.randn(16, 5, 8) if net == "heads" else torch.randn(16, 1, 8, 8)
    data = [(x, torch.randint(3, (16,)))]
    with pytest.warns(UserWarning) if net == "heads" else pytest.MonkeyPatch.context():
        scores = score(model, data, method, progress=False)
    plan = allocate(scores, 0.3)
    assert plan.updates and all(c.predicted >= 0 for c in plan.cuts.values())
    for m in (model, other):
        assert max_relative_difference(plan.apply(m), plan.masked(m), x) <= 1e-5
    plain = load_plan_without_updates(plan)
    assert max_relative_difference(plain.apply(model), plan.apply(model), x) > 1e-4
    save_plan(plan, tmp_path / "plan.json")
    assert (
        max_relative_difference(
            load_plan(tmp_path / "plan.json").apply(model), plan.apply(model), x
        )
        == 0
    )
    save_scores(scores, tmp_path / "scores.safetensors")
    again = allocate(load_scores(tmp_path / "scores.safetensors"), 0.3)
    assert again.updates == plan.updates and again.predicted_loss_change == pytest.approx(
        plan.predicted_loss_change
    )
    once = plan.apply(model)
    with pytest.warns(UserWarning) if net == "heads" else pytest.MonkeyPatch.context():
        second = allocate(score(once, data, method, progress=False), 0.2)
    both = composed(plan, second, model)
    assert (
        max_relative_difference(both.apply(model), second.apply(once), x) <= 1e-5
        and max_relative_difference(both.masked(model), both.apply(model), x) <= 1e-5
    )


def load_plan_without_updates(plan):
    plan = copy.deepcopy(plan)
    plan.updates = {}
    return plan


def test_what_has_no_factors_is_told():
    "Torch's own attention reads the weights of its layers itself."
    torch.manual_seed(0)
    with pytest.warns(UserWarning):
        scores = score(
            Heads(), [(torch.randn(8, 5, 8), torch.randint(3, (8,)))], "kron_obs", progress=False
        )
    assert (
        "only nn.Linear" in scores.skipped["own"]
        and "its parent reads the weight itself" in scores.skipped["own.out_proj"]
    )
    assert any(
        g.group.members["q.weight"][0].shape[1] == 4
        for g in scores.groups.values()
        if "q.weight" in g.group.members
    )


def test_one_pass_for_all(monkeypatch):
    "Criteria of filters and of directions share the K-FAC pass, batch by batch where one wants a moving average; moments are one more for each kind of basis."
    from prune_nb.criteria import layers

    passes, more = [], []
    second = layers.second_moments
    monkeypatch.setattr(
        layers,
        "collect",
        lambda *args, **options: passes.append(options) or collect(*args, **options),
    )
    monkeypatch.setattr(
        layers,
        "second_moments",
        lambda *args, **options: more.append(options) or second(*args, **options),
    )
    net, data = Net(), [(torch.randn(8, 2, 5, 5), torch.randint(3, (8,))) for _ in range(3)]
    found = score(
        net,
        data,
        [*FILTERS, "eigendamage", "eigendamage_ekfac", "curvature_tucker"],
        progress=False,
    )
    assert (len(passes), len(more)) == (1, 1) and (
        passes[0]["a"],
        passes[0]["bias"],
        passes[0]["diagonal"],
    ) == ("both", True, True)
    passes.clear(), more.clear()
    again = score(
        net,
        data,
        [*FILTERS, "eigendamage", "eigendamage_ekfac", "curvature_tucker", "improved_eigendamage"],
        progress=False,
    )
    assert (len(passes), len(more)) == (3, 2)
    for m, s in found.items():
        for g in s.groups:
            assert torch.allclose(s.groups[g].saliency, again[m].groups[g].saliency, rtol=1e-4)
        for n in s.layers:
            assert torch.allclose(
                s.layers[n].saliency.sum(), again[m].layers[n].saliency.sum(), rtol=1e-4
            )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 8),
    d=st.integers(1, 8),
    taps=st.sampled_from([1, 2, 9]),
    mixing=st.floats(0, 3),
    ranks=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_whitened_tucker_loses_no_more_than_selection(seed, n, d, taps, mixing, ranks):
    "Neither does anything else of these ranks do better by a small step."
    G, A, _ = random_layer(seed, n, d, mixing)
    W = torch.randn(n, d, taps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    r_out, r_in = 1 + round(ranks[0] * (n - 1)), 1 + round(ranks[1] * (d - 1))
    m = metric(W, A, G)
    f = tucker(W, r_out, r_in, m)
    loss = lambda D: sum(quadratic(G, A, D[..., t]) for t in range(taps))
    whole = loss(W)
    assert (
        loss(W - f.weight)
        <= float(selection_losses(0.5 * m.whiten(W).square().sum(2))[r_out - 1, r_in - 1])
        + 1e-9 * whole
    )
    g = torch.Generator().manual_seed(seed)
    near = [
        part + 1e-3 * part.norm() * torch.randn(part.shape, generator=g, dtype=torch.float64)
        for part in f
    ]
    assert loss(W - f.weight) <= loss(W - type(f)(*near).weight) * (1 + 1e-3) + 1e-9 * whole


@pytest.mark.parametrize(
    "method",
    ["eigendamage_ekfac", "eigendamage_separable", "improved_eigendamage", "curvature_tucker"],
)
def test_directions_without_statistics_are_worth_nothing(method):
    "Inputs that are always zero, and a layer to which no gradient comes: finite, zero, and a plan that holds."
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    with torch.no_grad():
        net[0].weight[2:] = 0
        net[0].bias.fill_(-1)
    data = [(torch.randn(16, 3, 6, 6), torch.randint(3, (16,)))]
    for dead in (False, True):
        if dead:
            nn.init.zeros_(net[2].weight)
        scores = score(net, data, method, progress=False)
        for l in scores.layers.values():
            assert l.saliency.isfinite().all() and (l.saliency >= 0).all()
        if dead:
            assert all((l.saliency == 0).all() for l in scores.layers.values())
        if dead and method == "curvature_tucker":
            continue  # everything is free, and the cheapest goes past the budget, which is told
        plan = allocate(
            scores, *((0.35, "params") if method == "curvature_tucker" else (0.3, "units"))
        )
        assert max_relative_difference(
            plan.apply(net), plan.masked(net), data[0][0]
        ) <= 1e-5 and 0 <= plan.predicted_loss_change < float("inf")
