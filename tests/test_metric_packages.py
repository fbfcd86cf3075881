"""Embedders behind packages that are not required: equal to the packages' own functions; one line where one is absent.

With the packages installed: pip install hear21passt audiobox_aesthetics muq. Weights are random.
"""

import contextlib
import io
import sys

import pytest
import torch

from ssmttm import audio, config
from ssmttm.errors import UserError
from ssmttm.evaluation.embedders import load_embedder
from ssmttm.evaluation.embedders.base import Classifier, Embedder, JointEmbedder, Scorer
from ssmttm.evaluation.metrics.compute import Clip, compute_metrics
from ssmttm.evaluation.protocol import evaluate

PACKAGES = {"passt": "hear21passt", "audiobox": "audiobox_aesthetics", "muq_mulan": "muq"}


def package(name):
    """A package, or a skipped test, also where a library of the package does not load."""
    return pytest.importorskip(name, reason=f"the package {name} is not installed", exc_type=(ImportError, OSError))


@pytest.mark.parametrize("name", PACKAGES)
def test_absent_package_is_one_line(name, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(UserError, match=f"^embedder {name} needs the package {PACKAGES[name]} .*: pip install"):
        load_embedder(name)


def test_passt_equals_the_package(tmp_path):
    """As Audiocraft calls it: softmax of the logits of clips of 10 s."""
    package("hear21passt.base")
    from hear21passt import base

    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        net = base.get_model_passt(arch="passt_s_swa_p16_128_ap476", pretrained=False)
        for parameter in net.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, 0, 0.03)
        torch.save(net.state_dict(), tmp_path / "passt.pt")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(base, "get_model_passt", lambda **rest: net)
            theirs = base.get_basic_model(mode="logits").eval()
        wav = 0.1 * torch.randn(1, 320_000, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = theirs(wav).softmax(-1)
    embedder = load_embedder("passt", str(tmp_path / "passt.pt"))
    assert isinstance(embedder, Embedder) and isinstance(embedder, Classifier)
    torch.testing.assert_close(embedder.posteriors(wav), expected, rtol=1e-4, atol=1e-7)
    assert float(expected.max()) > 2 / 527 and embedder.embed(wav).shape == (1, 1, 768)


def test_audiobox_equals_the_package(tmp_path):
    """The predictor's scores of a clip of two windows."""
    package("audiobox_aesthetics.infer")
    from audiobox_aesthetics.infer import AesPredictor
    from audiobox_aesthetics.model.aes import AesMultiOutput

    targets = {axis: {"mean": 5.0 + i, "std": 1.0 + 0.1 * i} for i, axis in enumerate(("CE", "CU", "PC", "PQ"))}
    torch.manual_seed(0)
    model = AesMultiOutput(target_transform=targets).eval()
    model.save_pretrained(tmp_path)
    wav = 0.1 * torch.randn(1, 320_000, generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AesMultiOutput, "from_pretrained", lambda name: model)
        (expected,) = AesPredictor(checkpoint_pth=None).forward([{"path": wav, "sample_rate": 16_000}])
    embedder = load_embedder("audiobox", str(tmp_path))
    scores = embedder.embed(wav)
    assert isinstance(embedder, Scorer) and scores.shape == (1, 2, 4)
    torch.testing.assert_close(scores.mean(1)[0], torch.tensor(list(expected.values())), rtol=1e-4, atol=1e-4)


def write_mulan(folder):
    """A small MuQ-MuLan of random weights."""
    package("muq")
    from muq import MuQ, MuQConfig, MuQMuLan
    from transformers import XLMRobertaConfig, XLMRobertaModel

    torch.manual_seed(0)
    stat = {"melspec_2048_mean": 0.0, "melspec_2048_std": 1.0, "melspec_2048_cnt": 1.0}
    small = MuQConfig(encoder_dim=64, encoder_depth=2, conv_dim=16, stat=stat, w2v2_config=conformer())
    MuQ(small).save_pretrained(folder / "muq")
    text = XLMRobertaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    XLMRobertaModel(text).save_pretrained(folder / "xlm-roberta")
    write_tokenizer(folder / "xlm-roberta")
    transformer = {"dim": 32, "tf_depth": 1, "heads": 2, "dim_head": 16}
    settings = {
        "mulan": {"sr": 24_000, "clip_secs": 2, "dim_latent": 16}, "audio_transformer": transformer,
        "audio_model": {"name": str(folder / "muq"), "model_dim": 64, "use_layer_idx": -1},
        "text_model": {"name": str(folder / "xlm-roberta"), "model_dim": 32, "use_layer_idx": -1},
        "text_transformer": {**transformer, "max_seq_len": 64},
    }  # fmt: skip
    MuQMuLan(settings).save_pretrained(folder / "mulan", config=settings)
    return str(folder / "mulan")


def conformer():
    from transformers import Wav2Vec2ConformerConfig

    config = Wav2Vec2ConformerConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        position_embeddings_type="rotary",
    )
    return {name: value for name, value in config.to_dict().items() if not isinstance(value, dict)}


