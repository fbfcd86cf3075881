"""A resumed run equals an uninterrupted run, bit for bit on a CPU."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from small_runs import assert_same_runs, metric_rows, run_contents, train_with_stops
from small_stores import codec_config, lm_config, write_audio_store, write_codes_store

from ssmttm import checkpoint
from ssmttm.errors import UserError
from ssmttm.files import file_entry
from ssmttm.training import loop
from ssmttm.training.optim.schedule import learning_rate
from ssmttm.training.run import RunLength
from ssmttm.training.tasks import codec, lm

ROOT = Path(__file__).parents[1]
# 20 segments in batches of 2: ten steps per epoch. Dropout draws from the generators, captions are dropped.
LM = ("train.steps=100", "losses.tags=1", "tag_head.block=1", "model.dropout=0.2", "data.caption_dropout=0.3",
      "data.batch_size=2", "train.eval_every=50", "train.eval_batches=1", "train.checkpoint_every=1000")  # fmt: skip


@pytest.fixture(scope="module")
def codes_store(tmp_path_factory):
    return write_codes_store(tmp_path_factory.mktemp("store") / "codes")


@pytest.fixture(scope="module")
def audio_store(tmp_path_factory):
    return write_audio_store(tmp_path_factory.mktemp("store") / "audio")


def test_lm_resumed_three_times_equals_uninterrupted_run(codes_store, tmp_path, monkeypatch):
    loop.train(lm_config(codes_store, tmp_path / "uninterrupted", *LM))
    stopped = lm_config(codes_store, tmp_path / "stopped", *LM)
    train_with_stops(stopped, lm.LanguageModelTask, (33, 36, 70), monkeypatch)
    assert_same_runs(run_contents(tmp_path / "uninterrupted"), run_contents(tmp_path / "stopped"))


def test_codec_with_discriminator_resumes_exactly(audio_store, tmp_path, monkeypatch):
    steps = ("train.steps=9", "codec_training.restart_until=100")
    loop.train(codec_config(audio_store, tmp_path / "uninterrupted", *steps))
    train_with_stops(codec_config(audio_store, tmp_path / "stopped", *steps), codec.CodecTask, (2, 5), monkeypatch)
    uninterrupted = run_contents(tmp_path / "uninterrupted")
    assert_same_runs(uninterrupted, run_contents(tmp_path / "stopped"))
    assert {"model", "discriminator", "ema", "optimizer"} == uninterrupted[0].keys()


# A new process forks one child per attempt. Each is killed, in turn at its N-th fsync or after a random time; it writes
# its checkpoints in a thread or in the loop; the last one trains to the end.
DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from small_stores import lm_config
from ssmttm.training import loop, metrics
metrics.peak_flops(torch.device("cpu"), "fp32")  # measured once, not in every child
config = lm_config(Path({store!r}), Path({run_dir!r}), *{overrides!r})
draw, fsync, killed = random.Random(1), os.fsync, 0
while killed < 20:
    config.train.async_checkpoints = killed % 4 < 2
    at_fsync, calls, child = draw.randint(1, 20), 0, os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        def counted(handle):
            global calls
            calls += 1
            if calls == at_fsync:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(handle)
        if killed % 2:
            os.fsync = counted
        loop.train(config)
        os._exit(0)
    if killed % 2 == 0:
        time.sleep(draw.uniform(0.05, 0.3))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status), status
    killed += 1
loop.train(config)
"""


def test_run_killed_twenty_times_has_the_weights_of_an_unbroken_one(codes_store, tmp_path):
    overrides = [*LM, "train.steps=60", "train.checkpoint_every=2", "train.eval_every=0"]
    code = DRIVER.format(
        tests=str(Path(__file__).parent), store=str(codes_store), run_dir=str(tmp_path / "killed"), overrides=overrides
    )
    driver = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert driver.returncode == 0, driver.stderr
    loop.train(lm_config(codes_store, tmp_path / "uninterrupted", *overrides, "train.checkpoint_every=0"))
    assert_same_runs(run_contents(tmp_path / "uninterrupted"), run_contents(tmp_path / "killed"))


