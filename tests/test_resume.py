"""Killed at any moment, a rerun with `resume` ends at the same numbers; a run in use is kept."""

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
    found = []
    for run in folder.glob("runs/*"):
        rows = [r for r in read_metrics(run) if r["phase"] == phase]
        found += [r["epoch"] for r in rows if "epoch" in r]
    return found


def kill_papermill(folder, phase, **parameters):
    """Start papermill, and kill it and its kernel when the second epoch of `phase` is logged.

    The kernel has a process group of its own.
    """
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
    """Return a run that this process holds, and papermill started on the same one."""
    folder = tmp_path_factory.mktemp("in_use")
    parameters = dict(
        model="lenet",
        checkpoint=str(baseline),
        epochs=1,
        samples=128,
        round_to="1",
        runtime="eager",
        runs_dir=str(folder / "runs"),
    )
    params = PruneParams(**parameters).validated()
    run = open_run(params.runs_folder(), params.id, params.identity())
    return run, pool.submit(execute, folder, **parameters, resume=True), modified(run.folder)


@pytest.fixture(scope="module")
def resumed(pool, in_use, tmp_path_factory) -> tuple:
    """Return two executions of the same parameters, one whole and one killed twice.

    It is killed in pretraining, resumed and killed in fine-tuning, and resumed again.
    """
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    future = pool.submit(execute, whole, **QUICK)
    kill_papermill(broken, "pretrain", **QUICK)
    kill_papermill(broken, "finetune", **QUICK, resume=True)
    assert not [*broken.glob("runs/eigendamage-*/result.json")]
    again, whole = execute(broken, **QUICK, resume=True), future.result()
    assert whole.returncode == 0, whole.stderr
    assert again.returncode == 0, again.stderr
    return whole, again


@pytest.mark.parametrize("prefix, phase", [("pretrain", "pretrain"), ("eigendamage", "finetune")])
def test_killed_and_resumed_ends_at_the_same_numbers(resumed, prefix, phase):
    whole, again = resumed
    assert numbers(again.result(prefix)) == numbers(whole.result(prefix))
    names = ["model.safetensors"]
    if prefix == "eigendamage":
        names += ["plan.json", "scores.safetensors"]
    for name in names:
        one, two = (e.run(prefix) / name for e in resumed)
        assert one.read_bytes() == two.read_bytes()
    expected, found = (epoch_rows(e.run(prefix), phase) for e in resumed)
    assert found == expected
    assert [r["epoch"] for r in found] == [*range(1, EPOCHS + 1)]


def epoch_rows(folder, phase) -> list:
    return [r for r in read_metrics(folder) if r["phase"] == phase and "epoch" in r]


@pytest.mark.parametrize("prefix", ["pretrain", "eigendamage"])
def test_resumed_run_holds_the_same_files(resumed, prefix):
    files = [{f.name for f in e.run(prefix).iterdir()} for e in resumed]
    assert files[0] == files[1]


def test_run_in_use_is_refused(in_use):
    run, future, before = in_use
    done = future.result()
    assert done.returncode == 1
    assert f"Run {run.id!r} is being written by another process." in done.stderr
    assert modified(run.folder) == before
    run.close()


def test_other_parameters_are_refused(baseline, tmp_path):
    same = dict(model="lenet", checkpoint=str(baseline), runs_dir=str(tmp_path), run_name="mine")

    def params(**changed):
        return PruneParams(**same | changed).validated()

    open_run(tmp_path, "mine", params().identity()).close()
    with pytest.raises(UserError, match="ratio was 0.85, is 0.5"):
        Experiment(params(ratio=0.5, resume=True)).baseline()
    with pytest.raises(UserError, match="Choose another run_name, or go on with it by resume=True"):
        Experiment(params()).baseline()


class Killed(BaseException):
    """Stand for SIGKILL within a process."""


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
    """Stop before the first, the second, ... file is put in its place, and resume.

    A process that is killed leaves its temporary file behind.
    """
    rename, left = os.replace, 0

    def replace(temporary, path):
        nonlocal left
        left -= 1
        if left >= 0:
            return rename(temporary, path)
        leftover = str(temporary).replace(f".{os.getpid()}.", ".1.")
        if leftover != str(temporary):
            shutil.copy(temporary, leftover)
        raise Killed

    same = dict(model="lenet", checkpoint=str(baseline), epochs=2, samples=128)
    same |= dict(
        runtime="eager", round_to="1"
    )  # "auto" measures this machine, anew in every folder

    def params(name, resume):
        folder = str(tmp_path / str(name))
        return PruneParams(**same, runs_dir=folder, resume=resume).validated()

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
