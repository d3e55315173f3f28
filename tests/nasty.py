"""Small networks, each with one thing that tracing or surgery gets wrong easily; torch alone.

`D7` to `D17` in a docstring: a defect that a well-known toolkit had there.
"""

import math
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, einsum, nn
from torch.nn import (
    BatchNorm2d,
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose2d,
    Dropout,
    Embedding,
    GroupNorm,
    InstanceNorm2d,
    LayerNorm,
    Linear,
    MultiheadAttention,
    Parameter,
    PReLU,
    ReLU,
    Sequential,
)


@dataclass(repr=False)
class Case:
    """A network, its inputs, and what surgery must make of it. A place is `parameter:dimension`."""

    name: str
    build: Callable  # () -> nn.Module, seeded
    inputs: Callable  # () -> example inputs, seeded
    expect: tuple = ()  # places that must shrink
    frozen: tuple = ()  # places that must not
    refusable: bool = False  # may be left unchanged, in words; what is cut must still be exact
    kept: bool = False  # sums or normalises over removed channels: zero weights are not the mask
    tolerance: float = 1e-5  # of the relative difference in float32
    left: float = 1  # largest share of the parameters that is kept
    tags: tuple = ("quick",)  # quick | slow, then the family
    double: bool = True  # also in float64, where the quick half is
    seconds: float = 60  # processor time that tracing, cutting and checking may take


CASES: dict[str, Case] = {}


def add(case: Case):
    assert case.name not in CASES, case.name
    CASES[case.name] = case


def seeded(function):
    """Make a function draw the same numbers at every call, and disturb no other draws."""

    def call(*args, **kwargs):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return function(*args, **kwargs)

    return call


class Net(nn.Module):
    """Layers, parameters and buffers by name, and the function of them."""

    def __init__(self, parts, function):
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def image():
    return torch.randn(2, 3, 8, 8)


def tokens():
    return torch.randn(2, 5, 6)


def ids():
    return torch.randint(20, (2, 5))


def unchanged(net):
    return net


def nasty(parts, expect="", frozen="", inputs=image, after=unchanged, **rest):
    """Make a case of `parts() -> {name: layer}` and a forward function, which gets the network first.

    `after` changes the built network.
    """

    def register(function):
        def build():
            return after(Net(parts(), function).eval())

        places = dict(expect=tuple(expect.split()), frozen=tuple(frozen.split()))
        case = Case(function.__name__, seeded(build), seeded(inputs), **places, **rest)
        case.tags = ("quick", "nasty")
        add(case)
        return function

    return register


def conv(i, o, k=3, **how):
    return Conv2d(i, o, k, padding=k // 2, **how)


def two(i=3, c=16, o=6):
    return dict(a=conv(i, c), b=conv(c, o))


def par(*shape):
    return Parameter(torch.randn(*shape) / 2)


# --- plain chains ---


@nasty(
    lambda: dict(a=conv(3, 16, bias=False), bn=BatchNorm2d(16), b=conv(16, 12), c=Linear(12, 5)),
    "a.weight:0 bn.weight:0 bn.bias:0 b.weight:1 b.weight:0 c.weight:1",
    "c.weight:0 a.weight:1",
)
def plain(m, x):
    return m.c(F.adaptive_avg_pool2d(m.b(m.bn(m.a(x)).relu()).relu(), 1).flatten(1))


@nasty(two, "a.weight:0 a.bias:0 b.weight:1", "b.weight:0")
def bias_without_norm(m, x):
    return m.b(torch.sigmoid(m.a(x)))


@nasty(lambda: two() | dict(bn=BatchNorm2d(16, affine=False)), "a.weight:0 b.weight:1")
def norm_without_affine(m, x):
    return m.b(m.bn(m.a(x)).relu())


@nasty(
    lambda: two() | dict(bn=BatchNorm2d(16, track_running_stats=False)),
    "a.weight:0 bn.weight:0 b.weight:1",
)
def norm_without_statistics(m, x):
    return m.b(m.bn(m.a(x)).relu())


@nasty(
    lambda: dict(a=Conv1d(3, 8, 3), b=Conv1d(8, 4, 3)),
    "a.weight:0 b.weight:1",
    inputs=lambda: torch.randn(2, 3, 12),
)
def one_dimension(m, x):
    return m.b(m.a(x).relu())


@nasty(
    lambda: dict(a=Conv3d(3, 8, 3), bn=nn.BatchNorm3d(8), b=Conv3d(8, 4, 3)),
    "a.weight:0 bn.weight:0 b.weight:1",
    inputs=lambda: torch.randn(1, 3, 6, 6, 6),
)
def three_dimensions(m, x):
    return m.b(m.bn(m.a(x)).relu())


@nasty(
    lambda: dict(
        layers=Sequential(
            conv(3, 8),
            nn.Sequential(nn.ReLU(inplace=True), conv(8, 8)),
            nn.ModuleDict(dict(c=conv(8, 4)))["c"],
        )
    ),
    "layers.0.weight:0 layers.1.1.weight:1 layers.1.1.weight:0 layers.2.weight:1",
)
def nested_sequential_in_place(m, x):
    return m.layers(x)


@nasty(
    lambda: dict(
        stem=conv(3, 8),
        blocks=nn.ModuleList(two(8, 12, 8)[k] for _ in range(2) for k in "ab"),
        head=conv(8, 2),
    ),
    "stem.weight:0 blocks.0.weight:0 blocks.1.weight:0 blocks.3.weight:0 head.weight:1",
)
def residual_stream(m, x):
    x = m.stem(x)
    for a, b in zip(m.blocks[::2], m.blocks[1::2]):
        x = x + b(F.gelu(a(x)))
    return m.head(x)


@nasty(
    lambda: two() | dict(unused=conv(16, 16)),
    "a.weight:0 b.weight:1",
    "unused.weight:0 unused.weight:1",
)
def layer_never_called(m, x):
    return m.b(m.a(x))


# --- views ---


@nasty(lambda: two(c=12), "a.weight:0 b.weight:1")
def channel_shuffle(m, x):
    "D7."
    y = m.a(x)
    n, c, h, w = y.shape
    return m.b(y.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w))


@nasty(lambda: dict(a=conv(3, 12), b=Linear(12 * 64, 5)), "a.weight:0 b.weight:1")
def nhwc_flatten(m, x):
    "D8: a channel feeds every twelfth column."
    return m.b(m.a(x).permute(0, 2, 3, 1).flatten(1))


@nasty(lambda: dict(a=conv(3, 12), b=Linear(12 * 64, 5)), "a.weight:0 b.weight:1")
def nchw_flatten(m, x):
    return m.b(m.a(x).relu().flatten(1))


@nasty(lambda: dict(a=conv(3, 12), b=Linear(12 * 64, 5)), refusable=True)
def flatten_of_written_size(m, x):
    "Use a number that stands in the code: after a cut it would fold the batch."
    return m.b(m.a(x).view(-1, 12 * 64))


@nasty(lambda: two(c=12), refusable=True)
def shuffle_of_written_size(m, x):
    return m.b(m.a(x).view(-1, 3, 4, 8, 8).transpose(1, 2).reshape(-1, 12, 8, 8))


