"""Sharded trainings (FSDP2 on CPUs, gloo): equal to one process, exact resume, other numbers of ranks, crashes."""

import math
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from omegaconf import OmegaConf
from processes import ROOT, run_ranks
from safetensors.torch import save_file
from small_runs import metric_rows
from small_stores import lm_config, second_stage_config, small_codec, write_codes_store

from ssmttm import checkpoint, files
from ssmttm.errors import UserError
from ssmttm.export.model_folder import export
from ssmttm.generation.loading import load_language_model, open_model_folder
from ssmttm.training import loop
from ssmttm.training.metrics import peak_flops
from ssmttm.training.parallel.sharding import build_sharding
from ssmttm.training.tasks import lm

SETTINGS = ("data.batch_size=6", "data.caption_dropout=0.3", "train.eval_every=0", "train.checkpoint_every=1000",
            "schedule.warmup_steps=0", "schedule.length=6")  # fmt: skip


@pytest.fixture(scope="module")
def codes_store(tmp_path_factory):
    return write_codes_store(tmp_path_factory.mktemp("store") / "codes")


@pytest.fixture(scope="module")
def sharded():
    """The environment that `accelerate launch` gives to each rank."""
    peak_flops(torch.device("cpu"), "fp32")  # measured once, not in every rank
    arguments = ["--config_file", str(ROOT / "configs/accelerate/fsdp_cpu2.yaml"), "train.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    environment = prepare_multi_gpu_env(args)
    return {name: environment[name] for name in environment if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}


def train_ranks(count, settings, environment, folder, prepare=lambda rank: None):
    """The same training by several ranks; `prepare` is called in each one first."""

    def train(rank):
        os.environ.update(environment)
        prepare(rank)
        loop.train(settings)

    folder.mkdir(exist_ok=True)
    run_ranks(count, train, folder)


def tensors(run_dir):
    """All tensors of the newest checkpoint by name of the file, joined."""
    folder = checkpoint.latest_good(run_dir)
    names = {path.name.split(".")[0] for path in folder.glob("*.safetensors")}
    return {name: checkpoint.read_tensors(folder, name) for name in sorted(names)}


def assert_equal(first, second, atol=0.0):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].keys() == second[name].keys()
        for key, value in first[name].items():
            torch.testing.assert_close(second[name][key], value, rtol=0, atol=atol, msg=lambda m, k=key: f"{k}: {m}")


# --- equal to one process --------------------------------------------------------------------------------------------


def test_sharded_ranks_train_as_one_process(codes_store, sharded, tmp_path, monkeypatch):
    """Weights, moments, averages, losses, norms, validation; a bad step of one rank, which both skip; and what the main
    process samples between two steps."""
    overrides = (*SETTINGS, "train.steps=4", "losses.tags=1", "tag_head.block=1", "optim.clip=0.5",
                 "train.micro_batch_size=2", "train.recompute=full", "train.eval_every=2", "train.eval_batches=1",
                 "train.sample_every=3")  # fmt: skip
    for name in ("load_store_codec", "load_text_encoder"):
        monkeypatch.setattr(lm, name, lambda *_: SimpleNamespace(fingerprint=""))
    monkeypatch.setattr(lm, "check_fingerprint", lambda *_: None)

    def sample(self, step):
        state = self.model.init_state(1)
        logits = self.model.prefill(torch.ones(1, self.n_codebooks, 3).long(), None, state)
        logits = torch.stack([logits, self.model.step(torch.ones(1, self.n_codebooks).long(), state)])
        save_file({"logits": logits}, Path(self.config.run_dir) / f"sampled-{step}.safetensors")
        return []

    monkeypatch.setattr(lm.LanguageModelTask, "samples", sample)
    one, two = (lm_config(codes_store, tmp_path / name, *overrides) for name in ("one", "two"))
    losses = lm.LanguageModelTask.losses

    def make_bad(last_rank):
        def with_nan(self, modules, batch, denominators, step):
            named = losses(self, modules, batch, denominators, step)
            if last_rank and step == 1:
                named["model"]["cross_entropy"] = named["model"]["cross_entropy"] * math.nan
            return named

        monkeypatch.setattr(lm.LanguageModelTask, "losses", with_nan)

    train_ranks(2, two, sharded, tmp_path / "ranks", lambda rank: make_bad(rank == 1))
    make_bad(True)
    loop.train(one)
    assert_equal(tensors(tmp_path / "one"), tensors(tmp_path / "two"), atol=1e-5)
    assert len(list(checkpoint.latest_good(tmp_path / "two").glob("model.rank-*"))) == 2
    rows, other_rows = (metric_rows(tmp_path / name) for name in ("one", "two"))
    for row, other in zip(rows, other_rows, strict=True):
        for metric in {"loss", "grad_norm", "tag_head_grad_norm", "valid/loss", "lr", "skipped_steps"} & row.keys():
            assert other[metric] == pytest.approx(row[metric], abs=1e-5), metric
    assert [row["skipped_steps"] for row in rows if "skipped_steps" in row] == [0, 1, 1, 1]
    for step in (3, 4):
        assert_equal(*({"": checkpoint.TensorFiles(tmp_path / run, f"sampled-{step}")} for run in ("one", "two")), 1e-5)


