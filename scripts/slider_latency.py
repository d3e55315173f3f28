"""Measure how long the budget slider of the Layers dashboard takes for a large network.

    uv run python scripts/slider_latency.py [MODEL]

Prints the time in Python alone, and in the browser from the key press to the redrawn numbers.
"""

import sys
import tempfile
from pathlib import Path

import nbformat
import numpy as np
from browser import Seen, browsing, lab, workspace

MOVES = 15
CELL = """from prune_nb.dashboard.layers import Layers
from prune_nb.dashboard.start import ExploreParams, open_network
opened = open_network(ExploreParams(model={model!r}).validated())
layers = Layers(opened.model, opened.data, opened.methods[:1], opened.test, .3, **opened.recipe,
                **opened.settings)
layers"""
PYTHON = f"""import time
taken = []
for i in range({MOVES}):
    start = time.perf_counter()
    layers.widgets["ratio"].value = .3 + .01 * i
    taken.append(1e3 * (time.perf_counter() - start))
print(*taken[1:])"""
BROWSER = """([tile, slider]) => new Promise(done => {
    const start = performance.now();
    const watch = new MutationObserver(() => {
        watch.disconnect();
        requestAnimationFrame(() => done(performance.now() - start));
    });
    const seen = { childList: true, subtree: true, characterData: true };
    watch.observe(tile.parentElement.parentElement, seen);
    slider.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
})"""


def write_notebook(path: Path, model: str):
    """Write a notebook whose one cell shows the dashboard of `model`."""
    kernel = dict(name="python3", display_name="python3", language="python")
    cells = [nbformat.v4.new_code_cell(CELL.format(model=model))]
    metadata = dict(kernelspec=kernel)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)


def moves_in_browser(seen: Seen) -> list[float]:
    """Press the slider's arrow key `MOVES` times; return the milliseconds of all but the first."""
    times = []
    for _ in range(MOVES):
        tile = seen.page.locator(".prune-nb .pn-tiles").first.element_handle()
        slider = seen.page.locator(".prune-nb [role=slider]").first.element_handle()
        times.append(seen.page.evaluate(BROWSER, [tile, slider]))
        seen.page.wait_for_timeout(500)
    return times[1:]


def print_times(what: str, times: list[float]):
    """Print the median and the slowest of some times in milliseconds."""
    print(f"{what}: median {np.median(times):.0f} ms, slowest {max(times):.0f} of {len(times)}")


def main(model: str = "resnet50"):
    """Measure in Python, then in the browser."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "latency.ipynb"
        write_notebook(path, model)
        project = workspace(Path(folder) / "project", [path])
        with lab(project) as address, browsing() as browser:
            seen = Seen(browser, width=1280, height=1600)
            seen.open_in_lab(address, path.name)
            seen.run_all()
            seen.page.locator(".bars path").first.wait_for()
            print_times(f"{model}, Python", [float(t) for t in seen.python(PYTHON).split()])
            print_times(f"{model}, browser", moves_in_browser(seen))
            assert not seen.errors, seen.errors


if __name__ == "__main__":
    main(*sys.argv[1:])
