"Every schedule: budgets met, what is masked exactly zero and whole, the same steps for all, and the same numbers after any interruption."

import copy
import os
import shutil

import pytest
import torch
from test_prune import numbers
from torch import nn

from prune_nb.budgets.allocation import allocate
from prune_nb.core import UserError
from prune_nb.criteria import eigendamage, geometric_median, magnitude, taylor
from prune_nb.criteria.core import METHODS, collector_of
from prune_nb.data import load_data
from prune_nb.experiment import pruning
from prune_nb.experiment.baseline import pretrain
from prune_nb.experiment.params import PRUNING, PretrainParams, PruneParams
from prune_nb.experiment.pruning import Experiment
from prune_nb.models import create_model
from prune_nb.recovery.schedules import PRUNERS, masks, units_of
from prune_nb.runs import read_metrics
from prune_nb.surgery.export import load
from prune_nb.surgery.plan import load_plan
from prune_nb.surgery.verify import max_relative_difference
from prune_nb.tracing.coupling import trace
from prune_nb.train import fit

DATA = load_data("digits", batch_size=32, train_size=192)
CHANNELS = [m for m in METHODS if collector_of(m).ranks == "groups"]
LAST = {"iterative": dict(rounds=2), "gradual": dict(prune_every=2)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Run folder of a LeNet that was trained for a moment."
    return pretrain(
        PretrainParams(
            model="lenet",
            epochs=3,
            train_size=512,
            device="cpu",
            runs_dir=str(tmp_path_factory.mktemp("runs")),
        ).validated()
    )


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    monkeypatch.setattr(pruning, "latencies_ms", lambda models, *_: [1.0] * len(models))


def experiment(trained, folder, **parameters) -> Experiment:
    "An experiment of all steps."
    quick = dict(
        model="lenet",
        checkpoint=str(trained),
        train_size=192,
        batch_size=32,
        samples=64,
        epochs=4,
        ratio=0.5,
        device="cpu",
        runs_dir=str(folder),
    )
    e = Experiment(PruneParams(**quick | parameters).validated())
    try:
        e.baseline()
        e.prune()
        e.finetune()
        e.outcome = e.finish()
    finally:
        if hasattr(e, "run"):
            e.run.lock.release()  # as the system does for a process that is killed
    return e


def epochs_of(e) -> list:
    return [
        r["epoch"] for r in read_metrics(e.run.folder) if r["phase"] == "finetune" and "epoch" in r
    ]


def method_for(schedule) -> str:
    return "eigendamage" if schedule in ("one_shot", "iterative") else "l2"


@pytest.mark.parametrize("schedule", PRUNING)
def test_every_schedule_meets_its_budget_in_as_many_steps(trained, tmp_path, schedule):
    e = experiment(
        trained, tmp_path, schedule=schedule, method=method_for(schedule), **LAST.get(schedule, {})
    )
    assert e.outcome["pruned"]["params"] == pytest.approx(
        0.5 * e.outcome["baseline"]["params"], abs=0.01 * e.outcome["baseline"]["params"]
    )
    assert epochs_of(e) == [1, 2, 3, 4]
    again = load(e.run.folder, lambda: create_model("lenet", 10, 1, 8)).eval()
    assert max_relative_difference(again, e.result.model, DATA.example) == 0
    assert e.oracle(64).notna().measured.all()


@pytest.mark.parametrize(
    "method, of",
    [
        ("l1", "macs"),
        ("l1", "units"),
        ("taylor_gate", "params"),
        ("curvature_tucker", "macs"),
        ("eigendamage", "units"),
    ],
)
def test_rounds_meet_the_budget(trained, tmp_path, method, of):
    e = experiment(
        trained,
        tmp_path,
        schedule="iterative",
        method=method,
        of=of,
        rounds=3,
        regrow=0.25,
        ratio=0.6,
        epochs=5,
    )
    rows = [r for r in read_metrics(e.run.folder) if r["phase"] == "round"]
    assert [(r["round"], r["what"]) for r in rows] == [
        (1, "pruned"),
        (1, "trained"),
        (2, "regrown"),
        (2, "trained"),
        (3, "pruned"),
        (3, "trained"),
        (4, "regrown"),
        (4, "trained"),
        (5, "pruned"),
    ]
    params = [r["params"] for r in rows[::2]]
    assert params[0] > params[2] > params[4] and params[1] >= params[0] and params[3] >= params[2]
    if of != "units":
        assert e.outcome["pruned"][of] == pytest.approx(
            0.4 * e.outcome["baseline"][of], abs=0.01 * e.outcome["baseline"][of]
        )
    elif method == "l1":
        assert units_of(e.plan) == int(
            0.6 * sum(g.units for g in trace(e.model, DATA.example).groups)
        )
    assert e.result.difference < 1e-5 and epochs_of(e) == [1, 2, 3, 4, 5]
    small = e.plan.apply(e.model)  # replayed on the original: the same shapes
    assert {n: p.shape for n, p in small.named_parameters()} == {
        n: p.shape for n, p in e.result.model.named_parameters()
    }
    assert load_plan(e.run.path("plan.json")).as_dict() == e.plan.as_dict()


def test_rounds_have_the_ratios_that_are_asked_for(trained, tmp_path):
    e = experiment(
        trained, tmp_path, schedule="iterative", method="l1", of="params", round_ratios=".3 .5"
    )
    left = [
        r["params"] / e.outcome["baseline"]["params"]
        for r in read_metrics(e.run.folder)
        if r["phase"] == "round" and r["what"] == "pruned"
    ]
    assert left == pytest.approx([0.7, 0.35], abs=0.01)


class Killed(BaseException):
    "What stands for SIGKILL within a process."


CASES = [
    dict(schedule="iterative", rounds=2, regrow=0.5, epochs=3),
    dict(schedule="iterative", method="l1", rounds=2, regrow=0.5, epochs=3),
    dict(schedule="iterative", method="curvature_tucker", rounds=2, epochs=2, ema=0.9, distill=0.5),
    dict(schedule="gradual", method="taylor_gate", epochs=3, prune_every=4, ema=0.9),
    dict(schedule="soft_asymptotic", method="l2", epochs=3, prune_epochs=2),
    dict(schedule="soft", method="fpgm", epochs=2),
    dict(schedule="hard", method="l1", epochs=2),
    dict(schedule="regularized", method="taylor_gate", epochs=3, start="scratch"),
]

STRIDE = int(os.environ.get("KILL_STRIDE", 4))  # 1: at every write


@pytest.mark.parametrize(
    "start, case",
    [*enumerate(CASES)],
    ids=lambda c: " ".join(map(str, c.values())) if isinstance(c, dict) else "",
)
def test_killed_at_any_write(trained, tmp_path, monkeypatch, start, case):
    "Stopped before one file after another is put in its place, until a run gets through; then resumed: the same numbers, weights, files and lines."
    rename, left = os.replace, 10_000

    def replace(temporary, path):
        nonlocal left
        left -= 1
        if left >= 0:
            return rename(temporary, path)
        shutil.copy(temporary, str(temporary).replace(f".{os.getpid()}.", ".1."))
        raise Killed

    monkeypatch.setattr(os, "replace", replace)
    run = lambda name, **more: experiment(trained, tmp_path / name, **case, **more)
    whole = run("whole")
    files = lambda e: {f.relative_to(e.run.folder).as_posix() for f in e.run.folder.rglob("*")}
    lines = lambda e: [r for r in read_metrics(e.run.folder) if "seconds" not in r]
    weights = (whole.run.folder / "model.safetensors").read_bytes()
    for n in range(start % STRIDE, 100, STRIDE):
        left = n
        try:
            run(str(n))
            break
        except Killed:
            left = 10_000
        again = run(str(n), resume=True)
        assert numbers(again.outcome) == numbers(whole.outcome), f"killed at write {n}"
        assert (
            (again.run.folder / "model.safetensors").read_bytes() == weights
            and files(again) == files(whole)
            and lines(again) == lines(whole)
        ), f"killed at write {n}"
    assert n >= 8
    left = 10_000
    assert numbers(run("whole", resume=True).outcome) == numbers(
        whole.outcome
    )  # and one that is done


class Block(nn.Module):
    "Attention and a feed-forward part over a residual stream, with its normalisations."

    def __init__(self, width=16):
        super().__init__()
        self.embed, self.norm1, self.norm2, self.head = (
            nn.Linear(8, width),
            nn.LayerNorm(width),
            nn.LayerNorm(width),
            nn.Linear(width, 10),
        )
        self.attention, self.up, self.down = (
            nn.MultiheadAttention(width, 4, batch_first=True),
            nn.Linear(width, 24),
            nn.Linear(24, width),
        )

    def forward(self, x):
        x = self.embed(x[:, 0])  # rows of an image are tokens
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.down(self.up(self.norm2(x)).relu())).mean(1))


