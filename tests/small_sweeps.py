"""Sweeps of debug trainings, or of programs that stand for them."""

from pathlib import Path

from omegaconf import OmegaConf
from small_stores import CODEBOOK_SIZE, FRAMES, N_CODEBOOKS, TEXT_DIM

from ssmttm import config
from ssmttm.launch import job as launch_job

HERE = Path(__file__).parent
FAKE = HERE / "fake_train.py"


def settings(tmp_path, grid, steps=5, parallel=2, **more):
    """A sweep of debug trainings, composed as by the command."""
    composed = config.load("launcher=local", root="sweep")
    OmegaConf.set_struct(composed, False)
    sweep = {"name": "s", "experiment": "debug", "grid": grid, "budget": {"steps": steps}, **more}
    changes = {"store": "none", "out": str(tmp_path / "sweep"), "launcher": {"parallel": parallel}, "sweep": sweep}
    return OmegaConf.merge(composed, changes)


def use_fake_training(monkeypatch):
    """Jobs run fake_train.py."""
    monkeypatch.setattr(launch_job, "TRAIN", FAKE)
    monkeypatch.setattr(launch_job, "POLL_SECONDS", 0.02)


def starts(folder, name):
    """How often a job's training was started."""
    return (folder.job_folder(name) / "run" / "starts").read_text().count("start")


def lines(folder, name):
    """Those of the metrics of a job's training."""
    path = folder.job_folder(name) / "run" / "metrics.jsonl"
    return path.read_text().splitlines() if path.is_file() else []


RATES = {"optim.lr": [0.001, 0.01]}


def debug_settings(tmp_path, store):
    sizes = [
        "model.d_model=16", "model.headdim=8", "model.d_state=4", f"model.n_codebooks={N_CODEBOOKS}",
        f"model.codebook_size={CODEBOOK_SIZE}", f"model.text_dim={TEXT_DIM}", f"data.frames={FRAMES}",
        "train.precision=fp32", "train.eval_every=2", "train.log_every=1",
    ]  # fmt: skip
    sweep_settings = settings(tmp_path, {"model.layers": ["mamba2", "attention"]}, steps=4, overrides=sizes)
    return OmegaConf.merge(sweep_settings, {"store": str(store)})
