"""See nbs/explore.ipynb as a person does: opened and run in JupyterLab, and as a page of voila.

What is asserted is what a real browser shows and what the kernel holds after a click. Pictures of
every dashboard, at two widths and in both themes, are left in tests/screenshots to look at.
"""

import re
import shutil

import pytest
from browser import Seen, browsing, lab, small_run, voila, workspace
from conftest import ROOT, read_json
from playwright.sync_api import expect

PICTURES = ROOT / "tests/screenshots"
VIEWS = ("Layers", "Spectra", "Compare", "Runs")
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def browser():
    """Start a browser without a window."""
    with browsing() as browser:
        yield browser


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Make a project with the notebook, three real runs, and one that was damaged."""
    home = workspace(tmp_path_factory.mktemp("browser") / "project", [ROOT / "nbs/explore.ipynb"])
    for method, ratio in (("l1", 0.5), ("l1", 0.7), ("eigendamage", 0.5)):
        small_run(home, method, ratio)
    shutil.copytree(home / "runs/l1-0.5", home / "runs/damaged")
    (home / "runs/damaged/result.json").write_text("{")
    (home / "runs/l1-0.5/notebook.ipynb").write_text((ROOT / "nbs/explore.ipynb").read_text())
    return home


@pytest.fixture(scope="module")
def seen(home, browser):
    """Open the notebook in JupyterLab and run it."""
    with lab(home) as address:
        seen = Seen(browser, 1280, 4600)
        seen.open_in_lab(address, "explore.ipynb")
        seen.run_all()
        for view in VIEWS:
            trace = seen.view(view).locator(".cartesianlayer .trace").first
            expect(trace).to_be_visible(timeout=60_000)
        yield seen
        seen.page.close()


@pytest.fixture(autouse=True)
def no_new_errors(request):
    """Fail a test during which JavaScript reports an error."""
    if "seen" not in request.fixturenames:
        yield
        return
    seen = request.getfixturevalue("seen")
    before = len(seen.errors)
    yield
    assert seen.errors[before:] == []


def width_of(view, selector):
    """Return how wide an element of a view is, in pixels."""
    return view.locator(selector).first.bounding_box()["width"]


def test_notebook_runs_and_draws_everything(seen):
    errors = seen.python("print(layers.error, eigen.error, compare.error, runs.error)")
    assert errors == "None None None None"
    assert not seen.page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count()
    expect(seen.view("Layers").locator(".bars path").first).to_be_visible()
    expect(seen.view("Runs").locator(".points path").first).to_be_visible()
    for name in VIEWS:  # the figures fill their dashboards
        view = seen.view(name)
        box, figure = width_of(view, "xpath=."), width_of(view, ".main-svg")
        assert 0.9 * box < figure <= box + 1, (name, box, figure)


OVERHANG = "e => e.scrollWidth - e.clientWidth"


@pytest.mark.parametrize("width", (1280, 1920))
@pytest.mark.parametrize("theme", ("Light", "Dark"))
def test_pictures(seen, width, theme):
    seen.page.set_viewport_size(dict(width=width, height=4600))
    seen.theme(theme)
    seen.page.wait_for_timeout(1500)
    for name in VIEWS:
        view, path = seen.view(name), PICTURES / f"{name.lower()}-{width}-{theme.lower()}.png"
        seen.shot(path, view)
        assert path.stat().st_size > 20_000
        # nothing but margins is wider than its view
        assert seen.page.evaluate(OVERHANG, view.element_handle()) <= 8


BARS = "b => b.map(p => p.getAttribute('d')).join()"


def test_slider_moves_the_budget(seen):
    layers = seen.view("Layers")
    tile, bars = layers.locator(".pn-tile").nth(1), layers.locator(".bars path")
    text, shapes = tile.inner_text(), bars.evaluate_all(BARS)
    layers.get_by_role("slider").first.focus()
    for _ in range(5):
        seen.page.keyboard.press("ArrowRight")
    expect(tile).to_contain_text(re.compile(r"-5(4\.9|5\.\d)%"))
    assert tile.inner_text() != text
    assert bars.evaluate_all(BARS) != shapes
    assert seen.python("print(layers.plan.settings['ratio'])") == "0.55"


def test_dropdown_changes_the_method(seen):
    layers = seen.view("Layers")
    layers.get_by_role("combobox").first.select_option("l1")
    expect(layers.locator(".infolayer")).to_contain_text("saliency (l1)")
    assert seen.python("print(layers.plan.method, len(layers.plan.cuts) > 0)") == "l1 True"


def test_click_on_a_bar_describes_the_layer(seen):
    layers = seen.view("Layers")
    layers.locator(".bars .points").first.locator("path").nth(3).click(force=True)
    expect(layers.locator(".pn-text b").first).to_have_text(seen.python("print(layers.layers[3])"))
    expect(layers).to_contain_text("move with group")


def test_apply_cuts_and_measures(seen):
    layers = seen.view("Layers")
    layers.get_by_role("button", name="Apply").click()
    expect(layers).to_contain_text("differs from the masked original", timeout=60_000)
    accuracy = layers.locator(".pn-tile", has_text="accuracy")
    expect(accuracy).to_contain_text(re.compile(r"\d+\.\d% → \d+\.\d%"))
    params = seen.python("print(sum(p.numel() for p in layers.result.model.parameters()))")
    assert params == seen.python("print(layers.plan.settings['params'])")


def test_recipe_makes_the_same_plan(seen):
    layers = seen.view("Layers")
    layers.get_by_role("tab", name="Recipe").click()
    expect(layers.locator("pre").first).to_contain_text("allocate(scores, ratio=0.55")
    expect(layers.locator("pre").nth(1)).to_contain_text("papermill nbs/prune.ipynb out.ipynb")
    run_recipe = "space = {}; exec(layers.recipe, space); print(space['plan'] == layers.plan)"
    assert seen.python(run_recipe).endswith("True")


def test_error_is_shown_in_the_view(seen):
    seen.python("layers.widgets['ratio'].value = 1.")
    expect(seen.view("Layers").get_by_role("alert")).to_contain_text("Invalid ratio 1.0")
    seen.python("layers.widgets['ratio'].value = .5")
    expect(seen.view("Layers").get_by_role("alert")).to_have_count(0)


def test_compare_turns_its_pages(seen):
    compare = seen.view("Compare")
    compare.get_by_role("button", name="table").click()
    expect(compare.locator("tbody tr").last).to_contain_text("total")
    seen.shot(PICTURES / "compare-table.png", compare)
    compare.get_by_role("button", name="agreement").click()
    expect(compare.locator(".heatmaplayer .hm image")).to_be_visible()
    compare.get_by_role("combobox").first.select_option("overlap of what is removed")
    expect(compare.get_by_role("slider")).to_be_visible()
    seen.shot(PICTURES / "compare-agreement.png", compare)
    compare.get_by_role("button", name="predicted and measured").click()
    compare.get_by_role("button", name="Measure", exact=True).click()
    expect(compare.locator(".points path").first).to_be_visible(timeout=60_000)
    seen.shot(PICTURES / "compare-measured.png", compare)
    compare.get_by_role("button", name="network").click()
    expect(compare.locator(".bars path").first).to_be_visible()


def rows(seen):
    """Return the rows of the table of runs."""
    return seen.view("Runs").locator(".prune-nb-table tbody tr")


def test_runs_are_filtered_and_sorted(seen, home):
    runs = seen.view("Runs")
    names = rows(seen).locator("td:nth-child(2)").all_inner_texts()
    assert {"l1-0.5", "l1-0.7", "eigendamage-0.5", "damaged"} < set(names)
    damaged = rows(seen).filter(has_text="damaged")
    expect(damaged).to_contain_text("broken: result.json cannot be read")
    runs.get_by_role("textbox").fill("finished ratio=0.5")
    expect(rows(seen)).to_have_count(2)
    runs.get_by_role("textbox").fill("finished method=")
    expect(rows(seen)).to_have_count(3)
    runs.get_by_role("button", name="accuracy", exact=True).focus()
    seen.page.keyboard.press("Enter")
    expect(runs.locator("th[aria-sort=descending]")).to_have_text("accuracy ▼")
    results = [read_json(f) for f in home.glob("runs/*-0.?/result.json")]
    best_first = sorted((r["finetuned"]["accuracy"] for r in results), reverse=True)
    expect(rows(seen).locator("td:nth-child(4)")).to_have_text([f"{a:.2%}" for a in best_first])


def test_click_opens_a_run(seen, home):
    runs = seen.view("Runs")
    rows(seen).filter(has_text="l1-0.5").click()
    expect(runs.locator("h3")).to_have_text("l1-0.5")
    link = runs.get_by_role("link", name="notebook.ipynb")
    expect(link).to_have_attribute("href", "./../runs/l1-0.5/notebook.ipynb")
    accuracy = read_json(home / "runs/l1-0.5/result.json")["finetuned"]["accuracy"]
    expect(runs.locator(".widget-html table")).to_contain_text(f"{accuracy:.4g}")
    points = seen.page.locator(".points path")
    traces = runs.locator(".scatterlayer .trace", has=points)  # the first is of dense networks
    traces.nth(1).locator(".points path").first.click(force=True)
    expect(runs.locator("h3")).to_have_text("eigendamage-0.5")


def test_ticks_lay_curves_over_each_other(seen):
    runs = seen.view("Runs")
    for box in runs.get_by_role("checkbox", name="tick ").all()[:2]:
        box.check()
    expect(runs.locator(".js-plotly-plot").nth(1).locator(".legendtext")).to_have_count(2)
    seen.shot(PICTURES / "runs-opened.png", runs)


def test_running_run_is_followed(seen):
    runs = seen.view("Runs")
    runs.get_by_role("textbox").fill("going")
    seen.python("""