@nasty(lambda: two(c=16, i=3) | dict(b=conv(8, 6)), "a.weight:0 b.weight:1")
def shape_arithmetic_maxout(m, x):
    y = m.a(x)
    return m.b(y.view(y.shape[0], y.shape[1] // 2, 2, *y.shape[2:]).amax(2))


@nasty(lambda: dict(a=conv(3, 16), b=conv(4, 8), c=conv(8, 4)), "b.weight:0 c.weight:1")
def pixel_shuffle(m, x):
    "D14."
    return m.c(m.b(F.pixel_shuffle(m.a(x), 2)))


@nasty(lambda: dict(a=conv(3, 4), b=conv(16, 4)), "a.weight:0 b.weight:1")
def pixel_unshuffle(m, x):
    return m.b(F.pixel_unshuffle(m.a(x), 2))


@nasty(lambda: dict(a=conv(3, 4), b=conv(16, 4)), "a.weight:0 b.weight:1")
def space_to_depth_by_slices(m, x):
    y = m.a(x)
    return m.b(
        torch.cat([y[..., ::2, ::2], y[..., 1::2, ::2], y[..., ::2, 1::2], y[..., 1::2, 1::2]], 1)
    )


@nasty(lambda: dict(a=conv(3, 8), b=Linear(8 * 9, 5)), "a.weight:0 b.weight:1")
def unfold(m, x):
    return m.b(F.unfold(m.a(x), 3).transpose(1, 2))


@nasty(
    lambda: dict(a=conv(3, 8), b=Linear(8, 12), c=Linear(12, 8), d=conv(8, 4)),
    "a.weight:0 b.weight:1 b.weight:0 c.weight:1 c.weight:0 d.weight:1",
)
def tokens_and_back(m, x):
    y = m.a(x)
    t = m.c(m.b(y.flatten(2).transpose(1, 2)).relu())
    return m.d(t.transpose(1, 2).reshape(y.shape[0], -1, *y.shape[2:]))


@nasty(
    lambda: dict(a=conv(3, 8), mix=Linear(64, 64), b=conv(8, 4)),
    "a.weight:0 b.weight:1",
    "mix.weight:0 mix.weight:1",
)
def token_mixing(m, x):
    y = m.a(x)
    return m.b(m.mix(y.flatten(2)).view_as(y))


@nasty(
    lambda: dict(a=conv(3, 8), b=Linear(8 * 64, 16), c=Linear(16, 4 * 16), d=conv(4, 3)),
    "a.weight:0 b.weight:0 c.weight:0 d.weight:1",
)
def bottleneck_and_unflatten(m, x):
    return m.d(m.c(m.b(m.a(x).flatten(1)).relu()).unflatten(1, (-1, 4, 4)))


@nasty(lambda: dict(a=conv(3, 8), b=conv(8, 4)), refusable=True, kept=True)
def roll_over_channels(m, x):
    "Three places in the code are three other channels after a cut."
    return m.b(m.a(x).roll(3, 1))


@nasty(lambda: two(), "a.weight:0 b.weight:1")
def flip_over_channels(m, x):
    return m.b(m.a(x).flip(1))


@nasty(lambda: dict(a=conv(3, 8), b=conv(16, 4)), "a.weight:0 b.weight:1")
def repeat_channels(m, x):
    return m.b(m.a(x).repeat(1, 2, 1, 1))


@nasty(lambda: dict(a=conv(3, 8), b=conv(16, 4)), "a.weight:0 b.weight:1")
def repeat_interleave_channels(m, x):
    return m.b(m.a(x).repeat_interleave(2, 1))


@nasty(lambda: dict(a=conv(3, 8), b=conv(4, 4)), refusable=True)
def channels_by_list(m, x):
    return m.b(m.a(x)[:, [5, 1, 0, 2]])


@nasty(lambda: dict(a=conv(3, 8), b=conv(8, 4), order=torch.randperm(8)), refusable=True)
def channels_by_buffer(m, x):
    return m.b(m.a(x)[:, m.order])


@nasty(lambda: dict(a=conv(3, 8), b=conv(4, 4), chosen=torch.arange(8) % 2 == 0), refusable=True)
def channels_by_boolean_buffer(m, x):
    return m.b(m.a(x)[:, m.chosen])


# --- slices, splits, concatenations ---


@nasty(lambda: dict(a=conv(3, 16), b=conv(16, 8), c=conv(12, 4)), "b.weight:0 c.weight:1")
def slice_then_concat(m, x):
    "D15."
    y = m.a(x)
    return m.c(torch.cat([y[:, :4], m.b(y)], 1))


@nasty(
    lambda: dict(a=conv(3, 16), b=conv(8, 8), c=conv(16, 4)),
    "a.weight:0 b.weight:1 b.weight:0 c.weight:1",
)
def half_through(m, x):
    "Compute the half from the width, as ShuffleNet does."
    left, right = m.a(x).chunk(2, 1)
    return m.c(torch.cat([left, m.b(right)], 1))


@nasty(
    lambda: dict(a=conv(3, 16), b=conv(4, 8), c=conv(12, 4), d=conv(12, 4)),
    "b.weight:0 c.weight:1",
    refusable=True,
)
def split_with_sizes(m, x):
    y, z = m.a(x).split([4, 12], 1)
    return m.c(torch.cat([m.b(y), y], 1)) + m.d(z)


@nasty(lambda: dict(a=conv(3, 16), b=conv(16, 8), c=conv(8, 4)), refusable=True)
def residual_through_slice(m, x):
    y = m.a(x)
    return m.c(y[:, :8] + m.b(y))


@nasty(lambda: dict(a=conv(3, 8), b=conv(16, 4)), "a.weight:0 b.weight:1")
def same_tensor_twice(m, x):
    y = m.a(x).relu()
    return m.b(torch.cat([y, y], 1))


@nasty(lambda: dict(a=conv(3, 8), b=conv(16, 4)), "a.weight:0 b.weight:1")
def concatenated_relu(m, x):
    y = m.a(x)
    return m.b(torch.cat([y.relu(), (-y).relu()], 1))


@nasty(lambda: dict(a=conv(3, 8), b=conv(11, 4)), "a.weight:0 b.weight:1", "a.weight:1")
def concat_with_input(m, x):
    return m.b(torch.cat([x, m.a(x)], 1))


@nasty(
    lambda: dict(
        stem=conv(3, 8),
        layers=nn.ModuleList(
            Sequential(BatchNorm2d(8 + 4 * i), ReLU(), conv(8 + 4 * i, 4)) for i in range(4)
        ),
        head=conv(24, 3),
    ),
    "stem.weight:0 layers.0.0.weight:0 layers.0.2.weight:0 layers.3.2.weight:1 "
    "layers.3.0.weight:0 head.weight:1",
)
def dense_block(m, x):
    ys = [m.stem(x)]
    for layer in m.layers:
        ys.append(layer(torch.cat(ys, 1)))
    return m.head(torch.cat(ys, 1))


@nasty(
    lambda: dict(
        a=conv(3, 8),
        b=conv(8, 16),
        c=conv(16, 8),
        up=ConvTranspose2d(8, 8, 2, 2),
        d=conv(16, 8),
        e=conv(8, 2),
    ),
    "a.weight:0 b.weight:0 c.weight:0 up.weight:0 up.weight:1 up.bias:0 d.weight:1 d.weight:0",
)
def skip_connection(m, x):
    "U-Net in small."
    y = m.a(x).relu()
    z = m.c(m.b(F.max_pool2d(y, 2)).relu()).relu()
    return m.e(m.d(torch.cat([y, m.up(z)], 1)).relu())


@nasty(lambda: dict(a=conv(3, 8), b=conv(3, 8), c=conv(8, 4)), "a.weight:0 b.weight:0 c.weight:1")
def stack_and_sum(m, x):
    return m.c(torch.stack([m.a(x), m.b(x).relu()]).sum(0))


@nasty(
    lambda: dict(a=conv(3, 8), b=conv(3, 8), alpha=par(2), c=conv(8, 4)),
    "a.weight:0 b.weight:0 c.weight:1",
    "alpha:0",
)
def weighted_branches(m, x):
    y = torch.stack([m.a(x), m.b(x)], -1)
    return m.c((y * m.alpha.softmax(0)).sum(-1))


@nasty(
    lambda: dict(a=conv(3, 8), b=conv(8, 16), c=conv(16, 3)),
    "a.weight:0 b.weight:1",
    refusable=True,
)
def zero_padded_shortcut(m, x):
    "Option A of ResNet: new channels are zeros, their number stands in the code."
    y = m.a(x).relu()
    return m.c(F.pad(y, (0, 0, 0, 0, 4, 4)) + m.b(y))


@nasty(
    lambda: dict(a=conv(3, 16), b=conv(3, 4), c=conv(16, 4)),
    "a.weight:0 c.weight:1",
    refusable=True,
)
def addition_to_a_view_in_place(m, x):
    y = m.a(x)
    y[:, :4] += m.b(x)
    return m.c(y.relu())


@nasty(lambda: dict(a=conv(3, 8), b=conv(3, 8), c=conv(16, 4)), "c.weight:1", refusable=True)
def written_into_an_empty_tensor(m, x):
    y = x.new_zeros(x.shape[0], 16, *x.shape[2:])
    y[:, :8], y[:, 8:] = m.a(x), m.b(x)
    return m.c(y)


# --- gates ---


@nasty(
    lambda: dict(a=conv(3, 16), s=Linear(16, 4), e=Linear(4, 16), b=conv(16, 4)),
    "a.weight:0 s.weight:1 s.weight:0 e.weight:1 e.weight:0 b.weight:1",
)
def squeeze_excite(m, x):
    y = m.a(x)
    return m.b(y * m.e(m.s(y.mean((2, 3))).relu()).sigmoid()[:, :, None, None])


@nasty(
    lambda: dict(a=conv(3, 16), g=conv(16, 1, 1), b=conv(16, 4)),
    "a.weight:0 g.weight:1 b.weight:1",
    "g.weight:0",
)
def spatial_gate(m, x):
    y = m.a(x)
    return m.b(y * m.g(y).sigmoid())


@nasty(
    lambda: dict(a=conv(3, 16), gate=par(16, 1, 1), b=conv(16, 4)), "a.weight:0 gate:0 b.weight:1"
)
def broadcast_gate(m, x):
    "D14."
    return m.b(m.a(x) * m.gate)


@nasty(
    lambda: dict(
        a=conv(3, 16),
        scale=par(1, 16, 1, 1),
        shift=par(16),
        t=Parameter(torch.tensor(0.3)),
        b=conv(16, 4),
    ),
    "a.weight:0 scale:1 shift:0 b.weight:1",
)
def layer_scale_and_temperature(m, x):
    return m.b((m.a(x) * m.scale).add(m.shift.view(1, -1, 1, 1)) / m.t.exp())


@nasty(lambda: two() | dict(fixed=torch.rand(1, 16, 1, 1) + 0.5), "a.weight:0 b.weight:1")
def constant_buffer_per_channel(m, x):
    return m.b(m.a(x) * m.fixed)


@nasty(
    lambda: two(),
    refusable=True,
    after=lambda m: setattr(m, "fixed", torch.rand(16, 1, 1) + 0.5) or m,
    double=False,
)
def constant_that_is_no_buffer(m, x):
    return m.b(m.a(x) * m.fixed)


@nasty(lambda: dict(a=conv(3, 16), b=conv(8, 4)), "a.weight:0 b.weight:1")
def gated_linear_unit(m, x):
    return m.b(F.glu(m.a(x), 1))


@nasty(
    lambda: dict(a=Linear(6, 16), b=Linear(8, 6)), "a.weight:0 a.bias:0 b.weight:1", inputs=tokens
)
def chunk_gate(m, x):
    u, v = m.a(x).chunk(2, -1)
    return m.b(F.gelu(u) * v)


@nasty(
    lambda: dict(g=Linear(6, 8), u=Linear(6, 8), d=Linear(8, 6)),
    "g.weight:0 u.weight:0 d.weight:1",
    inputs=tokens,
)
def swish_gate(m, x):
    return m.d(F.silu(m.g(x)) * m.u(x))


@nasty(lambda: dict(a=Linear(6, 16), b=Linear(8, 6)), "a.weight:0 b.weight:1", inputs=tokens)
def gate_by_strides(m, x):
    "Even rows are gates of odd rows."
    y = m.a(x)
    return m.b(y[..., ::2].sigmoid() * y[..., 1::2])


@nasty(
    lambda: dict(a=conv(3, 8), b=conv(3, 8, 5), z=Linear(8, 4), h=Linear(4, 16), c=conv(8, 3)),
    "a.weight:0 b.weight:0 z.weight:0 c.weight:1",
    refusable=True,
)
def selective_kernel(m, x):
    "Softmax over branches: channels are cut in both."
    y = torch.stack([m.a(x), m.b(x)], 1)
    s = m.h(m.z(y.sum(1).mean((2, 3))).relu())
    return m.c((y * s.view(s.shape[0], 2, -1, 1, 1).softmax(1)).sum(1))


@nasty(two, "a.weight:0 b.weight:1")
def where_and_maximum(m, x):
    y = m.a(x)
    return m.b(torch.where(y > 0, y, y.exp() - 1).maximum(y * 0.1).clamp(-2, 2))


# --- zeros made of a width, draws, complex numbers, packed sequences ---


def recurrence(m, x, h, ys=None):
    """Run h = d * h + u over the tokens; write the states into `ys` where it is given."""
    u, found = m.a(x), []
    d = m.d(u).sigmoid()
    for i in range(x.shape[1]):
        h = d[:, i] * h + u[:, i]
        if ys is not None:
            ys[:, i] = h
        found.append(h)
    return m.o(torch.stack(found, 1) if ys is None else ys)


SCAN = dict(inputs=tokens)
SCANNED = "a.weight:0 d.weight:0 d.weight:1 o.weight:1"


def scan_parts():
    return dict(a=Linear(6, 16), d=Linear(16, 16), o=Linear(16, 4))


@nasty(scan_parts, SCANNED, **SCAN)
def zeros_of_a_shape(m, x):
    return recurrence(m, x, torch.zeros(x.shape[0], m.a(x).shape[2]))


@nasty(scan_parts, SCANNED, **SCAN)
def zeros_like_another(m, x):
    return recurrence(m, x, torch.zeros_like(m.a(x)[:, 0]), torch.zeros_like(m.a(x)))


@nasty(lambda: scan_parts() | dict(d_inner=16), SCANNED, **SCAN)
def zeros_of_an_attribute(m, x):
    return recurrence(m, x, x.new_zeros(x.shape[0], m.d_inner))


@nasty(scan_parts, frozen=SCANNED, refusable=True, **SCAN)
def zeros_of_a_written_width(m, x):
    return recurrence(m, x, torch.zeros(x.shape[0], 16))


@nasty(scan_parts, "a.weight:0 d.weight:0", **SCAN)
def values_that_are_not_zero_written_to_zeros(m, x):
    y = torch.zeros_like(m.a(x))
    for i in range(x.shape[1]):
        y[:, i] += m.d(m.a(x[:, i])).sigmoid()
    return m.o(y)


@nasty(
    lambda: dict(g=nn.GRU(6, 16, batch_first=True), o=Linear(16, 4), hidden=16),
    "o.weight:1",
    inputs=tokens,
)
def first_state_of_zeros(m, x):
    return m.o(m.g(x, x.new_zeros(1, x.shape[0], m.hidden))[0])


@nasty(
    lambda: dict(a=Linear(6, 12), g=nn.LSTM(12, 16, batch_first=True), o=Linear(16, 4)),
    "a.weight:0 o.weight:1",
    inputs=tokens,
)
def packed_sequences(m, x):
    lengths = torch.arange(x.shape[0], 0, -1).clamp(max=x.shape[1])
    p = nn.utils.rnn.pack_padded_sequence(m.a(x).relu(), lengths, batch_first=True)
    y, (h, _) = m.g(p)
    return m.o(nn.utils.rnn.pad_packed_sequence(y, batch_first=True)[0]), m.o(h[-1])


def rotated_parts():
    return dict(q=Linear(6, 16), k=Linear(6, 16), v=Linear(6, 16), o=Linear(16, 4))


@nasty(rotated_parts, "q.weight:0 k.weight:0 v.weight:0 o.weight:1", inputs=tokens)
def complex_rotations_of_heads(m, x):
    turn = torch.polar(torch.ones(x.shape[1], 1, 2), torch.arange(x.shape[1] * 2.0).view(-1, 1, 2))
    q, k, v = (layer(x).unflatten(2, (-1, 4)) for layer in (m.q, m.k, m.v))
    q, k = (torch.view_as_complex(t.unflatten(3, (2, 2))) * turn for t in (q, k))
    q, k = (torch.view_as_real(t).flatten(3).transpose(1, 2) for t in (q, k))
    y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2))
    return m.o(y.transpose(1, 2).flatten(2))


