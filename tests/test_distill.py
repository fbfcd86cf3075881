"""Distillation of a language model: losses, phases, weighting, teacher cache, resumption and export."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf
from processes import train_in_two_processes
from small_runs import assert_same_runs, run_contents, train_with_stops
from small_stores import CODEBOOK_SIZE, lm_config, small_codec, write_codes_store
from small_word_encoder import WordEncoder
from torch.distributions import Categorical, kl_divergence

from ssmttm import MusicPipeline, checkpoint
from ssmttm.distill.hidden_states import traced_mixers
from ssmttm.errors import UserError
from ssmttm.export.int8 import export_int8
from ssmttm.export.model_folder import export
from ssmttm.generation import pretrained
from ssmttm.generation.loading import load_language_model, open_model_folder
from ssmttm.models import TokenLM
from ssmttm.models.controls import Controls
from ssmttm.training import loop
from ssmttm.training.step import micro_batches
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


def same_shape(*overrides):
    """A student of the teacher's shape."""
    return ("model.d_model=32", "model.n_layers=4", *overrides)


def losses_of(task, step=0, batch=0):
    item = task.loader("train", 4, 0, 1).batch(batch)
    torch.manual_seed(0)
    named = task.losses(task.modules, item, task.loss_denominators(item), step)
    assert named.keys() == {"model"}
    return named["model"]


# --- losses --------------------------------------------------------------------------------------------------------


def test_distillation_losses_are_zero_for_a_copy_of_the_teacher(config_of):
    task = DistillTask(
        config_of(*same_shape("losses.hidden=1", "distill.mixer_steps=1", "distill.transfer.layers=even"))
    )
    assert len(task.transferred) == len(list(task.model.parameters()))
    found = losses_of(task)
    for name in ("kl", "hidden", "mixer"):
        assert found[name].item() == pytest.approx(0, abs=1e-5), name
    assert found["cross_entropy"] > 0.5
    fresh = losses_of(DistillTask(config_of(*same_shape("losses.hidden=1", "distill.mixer_steps=1"))))
    assert min(fresh[name].item() for name in ("kl", "hidden", "mixer")) > 0.05


def test_teacher_logits_apply_guidance(config_of):
    logits = {}
    for scale in (0, 1, 2.5):
        task = DistillTask(config_of(f"distill.guidance_scale={scale}"))
        batch = task.loader("train", 4, 0, 1).batch(0)
        inputs = task._prepare_batch(batch)
        logits[scale] = task.teacher(inputs.codes, batch["text"], inputs.controls)[0]
        conditional = task.teacher.model(inputs.codes, batch["text"])[..., :CODEBOOK_SIZE]
    assert torch.equal(logits[1], conditional) and not torch.equal(logits[0], conditional)
    torch.testing.assert_close(logits[2.5], logits[0] + 2.5 * (logits[1] - logits[0]), rtol=1e-4, atol=1e-4)


def test_kl_training_brings_student_closer_to_teacher(config_of):
    """It ends closer to the teacher than a student that learns from the data alone."""
    distance = {}
    for name, weights in [("kl", ("losses.cross_entropy=0", "losses.kl=1")), ("data", ("losses.kl=0",))]:
        run = loop.train(config_of(*weights, "train.steps=60", name=name))
        task = DistillTask(config_of("losses.kl=1", f"init={run}", "data.caption_dropout=0", name="measured"))
        checkpoint.load_into(task.model, checkpoint.load_weights(checkpoint.latest_good(run)), run)
        with torch.no_grad():
            distance[name] = sum(losses_of(task, batch=n)["kl"].item() for n in range(5)) / 5
    assert distance["kl"] < 0.8 * distance["data"], distance


