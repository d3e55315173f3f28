"""Draw small networks, data and losses from a grammar: what users bring, in every combination.

`draw(seed)` gives a `Task`: how to build the network, batches, and the loss. Everything that is
drawn depends on the seed alone. `mixes` says that something without parameters mixes channels (a
normalisation, a mean, a softmax): silencing weights is then not the mask.
"""

import math
from collections import UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = [nn.ReLU, nn.SiLU, nn.GELU, nn.Tanh, nn.LeakyReLU, nn.Identity, nn.Hardswish]


@dataclass
class Task:
    """Hold a network, data and a loss that belong together."""

    name: str  # what was drawn, in words
    build: Callable  # () -> nn.Module, the same each time
    batches: list  # of (inputs, targets)
    loss: Callable | None  # (outputs, targets) -> mean loss; None: cross-entropy
    dtype: torch.dtype
    mixes: bool  # whether channels are mixed without parameters

    @property
    def example(self) -> object:
        return self.batches[0][0]


# Blocks on images, N x C x H x W


class Block(nn.Module):
    """Map `size` channels to `out` channels; blocks set both."""

    mixes = False

    def __init__(self, size: int, out: int):
        super().__init__()
        self.size, self.out = size, out


def norm_of(draw: Random, channels: int) -> nn.Module:
    kinds = [nn.BatchNorm2d(channels), nn.Identity(), nn.GroupNorm(2, channels)]
    kinds.append(nn.InstanceNorm2d(channels, affine=True))
    return draw.choice(kinds)


class ConvNorm(Block):
    def __init__(self, draw, size):
        super().__init__(size, draw.choice([6, 8, 12]))
        kernel, groups = draw.choice([1, 3, 3, 5]), draw.choice([1, 1, 1, 2])
        self.conv = nn.Conv2d(
            size,
            self.out,
            kernel,
            draw.choice([1, 1, 2]),
            kernel // 2,
            groups=groups,
            bias=draw.random() < 0.5,
            padding_mode=draw.choice(["zeros", "zeros", "reflect", "replicate"]),
        )
        self.norm, self.act = norm_of(draw, self.out), draw.choice(ACTIVATIONS)()
        self.mixes = isinstance(self.norm, nn.GroupNorm)

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class Residual(Block):
    def __init__(self, draw, size):
        super().__init__(size, size)
        inner = draw.choice([6, 10])
        self.first, self.second = nn.Conv2d(size, inner, 3, 1, 1), nn.Conv2d(inner, size, 3, 1, 1)
        self.norm = nn.BatchNorm2d(inner)
        self.before = draw.random() < 0.3

    def forward(self, x):
        y = self.second(F.relu(self.norm(self.first(F.relu(x) if self.before else x))))
        return x + y if self.before else F.relu(x + y)


class Concat(Block):
    def __init__(self, draw, size):
        super().__init__(size, size + 8)
        self.left, self.right = nn.Conv2d(size, 8, 1), nn.Conv2d(size, size, 3, 1, 1)
        self.first = draw.random() < 0.5

    def forward(self, x):
        parts = [self.left(x), F.silu(self.right(x))]
        return torch.cat(parts if self.first else parts[::-1], 1)


class Dense(Block):
    def __init__(self, draw, size):
        super().__init__(size, size + 4)
        self.conv = nn.Conv2d(size, 4, 3, 1, 1)

    def forward(self, x):
        return torch.cat([x, self.conv(F.relu(x))], 1)


class Depthwise(Block):
    def __init__(self, draw, size):
        super().__init__(size, draw.choice([8, 12]))
        self.spatial = nn.Conv2d(size, size, 3, 1, 1, groups=size)
        self.norm, self.point = nn.BatchNorm2d(size), nn.Conv2d(size, self.out, 1)

    def forward(self, x):
        return self.point(F.hardswish(self.norm(self.spatial(x))))


class SqueezeExcite(Block):
    def __init__(self, draw, size):
        super().__init__(size, size)
        self.down, self.up = nn.Conv2d(size, 4, 1), nn.Conv2d(4, size, 1)

    def forward(self, x):
        pooled = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.up(F.relu(self.down(pooled))))


