"Plans and weights that version 0.1.0 wrote: tests/fixtures/plans_0_1_0 was made by its code."

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from prune_nb.core import UserError
from prune_nb.surgery.export import load, save
from prune_nb.surgery.plan import KeepDirections, ReplaceKernel, load_plan, save_plan

FOLDER = Path(__file__).parent / "fixtures" / "plans_0_1_0"
TYPES = dict(directions={KeepDirections}, kernels={ReplaceKernel}, cuts=set())


def network() -> nn.Module:
    "Return the network that the plans are for, with random weights."
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(20, 3)]
    return nn.Sequential(*layers).requires_grad_(False)


@pytest.fixture(scope="module")
def expected() -> dict:
    return load_file(FOLDER / "expected.safetensors")


@pytest.fixture(scope="module")
def original(expected) -> nn.Module:
    model = network()
    model.load_state_dict({k: expected[f"network/{k}"] for k in model.state_dict()})
    return model


def stored_plan(name: str, expected: dict, folder=FOLDER):
    bases = {n: (expected[f"bases/{n}/out"], expected[f"bases/{n}/in"]) for n in ("0", "4")}
    return load_plan(folder / name / "plan.json", bases if name == "directions" else None)


@pytest.mark.parametrize("name", TYPES)
def test_old_plan_gives_the_same_network(name, expected, original):
    plan = stored_plan(name, expected)
    assert {type(layer) for layer in plan.layers.values()} == TYPES[name]
    x, y = expected["x"], expected[f"applied/{name}"]
    torch.testing.assert_close(plan.apply(original)(x), y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plan.masked(original)(x), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TYPES)
def test_old_weights_load_with_their_plan(name, expected):
    model = load(FOLDER / name, network)
    y = expected[f"trained/{name}"]
    torch.testing.assert_close(model(expected["x"]), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TYPES)
def test_old_weights_still_match_a_plan_saved_again(name, expected, tmp_path):
    "As when a run of version 0.1.0 is resumed: its plan is written again before its weights are."
    shutil.copytree(FOLDER / name, tmp_path / name)
    plan = stored_plan(name, expected)
    save_plan(plan, tmp_path / name / "plan.json")
    again = stored_plan(name, expected, tmp_path)
    assert again == plan and again.as_dict() == plan.as_dict()
    assert again.as_dict()["format"] == "prune_nb.plan/2"
    model = load(tmp_path / name, network)
    save(model, tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved", network)(expected["x"]), model(expected["x"]))


@pytest.mark.parametrize("name", TYPES)
def test_old_weights_do_not_match_an_edited_plan(name, expected, tmp_path):
    shutil.copytree(FOLDER / name, tmp_path / name)
    path = tmp_path / name / "plan.json"
    edited = json.loads(path.read_text())
    edited["method"] = "another"
    path.write_text(json.dumps(edited))
    with pytest.raises(UserError, match=r"saved with another plan\.json"):
        load(tmp_path / name, network)


def test_types_are_written_and_checked(expected, tmp_path):
    path = tmp_path / "plan.json"
    for name, key in dict(directions="keep_directions", kernels="replace_kernel").items():
        save_plan(stored_plan(name, expected), path)
        stored = json.loads(path.read_text())
        assert {layer["type"] for layer in stored["layers"].values()} == {key}
        stored["layers"]["4"]["type"] = "replace"
        path.write_text(json.dumps(stored))
        with pytest.raises(UserError, match="Invalid type of '4' 'replace'"):
            load_plan(path)
        del stored["layers"]["4"]["type"]
        path.write_text(json.dumps(stored))
        with pytest.raises(UserError, match="incomplete"):
            load_plan(path)
