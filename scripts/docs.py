"""Build the documentation from the notebooks, their stored outputs and the docstrings.

    uv run python scripts/docs.py           # writes _docs/html; a warning is an error
    uv run python scripts/docs.py --serve   # the same, then serves it on this machine

Nothing is executed and nothing is fetched.
"""

import csv
import functools
import http.server
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
from nbdev.showdoc import BasicMarkdownRenderer, show_doc

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "_docs"
SOURCE = BUILD / "source"
DIRECTIVE = re.compile(r"^#\|\s*(\w+).*\n?", re.M)
HIDDEN = {"hide", "default_exp"}
ROOM_TITLES = {
    "foundations": "Foundations",
    "data_and_models": "Models and data",
    "curvature": "Curvature",
    "tracing": "Tracing",
    "surgery": "Surgery",
    "costs": "Costs",
    "criteria": "Criteria",
    "budgets": "Budgets",
    "recovery": "Recovery",
    "api": "The whole way in one call",
    "experiment": "Experiments",
    "dashboard": "Dashboards",
}


def published_cell(cell: dict) -> dict | None:
    """Return a cell as the site shows it, without nbdev's directives; None for a hidden one."""
    source = "".join(cell["source"])
    directives = set(DIRECTIVE.findall(source)) if cell["cell_type"] == "code" else set()
    if directives & HIDDEN:
        return None
    text = DIRECTIVE.sub("", source) if directives else source
    return cell | dict(source=text.splitlines(keepends=True))


def publish_notebook(path: Path, target: Path):
    """Copy a notebook to the sources of the site, without its hidden cells."""
    notebook = json.loads(path.read_text())
    cells = [published_cell(cell) for cell in notebook["cells"]]
    notebook["cells"] = [cell for cell in cells if cell is not None]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(notebook))


def notebook_title(path: Path) -> str:
    """Return the first heading of a notebook."""
    for cell in json.loads(path.read_text())["cells"]:
        for line in "".join(cell["source"]).splitlines():
            if line.startswith("# "):
                return line.removeprefix("# ")
    return path.stem


def module_of(path: Path) -> str | None:
    """Return the module that a notebook exports to, without the package's name."""
    found = re.search(r"#\| default_exp ([\w.]+)", path.read_text())
    return found[1] if found else None


def toctree(entries: list[str], depth: int = 1, caption: str = "") -> str:
    """Return a table of contents as MyST."""
    head = [":hidden:"] if depth == 0 else [f":maxdepth: {depth}"]
    if caption:
        head.append(f":caption: {caption}")
    return "\n".join(["```{toctree}", *head, "", *entries, "```", ""])


def write_page(name: str, *parts: str):
    """Write a page of the site from paragraphs."""
    path = SOURCE / f"{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n")


def rooms() -> dict[str, list[Path]]:
    """Return the source notebooks of every room, in reading order."""
    found = {}
    for path in sorted((ROOT / "nbs/lib").glob("*/*.ipynb")):
        found.setdefault(path.parent.name, []).append(path)
    return found


def write_rooms():
    """Publish the source notebooks and a page for every room."""
    names = []
    for room, notebooks in rooms().items():
        for path in notebooks:
            publish_notebook(path, SOURCE / path.relative_to(ROOT))
        title = ROOM_TITLES[room.partition("_")[2]]
        entries = [f"{room}/{path.stem}" for path in notebooks]
        write_page(f"nbs/lib/{room}", f"# {title}", toctree(entries))
        names.append(room)
    text = (
        "The notebooks that the package is generated from, in reading order: each holds one "
        "concept, small functions, an example of each with its output, and their tests."
    )
    write_page("nbs/lib/index", "# How it works inside", text, toctree(names, 2))


def public_members(module) -> list[tuple[str, object]]:
    """Return the functions and classes that a module lists in `__all__`."""
    names = [n for n in getattr(module, "__all__", []) if not n.startswith("_")]
    members = [(name, getattr(module, name)) for name in names]
    return [(n, m) for n, m in members if inspect.isclass(m) or inspect.isfunction(m)]


def documented(name: str, member) -> str:
    """Return signature, docstring and table of arguments of a member as Markdown."""
    text = show_doc(member, name=name, renderer=BasicMarkdownRenderer)._repr_markdown_()
    text = re.sub(r"^#{3,6} ", "## ", text, flags=re.M)
    return re.sub(r"^\[source\].*$", "", text.replace("---", ""), flags=re.M).strip()


