"What the repository promises of itself: one source for every fact, a light package, notebooks that say what they take."

import ast
import configparser
import importlib
import subprocess
import sys
import tomllib
from dataclasses import fields

import nbformat
import pytest
from conftest import ROOT
from parameters_cells import EXPERIMENTS

from prune_nb.experiment.params import PruneParams, parameters_cell

NOTEBOOKS = [
    p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts
]


def test_metadata_agrees():
    settings, project = (
        configparser.ConfigParser(delimiters=["="]),
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"],
    )
    settings.read(ROOT / "settings.ini")
    settings = settings["DEFAULT"]
    assert (
        project["name"] == settings["lib_name"]
        and project["requires-python"] == f">={settings['min_python']}"
    )
    assert importlib.import_module("prune_nb").__version__ == settings["version"]


def test_every_module_has_its_notebook():
    exported = {
        line.split()[-1]
        for p in NOTEBOOKS
        for c in nbformat.read(p, 4).cells
        for line in c.source.splitlines()
        if line.startswith("#| default_exp")
    }
    modules = {
        ".".join(p.relative_to(ROOT / "prune_nb").with_suffix("").parts)
        for p in (ROOT / "prune_nb").rglob("*.py")
        if p.name not in ("__init__.py", "_modidx.py")
    }
    assert modules == exported


def test_core_imports_without_the_notebook_tools():
    blocked = [
        "nbdev",
        "fastcore",
        "execnb",
        "plotly",
        "papermill",
        "thop",
        "IPython",
        "ipykernel",
        "ipywidgets",
        "onnx",
        "onnxscript",
        "onnxruntime",
    ]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import prune_nb.api, prune_nb.train, prune_nb.experiment.pruning"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compiler_is_not_loaded():
    "torch._dynamo takes one to four seconds: no guard, no count, no surgery needs it (an optimiser of torch.optim loads it)."
    code = """
import sys, torch
from prune_nb.api import prune
from prune_nb.experiment.params import PruneParams
from prune_nb.models import create_model
PruneParams(model="densenet40", dataset="cifar10").validated()
data = [(torch.randn(8, 1, 32, 32), torch.arange(8) % 10)]
prune(create_model("lenet", in_channels=1, seed=0), data, of="units")
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_parameters_cell_is_the_classes(name):
    tagged = [
        c
        for c in nbformat.read(ROOT / f"nbs/{name}.ipynb", 4).cells
        if "parameters" in c.metadata.get("tags", [])
    ]
    assert [c.source for c in tagged] == [parameters_cell(EXPERIMENTS[name])]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_papermill_lists_every_parameter_with_type_and_help(name):
    done = subprocess.run(
        [sys.executable, "-m", "papermill", "--help-notebook", f"nbs/{name}.ipynb"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 0
        and "Unknown type" not in done.stdout
        and "Unable to parse" not in done.stdout + done.stderr
    )
    for f in fields(EXPERIMENTS[name]):
        assert (
            f"  {f.name}: {f.type.__name__} (default {f.default!r})" in done.stdout
            and f.metadata["help"] in done.stdout
        )


def test_contract_of_parameters():
    names = [
        "method",
        "ratio",
        "of",
        "dataset",
        "model",
        "checkpoint",
        "schedule",
        "rounds",
        "pretrain_epochs",
        "epochs",
        "train_size",
        "lr",
        "batch_size",
        "fisher",
        "samples",
        "seed",
        "device",
        "preset",
        "data_dir",
        "runs_dir",
        "run_name",
        "resume",
    ]
    assert set(names) <= {f.name for f in fields(PruneParams)}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
def test_notebooks_are_clean(path):
    "No large stored outputs, no execution counts, code that parses, cells with an id of their own."
    nb = nbformat.read(path, 4)
    assert len(str([c.outputs for c in nb.cells if c.cell_type == "code"])) < 200_000
    assert not [c.execution_count for c in nb.cells if c.get("execution_count")]
    assert len({c.id for c in nb.cells}) == len(nb.cells)
    for c in nb.cells:
        if c.cell_type == "code" and not c.source.lstrip().startswith(("!", "%")):
            ast.parse(c.source)


def names(sources, kind) -> set:
    "Names that are read (`ast.Load`) anywhere in the code, or set (`ast.Store`) at its top level."
    inner = (
        ast.FunctionDef,
        ast.ClassDef,
        ast.Lambda,
        ast.ListComp,
        ast.GeneratorExp,
        ast.DictComp,
        ast.SetComp,
    )

    def walk(node):
        return [node] + [
            m
            for n in ast.iter_child_nodes(node)
            if kind is ast.Load or not isinstance(n, inner)
            for m in walk(n)
        ]

    return {
        n.id
        for s in sources
        for n in walk(ast.parse(s))
        if isinstance(n, ast.Name) and isinstance(n.ctx, kind)
    }


@pytest.mark.parametrize(
    "path",
    [p for p in NOTEBOOKS if "register" in p.read_text()],
    ids=lambda p: p.relative_to(ROOT / "nbs").as_posix(),
)
def test_examples_leave_what_registered_code_uses(path):
    "Notebooks are tested several in one process, and what they register is used by those that follow: a variable of an example with the name of an imported function would break it."
    sources = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    exported = [s for s in sources if s.startswith("#| export")]
    imported = {
        (a.asname or a.name)
        for s in exported
        for n in ast.parse(s).body
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for a in n.names
    }
    assert (
        not imported
        & names(exported, ast.Load)
        & names([s for s in sources if s not in exported], ast.Store)
    )