@nasty(
    lambda: dict(a=MultiheadAttention(16, 4, batch_first=True), i=Linear(6, 16), o=Linear(16, 4)),
    "a.in_proj_weight:0",
    inputs=tokens,
)
def weights_of_attention_thrown_away(m, x):
    y = m.i(x)
    return m.o(m.a(y, y, y)[0])


@nasty(
    lambda: dict(a=MultiheadAttention(16, 4, batch_first=True), i=Linear(6, 16), o=Linear(16, 4)),
    frozen="a.in_proj_weight:0",
    inputs=tokens,
)
def weights_of_attention_read(m, x):
    y = m.i(x)
    y, weights = m.a(y, y, y)
    return m.o(y) + weights.mean()


@nasty(two, "a.weight:0 b.weight:1")
def fourier_transform_over_space(m, x):
    return m.b(torch.fft.irfft2(torch.fft.rfft2(m.a(x)) * 0.5, s=x.shape[2:]))


@nasty(lambda: dict(a=Linear(6, 16), b=Linear(16, 4)), "a.weight:0 b.weight:1", inputs=tokens)
def distances_between_tokens(m, x):
    y = m.a(x)
    return m.b(y) + torch.cdist(y, y).mean()


@nasty(
    lambda: dict(a=Linear(6, 16), b=nn.Bilinear(16, 16, 12), c=Linear(12, 4)),
    "a.weight:0 b.weight:0 b.weight:1 b.weight:2 c.weight:1",
    inputs=tokens,
)
def bilinear_products(m, x):
    y = m.a(x).relu()
    return m.c(m.b(y, y))


@nasty(
    lambda: dict(a=Linear(6, 16), b=Linear(16, 4), c=Linear(16, 16)),
    "a.weight:0 b.weight:1",
    inputs=lambda: (torch.eye(5).roll(1, 0), torch.randn(5, 6)),
)
def sparse_products(m, edges, x):
    y = torch.sparse.mm(edges.to_sparse(), m.a(x))
    return edges.to_sparse() @ m.b((y + m.c(y)).relu())


@nasty(
    lambda: dict(a=Linear(6, 16), m=Linear(32, 16), b=Linear(16, 4)),
    "a.weight:0 m.weight:0 m.weight:1 b.weight:1",
    inputs=lambda: (torch.randn(7, 6), torch.randint(7, (2, 9))),
)
def messages_added_in_place(m, x, edges):
    y = m.a(x).relu()
    sent = m.m(torch.cat([y[edges[0]], y[edges[1]]], -1)).relu()
    place = edges[1][:, None].expand_as(sent)
    total = torch.zeros_like(y).index_add_(0, edges[1], sent).scatter_add_(0, place, sent)
    return m.b(total + torch.zeros_like(y).scatter_reduce_(0, place, sent, "amax"))


class Leaky(nn.Module):
    """A spiking neuron, which remembers its potential from call to call."""

    def __init__(self):
        super().__init__()
        self.potential = None

    def forward(self, x):
        before = torch.zeros_like(x) if self.potential is None else self.potential
        potential = 0.9 * before + x
        spikes = (potential > 0.5).to(x.dtype)
        self.potential = potential - spikes
        return spikes


@nasty(
    lambda: two() | dict(spikes=Leaky()),
    "a.weight:0 b.weight:1",
    inputs=lambda: torch.randn(2, 3, 8, 8),
)
def spiking_neurons(m, x):
    "Reset the state before every call."
    m.spikes.potential = None
    return m.b(m.spikes(m.a(x)) + m.spikes(m.a(x)))


# --- sums and normalisations over channels ---


@nasty(lambda: dict(a=conv(3, 16), b=conv(1, 4)), refusable=True, kept=True)
def sum_of_sigmoids(m, x):
    "sigmoid(0) is not 0: a silent channel still adds a half."
    return m.b(m.a(x).sigmoid().sum(1, keepdim=True))


@nasty(lambda: two(), refusable=True, kept=True)
def softmax_over_channels(m, x):
    return m.b(m.a(x).softmax(1))


@nasty(lambda: dict(a=conv(3, 16), s=conv(2, 1, 7), b=conv(16, 4)), refusable=True, kept=True)
def channel_mean_and_maximum(m, x):
    "Attend as the spatial half of CBAM."
    y = m.a(x)
    return m.b(y * m.s(torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)).sigmoid())


@nasty(
    lambda: dict(a=conv(3, 16), k=Conv1d(1, 1, 3, padding=1), b=conv(16, 4)),
    refusable=True,
    kept=True,
)
def convolution_over_channels(m, x):
    "ECA: neighbours are other channels after a cut."
    y = m.a(x)
    return m.b(y * m.k(y.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None])


