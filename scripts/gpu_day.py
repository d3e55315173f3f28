"""Train, prune and time on one GPU: python scripts/gpu_day.py OUT_DIR [--data DIR] [--tiny]

The work is cut into stages, each with a result file OUT_DIR/STAGE.json. A stage whose result is
there is skipped; one that was killed continues from its training state in OUT_DIR/STAGE; one that
failed leaves its traceback in its result file, stops no other, and is tried again by the same
command. DIR holds `cifar-10-batches-py` and `cifar-100-python`. `--tiny` runs every stage on fake
images, small enough for a CPU.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from prune_nb.api import apply_plan, prune  # noqa: E402
from prune_nb.budgets.allocation import allocate  # noqa: E402
from prune_nb.core import derived_seed, load_tensors, save_json, save_tensors  # noqa: E402
from prune_nb.costs.runtimes import make_ready, time_in_turns  # noqa: E402
from prune_nb.criteria.core import score  # noqa: E402
from prune_nb.curvature.ekfac import layer_bases, second_moments  # noqa: E402
from prune_nb.curvature.kfac import collect  # noqa: E402
from prune_nb.data import dataset_info, load_data  # noqa: E402
from prune_nb.models import create_model  # noqa: E402
from prune_nb.profile import count_macs, count_params, device_of  # noqa: E402
from prune_nb.recovery.refit import refit  # noqa: E402
from prune_nb.runs import log, open_run, phase_seconds, rewind, time_phase, versions  # noqa: E402
from prune_nb.surgery.export import load, load_weights, save  # noqa: E402
from prune_nb.surgery.verify import exact_float32  # noqa: E402
from prune_nb.train import evaluate, fit, refresh_bn, training_loss  # noqa: E402


@dataclass(frozen=True)
class Baseline:
    """Hold what a dense network is trained with."""

    model: str
    dataset: str
    epochs: int
    lr: float
    batch_size: int
    lr_schedule: str = "one_cycle"
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    train_size: int | None = None
    seed: int = 0
    needs = ()

    def run(self, job):
        """Train the network and report it on the test images."""
        return train_baseline(self, job)


@dataclass(frozen=True)
class Pruning:
    """Hold what is removed of the network of another stage, and how it is fine-tuned."""

    source: str
    method: str
    epochs: int
    ratio: float = 0.9
    of: str = "params"
    refit: bool = False
    samples: int = 4096
    refit_samples: int = 2048
    lr: float = 0.2
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    seed: int = 0

    @property
    def needs(self):
        """Name the stage that has to be done before."""
        return (self.source,)

    def run(self, job):
        """Prune, fine-tune and report the network."""
        return prune_baseline(self, job)


@dataclass(frozen=True)
class Check:
    """Hold the networks on which a GPU is compared with the CPU."""

    models: tuple = ("resnet32x4", "torchvision/resnet50")
    image_size: int = 64
    methods: tuple = ("l1", "eigendamage", "improved_eigendamage", "curvature_tucker")
    wide_methods: tuple = ("l1", "eigendamage")
    needs = ()

    def run(self, job):
        """Compare scores, plans and pruned networks of both devices."""
        return compare_devices(self, job)


@dataclass(frozen=True)
class Timing:
    """Hold what is timed once nothing else runs."""

    kfac_models: tuple = ("resnet32x4", "vgg19")
    images: int = 512
    batch: int = 128
    repeats: int = 50
    needs = ()

    def run(self, job):
        """Time dense and pruned networks, and a pass of K-FAC."""
        return time_everything(self, job)


DEEP = "resnet32x4-cifar100"
WIDE = "vgg19-cifar100"
STAGES = {
    DEEP: Baseline(
        "resnet32x4", "cifar100", epochs=60, lr=0.4, batch_size=512, label_smoothing=0.1
    ),
    "resnet20-cifar10-strong": Baseline("resnet20", "cifar10", epochs=300, lr=0.2, batch_size=256),
    "vgg16x0.25-cifar10": Baseline(
        "vgg16x0.25", "cifar10", epochs=300, lr=0.1, batch_size=256, label_smoothing=0.1
    ),
    "check": Check(),
    f"{DEEP}-eigendamage": Pruning(DEEP, "eigendamage", epochs=24),
    f"{DEEP}-improved_eigendamage": Pruning(DEEP, "improved_eigendamage", epochs=24),
    f"{DEEP}-curvature_tucker": Pruning(DEEP, "curvature_tucker", epochs=24),
    f"{DEEP}-curvature_tucker-refit": Pruning(DEEP, "curvature_tucker", epochs=24, refit=True),
    WIDE: Baseline("vgg19", "cifar100", epochs=30, lr=0.2, batch_size=512, label_smoothing=0.1),
    f"{WIDE}-curvature_tucker": Pruning(
        WIDE, "curvature_tucker", epochs=16, ratio=1 - 1 / 8.9, of="macs"
    ),
    "timing": Timing(),
}
TINY_MODELS = {
    "resnet20": "resnet8x0.5",
    "vgg16x0.25": "vgg16x0.0625",
    "resnet32x4": "resnet8x0.5",
    "vgg19": "vgg16x0.125",
    "torchvision/resnet50": "torchvision/squeezenet1_1",
}
LAST = "timing"
COLUMNS = [
    "model", "dataset", "method", "refit", "ratio", "of", "seed", "epochs",
    "params", "macs", "baseline accuracy", "pruned accuracy", "finetuned accuracy",
    "baseline val accuracy", "finetuned val accuracy", "baseline latency_ms", "latency_ms",
    "baseline latency_ms bf16", "latency_ms bf16", "training seconds",
]  # fmt: skip


def tiny(stage):
    """Return the same stage in a size that a CPU finishes in seconds."""
    if isinstance(stage, Baseline):
        small = dict(model=TINY_MODELS[stage.model], dataset="fake", epochs=2, batch_size=64)
        return replace(stage, lr=0.05, **small)
    if isinstance(stage, Pruning):
        return replace(stage, epochs=1, ratio=0.5, samples=32, refit_samples=32, lr=0.01)
    models = stage.models if isinstance(stage, Check) else stage.kfac_models
    models = tuple(TINY_MODELS[m] for m in models)
    if isinstance(stage, Check):
        return replace(stage, models=models, image_size=32)
    return replace(stage, kfac_models=models, images=32, batch=8, repeats=2)


@dataclass
class Job:
    """Hold what a stage has to know besides its own settings."""

    name: str
    out: Path
    data_dir: str
    tiny: bool

    @property
    def device(self):
        """Name the device that all stages run on."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def folder(self):
        """Return the folder of the weights and training states of the stage."""
        return self.out / self.name

    def stage(self, name):
        """Return the settings of a stage."""
        return tiny(STAGES[name]) if self.tiny else STAGES[name]

    def data(self, baseline, batch_size=None):
        """Load the data set that a baseline is trained on."""
        size = batch_size or baseline.batch_size
        folder, seed = self.data_dir, baseline.seed
        return load_data(baseline.dataset, folder, baseline.train_size, size, seed, self.device)

    def model(self, baseline):
        """Make the untrained network of a baseline."""
        info = dataset_info(baseline.dataset)
        seed = derived_seed(baseline.seed, "init")
        model = create_model(
            baseline.model, info.classes, info.channels, info.image_size, seed=seed
        )
        return model.to(self.device)

    def dense(self, name):
        """Load the trained network of a stage."""
        return load_weights(self.model(self.stage(name)), self.out / name).eval()