class Gated(Block):
    def __init__(self, draw, size):
        super().__init__(size, 8)
        self.conv = nn.Conv2d(size, 16, 3, 1, 1)
        self.chunked = draw.random() < 0.5

    def forward(self, x):
        y = self.conv(x)
        if self.chunked:
            a, b = y.chunk(2, 1)
            return a * b.sigmoid()
        return F.glu(y, 1)


class Maxout(Block):
    def __init__(self, draw, size):
        super().__init__(size, size)
        self.convs = nn.ModuleList(nn.Conv2d(size, size, 1) for _ in range(3))

    def forward(self, x):
        return torch.stack([c(x) for c in self.convs]).amax(0)


class Shuffle(Block):
    def __init__(self, draw, size):
        super().__init__(size, size)

    def forward(self, x):
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Resize(Block):
    def __init__(self, draw, size):
        super().__init__(size, size)
        kinds = [nn.AvgPool2d(2), nn.MaxPool2d(2), nn.Upsample(scale_factor=2)]
        self.layer = draw.choice([*kinds, nn.AdaptiveAvgPool2d(5), nn.PixelShuffle(1)])

    def forward(self, x):
        return self.layer(x)


class Transposed(Block):
    def __init__(self, draw, size):
        super().__init__(size, 8)
        self.conv = nn.ConvTranspose2d(size, 8, 2, 2, groups=draw.choice([1, 1, 2]))

    def forward(self, x):
        return F.relu(self.conv(x))


class Scaled(Block):
    def __init__(self, draw, size):
        super().__init__(size, size)
        self.scale = nn.Parameter(torch.rand(size, 1, 1) + 0.5)
        self.register_buffer("offset", torch.randn(1, size, 1, 1))
        self.active = draw.random() < 0.5

    def forward(self, x):
        x = x * self.scale + self.offset
        return F.relu(x) if self.active else x


class Noisy(Block):
    def __init__(self, draw, size):
        super().__init__(size, size)
        self.everywhere = draw.random() < 0.5

    def forward(self, x):
        noise = torch.rand_like(x) if self.everywhere else torch.rand(x.shape[-1])
        return x + 0.1 * noise.to(x.dtype)


class Twice(Block):
    def __init__(self, draw, size):
        super().__init__(size, size)
        self.conv = nn.Conv2d(size, size, 3, 1, 1)

    def forward(self, x):
        return F.relu(self.conv(F.relu(self.conv(x))))


class WeightNormed(Block):
    def __init__(self, draw, size):
        super().__init__(size, 8)
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(size, 8, 3, 1, 1))

    def forward(self, x):
        return self.conv(x)


class ChannelsLast(Block):
    mixes = True

    def __init__(self, draw, size):
        super().__init__(size, size)
        self.norm, self.up = nn.LayerNorm(size), nn.Linear(size, 2 * size)
        self.down = nn.Linear(2 * size, size)

    def forward(self, x):
        y = self.norm(x.permute(0, 2, 3, 1))
        return x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


