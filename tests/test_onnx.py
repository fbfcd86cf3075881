"""ONNX graphs in ONNX Runtime equal the modules in torch; the example gives the pipeline's audio."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import soundfile
import torch
from transformers import T5Config, T5EncoderModel

from ssmttm import MusicPipeline, UserError, config
from ssmttm.cli.main import main
from ssmttm.codecs import StudentCodec, build_codec, load_codec
from ssmttm.export.onnx import export_onnx, write
from ssmttm.export.onnx.graphs import ConditionGraph, DecoderGraph, EncoderGraph, StepGraph
from ssmttm.export.onnx.states import named_tensors
from ssmttm.generation.loading import ModelFolder
from ssmttm.generation.request import Sampling
from ssmttm.model_folder import write_model_folder
from ssmttm.models import TokenLM, TokenLMConfig, build_model
from ssmttm.ops.int8 import Int8Linear, quantise
from ssmttm.text import TextCondition, load_text_encoder
from ssmttm.text.encoders import TextEncoder

pytestmark = pytest.mark.timeout(900)  # tracing is slow on a busy machine
EXAMPLE = Path(__file__).parent.parent / "examples" / "generate_onnx.py"
K, V, E, D = 3, 32, 12, 48
DAC = {"kind": "dac", "sampling_rate": 16000, "encoder_hidden_size": 8, "downsampling_ratios": [4],
       "upsampling_ratios": [4], "decoder_hidden_size": 16, "n_codebooks": K, "codebook_size": V, "codebook_dim": 4,
       "hidden_size": 32}  # fmt: skip
ENCODEC = {"kind": "encodec", "sampling_rate": 16000, "upsampling_ratios": [4], "num_filters": 4, "hidden_size": 16,
           "codebook_size": V, "codebook_dim": 16, "target_bandwidths": [60.0], "num_lstm_layers": 2}  # fmt: skip


class Runtime:
    """A graph in ONNX Runtime: named arrays in, named arrays out."""

    def __init__(self, graph, path):
        write.write_graph(graph, path)
        self.graph, self.session = graph, onnxruntime.InferenceSession(path)

    def __call__(self, **inputs):
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
        return dict(zip(self.graph.outputs, self.session.run(None, arrays), strict=True))


def assert_close_arrays(given, expected):
    np.testing.assert_allclose(given, expected.numpy(), rtol=1e-4, atol=2e-6)


def make_model(**options) -> TokenLM:
    torch.manual_seed(0)
    sizes = {"n_codebooks": K, "codebook_size": V, "d_model": D, "d_state": 8, "headdim": 16, "n_heads": 4}
    model = TokenLM(TokenLMConfig(**sizes | {"text_dim": E, "init_std": 0.3, "n_layers": 1} | options)).eval()
    for control in filter(None, (model.chroma, model.tempo)):
        torch.nn.init.normal_(control.null)
    return model


def initial_states(graph, rows):
    """Initial states: zeros, and empty caches."""
    free = {"batch": rows, "cached": 0}
    return {
        name: torch.zeros([free.get(graph.axes[name].get(axis), size) for axis, size in enumerate(example.shape)],
                          dtype=example.dtype)
        for name, example in graph.examples.items() if name in graph.carried
    }  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"layers": ["mamba1", "mamba2", "mamba3", "s4d", "attention"], "n_layers": 5, "positions": "sinusoidal",
         "predict_special": True},
        {"layers": "attention", "conditioning": "cross_attention", "positions": "sinusoidal", "chroma": True},
        {"layers": "mamba2", "ngroups": 2, "conditioning": "adaln", "tempo": True, "norm": "layer"},
    ],
    ids=["all mixers", "cross-attention", "adaln"],
)  # fmt: skip
def test_step_graph_equals_the_model(options, tmp_path):
    """Text, then codes, position by position from initial states; with one, two and three rows."""
    model = make_model(**options)
    step = Runtime(StepGraph(model), tmp_path / "step.onnx")
    condition = Runtime(ConditionGraph(model), tmp_path / "condition.onnx")
    for rows, length in ((1, 1), (2, 4), (3, 2)):
        text = TextCondition(torch.randn(rows, length, E), torch.ones(rows, length, dtype=torch.bool))
        codes, state = torch.randint(V + 1, (rows, K, 5)), model.init_state(rows)
        expected = [model.prefill(codes[..., :1], text, state)]
        expected += [model.step(codes[..., position], state) for position in range(1, 5)]
        states = initial_states(step.graph, rows)
        condition_inputs = condition(text=text.embeddings, mask=text.mask)
        if "position" in states and "prefix" in condition_inputs:
            states["position"] = states["position"] - length
        prefix, inputs = condition_inputs.pop("prefix", None), [codes[..., position] for position in range(5)]
        if prefix is not None:
            inputs = [*prefix.swapaxes(0, 1), *inputs]
        found = []
        for given in inputs:
            is_token = given.shape != (rows, K)
            if prefix is not None:
                condition_inputs = {"prefix": given if is_token else prefix[:, 0], "is_prefix": np.full(rows, is_token)}
            outputs = step(codes=np.zeros((rows, K), np.int64) if is_token else given, **states, **condition_inputs)
            states = {name: outputs[f"next.{name}"] for name in states}
            found.append(outputs["logits"])
        for logits, wanted in zip(found[-5:], expected, strict=True):
            assert_close_arrays(logits, wanted[..., :V])
        for name, tensor in named_tensors(state.blocks).items():
            if name.endswith("_state"):
                assert_close_arrays(states[name], tensor)


def test_step_graph_stores_int8_weights_as_int8(tmp_path):
    model = quantise(make_model(layers="mamba2", conditioning="adaln", d_model=128))
    text = TextCondition(torch.randn(2, 3, E), torch.ones(2, 3, dtype=torch.bool))
    codes, state = torch.randint(V, (2, K, 2)), model.init_state(2)
    with torch.no_grad():
        expected = model(codes, text)[:, :, 1, :V]  # the forward of a sequence dequantises to float32
    model.prefill(codes[..., :1], text, state)
    states = {name: tensor.clone() for name, tensor in named_tensors(state.blocks).items()}
    step = Runtime(StepGraph(model), tmp_path / "step.onnx")
    np.testing.assert_allclose(step(codes=codes[..., 1], **states)["logits"], expected.numpy(), rtol=1e-3, atol=1e-5)
    n_int8 = sum(module.int8.numel() for module in model.modules() if isinstance(module, Int8Linear))
    assert (tmp_path / "step.onnx").stat().st_size < 2 * n_int8


def test_step_graph_takes_rows_of_different_cache_lengths(tmp_path):
    """As in the example: the shorter row's cache has empty entries at its end."""
    model = make_model(layers="attention", positions="rotary")
    step = Runtime(StepGraph(model), tmp_path / "step.onnx")
    lengths, parts, expected, codes = (5, 2), [], [], torch.randint(V, (2, K, 4))
    condition_inputs = {"prefix": np.zeros((1, D), np.float32), "is_prefix": np.array([False])}
    for row, length in enumerate(lengths):
        past, state, states = torch.randint(V, (1, K, length)), model.init_state(1), initial_states(step.graph, 1)
        for position in range(length):
            model.step(past[..., position], state)
            outputs = step(codes=past[..., position], **states, **condition_inputs)
            states = {name: outputs[f"next.{name}"] for name in states}
        parts.append(states)
        expected.append([model.step(codes[row : row + 1, :, position], state) for position in range(4)])
    longest = max(lengths)
    states = {
        name: np.concatenate([np.pad(p[name], [(0, 0), (0, longest - p[name].shape[1]), (0, 0), (0, 0)])
                              if p[name].ndim == 4 else p[name] for p in parts])
        for name in parts[0]
    }  # fmt: skip
    condition_inputs = {name: np.repeat(value, 2, 0) for name, value in condition_inputs.items()}
    for position in range(4):
        outputs = step(codes=codes[..., position], **states, **condition_inputs)
        states = {name: outputs[f"next.{name}"] for name in states}
        assert_close_arrays(outputs["logits"], torch.cat([row[position] for row in expected]))