def write_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<pad>", "</s>", "<unk>", "a", "slow", "waltz", "fast", "jig", "in", "C"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)


def test_muq_mulan_equals_the_package(tmp_path):
    """Clips of two windows; captions alone, since in a batch the package's embeddings depend on the padding."""
    embedder = load_embedder("muq_mulan", write_mulan(tmp_path))
    model = embedder.model
    assert isinstance(embedder, Embedder) and isinstance(embedder, JointEmbedder) and embedder.seconds == 2
    wav = 0.1 * torch.randn(2, 96_000, generator=torch.Generator().manual_seed(0))
    captions = ["a slow waltz", "a fast jig in C in a slow waltz"]
    with torch.no_grad():
        expected = model(wavs=wav)
        alone = torch.cat([model(texts=[caption]) for caption in captions])
        together = model(texts=captions)
    torch.testing.assert_close(embedder.embed(wav).mean(1), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embedder.joint_text(captions), alone, rtol=1e-4, atol=1e-5)
    assert float((together - alone).abs().max()) > 1e-3


class Scores:
    """A Scorer of two axes: the level of a clip and its opposite."""

    name, sample_rate, seconds, dim, settings, axes = "scores", 16_000, 1.0, 2, {}, ("loud", "soft")
    fingerprint = "s" * 16

    def embed(self, wav):
        level = wav.unfold(-1, 16_000, 16_000).abs().mean(-1)  # [B, W]
        return torch.stack([level, -level], -1)


def test_scores_are_reported_as_means_without_distances(tmp_path):
    clips = []
    for i, level in enumerate((0.1, 0.2, 0.6)):
        audio.write(tmp_path / f"{i}.wav", torch.full((1, 32_000), level), 16_000)
        clips.append(Clip(tmp_path / f"{i}.wav", "x"))
    loud, soft = compute_metrics(clips, [clip.path for clip in clips], Scores(), 2.0, {"seed": 3}, tmp_path / "cache")
    assert (loud.name, soft.name) == ("loud_scores", "soft_scores") and loud.better == "higher"
    assert loud.value == pytest.approx(0.3, abs=1e-3) and soft.value == pytest.approx(-0.3, abs=1e-3)
    assert loud.low < loud.value < loud.high and loud.fingerprint["seed"] == 3
    data = evaluate.ProtocolData([object()] * evaluate.MIN_CLIPS, [])
    evaluate._check(data, [], [Scores()], 2.0)  # needs no references
    with pytest.raises(UserError, match="no reference audio"):
        evaluate._check(data, [], [load_embedder("log_mel")], 2.0)


def test_new_embedders_have_keys():
    weights = config.load("eval=musiccaps", root="eval").eval.weights
    assert set(PACKAGES) <= set(weights)
