"Every preset is one that the parameters accept, and one of each kind goes the whole way on a few fake images, through the code that papermill runs."

import functools

import numpy as np
import pytest
import torch
from conftest import guard
from PIL import Image

from prune_nb.core import UserError
from prune_nb.criteria.core import find_method
from prune_nb.data import dataset_info
from prune_nb.experiment import pruning
from prune_nb.experiment.params import PruneParams
from prune_nb.experiment.presets import PRESETS, from_preset
from prune_nb.models import create_model
from prune_nb.profile import latencies_ms

UNIQUE = {n: p for n, p in PRESETS.items() if n == p.name}  # without names of old


def test_every_preset_is_accepted(monkeypatch):
    monkeypatch.setattr(
        "prune_nb.experiment.params.create_model", functools.cache(create_model)
    )  # of the same name, for its shapes
    for name, preset in UNIQUE.items():
        params = from_preset(PruneParams, name, dict(preset=name))
        for k, v in preset.parameters.items():
            assert getattr(params, k) == v, (name, k)


def test_through_the_notebook():
    name = "eigendamage-vgg19-cifar100-90"
    params = guard(preset=name)
    assert {k: getattr(params, k) for k in UNIQUE[name].parameters} == UNIQUE[
        name
    ].parameters and params.preset == name
    assert guard(preset=name, ratio=0.6, epochs=3).ratio == 0.6
    with pytest.raises(UserError, match="Did you mean"):
        guard(preset="eigendamage-vgg19-cifar1000")


# What presets differ in. One of each kind is run, the one that removes least, since networks are small here: narrower VGGs and DenseNets, fewer blocks of the same kind for the ResNets of CIFAR. On ImageNet's networks, methods
# that need the same statistics are alike; each of them runs on another network, those of second order there alone.
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


def kind(p):
    method = find_method(p["method"]).needs if p["dataset"] == "imagenet" else p["method"]
    return (
        dataset_info(p["dataset"]).image_size,
        ALIKE.get(p["model"], p["model"]),
        method,
        "round_ratios" in p,
        *(p.get(k) for k in ("schedule", "of", "how", "regrow", "lr_decay")),
    )


def small(p) -> dict:
    "What makes a preset quick: a small network, sixteen images of its shape and classes, two steps."
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
        quick |= dict(
            prune_every=1,
            prune_units=None,
            prune_epochs=1,
            epochs=1 if p["dataset"] == "imagenet" else 2,
        )
    return quick


KINDS = {}
for preset in sorted(
    UNIQUE.values(),
    key=lambda p: (
        p.parameters["model"] in ALIKE,
        p.parameters["method"] in SECOND,
        p.parameters.get("ratio", 0),
        p.name,
    ),
):
    KINDS.setdefault(kind(preset.parameters), preset)
KINDS[DEEPEST] = PRESETS[DEEPEST]


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("presets")


@pytest.mark.parametrize(
    "preset", sorted(KINDS.values(), key=lambda p: p.parameters["model"]), ids=lambda p: p.name
)
def test_runs_a_few_steps(preset, runs_dir, monkeypatch):
    monkeypatch.setattr(
        pruning, "latencies_ms", lambda models, inputs: latencies_ms(models, inputs[:1], 0, 1)
    )
    params = from_preset(
        PruneParams,
        preset.name,
        small(preset.parameters) | dict(preset=preset.name, runs_dir=str(runs_dir)),
    )
    experiment = pruning.Experiment(params)
    experiment.baseline()
    experiment.prune()
    experiment.finetune()
    result = experiment.finish()
    assert (
        result["pruned"]["params"] < result["baseline"]["params"]
        and result["finetuned"]["params"] == result["pruned"]["params"]
    )
    assert result["method"] == preset.parameters["method"]


# ImageNet as a person has it: a folder of pictures, and weights as torchvision gives them


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    "A folder of three classes, pictures of several sizes."
    root = tmp_path_factory.mktemp("data")
    for n, (part, cls) in enumerate(
        (part, cls) for part in ("train", "val") for cls in ("n01440764", "n01443537", "n01484850")
    ):
        (root / "imagenet" / part / cls).mkdir(parents=True)
        for i in range(6 if part == "train" else 2):
            Image.fromarray(
                np.random.default_rng(10 * n + i).integers(
                    0, 256, (70 + 5 * i, 90, 3), dtype=np.uint8
                )
            ).save(root / "imagenet" / part / cls / f"{i}.JPEG")
    return root


def weights_of_old(path, classes):
    "A state dict as torchvision wrote them once, without counts of batches."
    state = create_model("resnet18", classes, image_size=224, seed=0).state_dict()
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, path)
    return state


def test_imagenet_folder_and_weights_from_a_file(imagenet, runs_dir, tmp_path):
    state = weights_of_old(tmp_path / "resnet18.pth", 3)
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
    for k, v in experiment.baseline().state_dict().items():
        assert torch.equal(v, state[k])
    experiment.prune()
    assert experiment.stages["pruned"]["params"] < experiment.stages["baseline"][
        "params"
    ] and experiment.data.example.shape == (1, 3, 224, 224)


def test_weights_for_other_classes_are_refused(imagenet, tmp_path):
    weights_of_old(tmp_path / "resnet18.pth", 1000)
    explicit = dict(
        checkpoint=str(tmp_path / "resnet18.pth"),
        data_dir=str(imagenet),
        runs_dir=str(tmp_path / "runs"),
        device="cpu",
    )
    with pytest.raises(
        UserError, match="is of the same network with 1000 classes, these data have 3"
    ):
        pruning.Experiment(from_preset(PruneParams, "sfp-tuned-resnet18-imagenet-30", explicit))
    assert not (tmp_path / "runs").exists()
