"""What the repository promises of itself: one source for every fact, a light package, notebooks that
say what they take.
"""

import ast
import configparser
import importlib
import re
import subprocess
import sys
import tomllib
from dataclasses import fields

import nbformat
import pytest
from conftest import ROOT
from parameters_cells import EXPERIMENTS

from prune_nb.experiment.params import PruneParams, default_source, parameters_cell

NOTEBOOKS = [
    p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts
]


def test_metadata_agrees():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    settings = parser["DEFAULT"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == settings["lib_name"]
    assert project["requires-python"] == f">={settings['min_python']}"
    assert importlib.import_module("prune_nb").__version__ == settings["version"]


def exported_module(path) -> str | None:
    """Return the module that a notebook exports to."""
    found = re.search(r"#\| default_exp ([\w.]+)", path.read_text())
    return found and found[1]


def test_every_module_has_its_notebook():
    exported = {exported_module(p) for p in NOTEBOOKS} - {None, "__init__"}
    files = [p.relative_to(ROOT / "prune_nb") for p in (ROOT / "prune_nb").rglob("*.py")]
    files = [p for p in files if p.name not in ("__init__.py", "_modidx.py")]
    assert {".".join(p.with_suffix("").parts) for p in files} == exported


def run_python(code: str) -> str:
    """Run code in a process of its own and return what it prints; fail where it fails."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_core_imports_without_the_notebook_tools():
    blocked = "nbdev fastcore execnb plotly papermill thop IPython ipykernel ipywidgets".split()
    blocked += ["onnx", "onnxscript", "onnxruntime"]
    run_python(
        f"import sys; sys.modules.update(dict.fromkeys({blocked})); "
        "import prune_nb.api, prune_nb.train, prune_nb.experiment.pruning"
    )


def test_compiler_is_not_loaded():
    """Hold torch._dynamo off, which takes one to four seconds.

    No guard, no count and no surgery needs it (an optimiser of torch.optim loads it).
    """
    run_python(
        """
import sys, torch
from prune_nb.api import prune
from prune_nb.experiment.params import PruneParams
from prune_nb.models import create_model
PruneParams(model="densenet40", dataset="cifar10").validated()
data = [(torch.randn(8, 1, 32, 32), torch.arange(8) % 10)]
prune(create_model("lenet", in_channels=1, seed=0), data, of="units")
assert "torch._dynamo" not in sys.modules
"""
    )


def test_style_bars_hold():
    """Run the counts of typography, language and notebooks that CONTRIBUTING describes."""
    done = subprocess.run(
        [sys.executable, "scripts/style_counts.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_parameters_cell_is_the_classes(name):
    cells = nbformat.read(ROOT / f"nbs/{name}.ipynb", 4).cells
    tagged = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert [c.source for c in tagged] == [parameters_cell(EXPERIMENTS[name])]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_papermill_lists_every_parameter_with_type_and_help(name):
    command = [sys.executable, "-m", "papermill", "--help-notebook", f"nbs/{name}.ipynb"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "Unknown type" not in done.stdout
    assert "Unable to parse" not in done.stdout + done.stderr
    for f in fields(EXPERIMENTS[name]):
        default = default_source(f.default)
        assert f"  {f.name}: {f.type.__name__} (default {default})" in done.stdout
        assert f.metadata["help"] in done.stdout


CONTRACT = """
method ratio of dataset model checkpoint schedule rounds pretrain_epochs epochs train_size lr
batch_size fisher samples seed device preset data_dir runs_dir run_name resume
"""


def test_contract_of_parameters():
    assert set(CONTRACT.split()) <= {f.name for f in fields(PruneParams)}


def notebook_id(path) -> str:
    """Return the path of a notebook from `nbs/`."""
    return path.relative_to(ROOT / "nbs").as_posix()


LARGEST_OUTPUT = 200_000  # characters: a PNG of 150 kB


@pytest.mark.parametrize("path", NOTEBOOKS, ids=notebook_id)
def test_notebooks_are_clean(path):
    """Refuse large outputs, execution counts, code that does not parse, cells that share an id."""
    nb = nbformat.read(path, 4)
    assert len({c.id for c in nb.cells}) == len(nb.cells)
    for c in nb.cells:
        assert not c.get("execution_count")
        assert all(len(str(o)) < LARGEST_OUTPUT for o in c.get("outputs", []))
        assert all(
            "application/vnd.plotly.v1+json" not in o.get("data", {}) for o in c.get("outputs", [])
        )
        if c.cell_type == "code" and not c.source.lstrip().startswith(("!", "%")):
            ast.parse(c.source)


SCOPES = (ast.FunctionDef, ast.ClassDef, ast.Lambda)
SCOPES += (ast.ListComp, ast.GeneratorExp, ast.DictComp, ast.SetComp)


def nodes(tree, everywhere: bool):
    """Yield the nodes of a tree, of its inner scopes only where asked."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if everywhere or not isinstance(child, SCOPES):
            yield from nodes(child, everywhere)


def names_in(sources, kind) -> set:
    """Return the names read (`ast.Load`) anywhere, or set (`ast.Store`) at the top level."""
    found = set()
    for source in sources:
        for node in nodes(ast.parse(source), kind is ast.Load):
            if isinstance(node, ast.Name) and isinstance(node.ctx, kind):
                found.add(node.id)
    return found


def imported_names(sources) -> set:
    """Return the names that imports at the top level set."""
    found = set()
    for source in sources:
        for node in ast.parse(source).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                found.update(a.asname or a.name for a in node.names)
    return found


REGISTERING = [p for p in NOTEBOOKS if "register" in p.read_text()]


@pytest.mark.parametrize("path", REGISTERING, ids=notebook_id)
def test_examples_leave_what_registered_code_uses(path):
    """Keep examples from setting a name that exported code imports and uses.

    Several notebooks are tested in one process, and what one registers is used by those after it.
    """
    sources = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    exported = [s for s in sources if s.startswith("#| export")]
    used = imported_names(exported) & names_in(exported, ast.Load)
    assert not used & names_in([s for s in sources if s not in exported], ast.Store)
