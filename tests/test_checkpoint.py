"""Checkpoints are whole or absent, and what is not one is refused: pykern/train/checkpoint.py."""

import json
import os
import pickle
import re
import resource
import signal

import pytest
import torch
from torch import nn

from pykern.train import checkpoint
from pykern.train.checkpoint import checkpoints, latest_checkpoint, load_checkpoint, load_weights, save_checkpoint
from pykern.train.errors import UserError


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[2].weight = model[1].weight  # tied
    return model


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    return optimizer


def test_round_trip_of_weights_optimiser_and_nested_state(tmp_path):
    model = small_model()
    optimizer = trained(model)
    extra = {"rng": torch.get_rng_state(), "list": [1, 2.5, None, True, {"t": torch.ones(2, dtype=torch.bfloat16)}]}
    folder = save_checkpoint(tmp_path, 7, model, optimizer.state_dict(), extra)
    assert folder == tmp_path / "checkpoints" / "step-00000007" == latest_checkpoint(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.json",
        "model.safetensors",
        "state.safetensors",
    ]

    weights, state = load_checkpoint(folder)
    other = small_model(1)
    load_weights(other, weights, folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert state["step"] == 7
    assert torch.equal(state["rng"], extra["rng"])
    assert state["list"][:4] == [1, 2.5, None, True]
    assert torch.equal(state["list"][4]["t"], torch.ones(2, dtype=torch.bfloat16))
    restored = torch.optim.AdamW(other.parameters(), lr=0.5)
    restored.load_state_dict(state["optimizer"])
    assert restored.param_groups[0]["lr"] == 0.01
    for own, theirs in zip(optimizer.state.values(), restored.state.values(), strict=True):
        assert own.keys() == theirs.keys()
        assert all(torch.equal(own[name], theirs[name]) for name in own)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    weights, _ = load_checkpoint(save_checkpoint(tmp_path, 1, small_model(), None))
    assert sorted(weights) == ["0.bias", "0.weight", "1.weight"]
    other = small_model(1)
    load_weights(other, weights, tmp_path)
    assert other[1].weight is other[2].weight
    assert torch.equal(other[2].weight, small_model()[1].weight)


def test_only_the_newest_are_kept_and_a_step_can_come_again(tmp_path):
    for step in (1, 20, 3, 100):
        save_checkpoint(tmp_path, step, small_model(step), None, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000020", "step-00000100"]
    save_checkpoint(tmp_path, 100, small_model(5), None, keep=2)
    weights, _ = load_checkpoint(latest_checkpoint(tmp_path))
    assert torch.equal(weights["0.weight"], small_model(5)[0].weight)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000020", "step-00000100"]


def test_what_cannot_be_stored_is_refused(tmp_path):
    with pytest.raises(TypeError, match="/bad is a set"):
        save_checkpoint(tmp_path, 1, small_model(), None, {"bad": {1}})
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("file", ["model.safetensors", "state.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone"])
def test_damage_is_found_and_the_way_out_named(tmp_path, file, damage):
    model = small_model()
    optimizer = trained(model)
    for step in (1, 2):
        save_checkpoint(tmp_path, step, model, optimizer.state_dict(), {"note": "x" * 100})
    path = latest_checkpoint(tmp_path) / file
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) * 3 // 4] ^= 0xFF
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "flip": content, "empty": b""}[damage])
    with pytest.raises(UserError) as raised:
        load_checkpoint(latest_checkpoint(tmp_path))
    message = str(raised.value)
    assert str(latest_checkpoint(tmp_path)) in message
    assert "\n" not in message
    if (file, damage) == ("checkpoint.json", "gone"):
        assert "is not a checkpoint of pykern" in message
    else:
        assert "is damaged" in message
        assert "remove it to go on from step-00000001" in message
    load_checkpoint(checkpoints(tmp_path)[0])


class Trap:
    """Unpickling this ends the test run."""

    def __reduce__(self):
        return os._exit, (99,)