@pytest.mark.parametrize(("divergence", "temperature"), [("forward", 1.0), ("forward", 2.5), ("reverse", 0.5)])
def test_kl_loss_equals_torch_kl_of_softened_distributions_at_valid_positions(divergence, temperature, config_of):
    """Reference: torch.distributions, position by position, times the squared temperature (arXiv 1503.02531)."""
    weights = [4, 3, 2, 1]
    overrides = (f"distill.divergence={divergence}", f"distill.temperature={temperature}", "data.frames=24")
    task = DistillTask(config_of(*overrides, f"train.codebook_weights={weights}"))
    batch = task.loader("train", 4, 0, 1).batch(0)
    assert not bool(batch["frame_mask"].all())
    inputs = task._prepare_batch(batch)
    with torch.no_grad():
        student, teacher = (m(inputs.codes, batch["text"]) for m in (task.model, task.teacher.model))
    q, p = (Categorical(logits=logits / temperature) for logits in (student, teacher))
    each = kl_divergence(p, q) if divergence == "forward" else kl_divergence(q, p)  # [b, K, S]
    by_codebook = [each[:, k][inputs.valid[:, k]].mean().item() for k in range(4)]
    expected = temperature**2 * sum(w * value for w, value in zip(weights, by_codebook, strict=True)) / sum(weights)
    assert losses_of(task)["kl"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("conditioning", ["prefix", "cross_attention"])
def test_losses_ignore_padding(conditioning, store, root, config_of):
    """The same whole segments, padded to 20 and to 29 frames."""
    shape = (f"model.conditioning={conditioning}", "model.n_heads=4")
    teacher = loop.train(lm_config(store, root / conditioning, *WIDE, *shape, "train.steps=2"))
    overrides = same_shape(*shape, f"teacher={teacher}", "losses.hidden=1", "distill.mixer_steps=1")
    short, long = (losses_of(DistillTask(config_of(*overrides, f"data.frames={n}"))) for n in (20, 29))
    for name in ("cross_entropy", "kl", "hidden", "mixer", "distillation"):
        torch.testing.assert_close(short[name], long[name], rtol=1e-5, atol=1e-6)


def test_losses_of_micro_batches_add_up(config_of):
    task = DistillTask(config_of(*same_shape("losses.hidden=1", "distill.mixer_steps=1", "data.frames=24")))
    batch = task.loader("train", 4, 0, 1).batch(0)
    counts, whole = task.loss_denominators(batch), losses_of(task)
    parts = micro_batches(batch, 3)
    found = [task.losses(task.modules, part, counts, 0)["model"] for part in parts]
    for name in ("cross_entropy", "kl", "hidden", "mixer", "distillation"):
        torch.testing.assert_close(found[0][name] + found[1][name], whole[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("predict", [(True, False), (False, True)], ids=["teacher", "student"])
def test_kl_ignores_special_token_logit(predict, store, config_of, tmp_path):
    """Only teacher or student has one: their distributions of the codes are still comparable."""
    of_teacher, of_student = (f"model.predict_special={str(it).lower()}" for it in predict)
    teacher = loop.train(lm_config(store, tmp_path / "special", *WIDE, of_teacher, "train.steps=2"))
    task = DistillTask(config_of(*same_shape(f"teacher={teacher}", of_student, "distill.transfer.layers=even")))
    assert losses_of(task)["kl"].item() == pytest.approx(0, abs=1e-5)


def test_throughput_counts_teacher_flops_a_third(config_of, tmp_path):
    """It has no backward pass; with guidance it runs twice, cached or unused not at all."""
    fixed = ("data.fixed_crops=true",)
    cache = cache_teacher(config_of(*fixed), tmp_path / "cache", 4)
    variants = {"plain": (), "guided": ("distill.guidance_scale=3",), "cached": (*fixed, f"distill.cache={cache}"),
                "alone": ("losses.kl=0",)}  # fmt: skip
    flops = {}
    for name, overrides in variants.items():
        task = DistillTask(config_of(*overrides))
        batch = task.loader("train", 4, 0, 1).batch(0)
        flops[name] = task.throughput(batch, 0)[2]
    length = task.pattern.sequence_length(20)
    tokens, null_tokens = batch["text"].mask.shape[1], task.teacher.null_text.mask.shape[1]
    teacher, null = (4 * task.teacher.model.flops(length, n) / 3 for n in (tokens, null_tokens))
    alone = 4 * task.model.flops(length, tokens)
    assert flops["alone"] == flops["cached"] == alone
    assert flops["plain"] == pytest.approx(alone + teacher)
    assert flops["guided"] == pytest.approx(alone + teacher + null)
    matching = DistillTask(config_of(*same_shape("losses.kl=0", "distill.mixer_steps=1")))
    with_teacher, without = (matching.throughput(batch, step)[2] for step in (0, 1))
    assert with_teacher - without == pytest.approx(teacher)


@pytest.mark.parametrize("kind", ["tempo", "chroma"])
def test_teacher_and_student_get_the_same_controls(kind, store, config_of, tmp_path):
    """A copy of a teacher with controls has zero KL, with and without dropout of the controls."""
    overrides = (f"model.{kind}=true", f"data.{kind}_dropout=0.5")
    teacher = loop.train(lm_config(store, tmp_path / "with_controls", *WIDE, *overrides, "train.steps=30"))
    task = DistillTask(config_of(*same_shape(*overrides, f"teacher={teacher}", "distill.transfer.layers=even")))
    assert losses_of(task)["kl"].item() == pytest.approx(0, abs=1e-5)
    batch = task.loader("train", 16, 0, 1).batch(0)
    inputs = task._prepare_batch(batch)
    with_controls, without = (task.teacher(inputs.codes, batch["text"], c)[0] for c in (inputs.controls, Controls()))
    assert not torch.allclose(with_controls, without, atol=1e-4)


def test_student_has_its_teachers_control_predictor(store, config_of, tmp_path):
    """Copied without the transfer of other weights, too, and not trained."""
    overrides = ("model.tempo=true", "model.key=true", "model.predict_controls=true")
    teacher = loop.train(lm_config(store, tmp_path / "predicting", *WIDE, *overrides, "train.steps=5"))
    run = loop.train(config_of(*overrides, f"teacher={teacher}", "train.steps=3", "train.eval_every=0"))
    models = [load_language_model(open_model_folder(folder)) for folder in (teacher, run)]
    ours, theirs = (model.control_predictor.state_dict() for model in models)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    with pytest.raises(UserError, match="its teacher does not"):
        DistillTask(config_of(*overrides))


def test_kl_depends_on_temperature_divergence_and_skew(config_of):
    options = [(), ("distill.temperature=2",), ("distill.divergence=reverse",), ("distill.skew=0.3",)]
    found = [losses_of(DistillTask(config_of(*option)))["kl"].item() for option in options]
    assert len({round(value, 5) for value in found}) == 4


# --- phases ---------------------------------------------------------------------------------------------------------


def test_phases_train_mixers_then_hidden_states_then_all_losses(config_of):
    """Each phase has its own loss; every parameter has a gradient, possibly 0."""
    task = DistillTask(config_of(*same_shape("losses.hidden=1", "distill.mixer_steps=2", "distill.hidden_steps=3")))

    def gradients(step):
        task.model.zero_grad()
        found = losses_of(task, step)
        found["distillation"].backward()
        assert all(p.grad is not None for p in task.model.parameters())
        moved = {n for n, p in task.model.named_parameters() if p.grad.abs().sum() > 0}
        return found, moved

    found, moved = gradients(1)
    assert torch.equal(found["distillation"], found["mixer"])
    assert moved and all(".sublayers.0." in name for name in moved)
    found, moved = gradients(4)
    assert "mixer" not in found and torch.equal(found["distillation"], found["hidden"])
    assert "heads.weight" not in moved and "embedding.weight" in moved
    found, moved = gradients(5)
    total = found["cross_entropy"] + found["kl"] + found["hidden"]
    torch.testing.assert_close(found["distillation"], total)
    assert "heads.weight" in moved


@pytest.mark.parametrize("guidance", [1, 3])
def test_traced_mixers_record_conditional_pass_of_teacher(guidance, config_of):
    overrides = ("distill.mixer_steps=1", "distill.layer_map=[2,2,3,4]", f"distill.guidance_scale={guidance}")
    task = DistillTask(config_of(*same_shape(*overrides)))
    batch = task.loader("train", 4, 0, 1).batch(0)
    inputs = task._prepare_batch(batch)
    with traced_mixers(task.teacher.model, task.teacher_blocks) as traced:
        _, hidden_states = task.teacher(inputs.codes, batch["text"], inputs.controls, [1, 2])
    assert traced.keys() == {2, 3, 4}
    (x, *_), output = traced[2]
    length = inputs.codes.shape[-1]
    first = x[0][batch["text"].mask[0].sum() :][:length]  # the audio follows the text
    torch.testing.assert_close(first, hidden_states[0][0])
    assert output.shape == x.shape
    task.teacher(inputs.codes, batch["text"], inputs.controls)
    assert len(traced) == 3  # the hooks are removed


def test_transformer_teacher_trains_state_space_student(store, root, config_of, tmp_path):
    attention = ("model.layers=attention", "model.n_heads=4", "model.d_model=16", "model.n_layers=2", "train.steps=20")
    transformer = loop.train(lm_config(store, root / "transformer", *WIDE, *attention))
    overrides = ("losses.hidden=1", "distill.mixer_steps=8", "distill.hidden_steps=4", "train.steps=16")
    shape = ("model.headdim=4", "model.ngroups=4", "model.d_state=4", "distill.transfer.layers=even")
    run = loop.train(config_of(*overrides, *shape, f"teacher={transformer}"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    mixer = [row["mixer"] for row in rows if "mixer" in row]
    assert len(mixer) == 8 and mixer[-1] < mixer[0]


@pytest.mark.parametrize("weighting", ["gradient", "uncertainty"])
def test_two_processes_train_as_one(weighting, config_of, tmp_path):
    """With a guided teacher, micro-batches and all phases."""
    overrides = ("losses.hidden=0.5", "distill.guidance_scale=2", f"distill.weighting={weighting}", "train.steps=5")
    phases = ("distill.mixer_steps=1", "distill.hidden_steps=1", "train.micro_batch_size=1", "train.eval_every=0")
    one = config_of(*same_shape(*overrides, *phases), name="one")
    loop.train(one)
    train_in_two_processes(one, tmp_path / "two")

    def metrics(run):
        rows = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        return [[row["loss"], row["grad_norm"], row["weight_kl"]] for row in rows if "loss" in row]

    torch.testing.assert_close(torch.tensor(metrics("two")), torch.tensor(metrics("one")), rtol=1e-3, atol=1e-4)


# --- weighting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["magnitude", "gradient", "uncertainty"])
def test_dynamic_weighting_resumes_exactly(rule, config_of, monkeypatch):
    overrides = (f"distill.weighting={rule}", "losses.hidden=0.5", "train.steps=14", "data.caption_dropout=0.3")
    stopped = config_of(*overrides, name="stopped")
    train_with_stops(stopped, DistillTask, (4, 11), monkeypatch)
    unbroken = run_contents(loop.train(config_of(*overrides, name="unbroken")))
    assert_same_runs(unbroken, run_contents(Path(stopped.run_dir)))
    assert {"weighting", "projections"} <= unbroken[0].keys()
    sizes = unbroken[0]["weighting"]
    moved = sizes["log_variance"] if rule == "uncertainty" else sizes["sizes"]
    assert moved.abs().min() > 0


def test_magnitude_weighting_equalises_weighted_losses(config_of):
    run = loop.train(config_of("distill.weighting=magnitude", "losses.hidden=1", "train.steps=40"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "weight_kl" in row][-1]
    unweighted = [last[name] for name in distill_lm.LOSSES]
    weighted = [last[name] * last[f"weight_{name}"] for name in distill_lm.LOSSES]
    assert max(weighted) < 1.6 * min(weighted) and max(unweighted) > 2 * min(unweighted)


def test_gradient_weighting_equalises_gradient_norms(config_of):
    """Gradient norms at the code embedding, computed directly for the same batch."""
    task = DistillTask(config_of("distill.weighting=gradient", "losses.hidden=1"))
    losses_of(task, 0)
    task.after_step(0)
    losses, weighting, embedding = losses_of(task, 1), task.weighting, task.model.embedding.weight
    values = [losses[name] for name in weighting.base_weights]
    norms = torch.stack([torch.autograd.grad(loss, embedding, retain_graph=True)[0].norm() for loss in values])
    weighted = weighting.weights() * norms
    assert weighted.max() < 1.1 * weighted.min() and norms.max() > 2 * norms.min()


@pytest.fixture
def fresh_accelerator():
    """A process may otherwise train in one precision only."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_teacher_runs_in_precision_of_the_training(precision, config_of, tmp_path, monkeypatch, fresh_accelerator):
    """Also when a cache is written, which does not run the student."""
    calls = set()

    def recorded(self, *args, **kwargs):
        calls.add((torch.is_autocast_enabled("cpu"), self.norm.weight.requires_grad))
        return forward(self, *args, **kwargs)

    forward = TokenLM.forward
    monkeypatch.setattr(TokenLM, "forward", recorded)
    loop.train(config_of(f"train.precision={precision}", "train.steps=1", "train.eval_every=0"))
    assert calls == {(precision == "bf16", True), (precision == "bf16", False)}
    calls.clear()
    overrides = ("data.fixed_crops=true", f"train.precision={precision}", "distill.transfer.width=importance")
    monkeypatch.setattr(distill_lm, "channel_importance", None)
    cache_teacher(config_of(*overrides), tmp_path / "cache", 4)
    assert calls == {(precision == "bf16", False)}


# --- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "tolerance", "precision"), [(CODEBOOK_SIZE, 2e-3, "fp32"), (CODEBOOK_SIZE, 5e-3, "bf16"), (4, None, "fp32")]
)
def test_cached_run_equals_online_run(k, tolerance, precision, config_of, tmp_path, fresh_accelerator):
    """With all codes kept, up to rounding to float16, over several epochs."""
    overrides = ("train.steps=15", f"train.precision={precision}")
    overrides += ("data.fixed_crops=true", "data.caption_dropout=0.3", "distill.temperature=1.5")
    cache = cache_teacher(config_of(*overrides), tmp_path / "cache", k)
    online = run_contents(loop.train(config_of(*overrides, name="online")))
    cached = run_contents(loop.train(config_of(*overrides, f"distill.cache={cache}", name="cached")))
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

    def crops(task, epoch):
        loader, shown = task.loader("train", 4, 0, 1), {}
        for n in range(epoch * 5, epoch * 5 + 5):
            batch = loader.batch(n)
            for row, name in enumerate(batch["ids"]):
                shown[name] = (int(batch["first"][row]), int(batch["text"].mask[row].sum()))
        return shown

    assert crops(task, 0) == crops(task, 3) == crops(free, 0)
    assert crops(free, 0) != crops(free, 3)


def test_cache_of_other_settings_is_rejected(config_of, teacher, store, root, tmp_path):
    fixed = ("data.fixed_crops=true",)
    cache = cache_teacher(config_of(*fixed), tmp_path / "cache", 4)
    overrides = (*fixed, f"distill.cache={cache}")
    DistillTask(config_of(*overrides))
    other = loop.train(lm_config(store, tmp_path / "other", *WIDE, "train.steps=1"))
    for change, message in [
        (f"teacher={other}", "written for teacher"),
        ("data.frames=12", "frames"),
        ("seed=3", "seed"),
        ("pattern=parallel", "pattern=parallel"),
        ("distill.temperature=2", "temperature"),
        ("data.fixed_crops=false", "data.fixed_crops=true"),
        ("losses.hidden=1", "losses.hidden=0"),
        ("distill.cache=nowhere", "no cache of teacher logits"),
    ]:
        with pytest.raises(UserError, match=message):
            DistillTask(config_of(*overrides, change))
    with pytest.raises(UserError, match="holds a cache already"):
        cache_teacher(config_of(*fixed), tmp_path / "cache", 4)


# --- another teacher ------------------------------------------------------------------------------------------------


def test_resume_with_another_teacher_is_rejected(config_of, store, tmp_path):
    """The teacher's run was continued, during the distillation or after its end."""
    teacher_run = tmp_path / "trained_on"
    loop.train(lm_config(store, teacher_run, *WIDE, "train.steps=2"))
    overrides = (f"teacher={teacher_run}", "train.steps=2")
    run = loop.train(config_of(*overrides))
    loop.train(config_of(*overrides, "train.steps=3"))
    loop.train(lm_config(store, teacher_run, *WIDE, "train.steps=3"))
    for steps in (3, 4):
        with pytest.raises(UserError) as caught:
            loop.train(config_of(*overrides, f"train.steps={steps}"))
        message = str(caught.value)
        assert all(part in message for part in ("trained_on/step-00000002", "trained_on/step-00000003", "run_dir"))
    assert checkpoint.read_state(checkpoint.latest_good(run))["step"] == 3


# --- export ---------------------------------------------------------------------------------------------------------


def test_export_is_a_language_model_that_names_its_teacher(config_of, tmp_path, monkeypatch):
    run = loop.train(config_of("distill.guidance_scale=2", "train.steps=3"))
    out = export(run, tmp_path / "out")
    folder = open_model_folder(out)
    assert isinstance(load_language_model(folder), TokenLM) and folder.card["task"] == "distill"
    entry = folder.card["data"]["teacher"]
    assert entry["name"].startswith("teacher/step-") and entry["guidance_scale"] == 2
    assert len(entry["weights_sha256"]) == 64
    assert folder.licences == {"CC0-1.0": 24}
    assert folder.sampling.guidance_scale == 1 and open_model_folder(None).sampling.guidance_scale > 1
    assert "teacher" not in OmegaConf.load(out / "config.yaml")  # a local path

    monkeypatch.setattr(pretrained, "load_text_encoder", lambda name: WordEncoder())
    pipe = MusicPipeline.from_pretrained(out)
    assert pipe.guidance_scale == 1
    default, explicit = (pipe("a march", duration=0.5, **g).codes for g in ({}, {"guidance_scale": 1.0}))
    assert torch.equal(default, explicit)
    assert not torch.equal(default, pipe("a march", duration=0.5, guidance_scale=4.0).codes)


def export_with_card(teacher, folder, change):
    """The exported teacher with a changed card."""
    card = json.loads((export(teacher, folder) / "card.json").read_text())
    change(card)
    (folder / "card.json").write_text(json.dumps(card))
    return folder


def test_licences_include_those_of_the_teachers_data(config_of, store, teacher, tmp_path):
    """Also those of the model that the teacher was initialised from; counts are those of the student's store."""

    def change(card):
        card["data"]["licences"] = {"CC-BY-SA-4.0": 3, "CC0-1.0": 7}

    other = export_with_card(teacher, tmp_path / "other", change)
    assert DistillTask(config_of(f"teacher={other}")).metadata()["licences"] == {"CC-BY-SA-4.0": 3, "CC0-1.0": 24}
    shape_overrides = ("model.d_model=32", "model.n_layers=4", f"init={other}", "train.steps=1")
    tuned = loop.train(lm_config(store, tmp_path / "tuned", *shape_overrides))
    assert open_model_folder(tuned).licences == {"CC-BY-SA-4.0": 3, "CC0-1.0": 24}
    assert open_model_folder(tuned).card["licence"] == "CC-BY-SA-4.0"
    assert "CC-BY-SA-4.0" in DistillTask(config_of(f"teacher={tuned}")).metadata()["licences"]


def test_null_condition_no_tokens_is_inherited_from_teacher(config_of, teacher, tmp_path):
    """As in an imported MusicGen, a dropped caption has no tokens, for teacher and student."""
    folder = export_with_card(
        teacher, tmp_path / "other", lambda card: card["data"]["text"].update(null_condition="no_tokens")
    )
    overrides = (f"teacher={folder}", "data.caption_dropout=1", "distill.guidance_scale=2", "train.steps=2")
    task = DistillTask(config_of(*overrides))
    batch = task.loader("train", 4, 0, 1).batch(0)
    inputs = task._prepare_batch(batch)
    target, _ = task._query_teacher(batch, inputs)
    without = task.teacher.model(inputs.codes, None)[..., :CODEBOOK_SIZE].log_softmax(-1)
    torch.testing.assert_close(target.log_p, without, rtol=1e-4, atol=1e-4)  # equal with and without guidance
    blank = batch | {"text": batch["text"]._replace(embeddings=torch.zeros_like(batch["text"].embeddings))}
    counts = task.loss_denominators(batch)
    found = [task.losses(task.modules, each, counts, 0)["model"]["cross_entropy"] for each in (batch, blank)]
    assert torch.equal(*found)
    assert open_model_folder(export(loop.train(config_of(*overrides)), tmp_path / "out")).null_condition == "no_tokens"


def test_unsupported_null_condition_is_rejected(config_of, teacher, tmp_path):
    change = lambda card: card["data"]["text"].update(null_condition="unmasked_padding")  # noqa: E731
    folder = export_with_card(teacher, tmp_path / "other", change)
    with pytest.raises(UserError, match="has the null condition unmasked_padding"):
        DistillTask(config_of(f"teacher={folder}"))


def test_distilled_guidance_is_inherited_and_not_applied_twice(config_of, monkeypatch):
    guided = loop.train(config_of("distill.guidance_scale=2", "train.steps=1", name="guided"))
    grandchild = loop.train(config_of(f"teacher={guided}", "train.steps=1", name="grandchild"))
    for run in (guided, grandchild):
        folder = open_model_folder(run)
        assert folder.distilled_guidance_scale == 2 and folder.sampling.guidance_scale == 1
    with pytest.raises(UserError, match="guidance 2 is already distilled into"):
        DistillTask(config_of(f"teacher={guided}", "distill.guidance_scale=3"))

    class Pipeline:
        def __init__(self, *parts, null_condition, sampling_defaults):
            sampled.append((null_condition, sampling_defaults.guidance_scale))

        def __call__(self, prompts, **options):
            return SimpleNamespace(audios=[torch.zeros(1, 4)] * len(prompts), sample_rate=8)

    sampled: list[tuple[str, float]] = []
    monkeypatch.setattr(lm, "MusicPipeline", Pipeline)
    for overrides in ((), ("distill.guidance_scale=2",), (f"teacher={guided}",)):
        task = DistillTask(config_of(*overrides))
        task._codec, task._text_encoder = task.model, object()
        task.samples(0)
    assert sampled == [("empty_caption", 3.0), ("empty_caption", 1.0), ("empty_caption", 1.0)]


def test_export_contains_no_local_path(config_of, tmp_path):
    overrides = ("data.fixed_crops=true", "train.steps=1")
    cache = cache_teacher(config_of(*overrides), tmp_path / "cache", 4)
    out = export(loop.train(config_of(*overrides, f"distill.cache={cache}")), tmp_path / "out")
    text = "".join((out / name).read_text() for name in ("config.yaml", "card.json"))
    assert str(tmp_path) not in text and "teacher.yaml" not in text


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher=null"], "teacher is not set"),
        (["teacher=nowhere"], "nowhere"),
        (["model.n_codebooks=2"], r"model\.n_codebooks=2, its teacher .* has 4"),
        (["pattern=flatten"], "was trained with delay"),
        (["distill.temperature=0"], r"distill\.temperature must be a number above 0, got 0"),
        (["distill.layer_map=[1,5]"], "no block 5"),
        (["distill.layer_map=[1]"], "lists 1 blocks, the student has 2"),
        (["distill.divergence=both"], r"unknown distill\.divergence"),
        (["distill.weighting=fair"], r"unknown distill\.weighting"),
        (["distill.mixer_steps=1"], r"model\.d_model is 32 and the student's is 16"),
        (["distill.hidden_steps=1"], r"distill\.hidden_steps needs losses\.hidden above 0"),
        (["losses.kl=0", "losses.cross_entropy=0"], "no loss to train on"),
        (["losses.kl=-1"], r"losses\.kl must be at least 0, got -1"),
        (["losses.kl=null"], r"losses\.kl must be a number, got null"),
        (["losses.hidden=x"], r"losses\.hidden must be a number, got x"),
        (["distill.temperature=null"], r"distill\.temperature must be a number, got null"),
        (["distill.skew=null"], r"distill\.skew must be a number, got null"),
        (["distill.guidance_scale=x"], r"distill\.guidance_scale must be a number, got x"),
        (["distill.layer_map=2"], "invalid layer map 2"),
        (["distill.layer_map=null"], "invalid layer map None"),
        (["distill.layer_map=[a,b]"], r"invalid layer map \['a', 'b'\]"),
        (["distill.layer_map=[1.7,2.2]"], r"invalid layer map \[1\.7, 2\.2\]"),
        (["distill.hidden_steps=null"], r"distill\.hidden_steps must be an integer, got null"),
        (["distill.mixer_steps=-1"], r"distill\.mixer_steps must be at least 0, got -1"),
        (["distill.mixer_steps=12", "distill.hidden_steps=8"], r"below train\.steps=20, got 20"),
        (["distill.transfer=null"], r"distill\.transfer must be a section, got null"),
        (["losses.tags=1"], r"losses\.tags is a key of task=lm"),
        (["distill.transfer.layers=even"], r"distill\.transfer\.width=importance"),
        (["distill.transfer.layers=even", "init=somewhere"], "set one of them to null"),
    ],
)
def test_invalid_settings_are_rejected(config_of, overrides, message):
    with pytest.raises(UserError, match=message):
        task = DistillTask(config_of(*overrides))
        losses_of(task)


def test_teacher_of_other_codec_or_text_encoder_is_rejected(config_of, teacher, tmp_path):
    out = export(teacher, tmp_path / "exported")
    whole = json.loads((out / "card.json").read_text())
    for kind in ("codec", "text"):
        card = json.loads(json.dumps(whole))
        card["data"][kind] = {"name": "strange", "fingerprint": "f" * 16}
        (out / "card.json").write_text(json.dumps(card))
        with pytest.raises(UserError, match=f"trained with {kind} strange"):
            DistillTask(config_of(f"teacher={out}"))


def test_int8_teacher_can_be_queried_but_not_transferred(config_of, teacher, tmp_path):
    int8 = export_int8(export(teacher, tmp_path / "whole"), tmp_path / "int8")
    assert losses_of(DistillTask(config_of(f"teacher={int8}")))["kl"] > 0
    with pytest.raises(UserError, match=r"are int8, distill\.transfer needs float weights"):
        DistillTask(config_of(*same_shape(f"teacher={int8}", "distill.transfer.layers=even")))
