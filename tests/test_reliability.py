"""Kills, locks, damaged files, foreign folders: nothing half-written, nothing run unasked."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
from filelock import Timeout
from torch import nn

from prune_nb import runs
from prune_nb.api import prune
from prune_nb.budgets.allocation import allocate
from prune_nb.core import Progress, UserError, save_json, save_tensors
from prune_nb.criteria.core import METHODS, load_criteria, load_scores, save_scores, score
from prune_nb.curvature.passes import Checkpoint
from prune_nb.dashboard.runs import Runs, details, scan
from prune_nb.dashboard.start import ExploreParams, open_network
from prune_nb.data import load_data
from prune_nb.experiment import baseline, pruning
from prune_nb.experiment.baseline import new_model, pretrain
from prune_nb.experiment.oracle import OracleParams
from prune_nb.experiment.params import PretrainParams, PruneParams
from prune_nb.experiment.pruning import Experiment
from prune_nb.experiment.sweep import SweepParams, sweep
from prune_nb.recovery.schedules import PRUNERS
from prune_nb.runs import Run, log, open_run, read_metrics, read_result, runs_table, time_phase
from prune_nb.surgery.export import export, load, load_weights, save
from prune_nb.surgery.plan import load_plan, parse_plan
from prune_nb.train import evaluate

FORK = multiprocessing.get_context("fork")
QUICK = dict(model="lenet", train_size=192, batch_size=32, samples=64, device="cpu")
pytestmark = pytest.mark.usefixtures("no_timing")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Return the run folder of a LeNet that was trained for a moment."""
    quick = dict(model="lenet", epochs=1, train_size=192, device="cpu")
    folder = tmp_path_factory.mktemp("trained")
    return pretrain(PretrainParams(**quick, runs_dir=str(folder)).validated())


def parameters(folder, **more) -> PruneParams:
    same = QUICK | dict(ratio=0.5, epochs=1, runs_dir=str(folder), round_to="1", runtime="eager")
    return PruneParams(**same | more).validated()


def run_all(params: PruneParams) -> Experiment:
    """Run all steps of an experiment."""
    e = Experiment(params)
    e.baseline()
    e.prune()
    e.finetune()
    e.outcome = e.finish()
    return e


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * 36, 3)).eval()


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


# ---- metrics ----------------------------------------------------------------------------------


def test_cut_line_is_removed_when_the_run_is_claimed(tmp_path):
    run = open_run(tmp_path, "a", {})
    log(run, "finetune", epoch=1)
    run.close()
    with open(run.path("metrics.jsonl"), "a") as f:
        f.write('{"phase": "finetune", "ep')
    run = open_run(tmp_path, "a", {}, resume=True)
    log(run, "finetune", epoch=2)
    assert [r["epoch"] for r in read_metrics(run.folder)] == [1, 2]
    run.close()


def test_damaged_line_is_refused_in_words(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"phase": "a"}\n{"pha{"phase": "b"}\n')
    with pytest.raises(UserError, match=r"Line 2 of .* is damaged"):
        read_metrics(tmp_path)


def test_phase_done_again_keeps_its_seconds(tmp_path):
    run = open_run(tmp_path, "a", {})
    for _ in range(2):
        with time_phase(run, "surgery"):
            pass
    with time_phase(run, "surgery", round=2):
        pass
    assert [r.get("round") for r in read_metrics(run.folder)] == [None, 2]
    run.close()


# ---- locks ------------------------------------------------------------------------------------


def test_interrupted_training_does_not_hold_its_lock(tmp_path, monkeypatch):
    p = PretrainParams(model="lenet", epochs=1, train_size=64, runs_dir=str(tmp_path)).validated()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(baseline, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt) as kept:  # as a notebook keeps the traceback
        pretrain(p)
    monkeypatch.undo()
    assert (pretrain(p) / "result.json").exists() and kept


def test_interrupted_step_can_be_called_again(trained, tmp_path, monkeypatch):
    e = Experiment(parameters(tmp_path, checkpoint=str(trained)))
    e.baseline()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pruning, "score", interrupted)
    with pytest.raises(KeyboardInterrupt) as kept:
        e.prune()
    assert kept and not e.run.has(".lock")
    monkeypatch.undo()
    e.prune()
    assert e.run.lock.is_locked
    e.close()
    assert not e.run.has(".lock")


