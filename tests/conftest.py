"""Run papermill in processes of its own; train a baseline once in each of two workers; find CIFAR.

Python must write bytecode: else every process compiles all that it imports again, which is more
than half of its work.
"""

import itertools
import json
import os
import re
import subprocess
import sys

sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest
import torch
from browser import NO_BROWSER
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from prune_nb.core import UserError
from prune_nb.costs.runtimes import Timing
from prune_nb.data import read_images
from prune_nb.experiment import pruning

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | dict(OMP_NUM_THREADS="1")
torch.set_num_threads(1)  # as in the processes: sums in the same order


def pytest_addoption(parser):
    parser.addoption(
        "--zoo",
        metavar="TABLE.csv",
        help="run surgery on every network of tests/zoo.py, not only the quick ones, and write the "
        "rows of those that ran into this table",
    )
    parser.addoption(
        "--fuzz", type=int, default=300, metavar="N", help="draw N networks in tests/test_fuzz.py"
    )


def pytest_terminal_summary(terminalreporter):
    """Say loudly where the dashboards were not tested for want of a browser."""
    skipped = terminalreporter.stats.get("skipped", [])
    if any("NO BROWSER" in str(report.longrepr) for report in skipped):
        terminalreporter.write_line(NO_BROWSER, red=True, bold=True)


class Executed(NamedTuple):
    """Hold what one call of papermill came to."""

    returncode: int
    stderr: str
    path: Path  # the executed notebook

    @property
    def outputs(self) -> list:
        cells = nbformat.read(self.path, 4).cells
        return list(itertools.chain.from_iterable(c.get("outputs", []) for c in cells))

    @property
    def runs(self) -> Path:
        return self.path.parent / "runs"

    def run(self, prefix) -> Path:
        """Return the one run folder whose name begins with `prefix`."""
        (folder,) = self.runs.glob(f"{prefix}-*")
        return folder

    def result(self, prefix="eigendamage") -> dict:
        return read_json(self.run(prefix) / "result.json")


def read_json(path):
    return json.loads(Path(path).read_text())


def command(folder, notebook="prune", **parameters) -> list:
    """Return papermill's command line.

    The notebook is written into `folder`, runs into `folder/runs` unless said otherwise. Writing a
    file for another runtime and looking for its widths takes seconds each time, so networks are
    pruned to any width and timed as they are unless said otherwise; `None` leaves a parameter out.
    """
    line = [sys.executable, "-m", "papermill", f"nbs/{notebook}.ipynb", str(folder / "out.ipynb")]
    line.append("--no-progress-bar")
    usual = dict(runtime="eager", round_to=1) if notebook in ("prune", "sweep") else {}
    parameters = dict(runs_dir=folder / "runs") | usual | parameters
    for name, value in parameters.items():
        if value is not None:
            line += ["-p", name, str(value)]
    return line


def execute(folder, notebook="prune", environment=None, **parameters) -> Executed:
    """Run a notebook by papermill in a process of its own."""
    done = subprocess.run(
        command(folder, notebook, **parameters),
        cwd=ROOT,
        env=ENVIRONMENT | (environment or {}),
        capture_output=True,
        text=True,
    )
    plain = re.sub(r"\x1b\[[\d;]*m", "", done.stderr)
    return Executed(done.returncode, plain, folder / "out.ipynb")


def guard(notebook="prune", **parameters):
    """Run the first cells of a notebook here, with parameters as papermill injects them."""
    nb = parameterize_notebook(load_notebook_node(str(ROOT / f"nbs/{notebook}.ipynb")), parameters)
    cells = [c.source for c in nb.cells if c.cell_type == "code"][:3]
    namespace = {"In": ["", *cells]}
    for cell in cells:
        exec(cell, namespace)
    return namespace["params"]


@pytest.fixture
def no_timing(monkeypatch):
    """Report a millisecond for every network of an experiment."""
    reference = Timing("eager", "cpu", 1, 1.0, 1.0, 0)

    def millisecond(model, inputs, runtime, dense):
        return Timing("eager", "cpu", 1, 1.0, 1.0, 0, reference)

    monkeypatch.setattr(pruning, "latency", millisecond)


@pytest.fixture(scope="session")
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def cifar_dir() -> Path:
    """Return the project's data folder with CIFAR-10 in it."""
    try:
        read_images("cifar10", ROOT / "data")
    except UserError as e:
        pytest.skip(str(e))
    return ROOT / "data"


@pytest.fixture(scope="session")
def default_run(tmp_path_factory) -> Executed:
    """Run the default command, but for the folder of the runs."""
    folder = tmp_path_factory.mktemp("default_run")
    return execute(folder, method="eigendamage", runtime=None, round_to=None)


@pytest.fixture(scope="session")
def cifar_run(cifar_dir, tmp_path_factory) -> Executed:
    small = dict(dataset="cifar10", model="resnet20", epochs=1, train_size=1024, samples=256)
    shipped = ROOT / "runs/published/resnet20-cifar10"
    return execute(tmp_path_factory.mktemp("cifar_run"), checkpoint=shipped, **small)


@pytest.fixture(scope="session")
def baseline(tmp_path_factory) -> Path:
    """Return the run folder of a LeNet, trained on digits by nbs/pretrain.ipynb."""
    done = execute(tmp_path_factory.mktemp("baseline"), "pretrain", model="lenet", epochs=4)
    assert done.returncode == 0, done.stderr
    return done.run("pretrain")
