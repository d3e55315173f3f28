"""What people bring as data, targets and losses: the same answer at every entry point."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prune_nb.api import allocate, prune, verify
from prune_nb.core import UserError
from prune_nb.criteria.core import METHODS, score
from prune_nb.train import evaluate, fit, refresh_bn

# one of every kind of statistic
COLLECTING = [
    "taylor_weight",
    "gate_obd",
    "taylor_gate_example",
    "oracle",
    "eigendamage",
    "kron_obd",
    "curvature_tucker",
]


def network(classes: int = 4) -> nn.Sequential:
    """Return a small convolutional network with batch normalisation."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )


def images(n: int = 6, channels: int = 3) -> torch.Tensor:
    return torch.randn(n, channels, 8, 8, generator=torch.Generator().manual_seed(1))


def classes(n: int = 6) -> torch.Tensor:
    return torch.arange(n) % 4


def numbers(n: int = 6, columns: int = 4) -> torch.Tensor:
    return torch.randn(n, columns, generator=torch.Generator().manual_seed(2))


BATCH = (images(), classes())
EMPTY = (images(0), classes(0))


def entries(model: nn.Module, data: list, **options) -> dict:
    """Return name -> a call of every function that takes data and a loss."""
    calls = {
        "evaluate": lambda: evaluate(model, data, **options),
        "fit": lambda: fit(model, data, 1, 0.01, **options),
        "prune": lambda: prune(model, data, "taylor_weight", progress=False, **options),
    }
    for method in COLLECTING:
        empirical = dict(fisher="empirical") if "kfac" in METHODS[method].needs else {}
        calls[method] = lambda m=method, e=empirical: score(
            model, data, m, progress=False, **e, **options
        )
    return calls


def refusals(calls: dict) -> dict:
    """Return name -> the sentence with which a call was refused."""
    found = {}
    for name, call in calls.items():
        with pytest.raises(UserError) as error:
            call()
        found[name] = str(error.value)
    return found


def test_empty_batches_count_for_nothing():
    with_empty, without = [EMPTY, BATCH, EMPTY, BATCH, EMPTY], [BATCH, BATCH]
    assert evaluate(network(), with_empty) == evaluate(network(), without)
    for method in COLLECTING:
        scores = [score(network(), d, method, progress=False) for d in (with_empty, without)]
        assert scores[0].loss == scores[1].loss
    a, b = network(), network()
    losses = [fit(m, d, 1, 0.1)[0]["train_loss"] for m, d in ((a, with_empty), (b, without))]
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    small = prune(network(), with_empty, "taylor_weight", progress=False).model
    for name, t in prune(network(), without, "taylor_weight", progress=False).model.named_buffers():
        assert torch.equal(t, small.get_buffer(name))


def test_only_empty_batches_are_refused():
    for name, sentence in refusals(entries(network(), [EMPTY])).items():
        assert "no batch" in sentence or "no example" in sentence, (name, sentence)


def test_regression_without_its_loss_is_refused_everywhere():
    for targets in (numbers(), numbers().abs()):
        for name, said in refusals(entries(network(), [(images(), targets)])).items():
            assert "Pass the loss of this task" in said, (name, said)
    whole_numbers = [(images(), torch.zeros(6, dtype=torch.long))]
    for name, said in refusals(entries(network(1), whole_numbers)).items():
        assert "always 0" in said or "two classes" in said, (name, said)


def test_regression_with_its_loss_works_everywhere():
    data = [(images(), numbers())]
    for call in entries(network(), data, loss=F.mse_loss).values():
        call()
    found = evaluate(
        network(1), [(images(), classes()[:, None])], lambda o, y: F.mse_loss(o, y.float())
    )
    assert found.keys() == {"loss"}
    found = evaluate(
        network(1), [(images(), classes())], lambda o, y: F.mse_loss(o[:, 0], y.float())
    )
    assert found.keys() == {"loss"}