from prune_nb.experiment.params import PruneParams
from prune_nb.experiment.pruning import Experiment
small = dict(model="lenet", pretrain_epochs=2, epochs=3, samples=256)
params = PruneParams(method="l2", ratio=.5, of="macs", run_name="going", **small)
e = Experiment(params.validated())
e.baseline()
e.prune()""")
    expect(rows(seen)).to_contain_text("running: ")
    seen.python("e.finetune()\ne.finish()")
    expect(rows(seen)).to_contain_text("finished")


def test_no_errors_and_no_requests_to_other_machines(seen):
    assert seen.errors == [] and seen.strangers == []


def test_voila_serves_the_same(home, browser):
    with voila(home, "explore.ipynb") as address:
        seen = Seen(browser, 1280, 4600)
        seen.page.goto(address, timeout=120_000)
        for view in VIEWS:
            expect(seen.view(view).locator(".main-svg").first).to_be_visible(timeout=90_000)
        layers = seen.view("Layers")
        layers.get_by_role("slider").first.focus()
        seen.page.keyboard.press("ArrowRight")
        expect(layers.locator(".pn-tile").nth(1)).to_contain_text(re.compile(r"-5(0\.9|1\.\d)%"))
        seen.shot(PICTURES / "voila.png")
        # the page of voila itself asks for icons, which no dashboard has
        icons = re.compile("font-?awesome", re.I)
        assert [u for u in seen.strangers if not icons.search(u)] == []
        assert [e for e in seen.errors if "ERR_NAME_NOT_RESOLVED" not in e] == []
        seen.page.close()