def test_sharded_denoiser_with_muon_trains_as_one_process(sharded, tmp_path):
    """Muon rounds to bfloat16 on its way, hence the low rate."""
    store = write_codes_store(tmp_path / "codes", codec=small_codec(tmp_path / "codec"))
    overrides = ("train.steps=2", "train.eval_every=0", "train.sample_every=0", "optim=muon", "optim.lr=0.001")
    loop.train(second_stage_config(store, tmp_path / "one", *overrides))
    train_ranks(2, second_stage_config(store, tmp_path / "two", *overrides), sharded, tmp_path / "ranks")
    assert_equal(tensors(tmp_path / "one"), tensors(tmp_path / "two"), atol=1e-5)
    assert any(name.startswith("model.muon/") for name in tensors(tmp_path / "two")["optimizer"])


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(codes_store, sharded, tmp_path_factory):
    """Five steps of two ranks, with the checkpoints of all steps."""
    folder = tmp_path_factory.mktemp("unbroken")
    every = ("train.steps=5", "train.checkpoint_every=1", "train.keep_checkpoints=9")
    train_ranks(2, lm_config(codes_store, folder / "run", *SETTINGS, *every), sharded, folder / "ranks")
    return folder / "run"


def test_kills_and_a_full_disk_of_one_rank_leave_the_last_good_checkpoint(unbroken, sharded, tmp_path):
    """At step 3 the disk of rank 1 is full; at step 4 rank 1 is killed while it writes its part, then, in the resumed
    run, rank 0 before it renames the folder. The end is that of the unbroken run, bit for bit."""
    run_dir, output = tmp_path / "run", tmp_path / "ranks/rank-0.txt"
    shutil.copytree(unbroken, run_dir)
    for folder in checkpoint.checkpoints(run_dir)[2:]:
        shutil.rmtree(folder)
    settings = OmegaConf.merge(checkpoint.read_config(run_dir), {"run_dir": str(run_dir)})

    def kill(rank, owner, name):
        def prepare(own_rank):
            original, save = getattr(owner, name), checkpoint.save_file

            def die_at_step_4(path, *arguments):
                if own_rank == rank and ".step-00000004" in str(path):
                    path.write_bytes(b"half") if not path.is_dir() else None
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(path, *arguments)

            def full_at_step_3(values, path):
                if own_rank == 1 and ".step-00000003" in str(path):
                    raise checkpoint.SafetensorError("Error while serializing: No space left on device (os error 28)")
                save(values, path)

            setattr(owner, name, die_at_step_4)
            checkpoint.save_file = full_at_step_3

        with pytest.raises(AssertionError):
            train_ranks(2, settings, sharded, output.parent, prepare)
        assert "resumed from step-00000002" in output.read_text()
        assert output.read_text().count("the disk is full") == 1 and "checkpoint is" in output.read_text()
        assert "disk is full" not in output.with_name("rank-1.txt").read_text()
        assert checkpoint.step_of(checkpoint.latest_good(run_dir)) == 2
        left = list((run_dir / "checkpoints").glob(".step-00000004*"))
        assert bool(left) == (rank == 0)  # which removes it, if it can

    kill(1, checkpoint, "_write_tensors")
    kill(0, files, "publish_folder")
    train_ranks(2, settings, sharded, output.parent)
    assert_equal(tensors(unbroken), tensors(run_dir))
    assert [checkpoint.step_of(folder) for folder in checkpoint.checkpoints(run_dir)] == [1, 2, 3, 4, 5]
    assert not list((run_dir / "checkpoints").glob(".step-*"))


