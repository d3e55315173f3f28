"""The default command, end to end: one execution, seen from all sides; and quick ones for seeds."""

import html
import json
import math
import re
import subprocess
import sys

import nbformat
import pytest
import torch
from browser import chromium
from conftest import ENVIRONMENT, ROOT, execute, read_json

from prune_nb.criteria.core import load_scores
from prune_nb.data import load_data
from prune_nb.models import create_model
from prune_nb.surgery.export import load_weights
from prune_nb.surgery.plan import load_plan
from prune_nb.surgery.verify import max_relative_difference

STAGES = ("baseline", "pruned", "finetuned")
PLOTLY = "application/vnd.plotly.v1+json"


def file_names(folder) -> set:
    return {f.name for f in folder.iterdir()}


def test_default_command_keeps_its_promise(default_run):
    assert default_run.returncode == 0, default_run.stderr
    baseline, pruned, finetuned = (default_run.result()[s] for s in STAGES)
    assert baseline["accuracy"] >= 0.97
    assert finetuned["accuracy"] >= baseline["accuracy"] - 0.01
    assert pruned["params"] <= 0.3 * baseline["params"]
    assert pruned["macs"] < baseline["macs"]
    assert finetuned["params"] == pruned["params"]
    assert finetuned["macs"] == pruned["macs"]


def test_run_folders_hold_what_the_contract_says(default_run):
    kinds = {f.name.split("-")[0] for f in default_run.runs.iterdir() if f.is_dir()}
    assert kinds == {"eigendamage", "pretrain"}
    trained = {"params.json", "metrics.jsonl", "model.safetensors", "result.json"}
    assert file_names(default_run.run("pretrain")) == trained
    pruned = {"plan.json", "plan.safetensors", "scores.safetensors", "notebook.ipynb"}
    assert file_names(default_run.run("eigendamage")) == trained | pruned


RESULT = """
id method model dataset ratio of seed baseline pruned finetuned predicted_loss_change
measured_loss_change seconds device runtime efficiency
"""


def test_result_has_the_keys_of_the_contract(default_run):
    result = default_run.result()
    assert set(result) == set(RESULT.split())
    for s in STAGES:
        assert set(result[s]) == {"accuracy", "loss", "params", "macs", "latency_ms"}
        assert all(math.isfinite(v) and v > 0 for v in result[s].values())
    assert result["id"] == default_run.run("eigendamage").name
    assert result["predicted_loss_change"] > 0
    asked = dict(method="eigendamage", model="resnet8x2", dataset="digits")
    asked |= dict(ratio=0.85, of="params", seed=0, runtime="onnxruntime")
    assert {key: result[key] for key in asked} == asked
    params = read_json(default_run.run("eigendamage") / "params.json")
    assert params["params"]["seed"] == 0
    assert params["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    "prefix, phase, epochs", [("eigendamage", "finetune", 30), ("pretrain", "pretrain", 40)]
)
def test_metrics_have_a_line_per_epoch(default_run, prefix, phase, epochs):
    lines = (default_run.run(prefix) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    found = [r["epoch"] for r in rows if r["phase"] == phase and "epoch" in r]
    assert found == [*range(1, epochs + 1)]


def reported_differences(outputs) -> list:
    """Return the differences from the masked original that the tables of outputs report."""
    found = []
    for o in outputs:
        text = o.get("data", {}).get("text/html", "")
        found += re.findall(r"masked original: (\S+)\. ", text)
    return [float(f) for f in found]


def test_surgery_is_exact(default_run):
    reported = reported_differences(default_run.outputs)
    assert len(reported) == 1 and 0 < reported[0] <= 1e-5
    folder = default_run.run("eigendamage")
    dense = load_weights(create_model("resnet8x2", 10, 1, 8), default_run.run("pretrain"))
    plan = load_plan(folder / "plan.json", load_scores(folder / "scores.safetensors").bases)
    small, images = plan.apply(dense), next(iter(load_data("digits", batch_size=360).test))[0]
    assert sum(p.numel() for p in small.parameters()) == default_run.result()["pruned"]["params"]
    assert max_relative_difference(small, plan.masked(dense), images) <= 1e-5
    assert max_relative_difference(small, dense, images) > 1e-5


RELOAD = """
import hashlib, sys, torch
from prune_nb.data import load_data
from prune_nb.models import create_model
from prune_nb.surgery.export import load

torch.set_num_threads(1)
model = load(sys.argv[1], lambda: create_model("resnet8x2", 10, 1, 8)).eval()
with torch.no_grad():
    found = [(model(x), y) for x, y in load_data("digits", batch_size=64).test]
outputs, targets = (torch.cat(t) for t in zip(*found))
accuracy = float((outputs.argmax(1) == targets).sum()) / len(targets)
print(hashlib.sha256(outputs.numpy().tobytes()).hexdigest(), accuracy)
"""


def test_saved_model_reloads_in_fresh_processes(default_run, pool):
    command = [sys.executable, "-c", RELOAD, default_run.run("eigendamage")]

    def reload(_):
        return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)

    one, two = pool.map(reload, range(2))
    assert one.returncode == 0, one.stderr
    assert one.stdout == two.stdout
    assert float(one.stdout.split()[1]) == default_run.result()["finetuned"]["accuracy"]


