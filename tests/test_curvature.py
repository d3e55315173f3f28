"""Compare statistics of randomly drawn layers with brute force in float64.

Brute force takes one example, one class and one weight at a time, by automatic differentiation.
"""

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
    "Assert that two tensors agree to `EXACT` of the largest entry, which must not be zero."
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype == torch.float64
    difference = float((found - expected).abs().max())
    assert difference <= EXACT * float(expected.abs().max()), (found, expected)


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


def total_padding(padding, spans):
    "Return the padding of both sides together, an axis each."
    if padding == "same":
        return [span - 1 for span in spans]
    if padding == "valid":
        return [0] * len(spans)
    return [2 * p for p in padding]


@st.composite
def convolutions(draw):
    "Draw a convolution over one or two axes and the shape of an image that it can read."
    axes, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3))

    def several(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    into = groups * draw(st.integers(1, 3))
    out = groups * draw(st.integers(1, 3))
    kernel, stride, dilation = several(1, 4), several(1, 3), several(1, 3)
    mode = draw(st.sampled_from(["zeros"] * 4 + ["circular", "reflect"]))
    if draw(st.integers(0, 7)) == 0:
        padding = draw(st.sampled_from(["valid", "same"]))
    else:
        padding = several(0, 3)
    if padding == "same":
        stride = (1,) * axes
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation)]
    pads = total_padding(padding, spans)
    size = tuple(max(1, s - p) + draw(st.integers(0, 4)) for s, p in zip(spans, pads))
    if mode != "zeros":  # no more can be mirrored than is there
        assume(all(p // 2 + p % 2 < n for p, n in zip(pads, size)))
    make = nn.Conv1d if axes == 1 else nn.Conv2d
    layer = make(into, out, kernel, stride, padding, dilation, groups, draw(st.booleans()), mode)
    return layer, (into, *size)


@st.composite
def linears(draw):
    "Draw a linear layer and the shape of an example, up to two dimensions before the last."
    into = draw(st.integers(1, 5))
    layer = nn.Linear(into, draw(st.integers(1, 5)), draw(st.booleans()))
    leading = draw(st.lists(st.integers(1, 4), max_size=2))
    return layer, (*leading, into)


ANY_LAYER = st.one_of(convolutions(), convolutions(), convolutions(), linears())


@st.composite
def cases(draw, layers=ANY_LAYER):
    (layer, shape), seed = draw(layers), draw(st.integers(0, 99))
    batches = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    x = normal(sum(batches), *shape, seed=seed)
    layer = layer.double()
    head = nn.Linear(layer(x)[0].numel(), CLASSES).double()
    net = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), head)
    with torch.no_grad():
        for i, w in enumerate(net.parameters()):
            w.copy_(normal(*w.shape, seed=seed + i))
    y = torch.randint(CLASSES, (len(x),), generator=generator(seed))
    return Case(net, x, y, batches, draw(st.sampled_from(["exact", "empirical"])))


class Brute(NamedTuple):
    "Hold statistics by the definitions; D weights of an output channel, with groups those of one."

    A: torch.Tensor  # groups x D + 1 x D + 1, a constant 1 behind every patch
    G: torch.Tensor  # groups x C_out x C_out
    rows: torch.Tensor  # (example, class) x C_out x D + 1: root of p times the gradient of log p


def group_count(layer):
    return getattr(layer, "groups", 1)