def test_run_goes_on_with_other_numbers_of_ranks_sharded_or_not(codes_store, unbroken, sharded, tmp_path):
    """2 sharded ranks, 1 process, 3 sharded ranks, of which some have no row of a small tensor."""
    run_dir = tmp_path / "run"
    shutil.copytree(unbroken, run_dir)
    for folder in checkpoint.checkpoints(run_dir)[2:]:
        shutil.rmtree(folder)
    run = partial(lm_config, codes_store, run_dir, *SETTINGS, "train.checkpoint_every=1")
    loop.train(run("train.steps=3"))
    train_ranks(3, run("train.steps=5"), sharded, tmp_path / "ranks")
    assert_equal(tensors(unbroken), tensors(run_dir), atol=1e-5)
    losses = [[row["loss"] for row in metric_rows(folder)] for folder in (unbroken, run_dir)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_flipped_byte_of_any_part_is_noticed(unbroken, tmp_path, capsys):
    shutil.copytree(unbroken, tmp_path / "run")
    part = tmp_path / "run/checkpoints/step-00000005/ema.rank-1-of-2.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    assert checkpoint.step_of(checkpoint.latest_good(tmp_path / "run")) == 4
    assert "step-00000005 is damaged (ema.rank-1-of-2.safetensors" in capsys.readouterr().err


def test_sharded_checkpoint_is_exported_and_sampled_as_any_other(unbroken, tmp_path):
    averaged = tensors(unbroken)["ema"]
    folder = open_model_folder(unbroken)
    assert_equal({"": averaged}, {"": load_language_model(folder).state_dict()})
    assert len(folder.weights_sha256) == 64
    out = export(unbroken, tmp_path / "out", half=False)
    assert sorted(path.name for path in out.iterdir()) == ["card.json", "config.yaml", "model.safetensors"]
    assert_equal({"": averaged}, {"": checkpoint.read_tensors(out, "model")})


def test_parts_are_joined_along_the_first_axis(tmp_path):
    whole = {"w": torch.arange(6.0).view(3, 2), "n": torch.tensor(4)}
    rows = whole["w"][:2], whole["w"][2:], whole["w"][:0]
    for rank, part in enumerate(rows):
        values = {"w": part.clone()} | ({"n": whole["n"]} if rank == 0 else {})
        checkpoint.write_tensors(tmp_path, {checkpoint.part_name("model", rank, 3): values})
    assert_equal({"": whole}, {"": checkpoint.read_tensors(tmp_path, "model")})
    digest = checkpoint.weights_sha256(tmp_path)
    (tmp_path / "model.rank-2-of-3.safetensors").unlink()
    assert checkpoint.weights_sha256(tmp_path) != digest
    with pytest.raises(UserError, match="has 2 of its 3 parts"):
        checkpoint.read_tensors(tmp_path, "model")


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("codec", {}, r"FSDP is for task=lm, diffusion, not for task=codec: use configs/accelerate/ddp8.yaml"),
        ("lm", {"FSDP_VERSION": "1"}, "fsdp_version=1 is not supported: set fsdp_version: 2"),
        ("lm", {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params is not supported"),
        ("lm", {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "set train.recompute=full instead"),
        ("lm", {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, "no blocks to shard are named"),
        ("lm", {"FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaLayer"}, "names no block of the model: LlamaLayer"),
    ],
)
def test_settings_that_cannot_be_used_are_one_clear_line(sharded, monkeypatch, task, change, message):
    for name, value in (sharded | change).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(UserError, match=message) as caught:
        build_sharding(task, {"model": torch.nn.Linear(2, 2)}, None)
    assert "\n" not in str(caught.value)


def test_one_process_is_not_sharded(sharded, monkeypatch):
    for name, value in sharded.items():
        monkeypatch.setenv(name, value)
    assert build_sharding("lm", {"model": torch.nn.Linear(2, 2)}, None) is None
