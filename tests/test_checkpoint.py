"""Checkpoints: crashes at every write, damage, a full disk, retention, old config keys."""

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ssmttm import checkpoint, config, files
from ssmttm.errors import UserError
from ssmttm.model_folder import read_card, write_model_folder

CONFIG = OmegaConf.create({"task": "lm"})


def write(run_dir, step, value=None):
    weights = {"w": torch.full((3, 5), float(step if value is None else value)), "n": torch.arange(4)}
    return checkpoint.save_checkpoint(
        run_dir / f"checkpoints/step-{step:08d}",
        config=CONFIG,
        tensors={"model": weights, "ema": {"w": weights["w"] / 2, "n": weights["n"]}},
        documents={"state": {"step": step}},
    )


def test_checkpoint_round_trip(tmp_path):
    folder = write(tmp_path, 7)
    assert checkpoint.latest_good(tmp_path) == folder
    assert torch.equal(checkpoint.load_weights(folder, ema=False)["w"], torch.full((3, 5), 7.0))
    assert torch.equal(checkpoint.load_weights(folder)["w"], torch.full((3, 5), 3.5))
    assert torch.equal(checkpoint.load_weights(folder)["n"], torch.arange(4))
    assert checkpoint.read_state(folder) == {"step": 7} and checkpoint.read_config(folder).task == "lm"


@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing file", "unfinished", "COMPLETE"])
def test_latest_good_skips_damaged_checkpoint(tmp_path, capsys, damage):
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
    assert "falling back" in warning
    (good / "COMPLETE").unlink()
    assert checkpoint.latest_good(tmp_path) is None
    assert [("falling back" in line) for line in capsys.readouterr().err.splitlines()] == [True, False]


def write_and_die(run_dir, dies_at):
    """Save step 2 in a child process that is killed at its N-th fsync; each file and folder has one."""
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


def test_kill_at_any_fsync_leaves_a_good_checkpoint(tmp_path):
    for dies_at in range(1, 20):
        run_dir = tmp_path / str(dies_at)
        write(run_dir, 1)
        survived = write_and_die(run_dir, dies_at)
        newest = checkpoint.latest_good(run_dir)
        step = checkpoint.read_state(newest)["step"]
        assert torch.equal(checkpoint.load_weights(newest, ema=False)["w"], torch.full((3, 5), float(step)))
        write(run_dir, 2)  # the resumed run overwrites what was left
        checkpoint.prune(run_dir, keep=1)
        assert os.listdir(run_dir / "checkpoints") == ["step-00000002"]
        if survived:
            break
    assert survived and dies_at > 6, "the last child must survive, the others must have been killed"


def full_disk(limit):
    """A `save_file` whose `limit`-th call fails as safetensors does on a full disk."""
    calls = 0

    def save_file(tensors, path):
        nonlocal calls
        calls += 1
        if calls == limit:
            Path(path).write_bytes(b"half")
            raise checkpoint.SafetensorError("Error while serializing: No space left on device (os error 28)")
        return original(tensors, path)

    original = checkpoint.save_file
    return save_file


def replace_and_die(folder, dies_at):
    """Write model 2 into a folder, in a child process that is killed at its N-th fsync, rename or unlink."""
    child = os.fork()
    if child == 0:
        calls = 0

        def counted(function):
            def count_and_call(*args, **options):
                nonlocal calls
                calls += 1
                if calls == dies_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **options)

            return count_and_call

        for name in ("fsync", "rename", "replace", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        write_model(folder, 2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def write_model(folder, number):
    weights = {"w": torch.full((3,), float(number))}
    write_model_folder(folder, weights, config.load(f"seed={number}"), {"name": str(number)})


def read_model(folder):
    numbers = {int(checkpoint.read_config(folder).seed), int(read_card(folder)["name"])}
    return numbers | {int(checkpoint.load_weights(folder)["w"][0])}


def test_kill_while_a_model_folder_is_replaced_never_mixes_two_models(tmp_path):
    outcomes = set()
    for dies_at in range(1, 60):
        folder = tmp_path / f"model-{dies_at}"
        write_model(folder, 1)
        (folder / "notes.txt").write_text("kept")
        finished = replace_and_die(folder, dies_at)
        try:
            found = read_model(folder)
        except UserError as error:  # the config is missing
            found = {0}
            assert "config.yaml" in str(error)
        assert len(found) == 1, found
        outcomes |= found
        write_model(folder, 2)
        assert read_model(folder) == {2} and (folder / "notes.txt").read_text() == "kept"
        assert len(list(folder.iterdir())) == 4
        if finished:
            break
    assert finished and outcomes == {0, 1, 2} and dies_at > 8


@pytest.mark.parametrize("limit", [1, 2])
def test_full_disk_is_a_user_error_and_keeps_earlier_checkpoints(tmp_path, monkeypatch, limit):
    good = write(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full_disk(limit))
        with pytest.raises(UserError, match="disk is full"):
            write(tmp_path, 2)
    assert os.listdir(tmp_path / "checkpoints") == [good.name]
    checkpoint.verify(good)
    checkpoint.verify(write(tmp_path, 2))


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("fails_at", ["COMPLETE", "rename"])
def test_failed_save_restores_the_folder_it_was_to_replace(tmp_path, monkeypatch, replaces, fails_at):
    write(tmp_path, 1)
    if replaces:
        write(tmp_path, 2, value=20)
    full = OSError(errno.ENOSPC, "No space left on device")
    write_text = Path.write_text

    def fail(*paths):
        raise full

    def fail_for_complete(path, text):
        if path.name == "COMPLETE":
            raise full
        return write_text(path, text)

    with monkeypatch.context() as patch:
        if fails_at == "COMPLETE":
            patch.setattr(Path, "write_text", fail_for_complete)
        else:
            patch.setattr(files, "publish_folder", fail)
        with pytest.raises(UserError, match="disk is full"):
            write(tmp_path, 2)
    newest = checkpoint.latest_good(tmp_path)
    assert checkpoint.load_weights(newest, ema=False)["w"][0, 0] == (20 if replaces else 1)
    assert len(os.listdir(tmp_path / "checkpoints")) == 1 + replaces


def test_prune_keeps_the_last_and_deletes_nothing_if_the_newest_is_damaged(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, keep=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    (tmp_path / "checkpoints/step-00000003/model.safetensors").write_bytes(b"")
    with pytest.raises(UserError):
        checkpoint.prune(tmp_path, keep=1)
    assert checkpoint.latest_good(tmp_path).name == "step-00000002"


def test_find_model_accepts_run_and_checkpoint_and_names_what_is_missing(tmp_path):
    folder = write(tmp_path / "run", 3)
    assert checkpoint.find_model(tmp_path / "run") == checkpoint.find_model(folder) == folder
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    for bad, message in (("nowhere", "no model at"), ("empty", "no good checkpoint")):
        with pytest.raises(UserError, match=message):
            checkpoint.find_model(tmp_path / bad)
    (folder / "state.json").unlink()
    with pytest.raises(UserError, match="damaged"):
        checkpoint.find_model(folder)


def test_read_config_names_the_new_key_for_an_old_one(tmp_path):
    folder = write(tmp_path, 1)
    (folder / "config.yaml").write_text("task: codec\ncodec_training: {revive_every: 50}\n")
    with pytest.raises(UserError) as caught:
        checkpoint.read_config(folder)
    message = "has the old config key codec_training.revive_every: rename it to codec_training.restart_every there"
    assert str(caught.value) == f"{folder / 'config.yaml'} {message}"
