"Killed at any moment, a rerun with `resume` ends at the same numbers; a run in use by another process is left alone."

import os
import shutil
import subprocess
import time

import psutil
import pytest
from conftest import ENVIRONMENT, ROOT, command, execute
from test_prune import numbers

from prune_nb.core import UserError
from prune_nb.experiment.params import PruneParams
from prune_nb.experiment.pruning import Experiment
from prune_nb.runs import open_run, read_metrics

EPOCHS = 16
QUICK = dict(model="lenet", pretrain_epochs=EPOCHS, epochs=EPOCHS, samples=256)


def epochs(folder, phase) -> list:
    return [
        r["epoch"]
        for f in folder.glob("runs/*")
        for r in read_metrics(f)
        if r["phase"] == phase and "epoch" in r
    ]


def kill_papermill(folder, phase, **parameters):
    "Start papermill; when the second epoch of `phase` is logged, SIGKILL it and its kernel, which has a process group of its own."
    papermill = psutil.Popen(
        command(folder, **parameters),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while len(epochs(folder, phase)) < 2:
        assert papermill.poll() is None, "papermill ended before it could be killed"
        time.sleep(0.01)
    processes = [papermill, *papermill.children(recursive=True)]
    for p in processes:
        p.kill()
    psutil.wait_procs(processes)
    assert len(epochs(folder, phase)) < EPOCHS, "killed too late"


def modified(folder) -> dict:
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}


@pytest.fixture(scope="module")
def in_use(baseline, pool, tmp_path_factory) -> tuple:
    "A run that this process holds, and papermill started on the same one."
    folder = tmp_path_factory.mktemp("in_use")
    parameters = dict(
        model="lenet",
        checkpoint=str(baseline),
        epochs=1,
        samples=128,
        runs_dir=str(folder / "runs"),
    )
    params = PruneParams(**parameters).validated()
    run = open_run(params.runs_folder(), params.id, params.identity())
    return run, pool.submit(execute, folder, **parameters, resume=True), modified(run.folder)


@pytest.fixture(scope="module")
def resumed(pool, in_use, tmp_path_factory) -> tuple:
    "Two executions of the same parameters: one whole; one killed in pretraining, resumed and killed in fine-tuning, and resumed again."
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    future = pool.submit(execute, whole, **QUICK)
    kill_papermill(broken, "pretrain", **QUICK)
    kill_papermill(broken, "finetune", **QUICK, resume=True)
    assert not [*broken.glob("runs/eigendamage-*/result.json")]
    again, whole = execute(broken, **QUICK, resume=True), future.result()
    assert whole.returncode == again.returncode == 0, whole.stderr + again.stderr
    return whole, again


@pytest.mark.parametrize("prefix, phase", [("pretrain", "pretrain"), ("eigendamage", "finetune")])
def test_killed_and_resumed_ends_at_the_same_numbers(resumed, prefix, phase):
    whole, again = resumed
    assert numbers(again.result(prefix)) == numbers(whole.result(prefix))
    for name in ("model.safetensors", "plan.json", "scores.safetensors"):
        if prefix == "eigendamage" or name == "model.safetensors":
            assert (again.run(prefix) / name).read_bytes() == (
                whole.run(prefix) / name
            ).read_bytes()
    rows = [
        [r for r in read_metrics(e.run(prefix)) if r["phase"] == phase and "epoch" in r]
        for e in resumed
    ]
    assert rows[0] == rows[1] and [r["epoch"] for r in rows[1]] == [*range(1, EPOCHS + 1)]


@pytest.mark.parametrize("prefix", ["pretrain", "eigendamage"])
def test_resumed_run_holds_the_same_files(resumed, prefix):
    files = [{f.name for f in e.run(prefix).iterdir()} for e in resumed]
    assert files[0] == files[1]


def test_run_in_use_is_refused(in_use):
    run, future, before = in_use
    done = future.result()
    assert (
        done.returncode == 1
        and f"Run {run.id!r} is being written by another process." in done.stderr
    )
    assert modified(run.folder) == before
    run.close()


def test_other_parameters_are_refused(baseline, tmp_path):
    params = lambda **kw: PruneParams(
        **dict(model="lenet", checkpoint=str(baseline), runs_dir=str(tmp_path), run_name="mine")
        | kw
    ).validated()
    open_run(tmp_path, "mine", params().identity()).close()
    with pytest.raises(UserError, match="ratio was 0.75, is 0.5"):
        Experiment(params(ratio=0.5, resume=True)).baseline()
    with pytest.raises(UserError, match="Choose another run_name, or go on with it by resume=True"):
        Experiment(params()).baseline()


class Killed(BaseException):
    "What stands for SIGKILL within a process."


def all_steps(params) -> dict:
    experiment = Experiment(params)
    try:
        experiment.baseline()
        experiment.prune()
        experiment.finetune()
        return experiment.finish()
    finally:
        if hasattr(experiment, "run"):
            experiment.run.lock.release()  # as the system does for a process that is killed


def test_killed_at_any_write(baseline, tmp_path, monkeypatch):
    "Stopped before the first, the second, ... file is put in its place, until a run gets through; then resumed."
    rename, left = os.replace, 0

    def replace(temporary, path):
        nonlocal left
        left -= 1
        if left >= 0:
            return rename(temporary, path)
        shutil.copy(
            temporary, str(temporary).replace(f".{os.getpid()}.", ".1.")
        )  # a process that is killed does not clear away its temporary file
        raise Killed

    params = lambda n, resume: PruneParams(
        model="lenet",
        checkpoint=str(baseline),
        epochs=2,
        samples=128,
        runs_dir=str(tmp_path / str(n)),
        resume=resume,
    ).validated()
    whole = numbers(all_steps(params("whole", False)))
    monkeypatch.setattr(os, "replace", replace)
    for n in range(100):
        left = n
        try:
            all_steps(params(n, False))
            break
        except Killed:
            left = 10_000
        assert numbers(all_steps(params(n, True))) == whole, f"killed at write {n}"
    assert n >= 8  # parameters, scores, plan, two epochs of state, weights and plan, result
    assert not [*tmp_path.glob(f"[0-{n - 1}]/*/.*")]