def card(device):
    """Name the processor that a device is."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def halved(model):
    """Return the state of a network with its floating-point tensors in half precision."""
    state = model.state_dict()
    return {k: v.half() if v.is_floating_point() else v for k, v in state.items()}


def measured(model, data):
    """Report accuracies, parameters and multiply-accumulates of a network."""
    val, test = evaluate(model, data.val), evaluate(model, data.test)
    costs = dict(params=count_params(model), macs=count_macs(model, data.example))
    return dict(**test, val_accuracy=val["accuracy"], **costs)


def train(job, run, phase, model, data, stage, loss):
    """Train by the settings of a stage, on from the state that its folder holds."""
    state = run.path("training.safetensors")
    done = len(load_tensors(state)[1]["history"]) if state.exists() else 0
    rewind(run, phase, done)
    schedule = getattr(stage, "lr_schedule", "one_cycle")
    with time_phase(run, phase):
        fit(
            model, data.train, stage.epochs, stage.lr, data.val, schedule, stage.weight_decay,
            seed=stage.seed, state=state, loss=loss, label=job.name,
            on_epoch=lambda history: log(run, phase, **history[-1]),
        )  # fmt: skip


def train_baseline(stage, job):
    """Train a dense network. Its weights are kept, and judged, in half precision."""
    data, model = job.data(stage), job.model(stage)
    run = open_run(job.out, job.name, asdict(stage), resume=True, unique=False)
    try:
        loss = training_loss(label_smoothing=stage.label_smoothing)
        train(job, run, "pretrain", model, data, stage, loss)
        exact = evaluate(model, data.test)["accuracy"]
        save_tensors(run.path("model.safetensors"), halved(model))
        load_weights(model, run.folder)
        figures = dict(id=run.id, model=stage.model, dataset=stage.dataset, seed=stage.seed)
        figures |= measured(model, data) | dict(accuracy_float32=exact)
        figures |= dict(seconds=phase_seconds(run.folder), device=card(job.device))
        save_json(run.path("result.json"), figures)
    finally:
        run.close()
    return figures


def on_device(scores, device):
    """Return scores whose bases are on a device, which a refit needs where its data are."""
    layers = {
        name: replace(
            layer,
            out_basis=layer.out_basis.to(device),
            out_values=layer.out_values.to(device),
        )
        for name, layer in scores.layers.items()
    }
    return replace(scores, layers=layers)


def cut_down(stage, job, dense, baseline, run):
    """Score, allocate, refit and apply the plan; log the seconds of each."""
    images = job.data(baseline, batch_size=128).train.plain(stage.samples)
    seed = derived_seed(stage.seed, "labels")
    with time_phase(run, "score"):
        scores = score(dense, images, stage.method, seed=seed)
    with time_phase(run, "allocate"):
        plan = allocate(scores, stage.ratio, cost=stage.of)
    if stage.refit:
        with time_phase(run, "refit"):
            some = images.plain(stage.refit_samples)
            plan = refit(dense, plan, some, scores=on_device(scores, job.device))
    with time_phase(run, "surgery"):
        example = next(iter(images))[0][:1]
        result = apply_plan(dense, plan, scores, images, example)
    return result


def pruned_network(stage, job, dense, baseline, run, data):
    """Return the network after surgery, read from the folder where it was made before."""
    folder, kept = run.path("pruned"), run.path("pruned.json")
    if kept.exists():
        fresh = load(folder, lambda: job.model(baseline)).to(job.device)
        return fresh, json.loads(kept.read_text())
    result = cut_down(stage, job, dense, baseline, run)
    save(result, folder)
    figures = measured(result.model, data) | dict(difference=result.difference)
    save_json(kept, figures)
    return result.model, figures


def prune_baseline(stage, job):
    """Prune the network of another stage and fine-tune it."""
    baseline, dense = job.stage(stage.source), job.dense(stage.source)
    data = job.data(baseline)
    run = open_run(job.out, job.name, asdict(stage), resume=True, unique=False)
    try:
        model, pruned = pruned_network(stage, job, dense, baseline, run, data)
        loss = training_loss(label_smoothing=stage.label_smoothing)
        train(job, run, "finetune", model, data, stage, loss)
        save(model, run.folder)
        figures = dict(id=run.id, model=baseline.model, dataset=baseline.dataset)
        figures |= dict(baseline=measured(dense, data), pruned=pruned)
        figures |= dict(finetuned=measured(model, data), seconds=phase_seconds(run.folder))
    finally:
        run.close()
    return figures


def made_batches(image_size, batches=2, size=16, classes=10):
    """Draw images and labels that every device gets alike."""
    g = torch.Generator().manual_seed(0)

    def images():
        return torch.randn(size, 3, image_size, image_size, generator=g)

    return [(images(), torch.randint(classes, (size,), generator=g)) for _ in range(batches)]


def moved(batches, device):
    """Return batches on a device."""
    return [(x.to(device), y.to(device)) for x, y in batches]


def distance(ours, theirs):
    """Return the relative distance of two tensors."""
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-300))


def largest_differences(ours, theirs):
    """Report the largest distances over layers or groups, of saliencies and of their sums.

    Directions of nearly equal eigenvalues are any basis of their space, so single saliencies of
    an eigenbasis may differ where nothing is wrong; their sums may not.
    """
    parts = "groups" if ours.groups else "layers"
    ours, theirs = getattr(ours, parts), getattr(theirs, parts)
    pairs = [(ours[name].saliency, theirs[name].saliency) for name in theirs]
    return {
        "largest difference": max(distance(a, b) for a, b in pairs),
        "largest difference of sums": max(distance(a.sum(), b.sum()) for a, b in pairs),
    }


def compare_method(method, dense, batches, device):
    """Score on both devices, then prune on the device; report differences and seconds."""
    figures, found = {}, {}
    for where in ("cpu", device.type):
        model, data = dense.to(where), moved(batches, where)
        start = time.perf_counter()
        with exact_float32():
            found[where] = score(model, data, method)
        figures[f"score seconds {where}"] = round(time.perf_counter() - start, 3)
    figures |= largest_differences(found[device.type], found["cpu"])
    plans = [allocate(s, 0.5, cost="params") for s in found.values()]
    figures["plans equal"] = plans[0].as_dict() == plans[-1].as_dict()
    figures["params left"] = [p.settings.get("params") for p in plans]
    start = time.perf_counter()
    result = prune(model, data, method, 0.5, cost="params")
    figures["prune seconds"] = round(time.perf_counter() - start, 3)
    figures["difference"] = result.difference
    figures["difference after batch normalisation"] = result.verify()
    return figures


def prune_with_refit(dense, batches, device):
    """Prune by `curvature_tucker` with a refit, as one call, on the device."""
    model, data = dense.to(device), moved(batches, device)
    result = prune(model, data, "curvature_tucker", 0.5, cost="params", refit=True)
    return dict(difference=result.difference)


def compare_network(stage, name, device):
    """Yield the name of every comparison of a network, and a function that makes it."""
    wide = name.startswith("torchvision")
    size = stage.image_size if wide else 32
    batches = made_batches(size)
    dense = refresh_bn(create_model(name, 10, 3, size, seed=0), batches).eval()
    for method in stage.wide_methods if wide else stage.methods:
        yield method, lambda method=method: compare_method(method, dense, batches, device)
    if not wide:
        yield "curvature_tucker refit", lambda: prune_with_refit(dense, batches, device)


def compare_devices(stage, job):
    """Compare every network and method; a fault of one is noted and stops no other."""
    figures = {}
    for name in stage.models:
        for method, compare in compare_network(stage, name, job.device):
            key = f"{name} {method}"
            try:
                figures[key] = compare()
            except Exception:
                figures[key] = dict(error=traceback.format_exc())
            print(key, figures[key], flush=True)
    return figures


def median_seconds(work, device, repeats=5):
    """Return the median seconds of a few runs, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def forward_backward(model, data):
    """Run the loss and all gradients of the weights over batches."""
    for x, y in data:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        torch.autograd.grad(loss, list(model.parameters()))


