"""Importers: logits, codes and audio equal those of the original model; no foreign code is executed."""

import json
import os
import shutil
from dataclasses import asdict

import pytest
import torch
from released_checkpoint import LAYERS, SPECIAL, D, K, N, V, released_forward, released_tensors, save_checkpoint
from safetensors.torch import load_file, save_file
from small_stores import write_codes_store
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    DacConfig,
    DacModel,
    EncodecConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from ssmttm import MusicPipeline, checkpoint, config
from ssmttm.adapters import check_base, merge, read_adapter, unmerge
from ssmttm.cli.main import main
from ssmttm.codecs import load_codec
from ssmttm.errors import UserError, run_cli
from ssmttm.export.importers import export_musicgen, import_musicgen, import_released
from ssmttm.export.importers.musicgen import from_musicgen, to_musicgen
from ssmttm.export.importers.released import read_released
from ssmttm.export.model_folder import export
from ssmttm.files import file_sha256
from ssmttm.generation.loading import load_language_model, open_model_folder
from ssmttm.models import TokenLM, TokenLMConfig, build_model
from ssmttm.models.conditioning import sinusoids
from ssmttm.text import TextCondition, load_text_encoder
from ssmttm.text.null_condition import build_null_condition
from ssmttm.training import loop
from ssmttm.training.checkpointer import load_initial_weights

WORDS = ["<pad>", "</s>", "<unk>", "slow", "piano", "loud", "drums", "with"]
PROMPTS = ["slow piano", "loud drums with slow piano"]


def save_tokenizer(folder):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special_tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens).save_pretrained(folder)


def t5_config(width):
    return T5Config(vocab_size=len(WORDS), d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)


def forwards(model, codes, text):
    """Logits [B, K, S, V'] of the full forward, and of a prefill of 5 and steps, from the 5th position on."""
    state = model.init_state(len(codes))
    found = [model.prefill(codes[..., :5], text, state)]
    found += [model.step(codes[..., s], state) for s in range(5, codes.shape[-1])]
    return model(codes, text), torch.stack(found, 2)


def assert_near(found, expected, tolerance=1e-5):
    assert expected.std() > 0.1, "too small for this tolerance"
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# --- checkpoints of the code of arXiv 2601.14786


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A folder with a checkpoint, a DAC of three codebooks and a T5 of width 768, small and with random weights."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    save_checkpoint(folder / "simba.ckpt", released_tensors())
    dac = DacConfig(
        sampling_rate=8000, downsampling_ratios=[2, 4], upsampling_ratios=[4, 2], encoder_hidden_size=8,
        decoder_hidden_size=16, hidden_size=16, n_codebooks=3, codebook_size=V, codebook_dim=4,
    )  # fmt: skip
    DacModel(dac).save_pretrained(folder / "dac")
    T5EncoderModel(t5_config(768)).save_pretrained(folder / "t5")
    save_tokenizer(folder / "t5")
    return folder


def import_from(released, out, checkpoint="simba.ckpt"):
    return import_released(released / checkpoint, out, released / "dac", released / "t5")


def unmasked_text_states(t5_folder, prompt):
    """T5 states [60, 768] of a prompt and of the empty caption, encoded together as in that code."""
    ids = [WORDS.index(word) for word in prompt.split()] + [1]
    null = [1] + [0] * (len(ids) - 1)
    mask = torch.zeros(2, 60, dtype=torch.int64)
    mask[0, : len(ids)], mask[1, 0] = 1, 1
    rows = torch.tensor([ids + [1] * (60 - len(ids)), null + [1] * (60 - len(ids))])
    with torch.no_grad():
        return T5EncoderModel.from_pretrained(t5_folder).eval()(rows, mask).last_hidden_state