def network(name) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "normed":
            return nn.Sequential(
                nn.Conv2d(1, 8, 3, 2),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Conv2d(8, 12, 3, bias=False),
                nn.BatchNorm2d(12),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(12, 16),
                nn.ReLU(),
                nn.Linear(16, 10),
            )
        return Block() if name == "attention" else create_model(name, 10, 1, 8, seed=0)


class Spy:
    "Notes after every step what is masked and not zero, in weights and momentum."

    def after_step(self, optimizer):
        super().after_step(optimizer)
        own = dict(self.model.named_parameters())
        for n, mask in masks(self.model, self.removed).items():
            for t in (own[n], optimizer.state[own[n]]["momentum_buffer"]):
                self.loud = getattr(self, "loud", 0) + int((t[mask == 0] != 0).sum())
        self.before = getattr(self, "before", {}) | {
            len(getattr(self, "before", {})): {n: set(g.tolist()) for n, g in self.gone.items()}
        }


@pytest.mark.parametrize(
    "name, schedule",
    [
        ("resnet8", "hard"),
        ("resnet8", "gradual"),
        ("densenet40", "hard"),
        ("attention", "hard"),
        ("attention", "gradual"),
    ],
)
def test_masked_is_zero_whole_and_what_surgery_leaves(name, schedule):
    model, data = (
        network(name),
        load_data("digits", batch_size=16, train_size=48 if name == "densenet40" else 160),
    )
    kind = type("Spied", (Spy, PRUNERS[schedule]), {})
    pruner = kind(
        model,
        data.train.plain(32),
        "group_l2",
        lambda scores, ratio=0.5, of="units": allocate(scores, ratio, of),
        **dict(every=3) if schedule == "gradual" else {},
    )
    fit(model, data.train, 1, 0.1, weight_decay=0.1, momentum=0.9, pruner=pruner)
    assert pruner.loud == 0 and len(pruner.before) == len(data.train)
    steps = list(pruner.before.values())
    assert all(
        a.get(n, set()) <= b.get(n, set()) for a, b in zip(steps, steps[1:]) for n in a
    )  # nothing returns
    plan = pruner.result()[1]
    assert (
        units_of(plan) >= 8
        and max_relative_difference(plan.apply(model), plan.masked(model), data.example) < 1e-5
    )
    if not any(":input" in n for n in plan.removed):
        assert max_relative_difference(model, plan.masked(model), data.example) == 0