def test_damaged_checkpoint_is_skipped_and_training_gives_the_same_weights(codes_store, tmp_path, capsys):
    overrides = (*LM, "train.checkpoint_every=3")
    run_dir = tmp_path / "run"
    loop.train(lm_config(codes_store, run_dir, *overrides, "train.steps=6"))
    expected = run_contents(run_dir)
    weights = run_dir / "checkpoints/step-00000006/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    loop.train(lm_config(codes_store, run_dir, *overrides, "train.steps=6"))
    assert "step-00000006 is damaged" in capsys.readouterr().err
    assert_same_runs(expected, run_contents(run_dir))


def test_resume_accepts_resumable_keys_only(codes_store, tmp_path):
    run_dir = tmp_path / "run"
    loop.train(lm_config(codes_store, run_dir, *LM, "train.steps=2"))
    with pytest.raises(UserError) as caught:
        loop.train(lm_config(codes_store, run_dir, *LM, "train.steps=4", "optim.lr=0.5", "model.dropout=0"))
    message = str(caught.value)
    assert "optim.lr: 0.01 -> 0.5" in message and "model.dropout: 0.2 -> 0" in message
    assert "train.steps" not in message
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


def test_longer_run_keeps_its_schedule_unless_it_is_stretched(codes_store, tmp_path, capsys):
    short = (*LM, "train.eval_every=0", "schedule.warmup_steps=2", "schedule.min_lr=0.001")

    def train(name, *overrides):
        loop.train(lm_config(codes_store, tmp_path / name, *short, *overrides))
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").open())
        return [row["lr"] for row in rows if "lr" in row], capsys.readouterr().err

    rates, warning = train("kept", "train.steps=6")
    assert not warning and rates[-1] < 0.003
    shutil.copytree(tmp_path / "kept", tmp_path / "stretched")
    extended, warning = train("kept", "train.steps=9")
    assert extended == pytest.approx([*rates, 0.001, 0.001, 0.001])
    assert warning.count("\n") == 1 and "keeps the schedule of 6 steps" in warning
    assert "set schedule.length=9" in warning
    stretched, warning = train("stretched", "train.steps=9", "schedule.length=9")
    whole, _ = train("whole", "train.steps=9")
    assert stretched[:6] == rates and stretched[6:] == whole[6:]
    assert warning.count("\n") == 1 and "replaces the schedule of 6 steps" in warning
    _, warning = train("stretched", "train.steps=10")
    assert "keeps the schedule of 9 steps" in warning
    _, warning = train("stretched", "train.steps=3")
    assert "the run has 10 steps already, train.steps=3 leaves nothing to do" in warning


def test_run_stopped_before_the_end_of_its_schedule_equals_an_uninterrupted_run(codes_store, tmp_path, capsys):
    loop.train(lm_config(codes_store, tmp_path / "uninterrupted", *LM, "train.steps=6"))
    loop.train(lm_config(codes_store, tmp_path / "parts", *LM, "train.steps=4", "schedule.length=6"))
    loop.train(lm_config(codes_store, tmp_path / "parts", *LM, "train.steps=6"))
    assert not capsys.readouterr().err
    assert_same_runs(run_contents(tmp_path / "uninterrupted"), run_contents(tmp_path / "parts"))


class Clock:
    """In place of the module `time` of the loop: each call of perf_counter is `tick` seconds after the one before."""

    def __init__(self, tick):
        self.tick, self.now = tick, 0.0

    def perf_counter(self):
        self.now += self.tick
        return self.now


def test_length_of_a_timed_run_comes_from_its_rate_and_is_kept_by_a_resume(codes_store, tmp_path, monkeypatch, capsys):
    """0.5 s a step are 24 steps in 0.2 minutes: decided 10 steps after the resume at step 5, and kept by that at 20."""
    clock, after_step = Clock(0.5), lm.LanguageModelTask.after_step

    def faster_from_step_20(task, step):
        clock.tick = 0.5 if step + 1 < 20 else 0.1
        return after_step(task, step)

    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(lm.LanguageModelTask, "after_step", faster_from_step_20)
    config = lm_config(codes_store, tmp_path / "run", *LM, "train.minutes=0.2", "train.steps=1", "train.eval_every=0")
    train_with_stops(config, lm.LanguageModelTask, [5, 20], monkeypatch)
    assert capsys.readouterr().out.count("steps        24 take 0.2 minutes") == 1
    state = checkpoint.read_state(checkpoint.latest_good(tmp_path / "run"))
    assert (state["step"], state["timed_steps"], state["schedule_steps"]) == (24, 24, 24)
    rates = [row["lr"] for row in metric_rows(tmp_path / "run")]
    assert rates[-1] == pytest.approx(learning_rate(23, 24, config)) and rates[-1] < rates[12]
    with pytest.raises(UserError, match=r"train.minutes: 0.2 -> 0.3"):
        loop.train(OmegaConf.merge(config, {"train": {"minutes": 0.3}}))
    loop.train(OmegaConf.merge(config, {"train": {"minutes": None, "steps": 26}}))
    assert checkpoint.read_state(checkpoint.latest_good(tmp_path / "run"))["step"] == 26
    assert "keeps the schedule of 24 steps" in capsys.readouterr().err