def test_released_import_gives_the_logits_of_the_original_code(released):
    model = read_released(released / "simba.ckpt")
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(V + 1, (2, K, 19), generator=g)
    states = torch.randn(2, 7, 768, generator=g)
    expected = released_forward(released_tensors(), codes, states)[:, :, 1:].float()
    whole, steps = forwards(model, codes, TextCondition(states, torch.ones(2, 7, dtype=torch.bool)))
    assert_near(whole, expected)
    assert_near(steps, expected[:, :, 4:])


def test_released_import_samples_the_codes_of_the_original_code(released, tmp_path):
    """Greedy, with guidance, one codebook: prompts padded to 60 tokens, one special token at the start."""
    tensors = released_tensors(n_codebooks=1)
    save_checkpoint(tmp_path / "one.ckpt", tensors, codec_layer=1)
    out = import_released(tmp_path / "one.ckpt", tmp_path / "model", released / "dac", released / "t5")
    pipe = MusicPipeline.from_pretrained(out, codec=released / "dac", text_encoder=released / "t5")
    assert pipe.codec.n_codebooks == 1
    output = pipe(PROMPTS, duration=12 * 8 / 8000, guidance_scale=3.0, top_k=1)
    assert output.audios.shape == (2, 1, 96)
    for prompt, codes in zip(PROMPTS, output.codes, strict=True):
        states, sequence = unmasked_text_states(released / "t5", prompt), torch.tensor([[[SPECIAL]]])
        for _ in range(12):
            text, null = released_forward(tensors, sequence.expand(2, -1, -1), states)[:, 0, -1, :V]
            sequence = torch.cat([sequence, (null + 3 * (text - null)).argmax().view(1, 1, 1)], 2)
        assert torch.equal(codes, sequence[0, :, 1:])
    assert len(output.codes.unique()) > 3 and not torch.equal(output.codes[0], output.codes[1])


def test_unmasked_padding_equals_the_original_text_states(released):
    encoder = load_text_encoder(released / "t5")
    read = build_null_condition("unmasked_padding", encoder)
    for prompt in PROMPTS:
        text, null = unmasked_text_states(released / "t5", prompt)
        torch.testing.assert_close(read(prompt), (text, null), atol=1e-5, rtol=0)
    output = encoder.encode_unmasked(["piano " * 70, ""], n_tokens=60, token_id=1)
    assert output.mask.shape == (2, 71) and output.mask.all()


def test_released_preset_equals_the_imported_config(released):
    sizes = {"n_codebooks": K, "codebook_size": V, "d_model": D, "n_layers": LAYERS, "d_state": N}
    preset = config.load("model=released", *(f"model.{key}={value}" for key, value in sizes.items())).model
    assert asdict(build_model(preset).config) == asdict(read_released(released / "simba.ckpt").config)


def test_released_folder_has_a_card_and_initialises_a_training(released, tmp_path):
    out = import_from(released, tmp_path / "mine")
    card = json.loads((out / "card.json").read_text())
    assert (card["name"], card["imported_from"]) == ("mine", "simba.ckpt")
    assert card["data"]["codec"]["name"] == "descript/dac_44khz"
    assert card["data"]["text"]["name"] == "google/flan-t5-base"
    assert card["data"]["text"]["fingerprint"] == load_text_encoder(released / "t5").fingerprint
    assert str(released) not in "".join(path.read_text() for path in (out / "card.json", out / "config.yaml"))
    model = TokenLM(read_released(released / "simba.ckpt").config)
    assert load_initial_weights(out, model)["licences"] == {"NOASSERTION": None}
    torch.testing.assert_close(model.state_dict(), read_released(released / "simba.ckpt").state_dict())


