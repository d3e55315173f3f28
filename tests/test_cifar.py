"""Prune real CIFAR-10 networks, where the data set is at hand."""

import math

import pytest
from conftest import ROOT, read_json

from prune_nb.data import Loader, load_data
from prune_nb.models import create_model
from prune_nb.surgery.export import load_weights
from prune_nb.train import evaluate

SHIPPED = ROOT / "runs/published/resnet20-cifar10"
PARAMS = 272_474  # of ResNet-20 with ten classes


def test_prune_resnet20(cifar_run):
    assert cifar_run.returncode == 0, cifar_run.stderr
    result = cifar_run.result()
    assert result["baseline"]["params"] == PARAMS
    assert result["pruned"]["params"] == pytest.approx(0.15 * PARAMS, abs=0.01 * PARAMS)
    stages = [result[stage] for stage in ("baseline", "pruned", "finetuned")]
    assert all(math.isfinite(stage["loss"]) for stage in stages)
    if SHIPPED.exists():
        published = read_json(SHIPPED / "result.json")["accuracy"]
        assert result["baseline"]["accuracy"] == pytest.approx(published, abs=1e-3)
        # right after surgery; 8 steps of fine-tuning recover nothing
        assert result["pruned"]["accuracy"] > 0.2


@pytest.mark.skipif(not SHIPPED.exists(), reason="no network is shipped yet")
def test_shipped_network_is_as_good_as_stated(cifar_dir):
    stated = read_json(SHIPPED / "result.json")
    assert stated["accuracy"] >= 0.90
    assert (stated["model"], stated["dataset"]) == ("resnet20", "cifar10")
    assert (SHIPPED / "model.safetensors").stat().st_size < 1.5e6
    data = load_data("cifar10", cifar_dir)
    first = Loader(data.test.images[:2000], data.test.targets[:2000], data.info, 200)
    model = load_weights(create_model("resnet20", 10), SHIPPED)
    assert evaluate(model, first)["accuracy"] >= 0.88