def write_reference():
    """Write a page for every module: what it exports, from the docstrings."""
    entries = []
    for notebooks in rooms().values():
        for path in notebooks:
            name = module_of(path)
            if name is None or name == "__init__":
                continue
            module = importlib.import_module(f"prune_nb.{name}")
            parts = [documented(n, member) for n, member in public_members(module)]
            write_page(f"reference/{name}", f"# prune_nb.{name}", module.__doc__ or "", *parts)
            entries.append(name)
    text = "Every module, in reading order. The names of `prune_nb` itself come first."
    write_page("reference/index", "# Reference", text, toctree(entries))


def csv_page(path: Path) -> str:
    """Return a table of `runs/published` as Markdown, with the command that made it."""
    lines = path.read_text().splitlines()
    comments = [line.lstrip("# ") for line in lines if line.startswith("#")]
    rows = list(csv.reader(line for line in lines if not line.startswith("#")))
    table = pd.DataFrame(rows[1:], columns=rows[0]).head(40)
    head = f"## {path.stem.replace('_', ' ')}"
    made = "```text\n" + "\n".join(comments) + "\n```" if comments else ""
    return "\n\n".join([head, made, table.to_markdown(index=False)])


def write_benchmarks():
    """Publish the benchmark notebooks and the committed tables."""
    entries = []
    for path in sorted((ROOT / "nbs/benchmarks").glob("*.ipynb")):
        publish_notebook(path, SOURCE / path.relative_to(ROOT))
        entries.append(f"../nbs/benchmarks/{path.stem}")
    tables = [csv_page(path) for path in sorted((ROOT / "runs/published").glob("*.csv"))]
    text = "Each table stands beside the command that made it."
    write_page("benchmarks/index", "# Benchmarks and measurements", text, toctree(entries), *tables)


def write_presets():
    """Write the table of published experiments that are presets."""
    from prune_nb.experiment.presets import presets_table

    table = presets_table().reset_index()
    text = "`-p preset NAME` sets all that the publication says; explicit parameters win."
    write_page("presets", "# Presets", text, table.to_markdown(index=False))


def write_gallery():
    """Write a page of the figures that the project stores."""
    pictures = sorted((ROOT / "nbs/images").glob("*.png"))
    cards = [f"## {p.stem.replace('_', ' ')}\n\n![{p.stem}](nbs/images/{p.name})" for p in pictures]
    write_page("gallery", "# Gallery", *cards)


def write_tutorials():
    """Publish the tutorials and the notebooks that a person opens."""
    groups = {"tutorials": sorted((ROOT / "nbs/tutorials").glob("*.ipynb"))}
    groups["notebooks"] = [
        ROOT / f"nbs/{n}.ipynb" for n in ("prune", "pretrain", "sweep", "oracle")
    ]
    titles = dict(tutorials="Tutorials", notebooks="Notebooks to run")
    for name, paths in groups.items():
        for path in paths:
            publish_notebook(path, SOURCE / path.relative_to(ROOT))
        entries = [f"../{path.relative_to(ROOT).with_suffix('')}" for path in paths]
        write_page(f"{name}/index", f"# {titles[name]}", toctree(entries))


def write_home():
    """Write the first page: the README and the contents."""
    pages = ["tutorials/index", "notebooks/index", "nbs/lib/index", "reference/index"]
    pages += ["benchmarks/index", "presets", "gallery", "coming_from", "reports/prune"]
    readme = (ROOT / "README.md").read_text()
    write_page("index", readme, toctree(pages, 0))


def assemble():
    """Write all sources of the site."""
    shutil.rmtree(BUILD, ignore_errors=True)
    shutil.copytree(ROOT / "docs", SOURCE)
    shutil.copytree(ROOT / "nbs/images", SOURCE / "nbs/images")
    shutil.copytree(
        ROOT / "runs/published", SOURCE / "runs/published", ignore=shutil.ignore_patterns("*.ipynb")
    )
    write_rooms()
    write_reference()
    write_benchmarks()
    write_presets()
    write_gallery()
    write_tutorials()
    write_home()


def build() -> int:
    """Run Sphinx over the sources; return its exit code."""
    options = ["-q", "-W", "--keep-going", "-b", "html", "-j", "auto"]
    command = [sys.executable, "-m", "sphinx", *options, str(SOURCE), str(BUILD / "html")]
    return subprocess.run(command).returncode


def serve(port: int = 8000):
    """Serve the built site on this machine."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=BUILD / "html")
    print(f"http://127.0.0.1:{port}")
    http.server.ThreadingHTTPServer(("127.0.0.1", port), handler).serve_forever()


if __name__ == "__main__":
    assemble()
    failed = build()
    if failed:
        sys.exit(failed)
    if "--serve" in sys.argv[1:]:
        serve()
