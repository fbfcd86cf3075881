"""A checkpoint is whole or it is not there: crashes at every write, damage, a full disk, retention."""

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ssmttm import checkpoint
from ssmttm.errors import UserError

CONFIG = OmegaConf.create({"task": "lm"})


def write(run_dir, step, value=None):
    weights = {"w": torch.full((3, 5), float(step if value is None else value)), "n": torch.arange(4)}
    return checkpoint.save_checkpoint(
        run_dir / f"checkpoints/step-{step:08d}",
        config=CONFIG,
        tensors={"model": weights, "ema": {"w": weights["w"] / 2, "n": weights["n"]}},
        documents={"state": {"step": step}},
    )


def test_what_was_written_is_read(tmp_path):
    folder = write(tmp_path, 7)
    assert checkpoint.latest_good(tmp_path) == folder
    assert torch.equal(checkpoint.load_weights(folder, ema=False)["w"], torch.full((3, 5), 7.0))
    assert torch.equal(checkpoint.load_weights(folder)["w"], torch.full((3, 5), 3.5))
    assert torch.equal(checkpoint.load_weights(folder)["n"], torch.arange(4))
    assert checkpoint.read_state(folder) == {"step": 7} and checkpoint.read_config(folder).task == "lm"


@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing file", "unfinished", "seal"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, damage):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    weights = bad / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-3])
    elif damage == "one bit":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "missing file":
        weights.unlink()
    elif damage == "unfinished":
        (bad / "COMPLETE").unlink()
    else:
        (bad / "COMPLETE").write_text("{")
    assert checkpoint.latest_good(tmp_path) == good
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and str(bad) in warning and warning.count("\n") == 1
    with pytest.raises(UserError, match="step-00000002"):
        checkpoint.verify(bad)


def write_and_die(run_dir, dies_at):
    """Save step 2 in a child process that is killed at its N-th fsync; each file, folder and rename has one."""
    child = os.fork()
    if child == 0:
        calls, fsync = 0, os.fsync

        def counted(handle):
            nonlocal calls
            calls += 1
            if calls == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(handle)

        os.fsync = counted
        write(run_dir, 2)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def test_a_kill_at_any_write_leaves_a_good_checkpoint(tmp_path):
    for dies_at in range(1, 20):
        run_dir = tmp_path / str(dies_at)
        write(run_dir, 1)
        survived = write_and_die(run_dir, dies_at)
        newest = checkpoint.latest_good(run_dir)
        step = checkpoint.read_state(newest)["step"]
        assert torch.equal(checkpoint.load_weights(newest, ema=False)["w"], torch.full((3, 5), float(step)))
        write(run_dir, 2)  # the run that goes on writes over what was left
        checkpoint.prune(run_dir, keep=1)
        assert os.listdir(run_dir / "checkpoints") == ["step-00000002"]
        if survived:
            break
    assert survived and dies_at > 6, "the last child must have got through, and the others been killed"


def full_disk(limit):
    """A `save_file` that meets a full disk at its `limit`-th call, as safetensors reports it."""
    calls = 0

    def save_file(tensors, path):
        nonlocal calls
        calls += 1
        if calls == limit:
            Path(path).write_bytes(b"half")
            raise checkpoint.SafetensorError("Error while serializing: No space left on device (os error 28)")
        return real(tensors, path)

    real = checkpoint.save_file
    return save_file


@pytest.mark.parametrize("limit", [1, 2])
def test_a_full_disk_is_one_clear_line_and_earlier_checkpoints_stay(tmp_path, monkeypatch, limit):
    good = write(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full_disk(limit))
        with pytest.raises(UserError, match="disk is full"):
            write(tmp_path, 2)
    assert os.listdir(tmp_path / "checkpoints") == [good.name]
    checkpoint.verify(good)
    checkpoint.verify(write(tmp_path, 2))


@pytest.mark.parametrize("replaces", [False, True])
def test_a_disk_that_fills_at_the_seal_brings_back_what_stood_there(tmp_path, monkeypatch, replaces):
    write(tmp_path, 1)
    if replaces:
        write(tmp_path, 2, value=20)
    written = checkpoint._write_text

    def fails_at_seal(path, text):
        if path.name == ".COMPLETE":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written(path, text)

    monkeypatch.setattr(checkpoint, "_write_text", fails_at_seal)
    with pytest.raises(UserError, match="disk is full"):
        write(tmp_path, 2)
    newest = checkpoint.latest_good(tmp_path)
    assert checkpoint.load_weights(newest, ema=False)["w"][0, 0] == (20 if replaces else 1)


def test_retention_keeps_the_last_and_never_deletes_for_a_bad_one(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, keep=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    (tmp_path / "checkpoints/step-00000003/model.safetensors").write_bytes(b"")
    with pytest.raises(UserError):
        checkpoint.prune(tmp_path, keep=1)
    assert checkpoint.latest_good(tmp_path).name == "step-00000002"


def test_find_model_takes_a_run_a_checkpoint_or_an_export_and_says_what_it_misses(tmp_path):
    folder = write(tmp_path / "run", 3)
    assert checkpoint.find_model(tmp_path / "run") == checkpoint.find_model(folder) == folder
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    for bad, said in (("nowhere", "no model at"), ("empty", "no good checkpoint")):
        with pytest.raises(UserError, match=said):
            checkpoint.find_model(tmp_path / bad)
    (folder / "state.json").unlink()
    with pytest.raises(UserError, match="damaged"):
        checkpoint.find_model(folder)
