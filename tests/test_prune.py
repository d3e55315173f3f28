"The default command, end to end: one execution, looked at from all sides. And quick ones, for what needs several."

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


def test_default_command_keeps_its_promise(default_run):
    assert default_run.returncode == 0, default_run.stderr
    baseline, pruned, finetuned = (default_run.result()[s] for s in STAGES)
    assert baseline["accuracy"] >= 0.97 and finetuned["accuracy"] >= baseline["accuracy"] - 0.01
    assert pruned["params"] <= 0.3 * baseline["params"] and pruned["macs"] < baseline["macs"]
    assert finetuned["params"] == pruned["params"] and finetuned["macs"] == pruned["macs"]


def test_run_folders_hold_what_the_contract_says(default_run):
    files = lambda prefix: {f.name for f in default_run.run(prefix).iterdir()}
    assert {f.name.split("-")[0] for f in default_run.runs.iterdir()} == {"eigendamage", "pretrain"}
    assert files("pretrain") == {"params.json", "metrics.jsonl", "model.safetensors", "result.json"}
    assert files("eigendamage") == {
        "params.json",
        "metrics.jsonl",
        "plan.json",
        "model.safetensors",
        "scores.safetensors",
        "result.json",
        "notebook.ipynb",
    }


def test_result_has_the_keys_of_the_contract(default_run):
    result = default_run.result()
    assert set(result) == {
        "id",
        "method",
        "model",
        "dataset",
        "ratio",
        "of",
        "seed",
        *STAGES,
        "predicted_loss_change",
        "measured_loss_change",
        "seconds",
        "device",
    }
    for s in STAGES:
        assert set(result[s]) == {"accuracy", "loss", "params", "macs", "latency_ms"}
        assert all(math.isfinite(v) and v > 0 for v in result[s].values())
    assert (
        result["id"] == default_run.run("eigendamage").name and result["predicted_loss_change"] > 0
    )
    assert {k: result[k] for k in ("method", "model", "dataset", "ratio", "of", "seed")} == dict(
        method="eigendamage", model="resnet20", dataset="digits", ratio=0.75, of="params", seed=0
    )
    params = read_json(default_run.run("eigendamage") / "params.json")
    assert params["params"]["seed"] == 0 and params["versions"]["torch"] == torch.__version__


def test_metrics_have_a_line_per_epoch(default_run):
    for prefix, phase, epochs in (("eigendamage", "finetune", 30), ("pretrain", "pretrain", 40)):
        rows = [
            json.loads(l)
            for l in (default_run.run(prefix) / "metrics.jsonl").read_text().splitlines()
        ]
        assert [r["epoch"] for r in rows if r["phase"] == phase and "epoch" in r] == [
            *range(1, epochs + 1)
        ]


def test_surgery_is_exact(default_run):
    said = [
        float(m)
        for o in default_run.outputs
        for m in re.findall(r"masked original: (\S+)\. ", o.get("data", {}).get("text/html", ""))
    ]
    assert len(said) == 1 and 0 < said[0] <= 1e-5
    folder, dense = (
        default_run.run("eigendamage"),
        load_weights(create_model("resnet20", 10, 1, 8), default_run.run("pretrain")),
    )
    plan = load_plan(folder / "plan.json", load_scores(folder / "scores.safetensors").bases)
    small, images = plan.apply(dense), next(iter(load_data("digits", batch_size=360).test))[0]
    assert sum(p.numel() for p in small.parameters()) == default_run.result()["pruned"]["params"]
    assert (
        max_relative_difference(small, plan.masked(dense), images)
        <= 1e-5
        < max_relative_difference(small, dense, images)
    )


RELOAD = """
import hashlib, sys, torch
from prune_nb.data import load_data
from prune_nb.models import create_model
from prune_nb.surgery.export import load
torch.set_num_threads(1)
model = load(sys.argv[1], lambda: create_model("resnet20", 10, 1, 8)).eval()
with torch.no_grad(): outputs, targets = (torch.cat(t) for t in zip(*[(model(x), y) for x, y in load_data("digits", batch_size=64).test]))
print(hashlib.sha256(outputs.numpy().tobytes()).hexdigest(), float((outputs.argmax(1) == targets).sum()) / len(targets))
"""


def test_saved_model_reloads_in_fresh_processes(default_run, pool):
    reload = lambda _: subprocess.run(
        [sys.executable, "-c", RELOAD, default_run.run("eigendamage")],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    one, two = pool.map(reload, range(2))
    assert one.returncode == 0, one.stderr
    assert (
        one.stdout == two.stdout
        and float(one.stdout.split()[1]) == default_run.result()["finetuned"]["accuracy"]
    )


def text_of(outputs) -> str:
    return "\n".join(o.get("data", {}).get("text/plain", "") for o in outputs)


def test_executed_notebook_shows_everything(default_run):
    kept = nbformat.read(default_run.run("eigendamage") / "notebook.ipynb", 4)
    executed = nbformat.read(default_run.path, 4)
    assert [c.source for c in kept.cells] == [c.source for c in executed.cells]
    assert [c.outputs for c in kept.cells if c.cell_type == "code"][:-1] == [
        c.outputs for c in executed.cells if c.cell_type == "code"
    ][:-1]
    assert (
        sum("application/vnd.plotly.v1+json" in o.get("data", {}) for o in default_run.outputs) == 4
    )
    text = text_of(default_run.outputs)
    for progress in ("pretrain resnet20 · 40/40", "finetune · 30/30"):
        assert progress in text
    for word in (*STAGES, "accuracy", "latency_ms"):
        assert word in text


@pytest.fixture(scope="module")
def page(default_run, tmp_path_factory):
    "The executed notebook as a page."
    path = tmp_path_factory.mktemp("page") / "out.html"
    subprocess.run(
        [sys.executable, "-m", "nbconvert", "--to", "html", default_run.path, "--output", path],
        check=True,
        capture_output=True,
    )
    return path


def test_page_carries_its_figures(page):
    text = page.read_text()
    assert (
        text.count('class="plotly-graph-div"') == 4
        and len(re.findall(r"plotly\.js v\d", text)) == 1
    )
    assert not [s for s in re.findall(r'<script[^>]*src="([^"]*)"', text) if "plotly" in s.lower()]


def test_page_draws_its_figures_offline(page):
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--virtual-time-budget=20000",
        "--dump-dom",
    ]
    drawn = subprocess.run(
        [chromium(), *options, page.as_uri()], capture_output=True, text=True, timeout=120
    ).stdout
    for title in ("spectra", "kept", "measured", "Fine-tuning"):
        assert title.lower() in html.unescape(drawn).lower()
    assert len(re.findall(r'class="main-svg"', drawn)) >= 4


def numbers(result) -> dict:
    "What must not change from one execution to the next."
    return {
        k: {n: x for n, x in v.items() if n != "latency_ms"} if k in STAGES else v
        for k, v in result.items()
        if k != "seconds"
    }


def test_same_seed_same_numbers(baseline, pool, tmp_path_factory):
    quick = dict(model="lenet", checkpoint=baseline, epochs=2, samples=256)
    folders = [tmp_path_factory.mktemp("seed") for _ in range(3)]
    one, two, other = pool.map(
        lambda folder, seed: execute(folder, seed=seed, **quick), folders, (0, 0, 1)
    )
    assert one.returncode == two.returncode == other.returncode == 0, one.stderr
    assert numbers(one.result()) == numbers(two.result())
    weights = [r.run("eigendamage") / "model.safetensors" for r in (one, two, other)]
    assert weights[0].read_bytes() == weights[1].read_bytes() != weights[2].read_bytes()