@pytest.mark.parametrize("manifest", [None, "[]", '{"format": "other"}', '{"format": "pykern-checkpoint-1"}', "\0"])
def test_foreign_folders_are_refused_and_nothing_is_unpickled(tmp_path, manifest):
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "state.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    if manifest is not None:
        (folder / "checkpoint.json").write_text(manifest)
    with pytest.raises(UserError, match="is not a checkpoint of pykern|is damaged"):
        load_checkpoint(folder)


def test_a_pickle_with_a_forged_manifest_is_not_unpickled(tmp_path):
    folder = save_checkpoint(tmp_path, 1, small_model(), None)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    manifest = json.loads((folder / "checkpoint.json").read_text())
    manifest["files"] = {}
    (folder / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(folder)


def test_runs_without_checkpoints(tmp_path):
    with pytest.raises(UserError, match="there is no run folder"):
        latest_checkpoint(tmp_path / "missing")
    with pytest.raises(UserError, match="has no checkpoint"):
        latest_checkpoint(tmp_path)


def test_weights_of_another_model(tmp_path):
    weights = {name: tensor for name, tensor in small_model().state_dict().items() if name != "2.weight"}
    with pytest.raises(UserError, match=r"1\.weight has shape \(4, 4\) there and \(5, 4\) in the model"):
        load_weights(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5, bias=False), nn.Identity()), weights, "here")
    with pytest.raises(UserError, match="here are not this model's: they have no '1.bias'"):
        load_weights(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), weights, "here")
    with pytest.raises(UserError, match="they have '1.weight', which the model does not have"):
        load_weights(nn.Sequential(nn.Linear(3, 4)), weights, "here")


def in_child(action) -> int:
    """Run `action` in a forked child; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException as error:
            os._exit(3 if isinstance(error, UserError) else 4)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("moment", ["weights", "state", "manifest", "rename", "renamed", "remove"])
def test_kill_9_while_a_checkpoint_is_written(tmp_path, moment):
    save_checkpoint(tmp_path, 1, small_model(1), None)

    def die(*_args, **_kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def save_and_die():
        write = checkpoint._write_tensors
        if moment == "weights":  # the file is half there

            def write_half(path, tensors):
                path.write_bytes(b"\0" * 100)
                die()

            checkpoint._write_tensors = write_half
        elif moment == "state":
            checkpoint._write_tensors = lambda path, tensors: write(path, tensors) if "model" in path.name else die()
        else:
            name = {"manifest": "_write_text", "renamed": "_synchronise", "remove": "_remove"}.get(moment)
            if name:
                setattr(checkpoint, name, die)
            else:
                type(tmp_path).rename = die
        save_checkpoint(tmp_path, 2, small_model(2), None, keep=1)

    assert in_child(save_and_die) == -signal.SIGKILL
    arrived = moment in ("renamed", "remove")
    newest = latest_checkpoint(tmp_path)
    assert newest.name == ("step-00000002" if arrived else "step-00000001")
    weights, _ = load_checkpoint(newest)
    assert torch.equal(weights["0.weight"], small_model(2 if arrived else 1)[0].weight)
    save_checkpoint(tmp_path, 3, small_model(3), None, keep=2)  # the next one clears up what was left behind
    assert all(path.name.startswith("step-") for path in (tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("limit", [0, 100, 400, 1500])
def test_a_disk_that_fills_up_leaves_the_last_checkpoint_intact(tmp_path, limit):
    model = small_model()
    optimizer = trained(model)
    save_checkpoint(tmp_path, 1, model, optimizer.state_dict())
    seen = tmp_path / "message"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_with_little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # of the child alone
        try:
            save_checkpoint(tmp_path, 2, model, optimizer.state_dict(), {"note": "x" * 5000})
        except UserError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            seen.write_text(str(error))
            raise

    assert in_child(save_with_little_room) == 3
    assert re.fullmatch(r"cannot write .*step-00000002: .*File too large.*", seen.read_text())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    load_checkpoint(latest_checkpoint(tmp_path))