class MaliciousPickle:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_released_pickle_is_never_executed(released, tmp_path, zipped, capsys):
    witness = tmp_path / "executed"
    content = {"state_dict": {}, "hyper_parameters": MaliciousPickle(witness)}
    torch.save(content, tmp_path / "bad.ckpt", _use_new_zipfile_serialization=zipped)
    command = ["import", "released", str(tmp_path / "bad.ckpt"), str(tmp_path / "out")]
    assert run_cli(lambda: main(command)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "bad.ckpt" in lines[0]
    assert "rejected" in lines[0] or not zipped
    assert not witness.exists() and not (tmp_path / "out").exists()
    torch.load(tmp_path / "bad.ckpt", weights_only=False)
    assert witness.exists(), "the pickle is harmless, so this test shows nothing"


def test_released_import_of_another_architecture_names_its_tensors(released, tmp_path):
    renamed = {name.replace("mamba.mamba", "self_attn.attn"): tensor for name, tensor in released_tensors().items()}
    save_checkpoint(tmp_path / "other.ckpt", renamed)
    with pytest.raises(UserError, match=r"music_model\.backbone\.0\.mamba\.mamba\.A_log is absent, \(2,\) is expected; "
                       r"music_model.*; music_model.*; and 29 more"):  # fmt: skip
        read_released(tmp_path / "other.ckpt")
    save_checkpoint(tmp_path / "wide.ckpt", released_tensors(), d_state=2 * N)
    with pytest.raises(UserError, match=r"in_proj.weight is \(274, 64\), \(290, 64\) is expected"):
        read_released(tmp_path / "wide.ckpt")
    extra = {"lm_head.2.weight": torch.zeros(V + 1, D)}
    save_checkpoint(tmp_path / "extra.ckpt", released_tensors() | extra)
    with pytest.raises(UserError, match=r"lm_head\.2\.weight is \(17, 64\), nothing is expected\. "):
        read_released(tmp_path / "extra.ckpt")


def test_released_import_of_other_files_is_an_error(released, tmp_path):
    whole = (released / "simba.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.ckpt").write_text("<html>not found</html>")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    for name in ("nowhere.ckpt", "cut.ckpt", "text.ckpt", "empty.ckpt"):
        with pytest.raises(UserError, match=name):
            read_released(tmp_path / name)
    config = {"config": {"model": {"layers": 1}}}
    for content in ([1], {"state_dict": {}}, {"hyper_parameters": config, "state_dict": {}}, {"hyper_parameters": 3}):
        torch.save(content, tmp_path / "odd.ckpt")
        with pytest.raises(UserError, match=r"odd\.ckpt is not a checkpoint of arXiv 2601\.14786's code"):
            read_released(tmp_path / "odd.ckpt")
    save_checkpoint(tmp_path / "odd.ckpt", {"embedding.0.weight": 3})
    with pytest.raises(UserError, match=r"odd\.ckpt is not a checkpoint"):
        read_released(tmp_path / "odd.ckpt")


def test_released_import_needs_fitting_codec_and_text_encoder(released, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"2 codebooks of 16 .* codec tiny has 12 of 1024"):
        import_released(released / "simba.ckpt", tmp_path / "out", "tiny", released / "t5")
    with pytest.raises(UserError, match="text encoder minilm gives width 384"):
        import_released(released / "simba.ckpt", tmp_path / "out", released / "dac", "minilm")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="descript/dac_44khz"):
        import_released(released / "simba.ckpt", tmp_path / "out")
    with pytest.raises(UserError, match="google/flan-t5-base"):
        import_released(released / "simba.ckpt", tmp_path / "out", released / "dac")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name], "an incomplete folder is left"


