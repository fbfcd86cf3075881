"""Trainings by several processes, without sharding: equal to one process, whatever their number on each resume."""

import json

import pytest
import torch
from processes import run_ranks
from small_runs import metric_rows, run_contents
from small_stores import lm_config, write_codes_store

from ssmttm.errors import UserError
from ssmttm.training import loop
from ssmttm.training.metrics import peak_flops
from ssmttm.training.parallel.ranks import JointWork
from ssmttm.training.tasks import lm

STEPS = 4


@pytest.fixture(scope="module")
def codes_store(tmp_path_factory):
    peak_flops(torch.device("cpu"), "fp32")  # measured once, not in every rank
    return write_codes_store(tmp_path_factory.mktemp("store") / "codes")


def train(count, codes_store, folder, steps):
    """Train up to a step with `count` ranks."""
    overrides = ("data.batch_size=4", "data.caption_dropout=0.3", "train.eval_every=0", "train.checkpoint_every=0",
                 "schedule.warmup_steps=0", f"schedule.length={STEPS}", f"train.steps={steps}")  # fmt: skip
    settings = lm_config(codes_store, folder / "run", *overrides)

    def run(rank):
        original = lm.LanguageModelTask.losses

        def note_items(self, modules, batch, denominators, step):
            items = zip(batch["ids"], batch["captions"], batch["codes"].flatten(1).sum(1).tolist(), strict=True)
            (folder / f"items-{step}-{rank}.json").write_text(json.dumps(list(items)))
            return original(self, modules, batch, denominators, step)

        lm.LanguageModelTask.losses = note_items
        loop.train(settings)

    run_ranks(count, run, folder)


def items(folder):
    """Name, caption and sum of the codes of every item, by step."""
    return [
        sorted(item for path in folder.glob(f"items-{step}-*.json") for item in json.loads(path.read_text()))
        for step in range(STEPS)
    ]


def test_one_two_and_four_processes_see_the_same_items_and_reach_the_same_weights(codes_store, tmp_path):
    """One process, and a run that goes from two to one to four."""
    one, mixed = tmp_path / "one", tmp_path / "mixed"
    for folder, parts in ((one, [(1, STEPS)]), (mixed, [(2, 1), (1, 2), (4, STEPS)])):
        folder.mkdir()
        for count, steps in parts:
            train(count, codes_store, folder, steps)
    expected = run_contents(one / "run")[0]
    losses = [row["loss"] for row in metric_rows(one / "run")]
    assert items(mixed) == items(one)
    assert [row["loss"] for row in metric_rows(mixed / "run")] == pytest.approx(losses, abs=1e-5)
    for name, tensors in run_contents(mixed / "run")[0].items():
        for key, value in tensors.items():
            torch.testing.assert_close(value, expected[name][key], rtol=0, atol=1e-5, msg=key)
    assert len(list(mixed.glob("items-0-*"))) == 2 and len(list(mixed.glob(f"items-{STEPS - 1}-*"))) == 4


def test_error_of_one_rank_is_raised_on_all(tmp_path):
    """The user's as it is; another one as it is where it happened, and with the rank elsewhere."""

    def work(rank):
        torch.distributed.init_process_group("gloo")
        joint = JointWork(rank, 2)
        assert joint.on_first(lambda: rank + 5) == 5 and joint.on_each(lambda: rank) == [0, 1]

        def fail(error):
            if rank == 1:
                raise error

        with pytest.raises(UserError, match="the disk"):
            joint.on_each(lambda: fail(UserError("the disk")))
        error, message = (ValueError, "a bug") if rank == 1 else (RuntimeError, r"rank 1: ValueError\('a bug'\)")
        with pytest.raises(error, match=message):
            joint.on_each(lambda: fail(ValueError("a bug")))
        torch.distributed.destroy_process_group()

    run_ranks(2, work, tmp_path)
