"""A training keeps going: skipped steps, roll-backs, several ranks, a full disk, checkpoints in a thread, stalls."""

import json
import math
import threading
import time

import pytest
import torch
from processes import run_ranks
from small_runs import metric_rows, run_contents
from small_stores import lm_config, write_codes_store

from ssmttm import checkpoint, files
from ssmttm.errors import UserError
from ssmttm.training import checkpointer, loop
from ssmttm.training.monitoring.watchdog import Watchdog
from ssmttm.training.optim.skip_step import WINDOW, SkipStep
from ssmttm.training.step import TrainedModule
from ssmttm.training.tasks import lm

CPU = torch.device("cpu")
SETTINGS = ("data.batch_size=2", "train.eval_every=0", "train.checkpoint_every=0", "schedule.warmup_steps=0")


@pytest.fixture(scope="module")
def codes_store(tmp_path_factory):
    return write_codes_store(tmp_path_factory.mktemp("store") / "codes")


@pytest.fixture
def bad_steps(monkeypatch):
    """A function that makes the loss of some calls NaN, counted over the whole process from 0; returns the ids of the
    items of every call."""
    original, seen = lm.LanguageModelTask.losses, []

    def make(*calls):
        def losses(self, modules, batch, denominators, step):
            named = original(self, modules, batch, denominators, step)
            if len(seen) in calls:
                named["model"]["cross_entropy"] = named["model"]["cross_entropy"] * math.nan
            seen.append(batch["ids"])
            return named

        monkeypatch.setattr(lm.LanguageModelTask, "losses", losses)
        return seen

    return make


# --- the decision ----------------------------------------------------------------------------------------------------


def check(skipping, loss, norm=1.0, **others):
    values = {"loss": loss, "grad_norm": norm, **others}
    return skipping.check({name: torch.tensor(float(value)) for name, value in values.items()}).item()


def test_value_that_is_not_finite_is_skipped_and_counted():
    skipping = SkipStep(CPU, sigma=None)
    steps = [(1, 1, 1), (math.nan, 1, 1), (1, math.inf, 1), (1, 1, -math.inf), (1e30, 1, 1), (math.nan, 1, 1)]
    found = [check(skipping, loss, norm, discriminator_loss=other) for loss, norm, other in steps]
    assert found == [0, 1, 1, 1, 0, 1]
    assert skipping.counts() == (4, 1)


@pytest.mark.parametrize("which", ["loss", "norm"])
def test_outlier_of_the_recent_window_is_skipped(which):
    torch.manual_seed(0)
    skipping = SkipStep(CPU, sigma=6.0)
    assert check(skipping, 1e6) == 0  # the window is not filled yet
    skipping.start_again()
    values = (3 + 0.1 * torch.randn(WINDOW)).tolist()
    assert [check(skipping, value, value) for value in values] == [0] * WINDOW
    mean, std = torch.tensor(values).mean().item(), torch.tensor(values).std().item()
    below, above = mean + 5.9 * std, mean + 6.1 * std
    assert check(skipping, **{"loss": mean, which: above}) == 1
    assert check(skipping, **{"loss": mean, which: below}) == 0
    assert check(skipping, 0.0, 0.0) == 0  # a low one is none
    check(skipping, math.nan)
    assert check(skipping, mean, mean) == 0  # NaN does not enter the window
    assert any(not check(skipping, 5.0, 5.0) for _ in range(WINDOW))  # a lasting change is followed


def test_state_of_skipping_is_exact():
    torch.manual_seed(0)
    first, values = SkipStep(CPU, 6.0), torch.rand(100).tolist()
    for value in values:
        check(first, value)
    second = SkipStep(CPU, 6.0)
    second.load(json.loads(json.dumps(first.state())))
    for loss in (*values, 2.0, math.nan):
        assert check(first, loss) == check(second, loss)
    assert first.state() == second.state() and first.counts() == second.counts()