def test_import_does_not_overwrite(released, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists already"):
        import_from(released, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        import_from(released, tmp_path / "file" / "out")


# --- MusicGen of transformers


def random_musicgen(**decoder):
    torch.manual_seed(0)
    codec = EncodecConfig(
        sampling_rate=8000, target_bandwidths=[0.6], hidden_size=8, codebook_dim=8, codebook_size=16, num_filters=4,
        num_lstm_layers=1, upsampling_ratios=[5, 4, 4, 2],
    )  # fmt: skip
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, num_codebooks=3, vocab_size=16)
    config = MusicgenDecoderConfig(**{**sizes, "pad_token_id": 16, "bos_token_id": 16, **decoder})
    parts = {"text_encoder": t5_config(12), "audio_encoder": codec, "decoder": config}
    model = MusicgenForConditionalGeneration(MusicgenConfig(**{name: part.to_dict() for name, part in parts.items()}))
    with torch.no_grad():
        for parameter in [*model.decoder.parameters(), *model.enc_to_dec_proj.parameters()]:
            parameter.add_(0.3 * torch.randn_like(parameter))
        for layer in model.audio_encoder.quantizer.layers:
            layer.codebook.embed.normal_()  # initially zeros: every code would decode alike
    special = dict.fromkeys(("decoder_start_token_id", "pad_token_id", "bos_token_id"), config.vocab_size)
    for name, value in special.items():
        setattr(model.generation_config, name, value)
    return model.eval()


def save_musicgen(folder, model):
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def musicgen():
    return random_musicgen()


@pytest.fixture(scope="module")
def musicgen_folder(musicgen, tmp_path_factory):
    return save_musicgen(tmp_path_factory.mktemp("musicgen") / "musicgen-tiny", musicgen)


@pytest.fixture(scope="module")
def imported(musicgen_folder):
    return import_musicgen(musicgen_folder, musicgen_folder.parent / "imported")


def test_musicgen_import_gives_the_logits_of_transformers(musicgen):
    model = from_musicgen(musicgen)
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(17, (2, 3, 23), generator=g)
    states, mask = torch.randn(2, 5, 12, generator=g), torch.tensor([[True] * 5, [True, True, False, False, False]])
    with torch.no_grad():
        out = musicgen(
            encoder_outputs=(states,), attention_mask=mask.long(), decoder_input_ids=codes.flatten(0, 1)
        ).logits.unflatten(0, (2, 3))  # fmt: skip
    whole, steps = forwards(model, codes, TextCondition(states, mask))
    assert_near(whole, out)
    assert_near(steps, out[:, :, 4:])


def test_musicgen_null_condition_has_no_token(musicgen):
    model = from_musicgen(musicgen)
    codes = torch.randint(17, (1, 3, 9), generator=torch.Generator().manual_seed(1))
    null = musicgen.get_unconditional_inputs()
    with torch.no_grad():
        out = musicgen(
            encoder_outputs=null.encoder_outputs, attention_mask=null.attention_mask, decoder_input_ids=codes[0]
        ).logits  # fmt: skip
    no_text = TextCondition(torch.zeros(1, 0, 12), torch.zeros(1, 0, dtype=torch.bool))
    assert_near(model(codes, no_text)[0], out)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_musicgen_import_samples_as_transformers_does(musicgen, musicgen_folder, imported, guidance, monkeypatch):
    """Greedy, with prompts of two lengths in one batch."""
    tokenizer, decoded_codes = PreTrainedTokenizerFast.from_pretrained(musicgen_folder), []
    decode = musicgen.audio_encoder.decode

    def recording_decode(codes, **more):
        decoded_codes.append(codes)
        return decode(codes, **more)

    monkeypatch.setattr(musicgen.audio_encoder, "decode", recording_decode)
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    audio = musicgen.generate(**inputs, do_sample=False, guidance_scale=guidance, max_new_tokens=20 + 3 - 1)
    output = MusicPipeline.from_pretrained(imported)(PROMPTS, 20 * 160 / 8000, guidance_scale=guidance, top_k=1)
    assert torch.equal(output.codes, decoded_codes[0][0]) and output.codes.shape == (2, 3, 20)
    assert len(output.codes.unique()) > 3 and not torch.equal(output.codes[0], output.codes[1])
    torch.testing.assert_close(output.audios, audio, atol=1e-5, rtol=0)


def test_musicgen_folder_is_self_contained_and_movable(imported, tmp_path, monkeypatch):
    expected = MusicPipeline.from_pretrained(imported)("loud drums", duration=0.2).codes
    shutil.copytree(imported, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    pipe = MusicPipeline.from_pretrained("elsewhere")
    assert torch.equal(pipe("loud drums", duration=0.2).codes, expected)
    assert pipe.metadata["training_data_licences"] == {"NOASSERTION": None}
    shutil.rmtree("elsewhere/codec")
    with pytest.raises(UserError, match="elsewhere/codec: no such folder"):
        MusicPipeline.from_pretrained("elsewhere")
    card = json.loads((tmp_path / "elsewhere/card.json").read_text())
    card["data"]["text"]["null_condition"] = "aloud"
    (tmp_path / "elsewhere/card.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="unknown null_condition 'aloud': choose from empty_caption, no_tokens"):
        MusicPipeline.from_pretrained("elsewhere", codec=imported / "codec")


def test_musicgen_import_and_export_round_trip(musicgen, musicgen_folder, tmp_path, capsys):
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main(["import", "musicgen", str(musicgen_folder), str(ours)]) == 0
    card = json.loads((ours / "card.json").read_text())
    (ours / "card.json").write_text(json.dumps(card | {"sampling": {"guidance_scale": 2.0, "top_k": 50, "top_p": 0.9}}))
    assert main(["export-musicgen", str(ours), str(back)]) == 0
    assert capsys.readouterr().out.split() == [str(ours), str(back)]
    again = MusicgenForConditionalGeneration.from_pretrained(back).eval()
    expected, found = musicgen.state_dict(), again.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    files = [path for folder in (ours, back) for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if str(tmp_path).encode() in path.read_bytes()]
    inputs = PreTrainedTokenizerFast.from_pretrained(back)(
        "slow piano", return_tensors="pt", return_token_type_ids=False
    )
    settings = again.generation_config
    assert (settings.guidance_scale, settings.top_k, settings.top_p, settings.do_sample) == (2.0, 50, 0.9, True)
    greedy = inputs | {"do_sample": False, "guidance_scale": 3.0, "max_new_tokens": 12}
    torch.testing.assert_close(again.generate(**greedy), musicgen.generate(**greedy))


def test_musicgen_bin_is_read_without_executing_code(musicgen, musicgen_folder, tmp_path):
    folder = shutil.copytree(musicgen_folder, tmp_path / "bin")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    out = import_musicgen(folder, tmp_path / "out")
    torch.testing.assert_close(load_file(out / "model.safetensors"), dict(from_musicgen(musicgen).state_dict()))
    torch.save({"x": MaliciousPickle(tmp_path / "executed")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        import_musicgen(folder, tmp_path / "again")
    assert not (tmp_path / "executed").exists() and not (tmp_path / "again").exists()


def test_musicgen_takes_an_adapter(imported, tmp_path):
    """A training with an adapter on the imported model, with its codec, text encoder and null condition."""
    codec, text = load_codec(imported / "codec"), imported / "text_encoder"
    store = write_codes_store(tmp_path / "store", segments=8, codec=codec, captions=PROMPTS, text_folder=text)
    lora = ("experiment=lora", f"init={imported}", f"data.store={store}", f"run_dir={tmp_path / 'run'}")
    short = ("train.steps=2", "data.batch_size=2", "data.frames=16", "train.eval_every=0", "train.precision=fp32")
    run = loop.train(config.load(*lora, *short))
    assert checkpoint.read_config(run).model == checkpoint.read_config(imported).model
    assert checkpoint.read_state(checkpoint.latest_good(run))["data"]["text"]["null_condition"] == "no_tokens"
    adapter = read_adapter(export(run, tmp_path / "adapter"))
    targets = {layer.rpartition(".")[2] for layer in adapter.layers}
    assert targets == {"q_proj", "k_proj", "v_proj", "out_proj", "heads"} and len(adapter.layers) == 2 * 2 * 4 + 1
    folder = open_model_folder(imported)
    check_base(adapter, file_sha256(folder.weights_file), folder.name)
    model, tuned = load_language_model(folder), load_language_model(open_model_folder(run))
    codes = torch.randint(17, (2, 3, 9), generator=torch.Generator().manual_seed(1))
    states = TextCondition(torch.ones(2, 4, 12), torch.ones(2, 4, dtype=torch.bool))
    with torch.no_grad():
        original = model(codes, states)
        before = merge(model, [(adapter, 1.0)])
        assert_near(model(codes, states), tuned(codes, states))
        assert (model(codes, states) - original).abs().max() > 1e-3
        unmerge(model, before)
        assert torch.equal(model(codes, states), original)


def test_musicgen_in_half_precision_becomes_float32(musicgen_folder, tmp_path):
    folder = shutil.copytree(musicgen_folder, tmp_path / "half")
    MusicgenForConditionalGeneration.from_pretrained(musicgen_folder).half().save_pretrained(folder)
    out = import_musicgen(folder, tmp_path / "out")
    for path in (out / "model.safetensors", out / "codec/model.safetensors", out / "text_encoder/model.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values() if tensor.is_floating_point()} == {torch.float32}
    assert torch.isfinite(MusicPipeline.from_pretrained(out)("slow piano", duration=0.1).audios).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio_channels": 2}, "audio_channels must be 1, as in mono MusicGen models, got 2"),
        ({"activation_function": "relu"}, "activation_function must be 'gelu'.* got 'relu'"),
        ({"pad_token_id": 3}, "pad_token_id must be 16.* got 3"),
    ],
)
def test_musicgen_import_of_unsupported_kinds_is_an_error(change, message):
    with pytest.raises(UserError, match=message):
        from_musicgen(random_musicgen(**change))


def test_musicgen_import_of_incomplete_folders_is_an_error(musicgen_folder, released, tmp_path):
    for source, message in ((released / "t5", "is a 't5' model"), (tmp_path, "cannot be loaded")):
        with pytest.raises(UserError, match=message):
            import_musicgen(source, tmp_path / "out")
    tensors = load_file(musicgen_folder / "model.safetensors")
    folder = shutil.copytree(musicgen_folder, tmp_path / "copy")
    head = "decoder.lm_heads.0.weight"
    for changed, message in (
        ({name: tensor for name, tensor in tensors.items() if name != head}, f"lacks {head}"),
        (tensors | {head: torch.zeros(3, 3)}, "cannot be loaded"),
    ):
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=message):
            import_musicgen(folder, tmp_path / "out")
    save_file(tensors | {"decoder.model.decoder.embed_positions.weights": torch.zeros(9, 16)},
              folder / "model.safetensors", {"format": "pt"})  # fmt: skip
    import_musicgen(folder, tmp_path / "out")  # a table of sinusoids, saved by older versions


def test_musicgen_export_of_other_architectures_is_an_error(imported, tmp_path):
    config = asdict(MusicPipeline.from_pretrained(imported).model.config)
    for change, message in (
        ({"layers": "mamba2", "headdim": 16}, r"model\.layers must be 'attention', as in MusicGen, got 'mamba2'"),
        ({"text_dim": 16}, r"model\.text_dim must differ from model\.d_model"),
    ):
        with pytest.raises(UserError, match=message):
            to_musicgen(TokenLM(TokenLMConfig(**(config | change))))
    copy = shutil.copytree(imported, tmp_path / "copy")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("pattern: delay", "pattern: parallel"))
    with pytest.raises(UserError, match="the delay pattern"):
        export_musicgen(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sinusoids_equal_musicgens_at_late_positions(musicgen):
    """30 s are 1,500 positions: the tables differ by rounding only."""
    theirs = musicgen.decoder.model.decoder.embed_positions.get_embedding(1500, 1024)
    torch.testing.assert_close(sinusoids(torch.arange(1500), 1024), theirs, atol=3e-4, rtol=0)
