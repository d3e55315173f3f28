"Real CIFAR-10, on the same machine."

import math

import pytest
from conftest import ROOT, read_json

from prune_nb.data import Loader, load_data
from prune_nb.models import create_model
from prune_nb.surgery.export import load_weights
from prune_nb.train import evaluate

SHIPPED = ROOT / "runs/published/resnet20-cifar10"


def test_prune_resnet20(cifar_run):
    assert cifar_run.returncode == 0, cifar_run.stderr
    result = cifar_run.result()
    assert result["baseline"]["params"] == 272_474 and result["pruned"]["params"] == pytest.approx(
        0.25 * 272_474, abs=0.01 * 272_474
    )
    assert all(math.isfinite(result[s]["loss"]) for s in ("baseline", "pruned", "finetuned"))
    if SHIPPED.exists():
        assert result["baseline"]["accuracy"] == pytest.approx(
            read_json(SHIPPED / "result.json")["accuracy"], abs=1e-3
        )
        assert (
            result["pruned"]["accuracy"] > 0.2
        )  # right after surgery; 8 steps of fine-tuning recover nothing


@pytest.mark.skipif(not SHIPPED.exists(), reason="no network is shipped yet")
def test_shipped_network_is_as_good_as_it_says(cifar_dir):
    said = read_json(SHIPPED / "result.json")
    assert said["accuracy"] >= 0.90 and (said["model"], said["dataset"]) == ("resnet20", "cifar10")
    assert (SHIPPED / "model.safetensors").stat().st_size < 1.5e6
    data = load_data("cifar10", cifar_dir)
    first = Loader(data.test.images[:2000], data.test.targets[:2000], data.info, 200)
    assert evaluate(load_weights(create_model("resnet20", 10), SHIPPED), first)["accuracy"] >= 0.88