@nasty(two, refusable=True, kept=True)
def local_response_norm(m, x):
    return m.b(F.local_response_norm(m.a(x), 5))


@nasty(two, refusable=True, kept=True)
def unit_length_over_channels(m, x):
    return m.b(F.normalize(m.a(x), dim=1))


@nasty(two, refusable=True, kept=True)
def running_sum_over_channels(m, x):
    return m.b(m.a(x).cumsum(1))


@nasty(two, refusable=True, kept=True)
def sorted_channels(m, x):
    return m.b(m.a(x).sort(1).values)


@nasty(lambda: dict(a=conv(3, 16), b=conv(4, 4)), refusable=True, kept=True)
def largest_channels(m, x):
    return m.b(m.a(x).topk(4, 1).values)


@nasty(two, refusable=True, kept=True)
def fourier_over_channels(m, x):
    return m.b(torch.fft.fft(m.a(x), dim=1).real)


@nasty(two, "a.weight:0 b.weight:1")
def fourier_over_pixels(m, x):
    return m.b(torch.fft.rfft2(m.a(x)).abs())


@nasty(lambda: two() | dict(n=GroupNorm(4, 16)), "a.weight:0 n.weight:0 b.weight:1", kept=True)
def group_norm(m, x):
    return m.b(m.n(m.a(x)).relu())


@nasty(lambda: two() | dict(n=GroupNorm(16, 16)), "a.weight:0 n.weight:0 b.weight:1")
def group_norm_of_single_channels(m, x):
    return m.b(m.n(m.a(x)).relu())


@nasty(
    lambda: two() | dict(n=InstanceNorm2d(16, affine=True, track_running_stats=True)),
    "a.weight:0 n.weight:0 b.weight:1",
)
def instance_norm(m, x):
    return m.b(m.n(m.a(x)).relu())


@nasty(lambda: two() | dict(n=InstanceNorm2d(16)), "a.weight:0 b.weight:1")
def instance_norm_without_affine(m, x):
    return m.b(m.n(m.a(x)).relu())


@nasty(lambda: two() | dict(n=LayerNorm(16)), "a.weight:0 n.weight:0 b.weight:1", kept=True)
def layer_norm_nhwc(m, x):
    return m.b(m.n(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@nasty(lambda: two() | dict(n=LayerNorm([16, 8, 8])), refusable=True, kept=True)
def layer_norm_of_everything(m, x):
    return m.b(m.n(m.a(x)))


@nasty(lambda: two() | dict(n=LayerNorm([8, 8])), "a.weight:0 b.weight:1", "n.weight:0 n.weight:1")
def layer_norm_of_pixels(m, x):
    return m.b(m.n(m.a(x)))


@nasty(
    lambda: dict(a=Linear(6, 16), g=par(16), b=Linear(16, 6)),
    inputs=tokens,
    kept=True,
    refusable=True,
)
def root_mean_square_norm_by_hand(m, x):
    y = m.a(x)
    return m.b(y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * m.g)


@nasty(
    lambda: dict(a=Linear(6, 16), n=nn.RMSNorm(16), b=Linear(16, 6)),
    "a.weight:0 n.weight:0 b.weight:1",
    inputs=tokens,
    kept=True,
)
def root_mean_square_norm(m, x):
    return m.b(m.n(m.a(x)))


@nasty(lambda: two() | dict(g=par(16), s=par(16)), kept=True, refusable=True)
def layer_norm_by_hand(m, x):
    y = m.a(x)
    u = y.mean(1, keepdim=True)
    v = (y - u).pow(2).mean(1, keepdim=True)
    return m.b(m.g[:, None, None] * ((y - u) / torch.sqrt(v + 1e-6)) + m.s[:, None, None])


@nasty(lambda: dict(a=conv(3, 16), g=par(1, 1, 1, 16), b=Linear(16, 4)), kept=True, refusable=True)
def global_response_norm(m, x):
    "ConvNeXt V2: lengths of channels over their mean."
    y = m.a(x).permute(0, 2, 3, 1)
    r = y.norm(dim=(1, 2), keepdim=True)
    return m.b(y + m.g * y * (r / (r.mean(-1, keepdim=True) + 1e-6)))


@nasty(lambda: two() | dict(p=PReLU(16)), "a.weight:0 p.weight:0 b.weight:1")
def slope_per_channel(m, x):
    return m.b(m.p(m.a(x)))


@nasty(lambda: two() | dict(p=PReLU(1)), "a.weight:0 b.weight:1", "p.weight:0")
def one_slope(m, x):
    return m.b(m.p(m.a(x)))


# --- grouped and transposed convolutions, bare weights ---


@nasty(
    lambda: two() | dict(d=conv(16, 16, groups=16)),
    "a.weight:0 d.weight:0 d.bias:0 b.weight:1",
    "d.weight:1",
)
def depthwise(m, x):
    return m.b(m.d(m.a(x)))


@nasty(
    lambda: dict(a=conv(3, 8), d=conv(8, 16, groups=8), b=conv(16, 4)),
    "a.weight:0 d.weight:0 b.weight:1",
)
def depthwise_of_two(m, x):
    return m.b(m.d(m.a(x)))


@nasty(lambda: two() | dict(g=conv(16, 16, groups=4)), "a.weight:0 g.weight:0 b.weight:1")
def grouped(m, x):
    return m.b(m.g(m.a(x).relu()).relu())


@nasty(
    lambda: dict(a=conv(3, 12), g=conv(12, 24, groups=3), h=conv(24, 12, groups=4), b=conv(12, 4)),
    refusable=True,
)
def grouped_twice_otherwise(m, x):
    return m.b(m.h(m.g(m.a(x)).relu()))


@nasty(
    lambda: dict(a=conv(3, 16), g=conv(16, 16, groups=4), b=conv(16, 4)), "a.weight:0 b.weight:1"
)
def grouped_residual(m, x):
    y = m.a(x)
    return m.b(y + m.g(y))


@nasty(
    lambda: dict(a=ConvTranspose2d(3, 8, 2, 2), b=ConvTranspose2d(8, 4, 3)),
    "a.weight:1 a.bias:0 b.weight:0",
    "b.weight:1",
)
def transposed(m, x):
    return m.b(m.a(x).relu())


@nasty(
    lambda: dict(a=conv(3, 8), t=ConvTranspose2d(8, 12, 2, 2, groups=4), b=conv(12, 4)),
    "a.weight:0 t.weight:0 b.weight:1",
)
def transposed_grouped(m, x):
    return m.b(m.t(m.a(x)))


@nasty(
    lambda: dict(a=conv(3, 8), t=ConvTranspose2d(8, 8, 2, 2, groups=8), b=conv(8, 4)),
    "a.weight:0 t.weight:0 b.weight:1",
)
def transposed_depthwise(m, x):
    return m.b(m.t(m.a(x)))


@nasty(lambda: dict(w=par(16, 3, 3, 3), v=par(6, 16, 3, 3), s=par(16)), "w:0 s:0 v:1", "w:1 v:0")
def functional_convolution(m, x):
    "D14."
    return F.conv2d(F.conv2d(x, m.w, m.s, padding=1).relu(), m.v)


@nasty(lambda: dict(w=par(6, 16), v=par(16, 5)), "w:1 v:0", inputs=tokens)
def bare_matrices(m, x):
    return (x @ m.w).relu() @ m.v


@nasty(lambda: two() | dict(kernel=torch.ones(1, 1, 3, 3) / 9), "a.weight:0 b.weight:1")
def blur_of_every_channel(m, x):
    y = m.a(x)
    return m.b(F.conv2d(y, m.kernel.expand(y.shape[1], 1, 3, 3), padding=1, groups=y.shape[1]))


@nasty(
    lambda: two() | dict(kernel=torch.ones(16, 1, 3, 3) / 9),
    "a.weight:0 b.weight:1",
    refusable=True,
)
def blur_by_a_buffer(m, x):
    return m.b(F.conv2d(m.a(x), m.kernel, padding=1, groups=len(m.kernel)))


def standardised(w):
    return (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)


@nasty(lambda: two() | dict(c=conv(6, 4)), "b.weight:0 c.weight:1", refusable=True, kept=True)
def weight_standardisation(m, x):
    "Mean and deviation run over the inputs of a filter, that a cut takes from."
    return m.c(F.conv2d(m.a(x).relu(), standardised(m.b.weight), m.b.bias, padding=1))


def parametrised(name):
    return lambda: (
        (f := getattr(nn.utils.parametrizations, name))
        and dict(a=f(conv(3, 16)), b=f(conv(16, 8)), c=conv(8, 4))
    )


@nasty(parametrised("weight_norm"), "c.weight:1", refusable=True, kept=True)
def weight_norm(m, x):
    return m.c(m.b(m.a(x).relu()).relu())


@nasty(parametrised("spectral_norm"), refusable=True, kept=True)
def spectral_norm(m, x):
    return m.c(m.b(m.a(x).relu()).relu())


@nasty(
    lambda: dict(
        a=Linear(6, 16), b=nn.utils.parametrizations.orthogonal(Linear(16, 16)), c=Linear(16, 4)
    ),
    refusable=True,
    kept=True,
    inputs=tokens,
)
def orthogonal_weights(m, x):
    return m.c(m.b(m.a(x)))


@nasty(
    lambda: dict(a=conv(3, 8), w=Linear(8, 8 * 4 * 9), b=conv(4, 3)), "b.weight:1", refusable=True
)
def generated_filters(m, x):
    "Weights of a convolution are another layer's outputs."
    y = m.a(x)
    w = m.w(y.mean((0, 2, 3))).view(-1, y.shape[1], 3, 3)
    return m.b(F.conv2d(y, w, padding=1))


@nasty(
    lambda: two() | dict(bank=par(3, 12, 16, 3, 3), r=Linear(16, 3), b=conv(12, 4)),
    "",
    "bank:0 r.weight:0",
    refusable=True,
)
def mixture_of_filters(m, x):
    y = m.a(x)
    return m.b(F.conv2d(y, einsum("e,eoikl->oikl", m.r(y.mean((0, 2, 3))).softmax(0), m.bank)))


@nasty(lambda: two(), "a.weight:0 b.weight:1", refusable=True)
def weight_also_a_penalty(m, x):
    return m.b(m.a(x)), m.a.weight.pow(2).sum()


# --- sharing ---


@nasty(
    lambda: dict(tower=Sequential(conv(3, 8), ReLU(), conv(8, 8)), b=conv(16, 4)),
    "tower.0.weight:0 tower.2.weight:0 b.weight:1",
    inputs=lambda: (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)),
)
def shared_tower(m, x, y):
    return m.b(torch.cat([m.tower(x), m.tower(y)], 1))


@nasty(
    lambda: dict(a=conv(3, 8), loop=conv(8, 8), b=conv(8, 4)),
    "a.weight:0 loop.weight:0 loop.weight:1 b.weight:1",
)
def layer_in_a_loop(m, x):
    y = m.a(x)
    for _ in range(3):
        y = m.loop(y).tanh()
    return m.b(y)


def tie(m):
    m.head.weight = m.embed.weight
    return m


@nasty(
    lambda: dict(embed=Embedding(20, 16), body=Linear(16, 16), head=Linear(16, 20)),
    "embed.weight:1 body.weight:0 body.weight:1",
    "embed.weight:0 head.bias:0",
    inputs=ids,
    after=tie,
)
def tied_embedding(m, i):
    "D10."
    e = m.embed(i)
    return m.head(e + m.body(e).relu())


@nasty(
    lambda: dict(a=Linear(6, 16), b=Linear(16, 6)),
    "a.weight:0",
    "a.weight:1 b.bias:0",
    inputs=tokens,
)
def tied_autoencoder(m, x):
    return F.linear(m.a(x).relu(), m.a.weight.t(), m.b.bias)


def freeze(m):
    m.a.requires_grad_(False)
    m.bn.requires_grad_(False)
    return m


@nasty(lambda: two() | dict(bn=BatchNorm2d(16)), "a.weight:0 bn.weight:0 b.weight:1", after=freeze)
def frozen_parameters(m, x):
    "D11."
    return m.b(m.bn(m.a(x)).relu())


class BatchNormOfBuffers(nn.Module):
    "As detectors have it: nothing to train."

    def __init__(self, n):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(n) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.reshape(1, -1, 1, 1) + (self.bias - self.running_mean * scale).reshape(
            1, -1, 1, 1
        )


@nasty(lambda: two() | dict(bn=BatchNormOfBuffers(16)), "a.weight:0 b.weight:1")
def norm_of_buffers(m, x):
    return m.b(m.bn(m.a(x)).relu())


@nasty(
    lambda: two(c=8), "a.weight:0 b.weight:1", after=lambda m: setattr(m, "listed", [m.a, m.b]) or m
)
def layers_in_a_plain_list(m, x):
    for layer in m.listed:
        x = layer(x)
    return x


# --- embeddings and attention ---


@nasty(
    lambda: dict(embed=Embedding(20, 16), place=par(1, 5, 16), b=Linear(16, 4)),
    "embed.weight:1 place:2 b.weight:1",
    "place:1 embed.weight:0",
    inputs=ids,
)
def embedding_and_positions(m, i):
    return m.b(m.embed(i) + m.place)


@nasty(
    lambda: dict(embed=Embedding(20, 16, padding_idx=0), place=Embedding(9, 16), b=Linear(16, 4)),
    "embed.weight:1 place.weight:1 b.weight:1",
    inputs=ids,
)
def embedded_positions(m, i):
    return m.b(m.embed(i) + m.place(torch.arange(i.shape[1])))


@nasty(
    lambda: dict(embed=Embedding(20, 16), waves=torch.randn(9, 16), b=Linear(16, 4)),
    "embed.weight:1 b.weight:1",
    inputs=ids,
)
def positions_in_a_buffer(m, i):
    return m.b(m.embed(i) + m.waves[: i.shape[1]])


@nasty(
    lambda: dict(embed=nn.EmbeddingBag(20, 16), b=Linear(16, 4)),
    "embed.weight:1 b.weight:1",
    inputs=ids,
)
def embedding_bag(m, i):
    return m.b(m.embed(i))


@nasty(
    lambda: dict(a=Linear(6, 16), mark=par(1, 1, 16), b=Linear(16, 4)),
    "a.weight:0 mark:2 b.weight:1",
    inputs=tokens,
)
def class_token(m, x):
    return m.b(torch.cat([m.mark.expand(x.shape[0], -1, -1), m.a(x)], 1)[:, 0])


def attention(q, k, v):
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def heads(x, d):
    return x.unflatten(-1, (-1, d)).transpose(1, 2)


def merged(x):
    return x.transpose(1, 2).flatten(2)


def qkv(c=6, hd=16, kv=16):
    return dict(q=Linear(c, hd), k=Linear(c, kv), v=Linear(c, kv), o=Linear(hd, c))


@nasty(qkv, "q.weight:0 k.weight:0 v.weight:0 o.weight:1", inputs=tokens)
def attention_by_hand(m, x):
    return m.o(merged(attention(*(heads(f(x), 4) for f in (m.q, m.k, m.v)))))


@nasty(qkv, "q.weight:0 k.weight:0 v.weight:0 o.weight:1", inputs=tokens)
def attention_fused_causal(m, x):
    return m.o(
        merged(
            F.scaled_dot_product_attention(
                *(heads(f(x), 4) for f in (m.q, m.k, m.v)), is_causal=True
            )
        )
    )


@nasty(lambda: qkv() | dict(number=4), "", inputs=tokens, refusable=True)
def attention_of_a_written_number_of_heads(m, x):
    n, t, _ = x.shape
    q, k, v = (f(x).view(n, t, m.number, -1).transpose(1, 2) for f in (m.q, m.k, m.v))
    return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1))