def read_patches(layer, z, channels):
    "Return groups x positions x D: the gradient of an output in its weights is what it reads."
    groups, weights = group_count(layer), layer.weight
    found = []
    for group in range(groups):
        first = group * (len(weights) // groups)
        for output in z.select(channels, first).flatten():
            (gradient,) = torch.autograd.grad(output, weights, retain_graph=True)
            found.append(gradient[first].flatten())
    return torch.stack(found).unflatten(0, (groups, -1))


def brute(case) -> Brute:
    layer, groups, weights = case.layer, group_count(case.layer), case.layer.weight
    channels = 1 if isinstance(layer, nn.Conv1d | nn.Conv2d) else -1
    # a bias for layers without one, added to the outputs
    bias = torch.zeros(len(weights), dtype=torch.float64, requires_grad=True)
    patches, rows, G = [], [], 0
    for x, y in zip(case.x.split(1), case.y):
        z = (layer(x).movedim(channels, -1) + bias).movedim(-1, channels)
        patches.append(read_patches(layer, z, channels))
        log_p = case.net[1:](z).log_softmax(1)[0]
        for c in range(CLASSES) if case.fisher == "exact" else [y]:
            root = (log_p[c] / 2).exp().item() if case.fisher == "exact" else 1.0
            at_z, at_w, at_b = torch.autograd.grad(log_p[c], (z, weights, bias), retain_graph=True)
            rows.append(root * torch.cat([at_w.flatten(1), at_b[:, None]], 1))
            g = root * at_z.movedim(channels, 0).reshape(groups, len(weights) // groups, -1)
            G = G + g @ g.mT / len(case.x)
    a = torch.cat(patches, 1)
    a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2)
    return Brute(a.mT @ a / a.shape[1], G, torch.stack(rows))


def taps(layer):
    return layer.weight[0, 0].numel()


def channels_only(A, offsets):
    "Average a full factor with a last row for the bias over kernel offsets."
    blocks = channel_part(A[:, :-1, :-1], offsets)
    beside = A[:, :-1, -1].unflatten(1, (-1, offsets)).mean(2)
    last_row = torch.cat([beside, A[:, -1, -1:]], 1)[:, None]
    return torch.cat([torch.cat([blocks, beside[:, :, None]], 2), last_row], 1)


def grouped(found, layer):
    "Give factors of a layer without groups a first dimension."
    return found if group_count(layer) > 1 else found[None]


@quick
@given(cases(), st.booleans())
def test_factors_and_diagonal(case, bias):
    expected, layer = brute(case), case.layer
    options = dict(layers=["0"], bias=bias, fisher=case.fisher, progress=False)
    k = collect(case.net, case.data, a="both", diagonal=True, **options)["0"]
    last = None if bias and layer.bias is not None else -1
    near(grouped(k.A_full, layer), expected.A[:, :last, :last])
    near(grouped(k.A, layer), channels_only(expected.A, taps(layer))[:, :last, :last])
    near(grouped(k.G, layer), expected.G)
    squares = expected.rows.square().sum(0) / len(case.x)
    near(k.diagonal.flatten(1), squares[:, :-1])
    if layer.bias is not None:
        near(k.bias_diagonal, squares[:, -1])
    positions = layer(case.x)[0].numel() // len(layer.weight)
    assert (k.examples, k.positions, k.calls) == (len(case.x), positions, 1)
    near(collect(case.net, case.data, **options)["0"].A, k.A)  # channels by their own kernel


def rotated_rows(rows, U, V, bias):
    "Rotate rows x groups x C x D + 1 by a full basis; the last column is the bias."
    d = rows if bias else rows[..., :-1]
    return torch.einsum("rgod,gou,gdv->rguv", d, U, V)


def rotated_by_offset(rows, U, V, bias, offsets):
    "Rotate rows by a channel basis, offset by offset; the bias stands at every offset."
    d = rows[..., :-1].unflatten(3, (-1, offsets))
    if bias:
        d = torch.cat([d, rows[..., -1:, None].expand(*d.shape[:3], 1, d.shape[-1])], 3)
    return torch.einsum("rgoct,gou,gcv->rguvt", d, U, V)


@quick
@given(cases(), st.sampled_from(["eigenvectors", "random"]), st.booleans(), st.booleans())
def test_ekfac_moments(case, kind, full, bias):
    layer, offsets = case.layer, taps(case.layer)
    options = dict(bias=bias, fisher=case.fisher, progress=False)
    statistics = collect(case.net, case.data, layers=["0"], a="both", **options)
    bases = layer_bases(statistics, full=full)
    if kind == "random":
        bases = {"0": tuple(torch.linalg.qr(normal(*b.shape, seed=1)).Q for b in bases["0"])}
    found = second_moments(case.net, case.data, bases, **options)["0"]
    U, V = (grouped(b, layer) for b in bases["0"])
    rows = brute(case).rows.unflatten(1, (group_count(layer), -1))
    last = bias and layer.bias is not None
    if full:
        rotated = rotated_rows(rows, U, V, last)
    else:
        rotated = rotated_by_offset(rows, U, V, last, offsets)
    expected = rotated.square().sum(0).flatten(0, 1) / len(case.x)
    inputs = V.shape[-1] if full or offsets == 1 else layer.weight.shape[1] + last
    assert found.shape[1] == inputs
    near(found.flatten(1), expected.flatten(1))


@st.composite
def one_position(draw):
    "Draw a layer whose kernel covers the whole image, so that it is read at one position."
    size = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    into, out, bias = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.booleans())
    layers = [
        (nn.Conv2d(into, out, size, bias=bias), (into, *size)),
        (nn.Conv1d(into, out, size[0], bias=bias), (into, size[0])),
        (nn.Linear(into, out, bias), (into,)),
    ]
    return draw(st.sampled_from(layers))


