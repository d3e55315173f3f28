"""Take the README's pictures of the dashboards from `nbs/explore.ipynb`, run in JupyterLab.

uv run python scripts/dashboard_pictures.py
"""

import itertools
import tempfile
from pathlib import Path

from browser import ROOT, Seen, browsing, lab, small_run, workspace
from PIL import Image

VIEWS = ("Layers", "Spectra", "Compare", "Runs")
METHODS = ("eigendamage", "curvature_tucker", "l1")
RATIOS = (0.4, 0.6, 0.8)
RUN = dict(of="params", model="resnet8", pretrain_epochs=10, epochs=4, samples=512)
LEAST_BYTES = 20_000  # an empty picture is smaller
MOST_BYTES = 300_000


def opened(browser, address: str) -> Seen:
    """Run the notebook, wait until every view is drawn, select a run and a layer."""
    seen = Seen(browser, width=1280, height=4600)
    seen.open_in_lab(address, "explore.ipynb")
    seen.run_all()
    for view in VIEWS:
        seen.view(view).locator(".cartesianlayer .trace").first.wait_for(timeout=60_000)
    rows = seen.view("Runs").locator(".prune-nb-table tbody tr")
    rows.filter(has_text="curvature_tucker-0.6").click()
    seen.python("eigen.widgets['layer'].value = list(eigen.scores.layers)[-3]")
    seen.page.wait_for_timeout(4000)
    return seen


def save_picture(seen: Seen, view: str):
    """Save one view as a PNG of 256 colours and print its size."""
    path = ROOT / f"nbs/images/dashboard_{view.lower()}.png"
    seen.shot(path, seen.view(view))
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
    size = path.stat().st_size
    assert LEAST_BYTES < size < MOST_BYTES, path
    print(path.relative_to(ROOT), f"{size / 1000:.0f} kB")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        home = workspace(Path(folder) / "project", [ROOT / "nbs/explore.ipynb"])
        for method, ratio in itertools.product(METHODS, RATIOS):
            small_run(home, method, ratio, **RUN)
        with lab(home) as address, browsing() as browser:
            seen = opened(browser, address)
            for view in VIEWS:
                save_picture(seen, view)
            assert not seen.errors, seen.errors