def time_kfac(stage, name, device):
    """Time one pass of K-FAC with the channel factor beside one forward and backward."""
    size = min(stage.batch, stage.images)
    batches = made_batches(32, stage.images // size, size, 100)
    model = refresh_bn(create_model(name, 100, 3, 32, seed=0), batches[:1]).eval().to(device)
    data = moved(batches, device)
    bases = layer_bases(collect(model, data, progress=False))
    work = {
        "forward and backward": lambda: forward_backward(model, data),
        "kfac channel": lambda: collect(model, data, progress=False),
        "kfac full": lambda: collect(model, data, a="full", progress=False),
        "ekfac moments": lambda: second_moments(model, data, bases, progress=False),
    }
    figures = {}
    for key, run in work.items():
        try:
            figures[key] = median_seconds(run, device)
        except Exception:
            figures[key] = dict(error=traceback.format_exc())
    return figures


def pruned_of(source, job):
    """Name the finished pruning stages of a baseline."""
    names = [n for n, s in STAGES.items() if isinstance(s, Pruning) and s.source == source]
    return [n for n in names if (job.out / n / "plan.json").exists()]


def median_ms(models: list, x, repeats: int) -> list[float]:
    """Return the median milliseconds of one call of each network, timed in turns."""
    ready = [make_ready(m, x, "eager") for m in models]
    ms = time_in_turns(ready, x, device_of(models[0]), 10, repeats)
    return np.median(ms, 0).tolist()


def time_family(stage, job, source):
    """Time a dense network with its pruned ones in turns, in float32 and in bfloat16."""
    baseline, names = job.stage(source), pruned_of(source, job)
    models = [job.dense(source)]
    for name in names:
        model = load(job.out / name, lambda: job.model(baseline))
        models.append(model.to(job.device))
    x = next(iter(job.data(baseline, stage.batch).test))[0]
    single = median_ms(models, x, stage.repeats)
    fast = [m.to(torch.bfloat16, memory_format=torch.channels_last) for m in models]
    x = x.to(torch.bfloat16, memory_format=torch.channels_last)
    half = median_ms(fast, x, stage.repeats)
    times = zip([source, *names], single, half)
    return {name: dict(float32=a, bfloat16=b) for name, a, b in times}


def time_networks(stage, job):
    """Time every baseline that is trained, with its pruned networks."""
    figures = {}
    for source, settings in STAGES.items():
        is_trained = (job.out / source / "model.safetensors").exists()
        if isinstance(settings, Baseline) and is_trained:
            figures |= time_family(stage, job, source)
    return figures


def time_everything(stage, job):
    """Time networks and K-FAC passes; what fails is noted."""
    figures = dict(batch=stage.batch, images=stage.images)
    try:
        figures["latency_ms"] = time_networks(stage, job)
        print(figures, flush=True)
    except Exception:
        figures["latency_ms error"] = traceback.format_exc()
    for name in stage.kfac_models:
        try:
            figures[f"seconds {name}"] = time_kfac(stage, name, job.device)
            print(figures[f"seconds {name}"], flush=True)
        except Exception:
            figures[f"seconds {name}"] = dict(error=traceback.format_exc())
    return figures


def result_of(out, name):
    """Return the result of a stage; None where there is none or the stage failed."""
    path = out / f"{name}.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return None if "error" in found else found


def run_stage(job):
    """Run one stage and write its result file, with the traceback where it failed."""
    stage, start = job.stage(job.name), time.perf_counter()
    where = dict(stage=job.name, card=card(job.device), versions=versions())
    if job.device.type == "cuda":
        torch.backends.cudnn.benchmark = isinstance(stage, Baseline)
    try:
        found = stage.run(job)
    except Exception:
        found = dict(error=traceback.format_exc())
        print(f"{job.name} failed:\n{found['error']}", flush=True)
    took = round(time.perf_counter() - start, 1)
    result = where | dict(settings=asdict(stage), wall_seconds=took, **found)
    save_json(job.out / f"{job.name}.json", result)
    if "error" not in found:
        (job.folder / "training.safetensors").unlink(missing_ok=True)
    print(f"{job.name}: {took} s", flush=True)
    return "error" not in found


def waiting_for(out, name):
    """List the stages that a stage needs and that are not done."""
    return [n for n in STAGES[name].needs if result_of(out, n) is None]


def run_here(names, args):
    """Run stages one after the other in this process."""
    for name in names:
        if waiting_for(args.out, name):
            print(f"{name}: waits for {waiting_for(args.out, name)}", flush=True)
            continue
        run_stage(Job(name, args.out, args.data, args.tiny))


def started(name, args):
    """Start one stage in a process of its own, which prints into OUT_DIR/STAGE.log."""
    command = [sys.executable, __file__, str(args.out), "--only", name, "--jobs", "1"]
    command += ["--data", args.data] + ["--tiny"] * args.tiny
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    with open(args.out / f"{name}.log", "a") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | dict(OMP_NUM_THREADS=threads)
        )


