"""Distillation as a training: what the student is told, phases, weightings, cache, resumption, what a run leaves."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf
from processes import train_in_two_processes
from small_stores import CODEBOOK_SIZE, TEXT_DIM, lm_config, small_codec, write_codes_store
from test_resume import assert_same, everything, train_with_stops
from test_sample_cli import WordEncoder
from torch.distributions import Categorical, kl_divergence

from ssmttm import checkpoint
from ssmttm.distill.hidden_states import traced_mixers
from ssmttm.errors import UserError
from ssmttm.export.int8 import export_int8
from ssmttm.export.model_folder import export
from ssmttm.generation import pipeline
from ssmttm.generation.loading import load_model, open_model_folder
from ssmttm.models import TokenLM
from ssmttm.models.controls import Controls
from ssmttm.training import loop
from ssmttm.training.tasks import distill_lm, lm
from ssmttm.training.tasks.distill_lm import DistillTask, cache_teacher

WIDE = ("model.d_model=32", "model.n_layers=4", "data.batch_size=4", "train.eval_every=0")
WIDE += ("train.checkpoint_every=1000",)
NARROW = ("model.n_layers=2", "data.batch_size=4", "train.eval_every=5", "train.eval_batches=2")
NARROW += ("train.checkpoint_every=1000", "train.ema_decay=null")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("distill")


@pytest.fixture(scope="module")
def store(root):
    return write_codes_store(root / "codes", codec=small_codec(root / "codec"))


@pytest.fixture(scope="module")
def teacher(root, store):
    return loop.train(lm_config(store, root / "teacher", *WIDE, "train.steps=60"))


@pytest.fixture
def config_of(store, teacher, tmp_path):
    def build(*overrides, name="student"):
        return lm_config(store, tmp_path / name, "task=distill", f"teacher={teacher}", *NARROW, *overrides)

    return build


def twin(*overrides):
    """A student of the teacher's shape."""
    return ("model.d_model=32", "model.n_layers=4", *overrides)


def losses_of(task, step=0, batch=0):
    made = task.loader("train", 4, 0, 1).batch(batch)
    torch.manual_seed(0)
    named = task.losses(task.modules, made, task.counts(made), step)
    assert named.keys() == {"model"}
    return named["model"]


# --- what it learns from --------------------------------------------------------------------------------------------


def test_a_copy_of_the_teacher_has_nothing_to_learn_from_it(config_of):
    task = DistillTask(config_of(*twin("losses.hidden=1", "distill.mixer_steps=1", "distill.transfer.layers=even")))
    assert len(task.transferred) == len(list(task.model.parameters()))
    found = losses_of(task)
    for name in ("kl", "hidden", "mixer"):
        assert found[name].item() == pytest.approx(0, abs=1e-5), name
    assert found["cross_entropy"] > 0.5
    fresh = losses_of(DistillTask(config_of(*twin("losses.hidden=1", "distill.mixer_steps=1"))))
    assert min(fresh[name].item() for name in ("kl", "hidden", "mixer")) > 0.05


def test_guidance_one_is_the_conditional_and_more_leans_away_from_the_null(config_of):
    answers = {}
    for scale in (0, 1, 2.5):
        task = DistillTask(config_of(f"distill.guidance_scale={scale}"))
        batch = task.loader("train", 4, 0, 1).batch(0)
        given = task._prepare_batch(batch, task.controls.of(batch))
        answers[scale] = task.teacher(given.codes, batch["text"], given.controls)[0]
        plain = task.teacher.model(given.codes, batch["text"])[..., :CODEBOOK_SIZE]
    assert torch.equal(answers[1], plain) and not torch.equal(answers[0], plain)
    torch.testing.assert_close(answers[2.5], answers[0] + 2.5 * (answers[1] - answers[0]), rtol=1e-4, atol=1e-4)


