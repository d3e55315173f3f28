"Every preset that the parameters know goes the whole way on a few fake images, with all that its family has in common with no other; what is not known is named."
import dataclasses, functools
import pytest
from conftest import guard
from prune_nb.core import UserError
from prune_nb.criteria.core import METHODS, find_method
from prune_nb.data import dataset_info
from prune_nb.experiment.params import PruneParams
from prune_nb.experiment.presets import PRESETS, from_preset
from prune_nb.experiment import pruning
from prune_nb.models import create_model
from prune_nb.profile import latencies_ms

KEYS = {f.name for f in dataclasses.fields(PruneParams)}
AWAITED = {"how", "threshold",   # keys and methods that presets use and that are not there yet
           "c_obd", "c_obs", "kron_obd", "kron_obs", "eigendamage_ekfac", "eigendamage_separable", "improved_eigendamage", "redundancy_graph", "taylor_output", "gate_obd", "taylor_second_order"}

def lacking(preset) -> set: return (preset.parameters.keys() - KEYS) | ({preset.parameters["method"]} - set(METHODS))

UNIQUE = {n: p for n, p in PRESETS.items() if n == p.name}
KNOWN = {n: p for n, p in UNIQUE.items() if not lacking(p)}


def test_nothing_is_lacking_but_what_is_awaited():
    unknown = {n: bad for n, p in UNIQUE.items() if (bad := lacking(p) - AWAITED)}
    assert not unknown, f"dead or unknown: {unknown}"


def test_what_is_lacking_is_named():
    for name in UNIQUE.keys() - KNOWN.keys():
        with pytest.raises(UserError) as e: from_preset(PruneParams, name, {})
        assert name in str(e.value) and any(repr(word) in str(e.value) for word in lacking(UNIQUE[name])), e.value


def test_every_known_preset_is_accepted(monkeypatch):
    monkeypatch.setattr("prune_nb.experiment.params.create_model", functools.cache(create_model))   # of the same name, for its shapes
    for name, preset in KNOWN.items():
        params = from_preset(PruneParams, name, dict(preset=name))
        for k, v in preset.parameters.items(): assert getattr(params, k) == v, (name, k)


def test_through_the_notebook():
    name = "eigendamage-vgg19-cifar100-90"
    params = guard(preset=name)
    assert {k: getattr(params, k) for k in UNIQUE[name].parameters} == UNIQUE[name].parameters and params.preset == name
    assert guard(preset=name, ratio=.6, epochs=3).ratio == .6
    with pytest.raises(UserError, match="Did you mean"): guard(preset="eigendamage-vgg19-cifar1000")


# What presets differ in. One of each kind is run, the one that removes least, since networks are small here: narrower VGGs and DenseNets, another depth where the ResNet is of the same blocks. On ImageNet's networks, methods
# that need the same statistics are alike; each of them runs on another network.
ALIKE = dict(resnet32="resnet20", resnet110="resnet56", resnet34="resnet18", resnet101="resnet50")
SMALLER = dict(vgg16="vgg16x0.125", vgg19="vgg19x0.125", resnet32x4="resnet8", resnet110="resnet110x0.5", densenet40="densenet40x0.5")
SIDES = dict(imagenet=32)   # pixels
DEEPEST = "taylor-gate-resnet101-gates-75"

def kind(p):
    method = find_method(p["method"]).needs if p["dataset"] == "imagenet" else p["method"]
    return (dataset_info(p["dataset"]).image_size, ALIKE.get(p["model"], p["model"]), method, "round_ratios" in p, *(p.get(k) for k in ("schedule", "of", "how", "regrow", "lr_decay")))

def small(p) -> dict:
    "What makes a preset quick: a small network, sixteen images of its shape and classes, two steps."
    info = dataset_info(p["dataset"])
    side = SIDES.get(info.name, info.image_size)
    quick = dict(dataset=f"fake-{info.channels}x{side}x{side}-{info.classes}", model=SMALLER.get(p["model"], p["model"]), train_size=16, batch_size=8, samples=8, pretrain_epochs=0, epochs=1, device="cpu")
    if p["schedule"] == "iterative": quick |= dict(rounds=2, epochs=3 if p.get("regrow") else 2)
    if p.get("round_ratios"): quick |= dict(rounds=None, round_ratios=" ".join(p["round_ratios"].split()[:2]))
    if p["schedule"] == "gradual": quick |= dict(prune_every=1, prune_units=None, prune_epochs=1, epochs=1 if p["dataset"] == "imagenet" else 2)
    return quick

KINDS = {}
for preset in sorted(KNOWN.values(), key=lambda p: (p.parameters.get("ratio", 0), p.name)): KINDS.setdefault(kind(preset.parameters), preset)
KINDS[DEEPEST] = PRESETS[DEEPEST]


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory): return tmp_path_factory.mktemp("presets")

@pytest.mark.parametrize("preset", sorted(KINDS.values(), key=lambda p: p.parameters["model"]), ids=lambda p: p.name)
def test_runs_a_few_steps(preset, runs_dir, monkeypatch):
    monkeypatch.setattr(pruning, "latencies_ms", lambda models, inputs: latencies_ms(models, inputs[:1], 0, 1))
    params = from_preset(PruneParams, preset.name, small(preset.parameters) | dict(preset=preset.name, runs_dir=str(runs_dir)))
    experiment = pruning.Experiment(params)
    experiment.baseline(); experiment.prune(); experiment.finetune()
    result = experiment.finish()
    assert result["pruned"]["params"] < result["baseline"]["params"] and result["finetuned"]["params"] == result["pruned"]["params"]
    assert result["method"] == preset.parameters["method"]
