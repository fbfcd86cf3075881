"""Tempo, key and metre predicted from the caption."""

import pytest
import torch
from small_stores import TEXT_DIM, lm_config, small_codec, write_codes_store
from torch.nn import functional as F

from ssmttm.audio.notation import KEYS, METRES
from ssmttm.config.model import TokenLMConfig
from ssmttm.errors import UserError
from ssmttm.models.control_predictor import (
    MAX_BPM,
    MIN_BPM,
    N_TEMPI,
    ControlPredictor,
    class_of_tempo,
    prediction_losses,
    tempo_of_class,
)
from ssmttm.models.controls import Controls
from ssmttm.text.condition import TextCondition
from ssmttm.training import loop
from ssmttm.training.tasks import lm

CONTROLS = {"tempo": True, "key": True, "metre": True}
OVERRIDES = (*(f"model.{key}=true" for key in CONTROLS), "model.predict_controls=true")


def predictor(**controls):
    torch.manual_seed(0)
    return ControlPredictor(TokenLMConfig(text_dim=TEXT_DIM, **(controls or CONTROLS)))


def captions(*lengths):
    g = torch.Generator().manual_seed(2)
    return TextCondition.stack([torch.randn(length, TEXT_DIM, generator=g) for length in lengths])


def test_tempo_classes_are_inverse_and_cover_the_range():
    tempi = tempo_of_class(torch.arange(N_TEMPI))
    assert class_of_tempo(tempi).tolist() == list(range(N_TEMPI))
    torch.testing.assert_close(tempi[[0, -1]], torch.tensor([MIN_BPM, MAX_BPM]))
    bpm = torch.linspace(MIN_BPM, MAX_BPM, 500)
    assert (tempo_of_class(class_of_tempo(bpm)) / bpm).log2().abs().max() < 0.5 * 0.0351  # half of a step of 2.4 %
    assert class_of_tempo(torch.tensor([torch.nan, 1.0, 999.0])).tolist() == [-1, 0, N_TEMPI - 1]


def test_heads_are_those_of_the_model_and_padding_changes_nothing():
    text = captions(3, 7)
    found = predictor()(text)
    assert {name: logits.shape[1] for name, logits in found.items()} == {"bpm": N_TEMPI, "key": 24, "metre": 8}
    alone = predictor()(TextCondition.stack([text.embeddings[0, text.mask[0]]]))
    for name, logits in alone.items():
        torch.testing.assert_close(logits[0], found[name][0])
    assert set(predictor(key=True)(text)) == {"key"}


def test_loss_is_the_cross_entropy_of_the_items_that_state_a_value():
    logits = predictor()(captions(2, 3, 4))
    stated = Controls(bpm=torch.tensor([90.0, torch.nan, 131.0]), key=torch.tensor([3, -1, -1]),
                      metre=torch.tensor([-1, -1, -1]))  # fmt: skip
    found = prediction_losses(logits, stated)
    classes = class_of_tempo(stated.bpm)
    rows = torch.tensor([0, 2])
    torch.testing.assert_close(found["bpm"], F.cross_entropy(logits["bpm"][rows], classes[rows], reduction="sum"))
    torch.testing.assert_close(found["key"], F.cross_entropy(logits["key"][:1], stated.key[:1], reduction="sum"))
    assert found["metre"] == 0


def test_draws_follow_the_distributions_and_each_item_its_own_numbers():
    model, text = predictor(), captions(5)
    uniforms = torch.rand(4000, 3, generator=torch.Generator().manual_seed(1))
    many = TextCondition(text.embeddings.expand(4000, -1, -1), text.mask.expand(4000, -1))
    drawn = model.draw(many, uniforms)
    for name, n_classes in (("key", len(KEYS)), ("metre", len(METRES))):
        shares = torch.bincount(getattr(drawn, name), minlength=n_classes) / 4000
        torch.testing.assert_close(shares, (2 * model(text)[name][0]).softmax(-1).detach(), atol=0.03, rtol=0)
    assert drawn.bpm.min() >= MIN_BPM and drawn.bpm.max() <= MAX_BPM and len(drawn.bpm.unique()) > 80
    alone = model.draw(text, uniforms[7:8])
    assert alone.key == drawn.key[7] and alone.bpm == drawn.bpm[7]
    ends = model.draw(TextCondition(many.embeddings[:2], many.mask[:2]), torch.tensor([[0.0] * 3, [1 - 1e-9] * 3]))
    assert ends.key.tolist() == [0, 23]


def test_training_learns_what_captions_say(tmp_path):
    """Each caption of the small store goes with few tempi and keys; the LM's own loss does not change by it."""
    store = write_codes_store(tmp_path / "codes", codec=small_codec(tmp_path / "codec"))
    task = lm.LanguageModelTask(lm_config(store, tmp_path / "run", *OVERRIDES, "data.caption_dropout=0"))
    batch = task.loader("train", 16, 0, 1).batch(0)
    optimiser = torch.optim.Adam(task.model.control_predictor.parameters(), lr=0.01)
    first = None
    for _ in range(60):
        losses = task.losses({"model": task.model}, batch, task.loss_denominators(batch), 0)["model"]
        first = first or {name: float(loss.detach()) for name, loss in losses.items()}
        optimiser.zero_grad()
        losses["controls"].backward()
        optimiser.step()
    assert float(losses["controls"]) < 0.7 * first["controls"]
    assert float(losses["cross_entropy"]) == first["cross_entropy"]
    total = sum(first[f"predict_{name}"] for name in ("bpm", "key", "metre"))
    assert first["controls"] == pytest.approx(total, rel=1e-5)


def test_items_with_the_caption_of_another_segment_teach_nothing(tmp_path):
    store = write_codes_store(tmp_path / "codes", codec=small_codec(tmp_path / "codec"))
    task = lm.LanguageModelTask(lm_config(store, tmp_path / "run", *OVERRIDES, "data.caption_swap=1"))
    stated = task.loader("train", 16, 0, 1).batch(0)["stated_controls"]
    assert stated.bpm.isnan().all() and (stated.key < 0).all() and (stated.metre < 0).all()


def test_run_with_a_predictor_is_exported_with_it(tmp_path):
    store = write_codes_store(tmp_path / "codes", codec=small_codec(tmp_path / "codec"))
    loop.train(lm_config(store, tmp_path / "run", *OVERRIDES, "train.steps=2"))
    from ssmttm.export.model_folder import export
    from ssmttm.generation.loading import load_language_model, open_model_folder

    model = load_language_model(open_model_folder(export(tmp_path / "run", tmp_path / "exported")))
    assert isinstance(model.control_predictor, ControlPredictor)
    assert model.control_predictor.hidden.weight.abs().sum() > 0


def test_a_predictor_needs_something_to_predict():
    with pytest.raises(UserError, match=r"model\.predict_controls=true predicts tempo, key or metre: set one"):
        TokenLMConfig(predict_controls=True)