def test_a_student_learns_its_teachers_distribution(config_of):
    """With the divergence it comes nearer to the teacher than with the data alone."""
    near = {}
    for name, weights in [("kl", ("losses.cross_entropy=0", "losses.kl=1")), ("data", ("losses.kl=0",))]:
        run = loop.train(config_of(*weights, "train.steps=60", name=name))
        task = DistillTask(config_of("losses.kl=1", f"init={run}", "data.caption_dropout=0", name="asked"))
        checkpoint.fill(task.model, checkpoint.load_weights(checkpoint.latest_good(run)), run)
        with torch.no_grad():
            near[name] = sum(losses_of(task, batch=n)["kl"].item() for n in range(5)) / 5
    assert near["kl"] < 0.8 * near["data"], near


@pytest.mark.parametrize(("divergence", "temperature"), [("forward", 1.0), ("forward", 2.5), ("reverse", 0.5)])
def test_the_kl_loss_is_that_of_softened_distributions_at_real_positions(divergence, temperature, config_of):
    """Against torch.distributions, position by position; times the temperature's square (arXiv 1503.02531)."""
    weights = [4, 3, 2, 1]
    told = (f"distill.divergence={divergence}", f"distill.temperature={temperature}", "data.frames=24")
    task = DistillTask(config_of(*told, f"train.codebook_weights={weights}"))
    batch = task.loader("train", 4, 0, 1).batch(0)
    assert not bool(batch["frame_mask"].all())
    given = task._prepare_batch(batch, task.controls.of(batch))
    with torch.no_grad():
        student, teacher = (m(given.codes, batch["text"]) for m in (task.model, task.teacher.model))
    q, p = (Categorical(logits=logits / temperature) for logits in (student, teacher))
    each = kl_divergence(p, q) if divergence == "forward" else kl_divergence(q, p)  # [b, K, S]
    by_codebook = [each[:, k][given.real[:, k]].mean().item() for k in range(4)]
    expected = temperature**2 * sum(w * value for w, value in zip(weights, by_codebook, strict=True)) / sum(weights)
    assert losses_of(task)["kl"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("conditioning", ["prefix", "cross_attention"])
def test_padding_is_not_learnt_from(conditioning, store, root, config_of):
    """The same segments, whole, in a row of 20 frames and of 29."""
    shape = (f"model.conditioning={conditioning}", "model.n_heads=4")
    teacher = loop.train(lm_config(store, root / conditioning, *WIDE, *shape, "train.steps=2"))
    told = twin(*shape, f"teacher={teacher}", "losses.hidden=1", "distill.mixer_steps=1")
    short, long = (losses_of(DistillTask(config_of(*told, f"data.frames={n}"))) for n in (20, 29))
    for name in ("cross_entropy", "kl", "hidden", "mixer", "distillation"):
        torch.testing.assert_close(short[name], long[name], rtol=1e-5, atol=1e-6)


def test_losses_of_micro_batches_add_up(config_of):
    task = DistillTask(config_of(*twin("losses.hidden=1", "distill.mixer_steps=1", "data.frames=24")))
    batch = task.loader("train", 4, 0, 1).batch(0)
    counts, whole = task.counts(batch), losses_of(task)
    parts = [
        {k: type(v)(*(t[rows] for t in v)) if k == "text" else v[rows] for k, v in batch.items()}
        for rows in (slice(0, 1), slice(1, 4))
    ]
    found = [task.losses(task.modules, part, counts, 0)["model"] for part in parts]
    for name in ("cross_entropy", "kl", "hidden", "mixer", "distillation"):
        torch.testing.assert_close(found[0][name] + found[1][name], whole[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("predict", [(True, False), (False, True)], ids=["teacher", "student"])
def test_a_logit_for_the_special_token_is_no_part_of_the_distribution(predict, store, config_of, tmp_path):
    """Only one of them has it: their distributions of the codes are compared all the same."""
    of_teacher, of_student = (f"model.predict_special={str(it).lower()}" for it in predict)
    teacher = loop.train(lm_config(store, tmp_path / "special", *WIDE, of_teacher, "train.steps=2"))
    task = DistillTask(config_of(*twin(f"teacher={teacher}", of_student, "distill.transfer.layers=even")))
    assert losses_of(task)["kl"].item() == pytest.approx(0, abs=1e-5)


def test_the_teachers_work_is_counted_a_third(config_of, tmp_path):
    """It has no backward pass; guided it runs twice, and cached or unasked not at all."""
    asked = ("data.fixed_crops=true",)
    cache = cache_teacher(config_of(*asked), tmp_path / "cache", 4)
    told = {"plain": (), "guided": ("distill.guidance_scale=3",), "cached": (*asked, f"distill.cache={cache}"),
            "alone": ("losses.kl=0",)}  # fmt: skip
    flops = {}
    for name, overrides in told.items():
        task = DistillTask(config_of(*overrides))
        batch = task.loader("train", 4, 0, 1).batch(0)
        flops[name] = task.work(batch, 0)[2]
    length = task.pattern.sequence_length(20)
    tokens, of_null = batch["text"].mask.shape[1], task.teacher.null_text.mask.shape[1]
    teacher, null = (4 * task.teacher.model.flops(length, n) / 3 for n in (tokens, of_null))
    alone = 4 * task.model.flops(length, tokens)
    assert flops["alone"] == flops["cached"] == alone
    assert flops["plain"] == pytest.approx(alone + teacher)
    assert flops["guided"] == pytest.approx(alone + teacher + null)
    matching = DistillTask(config_of(*twin("losses.kl=0", "distill.mixer_steps=1")))
    asked, unasked = (matching.work(batch, step)[2] for step in (0, 1))
    assert asked - unasked == pytest.approx(teacher)


@pytest.mark.parametrize("kind", ["tempo", "chroma"])
def test_teacher_and_student_hear_the_same_wishes(kind, store, config_of, tmp_path):
    """A twin of a teacher that hears has nothing to learn from it, whatever is wished for or withheld."""
    told = (f"model.{kind}=true", f"data.{kind}_dropout=0.5")
    teacher = loop.train(lm_config(store, tmp_path / "hearing", *WIDE, *told, "train.steps=30"))
    task = DistillTask(config_of(*twin(*told, f"teacher={teacher}", "distill.transfer.layers=even")))
    assert losses_of(task)["kl"].item() == pytest.approx(0, abs=1e-5)
    batch = task.loader("train", 16, 0, 1).batch(0)
    given = task._prepare_batch(batch, task.controls.of(batch))
    asked, unasked = (task.teacher(given.codes, batch["text"], controls)[0] for controls in (given.controls, Controls()))
    assert not torch.allclose(asked, unasked, atol=1e-4)


def test_temperature_and_kind_of_divergence_matter(config_of):
    options = [(), ("distill.temperature=2",), ("distill.divergence=reverse",), ("distill.skew=0.3",)]
    found = [losses_of(DistillTask(config_of(*option)))["kl"].item() for option in options]
    assert len({round(value, 5) for value in found}) == 4


# --- phases ---------------------------------------------------------------------------------------------------------


def test_mixers_first_then_streams_then_all(config_of):
    """Each phase has a gradient of its own; every parameter has one, be it 0."""
    task = DistillTask(config_of(*twin("losses.hidden=1", "distill.mixer_steps=2", "distill.hidden_steps=3")))

    def slopes(step):
        task.model.zero_grad()
        found = losses_of(task, step)
        found["distillation"].backward()
        assert all(p.grad is not None for p in task.model.parameters())
        moved = {n for n, p in task.model.named_parameters() if p.grad.abs().sum() > 0}
        return found, moved

    found, moved = slopes(1)
    assert torch.equal(found["distillation"], found["mixer"])
    assert moved and all(".sublayers.0." in name for name in moved)
    found, moved = slopes(4)
    assert "mixer" not in found and torch.equal(found["distillation"], found["hidden"])
    assert "heads.weight" not in moved and "embedding.weight" in moved
    found, moved = slopes(5)
    total = found["cross_entropy"] + found["kl"] + found["hidden"]
    torch.testing.assert_close(found["distillation"], total)
    assert "heads.weight" in moved


@pytest.mark.parametrize("guidance", [1, 3])
def test_mixers_are_fed_with_the_teachers_streams(guidance, config_of):
    told = ("distill.mixer_steps=1", "distill.layer_map=[2,2,3,4]", f"distill.guidance_scale={guidance}")
    task = DistillTask(config_of(*twin(*told)))
    batch = task.loader("train", 4, 0, 1).batch(0)
    given = task._prepare_batch(batch, task.controls.of(batch))
    with traced_mixers(task.teacher.model, task.blocks) as seen:
        _, hidden_states = task.teacher(given.codes, batch["text"], given.controls, [1, 2])
    assert seen.keys() == {2, 3, 4}
    (x, *_), output = seen[2]
    length = given.codes.shape[-1]
    first = x[0][batch["text"].mask[0].sum() :][:length]  # behind the text, in whose room the audio stands
    torch.testing.assert_close(first, hidden_states[0][0])
    assert output.shape == x.shape
    task.teacher(given.codes, batch["text"], given.controls)
    assert len(seen) == 3  # no longer listened to


def test_a_transformer_teaches_a_state_space_student(store, root, config_of, tmp_path):
    attention = ("model.layers=attention", "model.n_heads=4", "model.d_model=16", "model.n_layers=2", "train.steps=20")
    transformer = loop.train(lm_config(store, root / "transformer", *WIDE, *attention))
    told = ("losses.hidden=1", "distill.mixer_steps=8", "distill.hidden_steps=4", "train.steps=16")
    shape = ("model.headdim=4", "model.ngroups=4", "model.d_state=4", "distill.transfer.layers=even")
    run = loop.train(config_of(*told, *shape, f"teacher={transformer}"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    mixer = [row["mixer"] for row in rows if "mixer" in row]
    assert len(mixer) == 8 and mixer[-1] < mixer[0]


@pytest.mark.parametrize("weighting", ["gradient", "uncertainty"])
def test_two_processes_learn_as_one(weighting, config_of, tmp_path):
    """With a guided teacher, micro-batches, and each phase in turn."""
    told = ("losses.hidden=0.5", "distill.guidance_scale=2", f"distill.weighting={weighting}", "train.steps=5")
    phases = ("distill.mixer_steps=1", "distill.hidden_steps=1", "train.micro_batch_size=1", "train.eval_every=0")
    one = config_of(*twin(*told, *phases), name="one")
    loop.train(one)
    train_in_two_processes(one, tmp_path / "two")

    def metrics(run):
        rows = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        return [[row["loss"], row["grad_norm"], row["weight_kl"]] for row in rows if "loss" in row]

    torch.testing.assert_close(torch.tensor(metrics("two")), torch.tensor(metrics("one")), rtol=1e-3, atol=1e-4)


# --- weighting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["magnitude", "gradient", "uncertainty"])
def test_a_run_with_a_dynamic_weighting_resumes_exactly(rule, config_of, monkeypatch):
    asked = (f"distill.weighting={rule}", "losses.hidden=0.5", "train.steps=14", "data.caption_dropout=0.3")
    stopped = config_of(*asked, name="stopped")
    train_with_stops(stopped, DistillTask, (4, 11), monkeypatch)
    unbroken = everything(loop.train(config_of(*asked, name="unbroken")))
    assert_same(unbroken, everything(Path(stopped.run_dir)))
    assert {"weighting", "projections"} <= unbroken[0].keys()
    sizes = unbroken[0]["weighting"]
    moved = sizes["log_variance"] if rule == "uncertainty" else sizes["sizes"]
    assert moved.abs().min() > 0


def test_magnitudes_weigh_losses_alike(config_of):
    run = loop.train(config_of("distill.weighting=magnitude", "losses.hidden=1", "train.steps=40"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "weight_kl" in row][-1]
    plain = [last[name] for name in distill_lm.LOSSES]
    shares = [last[name] * last[f"weight_{name}"] for name in distill_lm.LOSSES]
    assert max(shares) < 1.6 * min(shares) and max(plain) > 2 * min(plain)


def test_gradients_weigh_losses_alike(config_of):
    """At the codes' embedding, measured by hand for the same batch."""
    task = DistillTask(config_of("distill.weighting=gradient", "losses.hidden=1"))
    losses_of(task, 0)
    task.after_step(0)
    named, given, at = losses_of(task, 1), task.modules["weighting"].given, task.model.embedding.weight
    norms = torch.stack([torch.autograd.grad(named[n], at, retain_graph=True)[0].norm() for n in given])
    pulls = task.modules["weighting"].weights() * norms
    assert pulls.max() < 1.1 * pulls.min() and norms.max() > 2 * norms.min()


@pytest.fixture
def fresh_accelerator():
    """A process may otherwise train in one precision only."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_teacher_runs_in_the_precision_of_the_training(
    precision, config_of, tmp_path, monkeypatch, fresh_accelerator
):
    """And so it does when it is asked for a cache, which a student has no part in."""
    seen = set()

    def watched(self, *args, **kwargs):
        seen.add((torch.is_autocast_enabled("cpu"), self.norm.weight.requires_grad))
        return plain(self, *args, **kwargs)

    plain = TokenLM.forward
    monkeypatch.setattr(TokenLM, "forward", watched)
    loop.train(config_of(f"train.precision={precision}", "train.steps=1", "train.eval_every=0"))
    assert seen == {(precision == "bf16", True), (precision == "bf16", False)}
    seen.clear()
    asked = ("data.fixed_crops=true", f"train.precision={precision}", "distill.transfer.width=importance")
    monkeypatch.setattr(distill_lm, "channel_importance", None)
    cache_teacher(config_of(*asked), tmp_path / "cache", 4)
    assert seen == {(precision == "bf16", False)}


# --- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "tolerance", "precision"), [(CODEBOOK_SIZE, 2e-3, "fp32"), (CODEBOOK_SIZE, 2e-3, "bf16"), (4, None, "fp32")]
)
def test_a_cached_run_equals_an_online_one(k, tolerance, precision, config_of, tmp_path, fresh_accelerator):
    """With all codes kept, but for the rounding to float16; several epochs, each shows a segment alike."""
    asked = ("train.steps=15", f"train.precision={precision}")
    asked += ("data.fixed_crops=true", "data.caption_dropout=0.3", "distill.temperature=1.5")
    cache = cache_teacher(config_of(*asked), tmp_path / "cache", k)
    online = everything(loop.train(config_of(*asked, name="online")))
    cached = everything(loop.train(config_of(*asked, f"distill.cache={cache}", name="cached")))
    pairs = [(a[1], b[1]) for a, b in zip(online[3], cached[3], strict=True)]
    if tolerance is not None:
        assert all(abs(a - b) < tolerance for a, b in pairs), pairs
        for name, value in online[0]["model"].items():
            torch.testing.assert_close(cached[0]["model"][name], value, rtol=0, atol=0.02)
    else:
        assert pairs[0][1] < pairs[0][0]


def test_fixed_crops_are_those_of_the_first_epoch(config_of):
    task = DistillTask(config_of("data.fixed_crops=true", "data.caption_dropout=0.5", "data.frames=9"))
    free = DistillTask(config_of("data.caption_dropout=0.5", "data.frames=9"))

    def shown(task, epoch):
        loader, seen = task.loader("train", 4, 0, 1), {}
        for n in range(epoch * 5, epoch * 5 + 5):
            batch = loader.batch(n)
            for row, name in enumerate(batch["ids"]):
                seen[name] = (int(batch["first"][row]), int(batch["text"].mask[row].sum()))
        return seen

    assert shown(task, 0) == shown(task, 3) == shown(free, 0)
    assert shown(free, 0) != shown(free, 3)


def test_caches_that_do_not_fit(config_of, teacher, store, root, tmp_path):
    asked = ("data.fixed_crops=true",)
    cache = cache_teacher(config_of(*asked), tmp_path / "cache", 4)
    told = (*asked, f"distill.cache={cache}")
    DistillTask(config_of(*told))
    other = loop.train(lm_config(store, tmp_path / "other", *WIDE, "train.steps=1"))
    for change, says in [
        (f"teacher={other}", "written for teacher"),
        ("data.frames=12", "frames"),
        ("seed=3", "seed"),
        ("pattern=parallel", "pattern=parallel"),
        ("distill.temperature=2", "temperature"),
        ("data.fixed_crops=false", "data.fixed_crops=true"),
        ("losses.hidden=1", "losses.hidden=0"),
        ("distill.cache=nowhere", "no cache of a teacher"),
    ]:
        with pytest.raises(UserError, match=says):
            DistillTask(config_of(*told, change))
    hearing = loop.train(lm_config(store, tmp_path / "hearing", *WIDE, "model.tempo=true", "train.steps=1"))
    with pytest.raises(UserError, match="whose melody or tempo is withheld"):
        DistillTask(config_of(*told, f"teacher={hearing}"))
    with pytest.raises(UserError, match="holds a cache already"):
        cache_teacher(config_of(*asked), tmp_path / "cache", 4)


# --- another teacher ------------------------------------------------------------------------------------------------


def test_going_on_with_another_teacher_is_refused(config_of, store, tmp_path):
    """A run that was trained on since, for a distillation under way and for one that is done."""
    taught_by = tmp_path / "trained_on"
    loop.train(lm_config(store, taught_by, *WIDE, "train.steps=2"))
    asked = (f"teacher={taught_by}", "train.steps=2")
    run = loop.train(config_of(*asked))
    loop.train(config_of(*asked, "train.steps=3"))
    loop.train(lm_config(store, taught_by, *WIDE, "train.steps=3"))
    for steps in (3, 4):
        with pytest.raises(UserError) as caught:
            loop.train(config_of(*asked, f"train.steps={steps}"))
        said = str(caught.value)
        assert "trained_on/step-00000002" in said and "trained_on/step-00000003" in said and "run_dir" in said
    assert checkpoint.read_state(checkpoint.latest_good(run))["step"] == 3


# --- what is left ---------------------------------------------------------------------------------------------------


def test_the_export_is_a_language_model_that_names_its_teacher(config_of, tmp_path, monkeypatch):
    run = loop.train(config_of("distill.guidance_scale=2", "train.steps=3"))
    out = export(run, tmp_path / "out")
    folder = open_model_folder(out)
    assert isinstance(load_model(folder), TokenLM) and folder.card["task"] == "distill"
    told = folder.card["data"]["teacher"]
    assert told["name"].startswith("teacher/step-") and told["guidance_scale"] == 2
    assert len(told["weights_sha256"]) == 64
    assert folder.licences == {"CC0-1.0": 24}
    assert folder.guidance_scale == 1 and open_model_folder(None).guidance_scale == 3
    assert "teacher" not in OmegaConf.load(out / "config.yaml")  # a path of this machine

    class Encoder(WordEncoder):
        dim, fingerprint, name = TEXT_DIM, "1" * 16, "fake"

        def encode(self, captions):
            made = super().encode(captions)
            return made._replace(embeddings=made.embeddings[..., :TEXT_DIM])

    monkeypatch.setattr(pipeline, "load_text_encoder", lambda name: Encoder())
    pipe = pipeline.MusicPipeline.from_pretrained(out)
    assert pipe.guidance_scale == 1
    first, asked = (pipe("a march", duration=0.5, **g).codes for g in ({}, {"guidance_scale": 1.0}))
    assert torch.equal(first, asked)
    assert not torch.equal(first, pipe("a march", duration=0.5, guidance_scale=4.0).codes)


def changed(teacher, folder, change):
    """The teacher, exported, with something else in its card."""
    card = json.loads((export(teacher, folder) / "card.json").read_text())
    change(card)
    (folder / "card.json").write_text(json.dumps(card))
    return folder


def test_the_licences_of_the_teachers_data_are_the_students_too(config_of, teacher, tmp_path):
    """Those of what it was started from among them; a count is that of the student's own store."""

    def change(card):
        card["data"]["licences"] = {"CC-BY-SA-4.0": 3, "CC0-1.0": 7}

    other = changed(teacher, tmp_path / "other", change)
    assert DistillTask(config_of(f"teacher={other}")).facts()["licences"] == {"CC-BY-SA-4.0": 3, "CC0-1.0": 24}
    twin_shape = ("model.d_model=32", "model.n_layers=4", "task=lm", f"init={other}", "train.steps=1")
    tuned = loop.train(config_of(*twin_shape, name="tuned"))
    assert open_model_folder(tuned).licences == {"CC-BY-SA-4.0": 3, "CC0-1.0": 24}
    assert open_model_folder(tuned).card["licence"] == "CC-BY-SA-4.0"
    assert "CC-BY-SA-4.0" in DistillTask(config_of(f"teacher={tuned}")).facts()["licences"]


def test_a_student_of_a_model_that_reads_nothing_for_null_reads_so_too(config_of, teacher, tmp_path):
    """As an imported MusicGen does: a caption that is withheld is no token at all, to teacher and student."""
    folder = changed(teacher, tmp_path / "other", lambda card: card["data"]["text"].update(null_condition="no_tokens"))
    told = (f"teacher={folder}", "data.caption_dropout=1", "distill.guidance_scale=2", "train.steps=2")
    task = DistillTask(config_of(*told))
    batch = task.loader("train", 4, 0, 1).batch(0)
    given = task._prepare_batch(batch, task.controls.of(batch))
    answer, _ = task._asked(batch, given)
    without = task.teacher.model(given.codes, None)[..., :CODEBOOK_SIZE].log_softmax(-1)
    torch.testing.assert_close(answer.log_p, without, rtol=1e-4, atol=1e-4)  # the null condition and the caption alike
    blank = batch | {"text": batch["text"]._replace(embeddings=torch.zeros_like(batch["text"].embeddings))}
    counts = task.counts(batch)
    found = [task.losses(task.modules, each, counts, 0)["model"]["cross_entropy"] for each in (batch, blank)]
    assert torch.equal(*found)
    assert open_model_folder(export(loop.train(config_of(*told)), tmp_path / "out")).null_condition == "no_tokens"


def test_a_reading_that_no_student_learns_is_refused(config_of, teacher, tmp_path):
    folder = changed(teacher, tmp_path / "other", lambda card: card["data"]["text"].update(null_condition="unmasked_padding"))
    with pytest.raises(UserError, match="reads captions as unmasked_padding"):
        DistillTask(config_of(f"teacher={folder}"))


def test_guidance_within_is_handed_down_and_not_taken_twice(config_of, monkeypatch):
    guided = loop.train(config_of("distill.guidance_scale=2", "train.steps=1", name="guided"))
    grandchild = loop.train(config_of(f"teacher={guided}", "train.steps=1", name="grandchild"))
    for run in (guided, grandchild):
        assert open_model_folder(run).distilled_guidance_scale == 2 and open_model_folder(run).guidance_scale == 1
    with pytest.raises(UserError, match="has guidance 2 within already"):
        DistillTask(config_of(f"teacher={guided}", "distill.guidance_scale=3"))

    class Pipeline:
        def __init__(self, *parts, null_condition, guidance_scale):
            seen.append((null_condition, guidance_scale))

        def __call__(self, prompts, **options):
            return SimpleNamespace(audios=[torch.zeros(1, 4)] * len(prompts), sample_rate=8)

    seen: list[tuple[str, float]] = []
    monkeypatch.setattr(lm, "MusicPipeline", Pipeline)
    for overrides in ((), ("distill.guidance_scale=2",), (f"teacher={guided}",)):
        task = DistillTask(config_of(*overrides))
        task._codec, task._text_encoder = task.model, object()
        task.samples(0)
    assert seen == [("empty_caption", 3.0), ("empty_caption", 1.0), ("empty_caption", 1.0)]


def test_no_path_of_this_machine_is_exported(config_of, tmp_path):
    asked = ("data.fixed_crops=true", "train.steps=1")
    cache = cache_teacher(config_of(*asked), tmp_path / "cache", 4)
    out = export(loop.train(config_of(*asked, f"distill.cache={cache}")), tmp_path / "out")
    text = "".join((out / name).read_text() for name in ("config.yaml", "card.json"))
    assert str(tmp_path) not in text and "teacher.yaml" not in text


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["teacher=null"], "teacher is not set"),
        (["teacher=nowhere"], "nowhere"),
        (["model.n_codebooks=2"], r"model\.n_codebooks=2, its teacher .* 4"),
        (["pattern=flatten"], "learnt delay"),
        (["distill.temperature=0"], r"distill\.temperature=0"),
        (["distill.layer_map=[1,5]"], "no block 5"),
        (["distill.layer_map=[1]"], "1 blocks are named for a student of 2"),
        (["distill.divergence=both"], r"unknown distill\.divergence"),
        (["distill.weighting=fair"], r"unknown distill\.weighting"),
        (["distill.mixer_steps=1"], r"model\.d_model is 32, the student's 16"),
        (["distill.hidden_steps=1"], r"losses\.hidden=0 leaves out"),
        (["losses.kl=0", "losses.cross_entropy=0"], "nothing to learn from"),
        (["losses.kl=-1"], r"losses\.kl=-1 is no number of at least 0"),
        (["losses.kl=null"], r"losses\.kl=None is no number"),
        (["losses.hidden=x"], r"losses\.hidden=x is no number"),
        (["distill.temperature=null"], r"distill\.temperature=None"),
        (["distill.skew=null"], r"distill\.skew=None"),
        (["distill.guidance_scale=x"], r"distill\.guidance_scale=x"),
        (["distill.layer_map=2"], "2 is no map of layers"),
        (["distill.layer_map=null"], "None is no map of layers"),
        (["distill.layer_map=[a,b]"], r"\['a', 'b'\] is no map of layers"),
        (["distill.layer_map=[1.7,2.2]"], r"\[1\.7, 2\.2\] is no map of layers"),
        (["distill.hidden_steps=null"], r"distill\.hidden_steps=None"),
        (["distill.mixer_steps=-1"], r"distill\.mixer_steps=-1"),
        (["distill.mixer_steps=12", "distill.hidden_steps=8"], r"20 together, train\.steps is 20"),
        (["distill.transfer=null"], r"give distill\.transfer\.layers"),
        (["losses.tags=1"], r"losses\.tags=0"),
        (["distill.transfer.layers=even"], r"distill\.transfer\.width=importance"),
        (["distill.transfer.layers=even", "init=somewhere"], "leave one of them null"),
    ],
)
def test_mistakes_are_one_clear_line(config_of, overrides, says):
    with pytest.raises(UserError, match=says):
        task = DistillTask(config_of(*overrides))
        losses_of(task)


def test_a_teacher_of_other_codes_or_another_text_encoder_is_refused(config_of, teacher, tmp_path):
    out = export(teacher, tmp_path / "exported")
    whole = json.loads((out / "card.json").read_text())
    for kind in ("codec", "text"):
        card = json.loads(json.dumps(whole))
        card["data"][kind] = {"name": "strange", "fingerprint": "f" * 16}
        (out / "card.json").write_text(json.dumps(card))
        with pytest.raises(UserError, match=f"trained with {kind} strange"):
            DistillTask(config_of(f"teacher={out}"))


def test_a_teacher_of_int8_weights_can_be_asked_but_not_copied(config_of, teacher, tmp_path):
    int8 = export_int8(export(teacher, tmp_path / "whole"), tmp_path / "int8")
    assert losses_of(DistillTask(config_of(f"teacher={int8}")))["kl"] > 0
    with pytest.raises(UserError, match=r"are int8, which distill\.transfer cannot take"):
        DistillTask(config_of(*twin(f"teacher={int8}", "distill.transfer.layers=even")))