@nasty(lambda: dict(qkv=Linear(6, 48), o=Linear(16, 6)), "qkv.weight:0 o.weight:1", inputs=tokens)
def fused_qkv_by_chunk(m, x):
    return m.o(merged(attention(*(heads(y, 4) for y in m.qkv(x).chunk(3, -1)))))


@nasty(
    lambda: dict(qkv=Linear(6, 48), o=Linear(16, 6)),
    "qkv.weight:0 qkv.bias:0 o.weight:1",
    inputs=tokens,
)
def fused_qkv_by_unbind(m, x):
    n, t, _ = x.shape
    q, k, v = m.qkv(x).view(n, t, 3, -1, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return m.o(merged(F.scaled_dot_product_attention(q, k, v)))


class Attention(nn.Module):
    "As timm writes it: numbers of heads and of their dimensions are attributes."

    def __init__(self, c, number):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = number, c // number, (c // number) ** -0.5
        self.qkv, self.proj = Linear(c, 3 * c), Linear(c, c)

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = (
            self.qkv(x)
            .reshape(n, t, 3, self.num_heads, self.head_dim)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        return self.proj(
            ((q * self.scale @ k.transpose(-2, -1)).softmax(-1) @ v)
            .transpose(1, 2)
            .reshape(n, t, self.num_heads * self.head_dim)
        )


@nasty(
    lambda: dict(a=Linear(6, 16), at=Attention(16, 4), b=Linear(16, 3)),
    "a.weight:0 at.qkv.weight:1 at.qkv.weight:0 at.proj.weight:1 at.proj.weight:0 b.weight:1",
    inputs=tokens,
)
def attention_with_attributes(m, x):
    y = m.a(x)
    return m.b(y + m.at(y))


@nasty(
    lambda: dict(a=Linear(6, 32), at=Attention(32, 4), b=Linear(32, 3)),
    "at.qkv.weight:0 at.proj.weight:1 b.weight:1",
    inputs=tokens,
)
def attention_eager_coincidence(m, x):
    "Batch times heads is the number of dimensions of a head, 8: not to be taken for it."
    return m.b(m.at(m.a(x)))


@nasty(
    lambda: dict(wq=par(6, 4, 4), wk=par(6, 4, 4), wv=par(6, 4, 4), wo=par(4, 4, 6)),
    "wq:1 wk:1 wv:1 wo:0",
    "wq:0 wo:2",
    inputs=tokens,
    refusable=True,
)
def attention_by_einsum(m, x):
    q, k, v = (einsum("bnd,dhe->bhne", x, w) for w in (m.wq, m.wk, m.wv))
    return einsum(
        "bhne,hed->bnd",
        einsum("bhqk,bhke->bhqe", (einsum("bhqe,bhke->bhqk", q, k) / 2).softmax(-1), v),
        m.wo,
    )


@nasty(qkv, "q.weight:0 k.weight:0 v.weight:0 o.weight:1", inputs=tokens, kept=True)
def linear_attention(m, x):
    q, k, v = heads(m.q(x), 4).softmax(-1), heads(m.k(x), 4).softmax(-2), heads(m.v(x), 4)
    return m.o(merged(q @ (k.transpose(-2, -1) @ v)))


@nasty(qkv, inputs=tokens, refusable=True, kept=True)
def linear_attention_with_a_column_of_ones(m, x):
    "EfficientViT: the last feature of every head sums up the keys."
    q, k, v = (
        heads(m.q(x), 4).relu(),
        heads(m.k(x), 4).relu(),
        F.pad(heads(m.v(x), 4), (0, 1), value=1.0),
    )
    y = q @ (k.transpose(-2, -1) @ v)
    return m.o(merged(y[..., :-1] / (y[..., -1:] + 1e-5)))


@nasty(lambda: dict(qkv=conv(3, 48, 1), o=conv(16, 4, 1)), refusable=True, kept=True)
def linear_attention_of_maps_with_ones(m, x):
    "Do the same, flattened as maps are."
    y = m.qkv(x)
    q, k, v = y.reshape(y.shape[0], -1, 12, 64).chunk(3, 2)
    v = F.pad(v, (0, 0, 0, 1), value=1.0)
    z = (v @ k.relu().transpose(-2, -1)) @ q.relu()
    return m.o((z[:, :, :-1] / (z[:, :, -1:] + 1e-5)).reshape(y.shape[0], -1, *y.shape[2:]))


@nasty(lambda: qkv(kv=8), "q.weight:0 k.weight:0 v.weight:0 o.weight:1", inputs=tokens)
def grouped_query_repeat_interleave(m, x):
    q, k, v = heads(m.q(x), 4), heads(m.k(x), 4), heads(m.v(x), 4)
    return m.o(
        merged(
            F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
        )
    )


@nasty(lambda: qkv(kv=8), "q.weight:0 k.weight:0 v.weight:0 o.weight:1", inputs=tokens)
def grouped_query_expand(m, x):
    q, k, v = heads(m.q(x), 4), heads(m.k(x), 4), heads(m.v(x), 4)

    def widen(y):
        return y[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)

    return m.o(merged(F.scaled_dot_product_attention(q, widen(k), widen(v))))


@nasty(
    lambda: qkv(kv=8), "q.weight:0 k.weight:0 v.weight:0 o.weight:1", inputs=tokens, refusable=True
)
def grouped_query_flag(m, x):
    return m.o(
        merged(
            F.scaled_dot_product_attention(
                heads(m.q(x), 4), heads(m.k(x), 4), heads(m.v(x), 4), enable_gqa=True
            )
        )
    )


@nasty(lambda: qkv(kv=4), "q.weight:0 o.weight:1", inputs=tokens, refusable=True)
def one_key_for_all_heads(m, x):
    return m.o(merged(attention(heads(m.q(x), 4), heads(m.k(x), 4), heads(m.v(x), 4))))


@nasty(
    lambda: qkv() | dict(table=par(4, 5, 5)),
    "q.weight:0 table:0 o.weight:1",
    "table:1 table:2",
    inputs=tokens,
)
def bias_of_every_head(m, x):
    q, k, v = (heads(f(x), 4) for f in (m.q, m.k, m.v))
    return m.o(merged((q @ k.transpose(-2, -1) / 2 + m.table).softmax(-1) @ v))


@nasty(
    lambda: qkv() | dict(table=par(9, 4), index=torch.arange(5)[:, None] - torch.arange(5) + 4),
    "q.weight:0 table:1 o.weight:1",
    "table:0",
    inputs=tokens,
)
def relative_position_table(m, x):
    q, k, v = (heads(f(x), 4) for f in (m.q, m.k, m.v))
    bias = m.table[m.index.view(-1)].view(5, 5, -1).permute(2, 0, 1)
    return m.o(merged(F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])))