def code_outputs(notebook) -> list:
    return [c.outputs for c in notebook.cells if c.cell_type == "code"]


def test_executed_notebook_shows_everything(default_run):
    kept = nbformat.read(default_run.run("eigendamage") / "notebook.ipynb", 4)
    executed = nbformat.read(default_run.path, 4)
    assert [c.source for c in kept.cells] == [c.source for c in executed.cells]
    assert code_outputs(kept)[:-1] == code_outputs(executed)[:-1]
    assert sum(PLOTLY in o.get("data", {}) for o in default_run.outputs) == 4
    text = "\n".join(o.get("data", {}).get("text/plain", "") for o in default_run.outputs)
    for progress in ("pretrain resnet8x2 · 40/40", "finetune · 30/30"):
        assert progress in text
    for word in (*STAGES, "accuracy", "latency_ms"):
        assert word in text


@pytest.fixture(scope="module")
def page(default_run, tmp_path_factory):
    """Return the executed notebook as a page."""
    path = tmp_path_factory.mktemp("page") / "out.html"
    convert = [sys.executable, "-m", "nbconvert", "--to", "html"]
    command = [*convert, default_run.path, "--output", path]
    subprocess.run(command, check=True, capture_output=True)
    return path


def test_page_carries_its_figures(page):
    text = page.read_text()
    assert text.count('class="plotly-graph-div"') == 4
    assert len(re.findall(r"plotly\.js v\d", text)) == 1
    scripts = re.findall(r'<script[^>]*src="([^"]*)"', text)
    assert not [s for s in scripts if "plotly" in s.lower()]


def test_page_draws_its_figures_offline(page):
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--virtual-time-budget=20000",
        "--dump-dom",
    ]
    command = [chromium(), *options, page.as_uri()]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    for title in ("spectra", "kept", "measured", "Fine-tuning"):
        assert title.lower() in html.unescape(drawn).lower()
    assert len(re.findall(r'class="main-svg"', drawn)) >= 4


def numbers(result) -> dict:
    """Return what must not change from one execution to the next."""
    found = {k: v for k, v in result.items() if k not in ("seconds", "efficiency")}
    for s in STAGES:
        if s in found:
            found[s] = {k: v for k, v in found[s].items() if k != "latency_ms"}
    return found


def test_same_seed_same_numbers(baseline, pool, tmp_path_factory):
    quick = dict(model="lenet", checkpoint=baseline, epochs=2, samples=256)
    folders = [tmp_path_factory.mktemp("seed") for _ in range(3)]

    def run(folder, seed):
        return execute(folder, seed=seed, **quick)

    one, two, other = pool.map(run, folders, (0, 0, 1))
    for done in (one, two, other):
        assert done.returncode == 0, done.stderr
    assert numbers(one.result()) == numbers(two.result())
    paths = [r.run("eigendamage") / "model.safetensors" for r in (one, two, other)]
    first, second, third = (path.read_bytes() for path in paths)
    assert first == second != third
