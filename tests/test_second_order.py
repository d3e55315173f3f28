"""Second-order criteria against loops, dense Fisher blocks and measurements.

Also the updates of kept filters, on several kinds of networks.
"""

import contextlib
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
from prune_nb.criteria.obd import damped_inverse, mixture, row_losses
from prune_nb.curvature.kfac import collect
from prune_nb.models import create_model
from prune_nb.surgery.menu import selection_losses
from prune_nb.surgery.plan import compose, load_plan, save_plan
from prune_nb.surgery.quadratic import metric
from prune_nb.surgery.tucker import tucker
from prune_nb.surgery.verify import max_relative_difference

torch.set_num_threads(1)
FILTERS = ["c_obd", "c_obs", "kron_obd", "kron_obs"]
COUPLED = (("a", "b"), ("c",))  # layers of `Net` with common groups: a depthwise one and its input


class Net(nn.Module):
    """A convolution with a bias, a depthwise and a 1x1 one."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, groups=4, bias=False)
        self.c = nn.Conv2d(4, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.c(self.b(self.a(x).tanh()).tanh()).tanh().mean((2, 3)))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    net = Net().double()
    data = []
    for _ in range(2):
        x = torch.randn(12, 2, 5, 5, dtype=torch.float64)
        data.append((x, torch.randint(3, (12,))))
    return net, data, score(net, data, FILTERS, fisher="exact", progress=False)


def example_gradients(net, x, labels):
    """Return name -> the gradient of every example for a label, by torch.func."""
    params = {k: p.detach() for k, p in net.named_parameters()}

    def loss(p, x, y):
        return nn.functional.cross_entropy(functional_call(net, p, (x[None],)), y[None])

    return vmap(grad(loss), (None, 0, 0))(params, x, labels)


def dense_fisher(net, x):
    """Return name -> the diagonal of the exact Fisher, summed over all labels."""
    p = net(x).softmax(1).detach()
    fisher = {}
    for c in range(3):
        for k, g in example_gradients(net, x, torch.full((len(x),), c)).items():
            chances = p[:, c].view(-1, *[1] * (g.dim() - 1))
            fisher[k] = fisher.get(k, 0) + (chances * g.square()).mean(0)
    return fisher


def test_c_obd_is_the_exact_diagonal(small):
    """Compare with the Fisher of every weight from single examples, in loops over filters."""
    net, data, scores = small
    fisher = dense_fisher(net, torch.cat([x for x, _ in data]))
    params = {k: p.detach() for k, p in net.named_parameters()}

    def filter_cost(layer, i):
        names = [n for n in (f"{layer}.weight", f"{layer}.bias") if n in params]
        return sum(float((0.5 * params[n][i] ** 2 * fisher[n][i]).sum()) for n in names)

    for layers in COUPLED:
        group = scores["c_obd"].groups[layers[0]]
        want = []
        for i in range(group.group.units):
            want.append(sum(filter_cost(layer, i) for layer in layers))
        assert group.saliency.tolist() == pytest.approx(want, rel=1e-8)


def patches(x, layer):
    """Return what the filters read, a one for the bias: groups x (N P) x D."""
    p = nn.functional.unfold(x, layer.kernel_size, padding=layer.padding).transpose(1, 2)
    p = p.reshape(-1, layer.groups, layer.weight[0].numel())
    if layer.bias is not None:
        p = torch.cat([p, torch.ones_like(p[..., :1])], 2)
    return p.transpose(0, 1)


def filters_with_bias(layer):
    w = layer.weight.detach().flatten(1)
    return w if layer.bias is None else torch.cat([w, layer.bias.detach()[:, None]], 1)


def observe(net, x):
    """Return (logits, layer name -> inputs, layer name -> outputs with gradients to keep)."""
    reads, outs, hooks = {}, {}, []
    for name, m in net.named_children():
        if name == "head":
            continue

        def keep(m, i, o, name=name):
            o.retain_grad()
            reads[name], outs[name] = i[0].detach(), o

        hooks.append(m.register_forward_hook(keep))
    logits = net(x)
    for h in hooks:
        h.remove()
    return logits, reads, outs


def dense_gradient_factors(net, logits, outs):
    """Return layer name -> C_out x C_out, summed position by position over all labels."""
    p, n_examples = logits.softmax(1).detach(), len(logits)
    factors = {}
    for c in range(3):
        net.zero_grad()
        for o in outs.values():
            o.grad = None
        chances = p[:, c].sqrt()
        loss = (nn.functional.log_softmax(logits, 1)[:, c] * chances).sum()
        loss.backward(retain_graph=True)
        for name, o in outs.items():
            g = o.grad.movedim(1, 3).reshape(-1, o.shape[1])
            factors[name] = factors.get(name, 0) + g.T @ g / n_examples
    net.zero_grad()
    return factors


def damped(factor, mean):
    return factor + 1e-3**0.5 * mean * torch.eye(len(factor))


def filter_costs(layer, x, G):
    """Return method -> the cost of every filter, from the inverse of the whole Kronecker product."""
    a, w = patches(x, layer), filters_with_bias(layer)
    size = len(w) // layer.groups
    mean_a = torch.stack([(t.T @ t / len(t)).diagonal().mean() for t in a]).mean()
    mean_g = G.diagonal().mean()
    costs = {m: [] for m in ("kron_obd", "kron_obs", "c_obs")}
    for i in range(len(w)):
        block, k = divmod(i, size)
        rows = slice(block * size, (block + 1) * size)
        A, Gb = a[block].T @ a[block] / len(a[block]), G[rows, rows]
        d = len(A)
        H = torch.linalg.inv(torch.kron(damped(Gb, mean_g), damped(A, mean_a)))
        form = 0.0
        for j in range(d):
            form += sum(w[i, j] * A[j, m] * w[i, m] for m in range(d))
        surgery = form / torch.linalg.inv(damped(Gb, mean_g))[k, k]
        weights = sum(w[i, j] ** 2 / H[k * d + j, k * d + j] for j in range(d))
        costs["kron_obd"].append(float(0.5 * Gb[k, k] * form))
        costs["kron_obs"].append(float(0.5 * surgery))
        costs["c_obs"].append(float(0.5 * weights))
    return costs


def test_kron_criteria_are_loops_over_dense_factors(small):
    """Compare filter by filter, with factors that are summed position by position."""
    net, data, scores = small
    logits, reads, outs = observe(net, torch.cat([x for x, _ in data]))
    G = dense_gradient_factors(net, logits, outs)
    costs = {n: filter_costs(net.get_submodule(n), reads[n], G[n]) for n in outs}
    for method in ("kron_obd", "kron_obs", "c_obs"):
        for layers in COUPLED:
            found = scores[method].groups[layers[0]].saliency.tolist()
            want = [sum(parts) for parts in zip(*(costs[n][method] for n in layers))]
            assert found == pytest.approx(want, rel=1e-6)


def random_layer(seed, n, d, mixing):
    """Return G, A and W; the larger `mixing`, the more the directions of the factors agree."""
    g = torch.Generator().manual_seed(seed)

    def positive(m):
        t = torch.randn(m, m + 2, generator=g, dtype=torch.float64)
        t = t + mixing * torch.randn(1, m + 2, generator=g, dtype=torch.float64)
        return t @ t.T / m

    return positive(n), positive(d), torch.randn(n, d, generator=g, dtype=torch.float64)


def quadratic(G, A, D):
    return float(0.5 * (G @ D @ A * D).sum())


def changes(G, W, removed, damping):
    """Return the changes by the joint update, by summed single updates, and by deletion."""
    inv = damped_inverse(G, damping)
    joint = mixture(G, removed, damping) @ W - W
    summed = -(inv[:, removed] / inv.diagonal()[removed]) @ W[removed]
    summed[removed] = -W[removed]
    deleted = torch.zeros_like(W)
    deleted[removed] = -W[removed]
    return joint, summed, deleted


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
    """The joint update is the best in the damped model, and its reported cost is the true one.

    It is compared with the summed updates of single filters, deletion, and the update moved at
    random.
    """
    G, A, W = random_layer(seed, n, d, mixing)
    removed = list(range(max(1, min(n - 1, round(share * n)))))
    kept = list(range(len(removed), n))
    Gd = G + damping**0.5 * G.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    inv = damped_inverse(G, damping)
    D, summed, deleted = changes(G, W, removed, damping)
    want = -inv[:, removed] @ torch.linalg.inv(inv[removed][:, removed]) @ W[removed]
    assert torch.allclose(D, want, rtol=1e-7, atol=1e-9 * float(W.abs().max()))
    moved, g = D.clone(), torch.Generator().manual_seed(seed)
    moved[kept] += 0.01 * torch.randn(len(kept), d, generator=g, dtype=torch.float64)
    best = quadratic(Gd, A, D)
    for other in (summed, deleted, moved):
        assert best <= quadratic(Gd, A, other) * (1 + 1e-9)
    losses = row_losses(G, W @ A @ W.T, mixture(G, removed, damping))
    assert float(losses.sum()) == pytest.approx(quadratic(G, A, D), rel=1e-8)


def test_summed_updates_can_lose_more_than_deletion():
    """Two of three filters are removed; single updates, each counting on the other, are worst.

    That the sum lies between joint update and deletion holds for most layers, not for all.
    """
    G = torch.tensor([[2.9, -1.36, 0.89], [-1.36, 1.17, -0.06], [0.89, -0.06, 1.16]]).double()
    W = torch.tensor([[-0.19], [2.2], [-0.77]]).double()
    A = torch.eye(1, dtype=torch.float64)
    joint, summed, deleted = (quadratic(G, A, D) for D in changes(G, W, [0, 1], 0.0))
    assert joint < deleted < summed


def plan_without_updates(plan):
    plan = copy.deepcopy(plan)
    plan.updates = {}
    return plan


def gaussian_regression():
    """Return (network, data, loss) of two linear layers and a Gaussian likelihood.

    The targets are the outputs and noise of the covariance that the likelihood has, each with
    every input. The Fisher of the first layer is then the product of its factors, and the loss
    quadratic in its filters.
    """
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4)).double()
    t = torch.randn(4, 7, generator=g, dtype=torch.float64)
    M = t @ t.T
    noise = 2 * torch.linalg.cholesky(torch.linalg.inv(M)).T  # rows with the mean square M^-1
    x = torch.randn(9, 5, generator=g, dtype=torch.float64).repeat_interleave(8, 0)
    noise = torch.cat([noise, -noise]).repeat(9, 1)

    def loss(out, y):
        return 0.5 * ((out - y) @ M * (out - y)).sum(1).mean()

    return net, [(x, net(x).detach() + noise)], loss


@pytest.mark.parametrize("method", ["kron_obd", "kron_obs", "c_obs"])
def test_predicted_is_measured_where_the_loss_is_quadratic(method):
    """Every plan does what it predicts, whatever the damping."""
    net, data, loss = gaussian_regression()
    x, y = data[0]
    scores = score(net, data, method, fisher="empirical", loss=loss, progress=False)

    def measured(plan):
        return float((loss(plan.apply(net)(x), y) - loss(net(x), y)).detach())

    for ratio in (0.2, 0.5, 0.8):
        plan = allocate(scores, ratio)
        change = measured(plan)
        assert plan.predicted_loss_change == pytest.approx(change, rel=1e-9)
        assert change > 0
        found = plan.settings["predicted"]
        assert found["joint"] == plan.predicted_loss_change
        assert found["joint"] <= found["deletion"] * (1 + 1e-9)
        deleted = measured(plan_without_updates(plan))
        assert deleted == pytest.approx(found["deletion"], rel=1e-9)


@pytest.fixture
def silent_unit():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        net[0].weight[2] = 0
        net[0].bias[2] = -1.0  # never active: no gradient comes back
        net[2].weight[:, 3] = 0  # read by nothing
    return net, [(torch.randn(20, 4), torch.randint(3, (20,)))]


@pytest.mark.parametrize("method", FILTERS)
def test_units_without_statistics_have_a_value(silent_unit, method):
    """They are never NaN: 0 by deletion, by OBS what the damping gives, less than any other.

    In a layer without any gradient all are 0.
    """
    net, data = silent_unit
    s = score(net, data, method, progress=False).groups["0"].saliency
    assert s.isfinite().all()
    assert set(s.argsort()[:2].tolist()) == {2, 3}
    if method.endswith("obd"):
        assert s[2] == s[3] == 0
    with torch.no_grad():
        net[2].weight.zero_()
    s = score(net, data, method, progress=False)
    assert (s.groups["0"].saliency == 0).all()
    assert prune(net, data, method, ratio=0.4, of="units", progress=False).verify() <= 1e-5


class Heads(nn.Module):
    """Attention with separate projections of two heads, and one `nn.MultiheadAttention`."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.k = nn.Linear(8, 8)
        self.v = nn.Linear(8, 8)
        self.o = nn.Linear(8, 8)
        self.own = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = (f(x).unflatten(2, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        x = x + self.own(x, x, x, need_weights=False)[0]
        return self.head((x + self.down(self.up(x).relu())).mean(1))


def conv_norm_relu(c_in, c_out, kernel, groups=1):
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU6())


class Mobile(nn.Module):
    """A stem and two inverted residual blocks."""

    def __init__(self):
        super().__init__()
        self.stem = conv_norm_relu(1, 8, 3)
        self.blocks = nn.ModuleList()
        for _ in range(2):
            layers = conv_norm_relu(8, 16, 1), conv_norm_relu(16, 16, 3, 16), nn.Conv2d(16, 8, 1)
            self.blocks.append(nn.Sequential(*layers))
        self.head = nn.Linear(8, 10)

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


def expected_warning(net):
    """Return a context: layers without factors are reported by a warning."""
    return pytest.warns(UserWarning) if net == "heads" else contextlib.nullcontext()


def assert_same(a, b, x, tolerance=1e-5):
    assert max_relative_difference(a, b, x) <= tolerance


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", ["kron_obs", "c_obs"])
def test_updated_networks_are_exact(net, method, tmp_path):
    """Pruned and masked original compute the same, on a second network of this kind too.

    So they do after the plan was saved and loaded, and composed with another one.
    """
    torch.manual_seed(0)
    model, other = (NETS[net]().eval() for _ in range(2))
    x = torch.randn(16, 5, 8) if net == "heads" else torch.randn(16, 1, 8, 8)
    data = [(x, torch.randint(3, (16,)))]
    with expected_warning(net):
        scores = score(model, data, method, progress=False)
    plan = allocate(scores, 0.3)
    assert plan.updates
    assert all(c.predicted >= 0 for c in plan.cuts.values())
    for m in (model, other):
        assert_same(plan.apply(m), plan.masked(m), x)
    once, plain = plan.apply(model), plan_without_updates(plan).apply(model)
    assert max_relative_difference(plain, once, x) > 1e-4
    save_plan(plan, tmp_path / "plan.json")
    assert_same(load_plan(tmp_path / "plan.json").apply(model), once, x, tolerance=0)
    save_scores(scores, tmp_path / "scores.safetensors")
    again = allocate(load_scores(tmp_path / "scores.safetensors"), 0.3)
    assert again.updates == plan.updates
    assert again.predicted_loss_change == pytest.approx(plan.predicted_loss_change)
    with expected_warning(net):
        second = allocate(score(once, data, method, progress=False), 0.2)
    both = compose(plan, second, model)
    assert_same(both.apply(model), second.apply(once), x)
    assert_same(both.masked(model), both.apply(model), x)


def test_layers_without_factors_are_reported():
    """`nn.MultiheadAttention` reads the weights of its layers itself."""
    torch.manual_seed(0)
    data = [(torch.randn(8, 5, 8), torch.randint(3, (8,)))]
    with pytest.warns(UserWarning):
        scores = score(Heads(), data, "kron_obs", progress=False)
    assert "only nn.Linear" in scores.skipped["own"]
    assert "its parent reads the weight itself" in scores.skipped["own.out_proj"]
    members = [g.group.members for g in scores.groups.values()]
    assert any("q.weight" in m and m["q.weight"][0].shape[1] == 4 for m in members)


@pytest.fixture
def counted_passes(monkeypatch):
    """Return the options of every K-FAC pass and of every pass for moments, as they are made."""
    from prune_nb.criteria import layers

    passes, moments = [], []
    second_moments = layers.second_moments

    def counted_collect(*args, **options):
        passes.append(options)
        return collect(*args, **options)

    def counted_moments(*args, **options):
        moments.append(options)
        return second_moments(*args, **options)

    monkeypatch.setattr(layers, "collect", counted_collect)
    monkeypatch.setattr(layers, "second_moments", counted_moments)
    return passes, moments


def test_all_criteria_share_one_pass(counted_passes):
    """Criteria of filters and of directions share the K-FAC pass; moments are one more.

    With a moving average the pass is made batch by batch, and moments for each kind of basis.
    """
    passes, moments = counted_passes
    net, data = Net(), [(torch.randn(8, 2, 5, 5), torch.randint(3, (8,))) for _ in range(3)]
    methods = [*FILTERS, "eigendamage", "eigendamage_ekfac", "curvature_tucker"]
    found = score(net, data, methods, progress=False)
    assert (len(passes), len(moments)) == (1, 1)
    assert {k: passes[0][k] for k in ("a", "bias", "diagonal")} == dict(
        a="both", bias=True, diagonal=True
    )
    passes.clear()
    moments.clear()
    again = score(net, data, [*methods, "improved_eigendamage"], progress=False)
    assert (len(passes), len(moments)) == (3, 2)
    for m, s in found.items():
        for name, g in s.groups.items():
            assert torch.allclose(g.saliency, again[m].groups[name].saliency, rtol=1e-4)
        for name, layer in s.layers.items():
            total = again[m].layers[name].saliency.sum()
            assert torch.allclose(layer.saliency.sum(), total, rtol=1e-4)


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
    """No small step to other factors of these ranks does better either."""
    G, A, _ = random_layer(seed, n, d, mixing)
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(n, d, taps, generator=g, dtype=torch.float64)
    r_out, r_in = 1 + round(ranks[0] * (n - 1)), 1 + round(ranks[1] * (d - 1))
    m = metric(W, A, G)
    f = tucker(W, r_out, r_in, m)

    def loss(D):
        return sum(quadratic(G, A, D[..., t]) for t in range(taps))

    rounding = 1e-9 * loss(W)
    selected = selection_losses(0.5 * m.whiten(W).square().sum(2))[r_out - 1, r_in - 1]
    assert loss(W - f.weight) <= float(selected) + rounding
    g, near = torch.Generator().manual_seed(seed), []
    for part in f:
        step = torch.randn(part.shape, generator=g, dtype=torch.float64)
        near.append(part + 1e-3 * part.norm() * step)
    assert loss(W - f.weight) <= loss(W - type(f)(*near).weight) * (1 + 1e-3) + rounding


def network_with_silent_inputs():
    """Return a network whose second convolution has inputs that are always zero."""
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
    return net, [(torch.randn(16, 3, 6, 6), torch.randint(3, (16,)))]


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize(
    "method",
    ["eigendamage_ekfac", "eigendamage_separable", "improved_eigendamage", "curvature_tucker"],
)
def test_directions_without_statistics_are_worth_nothing(method, dead):
    """Values are finite and not negative, zero in a layer without gradient, and a plan is exact."""
    net, data = network_with_silent_inputs()
    if dead:
        nn.init.zeros_(net[2].weight)
    scores = score(net, data, method, progress=False)
    for layer in scores.layers.values():
        assert layer.saliency.isfinite().all()
        assert (layer.saliency >= 0).all()
        assert not dead or (layer.saliency == 0).all()
    if dead and method == "curvature_tucker":
        return  # everything is free, and the cheapest form exceeds the budget, which is reported
    budget = (0.35, "params") if method == "curvature_tucker" else (0.3, "units")
    plan = allocate(scores, *budget)
    assert_same(plan.apply(net), plan.masked(net), data[0][0])
    assert 0 <= plan.predicted_loss_change < float("inf")