def rotated(x):
    "Rotary positions: halves of a head turn into each other."
    u, v = x.chunk(2, -1)
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / torch.arange(
        1, x.shape[-1] // 2 + 1
    )
    return torch.cat([u * angle.cos() - v * angle.sin(), v * angle.cos() + u * angle.sin()], -1)


@nasty(qkv, "q.weight:0 k.weight:0 v.weight:0 o.weight:1", inputs=tokens)
def rotary_positions(m, x):
    return m.o(
        merged(
            F.scaled_dot_product_attention(
                rotated(heads(m.q(x), 4)), rotated(heads(m.k(x), 4)), heads(m.v(x), 4)
            )
        )
    )


@nasty(
    lambda: dict(a=conv(3, 16, 1), qkv=conv(16, 48, 1), o=conv(16, 16, 1), b=conv(16, 4)),
    "a.weight:0 qkv.weight:1 qkv.weight:0 o.weight:1 o.weight:0 b.weight:1",
)
def window_attention(m, x):
    "Windows of 4 x 4, shifted by two, heads of four dimensions."
    y = m.a(x)
    n, c, h, w = y.shape
    t = (
        m.qkv(y.roll((2, 2), (2, 3)))
        .view(n, 3, -1, 4, h // 4, 4, w // 4, 4)
        .permute(1, 0, 4, 6, 2, 5, 7, 3)
        .flatten(5, 6)
    )
    z = attention(*t).unflatten(4, (4, 4)).permute(0, 3, 6, 1, 4, 2, 5).reshape(n, -1, h, w)
    return m.b(y + m.o(z).roll((-2, -2), (2, 3)))


@nasty(qkv, "v.weight:0 o.weight:1", inputs=tokens, refusable=True, kept=True)
def attention_over_channels(m, x):
    "XCiT: queries and keys of unit length, a map of channels by channels."
    q, k, v = (heads(f(x), 4).transpose(-2, -1) for f in (m.q, m.k, m.v))
    y = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)).softmax(-1) @ v
    return m.o(y.permute(0, 3, 1, 2).flatten(2))


@nasty(
    lambda: dict(a=Linear(6, 16), at=MultiheadAttention(16, 4, batch_first=True), b=Linear(16, 3)),
    "at.in_proj_weight:0 at.out_proj.weight:1",
    inputs=tokens,
)
def multihead_attention(m, x):
    "D9: whole heads, no hint."
    y = m.a(x)
    return m.b(y + m.at(y, y, y, need_weights=False)[0])


@nasty(
    lambda: dict(
        at=MultiheadAttention(16, 4, kdim=6, vdim=5, add_bias_kv=True),
        a=Linear(6, 16),
        b=Linear(16, 3),
    ),
    refusable=True,
    inputs=lambda: (torch.randn(5, 2, 6), torch.randn(7, 2, 6), torch.randn(7, 2, 5)),
)
def cross_attention_of_other_widths(m, q, k, v):
    return m.b(m.at(m.a(q), k, v)[0])


@nasty(
    lambda: dict(
        a=Linear(6, 16), t=nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), b=Linear(16, 3)
    ),
    "t.linear1.weight:0 t.linear2.weight:1 t.self_attn.in_proj_weight:0 t.self_attn.out_proj.weight:1",
    inputs=tokens,
    kept=True,
)
def transformer_layer(m, x):
    return m.b(m.t(m.a(x)))


@nasty(
    lambda: dict(
        a=Linear(6, 16), t=nn.Transformer(16, 4, 1, 1, 32, batch_first=True), b=Linear(16, 3)
    ),
    "t.encoder.layers.0.linear1.weight:0 t.decoder.layers.0.linear1.weight:0",
    inputs=lambda: (torch.randn(2, 5, 6), torch.randn(2, 4, 6)),
    kept=True,
)
def encoder_and_decoder(m, x, y):
    return m.b(m.t(m.a(x), m.a(y)))


@nasty(
    lambda: dict(r=Linear(6, 3), up=par(3, 6, 8), down=par(3, 8, 6)),
    "up:2 down:1",
    "up:0 down:0 r.weight:0",
    inputs=tokens,
    refusable=True,
)
def routed_to_an_expert(m, x):
    score, chosen = m.r(x).softmax(-1).max(-1)
    return score[..., None] * einsum(
        "bnk,bnkd->bnd", einsum("bnd,bndk->bnk", x, m.up[chosen]).relu(), m.down[chosen]
    )


@nasty(
    lambda: dict(
        r=Linear(6, 2),
        experts=nn.ModuleList(Sequential(Linear(6, 8), ReLU(), Linear(8, 6)) for _ in range(2)),
    ),
    "experts.0.0.weight:0 experts.1.2.weight:1",
    "r.weight:0",
    inputs=tokens,
    refusable=True,
)
def sparse_mixture_of_experts(m, x):
    chosen, out = m.r(x).argmax(-1), torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        rows = (chosen == e).nonzero(as_tuple=True)
        out = out.index_put(rows, expert(x[rows]), accumulate=True)
    return out


# --- recurrent ---


@nasty(
    lambda: dict(a=Linear(6, 12), r=nn.GRU(12, 16, batch_first=True), b=Linear(16, 3)),
    "a.weight:0 r.weight_ih_l0:1 b.weight:1 r.weight_hh_l0:0 r.weight_hh_l0:1",
    inputs=tokens,
)
def gated_recurrent(m, x):
    "D14."
    return m.b(m.r(m.a(x))[0])


@nasty(
    lambda: dict(a=Linear(6, 12), r=nn.LSTM(12, 16, batch_first=True), b=Linear(16, 3)),
    "a.weight:0 r.weight_ih_l0:1 b.weight:1 r.weight_hh_l0:0 r.weight_hh_l0:1",
    inputs=tokens,
)
def long_short_term_memory(m, x):
    "D14."
    return m.b(m.r(m.a(x))[0][:, -1])


@nasty(
    lambda: dict(a=Linear(6, 12), r=nn.LSTM(12, 8, 2, bidirectional=True), b=Linear(16, 3)),
    "a.weight:0",
    inputs=tokens,
    refusable=True,
)
def two_layers_both_directions(m, x):
    return m.b(m.r(m.a(x))[0])


