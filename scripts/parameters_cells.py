"""Write the parameters cells of the experiment notebooks from their classes.

    uv run python scripts/parameters_cells.py

Run it after a parameter or a method has changed; a test holds cells and classes together.
"""

import json
from pathlib import Path

from prune_nb.dashboard.start import ExploreParams
from prune_nb.experiment.oracle import OracleParams
from prune_nb.experiment.params import PretrainParams, PruneParams, parameters_cell
from prune_nb.experiment.sweep import SweepParams

NOTEBOOKS = Path(__file__).resolve().parents[1] / "nbs"
EXPERIMENTS = {
    "prune": PruneParams,
    "pretrain": PretrainParams,
    "sweep": SweepParams,
    "oracle": OracleParams,
    "explore": ExploreParams,
}


def write_parameters_cell(path: Path, params: type):
    """Replace the source of the cell of a notebook that papermill looks for."""
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            cell["source"] = parameters_cell(params).splitlines(keepends=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


if __name__ == "__main__":
    for name, params in EXPERIMENTS.items():
        write_parameters_cell(NOTEBOOKS / f"{name}.ipynb", params)
