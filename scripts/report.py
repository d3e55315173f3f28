"""Run nbs/prune.ipynb with its defaults, and store the executed notebook as an example report.

    python scripts/report.py   # writes docs/reports/prune.ipynb

Figures are stored as PNG, so that a reader on a code host sees them.
"""

import base64
import io
import tempfile
from pathlib import Path

import nbformat
import papermill
import plotly.graph_objects as go
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "docs" / "reports" / "prune.ipynb"
PLOTLY = "application/vnd.plotly.v1+json"
WIDTH = 900  # pixels of a figure
COLOURS = 64  # of a figure: a quarter of the size, and no difference that one sees


def as_picture(figure: dict) -> dict:
    """Return the output data of a figure as PNG."""
    parts = {key: figure[key] for key in ("data", "layout")}
    picture = Image.open(io.BytesIO(go.Figure(parts).to_image("png", width=WIDTH)))
    small = io.BytesIO()
    picture.convert("RGB").quantize(COLOURS).save(small, "png", optimize=True)
    return {"image/png": base64.b64encode(small.getvalue()).decode()}


def stored_output(output: dict) -> dict | None:
    """Return an output to store; None for scripts, progress bars and stderr."""
    data = output.get("data", {})
    page = data.get("text/html", "")
    if PLOTLY in data:
        output["data"], output["metadata"] = as_picture(data[PLOTLY]), {}
    elif output.get("name") == "stderr" or "<script" in page or "<progress" in page:
        return None
    return output


def stored_notebook(path: Path, folder: str) -> nbformat.NotebookNode:
    """Return an executed notebook without injected parameters, counts, and names of a folder."""
    text = path.read_text().replace(f"{folder}/", "")
    notebook = nbformat.reads(text, 4)
    injected = "injected-parameters"
    cells = [c for c in notebook.cells if injected not in c.metadata.get("tags", [])]
    for cell in cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            outputs = [stored_output(o) for o in cell.outputs]
            cell.outputs = [o for o in outputs if o]
            for o in cell.outputs:
                o.pop("execution_count", None)
                if o.output_type == "execute_result":
                    o["execution_count"] = None
    notebook.cells = cells
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    return notebook


def main():
    """Write the report."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "prune.ipynb"
        source, runs = ROOT / "nbs" / "prune.ipynb", f"{folder}/runs"
        papermill.execute_notebook(source, out, dict(runs_dir=runs), cwd=ROOT)
        report = stored_notebook(out, folder)
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(report, REPORT)
    print(REPORT.relative_to(ROOT), f"{REPORT.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