class Halves(Block):
    def __init__(self, draw, size):
        super().__init__(size, size)
        self.conv = nn.Conv2d(size // 2, size // 2, 3, 1, 1)

    def forward(self, x):
        half = self.size // 2
        a, b = x[:, :half], x[:, half:]
        return torch.cat([a, self.conv(b)], 1)


class TrainingOnly(Block):
    """Have a layer that runs in training alone."""

    def __init__(self, draw, size):
        super().__init__(size, size)
        self.extra = nn.Conv2d(size, size, 1)

    def forward(self, x):
        return x + self.extra(x) if self.training else x


IMAGE_BLOCKS = [
    *[ConvNorm] * 4,
    *[Residual] * 2,
    Concat,
    Dense,
    Depthwise,
    SqueezeExcite,
    Gated,
    Maxout,
    Shuffle,
    Resize,
    Transposed,
    Scaled,
    Noisy,
    Twice,
    WeightNormed,
    ChannelsLast,
    Halves,
    TrainingOnly,
]


# Blocks on sequences, N x L x C


class Perceptron(Block):
    mixes = True

    def __init__(self, draw, size):
        super().__init__(size, size)
        norms = [nn.LayerNorm(size), nn.RMSNorm(size), nn.Identity()]
        self.norm, inner = draw.choice(norms), draw.choice([12, 20])
        self.up, self.down = nn.Linear(size, inner), nn.Linear(inner, size, bias=False)
        self.act, self.dropout = draw.choice(ACTIVATIONS)(), nn.Dropout(0.1)

    def forward(self, x):
        return x + self.dropout(self.down(self.act(self.up(self.norm(x)))))


class SwiGlu(Block):
    mixes = True

    def __init__(self, draw, size):
        super().__init__(size, size)
        self.norm = nn.RMSNorm(size)
        self.gate, self.up = nn.Linear(size, 16, False), nn.Linear(size, 16, False)
        self.down = nn.Linear(16, size, False)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class OwnAttention(Block):
    mixes = True

    def __init__(self, draw, size):
        super().__init__(size, size)
        self.heads, self.fused = draw.choice([2, 4]), draw.random() < 0.5
        self.norm, self.qkv = nn.LayerNorm(size), nn.Linear(size, 3 * size)
        self.out_layer = nn.Linear(size, size)
        self.per_head = size // self.heads if draw.random() < 0.3 else None  # written in the code

    def forward(self, x):
        n, length, _ = x.shape
        size = self.qkv.out_features // 3
        per_head = self.per_head or size // self.heads
        q, k, v = self.qkv(self.norm(x)).view(n, length, 3, self.heads, per_head).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) / math.sqrt(per_head)).softmax(-1) @ v
        return x + self.out_layer(y.transpose(1, 2).reshape(n, length, size))


class ModuleAttention(Block):
    mixes = True

    def __init__(self, draw, size):
        super().__init__(size, size)
        self.attention = nn.MultiheadAttention(size, 2, batch_first=True)
        self.weights = draw.random() < 0.5

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=self.weights)[0]


class Recurrent(Block):
    def __init__(self, draw, size):
        super().__init__(size, 12)
        kind, twice = draw.choice([nn.GRU, nn.LSTM]), draw.random() < 0.5
        self.layer = kind(size, 6 if twice else 12, batch_first=True, bidirectional=twice)

    def forward(self, x):
        return self.layer(x)[0]


class Temporal(Block):
    def __init__(self, draw, size):
        super().__init__(size, 12)
        self.conv = nn.Conv1d(size, 12, 3, padding=2, dilation=2)
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x):
        y = self.conv(x.transpose(1, 2))[..., : x.shape[1]]
        return F.relu(self.norm(y)).transpose(1, 2)


SEQUENCE_BLOCKS = [
    Perceptron,
    Perceptron,
    SwiGlu,
    OwnAttention,
    ModuleAttention,
    Recurrent,
    Temporal,
]


# Outputs: what a network returns beside its logits, and how


class Slotted:
    __slots__ = ("features", "logits")

    def __init__(self, logits, features):
        self.logits, self.features = logits, features


@dataclass
class Inner:
    features: Tensor


@dataclass
class Outer:
    logits: Tensor
    inner: Inner


Pair = namedtuple("Pair", "logits features")


class Mapped(UserDict):
    pass


OUTPUTS = {
    "tensor": lambda logits, features: logits,
    "tuple": lambda logits, features: (logits, features),
    "list": lambda logits, features: [logits, [features, None, "words"]],
    "dict": lambda logits, features: dict(logits=logits, features=features, count=3),
    "named tuple": Pair,
    "data class": lambda logits, features: Outer(logits, Inner(features)),
    "namespace": lambda logits, features: SimpleNamespace(logits=logits, features=features),
    "slots": Slotted,
    "user dict": lambda logits, features: Mapped(logits=logits, features=features),
    "whole numbers": lambda logits, features: (logits, features.argmax(1)),
    "complex": lambda logits, features: (logits, torch.complex(features, features * 2)),
}