def open_and_close(folder: Path, seconds: float, doubles):
    """Open and close a run; count how often another process holds it as well."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        run = Run(folder / "a", {}, new=False)
        try:
            run.lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            (folder / "held").mkdir()
        except FileExistsError:
            doubles.value += 1
        else:
            (folder / "held").rmdir()
        run.close()


def test_lock_is_exclusive(tmp_path):
    open_run(tmp_path, "a", {}).close()
    doubles = FORK.Value("i", 0)
    work = [FORK.Process(target=open_and_close, args=(tmp_path, 1.0, doubles)) for _ in range(4)]
    for process in work:
        process.start()
    for process in work:
        process.join()
    assert doubles.value == 0


def hold_and_finish(p: PretrainParams, held):
    """Hold the run of a baseline for a moment, as another process that trains it."""
    run = open_run(p.runs_folder(), p.id, p.identity(), resume=True, unique=False)
    held.set()
    time.sleep(1.5)
    save_tensors(
        run.path("model.safetensors"), new_model(p, baseline.experiment_data(p)).state_dict()
    )
    save_json(run.path("result.json"), dict(accuracy=0.5))
    run.close()


def test_baseline_of_another_process_is_waited_for(tmp_path, capsys):
    p = PretrainParams(model="lenet", epochs=1, train_size=64, runs_dir=str(tmp_path)).validated()
    held = FORK.Event()
    other = FORK.Process(target=hold_and_finish, args=(p, held))
    other.start()
    held.wait()
    folder = pretrain(p)
    other.join()
    assert json.loads((folder / "result.json").read_text()) == dict(accuracy=0.5)
    assert "Waiting for run" in capsys.readouterr().err
    assert not (folder / ".lock").exists()


def test_refusal_leaves_nothing(trained, tmp_path):
    p = parameters(tmp_path / "runs", checkpoint=str(trained), ratio=0.9999)
    e = Experiment(p)
    e.baseline()
    with pytest.raises(UserError, match="Cannot remove"):
        e.prune()
    assert not [*(tmp_path / "runs").iterdir()]
    with pytest.raises(UserError, match="Begin with its first step"):
        e.prune()


# ---- rounds and schedules ---------------------------------------------------------------------


def test_rounds_that_cut_nothing_and_do_not_train(trained, tmp_path):
    """The plan holds what earlier rounds have cut, so the network loads."""
    rounds = dict(method="l1", schedule="iterative", ratio=0.05, rounds=3, epochs=0)
    p = parameters(tmp_path, checkpoint=str(trained), **rounds)
    e = run_all(p)
    found = load(e.run.folder, lambda: new_model(p, e.data))
    assert sum(t.numel() for t in found.parameters()) == e.outcome["finetuned"]["params"]
    assert load_plan(e.run.path("plan.json")).cuts
    assert not [*e.run.folder.rglob("training.safetensors")]


def test_guard_that_is_never_met_prunes_nothing(trained, tmp_path):
    p = parameters(
        tmp_path, checkpoint=str(trained), method="taylor_gate", schedule="gradual", epochs=2,
        prune_every=2, loss_guard=1e-9,
    )  # fmt: skip
    outcome = run_all(p).outcome
    assert outcome["finetuned"]["params"] == outcome["baseline"]["params"]


@pytest.mark.parametrize("schedule", PRUNERS)
def test_resumed_schedule_has_the_same_scores(schedule, tmp_path):
    data = load_data("digits", batch_size=32, train_size=64)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.Flatten())
    model.append(nn.Linear(8 * 16, 10))
    pruner = PRUNERS[schedule](model, data.train, "taylor_gate", half_plan, samples=64)
    pruner.start(model, 2, 2)
    pruner.scores = pruner.scores or pruner.current_scores()
    state = {k: t.clone() for k, t in pruner.state().items()}
    again = PRUNERS[schedule](model, data.train, "taylor_gate", half_plan, samples=64)
    again.start(model, 2, 2, state)
    for p, name in ((pruner, "one"), (again, "two")):
        save_scores(p.scores, tmp_path / name)
        p.stop()
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def half_plan(scores, ratio=0.5, cost="units"):
    return allocate(scores, ratio, cost)


# ---- identity ---------------------------------------------------------------------------------


def test_another_checkpoint_of_the_same_name_is_another_run(trained, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes((trained / "model.safetensors").read_bytes())
    p = parameters(tmp_path, checkpoint=str(path))
    first = p.id
    assert p.id == first
    data = baseline.experiment_data(p)
    save_tensors(path, new_model(p, data).state_dict())
    assert p.id != first
    path.unlink()
    with pytest.raises(UserError, match="Cannot read the checkpoint"):
        p.id  # noqa: B018


def test_sweep_sees_another_checkpoint(trained, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes((trained / "model.safetensors").read_bytes())
    options = QUICK | dict(
        methods="l1", epochs=0, checkpoint=str(path), runs_dir=str(tmp_path / "r")
    )
    p = SweepParams(**options).validated()
    before = sweep(p)
    save_tensors(path, new_model(p, baseline.experiment_data(p)).state_dict())
    after = sweep(p)
    assert before["id"][0] != after["id"][0]
    assert before["baseline accuracy"][0] != after["baseline accuracy"][0]


CRITERION = """
from pathlib import Path
from prune_nb.criteria.core import register
from prune_nb.criteria.magnitude import L1