def test_decision_waits_for_no_device():
    from far_device import far_device

    with far_device() as device:
        skipping = SkipStep(device, 6.0)
        values = {name: torch.full((), 1.0, device=device) for name in ("loss", "grad_norm")}
        assert skipping.check(values).device == device


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_skipped_update_changes_nothing(kind, codes_store, tmp_path):
    from accelerate import Accelerator

    settings = lm_config(codes_store, tmp_path / "run", f"optim={kind}").optim
    torch.manual_seed(0)
    module = TrainedModule("model", torch.nn.Linear(4, 3), settings, Accelerator(cpu=True))

    def contents():
        states = [value for optimizer in module.optimizers.values() for state in optimizer.state.values()
                  for value in state.values()]  # fmt: skip
        return [value.clone() for value in (*module.module.parameters(), *states)]

    def update(skip, bad=1.0):
        module.module(torch.ones(2, 4)).square().sum().mul(bad).backward()
        module.update(torch.tensor(skip))

    update(0.0)
    before = contents()
    update(1.0, bad=math.nan)
    assert all(torch.equal(one, other) for one, other in zip(contents(), before, strict=True))
    assert all(parameter.grad is None for parameter in module.module.parameters())
    update(0.0)
    assert not any(torch.equal(one, other) for one, other in zip(contents(), before, strict=True))


# --- in a training ---------------------------------------------------------------------------------------------------


def test_bad_step_is_left_out_and_the_run_goes_on(codes_store, tmp_path, bad_steps):
    bad_steps(2)
    run = loop.train(lm_config(codes_store, tmp_path / "run", *SETTINGS, "train.steps=5"))
    rows = metric_rows(run)
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1]
    assert "loss" not in rows[2] and all(math.isfinite(row["loss"]) for row in (rows[1], rows[3]))
    assert {"data_wait", "peak_memory_gib"} <= rows[-1].keys()
    tensors, *_ = run_contents(run)
    steps = {float(value) for name, value in tensors["optimizer"].items() if name.endswith("/step")}
    assert steps == {4.0} and all(value.isfinite().all() for value in tensors["model"].values())


def test_run_stops_after_too_many_in_a_row(codes_store, tmp_path, bad_steps):
    bad_steps(1, 3, 4, 5)
    with pytest.raises(UserError, match=r"step 6: .*loss.* not a finite number, as in the 2 steps before; the weights"):
        loop.train(lm_config(codes_store, tmp_path / "run", *SETTINGS, "train.steps=9", "train.skip_limit=3"))


def test_run_is_rolled_back_with_a_lower_rate_and_without_the_batches(codes_store, tmp_path, bad_steps, capsys):
    overrides = ("train.steps=8", "train.checkpoint_every=2", "train.skip_limit=2", "train.rollbacks=1",
                 "train.rollback_lr=0.1", "schedule=constant", "schedule.warmup_steps=0")  # fmt: skip
    items = bad_steps(5, 6)  # steps 6 and 7; the checkpoint of step 6 has the weights of step 5
    run = loop.train(lm_config(codes_store, tmp_path / "run", *SETTINGS, *overrides))
    assert "step 7" in (warning := capsys.readouterr().err) and "rolled back to step-00000006" in warning
    rows = metric_rows(run)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["lr"] for row in rows] == pytest.approx([0.01] * 6 + [0.001] * 2)
    task = lm.LanguageModelTask(lm_config(codes_store, tmp_path / "run", *SETTINGS))
    loader = task.loader("train", 2, 0, 1)
    assert items == [loader.batch(n)["ids"] for n in range(9)]  # batch 6 is not tried again
    state = checkpoint.read_state(checkpoint.latest_good(run))
    assert (state["rollbacks"], state["left_out"], state["lr_factor"]) == (1, 1, 0.1)
    again = (*overrides, "train.steps=10")
    resumed = metric_rows(loop.train(lm_config(codes_store, tmp_path / "run", *SETTINGS, *again)))
    assert items[9:] == [loader.batch(n)["ids"] for n in (9, 10)] and resumed[-1]["lr"] == pytest.approx(0.001)


