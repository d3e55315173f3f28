"""Every preset is accepted, and one of each kind runs on a few fake images, as papermill runs it."""

import functools
import itertools

import numpy as np
import pytest
import torch
from conftest import guard
from PIL import Image

from prune_nb.core import UserError
from prune_nb.costs.runtimes import latency
from prune_nb.criteria.core import find_method
from prune_nb.data import dataset_info
from prune_nb.experiment import pruning
from prune_nb.experiment.params import PruneParams
from prune_nb.experiment.presets import PRESETS, from_preset
from prune_nb.models import create_model

UNIQUE = {n: p for n, p in PRESETS.items() if n == p.name}  # without aliases


def test_every_preset_is_accepted(monkeypatch):
    cached = functools.cache(create_model)  # of the same name, for its shapes
    monkeypatch.setattr("prune_nb.experiment.params.create_model", cached)
    for name, preset in UNIQUE.items():
        params = from_preset(PruneParams, name, dict(preset=name))
        for key, value in preset.parameters.items():
            assert getattr(params, key) == value, (name, key)


def test_through_the_notebook():
    name = "eigendamage-vgg19-cifar100-90"
    params = guard(preset=name)
    for key, value in UNIQUE[name].parameters.items():
        assert getattr(params, key) == value
    assert params.preset == name
    assert guard(preset=name, ratio=0.6, epochs=3).ratio == 0.6
    with pytest.raises(UserError, match="Did you mean"):
        guard(preset="eigendamage-vgg19-cifar1000")


# One preset of each kind is run, the one that removes least, as networks are small here: narrower
# VGGs and DenseNets, fewer blocks of the same kind for the ResNets of CIFAR. On ImageNet's networks,
# methods that need the same statistics are alike; each of them runs on another network, those of
# second order there alone.
ALIKE = dict(resnet32="resnet20", resnet110="resnet56", resnet34="resnet18", resnet101="resnet50")
SMALLER = dict(
    vgg16="vgg16x0.125",
    vgg19="vgg19x0.125",
    resnet32x4="resnet8",
    resnet20="resnet8x0.5",
    resnet56="resnet20x0.5",
    resnet110="resnet20x0.5",
    densenet40="densenet40x0.5",
)
SIDES = dict(imagenet=32)  # pixels
SECOND = ("gate_obd", "taylor_second_order")  # a pass for every unit
DEEPEST = "taylor-gate-resnet101-gates-75"


def kind(p) -> tuple:
    """Return what presets differ in."""
    method = find_method(p["method"]).needs if p["dataset"] == "imagenet" else p["method"]
    return (
        dataset_info(p["dataset"]).image_size,
        ALIKE.get(p["model"], p["model"]),
        method,
        "round_ratios" in p,
        *(p.get(key) for key in ("schedule", "of", "how", "regrow", "lr_decay")),
    )


def small(p) -> dict:
    """Return what makes a preset quick: a small network, sixteen images, two steps."""
    info = dataset_info(p["dataset"])
    side = SIDES.get(info.name, info.image_size)
    quick = dict(
        dataset=f"fake-{info.channels}x{side}x{side}-{info.classes}",
        model=SMALLER.get(p["model"], p["model"]),
        train_size=16,
        batch_size=8,
        samples=8,
        pretrain_epochs=0,
        epochs=1,
        device="cpu",
    )
    if p["schedule"] == "iterative":
        quick |= dict(rounds=2, epochs=3 if p.get("regrow") else 2)
    if p.get("round_ratios"):
        quick |= dict(rounds=None, round_ratios=" ".join(p["round_ratios"].split()[:2]))
    if p["schedule"] == "gradual":
        epochs = 1 if p["dataset"] == "imagenet" else 2
        quick |= dict(prune_every=1, prune_units=None, prune_epochs=1, epochs=epochs)
    return quick


def quickest_first(preset) -> tuple:
    p = preset.parameters
    return p["model"] in ALIKE, p["method"] in SECOND, p.get("ratio", 0), preset.name


KINDS = {}
for preset in sorted(UNIQUE.values(), key=quickest_first):
    KINDS.setdefault(kind(preset.parameters), preset)
KINDS[DEEPEST] = PRESETS[DEEPEST]


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("presets")


@pytest.mark.parametrize(
    "preset", sorted(KINDS.values(), key=lambda p: p.parameters["model"]), ids=lambda p: p.name
)
def test_runs_a_few_steps(preset, runs_dir, monkeypatch):
    def one_reading(model, inputs, runtime, reference):
        return latency(model, inputs[:1], runtime, reference, 0, 1)

    monkeypatch.setattr(pruning, "latency", one_reading)
    quick = small(preset.parameters) | dict(preset=preset.name, runs_dir=str(runs_dir))
    experiment = pruning.Experiment(from_preset(PruneParams, preset.name, quick))
    experiment.baseline()
    experiment.prune()
    experiment.finetune()
    result = experiment.finish()
    assert result["pruned"]["params"] < result["baseline"]["params"]
    assert result["finetuned"]["params"] == result["pruned"]["params"]
    assert result["method"] == preset.parameters["method"]


# ImageNet as a person has it: a folder of pictures, and weights as torchvision gives them


def write_picture(path, seed, height):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Return a folder of three classes, with pictures of several sizes."""
    root = tmp_path_factory.mktemp("data")
    classes = ("n01440764", "n01443537", "n01484850")
    for n, (part, name) in enumerate(itertools.product(("train", "val"), classes)):
        folder = root / "imagenet" / part / name
        folder.mkdir(parents=True)
        for i in range(6 if part == "train" else 2):
            write_picture(folder / f"{i}.JPEG", 10 * n + i, 70 + 5 * i)
    return root


def old_weights(path, classes) -> dict:
    """Write a state dict as torchvision once did, without counts of batches; return all of it."""
    state = create_model("resnet18", classes, image_size=224, seed=0).state_dict()
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, path)
    return state


def test_imagenet_folder_and_weights_from_a_file(imagenet, runs_dir, tmp_path):
    state = old_weights(tmp_path / "resnet18.pth", 3)
    explicit = dict(
        preset="sfp-tuned-resnet18-imagenet-30",
        checkpoint=str(tmp_path / "resnet18.pth"),
        data_dir=str(imagenet),
        runs_dir=str(runs_dir),
        epochs=1,
        train_size=4,
        batch_size=4,
        samples=4,
        device="cpu",
    )
    experiment = pruning.Experiment(from_preset(PruneParams, explicit["preset"], explicit))
    for name, value in experiment.baseline().state_dict().items():
        assert torch.equal(value, state[name])
    experiment.prune()
    assert experiment.stages["pruned"]["params"] < experiment.stages["baseline"]["params"]
    assert experiment.data.example.shape == (1, 3, 224, 224)


def test_weights_for_other_classes_are_refused(imagenet, tmp_path):
    old_weights(tmp_path / "resnet18.pth", 1000)
    explicit = dict(
        checkpoint=str(tmp_path / "resnet18.pth"),
        data_dir=str(imagenet),
        runs_dir=str(tmp_path / "runs"),
        device="cpu",
    )
    params = from_preset(PruneParams, "sfp-tuned-resnet18-imagenet-30", explicit)
    sentence = "is of the same network with 1000 classes, these data have 3"
    with pytest.raises(UserError, match=sentence):
        pruning.Experiment(params)
    assert not (tmp_path / "runs").exists()
