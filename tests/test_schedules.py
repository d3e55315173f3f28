"""Every schedule: budgets met, masked units exactly zero, as many steps, resumed to the same."""

import os
import shutil

import pytest
import torch
from test_prune import numbers
from torch import nn

from prune_nb.budgets.allocation import allocate
from prune_nb.core import UserError
from prune_nb.criteria.core import METHODS, collector_of
from prune_nb.data import load_data
from prune_nb.experiment import pruning
from prune_nb.experiment.baseline import pretrain
from prune_nb.experiment.params import PRUNING_SCHEDULES, PretrainParams, PruneParams
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
    """Return the run folder of a LeNet that was trained for a moment."""
    folder = str(tmp_path_factory.mktemp("runs"))
    quick = dict(model="lenet", epochs=3, train_size=512, device="cpu")
    return pretrain(PretrainParams(**quick, runs_dir=folder).validated())


pytestmark = pytest.mark.usefixtures("no_timing")


def experiment(trained, folder, **parameters) -> Experiment:
    """Run all steps of an experiment."""
    quick = dict(
        model="lenet",
        checkpoint=str(trained),
        train_size=192,
        batch_size=32,
        samples=64,
        epochs=4,
        ratio=0.5,
        device="cpu",
        round_to="1",
        refit=False,
        runtime="eager",
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
    rows = [r for r in read_metrics(e.run.folder) if r["phase"] == "finetune"]
    return [r["epoch"] for r in rows if "epoch" in r]


def rounds_of(e) -> list:
    return [r for r in read_metrics(e.run.folder) if r["phase"] == "round"]


def shapes(model) -> dict:
    return {n: p.shape for n, p in model.named_parameters()}


def allocation(ratio):
    """Return an allocation of units, as schedules ask for it."""

    def allocate_units(scores, ratio=ratio, cost="units"):
        return allocate(scores, ratio, cost)

    return allocate_units


def method_for(schedule) -> str:
    return "eigendamage" if schedule in ("one_shot", "iterative") else "l2"


@pytest.mark.parametrize("schedule", PRUNING_SCHEDULES)
def test_every_schedule_meets_its_budget_in_as_many_steps(trained, tmp_path, schedule):
    more = LAST.get(schedule, {})
    e = experiment(trained, tmp_path, schedule=schedule, method=method_for(schedule), **more)
    whole = e.outcome["baseline"]["params"]
    assert e.outcome["pruned"]["params"] == pytest.approx(0.5 * whole, abs=0.01 * whole)
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
    rows = rounds_of(e)
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
    assert params[0] > params[2] > params[4]
    assert params[1] >= params[0]
    assert params[3] >= params[2]
    if of != "units":
        whole = e.outcome["baseline"][of]
        assert e.outcome["pruned"][of] == pytest.approx(0.4 * whole, abs=0.01 * whole)
    elif method == "l1":
        total = sum(g.units for g in trace(e.model, DATA.example).groups)
        assert units_of(e.plan) == int(0.6 * total)
    assert e.result.difference < 1e-5
    assert epochs_of(e) == [1, 2, 3, 4, 5]
    assert shapes(e.plan.apply(e.model)) == shapes(e.result.model)  # replayed on the original
    assert load_plan(e.run.path("plan.json")).as_dict() == e.plan.as_dict()


def test_rounds_have_the_ratios_that_are_asked_for(trained, tmp_path):
    options = dict(schedule="iterative", method="l1", of="params", ratio=0.85)
    e = experiment(trained, tmp_path, **options, round_ratios=".3 .5")
    whole = e.outcome["baseline"]["params"]
    left = [r["params"] / whole for r in rounds_of(e) if r["what"] == "pruned"]
    assert left == pytest.approx([0.7, 0.35], abs=0.01)


class Killed(BaseException):
    """Stand for SIGKILL within a process."""


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


def weights(e) -> bytes:
    return (e.run.folder / "model.safetensors").read_bytes()


def files(e) -> set:
    return {f.relative_to(e.run.folder).as_posix() for f in e.run.folder.rglob("*")}


def lines(e) -> list:
    return [r for r in read_metrics(e.run.folder) if "seconds" not in r]


@pytest.mark.parametrize(
    "start, case",
    [*enumerate(CASES)],
    ids=lambda c: " ".join(map(str, c.values())) if isinstance(c, dict) else "",
)
def test_killed_at_any_write(trained, tmp_path, monkeypatch, start, case):
    """Stop before one file after another is put in its place, and resume.

    Numbers, weights, files and lines are the same as without an interruption.
    """
    rename, left = os.replace, 10_000

    def replace(temporary, path):
        nonlocal left
        left -= 1
        if left >= 0:
            return rename(temporary, path)
        leftover = str(temporary).replace(f".{os.getpid()}.", ".1.")
        if leftover != str(temporary):
            shutil.copy(temporary, leftover)
        raise Killed

    monkeypatch.setattr(os, "replace", replace)

    def run(name, **more):
        return experiment(trained, tmp_path / name, **case, **more)

    whole = run("whole")
    for n in range(start % STRIDE, 100, STRIDE):
        left = n
        try:
            run(str(n))
            break
        except Killed:
            left = 10_000
        again = run(str(n), resume=True)
        where = f"killed at write {n}"
        assert numbers(again.outcome) == numbers(whole.outcome), where
        assert weights(again) == weights(whole), where
        assert files(again) == files(whole), where
        assert lines(again) == lines(whole), where
    assert n >= 8
    left = 10_000
    done = run("whole", resume=True)
    assert numbers(done.outcome) == numbers(whole.outcome)


class Block(nn.Module):
    """Attention and a feed-forward part over a residual stream, with its normalisations."""

    def __init__(self, width=16):
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up = nn.Linear(width, 24)
        self.down = nn.Linear(24, width)

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
    """Count after every step what is masked and not zero, in weights and momentum."""

    nonzero = 0
    steps_seen = ()  # the masked units after every step: group -> units

    def after_step(self, optimizer):
        super().after_step(optimizer)
        own = dict(self.model.named_parameters())
        for name, mask in masks(self.model, self.removed).items():
            for t in (own[name], optimizer.state[own[name]]["momentum_buffer"]):
                self.nonzero += int((t[mask == 0] != 0).sum())
        now = {name: set(units.tolist()) for name, units in self.masked.items()}
        self.steps_seen = [*self.steps_seen, now]


def returned_units(before, after) -> list:
    """Return the groups of which a unit that was masked is not any more."""
    return [name for name in before if not before[name] <= after.get(name, set())]


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
    model = network(name)
    size = 48 if name == "densenet40" else 160
    data = load_data("digits", batch_size=16, train_size=size)
    kind = type("Spied", (Spy, PRUNERS[schedule]), {})
    options = dict(every=3) if schedule == "gradual" else {}
    pruner = kind(model, data.train.plain(32), "group_l2", allocation(0.5), **options)
    fit(model, data.train, 1, 0.1, weight_decay=0.1, momentum=0.9, pruner=pruner)
    assert pruner.nonzero == 0
    assert len(pruner.steps_seen) == len(data.train)
    for before, after in zip(pruner.steps_seen, pruner.steps_seen[1:]):
        assert not returned_units(before, after)
    plan = pruner.result()[1]
    assert units_of(plan) >= 8
    assert max_relative_difference(plan.apply(model), plan.masked(model), data.example) < 1e-5
    if not any(":input" in n for n in plan.removed):
        assert max_relative_difference(model, plan.masked(model), data.example) == 0


@pytest.mark.parametrize("name", ["resnet8", "attention"])
def test_training_masked_is_training_small(name):
    """After steps without momentum, cut weights are those of the cut network, norms and all."""
    model = network(name).double()
    train = load_data("digits", batch_size=16, train_size=80).train
    batches = [(x.double(), y) for x, y in train]
    pruner = PRUNERS["hard"](model, batches, "l2", allocation(0.5))
    pruner.start(model, 1, len(batches))
    pruner.stop()
    plan = pruner.plan
    small = plan.apply(model)

    def constant(t):
        return 1.0

    fit(model, batches, 1, 0.05, schedule=constant, weight_decay=1e-2, pruner=pruner)
    fit(small, batches, 1, 0.05, schedule=constant, weight_decay=1e-2)
    cut = dict(plan.apply(model).named_parameters())
    for n, p in small.named_parameters():
        torch.testing.assert_close(p, cut[n], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("schedule", PRUNERS)
@pytest.mark.parametrize("method", CHANNELS)
def test_every_criterion_with_every_schedule(method, schedule):
    model = network("normed")
    images = DATA.train.plain(32)
    options = dict(every=2) if schedule == "gradual" else {}
    pruner = PRUNERS[schedule](model, images, method, allocation(0.3), **options)
    fit(model, load_data("digits", batch_size=16, train_size=64).train, 1, 0.01, pruner=pruner)
    scores, plan = pruner.result()
    total = sum(g.group.units for g in scores.groups.values())
    assert units_of(plan) == int(0.3 * total)
    assert set(plan.cuts) <= set(scores.groups)
    assert max_relative_difference(plan.apply(model), plan.masked(model), DATA.example) < 1e-5


@pytest.mark.parametrize("start", ["scratch", "rewind"])
def test_controls_have_the_shape_and_other_weights(trained, tmp_path, start):
    same = dict(method="l1", lr=1e-12)
    usual = experiment(trained, tmp_path / "finetune", start="finetune", epochs=0, **same)
    control = experiment(trained, tmp_path / start, start=start, epochs=1, **same)
    a, b = (dict(e.result.model.named_parameters()) for e in (usual, control))
    assert shapes(usual.result.model) == shapes(control.result.model)
    assert control.plan.as_dict() == usual.plan.as_dict()
    initial = pruning.new_model(control.params, control.data)
    fresh = dict(control.plan.apply(initial).named_parameters())
    for n in ("conv2.weight", "fc1.weight"):
        assert not torch.allclose(a[n], b[n], atol=1e-3)
        if start == "rewind":
            torch.testing.assert_close(b[n], fresh[n], rtol=0, atol=1e-6)


def test_rewinding_fitted_factors_is_refused(trained, tmp_path):
    with pytest.raises(UserError, match="Take start 'scratch'"):
        experiment(trained, tmp_path, method="curvature_tucker", start="rewind")
    assert not [*tmp_path.glob("*")]