def test_nan_on_one_rank_of_two_is_skipped_by_both(codes_store, tmp_path, bad_steps):
    def train(rank):
        bad_steps(*([1] if rank == 1 else []))
        counts, original = [], SkipStep.check

        def check(self, values):
            skip = original(self, values)
            counts.append([skip.item(), *self.counts()])
            return skip

        SkipStep.check = check
        loop.train(lm_config(codes_store, tmp_path / "run", *SETTINGS, "train.steps=3"))
        (tmp_path / f"counts-{rank}.json").write_text(json.dumps(counts))

    run_ranks(2, train, tmp_path)
    both = [json.loads((tmp_path / f"counts-{rank}.json").read_text()) for rank in range(2)]
    assert both[0] == both[1] == [[0, 0, 0], [1, 1, 1], [0, 1, 0]]
    tensors, *_ = run_contents(tmp_path / "run")
    assert {float(value) for name, value in tensors["optimizer"].items() if name.endswith("/step")} == {2.0}


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_full_disk_keeps_the_last_checkpoint_and_the_training_goes_on(codes_store, tmp_path, monkeypatch, capsys):
    original, full = checkpoint.save_checkpoint, []

    def save(folder, **contents):
        if checkpoint.step_of(folder) in full:
            raise files.DiskFull(f"the disk is full, {folder} is not written: free some space and run again")
        return original(folder, **contents)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    overrides = (*SETTINGS, "train.checkpoint_every=2", "train.keep_checkpoints=9")
    full[:] = [4]
    run = loop.train(lm_config(codes_store, tmp_path / "run", *overrides, "train.steps=6"))
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "disk is full" in warning and "last good checkpoint is" in warning
    assert "step-00000002; the training goes on" in warning
    assert [checkpoint.step_of(folder) for folder in checkpoint.checkpoints(run)] == [2, 6]
    full[:] = [8]
    with pytest.raises(UserError, match="disk is full"):  # of the last checkpoint, with exit code 2
        loop.train(lm_config(codes_store, tmp_path / "run", *overrides, "train.steps=8"))
    assert checkpoint.step_of(checkpoint.latest_good(run)) == 6


def test_checkpoint_is_written_from_a_snapshot_while_the_training_goes_on(codes_store, tmp_path, monkeypatch):
    """The thread begins to write step 2 when step 4 is done."""
    overrides = (*SETTINGS, "train.steps=4", "train.checkpoint_every=2", "train.keep_checkpoints=9")
    loop.train(lm_config(codes_store, tmp_path / "plain", *overrides, "train.async_checkpoints=false"))
    done, original, threads = threading.Event(), checkpoint.save_checkpoint, []
    after_step = lm.LanguageModelTask.after_step

    def save(folder, **contents):
        threads.append(threading.current_thread())
        assert done.wait(20)
        return original(folder, **contents)

    def note(self, step):
        if step == 3:
            done.set()
        return after_step(self, step)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    monkeypatch.setattr(lm.LanguageModelTask, "after_step", note)
    loop.train(lm_config(codes_store, tmp_path / "thread", *overrides))
    assert threading.main_thread() not in threads and len(threads) == 2
    for step in (2, 4):
        name = f"checkpoints/step-0000000{step}"
        for file in ("model", "ema", "optimizer"):
            expected = checkpoint.read_tensors(tmp_path / "plain" / name, file)
            found = checkpoint.read_tensors(tmp_path / "thread" / name, file)
            assert all(torch.equal(found[key], value) for key, value in expected.items()), (step, file)