@quick
@given(cases(one_position()), st.booleans())
def test_one_position_of_one_example_is_exact(case, bias):
    """Compare the Kronecker product with the Fisher block where the gradient is one outer product.

    With the true label, the block is what that label puts in its place.
    """
    one = case._replace(x=case.x[:1], y=case.y[:1], batches=(1,))
    options = dict(layers=["0"], bias=bias, fisher=one.fisher, progress=False)
    k = collect(one.net, one.data, a="full", **options)["0"]
    last = None if bias and case.layer.bias is not None else -1
    rows = brute(one).rows[..., :last].flatten(1)
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
net = nn.Sequential(
    nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2),
    nn.Flatten(), nn.Linear(36, 3),
).double()
with torch.no_grad():
    for i, w in enumerate(net.parameters()):
        w.copy_(.5 * torch.randn(w.shape, generator=generator(0, i)))
x, y = torch.randn(26, 2, 5, 5, generator=generator(0, "x")).double(), torch.arange(26) % 3
everything = list(zip(x.split(4), y.split(4)))
if shared:
    init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
every, options = group.WORLD if shared else None, dict(draws=2, bias=True, progress=False)
single = [[(x[r::2], y[r::2])] for r in range(2)]
shares = {"uneven": [everything[:5], everything[5:]], "single": single}
for name in shared or ["alone"]:
    data = shares[name][rank] if shared else everything
    statistics = collect(net, data, a="full", group=every, **options)
    bases = layer_bases(statistics, full=True, group=every)
    moments = second_moments(net, data, bases, group=every, **options)
    found = {n: [k.A_full, k.G, moments[n]] for n, k in statistics.items()}
    found["loss"] = [torch.tensor([statistics.loss, moments.loss]).double()]
    torch.save(found, f"{folder}/{name}{rank}")
if shared:
    barrier()
    destroy_process_group()
    os._exit(0)   # the threads of gloo may abort a process that shuts down by itself
"""


def test_two_processes_equal_one(tmp_path):
    "Compare drawn labels, both passes and the eigenbases between them, whatever the shares."
    started = []
    for rank, shared in [(0, []), (0, ["uneven", "single"]), (1, ["uneven", "single"])]:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(rank), *shared]
        started.append(subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT))
    assert [p.wait(timeout=240) for p in started] == [0, 0, 0]
    alone = torch.load(tmp_path / "alone0")
    for split, rank in itertools.product(["uneven", "single"], range(2)):
        found = torch.load(tmp_path / f"{split}{rank}")
        assert list(found) == list(alone)
        for name, numbers in alone.items():
            for got, expected in zip(found[name], numbers):
                near(got, expected)