def logits_of(outputs: object) -> Tensor:
    """Return the logits in any of the outputs above."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, tuple | list) and not hasattr(outputs, "logits"):
        return outputs[0]
    return outputs.logits if hasattr(outputs, "logits") else outputs["logits"]


def leaves_of(outputs: object) -> list[Tensor]:
    """Return every tensor in any of the outputs above, by a walk of its own."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Slotted):
        return [outputs.logits, outputs.features]
    if isinstance(outputs, tuple | list):
        parts = list(outputs)
    elif isinstance(outputs, dict | UserDict):
        parts = list(outputs.values())
    else:
        parts = list(vars(outputs).values()) if hasattr(outputs, "__dict__") else []
    found = []
    for part in parts:
        found += leaves_of(part)
    return found


class Network(nn.Module):
    """Run blocks one after another, then a head, and return logits as asked."""

    def __init__(self, draw: Random, kind: str, output: str, classes: int):
        super().__init__()
        self.kind, self.output = kind, output
        self.stem, size = self._stem(draw)
        blocks, self.mixes = [], False
        choices = IMAGE_BLOCKS if kind in ("image", "pixels") else SEQUENCE_BLOCKS
        for _ in range(draw.randint(1, 4)):
            blocks.append(draw.choice(choices)(draw, size))
            size = blocks[-1].out
        self.blocks = nn.Sequential(*blocks)
        self.mixes = any(b.mixes for b in blocks)
        self.head = nn.Conv2d(size, classes, 1) if kind == "pixels" else nn.Linear(size, classes)
        self.hidden = nn.Linear(size, size) if draw.random() < 0.3 and kind != "pixels" else None

    def _stem(self, draw: Random) -> tuple[nn.Module, int]:
        if self.kind == "tokens":
            return nn.Embedding(11, 16), 16
        if self.kind == "sequence":
            return nn.Linear(5, 16), 16
        return nn.Conv2d(3, 8, 3, 1, 1), 8

    def forward(self, x: Tensor) -> object:
        x = self.blocks(self.stem(x))
        if self.kind == "pixels":
            x = F.interpolate(x, size=(8, 8))
            return OUTPUTS[self.output](self.head(x), x.mean((2, 3)))
        pooled = x.mean((2, 3)) if self.kind == "image" else x.mean(1)
        if self.hidden is not None:
            pooled = F.relu(self.hidden(pooled))
        return OUTPUTS[self.output](self.head(pooled), pooled)


def describe(model: Network) -> str:
    return " > ".join(type(b).__name__ for b in model.blocks)


def loss_of(output: str, task: str) -> Callable | None:
    """Return the loss; None where plain cross-entropy will do."""
    if output == "tensor" and task == "classes":
        return None
    measure = F.mse_loss if task == "numbers" else F.cross_entropy
    return lambda outputs, targets: measure(logits_of(outputs), targets)


def make_inputs(kind: str, n: int, dtype: torch.dtype) -> Tensor:
    if kind == "tokens":
        return torch.randint(11, (n, 7))
    shape = (n, 7, 5) if kind == "sequence" else (n, 3, 8, 8)
    return torch.randn(shape).to(dtype)


def make_targets(kind: str, task: str, n: int, dtype: torch.dtype) -> Tensor:
    shape = (n, 8, 8) if kind == "pixels" else (n,)
    if task == "classes":
        return torch.randint(4, shape)
    return torch.randn((n, 4, 8, 8) if kind == "pixels" else (n, 4)).to(dtype)


def draw(seed: int) -> Task:
    """Return the task of a seed."""
    dice = Random(seed)
    kind = dice.choice(["image", "image", "image", "pixels", "tokens", "sequence"])
    output, task = dice.choice(list(OUTPUTS)), dice.choice(["classes", "classes", "numbers"])
    dtypes = [torch.float32] * 4 + [torch.float64, torch.bfloat16]
    dtype, architecture = dice.choice(dtypes), dice.random()
    if output == "complex" and dtype == torch.bfloat16:
        dtype = torch.float32  # there are no complex numbers of two bfloat16
    sizes = dice.choice([[4, 4], [4, 4, 1], [5, 3]])

    def build() -> Network:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Network(Random(architecture), kind, output, 4).to(dtype).eval()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        data = [(make_inputs(kind, n, dtype), make_targets(kind, task, n, dtype)) for n in sizes]
    model = build()
    name = f"{kind}: {describe(model)}, {output}, {task}, {dtype}, batches of {sizes}"
    return Task(name, build, data, loss_of(output, task), dtype, model.mixes)
