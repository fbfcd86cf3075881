"""A run that stops and goes on is the run that never stopped, bit for bit on a CPU."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_stores import codec_config, lm_config, write_audio_store, write_codes_store

from ssmttm import checkpoint
from ssmttm.errors import Preempted, UserError
from ssmttm.training import loop
from ssmttm.training.tasks import codec, lm

ROOT = Path(__file__).parents[1]
# 20 segments in batches of 2: ten steps an epoch. Dropout draws from the generators, captions drop out.
LM = ("train.steps=100", "losses.tags=1", "tag_head.block=1", "model.dropout=0.2", "data.caption_dropout=0.3",
      "data.batch_size=2", "train.eval_every=50", "train.eval_batches=1", "train.checkpoint_every=1000")  # fmt: skip


@pytest.fixture(scope="module")
def codes_store(tmp_path_factory):
    return write_codes_store(tmp_path_factory.mktemp("store") / "codes")


@pytest.fixture(scope="module")
def audio_store(tmp_path_factory):
    return write_audio_store(tmp_path_factory.mktemp("store") / "audio")


def stopping(task, stops):
    """The task's `after_step`, which sends SIGTERM after each of the steps `stops`."""
    plain = task.after_step

    def after_step(self, step):
        if step + 1 in stops:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, step)

    return after_step


def train_with_stops(config, task, stops, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(task, "after_step", stopping(task, stops))
        for _ in stops:
            with pytest.raises(Preempted):
                loop.train(config)
        loop.train(config)


def everything(run_dir):
    """All tensors, generator states and progress of the newest checkpoint, and the losses of every step."""
    folder = checkpoint.latest_good(run_dir)
    files = {path.stem: copies(checkpoint.read_tensors(folder, path.stem)) for path in folder.glob("*.safetensors")}
    state = {key: checkpoint.read_state(folder)[key] for key in ("step", "samples_seen", "flops", "valid")}
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in rows if "loss" in row]
    return files, checkpoint.read_document(folder, "rng"), state, losses


def copies(tensors):
    """Apart from the file, which a test may damage."""
    return {name: value.clone() for name, value in tensors.items()}


def assert_same(first, second):
    (files, *plain), (other_files, *other_plain) = first, second
    assert files.keys() == other_files.keys()
    for name, tensors in files.items():
        assert tensors.keys() == other_files[name].keys()
        differing = [key for key, value in tensors.items() if not torch.equal(value, other_files[name][key])]
        assert not differing, f"{name}: {differing}"
    assert plain == other_plain


def test_100_resumed_steps_are_100_unbroken_ones_twice_in_one_epoch(codes_store, tmp_path, monkeypatch):
    loop.train(lm_config(codes_store, tmp_path / "unbroken", *LM))
    stopped = lm_config(codes_store, tmp_path / "stopped", *LM)
    train_with_stops(stopped, lm.LanguageModelTask, (33, 36, 70), monkeypatch)
    assert_same(everything(tmp_path / "unbroken"), everything(tmp_path / "stopped"))


def test_a_codec_with_its_discriminator_resumes_exactly(audio_store, tmp_path, monkeypatch):
    steps = ("train.steps=9", "codec_training.restart_until=100")
    loop.train(codec_config(audio_store, tmp_path / "unbroken", *steps))
    train_with_stops(codec_config(audio_store, tmp_path / "stopped", *steps), codec.CodecTask, (2, 5), monkeypatch)
    unbroken = everything(tmp_path / "unbroken")
    assert_same(unbroken, everything(tmp_path / "stopped"))
    assert {"model", "discriminator", "ema", "optimizer"} == unbroken[0].keys()


# A fresh process forks one child an attempt; each child trains until its N-th fsync kills it.
DRIVER = """
import os, random, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from small_stores import lm_config
from ssmttm.training import loop, lm, metrics
metrics.peak_flops(torch.device("cpu"), "fp32")  # measured once, not in every child
config = lm_config(Path({store!r}), Path({run_dir!r}), *{overrides!r})
draw, fsync = random.Random(1), os.fsync
for attempt in range(60):
    dies_at, calls = draw.randint(6, 20), 0
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        def counted(handle):
            global calls
            calls += 1
            if calls == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(handle)
        os.fsync = counted
        loop.train(config)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        print(attempt)
        break
    assert os.WIFSIGNALED(status), status
"""


def test_killed_at_any_write_it_goes_on_to_the_same_weights(codes_store, tmp_path):
    overrides = [*LM, "train.steps=8", "train.checkpoint_every=2", "train.eval_every=0"]
    code = DRIVER.format(
        tests=str(Path(__file__).parent), store=str(codes_store), run_dir=str(tmp_path / "killed"), overrides=overrides
    )
    driver = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert driver.returncode == 0, driver.stderr
    assert int(driver.stdout) >= 3, "it must have been killed a few times"
    loop.train(lm_config(codes_store, tmp_path / "unbroken", *overrides))
    assert_same(everything(tmp_path / "unbroken"), everything(tmp_path / "killed"))


def test_a_damaged_checkpoint_is_left_out_and_the_weights_come_out_the_same(codes_store, tmp_path, capsys):
    overrides = (*LM, "train.checkpoint_every=3")
    run_dir = tmp_path / "run"
    loop.train(lm_config(codes_store, run_dir, *overrides, "train.steps=6"))
    whole = everything(run_dir)
    weights = run_dir / "checkpoints/step-00000006/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    loop.train(lm_config(codes_store, run_dir, *overrides, "train.steps=6"))
    assert "step-00000006 is damaged" in capsys.readouterr().err
    assert_same(whole, everything(run_dir))


def test_what_a_resume_may_change(codes_store, tmp_path):
    run_dir = tmp_path / "run"
    loop.train(lm_config(codes_store, run_dir, *LM, "train.steps=2"))
    with pytest.raises(UserError) as caught:
        loop.train(lm_config(codes_store, run_dir, *LM, "train.steps=4", "optim.lr=0.5", "model.dropout=0"))
    said = str(caught.value)
    assert "optim.lr: 0.01 -> 0.5" in said and "model.dropout: 0.2 -> 0" in said and "train.steps" not in said
    with pytest.raises(UserError, match="resume=auto"):
        loop.train(lm_config(codes_store, run_dir, *LM, "resume=none"))
    with pytest.raises(UserError, match="another store"):
        other = write_codes_store(tmp_path / "other", seed=1)
        loop.train(lm_config(other, run_dir, *LM, "train.steps=3"))
    loop.train(lm_config(codes_store, run_dir, *LM, "train.steps=3", "train.micro_batch_size=1"))
    assert checkpoint.read_state(checkpoint.latest_good(run_dir))["step"] == 3
    early = tmp_path / "copy"
    loop.train(lm_config(codes_store, early, *LM, "train.steps=3", f"resume={run_dir}/checkpoints/step-00000002"))
    assert [row["step"] for row in map(json.loads, (early / "metrics.jsonl").open())] == [3, 3]
    with pytest.raises(UserError, match="later than"):
        loop.train(lm_config(codes_store, run_dir, *LM, f"resume={run_dir}/checkpoints/step-00000002"))
