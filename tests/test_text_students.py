"""Text students: token alignment, vocabulary trimming, smaller encoders, training and export."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_encoders import CAPTIONS, write_bert, write_t5
from small_runs import assert_same_runs, run_contents, train_with_stops
from small_stores import FRAMES, lm_config, small_codec, write_codes_store
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ssmttm import MusicPipeline, checkpoint, config
from ssmttm.distill.text_alignment import TokenizedCaption, alignment_matrix, tokenize
from ssmttm.errors import UserError
from ssmttm.export.model_folder import export
from ssmttm.generation.loading import open_model_folder
from ssmttm.text import load_text_encoder
from ssmttm.text.encoders import TextEncoder
from ssmttm.text.student import (
    PROJECTION,
    StudentEncoder,
    StudentShape,
    build_student,
    cut_down,
    student_description,
    student_from_description,
)
from ssmttm.text.vocabulary import trim
from ssmttm.training import loop
from ssmttm.training.step import micro_batches
from ssmttm.training.tasks.distill_text import TextDistillTask

KINDS = {"bert": write_bert, "t5": write_t5}
UNSEEN = ("violins", "a quiet café", "静かなピアノ", "x", "")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("text-students")


@pytest.fixture(scope="module")
def folders(root):
    return {kind: write(root / kind) for kind, write in KINDS.items()}


@pytest.fixture(scope="module", params=KINDS)
def encoder(request, folders):
    return load_text_encoder(folders[request.param], trainable=True)


@pytest.fixture(scope="module")
def store(root, folders):
    codec = small_codec(root / "codec")
    return write_codes_store(root / "codes", codec=codec, captions=CAPTIONS, text_folder=folders["bert"])


@pytest.fixture(scope="module")
def teacher(root, store):
    options = ("model.text_dim=16", "data.batch_size=4", "train.eval_every=0", "train.checkpoint_every=1000")
    return loop.train(lm_config(store, root / "teacher", *options, "train.steps=20"))


@pytest.fixture
def config_of(store, teacher, tmp_path):
    def build(*overrides, name="student"):
        paths = (f"data.store={store}", f"run_dir={tmp_path / name}", f"teacher={teacher}")
        fixed = ("data.batch_size=4", f"data.frames={FRAMES}", "schedule.warmup_steps=0", "optim.lr=0.01",
                 "train.steps=20", "train.precision=fp32", "train.log_every=1", "train.eval_batches=2",
                 "train.eval_every=0", "train.checkpoint_every=1000")  # fmt: skip
        return config.load("task=distill_text", *paths, *fixed, *overrides)

    return build


SMALL = ("text_student.n_layers=1", "text_student.d_model=8", "text_student.d_ff=16")


def losses_of(task, step=0, n=0, counts=None, batch=None):
    batch = batch or task.loader("train", 4, 0, 1).batch(n)
    counts = task.loss_denominators(batch) if counts is None else counts
    return task.losses(task.modules, batch, counts, step)["model"]


def states_of(model, tokenizer, captions, max_tokens=40):
    return TextEncoder("", model.eval(), tokenizer, "", max_tokens).encode(captions)


# --- alignment ------------------------------------------------------------------------------------------------------


def tokenized(words, name="x", before=1, after=1):
    """A tokenised caption with word tokens at these offsets between special tokens."""
    special = [True] * before + [False] * len(words) + [True] * after
    offsets = [(0, 0)] * before + list(words) + [(0, 0)] * after
    tokens = [f"{name}{i}" for i in range(len(offsets))]
    return TokenizedCaption(list(range(len(offsets))), tokens, special, offsets)


def random_offsets(length=30):
    """Offsets of consecutive tokens, with gaps."""
    borders = st.lists(st.integers(0, length), min_size=2, max_size=12, unique=True).map(sorted)
    pairs = borders.map(lambda b: list(itertools.pairwise(b)))
    return pairs.flatmap(lambda p: st.lists(st.booleans(), min_size=len(p), max_size=len(p)).map(
        lambda keep: [pair for pair, kept in zip(p, keep, strict=True) if kept] or p[:1]))  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(random_offsets(), random_offsets())
def test_alignment_equals_character_overlap(ours, theirs):
    weights = alignment_matrix(tokenized(ours, "a"), tokenized(theirs, "b"))
    assert weights.shape == (len(ours) + 2, len(theirs) + 2)
    for row, (first, end) in zip(weights[1:-1], ours, strict=True):
        overlap = [bool(set(range(first, end)) & set(range(a, b))) for a, b in theirs]
        if not any(overlap):  # the nearest by the number of characters between them
            between = [min(abs(i - j) for i in range(first, end) for j in range(a, b)) for a, b in theirs]
            overlap = [column == between.index(min(between)) for column in range(len(theirs))]
        expected = torch.tensor([0, *overlap, 0]).float()
        torch.testing.assert_close(row, expected / expected.sum())
    assert torch.equal(weights[[0, -1]], torch.eye(weights.shape[1])[[0, -1]])  # special tokens before and after


def test_special_tokens_align_to_special_tokens_of_the_same_side():
    words = [(0, 2), (2, 4)]
    both, after, none = tokenized(words, "a"), tokenized(words, "b", before=0), tokenized(words, "c", 0, 0)
    assert alignment_matrix(both, after).tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert alignment_matrix(after, both)[-1].tolist() == [0, 0, 0, 1]
    assert alignment_matrix(both, none)[0].tolist() == [0.5, 0.5]
    empty, other = tokenized([], "a"), tokenized([], "b", before=0)
    assert alignment_matrix(empty, other).tolist() == [[1], [1]] and alignment_matrix(other, empty).tolist() == [[0, 1]]
    assert alignment_matrix(both, tokenized([], "b"))[1].tolist() == [
        0.5,
        0.5,
    ]  # empty for the teacher


def test_equal_tokens_align_one_to_one():
    caption = tokenized([(0, 1), (0, 1)])  # as two bytes of one character
    assert torch.equal(alignment_matrix(caption, caption._replace(offsets=None)), torch.eye(4))
    with pytest.raises(UserError, match="no character offsets"):
        alignment_matrix(caption._replace(offsets=None), tokenized([(0, 1)], "y"))


def test_wordpiece_and_unigram_tokenizers_align(folders):
    tokenizers = [load_text_encoder(folders[kind], trainable=True).tokenizer for kind in KINDS]
    bert, t5 = (tokenize(tokenizer, ["slowly, pianos"], 40)[0] for tokenizer in tokenizers)
    assert bert.tokens == ["[CLS]", "slow", "##ly", ",", "piano", "##s", "[SEP]"]
    assert t5.tokens == ["▁slow", "ly", ",", "▁piano", "s", "</s>"]
    aligned = [[t5.tokens[i] for i in row.nonzero()[:, 0]] for row in alignment_matrix(bert, t5)]
    assert aligned == [["</s>"], ["▁slow"], ["ly"], [","], ["▁piano"], ["s"], ["</s>"]]


# --- vocabulary -----------------------------------------------------------------------------------------------------


def test_trimmed_encoder_gives_equal_states_for_its_captions(encoder):
    model, tokenizer = trim(encoder.model, encoder.tokenizer, CAPTIONS)
    assert len(tokenizer) == model.config.vocab_size < len(encoder.tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert not {"violin", "▁violin", "é"} & set(tokenizer.get_vocab())
    texts = [*CAPTIONS, "", "drums, drums with pianos"]
    before, after = encoder.encode(texts), states_of(model, tokenizer, texts)
    assert torch.equal(before.embeddings, after.embeddings) and torch.equal(before.mask, after.mask)


def test_trimmed_tokenizer_splits_unseen_words_into_characters(encoder):
    """Characters that are not in the vocabulary become the unknown token."""
    model, tokenizer = trim(encoder.model, encoder.tokenizer, CAPTIONS)
    made = states_of(model, tokenizer, UNSEEN)
    assert torch.isfinite(made.embeddings).all() and (made.mask[:4].sum(1) > made.mask[4].sum()).all()
    names = [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(list(UNSEEN))["input_ids"]]
    assert tokenizer.unk_token in names[2] and tokenizer.unk_token not in names[0]
    assert "".join(names[0]).replace("##", "").strip("▁").replace("[CLS]", "").startswith("violins")


def test_trimmed_unigram_keeps_cost_of_unknown_token(folders):
    """Unigram derives its cost from the lowest score: a caption with one is tokenised as before."""
    encoder = load_text_encoder(folders["t5"], trainable=True)
    captions = ["piano λ slow", "a flute"]
    model, tokenizer = trim(encoder.model, encoder.tokenizer, captions)
    assert "ß" in tokenizer.get_vocab() and min(model.get_input_embeddings().weight.shape) > 3
    assert torch.equal(states_of(model, tokenizer, captions).embeddings, encoder.encode(captions).embeddings)


def test_minilm_can_be_trimmed():
    minilm = load_text_encoder("minilm", trainable=True)
    captions = ["A slow waltz in F# minor, on harpsichord", "lo-fi hip hop; 92 bpm"]
    model, tokenizer = trim(minilm.model, minilm.tokenizer, captions)
    assert len(tokenizer) < 250
    made = states_of(model, tokenizer, captions)
    assert torch.equal(made.embeddings, minilm.encode(captions).embeddings)
    whole, trimmed = (tokenize(each, captions, 128) for each in (minilm.tokenizer, tokenizer))
    assert [a.tokens for a in whole] == [a.tokens for a in trimmed]


def test_untrimmable_vocabularies_are_rejected(encoder):
    for captions in ([], [""], ["静かな"]):
        with pytest.raises(UserError, match="knows no word of the captions"):
            trim(encoder.model, encoder.tokenizer, captions)
    pairs = Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>"))
    pairs.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="a BPE vocabulary cannot be trimmed"):
        trim(encoder.model, PreTrainedTokenizerFast(tokenizer_object=pairs, unk_token="<unk>"), ["a"])


# --- the student ----------------------------------------------------------------------------------------------------


def test_student_of_full_shape_equals_its_source(encoder):
    for captions in (None, CAPTIONS):
        student, tokenizer = build_student(encoder.model, encoder.tokenizer, 16, StudentShape(), captions)
        made = states_of(student, tokenizer, CAPTIONS)
        torch.testing.assert_close(made.embeddings, encoder.encode(CAPTIONS).embeddings, rtol=0, atol=1e-6)
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in encoder.model.parameters())


def test_smaller_student_has_selected_layers_and_slices(encoder):
    bert = encoder.model.config.model_type == "bert"
    student = cut_down(encoder.model, StudentShape([2], 8, 12, 20))
    ours, theirs = student.state_dict(), encoder.model.state_dict()
    stack, hidden = ("layer", "intermediate.dense.weight") if bert else ("block", "layer.1.DenseReluDense.wi.weight")
    mlp = ours[f"encoder.{stack}.0.{hidden}"]
    assert torch.equal(mlp, theirs[f"encoder.{stack}.1.{hidden}"][:12, :8])
    if bert:
        table = "embeddings.position_embeddings.weight"
        assert torch.equal(ours[table], theirs[table][:20, :8])
        assert student.config.num_attention_heads == 1 and student.config.hidden_dropout_prob == 0
    else:
        bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        assert torch.equal(ours[bias], theirs[bias][:, :1])  # only the first layer has one
    made = states_of(StudentEncoder(student, 16), encoder.tokenizer, CAPTIONS, 20)
    assert made.embeddings.shape[-1] == 16 and torch.isfinite(made.embeddings).all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (StudentShape(width=12), "multiple of the head width 8, got 12"),
        (StudentShape(width=24), r"width of a text student must be in \[1, 16\], its source.s; got 24"),
        (StudentShape(mlp=0), "mlp of a text student must be in .*; got 0"),
    ],
)
def test_invalid_shapes_are_rejected(shape, message, encoder):
    with pytest.raises(UserError, match=message):
        cut_down(encoder.model, shape)


@pytest.mark.parametrize("half", [False, True])
def test_student_is_restored_from_its_folder(half, encoder, tmp_path):
    torch.manual_seed(0)
    student, tokenizer = build_student(encoder.model, encoder.tokenizer, 24, StudentShape([1], 8), CAPTIONS)
    torch.nn.init.normal_(student.projection.weight)
    student.save(tmp_path / "a", tokenizer, half)
    loaded = load_text_encoder(tmp_path / "a")
    assert (loaded.dim, len(loaded.fingerprint), loaded.name) == (24, 16, "a")
    texts = [*CAPTIONS, *UNSEEN]
    wanted = states_of(student, tokenizer, texts)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if half else {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(loaded.encode(texts).embeddings, wanted.embeddings, **tolerance)
    alone = loaded.encode([CAPTIONS[0]])  # padding changes nothing
    together = loaded.encode([*CAPTIONS])
    torch.testing.assert_close(together.embeddings[0][together.mask[0]], alone.embeddings[0], rtol=0, atol=1e-5)
    restored, words = student_from_description(json.loads(json.dumps(student_description(student, tokenizer))))
    restored.load_state_dict(student.state_dict())
    assert torch.equal(states_of(restored, words, texts).embeddings, wanted.embeddings)


def test_fingerprint_covers_weights_projection_and_tokenizer(encoder, tmp_path):
    student, tokenizer = build_student(encoder.model, encoder.tokenizer, 16, StudentShape([1]), CAPTIONS)
    student.save(tmp_path / "a", tokenizer)
    found = {load_text_encoder(tmp_path / "a").fingerprint}
    with torch.no_grad():
        student.projection.bias += 1
    student.save(tmp_path / "a", tokenizer)
    found.add(load_text_encoder(tmp_path / "a").fingerprint)
    file = tmp_path / "a" / "tokenizer.json"
    file.write_text(file.read_text().replace("lute", "luge"))
    found.add(load_text_encoder(tmp_path / "a").fingerprint)
    assert len(found) == 3
    (tmp_path / "a" / PROJECTION).write_bytes(b"nonsense")
    with pytest.raises(UserError, match="does not fit the encoder in its folder"):
        load_text_encoder(tmp_path / "a")


# --- training -------------------------------------------------------------------------------------------------------


def test_losses_are_zero_for_the_original_encoder(config_of):
    task = TextDistillTask(config_of())
    assert losses_of(task)["text"].item() < 1e-6  # the store holds float16
    named = losses_of(TextDistillTask(config_of("text_student.joint_step=0")))
    assert named["kl"].item() < 1e-5 and named["cross_entropy"] > 0.5
    assert losses_of(TextDistillTask(config_of(*SMALL)))["text"] > 0.1


def test_text_loss_is_relative_to_projected_mean_square(config_of):
    """Computed caption by caption."""
    task = TextDistillTask(config_of(*SMALL))
    loader, student = task.loader("train", 4, 0, 1), TextEncoder("", task.encoder.eval(), task.tokenizer, "", 40)
    projection = task.teacher.model.text

    def project(encoder, caption):
        return projection(encoder.encode([caption])).tokens[0]

    captions = [caption for n in range(4) for caption in loader.batch(n)["captions"]]
    squares = torch.cat([project(task.original, caption).square().sum(-1) for caption in captions])
    assert task._mean_square == pytest.approx(squares.mean().item(), rel=1e-3)
    first = loader.batch(0)["captions"]
    errors = torch.cat([(project(student, c) - project(task.original, c)).square().sum(-1) for c in first])
    assert losses_of(task)["text"].item() == pytest.approx(errors.mean().item() / task._mean_square, rel=1e-3)


def test_states_are_regressed_where_a_control_predictor_reads_them(root, store, config_of):
    """An error that the projection does not see counts; the predictor is not trained."""
    options = ("model.text_dim=16", "model.tempo=true", "model.predict_controls=true", "data.batch_size=4")
    options += ("train.eval_every=0", "train.checkpoint_every=1000", "train.steps=1")
    teacher = loop.train(lm_config(store, root / "predicting", *options))
    for overrides, counts in (((), False), ((f"teacher={teacher}",), True)):
        task = TextDistillTask(config_of(*overrides))
        text = task.loader("train", 4, 0, 1).batch(0)["student_text"]
        weight = task.teacher.model.text.linear.weight.detach()
        weight[:, 0] = 0
        changed = text.targets + torch.eye(16)[0]
        assert (task._squared_error(changed, text) > 0.01) == counts
        assert task._squared_error(text.targets, text) == 0
    assert losses_of(task)["text"].item() < 1e-6  # of the original encoder
    assert not any(parameter.requires_grad for parameter in task.model.control_predictor.parameters())


@pytest.mark.parametrize("step", [0, 5])
def test_losses_of_micro_batches_add_up(step, config_of):
    """Neither padding nor the split of a batch changes the losses."""
    task = TextDistillTask(config_of(*SMALL, "text_student.joint_step=5"))
    task.model.eval()
    batch = task.loader("train", 4, 0, 1).batch(1)
    counts = task.loss_denominators(batch)
    whole = losses_of(task, step, counts=counts, batch=batch)
    parts = [losses_of(task, step, counts=counts, batch=micro) for micro in micro_batches(batch, 1)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-4, atol=1e-5)
    assert ("kl" in whole) == (step == 5)


def test_regression_gradient_matches_finite_differences(config_of):
    task = TextDistillTask(config_of())
    task.teacher.model.text.double()
    text = task.loader("train", 4, 0, 1).batch(0)["student_text"]
    states = torch.randn(*text.targets.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: task._squared_error(x, text), states)
    gradient = torch.autograd.grad(task._squared_error(states, text), states)[0]
    assert not gradient[~text.mask].any() and gradient[text.mask].any(-1).all()


def test_language_model_is_trained_from_joint_step(config_of):
    task = TextDistillTask(config_of(*SMALL, "text_student.joint_step=3"))
    for step, joint in ((2, False), (3, True)):
        named = losses_of(task, step)
        sum(task.loss_weights[name] * loss for name, loss in named.items() if name in task.loss_weights).backward()
        assert all(p.grad is not None for p in task.encoder.parameters())
        assert all((p.grad is not None) == joint for p in task.model.parameters())
    text_only = losses_of(task, 2)["text"]
    assert torch.equal(text_only, losses_of(task, 3)["text"])


def test_empty_caption_is_a_regression_target(config_of):
    """Guidance needs it. A teacher with the null condition no_tokens gets none."""
    task = TextDistillTask(config_of("data.caption_dropout=1", "text_student.joint_step=0"))
    batch = task.loader("train", 4, 0, 1).batch(0)
    assert batch["captions"] == [""] * 4 and batch["student_text"].mask.sum(1).tolist() == [2] * 4
    wanted = task.original.encode([""]).embeddings
    torch.testing.assert_close(batch["student_text"].targets, wanted.expand(4, -1, -1), rtol=1e-2, atol=1e-2)
    assert task._text(batch).mask.all(1).tolist() == [True] * 4
    task.null_condition = "no_tokens"
    mixed = batch | {"captions": ["", "a", "", "b"]}
    assert task._text(mixed).mask.any(1).tolist() == [False, True, False, True]


def test_training_reduces_text_loss_and_keeps_language_model(config_of, teacher):
    run = loop.train(config_of(*SMALL, "train.steps=60", "optim.lr=0.02", "train.eval_every=60"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [row["text"] for row in rows if "text" in row]
    assert found[-1] < 0.35 * found[0]
    assert {"valid/text", "valid/cross_entropy", "valid/kl"} <= rows[-1].keys()
    folder = checkpoint.latest_good(run)
    before = checkpoint.load_weights(checkpoint.latest_good(teacher))
    after = checkpoint.load_weights(folder, module_name="lm")
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_student_with_another_tokenizer_learns(config_of, folders):
    overrides = (*SMALL, f"text_student.encoder={folders['t5']}", "train.steps=40", "optim.lr=0.02")
    run = loop.train(config_of(*overrides))
    found = [json.loads(line).get("text") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found[-1] < 0.6 * found[0]


def test_throughput_counts_the_current_phase(config_of):
    """From the joint step on it includes the language model, and the frozen teacher with a third of its FLOPs."""
    task = TextDistillTask(config_of(*SMALL, "text_student.joint_step=3"))
    batch = task.loader("train", 4, 0, 1).batch(0)
    (codes, _, joint), (none, _, alone) = task.throughput(batch, 3), task.throughput(batch, 2)
    length, tokens = task.pattern.sequence_length(20), batch["text"].mask.shape[1]
    assert none == 0 and codes == 4 * batch["frame_mask"].sum()
    assert joint - alone == pytest.approx(4 * task.model.flops(length, tokens) * 4 / 3)


def test_training_of_two_phases_resumes_exactly(config_of, monkeypatch):
    overrides = (*SMALL, "text_student.joint_step=4", "train.steps=7", "data.caption_dropout=0.3", "train.eval_every=4")
    stopped = config_of(*overrides, name="stopped")
    train_with_stops(stopped, TextDistillTask, (2, 5), monkeypatch)
    unbroken = run_contents(loop.train(config_of(*overrides, name="unbroken")))
    assert_same_runs(unbroken, run_contents(Path(stopped.run_dir)))
    assert {"model", "lm", "ema", "optimizer"} == unbroken[0].keys()


# --- export ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joint", ["null", "4"])
def test_exported_folder_is_self_contained(joint, config_of, teacher, tmp_path):
    run = loop.train(config_of(*SMALL, f"text_student.joint_step={joint}", "train.steps=6"))
    with pytest.raises(UserError, match="ssmttm export"):
        open_model_folder(run)
    out = shutil.move(export(run, tmp_path / "out"), tmp_path / "elsewhere")
    pipe = MusicPipeline.from_pretrained(out)
    assert isinstance(pipe.text_encoder.model, StudentEncoder) and pipe.text_encoder.dim == 16
    made = pipe(["a slow piano", "violins"], duration=0.4)
    assert made.audios.shape[0] == 2 and torch.isfinite(made.audios).all()
    card = json.loads((Path(out) / "card.json").read_text())
    assert card["data"]["text"] == {"name": "./text_encoder", "fingerprint": pipe.text_encoder.fingerprint,
                                    "null_condition": "empty_caption"}  # fmt: skip
    assert "blueprint" not in card["data"] and card["data"]["teacher"]["name"].startswith("teacher/")
    assert card["parameters"] == sum(p.numel() for p in pipe.model.parameters())
    before = MusicPipeline.from_pretrained(teacher).model.state_dict()
    same = [torch.equal(value.half(), before[name].half()) for name, value in pipe.model.state_dict().items()]
    assert all(same) == (joint == "null") and str(tmp_path) not in (Path(out) / "config.yaml").read_text()


def test_student_can_be_distilled_again(config_of, folders, tmp_path):
    """A student of full shape of an exported student gives equal states."""
    encoder = load_text_encoder(folders["bert"], trainable=True)
    student, tokenizer = build_student(encoder.model, encoder.tokenizer, 24, StudentShape([1], 8))
    torch.nn.init.normal_(student.projection.weight)
    again, tokenizer_again = build_student(student, tokenizer, 24, StudentShape())
    assert torch.equal(
        states_of(again, tokenizer_again, CAPTIONS).embeddings, states_of(student, tokenizer, CAPTIONS).embeddings
    )


def export_with_card(teacher, tmp_path, change):
    out = export(teacher, tmp_path / "exported")
    card = json.loads((out / "card.json").read_text())
    change(card)
    (out / "card.json").write_text(json.dumps(card))
    return out


def test_null_condition_no_tokens_is_inherited_from_teacher(config_of, teacher, tmp_path):
    """As in MusicGen, a dropped caption has no tokens, in training and after export."""
    folder = export_with_card(teacher, tmp_path, lambda card: card["data"]["text"].update(null_condition="no_tokens"))
    overrides = (f"teacher={folder}", "text_student.joint_step=0", "data.caption_dropout=1", "train.steps=2")
    task = TextDistillTask(config_of(*overrides))
    before = losses_of(task)
    with torch.no_grad():
        task.encoder.projection.bias += 1
    after = losses_of(task)
    assert torch.equal(before["cross_entropy"], after["cross_entropy"]) and before["text"] < after["text"]
    assert before["kl"].item() < 1e-5
    out = export(loop.train(config_of(*overrides)), tmp_path / "out")
    assert open_model_folder(out).null_condition == "no_tokens"
    assert torch.isfinite(MusicPipeline.from_pretrained(out)("a flute", duration=0.2).audios).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda card: card["data"].pop("text"), "names no text"),
        (lambda card: card["data"]["text"].update(null_condition="unmasked_padding"), "unmasked_padding"),
        (lambda card: card.update(weights="int8"), "int8"),
        (lambda card: card["data"]["text"].update(fingerprint="0" * 16), "was trained with text"),
    ],
)
def test_unsupported_teachers_are_rejected(change, message, config_of, teacher, tmp_path):
    folder = export_with_card(teacher, tmp_path, change)
    with pytest.raises(UserError, match=message):
        TextDistillTask(config_of(f"teacher={folder}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher=null", "teacher is not set"),
        ("init=somewhere", "set init=null"),
        ("losses.text=0", "losses.text must be above 0"),
        ("losses.kl=-1", "losses.kl must be at least 0, got -1"),
        ("losses.tags=1", "losses.tags"),
        ("text_student.d_model=12", "multiple of the head width 8, got 12"),
        ("text_student.n_layers=0", "text_student.n_layers must be at least 1, got 0"),
        ("text_student.d_ff=x", "text_student.d_ff must be an integer or null, got x"),
        ("losses.text=null", "losses.text must be a number, got null"),
        ("text_student.joint_step=-1", "text_student.joint_step must be at least 0, got -1"),
        ("text_student.joint_step=20", "below train.steps=20 or null, got 20"),
    ],
)
def test_invalid_settings_are_rejected(override, message, config_of):
    with pytest.raises(UserError, match=message):
        TextDistillTask(config_of(override))