def run_together(names, args):
    """Run stages in processes of their own, so many at once, each when those it needs are done."""
    left, running = list(names), {}
    while left or running:
        running = {n: p for n, p in running.items() if p.poll() is None}
        stuck = [n for n in left if n != LAST and waiting_for(args.out, n)]
        ready = [n for n in left if n not in stuck and (n != LAST or len(left) == 1)]
        for name in ready[: args.jobs - len(running)]:
            if name == LAST and running:
                break
            left.remove(name)
            running[name] = started(name, args)
        if not running and left and set(left) <= {*stuck, LAST}:
            left = [n for n in left if n not in stuck]
            continue
        time.sleep(0.2)


def table_row(name, out):
    """Return the row of a pruning stage for the table of results."""
    found, timing = result_of(out, name), result_of(out, LAST) or {}
    s, latency = found["settings"], timing.get("latency_ms", {})
    stages = found["baseline"], found["pruned"], found["finetuned"]
    own, base = latency.get(name, {}), latency.get(s["source"], {})
    same = ("method", "refit", "ratio", "of", "seed", "epochs")
    row = dict(model=found["model"], dataset=found["dataset"], **{k: s[k] for k in same})
    row |= dict(params=found["finetuned"]["params"], macs=found["finetuned"]["macs"])
    for title, part in zip(("baseline", "pruned", "finetuned"), stages):
        row[f"{title} accuracy"] = part["accuracy"]
    for title, part in zip(("baseline", "finetuned"), stages[::2]):
        row[f"{title} val accuracy"] = part["val_accuracy"]
    for title, kind in (("latency_ms", "float32"), ("latency_ms bf16", "bfloat16")):
        if own:
            row |= {title: round(own[kind], 3), f"baseline {title}": round(base[kind], 3)}
    return row | {"training seconds": round(found["seconds"].get("finetune", 0), 1)}


