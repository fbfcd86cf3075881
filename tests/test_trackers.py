"""Trackers: values, audio and config reach TensorBoard, Weights & Biases and Trackio, without a network."""

import json
import wave

import pytest
import torch
from small_stores import lm_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from ssmttm.errors import UserError
from ssmttm.training.metrics import MetricsLog
from ssmttm.training.monitoring import trackers
from ssmttm.training.run import check_settings

RATE = 8000
WAV = 0.25 * torch.sin(torch.arange(800) * 0.3).expand(2, -1)  # stereo, quiet


def log_run(tmp_path, name):
    """Two steps and a sample, then a second try that goes on after step 1. Returns the run folder."""
    run_dir = tmp_path / "my_run"
    config = lm_config(tmp_path / "store", run_dir, f"train.trackers=[{name}]")
    for start, steps in ((0, (1, 2)), (1, (2, 3))):
        log = MetricsLog(run_dir, config, start)
        for step in steps:
            log.write(step, {"loss": 10.0 * start + step, "valid/loss": 0.5})
        log.write_audio(3, "waltz", WAV, RATE)
        log.close()
    return run_dir


def peak_of(path):
    with wave.open(str(path)) as file:
        assert file.getframerate() == RATE and file.getnchannels() == 2 and file.getsampwidth() == 2
        samples = torch.frombuffer(bytearray(file.readframes(10_000)), dtype=torch.int16)
    assert len(samples) == WAV.numel()
    return samples.abs().max().item() / 32768


def test_tensorboard_gets_values_and_audio(tmp_path):
    files = sorted(
        (log_run(tmp_path, "tensorboard") / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns
    )
    first, second = (EventAccumulator(str(file), {"scalars": 0, "audio": 0}).Reload() for file in files)
    assert [(event.step, event.value) for event in first.Scalars("train/loss")] == [(1, 1.0), (2, 2.0)]
    assert [(event.step, event.value) for event in second.Scalars("train/loss")] == [(2, 12.0), (3, 13.0)]
    assert len(first.Scalars("valid/loss")) == 2
    clip = second.Audio("waltz")[-1]
    assert clip.step == 3 and clip.sample_rate == RATE and clip.length_frames == 800
    restarts = [event.step for event in EventFileLoader(str(files[1])).Load() if event.HasField("session_log")]
    assert restarts == [2]  # what the first try logged from step 2 on is hidden


def test_a_run_without_trackers_keeps_its_own_record(tmp_path):
    run_dir = tmp_path / "run"
    log = MetricsLog(run_dir, lm_config(tmp_path / "store", run_dir, "train.trackers=[]"), 0)
    log.write(1, {"loss": 1.0})
    log.close()
    assert json.loads((run_dir / "metrics.jsonl").read_text()) == {"step": 1, "loss": 1.0}
    assert not (run_dir / "tensorboard").exists()


@pytest.fixture
def wandb():
    """It reads its settings from the environment once."""
    module = pytest.importorskip("wandb")
    module.teardown()
    yield module
    module.teardown()


def test_wandb_logs_offline(tmp_path, monkeypatch, wandb):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = log_run(tmp_path, "wandb") / "wandb"
    runs = sorted(folder.glob("offline-run-*"))
    ids = {run.name.rpartition("-")[2] for run in runs}
    assert runs and ids == {(tmp_path / "my_run" / "tracker_id").read_text()}
    logged = b"".join(path.read_bytes() for run in runs for path in run.glob("*.wandb"))
    assert all(name in logged for name in (b"train/loss", b"valid/loss", b"samples/waltz"))
    clip = next(folder.glob("**/waltz*.wav"))
    assert peak_of(clip) == pytest.approx(0.25, abs=0.002)


def test_wandb_without_account_is_one_clear_line(tmp_path, monkeypatch, wandb):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match="run `wandb login`, or set WANDB_MODE=offline"):
        log_run(tmp_path, "wandb")


def test_trackio_logs_locally(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    trackio = pytest.importorskip("trackio")
    log_run(tmp_path, "trackio")
    (run,) = trackio.Api().runs("ssmttm")
    assert run.name == f"my_run-{(tmp_path / 'my_run' / 'tracker_id').read_text()}"
    assert peak_of(next((tmp_path / "trackio").glob("**/*.wav"))) == pytest.approx(0.25, abs=0.002)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_tracker_that_is_not_installed_is_one_clear_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    config = lm_config(tmp_path / "store", tmp_path / "run", f"train.trackers=[{name}]")
    with pytest.raises(UserError, match=rf"has {name}, which is not installed: pip install ssmttm\[track\]"):
        check_settings(config)
    assert not (tmp_path / "run").exists()


def test_unknown_tracker_is_one_clear_line(tmp_path):
    config = lm_config(tmp_path / "store", tmp_path / "run", "train.trackers=[mlflow]")
    with pytest.raises(UserError, match="=mlflow: choose from tensorboard, wandb, trackio"):
        check_settings(config)