def student() -> StudentCodec:
    return StudentCodec.from_teacher(build_codec(DAC), {"kind": "spectral", "width": 16, "blocks": [1, 1]})


@pytest.mark.parametrize("make", [student, lambda: build_codec(DAC), lambda: build_codec(ENCODEC)],
                         ids=["student", "dac", "encodec"])  # fmt: skip
def test_decoder_graph_equals_the_codec(make, tmp_path):
    torch.manual_seed(0)
    codec = make().eval()
    decode = Runtime(DecoderGraph(codec), tmp_path / "decoder.onnx")
    for rows, frames in ((1, 1), (2, 3), (1, 40)):
        codes = torch.randint(V, (rows, codec.n_codebooks, frames))
        wav = decode(codes=codes)["wav"]
        assert wav.shape == (rows, 1, frames * codec.hop_length)
        np.testing.assert_allclose(wav, codec.decode(codes).numpy(), atol=3e-6)


def test_encoder_graph_equals_t5(tmp_path):
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4))
    encode = Runtime(EncoderGraph(TextEncoder("t5", model, None, "", 128)), tmp_path / "encoder.onnx")
    for rows, length in ((1, 1), (3, 6), (2, 40)):
        ids, mask = torch.randint(40, (rows, length)), torch.ones(rows, length, dtype=torch.int64)
        mask[0, length // 2 + 1 :] = 0
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
        valid = mask.bool()
        assert_close_arrays(encode(input_ids=ids, attention_mask=mask)["text"][valid.numpy()], expected[valid])


SAMPLING = Sampling(temperature=0.9, top_k=100, top_p=0.95, guidance_scale=2.0, min_p=0.001)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A model of one stage with random weights, the embedded codec's first four codebooks and the usual encoder."""
    sizes = {"n_codebooks": 4, "d_model": 64, "n_layers": 2, "d_state": 16, "headdim": 32, "init_std": 0.3}
    settings = config.load("experiment=debug", *(f"model.{key}={value}" for key, value in sizes.items()))
    torch.manual_seed(0)
    model, encoder = build_model(settings.model), load_text_encoder("minilm")
    data = {"codec": {"name": "tiny", "fingerprint": load_codec().fingerprint}, "licences": {"CC0-1.0": 1},
            "text": {"name": "minilm", "fingerprint": encoder.fingerprint}}  # fmt: skip
    folder = tmp_path_factory.mktemp("small") / "one_stage"
    card = {"name": "one_stage", "task": "lm", "data": data, "sampling": asdict(SAMPLING)}
    write_model_folder(folder, model.state_dict(), settings, card)
    return folder


@pytest.fixture(scope="module")
def folder(small_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("onnx") / "tiny"
    assert main(["onnx", str(small_model), str(out)]) == 0
    return out


def test_onnx_folder_has_files_and_metadata(folder, small_model):
    files = {"text_encoder.onnx", "condition.onnx", "step.onnx", "codec_decoder.onnx", "tokenizer.json", "system.json"}
    assert {path.name for path in folder.iterdir()} == files
    system = json.loads((folder / "system.json").read_text())
    pipe = MusicPipeline.from_pretrained(small_model)
    assert system["metadata"]["model"] == pipe.metadata["model"]
    assert set(system["card"]["data"]["licences"]) == {"CC0-1.0"}
    assert system["sample_rate"] == 24000 and system["sampling"] == asdict(SAMPLING)
    assert system["states"]["block1.branch0.ssm_state"] == {"shape": ["batch", 4, 32, 16], "dtype": "float32"}


def test_onnx_embedded_encoder_and_codec_equal_torch(folder):
    from tokenizers import Tokenizer

    encoder, codec = load_text_encoder("minilm"), load_codec("tiny", 4)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    session = onnxruntime.InferenceSession(folder / "text_encoder.onnx")
    for caption in ("a slow waltz on a flute", "", "медленный вальс 🎻", "word " * 200):
        ids = np.array([tokenizer.encode(caption).ids])
        (text,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        np.testing.assert_allclose(text, encoder.encode([caption]).embeddings.numpy(), rtol=1e-3, atol=1e-5)
    session = onnxruntime.InferenceSession(folder / "codec_decoder.onnx")
    for n_frames in (3, 30):
        codes = torch.randint(1024, (1, codec.n_codebooks, n_frames))
        (wav,) = session.run(None, {"codes": codes.numpy()})
        np.testing.assert_allclose(wav, codec.decode(codes).numpy(), atol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"top_k": 1}, {"top_k": 1, "guidance_scale": 1.0}, {"top_p": 1e-9}, {"min_p": 0.9999}]
)
def test_onnx_example_gives_the_pipelines_audio_without_torch(folder, small_model, settings, tmp_path):
    """With one code left sampling is deterministic."""
    prompt, out = "a slow waltz on a flute", tmp_path / "x.wav"
    block = "import runpy, sys; sys.modules.update(dict.fromkeys(['torch', 'ssmttm', 'transformers']))"
    code = f"{block}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [str(folder), prompt, "--duration", "1.23", "--out", str(out)]
    arguments += [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    subprocess.run([sys.executable, "-c", code, str(EXAMPLE), *arguments], check=True)
    pipe = MusicPipeline.from_pretrained(small_model, device="cpu")
    expected = pipe(prompt, duration=1.23, **settings)
    wav, rate = soundfile.read(out)
    assert rate == 24000 and wav.shape == expected.audios[0, 0].shape
    np.testing.assert_allclose(wav, expected.audios[0, 0].clamp(-1, 1).numpy(), atol=1e-4)


def test_onnx_example_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 69


def test_onnx_export_errors(folder, small_model, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="two stages"):
        export_onnx("tiny_lm", tmp_path / "two")
    with pytest.raises(UserError, match="already"):
        export_onnx(small_model, folder)
    monkeypatch.setattr(ModelFolder, "null_condition", "unmasked_padding")
    with pytest.raises(UserError, match="'unmasked_padding'"):
        export_onnx(small_model, tmp_path / "other")
    monkeypatch.setattr(write, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"ssmttm\[export\]"):
        export_onnx(small_model, tmp_path / "other")
    assert not list(tmp_path.iterdir())
