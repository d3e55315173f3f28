"""A pruned network is as ordinary as the original: pickled, copied, traced by fx, exported."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer

from prune_nb.api import export, prune

NETWORKS = {
    "swin": lambda: SwinTransformer([2, 2], 32, [1, 1], [2, 4], [4, 4], num_classes=10),
    "vit": lambda: VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10),
    "encoder": lambda: nn.Sequential(
        nn.Flatten(2), nn.TransformerEncoderLayer(1024, 4, 64, batch_first=True)
    ),
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU6()
    ),
}


@pytest.fixture(scope="module", params=NETWORKS)
def pruned(request) -> tuple:
    """Return a pruned network in evaluation mode, and inputs."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    model = NETWORKS[request.param]()
    small = prune(model, x, "l1", 0.4, cost="units", progress=False).model.eval()
    with torch.no_grad():
        assert small(x).shape == model.eval()(x).shape
    return small, x


@torch.no_grad()
def test_a_pickle_is_read_in_a_fresh_process(pruned, tmp_path):
    small, x = pruned
    path = tmp_path / "network.pt"
    torch.save((small, x, small(x)), path)
    code = (
        "import torch; m, x, y = torch.load('network.pt', weights_only=False); "
        "assert torch.allclose(m(x), y, atol=1e-6)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_copies_and_fx_graphs_compute_the_same(pruned):
    small, x = pruned
    for other in (copy.deepcopy(small), torch.fx.symbolic_trace(small)):
        torch.testing.assert_close(other(x), small(x), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_exports_take_any_batch(pruned, tmp_path):
    small, x = pruned
    export(small, tmp_path / "network.pt2", x)
    program = torch.export.load(tmp_path / "network.pt2").module()
    for n in (1, 2, 5):
        inputs = torch.randn(n, 3, 32, 32)
        torch.testing.assert_close(program(inputs), small(inputs), rtol=1e-4, atol=1e-5)