@nasty(
    lambda: dict(a=Linear(6, 12), r=nn.GRUCell(12, 8), b=Linear(8, 3)),
    "a.weight:0",
    inputs=tokens,
    refusable=True,
)
def recurrent_cell(m, x):
    h = x.new_zeros(x.shape[0], 8)
    for t in m.a(x).unbind(1):
        h = m.r(t, h)
    return m.b(h)


@nasty(
    lambda: dict(a=Linear(6, 8), h=Linear(8, 8), b=Linear(8, 3)),
    "a.weight:0 h.weight:0 h.weight:1 b.weight:1",
    inputs=tokens,
)
def recurrence_by_hand(m, x):
    h = 0
    for t in m.a(x).unbind(1):
        h = torch.tanh(t + (m.h(h) if torch.is_tensor(h) else 0))
    return m.b(h)


# --- products of features ---


@nasty(lambda: dict(a=conv(3, 6), b=Linear(36, 4)), refusable=True)
def bilinear_pooling(m, x):
    y = m.a(x).flatten(2)
    return m.b((y @ y.transpose(1, 2)).flatten(1))


@nasty(
    lambda: dict(a=Linear(6, 8), c=Linear(6, 10), f=nn.Bilinear(8, 10, 4)),
    "a.weight:0 c.weight:0 f.weight:1 f.weight:2",
    "f.weight:0",
    inputs=tokens,
    refusable=True,
)
def bilinear_layer(m, x):
    return m.f(m.a(x), m.c(x))


@nasty(lambda: dict(a=conv(3, 16), b=conv(3, 16)), "a.weight:0 b.weight:0")
def correlation_of_two_towers(m, x):
    return einsum("nchw,nc->nhw", m.a(x), m.b(x).mean((2, 3)))


@nasty(lambda: dict(a=Linear(6, 8), b=Linear(6, 8)), refusable=True, kept=True, inputs=tokens)
def cosine(m, x):
    return F.cosine_similarity(m.a(x), m.b(x), dim=-1)


@nasty(lambda: dict(a=Linear(6, 8), b=Linear(6, 8)), refusable=True, kept=True, inputs=tokens)
def distances(m, x):
    return torch.cdist(m.a(x), m.b(x))


# --- what goes in and what comes out ---


@nasty(
    lambda: dict(a=conv(3, 8), b=conv(5, 8), c=conv(8, 4)),
    "a.weight:0 b.weight:0 c.weight:1",
    "a.weight:1 b.weight:1",
    inputs=lambda: (torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8, 8)),
)
def two_inputs(m, x, y):
    return m.c(m.a(x) + m.b(y))


@nasty(
    lambda: dict(a=conv(3, 8), b=conv(5, 8), c=conv(8, 4)),
    "a.weight:0 b.weight:0 c.weight:1",
    inputs=lambda: dict(right=torch.randn(2, 5, 8, 8), left=torch.randn(2, 3, 8, 8), scale=2.0),
)
def keyword_inputs(m, left, right, scale=1.0):
    return m.c(m.a(left) + m.b(right) * scale)


@nasty(
    lambda: two(),
    "a.weight:0 b.weight:1",
    inputs=lambda: ([torch.randn(3, 8, 8), torch.randn(3, 6, 6)],),
)
def list_of_images(m, images):
    return [m.b(m.a(i[None])) for i in images]


@nasty(lambda: two(), "a.weight:0 b.weight:1", inputs=lambda: torch.randn(1, 3, 8, 8))
def batch_of_one(m, x):
    "D12."
    assert x.ndim == 4
    return m.b(m.a(x))


@nasty(
    lambda: dict(a=conv(3, 8), b=conv(8, 8), c=conv(8, 4), d=Linear(4, 2)),
    "b.weight:0 c.weight:1",
    "a.weight:0 b.weight:1 c.weight:0",
)
def tuple_of_outputs(m, x):
    "Return the first and the third map too."
    y = m.a(x)
    z = m.c(m.b(y))
    return y, (m.d(z.mean((2, 3))), z)


@nasty(
    lambda: dict(a=conv(3, 8), b=conv(8, 8), c=conv(8, 4)), "b.weight:0 c.weight:1", "a.weight:0"
)
def dict_of_outputs(m, x):
    y = m.a(x)
    return dict(features=y, out=[m.c(m.b(y))], text="no tensor")


@dataclass
class Result:
    out: Tensor
    features: Tensor


Named = namedtuple("Named", "out features")


@nasty(
    lambda: dict(a=conv(3, 8), b=conv(8, 8), c=conv(8, 4)), "b.weight:0 c.weight:1", "a.weight:0"
)
def dataclass_of_outputs(m, x):
    y = m.a(x)
    return Result(m.c(m.b(y)), y)


@nasty(
    lambda: dict(a=conv(3, 8), b=conv(8, 8), c=conv(8, 4)), "b.weight:0 c.weight:1", "a.weight:0"
)
def named_tuple_of_outputs(m, x):
    y = m.a(x)
    return Named(m.c(m.b(y)), y)


@nasty(
    lambda: dict(a=conv(3, 8), b=conv(8, 8), c=conv(8, 4)),
    "a.weight:0 b.weight:0 c.weight:1",
    "c.weight:0",
)
def labels_as_outputs(m, x):
    y = m.c(m.b(m.a(x)))
    return y, y.argmax(1)


@nasty(lambda: dict(a=conv(3, 8), b=conv(8, 4)), "b.weight:1", "b.weight:0", refusable=True)
def number_of_the_largest_channel(m, x):
    "Return the number of a channel, which nothing renumbers."
    y = m.a(x)
    return m.b(y), y.argmax(1)


# --- the same by other words ---


@nasty(two, refusable=True, kept=True)
def functional_layer_norm(m, x):
    y = m.a(x).permute(0, 2, 3, 1)
    return m.b(F.layer_norm(y, y.shape[-1:]).permute(0, 3, 1, 2))


@nasty(two, refusable=True, kept=True)
def functional_group_norm(m, x):
    return m.b(F.group_norm(m.a(x), 4))


@nasty(lambda: two() | dict(mean=torch.randn(16), var=torch.rand(16) + 1), "a.weight:0 b.weight:1")
def functional_batch_norm(m, x):
    return m.b(F.batch_norm(m.a(x), m.mean, m.var))