@pytest.mark.parametrize(
    "targets", [classes() + 1, -classes(), classes().float(), None, {"class": classes()}]
)
def test_targets_that_are_no_classes_are_refused_everywhere(targets):
    for name, said in refusals(entries(network(), [(images(), targets)])).items():
        assert "Give class numbers from 0 as targets" in said, (name, said)


@pytest.mark.parametrize(
    "loss, words",
    [
        ("mse", "Invalid loss 'mse'"),
        (3, "Invalid loss 3"),
        (nn.MSELoss, "Pass an instance, MSELoss()"),
        (lambda outputs: outputs.mean(), "a function of (outputs, targets)"),
        (lambda a, b, c, d: a, "a function of (outputs, targets)"),
        (nn.CrossEntropyLoss(reduction="none"), "it gave a tensor of shape ("),
        (lambda outputs, targets: None, "it gave a NoneType"),
    ],
)
def test_what_is_no_loss_is_refused_everywhere(loss, words):
    for name, said in refusals(entries(network(), [BATCH], loss=loss)).items():
        assert words in said, (name, said)


def test_losses_of_the_inputs_serve_training_and_evaluation():
    def loss(inputs, outputs, targets):
        return F.cross_entropy(outputs, targets) + inputs.mean()

    calls = entries(network(), [BATCH], loss=loss)
    assert calls.pop("evaluate")()["loss"] != evaluate(network(), [BATCH])["loss"]
    calls.pop("fit")()
    for name, said in refusals(calls).items():
        assert "needs the inputs too" in said, (name, said)


def test_losses_without_a_gradient_are_refused_where_one_is_needed():
    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets).item()

    calls = entries(network(), [BATCH], loss=loss)
    assert calls.pop("evaluate")() == pytest.approx(evaluate(network(), [BATCH]))
    for name, said in refusals(calls).items():
        assert ".item()" in said, (name, said)


@pytest.mark.parametrize(
    "inputs", [images(channels=1), images().long(), images()[:, :, 0], (images(), images())]
)
def test_batches_that_the_network_does_not_take_are_described(inputs):
    calls = entries(network(), [BATCH, (inputs, classes())])
    calls["refresh_bn"] = lambda: refresh_bn(network(), [BATCH, (inputs, classes())])
    for name, said in refusals(calls).items():
        assert "does not run on a batch of the data ((6, " in said, (name, said)
    calls = entries(network(), [(inputs, classes())])
    for name, said in refusals(calls).items():
        assert "does not run on" in said, (name, said)


def test_a_last_batch_of_one():
    data = [BATCH, (images(1), classes(1))]
    evaluate(network(), data)
    norm_last = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4))
    with pytest.raises(UserError, match="drop_last=True"):
        fit(norm_last, data, 1, 0.01)
    refresh_bn(norm_last, data)


