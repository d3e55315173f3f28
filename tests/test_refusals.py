"""Bad input: one sentence with the valid choices, exit status 1, nothing written besides."""

import pytest
import torch
from conftest import execute, guard

from prune_nb.core import UserError
from prune_nb.experiment.params import PruneParams
from prune_nb.experiment.pruning import Experiment
from prune_nb.models import create_model

PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
OFFLINE = dict.fromkeys(PROXIES, "http://127.0.0.1:9") | dict(no_proxy="", NO_PROXY="")

# name -> (parameters, part of the sentence). FILE is a regular file, PICKLE a whole model written by
# torch.save, BASELINE a run folder of a LeNet, NOWHERE a folder that does not exist.
REFUSED = {
    "unknown parameter": (
        dict(ratoi=0.5),
        "Invalid parameter 'ratoi'. Did you mean 'ratio'? Valid: ratio, ",
    ),
    "method": (
        dict(method="eigendamag"),
        "Invalid method 'eigendamag'. Did you mean 'eigendamage'? Valid: eigendamage",
    ),
    "model": (
        dict(model="resnet21"),
        "Invalid model 'resnet21'. Did you mean 'resnet32'? "
        "Valid: vgg16, vgg19, resnet8, resnet20, ",
    ),
    "data set": (
        dict(dataset="cifar"),
        "Invalid dataset 'cifar'. Did you mean 'cifar10'? "
        "Valid: digits, cifar10, cifar100, tiny_imagenet, imagenet, fake.",
    ),
    "ratio": (dict(ratio=1), "Invalid ratio 1.0. Valid: a number in [0, 1)"),
    "checkpoint of another architecture": (dict(checkpoint="BASELINE"), "is of another network ("),
    "pickled checkpoint": (
        dict(checkpoint="PICKLE"),
        "holds more than weights, a whole model perhaps, and is not loaded",
    ),
    "runs_dir below a file": (
        dict(model="lenet", checkpoint="BASELINE", runs_dir="FILE/runs"),
        "Give runs_dir=, a folder that you may write to.",
    ),
    "runs_dir in /proc": (
        dict(model="lenet", pretrain_epochs=1, runs_dir="/proc/runs"),
        "Cannot write to runs_dir '/proc/runs'",
    ),
    "loss that is not a number": (
        dict(model="lenet", checkpoint="BASELINE", lr=1e9, epochs=2, samples=128),
        "Lower the learning rate.",
    ),
    "data set that is nowhere": (dict(dataset="cifar10", data_dir="NOWHERE"), "cifar10 is not in "),
    "pretrain: loss that is not a number": (
        dict(notebook="pretrain", model="lenet", lr=1e9, epochs=1),
        "Lower the learning rate.",
    ),
}


def with_paths(parameters, paths) -> dict:
    """Return parameters with paths in the place of their names."""
    found = {}
    for key, value in parameters.items():
        for name, path in paths.items():
            if isinstance(value, str):
                value = value.replace(name, path)
        found[key] = value
    return found


@pytest.fixture(scope="module")
def refusals(baseline, pool, tmp_path_factory):
    """Run all of `REFUSED` through papermill, two at a time."""
    given = tmp_path_factory.mktemp("given")
    torch.save(create_model("resnet20", 10, 1, 8), given / "model.pt")
    paths = dict(
        BASELINE=str(baseline),
        PICKLE=str(given / "model.pt"),
        FILE=str(baseline / "params.json"),
        NOWHERE=str(given / "none"),
    )
    found = dict(given=given)
    for name, (parameters, _) in REFUSED.items():
        folder = tmp_path_factory.mktemp("refused")
        found[name] = pool.submit(
            execute, folder, environment=OFFLINE, **with_paths(parameters, paths)
        )
    return found


@pytest.mark.parametrize("name", REFUSED)
def test_refused_through_papermill(refusals, name):
    done, sentence = refusals[name].result(), REFUSED[name][1]
    assert done.returncode == 1
    assert sentence in done.stderr
    errors = [o for o in done.outputs if o.output_type == "error"]
    assert [(e.ename, len(e.traceback)) for e in errors] == [("UserError", 1)]
    assert "\n" not in errors[0].evalue
    assert [p for p in done.path.parent.rglob("*") if p.is_file()] == [done.path]
    assert not [*done.runs.glob("*")]
    assert [p.name for p in refusals["given"].iterdir()] == ["model.pt"]


