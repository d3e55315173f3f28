"""Hold the public names of the package: all importable, listed once, and cheap to import."""

import ast
import inspect
import pkgutil
import subprocess
import sys

import pytest
from conftest import ROOT

import prune_nb

NAMES = prune_nb.__all__
CONTRACT = """prune score allocate trace Plan Scores Result save load export register fit evaluate
latency_table refit compensate verify create_model load_data load_plan save_plan UserError"""
HEAVY = ["torch", "numpy", "pandas", "torchvision", "plotly", "papermill", "nbdev", "IPython"]
NOTEBOOK_TOOLS = ["nbdev", "fastcore", "execnb", "plotly", "papermill", "IPython", "ipywidgets"]


def run_python(code: str) -> str:
    """Return what `code` prints in a fresh interpreter; fail with its errors if it raises."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_public_name_is_importable_and_documented(name):
    value = getattr(prune_nb, name)
    assert value.__name__ == name
    assert inspect.getdoc(value).split("\n")[0]


def test_names_are_listed_once_and_by_dir():
    assert len(set(NAMES)) == len(NAMES)
    assert set(NAMES) <= set(dir(prune_nb))
    assert set(CONTRACT.split()) <= set(NAMES)


def test_no_name_is_a_module_of_the_package():
    """Importing such a module anywhere would put it in the place of the function."""
    modules = {m.name for m in pkgutil.iter_modules(prune_nb.__path__)}
    assert not modules & set(NAMES)


def test_type_checkers_read_the_same_names():
    """What `if TYPE_CHECKING` imports is what `__getattr__` finds, from the same modules."""
    tree = ast.parse((ROOT / "prune_nb/__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {}
    for statement in block.body:
        for alias in statement.names:
            imported[alias.name] = statement.module.removeprefix("prune_nb.")
    assert imported == prune_nb._MODULES
    assert set(imported) == set(NAMES)


def test_import_of_the_package_loads_nothing():
    loaded = run_python(f"import sys, prune_nb; print([m for m in {HEAVY} if m in sys.modules])")
    assert loaded == "[]\n"


def test_all_public_names_import_without_the_notebook_tools():
    blocked = f"import sys; sys.modules.update(dict.fromkeys({NOTEBOOK_TOOLS}))"
    run_python(f"{blocked}\nfrom prune_nb import *\nassert callable(prune)")


def test_modules_are_importable_beside_the_names():
    run_python("from prune_nb import api, data, models, train\nassert data.load_data")


def test_every_method_is_known_to_the_public_names():
    """No other module has to be imported first for a method to be registered."""
    code = """
import torch
from prune_nb import score
scores = score(torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)), torch.ones(1, 4), "l1")
print(scores.method)
"""
    assert run_python(code) == "l1\n"
    register = """
from prune_nb import register
@register
class Peak:
    name, needs, measures = "peak", "weights", "size"
print(Peak.name)
"""
    assert run_python(register) == "peak\n"


def test_unknown_name_is_an_attribute_error():
    misspelled = "pruen"
    with pytest.raises(AttributeError, match="module 'prune_nb' has no attribute 'pruen'"):
        getattr(prune_nb, misspelled)
    with pytest.raises(ImportError, match="cannot import name 'pruen'"):
        exec("from prune_nb import pruen")


def test_package_says_that_it_is_typed():
    assert (ROOT / "prune_nb/py.typed").is_file()
    assert '"py.typed"' in (ROOT / "setup.py").read_text()