def test_number_of_steps_follows_the_measured_rate_until_a_tenth_of_the_time():
    length, seconds = RunLength(1000, 1.0, step=0, seconds=0.0, decided=0), 0.0
    decided_at = None
    for step in range(1, 60):
        seconds += 5.0 if step <= 2 else 0.5 if step <= 20 else 2.0  # slow first steps do not count
        if not length.is_decided:
            length.update(seconds)
            assert length.steps == step + int((60 - seconds) / (5.0 if step <= 2 else 0.5))
            decided_at = step
    assert decided_at == 10 and length.steps == 10 + 92 and length.is_decided
    slow = RunLength(1000, 1.0, step=7, seconds=50.0, decided=0)
    slow.update(61.0)
    assert slow.steps == 8 and slow.is_decided, "the time is over after one step"
    assert RunLength(1000, None, 3, 9.0, 0).steps == 1000
    assert RunLength(1000, 1.0, 3, 9.0, 55).steps == 55


def test_checkpoint_of_an_older_version_keeps_the_schedule_of_its_config(codes_store, tmp_path, capsys):
    loop.train(lm_config(codes_store, tmp_path / "run", *LM, "train.steps=4"))
    folder = checkpoint.latest_good(tmp_path / "run")
    state = {key: value for key, value in checkpoint.read_state(folder).items() if key != "schedule_steps"}
    (folder / "state.json").write_text(json.dumps(state))
    complete = json.loads((folder / "COMPLETE").read_text())
    (folder / "COMPLETE").write_text(json.dumps(complete | {"state.json": file_entry(folder / "state.json")}))
    loop.train(lm_config(codes_store, tmp_path / "run", *LM, "train.steps=5"))
    assert "keeps the schedule of 4 steps" in capsys.readouterr().err


def test_resume_of_a_run_with_an_old_config_key_names_the_new_one(codes_store, tmp_path):
    run_dir = tmp_path / "run"
    loop.train(lm_config(codes_store, run_dir, *LM, "train.steps=1"))
    file = checkpoint.latest_good(run_dir) / "config.yaml"
    file.write_text(file.read_text().replace("module_lr", "player_lr"))
    complete = file.with_name("COMPLETE")
    complete.write_text(json.dumps(json.loads(complete.read_text()) | {"config.yaml": file_entry(file)}))
    old_key = r"old config key optim\.player_lr\.\w+: rename it to optim\.module_lr\.\w+ there"
    with pytest.raises(UserError, match=old_key):
        loop.train(lm_config(codes_store, run_dir, *LM, "train.steps=2"))


def test_run_whose_config_has_keys_of_other_tasks_resumes(codes_store, tmp_path):
    """As of a version in which every config had the sections of all tasks."""
    run_dir = tmp_path / "run"
    loop.train(lm_config(codes_store, run_dir, *LM, "train.steps=1"))
    file = checkpoint.latest_good(run_dir) / "config.yaml"
    old = {"text": {"name": "minilm"}, "losses": {"mel": 15.0}, "codec_training": {"restart_every": 50}}
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(file), old), file)
    complete = file.parent / "COMPLETE"
    complete.write_text(json.dumps(json.loads(complete.read_text()) | {"config.yaml": file_entry(file)}))
    loop.train(lm_config(codes_store, run_dir, *LM, "train.steps=2"))
    assert checkpoint.read_state(checkpoint.latest_good(run_dir))["step"] == 2