@nasty(lambda: two() | dict(n=LayerNorm(16, elementwise_affine=False)), kept=True, refusable=True)
def layer_norm_without_affine(m, x):
    return m.b(m.n(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@nasty(lambda: two() | dict(n=GroupNorm(4, 16, affine=False)), kept=True, refusable=True)
def group_norm_without_affine(m, x):
    return m.b(m.n(m.a(x)))


@nasty(
    lambda: dict(a=Linear(6, 8), c=Linear(6, 12), n=LayerNorm(20), b=Linear(20, 4)),
    "a.weight:0 c.weight:0 n.weight:0 b.weight:1",
    inputs=tokens,
    kept=True,
)
def layer_norm_over_two_layers(m, x):
    return m.b(m.n(torch.cat([m.a(x), m.c(x)], -1)))


@nasty(
    lambda: dict(a=conv(3, 8), c=conv(3, 16), n=GroupNorm(3, 24), b=conv(24, 4)),
    refusable=True,
    kept=True,
)
def group_norm_over_two_layers(m, x):
    return m.b(m.n(torch.cat([m.a(x), m.c(x)], 1)))


@nasty(
    lambda: dict(a=conv(3, 8), c=conv(3, 8, 5), bn=BatchNorm2d(8), b=conv(8, 4)),
    "a.weight:0 c.weight:0 bn.weight:0 b.weight:1",
)
def one_norm_for_two_layers(m, x):
    return m.b(m.bn(m.a(x)).relu()) + m.b(m.bn(m.c(x)))


@nasty(
    lambda: dict(a=Linear(6, 12), bn=nn.BatchNorm1d(12), b=Linear(12, 3)),
    "a.weight:0 bn.weight:0 b.weight:1",
    inputs=tokens,
)
def batch_norm_of_tokens(m, x):
    return m.b(m.bn(m.a(x).transpose(1, 2)).transpose(1, 2))


@nasty(
    lambda: dict(
        a=Conv2d(3, 16, 3, padding=1, padding_mode="reflect"),
        b=Conv2d(16, 16, 3, padding="same", dilation=2),
        c=Conv2d(16, 4, 3, stride=2, padding=1, padding_mode="circular"),
    ),
    "a.weight:0 b.weight:1 b.weight:0 c.weight:1",
)
def padding_modes(m, x):
    return m.c(m.b(m.a(x)))


@nasty(
    lambda: dict(
        layers=Sequential(
            conv(3, 8),
            nn.Flatten(),
            Linear(8 * 64, 24),
            nn.Unflatten(1, (6, 2, 2)),
            nn.Upsample(scale_factor=2),
            nn.PixelUnshuffle(2),
            conv(24, 12),
            nn.ChannelShuffle(3),
            nn.PixelShuffle(2),
            conv(3, 2),
        )
    ),
    "layers.0.weight:0 layers.2.weight:1",
    refusable=True,
)
def modules_that_reshape(m, x):
    return m.layers(x)


@nasty(
    lambda: dict(embed=Embedding(20, 16, max_norm=1.0), b=Linear(16, 4)),
    refusable=True,
    kept=True,
    inputs=ids,
)
def embedding_of_limited_length(m, i):
    "Rows are scaled to length one in the table itself, at every forward pass."
    return m.b(m.embed(i))


@nasty(
    lambda: dict(
        a=Linear(6, 12),
        b=Linear(12, 8),
        c=Linear(8, 3),
        source=torch.tensor([0, 1, 2, 3, 4, 4]),
        target=torch.tensor([1, 2, 3, 4, 0, 2]),
    ),
    "a.weight:0 b.weight:1 b.weight:0 c.weight:1",
    inputs=lambda: torch.randn(5, 6),
)
def messages_on_a_graph(m, x):
    y = m.a(x).relu()
    y = torch.zeros_like(y).index_add(0, m.target, y[m.source]) + y
    y = m.b(y)
    return m.c(
        torch.zeros_like(y).scatter_add(0, m.target[:, None].expand(-1, y.shape[1]), y[m.source])
    )


@nasty(
    lambda: dict(a=Linear(6, 8), b=Linear(8, 4), c=Linear(6, 8), d=par(2, 4, 3)),
    "a.weight:0 c.weight:0 b.weight:1 b.weight:0 d:1",
    "d:0 d:2",
    inputs=tokens,
)
def other_products(m, x):
    y = torch.addcmul(m.a(x), m.a(x), m.c(x), value=0.5)
    z = torch.lerp(y, m.c(x), 0.3)
    return torch.tensordot(m.b(z).movedim(0, 1), m.d, dims=([2], [1]))


@nasty(
    lambda: dict(a=conv(3, 8), b=conv(32, 4), k=torch.randn(4, 1, 2, 2)),
    "a.weight:0 b.weight:1",
    refusable=True,
)
def wavelet(m, x):
    "Every channel becomes four, by the same four filters."
    y = m.a(x)
    return m.b(F.conv2d(y, m.k.repeat(y.shape[1], 1, 1, 1), stride=2, groups=y.shape[1]))


@nasty(two, refusable=True, kept=True)
def logarithm_of_a_sum_of_exponentials(m, x):
    y = m.a(x)
    return m.b(y - y.logsumexp(1, keepdim=True))


@nasty(two, refusable=True)
def marked_by_number(m, x):
    "Channel numbers as values: others after a cut."
    y = m.a(x)
    return m.b(y * torch.arange(y.shape[1])[:, None, None])


@nasty(two, refusable=True)
def every_second_channel_by_numbers(m, x):
    y = m.a(x)
    return m.b(y.index_copy(1, torch.arange(0, y.shape[1], 2), y[:, 1::2]))


@nasty(
    lambda: dict(
        ws=nn.ParameterList([par(16, 6), par(16, 16), par(4, 16)]),
        bs=nn.ParameterDict(dict(a=par(16), b=par(16))),
    ),
    "ws.0:0 bs.a:0 ws.1:1 ws.1:0 bs.b:0 ws.2:1",
    "ws.2:0 ws.0:1",
    inputs=tokens,
)
def lists_of_parameters(m, x):
    return F.linear(
        F.linear(F.linear(x, m.ws[0], m.bs["a"]).relu(), m.ws[1], m.bs["b"]).relu(), m.ws[2]
    )


@nasty(lambda: dict(a=Linear(6, 16), b=Linear(16, 4)), "a.weight:0 b.weight:1", inputs=tokens)
def matrix_products_of_all_kinds(m, x):
    y = torch.baddbmm(
        m.a.bias.expand(x.shape[0], 1, -1), x, m.a.weight.t().expand(x.shape[0], -1, -1)
    )
    return torch.matmul(y.relu(), m.b.weight.mT) + m.b.bias


# --- modes, control flow, wrappers ---


@nasty(
    lambda: two() | dict(bn=BatchNorm2d(16), drop=Dropout(0.5)),
    "a.weight:0 bn.weight:0 b.weight:1",
    after=lambda m: m.train(),
)
def in_train_mode(m, x):
    "D13."
    return m.b(m.drop(m.bn(m.a(x)).relu()))


@nasty(
    lambda: two() | dict(bn=BatchNorm2d(16), drop=nn.Dropout2d(0.5)),
    "a.weight:0 bn.weight:0 b.weight:1",
    after=lambda m: m.bn.train() and m,
)
def partly_in_train_mode(m, x):
    return m.b(m.drop(m.bn(m.a(x)).relu()))


@nasty(lambda: two(), "a.weight:0 b.weight:1")
def control_flow_on_sizes(m, x):
    while x.shape[-1] > 4:
        x = F.avg_pool2d(x, 2)
    return m.b(m.a(x) if x.shape[0] > 1 else m.a(x).relu())


@nasty(lambda: two(), refusable=True)
def control_flow_on_width(m, x):
    y = m.a(x)
    return m.b(y.relu() if y.shape[1] == 16 else y)


@nasty(lambda: two(), refusable=True)
def scaled_by_width(m, x):
    y = m.a(x)
    return m.b(y / y.shape[1])


@nasty(lambda: two(), refusable=True)
def scaled_by_a_tensor_of_the_width(m, x):
    "As RAFT does: the number is no argument of any operation, but the value of a new tensor."
    y = m.a(x)
    return m.b(y / torch.sqrt(torch.tensor(y.shape[1])))


@nasty(lambda: two(), refusable=True)
def filled_with_the_width(m, x):
    y = m.a(x)
    return m.b(y - torch.full_like(y, y.shape[1] / 16))


@nasty(
    lambda: dict(a=conv(3, 16), b=Linear(16 * 64, 4)),
    refusable=True,
    after=lambda m: setattr(m, "width", 16) or m,
)
def scaled_by_a_noted_width(m, x):
    "Keep the number: exact."
    return m.b(m.a(x).flatten(1) / m.width**0.5)


@nasty(
    lambda: dict(a=Linear(6, 32), qkv=Linear(32, 96), o=Linear(32, 32), b=Linear(32, 3)),
    "a.weight:0 b.weight:1",
    inputs=lambda: torch.randn(2, 16, 6),
    after=lambda m: setattr(m, "num_heads", 4) or m,
    refusable=True,
)
def as_many_windows_as_heads(m, x):
    """Take four windows of four tokens and four heads of eight features.

    The number of heads is an attribute, that of windows is not.
    """
    y = m.a(x)
    n, t, c = y.shape
    q, k, v = (
        m.qkv(y.view(n, 4, t // 4, c))
        .view(n, 4, t // 4, 3, m.num_heads, -1)
        .permute(3, 0, 1, 4, 2, 5)
        .unbind(0)
    )
    z = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(n, t, -1)
    return m.b(y + m.o(z))


@nasty(lambda: two(), "a.weight:0 b.weight:1")
def control_flow_on_values(m, x):
    y = m.a(x)
    return m.b(y.relu() if float(x.abs().mean()) > 0.1 else y)


@nasty(lambda: two(), "a.weight:0 b.weight:1")
def without_gradients_first(m, x):
    with torch.no_grad():
        y = m.a(x)
    return m.b(y.detach().relu())


@nasty(lambda: two(), "a.weight:0 b.weight:1")
def computed_in_double(m, x):
    return m.b(m.a(x).double().exp().clamp(max=9).to(x.dtype))


@nasty(lambda: dict(a=conv(3, 8), b=conv(8, 8), c=conv(8, 4)), "a.weight:0 b.weight:0 c.weight:1")
def checkpointed(m, x):
    return m.c(
        torch.utils.checkpoint.checkpoint(lambda y: m.b(y).relu(), m.a(x), use_reentrant=False)
    )


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


@nasty(two, "a.weight:0 b.weight:1")
def straight_through(m, x):
    return m.b(Sign.apply(m.a(x)))


@nasty(two, "a.weight:0 b.weight:1")
def pooling_and_resizing(m, x):
    y, where = F.max_pool2d(m.a(x), 2, return_indices=True)
    y = F.max_unpool2d(y.tanh(), where, 2)
    return m.b(F.interpolate(F.adaptive_max_pool2d(y, 3), size=(7, 7), mode="bilinear"))


@nasty(lambda: two() | dict(t=Linear(16, 2)), "a.weight:0 t.weight:1 b.weight:1", "t.weight:0")
def warped(m, x):
    y = m.a(x)
    grid = F.affine_grid(
        torch.eye(2, 3).expand(y.shape[0], 2, 3).to(x), list(y.shape), align_corners=False
    )
    return m.b(F.grid_sample(y, grid + m.t(y.mean((2, 3)))[:, None, None], align_corners=False))


@nasty(lambda: two(), "a.weight:0 b.weight:1", after=nn.DataParallel)
def data_parallel(m, x):
    return m.b(m.a(x).relu())


@nasty(
    lambda: two(),
    "0.weight:0 2.weight:1",
    after=lambda m: torch.fx.symbolic_trace(Sequential(m.a, ReLU(), m.b)),
)
def graph_module(m, x):
    "Run the chain of `after`."


def exported(m):
    return torch.export.export(m, (seeded(image)(),)).module()


@nasty(lambda: two(), "a.weight:0 b.weight:1", after=exported)
def exported_program(m, x):
    "D17."
    return m.b(m.a(x).relu())


@nasty(lambda: dict(a=conv(3, 12), b=Linear(12 * 64, 5)), refusable=True, after=exported)
def exported_flatten(m, x):
    "Export writes every size into the graph."
    y = m.a(x)
    return m.b(y.view(y.shape[0], -1))


@nasty(lambda: two(), refusable=True, after=lambda m: torch.jit.script(Sequential(m.a, m.b)))
def scripted(m, x):
    "Run the chain of `after`."


@nasty(
    lambda: dict(a=conv(3, 8), b=conv(8, 4)),
    "a.weight:0 b.weight:1",
    after=lambda m: m.to(memory_format=torch.channels_last),
)
def channels_last(m, x):
    return m.b(m.a(x.to(memory_format=torch.channels_last)))