@register
class Foreign(L1):
    name, ids = "foreign", ()

Path({marker!r}).touch()
"""


@pytest.fixture
def foreign(tmp_path):
    """Return the folder of a run with custom criteria, and the file that their code makes."""
    marker, code = tmp_path / "executed", tmp_path / "foreign.py"
    code.write_text(CRITERION.format(marker=str(marker)))
    p = parameters(tmp_path / "runs", method="foreign", criteria=str(code), pretrain_epochs=0)
    open_run(p.runs_folder(), p.id, p.identity()).close()
    folder = p.runs_folder() / p.id
    del METHODS["foreign"]
    marker.unlink()
    yield folder, marker, code
    METHODS.pop("foreign", None)


def test_opening_a_run_executes_nothing_unasked(foreign):
    folder, marker, code = foreign
    with pytest.raises(UserError, match="if you trust that code, give criteria="):
        open_network(ExploreParams(run=str(folder), device="cpu").validated())
    with pytest.raises(UserError, match="if you trust that code, give criteria="):
        open_network(ExploreParams(run=str(folder), device="cpu", runs_dir=str(folder.parent)))
    assert not marker.exists()
    asked = ExploreParams(run=str(folder), criteria=str(code), device="cpu").validated()
    assert asked.experiment().method == "foreign" and marker.exists()


def test_module_without_criteria_is_refused():
    with pytest.raises(UserError, match="'os' registers no criterion"):
        load_criteria("os")
    load_criteria("prune_nb.criteria.magnitude")


# ---- damaged files ----------------------------------------------------------------------------


def coo(t):
    return t.to_sparse()


def quantised(t):
    return torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)


def with_nan(t):
    t = t.clone()
    t.view(-1)[0] = torch.nan
    return t


UNUSABLE = dict(
    sparse=coo,
    meta=lambda t: t.to("meta"),
    int8=lambda t: t.to(torch.int8),
    bool=lambda t: t > 0,
    complex=lambda t: t.to(torch.complex64),
    nan=with_nan,
    overflow=lambda t: t.double() + 1e300,
)


@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_weights_change_nothing(kind, tmp_path):
    model = network()
    state = {k: t + 1 for k, t in model.state_dict().items()}
    state["3.weight"] = UNUSABLE[kind](state["3.weight"])
    torch.save(state, tmp_path / "weights.pth")
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(UserError, match=r"3\.weight"):
        load_weights(model, tmp_path / "weights.pth")
    for k, t in model.state_dict().items():
        assert torch.equal(t, before[k])


def test_narrower_weights_are_taken(tmp_path):
    model = network()
    halved = {k: t.half() if t.is_floating_point() else t for k, t in model.state_dict().items()}
    torch.save(halved, tmp_path / "weights.pth")
    load_weights(model, tmp_path / "weights.pth")
    assert torch.equal(model[0].weight, halved["0.weight"].float())


def set_at(d: dict, path: str, value):
    *names, last = path.split("|")
    for name in names:
        d = d[name]
    d[last] = value


WRONG_IN_CUTS = {
    "method": 3,
    "layers": [],
    "cuts|G|units": 10**9,
    "cuts|G|predicted": "a",
    "cuts|G|members": {"0.weight": {"-1": [0, 1, 1, 1]}},
    "cuts|G|members|0.weight": {"0": [0, 1, 10**9, 1]},
    "cuts|G": 5,
    "updates": {"0": 3},
}


def plan_with(path: str, value, result) -> dict:
    """Return a plan as JSON with another value, its checksums recomputed."""
    d = json.loads(json.dumps(result.plan.as_dict()))
    set_at(d, path.replace("G", next(iter(d["cuts"]), "")), value)
    for fields in d["cuts"].values() if isinstance(d["cuts"], dict) else ():
        if isinstance(fields, dict):
            fields["checksum"] = ""
    return d


@pytest.mark.parametrize("path", WRONG_IN_CUTS)
def test_wrong_values_of_a_plan_are_refused(path):
    result = prune(network(), IMAGES, "l1", 0.5, "units", progress=False)
    with pytest.raises(UserError, match="plan"):
        parse_plan(plan_with(path, WRONG_IN_CUTS[path], result))


def test_plan_that_lowers_no_size_is_refused():
    model = network()
    result = prune(model, IMAGES, "l1", 0.5, "units", progress=False)
    members = next(iter(result.plan.cuts.values())).members
    d = plan_with("cuts|G|members", members | {"0:training": {"0": [0, 1, 1, 1]}}, result)
    with pytest.raises(UserError, match="no such size"):
        parse_plan(d).apply(model)


def test_ranks_have_a_bound():
    layer = dict(type="replace_kernel", form="both", ranks=[10**9, 10**9], predicted=0.0)
    layer |= dict(weight=[4, 3, 3, 3])
    d = dict(format="prune_nb.plan/2", method="a", model="", layers={"0": layer})
    with pytest.raises(UserError, match="ranks must be at most 36"):
        parse_plan(d)


BAD_RUNS = dict(
    deep=("params.json", "[" * 100_000),
    huge=("result.json", '{"accuracy": 1' + "0" * 400 + ', "params": 1, "macs": 1, "seconds": {}}'),
    digits=("params.json", '{"params": {"seed": 1' + "0" * 5000 + "}}"),
    names=("params.json", '{"params": {"method": ["l1"], "dataset": ["digits"], "model": {}}}'),
    metrics=("metrics.jsonl", '[1, 2]\n"a"\n'),
)


def test_bad_run_folders_hide_no_other(trained, tmp_path):
    for name, (file, text) in BAD_RUNS.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "params.json").write_text('{"params": {"model": "lenet", "dataset": "digits"}}')
        (folder / file).write_text(text)
    good = run_all(parameters(tmp_path, checkpoint=str(trained), epochs=0))
    view = Runs(str(tmp_path))
    assert view.error is None
    assert view.frame.state[good.run.id] == "finished"
    table = scan(tmp_path)
    for name in BAD_RUNS:
        assert table.state[name].startswith("broken"), table.state[name]
        details(tmp_path / name)
    view.table.opened = "huge"
    assert view.error is None
    (tmp_path / "names" / "result.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"result\.json.* is damaged"):
        read_result(tmp_path / "names")
    with pytest.warns(UserWarning, match="damaged"):
        assert runs_table(tmp_path)["id"].tolist() == [good.run.id]


def test_damaged_scores_are_refused(tmp_path):
    scores, path = score(network(), IMAGES, "l1"), tmp_path / "scores.safetensors"
    name = next(iter(scores.groups))
    scores.groups[name].saliency[0] = torch.nan
    save_scores(scores, path)
    with pytest.raises(UserError, match="not numbers"):
        load_scores(path)
    meta = dict(scores=dict(method="l1"), layers={}, groups={"a": [3, {}]})
    save_tensors(path, {"b": torch.zeros(3)}, **meta)
    with pytest.raises(UserError, match="are damaged"):
        load_scores(path)


def test_damaged_checkpoint_of_a_pass_is_refused(tmp_path):
    path = tmp_path / "pass.safetensors"
    save_tensors(path, {"other": torch.zeros(1)}, settings={})
    with pytest.raises(UserError, match="is damaged"):
        Checkpoint(path, {}, torch.Generator(), {}).load("cpu")


# ---- nothing behind the caller's back ---------------------------------------------------------


class Interrupted(nn.Sequential):
    """Stop in the middle of a change of mode."""

    def train(self, mode: bool = True):
        """Change the mode of the first module, and stop."""
        self[0].train(mode)
        if not mode:
            raise KeyboardInterrupt
        return self


def test_interrupted_evaluation_restores_modes():
    model = Interrupted(nn.Linear(2, 2), nn.Linear(2, 2)).train()
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, [(torch.zeros(1, 2), torch.zeros(1, dtype=int))])
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("method, cost", [("curvature_tucker", "params"), ("l1", "latency")])
def test_random_numbers_and_folder_are_untouched(method, cost, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, data = network(), [(IMAGES, torch.tensor([0, 1, 2, 0]))]
    ratio = 0.2 if cost == "params" else 0.01
    torch.manual_seed(5)
    before = torch.get_rng_state()
    result = prune(model, data, method, ratio, cost, progress=False)
    result.plan.apply(model)
    result.plan.empty(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not [*tmp_path.iterdir()]


def test_save_killed_between_its_files_loads(tmp_path, monkeypatch):
    x = IMAGES
    old, new = (prune(network(), x, "l1", r, "units", progress=False).model for r in (0.3, 0.6))
    rename = os.replace
    for allowed in range(4):
        folder, left = tmp_path / str(allowed), allowed
        save(old, folder)

        def replace(temporary, path):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            rename(temporary, path)

        monkeypatch.setattr(os, "replace", replace)
        try:
            save(new, folder)
        except KeyboardInterrupt:
            pass
        monkeypatch.undo()
        found = load(folder, network).eval()
        assert any(found(x).equal(m(x)) for m in (old, new)), allowed
    save(new, folder)
    assert {f.name for f in folder.iterdir()} == {"model.safetensors", "plan.json"}


def test_export_to_a_file_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "model.pt2").mkdir()
    monkeypatch.setattr(torch.export, "export", None)  # not reached
    with pytest.raises(UserError, match="It is a folder"):
        export(network(), tmp_path / "model.pt2", IMAGES)


@pytest.mark.parametrize("cls", [SweepParams, OracleParams])
def test_table_that_cannot_be_written_is_refused_at_once(cls, tmp_path):
    with pytest.raises(UserError, match="Invalid table"):
        cls(table=str(tmp_path / "missing" / "table.csv")).validated()
    with pytest.raises(UserError, match="Invalid table"):
        cls(table=str(tmp_path)).validated()
    cls(table=str(tmp_path / "table.csv")).validated()
    assert not [*tmp_path.iterdir()]


def test_pages_escape_what_files_say(tmp_path):
    run = open_run(tmp_path, "<b>", {})
    assert "<b>&lt;b&gt;</b>" in run._repr_html_()
    run.close()
    folder = tmp_path / "javascript:alert(1)"
    folder.mkdir()
    (folder / "params.json").write_text('{"params": {"model": "<img>", "dataset": "digits"}}')
    (folder / "notebook.ipynb").touch()
    cwd = os.getcwd()
    try:
        os.chdir(tmp_path)
        page = details(folder)
    finally:
        os.chdir(cwd)
    assert 'href="./javascript%3Aalert%281%29/notebook.ipynb"' in page and "<img>" not in page
    shown = []
    bar = Progress([1], "<script>")
    bar.done, bar.handle = 1, type("Handle", (), dict(update=lambda s, d, raw: shown.append(d)))()
    bar._display(True)
    assert "<script>" not in shown[0]["text/html"]


# ---- resumed runs -----------------------------------------------------------------------------


def test_killed_copy_is_resumed(tmp_path):
    first = open_run(tmp_path, "a", {"seed": 0})
    save_json(first.path("result.json"), {})
    second = open_run(tmp_path, "a", {"seed": 0})
    for run in (first, second):
        run.close()
    other = open_run(tmp_path, "a-3", {"seed": 1})
    other.close()
    resumed = open_run(tmp_path, "a", {"seed": 0}, resume=True)
    assert resumed.id == "a-2"
    save_json(resumed.path("result.json"), {})
    resumed.close()
    resumed = open_run(tmp_path, "a", {"seed": 0}, resume=True)
    assert resumed.id == "a"
    resumed.close()


def contents(folder: Path) -> dict:
    return {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_finished_run_is_not_changed(trained, tmp_path):
    e = run_all(parameters(tmp_path, checkpoint=str(trained)))
    before = contents(tmp_path)
    again = run_all(parameters(tmp_path, checkpoint=str(trained), resume=True))
    assert contents(tmp_path) == before
    assert again.outcome == json.loads(e.run.path("result.json").read_text())


def test_resumed_run_has_its_threads(tmp_path):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        open_run(tmp_path, "a", {}).close()
        torch.set_num_threads(1)
        open_run(tmp_path, "a", {}, resume=True).close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_more_samples_than_images_are_refused(tmp_path):
    with pytest.raises(UserError, match="Invalid samples 193. Valid: 1 to 192"):
        Experiment(parameters(tmp_path, samples=193))
    Experiment(PruneParams(model="lenet", train_size=64, runs_dir=str(tmp_path)).validated())


def test_sweep_sets_fisher_where_it_means_something():
    p = SweepParams(methods="l1 eigendamage", fisher="exact").validated()
    assert [e.fisher for e in p.experiments()] == ["mc", "exact"]
    with pytest.raises(UserError, match="fisher 'exact' needs a method"):
        SweepParams(methods="l1 l2", fisher="exact").validated()


# ---- kills ------------------------------------------------------------------------------------


class Killer:
    """End this process, as a SIGKILL would, before the n-th change of a file or folder."""

    def __init__(self, monkeypatch, n: int):
        self.left = n
        for name in ("replace", "unlink", "mkdir", "rmdir"):
            monkeypatch.setattr(os, name, self.before(getattr(os, name)))
        monkeypatch.setattr(runs, "open", self.open, raising=False)

    def count(self, path) -> bool:
        """Return whether it is time."""
        if str(path).endswith(".tmp"):
            return False
        self.left -= 1
        return self.left < 0

    def before(self, change):
        """Return `change`, which ends the process when it is time."""

        def changed(*paths, **options):
            is_change = change.__name__ != "unlink" or Path(paths[0]).exists()
            if is_change and self.count(paths[0] if change.__name__ == "mkdir" else paths[-1]):
                os._exit(9)
            return change(*paths, **options)

        return changed

    def open(self, path, mode="r", **options):
        """Open a file; when it is time, write half of a line to it."""
        opened = open(path, mode, **options)
        if mode == "a" and self.count(path):
            opened.write('{"phase": "fin')
            opened.flush()
            os._exit(9)
        return opened


def run_and_die(params: PruneParams, n: int):
    """Run an experiment up to the n-th change."""
    Killer(pytest.MonkeyPatch(), n)
    run_all(params)
    os._exit(0)


def died(params: PruneParams, n: int) -> bool:
    """Return whether the process of an experiment was ended at the n-th change."""
    process = FORK.Process(target=run_and_die, args=(params, n))
    process.start()
    process.join()
    assert process.exitcode in (0, 9)
    return process.exitcode == 9


def plain(path: Path) -> object:
    """Return what a file holds, without times."""
    if path.name == "metrics.jsonl":
        rows = map(json.loads, path.read_text().splitlines())
        return [r | dict(seconds=0) if "seconds" in r else r for r in rows]
    if path.suffix != ".json":
        return path.read_bytes()
    found = json.loads(path.read_text())
    return {k: v for k, v in found.items() if k not in ("created", "seconds")}


def folder_state(folder: Path) -> dict:
    """Return name -> content of all that is below a folder; of folders: None."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = plain(path) if path.is_file() else None
    return found


