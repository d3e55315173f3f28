"Statistics of randomly drawn layers against brute force in float64: one example, one class, one weight at a time, by automatic differentiation."

import itertools
import subprocess
import sys
from typing import NamedTuple

import torch
from conftest import ENVIRONMENT, ROOT
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from prune_nb.core import generator
from prune_nb.curvature.ekfac import layer_bases, second_moments
from prune_nb.curvature.kfac import channel_part, collect

CLASSES = 3
EXACT = 1e-10  # of the largest entry
quick = settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed, "drawn", *shape))


def near(found, expected):
    "To `EXACT` of the largest entry, which must not be zero."
    assert found.shape == expected.shape and found.dtype == expected.dtype == torch.float64
    assert float((found - expected).abs().max()) <= EXACT * float(expected.abs().max()), (
        found,
        expected,
    )


class Case(NamedTuple):
    "A network whose `layer` was drawn, and data for it in batches."

    net: nn.Sequential
    x: torch.Tensor
    y: torch.Tensor
    batches: tuple
    fisher: str

    @property
    def layer(self):
        return self.net[0]

    @property
    def data(self):
        return list(zip(self.x.split(self.batches), self.y.split(self.batches)))


@st.composite
def convolutions(draw):
    "A convolution over one or two axes and the shape of an image that it can read."
    axes, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    several = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(axes))
    into, out, kernel, stride, dilation = (
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        several(1, 4),
        several(1, 3),
        several(1, 3),
    )
    mode = draw(st.sampled_from(["zeros"] * 4 + ["circular", "reflect"]))
    padding = (
        draw(st.sampled_from(["valid", "same"])) if draw(st.integers(0, 7)) == 0 else several(0, 3)
    )
    if padding == "same":
        stride = (1,) * axes
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation)]
    pads = (
        [s - 1 for s in spans]
        if padding == "same"
        else [0] * axes
        if padding == "valid"
        else [2 * p for p in padding]
    )
    size = tuple(max(1, s - p) + draw(st.integers(0, 4)) for s, p in zip(spans, pads))
    if mode != "zeros":
        assume(
            all(p // 2 + p % 2 < n for p, n in zip(pads, size))
        )  # no more can be mirrored than is there
    make = nn.Conv1d if axes == 1 else nn.Conv2d
    return make(into, out, kernel, stride, padding, dilation, groups, draw(st.booleans()), mode), (
        into,
        *size,
    )


@st.composite
def linears(draw):
    "A linear layer over an example of up to three leading dimensions."
    into = draw(st.integers(1, 5))
    return nn.Linear(into, draw(st.integers(1, 5)), draw(st.booleans())), (
        *draw(st.lists(st.integers(1, 4), max_size=2)),
        into,
    )


@st.composite
def cases(draw, layers=st.one_of(convolutions(), convolutions(), convolutions(), linears())):
    (layer, shape), seed = draw(layers), draw(st.integers(0, 99))
    batches = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    x = normal(sum(batches), *shape, seed=seed)
    layer = layer.double()
    net = nn.Sequential(
        layer, nn.Tanh(), nn.Flatten(), nn.Linear(layer(x)[0].numel(), CLASSES).double()
    )
    with torch.no_grad():
        for i, w in enumerate(net.parameters()):
            w.copy_(normal(*w.shape, seed=seed + i))
    return Case(
        net,
        x,
        torch.randint(CLASSES, (len(x),), generator=generator(seed)),
        batches,
        draw(st.sampled_from(["exact", "empirical"])),
    )


class Brute(NamedTuple):
    "By the definitions. D weights of an output channel; with groups, those of one."

    A: torch.Tensor  # groups x D + 1 x D + 1, a constant 1 behind every patch
    G: torch.Tensor  # groups x C_out x C_out
    rows: torch.Tensor  # (example, class) x C_out x D + 1: root of p times the gradient of log p in the weight and the bias


def brute(case) -> Brute:
    layer, groups = case.layer, getattr(case.layer, "groups", 1)
    channels = 1 if isinstance(layer, nn.Conv1d | nn.Conv2d) else -1
    weights, bias = (
        layer.weight,
        torch.zeros(len(layer.weight), dtype=torch.float64, requires_grad=True),
    )  # added to the outputs
    patches, rows, G = [[] for _ in range(groups)], [], 0
    for x, y in zip(case.x.split(1), case.y):
        z = (layer(x).movedim(channels, -1) + bias).movedim(-1, channels)
        for g, store in enumerate(
            patches
        ):  # what an output of the group's first channel makes of its weights is what it reads
            first = g * (len(weights) // groups)
            store += [
                torch.autograd.grad(out, weights, retain_graph=True)[0][first].flatten()
                for out in z.select(channels, first).flatten()
            ]
        log_p = case.net[1:](z).log_softmax(1)[0]
        for c in range(CLASSES) if case.fisher == "exact" else [y]:
            root = (log_p[c] / 2).exp().item() if case.fisher == "exact" else 1.0
            at_z, at_w, at_b = torch.autograd.grad(log_p[c], (z, weights, bias), retain_graph=True)
            rows.append(root * torch.cat([at_w.flatten(1), at_b[:, None]], 1))
            g = root * at_z.movedim(channels, 0).reshape(groups, len(weights) // groups, -1)
            G = G + g @ g.mT / len(case.x)
    a = torch.stack([torch.stack(store) for store in patches])
    a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2)
    return Brute(a.mT @ a / a.shape[1], G, torch.stack(rows))


def taps(layer):
    return layer.weight[0, 0].numel()


def channels_only(A, offsets):
    "Of a full factor with a last row for the bias: averaged over kernel offsets."
    blocks, beside = (
        channel_part(A[:, :-1, :-1], offsets),
        A[:, :-1, -1].unflatten(1, (-1, offsets)).mean(2),
    )
    return torch.cat(
        [
            torch.cat([blocks, beside[:, :, None]], 2),
            torch.cat([beside, A[:, -1, -1:]], 1)[:, None],
        ],
        1,
    )


def grouped(found, layer):
    return found if getattr(layer, "groups", 1) > 1 else found[None]


@quick
@given(cases(), st.booleans())
def test_factors_and_diagonal(case, bias):
    expected, layer = brute(case), case.layer
    k = collect(
        case.net,
        case.data,
        layers=["0"],
        a="both",
        bias=bias,
        diagonal=True,
        fisher=case.fisher,
        progress=False,
    )["0"]
    last = None if bias and layer.bias is not None else -1
    near(grouped(k.A_full, layer), expected.A[:, :last, :last])
    near(grouped(k.A, layer), channels_only(expected.A, taps(layer))[:, :last, :last])
    near(grouped(k.G, layer), expected.G)
    squares = expected.rows.square().sum(0) / len(case.x)
    near(k.diagonal.flatten(1), squares[:, :-1])
    if layer.bias is not None:
        near(k.bias_diagonal, squares[:, -1])
    assert (k.examples, k.positions, k.calls) == (
        len(case.x),
        case.layer(case.x)[0].numel() // len(layer.weight),
        1,
    )
    alone = collect(
        case.net, case.data, layers=["0"], bias=bias, fisher=case.fisher, progress=False
    )["0"]  # channels by their own kernel
    near(alone.A, k.A)


@quick
@given(cases(), st.sampled_from(["eigenvectors", "random"]), st.booleans(), st.booleans())
def test_ekfac_moments(case, kind, full, bias):
    layer, groups = case.layer, getattr(case.layer, "groups", 1)
    bases = layer_bases(
        collect(
            case.net,
            case.data,
            layers=["0"],
            a="both",
            bias=bias,
            fisher=case.fisher,
            progress=False,
        ),
        full=full,
    )
    if kind == "random":
        bases = {"0": tuple(torch.linalg.qr(normal(*b.shape, seed=1)).Q for b in bases["0"])}
    found = second_moments(
        case.net, case.data, bases, fisher=case.fisher, bias=bias, progress=False
    )["0"]
    U, V = (grouped(b, layer) for b in bases["0"])
    rows, last = (
        brute(case).rows.unflatten(1, (groups, -1)),
        bias and layer.bias is not None,
    )  # row x groups x C_out x D + 1
    if full:
        expected = torch.einsum("rgod,gou,gdv->rguv", rows if last else rows[..., :-1], U, V)
    else:  # the bias at every offset
        d = rows[..., :-1].unflatten(3, (-1, taps(layer)))
        if last:
            d = torch.cat([d, rows[..., -1:, None].expand(*d.shape[:3], 1, d.shape[-1])], 3)
        expected = torch.einsum("rgoct,gou,gcv->rguvt", d, U, V)
    expected = expected.square().sum(0).flatten(0, 1) / len(case.x)
    assert found.shape[1] == (
        V.shape[-1] if full or taps(layer) == 1 else layer.weight.shape[1] + last
    )
    near(found.flatten(1), expected.flatten(1))


@st.composite
def one_position(draw):
    "A layer whose kernel covers the whole image, so that it is read at one position."
    size = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    into, out, bias = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.booleans())
    return draw(
        st.sampled_from(
            [
                (nn.Conv2d(into, out, size, bias=bias), (into, *size)),
                (nn.Conv1d(into, out, size[0], bias=bias), (into, size[0])),
                (nn.Linear(into, out, bias), (into,)),
            ]
        )
    )


@quick
@given(cases(one_position()), st.booleans())
def test_one_position_of_one_example_is_exact(case, bias):
    "There the gradient is one outer product, and the Fisher block, or what the true label puts in its place, is the Kronecker product."
    one = case._replace(x=case.x[:1], y=case.y[:1], batches=(1,))
    k = collect(
        one.net, one.data, layers=["0"], a="full", bias=bias, fisher=one.fisher, progress=False
    )["0"]
    rows = brute(one).rows[..., : None if bias and case.layer.bias is not None else -1].flatten(1)
    near(torch.kron(k.G, k.A_full), rows.T @ rows)


SCRIPT = """
import os, sys, torch
from torch import nn
from torch.distributed import barrier, destroy_process_group, group, init_process_group
from prune_nb.core import generator
from prune_nb.curvature.ekfac import layer_bases, second_moments
from prune_nb.curvature.kfac import collect
torch.set_num_threads(1)
folder, rank, shared = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(36, 3)).double()
with torch.no_grad():
    for i, w in enumerate(net.parameters()): w.copy_(.5 * torch.randn(w.shape, generator=generator(0, i)))
x, y = torch.randn(26, 2, 5, 5, generator=generator(0, "x")).double(), torch.arange(26) % 3
everything = list(zip(x.split(4), y.split(4)))
if shared: init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
every, options = group.WORLD if shared else None, dict(draws=2, bias=True, progress=False)
shares = {"uneven": [everything[:5], everything[5:]], "single": [[(x[r::2], y[r::2])] for r in range(2)]}
for name in shared or ["alone"]:
    data = shares[name][rank] if shared else everything
    statistics = collect(net, data, a="full", group=every, **options)
    moments = second_moments(net, data, layer_bases(statistics, full=True, group=every), group=every, **options)
    torch.save({n: [k.A_full, k.G, moments[n]] for n, k in statistics.items()} | {"loss": [torch.tensor([statistics.loss, moments.loss]).double()]}, f"{folder}/{name}{rank}")
if shared:
    barrier()
    destroy_process_group()
    os._exit(0)   # the threads of gloo may abort a process that shuts down by itself
"""


def test_two_processes_equal_one(tmp_path):
    "Drawn labels, both passes and the eigenbases between them, whatever the shares."
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path), str(rank), *shared],
            cwd=ROOT,
            env=ENVIRONMENT,
        )
        for rank, shared in [(0, []), (0, ["uneven", "single"]), (1, ["uneven", "single"])]
    ]
    assert [p.wait(timeout=240) for p in started] == [0, 0, 0]
    alone = torch.load(tmp_path / "alone0")
    for split, rank in itertools.product(["uneven", "single"], range(2)):
        found = torch.load(tmp_path / f"{split}{rank}")
        assert list(found) == list(alone)
        for name, numbers in alone.items():
            for got, expected in zip(found[name], numbers):
                near(got, expected)