@pytest.mark.parametrize(
    "parameters, sentence",
    [
        (dict(of="flops"), "Invalid of 'flops'. Valid: units, params, macs, latency."),
        (
            dict(schedule="gradually"),
            "Invalid schedule 'gradually'. Did you mean 'gradual'? Valid: one_shot, iterative, ",
        ),
        (dict(rounds=3), "rounds is for the schedule iterative; this one is 'one_shot'."),
        (
            dict(preset="eigendamage-vgg16-cifar10"),
            "Did you mean 'eigendamage-vgg19-cifar10'? Valid: ",
        ),
        (dict(fisher="true"), "Invalid fisher 'true'. Valid: mc, exact, empirical."),
        (dict(lr_schedule="steps"), "Did you mean 'step'? Valid: step, one_cycle, cosine."),
        (dict(device="tpu"), "Invalid device 'tpu'. Did you mean 'cpu'? Valid: auto, cpu"),
        (dict(ratio=-0.1), "Invalid ratio -0.1. Valid: a number in [0, 1)"),
        (dict(ratio="half"), "Invalid ratio 'half'. Valid: a number."),
        (dict(ratio=float("nan")), "Invalid ratio nan."),
        (dict(ratio=True), "Invalid ratio True. Valid: a number."),
        (dict(epochs=-1), "Invalid epochs -1. Valid: 0 or more."),
        (dict(epochs=1.5), "Invalid epochs 1.5. Valid: a whole number."),
        (dict(samples=0), "Invalid samples 0."),
        (dict(train_size=0), "Invalid train_size 0."),
        (dict(batch_size=0), "Invalid batch_size 0."),
        (dict(lr=0), "Invalid lr 0.0. Valid: a number above 0."),
        (dict(lr=float("inf")), "Invalid lr inf."),
        (dict(seed=-1), "Invalid seed -1. Valid: 0 or more."),
        (dict(resume="yes"), "Invalid resume 'yes'. Valid: True or False."),
        (dict(model="vgg19"), "vgg19"),
        (dict(round_to=0), "Invalid round_to '0'. Valid: a whole number from 1, or auto."),
        (dict(round_to="even"), "Invalid round_to 'even'. Valid: a whole number from 1, or auto."),
        (dict(runtime="onnxrun"), "Invalid runtime 'onnxrun'. Did you mean 'onnxruntime'?"),
        (dict(deploy="eager"), "Invalid deploy 'eager'."),
        (dict(int8=True), "int8 is for deploy 'onnxruntime'; this one is ''. Leave it out."),
        (dict(deploy="export", int8=True), "int8 is for deploy 'onnxruntime'"),
        (
            dict(method="l1", schedule="soft", refit=True),
            "Leave refit out, or take one_shot or iterative.",
        ),
        (dict(model=["resnet20"]), "Invalid model ['resnet20']. Valid: text."),
        (dict(run_name="../elsewhere"), "Invalid run_name '../elsewhere'."),
        (dict(run_name=".."), "Invalid run_name '..'."),
        (
            dict(notebook="pretrain", ratio=0.5),
            "Invalid parameter 'ratio'. Valid: data_dir, train_size, ",
        ),
    ],
    ids=str,
)
def test_refused_by_the_guard(parameters, sentence):
    with pytest.raises(UserError) as refusal:
        guard(**parameters)
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_guard_lets_good_input_through():
    assert guard() == PruneParams().validated()
    assert guard(ratio=0, seed=3).ratio == 0.0
    assert guard(checkpoint="", epochs=None).epochs == 30
    p = guard(preset="eigendamage-vgg19-cifar10", ratio=0.75)
    assert (p.model, p.dataset, p.ratio, p.of) == ("vgg19", "cifar10", 0.75, "units")
    assert guard("pretrain", dataset="cifar10", epochs=1).epochs == 1


@pytest.mark.parametrize(
    "parameters, sentence",
    [
        (dict(ratio=0.999), "Cannot remove 99.9% of the params: 0 to 8"),
        (dict(train_size=5000), "Valid: 1 to 1257 for digits"),
        (dict(checkpoint="nowhere.safetensors"), "No file 'nowhere.safetensors'"),
    ],
    ids=str,
)
def test_refused_later_leaves_no_run(baseline, tmp_path, parameters, sentence):
    quick = dict(model="lenet", checkpoint=str(baseline), samples=128)
    quick |= dict(runs_dir=str(tmp_path / "runs"), round_to="1")
    params = PruneParams(**quick | parameters).validated()
    with pytest.raises(UserError, match=sentence):
        experiment = Experiment(params)
        experiment.baseline()
        experiment.prune()
    assert not [*tmp_path.glob("runs/*")]


def test_refusal_removes_nothing_that_was_there(baseline, tmp_path):
    """Point run_name and resume at a folder that is not a run."""
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/notes.txt").write_text("not to be lost")
    params = PruneParams(
        model="lenet",
        checkpoint=str(baseline),
        samples=128,
        lr=1e9,
        epochs=1,
        runs_dir=str(tmp_path / "runs"),
        run_name="mine",
        resume=True,
    ).validated()
    with pytest.raises(UserError):
        experiment = Experiment(params)
        experiment.baseline()
        experiment.prune()
        experiment.finetune()
    assert (tmp_path / "runs/mine/notes.txt").read_text() == "not to be lost"