KILLED = dict(
    iterative=dict(schedule="iterative", method="l1", rounds=2, epochs=2),
    one_shot=dict(method="curvature_tucker"),
    regrow=dict(schedule="iterative", method="l1", rounds=2, regrow=0.25, epochs=3),
    gradual=dict(schedule="gradual", method="taylor_gate", prune_every=2, epochs=3),
    soft=dict(schedule="soft", method="fpgm", epochs=2),
    soft_asymptotic=dict(schedule="soft_asymptotic", method="l2", epochs=3),
    hard=dict(schedule="hard", method="taylor_gate", epochs=2),
    regularized=dict(schedule="regularized", method="l1", epochs=3),
    similarity=dict(method="redundancy_graph"),
)
WANTED = os.environ.get("KILLED", "iterative").split()  # names of KILLED
STRIDE = int(os.environ.get("KILL_STRIDE", 1))  # 1: at every change


@pytest.mark.parametrize("case", WANTED)
def test_folder_after_a_kill_is_as_without(case, tmp_path):
    """Kill at changes of files and folders, resume, and compare the folder of all runs."""

    def params(name, **more):
        return parameters(tmp_path / name, **KILLED[case] | more, pretrain_epochs=1)

    run_all(params("whole"))
    whole = folder_state(tmp_path / "whole")
    n = 0
    while died(params(str(n)), n):
        run_all(params(str(n), resume=True))
        found = folder_state(tmp_path / str(n))
        assert found.keys() == whole.keys(), f"killed at {n}"
        for name, content in whole.items():
            assert found[name] == content, f"{name}, killed at {n}"
        n += STRIDE
    assert n > 20