def test_training_masked_is_training_small():
    "The same gradients: after steps without momentum and decay, cut weights are those of the cut network, normalisation over channels and all."
    for name in ("resnet8", "attention"):
        model = network(name).double()
        batches = [
            (x.double(), y) for x, y in load_data("digits", batch_size=16, train_size=80).train
        ]
        pruner = PRUNERS["hard"](
            model, batches, "l2", lambda scores, ratio=0.5, of="units": allocate(scores, ratio, of)
        )
        pruner.start(model, 1, len(batches))
        pruner.stop()
        plan = pruner.plan
        small = plan.apply(model)
        fit(model, batches, 1, 0.05, schedule=lambda t: 1.0, weight_decay=1e-2, pruner=pruner)
        fit(small, batches, 1, 0.05, schedule=lambda t: 1.0, weight_decay=1e-2)
        cut = dict(plan.apply(model).named_parameters())
        for n, p in small.named_parameters():
            torch.testing.assert_close(p, cut[n], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("schedule", PRUNERS)
@pytest.mark.parametrize("method", CHANNELS)
def test_every_criterion_with_every_schedule(method, schedule):
    model = network("normed")
    pruner = PRUNERS[schedule](
        model,
        DATA.train.plain(32),
        method,
        lambda scores, ratio=0.3, of="units": allocate(scores, ratio, of),
        **dict(every=2) if schedule == "gradual" else {},
    )
    fit(model, load_data("digits", batch_size=16, train_size=64).train, 1, 0.01, pruner=pruner)
    scores, plan = pruner.result()
    assert units_of(plan) == int(0.3 * sum(g.group.units for g in scores.groups.values())) and set(
        plan.cuts
    ) <= set(scores.groups)
    assert max_relative_difference(plan.apply(model), plan.masked(model), DATA.example) < 1e-5


@pytest.mark.parametrize("start", ["scratch", "rewind"])
def test_controls_have_the_shape_and_other_weights(trained, tmp_path, start):
    usual, control = (
        experiment(
            trained,
            tmp_path / s,
            method="l1",
            start=s,
            epochs=0 if s == "finetune" else 1,
            lr=1e-12,
        )
        for s in ("finetune", start)
    )
    a, b = (dict(e.result.model.named_parameters()) for e in (usual, control))
    assert {n: p.shape for n, p in a.items()} == {
        n: p.shape for n, p in b.items()
    } and control.plan.as_dict() == usual.plan.as_dict()
    fresh = dict(
        control.plan.apply(pruning.new_model(control.params, control.data)).named_parameters()
    )
    for n in ("conv2.weight", "fc1.weight"):
        assert not torch.allclose(a[n], b[n], atol=1e-3)
        if start == "rewind":
            torch.testing.assert_close(b[n], fresh[n], rtol=0, atol=1e-6)


def test_rewinding_fitted_factors_is_refused(trained, tmp_path):
    with pytest.raises(UserError, match="Take start 'scratch'"):
        experiment(trained, tmp_path, method="curvature_tucker", start="rewind")
    assert not [*tmp_path.glob("*")]