class Windows(nn.Module):
    """Fold windows into the batch, as Swin transformers do."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 48), nn.Linear(48, 24)
        self.also, self.head = nn.Linear(24, 24), nn.Linear(24, 4)

    def forward(self, x):
        n = len(x)
        y = self.embed(x)
        windows = y.view(n * 4, 4, 24)
        y = windows + self.down(F.gelu(self.up(windows)))
        return self.head(self.also(y.reshape(n, 16, 24)).mean(1))


@pytest.mark.parametrize(
    "method", ["eigendamage_ekfac", "improved_eigendamage", "curvature_tucker"]
)
def test_layers_with_windows_in_the_batch_keep_the_eigenvalues_of_kfac(method):
    data = [(torch.randn(8, 16, 12), classes(8))] * 2
    model = Windows()
    said = r"as in K-FAC, are taken for: up reads \d+ rows where there are \d+ examples"
    with pytest.warns(UserWarning, match=said):
        scores = score(model, data, method, progress=False)
    assert {"up", "down", "also"} <= set(scores.layers)
    plan = allocate(scores, loss=0.05, cost="params")
    assert plan.layers
    verify(plan.apply(model), plan.masked(model), data[0][0])
    by_kfac = score(model, data, "curvature_tucker_kfac", progress=False)
    assert set(by_kfac.layers) == set(scores.layers)


@pytest.mark.parametrize("samples", [0, -5, 2.5, True, "all", [4]])
def test_samples_are_a_number_of_examples(samples):
    for method in COLLECTING:
        with pytest.raises(UserError, match="Invalid samples"):
            score(network(), [BATCH], method, samples, progress=False)
    for method in ("l1", "taylor_weight"):
        with pytest.raises(UserError, match="Invalid samples"):
            prune(network(), [BATCH], method, samples=samples, progress=False)


@pytest.mark.parametrize(
    "option",
    [
        dict(method=None),
        dict(method=["l1"]),
        dict(method=2.5),
        dict(ignore=5),
        dict(ignore=[3]),
        dict(ignore="layer*"),
        dict(ratio="half"),
        dict(cost="flops"),
        dict(table=5),
        dict(fisher="true", method="eigendamage"),
        dict(strategy="best"),
        dict(reduction="median"),
    ],
)
def test_invalid_options_are_named(option):
    with pytest.raises(UserError, match="Valid|latency_table|Did you mean"):
        prune(network(), [BATCH], **dict(method="l1", progress=False) | option)


def test_ignored_layers_by_pattern():
    every = score(network(), images(1), "l1", ignore=None, progress=False)
    assert len(every.groups) == 2
    left = score(network(), images(1), "l1", ignore=["[01]"], progress=False)
    assert len(left.groups) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_training_in_other_types_on_a_cpu(dtype):
    history = fit(network().to(dtype), [(images().to(dtype), classes())], 2, 0.01)
    assert all(row["train_loss"] > 0 for row in history)


@pytest.mark.parametrize(
    "layers, inputs",
    [
        ([nn.Conv3d(1, 8, 3), nn.ReLU(), nn.Conv3d(8, 4, 1)], torch.randn(4, 1, 6, 6, 6)),
        ([nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 1)], torch.randn(4, 3, 12)),
    ],
)
def test_layers_without_factors_get_a_method_that_takes_them(layers, inputs):
    model = nn.Sequential(*layers, nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    data = [(inputs, classes(4))]
    with pytest.raises(UserError, match="Try 'group_l2'") as error:
        prune(model, data, ratio=0.25, cost="units", progress=False)
    assert len(str(error.value)) <= 300
    assert prune(model, data, "group_l2", 0.25, "units", progress=False).plan.cuts


class Neighbours(nn.Module):
    """Add what the neighbours of every node give: the nodes of a graph are no examples."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x, edges):
        y = self.a(x).relu()
        return self.b(torch.zeros_like(y).index_add(0, edges[1], y[edges[0]]))


def graphs():
    graph = (torch.randn(6, 3), torch.tensor([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]]))
    return [(graph, torch.randint(2, (6,)))]


@pytest.mark.parametrize("method", ["taylor_weight", "gate_obd", "curvature_tucker", "kron_obs"])
def test_batches_that_cannot_be_cut_are_taken_whole(method):
    scores = score(Neighbours(), graphs(), method, samples=4, fisher="empirical", progress=False)
    found = scores.layers or scores.groups
    assert found["a"].saliency.isfinite().all()


def test_gradients_of_single_examples_need_examples():
    with pytest.raises(UserError, match="does not run on one example of a batch") as e:
        score(Neighbours(), graphs(), "taylor_output", progress=False)
    assert len(str(e.value)) <= 300


def test_second_derivatives_that_pytorch_lacks():
    bags = nn.Sequential(nn.EmbeddingBag(20, 8), nn.Linear(8, 3))
    words = [(torch.randint(20, (4, 5)), torch.randint(3, (4,)))]
    with pytest.raises(UserError, match="PyTorch has no second derivative here"):
        score(bags, words, "gate_obd", progress=False)
