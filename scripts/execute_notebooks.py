"""Run notebooks and store their outputs in them, figures as PNG.

    python scripts/execute_notebooks.py NOTEBOOK...

Each notebook runs in its own folder in a fresh kernel, as a reader would run it. Nothing is
written where a cell fails. Run `nbdev_clean` afterwards.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

os.environ |= dict(PLOTLY_RENDERER="png", OMP_NUM_THREADS="1")
IMAGES = {"image/png", "image/svg+xml"}
UNWANTED = {"application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"}


def cleaned(output: dict) -> dict:
    """Return an output without what changes at every run or does not belong in git."""
    data = output.get("data", {})
    for kind in UNWANTED:
        data.pop(kind, None)
    if "<progress" in data.get("text/html", ""):
        data.clear()
    if IMAGES & data.keys():
        data.pop("text/html", None)
        data.pop("text/plain", None)
    return output


def execute(path: Path):
    """Run one notebook in place."""
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        kept = [o for o in cell.outputs if o.get("name") != "stderr"]
        cell.outputs = [cleaned(o) for o in kept]
        cell.outputs = [o for o in cell.outputs if o.output_type == "stream" or o.get("data")]
    notebook.metadata.pop("widgets", None)
    path.write_text(nbformat.writes(notebook, 4) + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        execute(Path(name).resolve())
        print(name)