def write_table(out):
    """Write OUT_DIR/gpu_cifar100.csv, a row for every pruned network that is done."""
    names = [n for n, s in STAGES.items() if isinstance(s, Pruning) and result_of(out, n)]
    if not names:
        return
    first = result_of(out, names[0])
    path = out / "gpu_cifar100.csv"
    with open(path, "w", newline="") as f:
        f.write(f"# python scripts/gpu_day.py OUT_DIR; {first['card']}, ")
        f.write(f"torch {first['versions']['torch']}, seed 0; ")
        f.write("latency of 128 images, seconds on a card that stages shared\n")
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table_row(n, out) for n in names)
    print(path)


def parsed():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of all results; made when missing")
    parser.add_argument("--data", default=str(ROOT / "data"), help="folder of the data sets")
    parser.add_argument("--tiny", action="store_true", help="a dry run on made images")
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of stages to run")
    parser.add_argument("--jobs", type=int, help="processes at once; 3 on a GPU, else 1")
    args = parser.parse_args()
    args.jobs = args.jobs or (3 if torch.cuda.is_available() else 1)
    return args


def main():
    """Run the stages that are asked for and not done, then write the table."""
    args = parsed()
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [n for n in STAGES if any(fnmatchcase(n, p) for p in args.only)]
    names = [n for n in wanted if result_of(args.out, n) is None]
    if args.jobs == 1:
        run_here(names, args)
    else:
        run_together(names, args)
    write_table(args.out)
    failed = [n for n in wanted if result_of(args.out, n) is None]
    print(f"done: {len(wanted) - len(failed)} of {len(wanted)}; not done: {failed}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