def test_error_of_the_writing_thread_ends_the_training(codes_store, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointer.checkpoint, "save_checkpoint", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.train(lm_config(codes_store, tmp_path / "run", *SETTINGS, "train.steps=2", "train.checkpoint_every=1"))


# --- stalls and profiles ---------------------------------------------------------------------------------------------


def test_watchdog_names_what_takes_too_long(capsys):
    with Watchdog(3, 0.1) as watchdog:
        with watchdog.doing("loading batch 7"):
            time.sleep(0.3)
        with watchdog.doing("in step 8"):
            pass
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: rank 3 has been loading batch 7 for 0 s")


def test_stalled_rank_and_its_loader_are_named(codes_store, tmp_path, monkeypatch):
    def train(rank):
        if rank == 1:
            original = lm.LanguageModelTask.loader

            def slow_loader(self, split, *sizes):
                loader = original(self, split, *sizes)
                batch = loader.batch
                loader.batch = lambda n: (time.sleep(1.5 * (n == 3)), batch(n))[1]
                return loader

            lm.LanguageModelTask.loader = slow_loader
        settings = ("train.steps=5", "train.stall_seconds=0.4")
        loop.train(lm_config(codes_store, tmp_path / "run", *SETTINGS, *settings))

    run_ranks(2, train, tmp_path)
    assert "rank 1 has been loading batch 3" in (tmp_path / "rank-1.txt").read_text()


@pytest.mark.parametrize(("steps", "n"), [("2:2", 1), ("2:9", 2)])  # the second one reaches beyond the training
def test_profile_of_some_steps(codes_store, tmp_path, steps, n):
    settings = (*SETTINGS, "train.steps=3", f"train.profile={steps}")
    folder = loop.train(lm_config(codes_store, tmp_path / "run", *settings)) / "profile"
    events = json.loads((folder / "trace-rank0.json").read_text())["traceEvents"]
    updates = [event for event in events if event.get("name") == "Optimizer.step#AdamW.step"]
    assert len(updates) == n and "aten::" in (folder / "summary-rank0.txt").read_text()
    for wrong in ("3", "4:2", "0:1", "a:b"):
        with pytest.raises(UserError, match="first and last step to profile"):
            loop.train(lm_config(codes_store, tmp_path / "other", *settings, f"train.profile='{wrong}'"))
    with pytest.raises(UserError, match=r"train\.profile=4:5 begins after the last step, 3"):
        loop.train(lm_config(codes_store, tmp_path / "other", *settings, "train.profile=4:5"))


# --- sizes that change -----------------------------------------------------------------------------------------------


def test_batch_size_and_length_follow_their_schedules(codes_store, tmp_path):
    sizes = (
        "data.batch_size=1",
        "data.frames=5",
        "data.batch_size_schedule=[[2,2],[3,4]]",
        "data.frames_schedule=[[1,9]]",
    )
    settings = lm_config(codes_store, tmp_path / "run", *SETTINGS, *sizes, "train.steps=4")
    rows = metric_rows(loop.train(settings))
    assert [row["samples"] for row in rows] == [1, 2, 4, 8]
    from ssmttm.data.step_values import StepValues

    batch_size = StepValues(1, [[2, 2], [3, 4]])
    loader = lm.LanguageModelTask(settings).loader("train", batch_size, 0, 1)
    batches = [loader.batch(n) for n in range(5)]
    assert [tuple(batch["codes"].shape) for batch in batches] == [(n, 4, t) for n, t in
                                                                 ((1, 5), (1, 9), (2, 9), (4, 9), (4, 9))]  # fmt: skip
    one_by_one = lm.LanguageModelTask(settings).loader("train", 1, 0, 1)
    assert [i for batch in batches for i in batch["ids"]] == [one_by_one.batch(n)["ids"][0] for n in range(12)]
    assert [batch_size.total(steps) for steps in range(6)] == [0, 1, 2, 4, 8, 12]
    with pytest.raises(UserError, match=r"data.batch_size_schedule must list steps and sizes"):
        loop.train(lm_config(codes_store, tmp_path / "other", *SETTINGS, "data.batch_size_schedule=[[2,0]]"))


def test_ranks_that_do_not_fit_are_one_clear_line(codes_store, tmp_path):
    task = lm.LanguageModelTask(lm_config(codes_store, tmp_path / "run", *SETTINGS))
    with pytest.raises(UserError, match="batch_size 2 must be a positive multiple of the 3 processes"):
        task.loader("train", 2, 0, 3)
    with pytest.raises(UserError, match="has 20 train segments for 21 processes: start fewer"):
        task.loader("train", 21, 0, 21)
