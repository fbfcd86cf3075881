"""Fixed outputs of the embedded models and of the codecs: no change of the code may change them.

They are in fixed_outputs.json. Float values are compared to 1e-3 on every processor. Matrix libraries round differently
on other processors, and one code that is sampled differently changes all later ones, so hashes are compared only on the
processors recorded there. New weights in ssmttm/assets have new outputs, which this command records:

    python tests/test_fixed_outputs.py
"""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from ssmttm import MusicPipeline
from ssmttm.codecs import build_codec, load_codec
from ssmttm.models.latent_denoiser import Conditions

FILE = Path(__file__).with_name("fixed_outputs.json")
PROMPTS = ["a slow waltz in D minor on a music box", "fast energetic drum and bass"]
MODELS = ("tiny_lm", "tinyttm_tiny")
CODECS = {
    "tiny": "tiny",
    "dac": {"kind": "dac", "sampling_rate": 16000, "encoder_hidden_size": 8, "downsampling_ratios": [4],
            "upsampling_ratios": [4], "decoder_hidden_size": 16, "n_codebooks": 3, "codebook_size": 32,
            "codebook_dim": 4, "hidden_size": 32},
    "encodec": {"kind": "encodec", "sampling_rate": 16000, "upsampling_ratios": [4], "num_filters": 4,
                "hidden_size": 16, "codebook_size": 32, "codebook_dim": 16, "target_bandwidths": [60.0],
                "num_lstm_layers": 2},
    "mimi": {"kind": "mimi", "hidden_size": 32, "num_filters": 4, "codebook_size": 32, "codebook_dim": 16,
             "num_quantizers": 4, "vector_quantization_hidden_dimension": 16, "num_hidden_layers": 2,
             "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "upsample_groups": 32,
             "sliding_window": 20},
}  # fmt: skip
WEIGHT_SCALES = {"dac": 3, "encodec": 5, "mimi": 3}  # audible output without saturation


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def processor():
    """Instruction set that torch uses, and the vendor of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    vendor = re.search(r"vendor_id\s*:\s*(\S+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return f"{torch.backends.cpu.get_cpu_capability()} {vendor and vendor[1]}"


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def fixed_codes(n_codebooks, codebook_size, n_frames):
    return (31 * torch.arange(n_codebooks)[:, None] + 17 * torch.arange(n_frames))[None] % codebook_size


def fixed_codec(config):
    """A codec with fixed weights, made without a random generator."""
    codec, scale = build_codec(config), WEIGHT_SCALES[config["kind"]]
    with torch.no_grad():
        for number, (name, tensor) in enumerate([*codec.named_parameters(), *codec.named_buffers()]):
            if ".bias" in name:
                tensor.zero_()
            elif tensor.is_floating_point() and tensor.ndim > 1 and not name.endswith("alpha"):
                values = torch.frac(0.618034 * torch.arange(number + 1, number + 1 + tensor.numel()).double())
                tensor.copy_((scale * (values - 0.5) / tensor[0].numel() ** 0.5).view_as(tensor))
    return codec.eval()


def rounded(tensor):
    return [[round(value, 4) for value in row] for row in tensor.tolist()]


@torch.no_grad()
def model_outputs(name):
    """Float values and hashes of an embedded model."""
    pipe = MusicPipeline.from_pretrained(name, device="cpu")
    config, text = pipe.model.config, pipe.text_encoder.encode(PROMPTS[:1])
    logits = pipe.model(fixed_codes(config.n_codebooks, config.codebook_size, 4), text)  # [1, K, 4, V]
    stage = pipe.second_stage.model
    codes = fixed_codes(pipe.codec.n_codebooks, pipe.codec.codebook_size, 6)
    latents = stage.normalise(pipe.codec.to_latents(codes))  # [1, C', 6]
    coarse, noisy = latents.split([stage.config.coarse_channels, stage.config.noisy_channels], 1)
    denoised = stage(noisy, torch.tensor([0.5]), Conditions(coarse, text))  # [1, C, 6]
    output = pipe(PROMPTS, duration=3.0, seeds=[1, 2], engine="torch")
    assert output.codes.shape == (2, pipe.codec.n_codebooks, 75) and output.audios.shape == (2, 1, 72_000)
    assert output.codes.min() >= 0 and output.codes.max() < pipe.codec.codebook_size
    assert output.audios.isfinite().all() and (output.audios.square().mean((1, 2)).sqrt() > 1e-3).all()
    hashes = {"codes": digest(output.codes), "audio": digest(output.audios)}
    fused = pipe(PROMPTS, duration=3.0, seeds=[1, 2])  # int8 steps round activations otherwise than torch's
    if fused.metadata["engine"]["name"] == "fused":
        hashes["fused codes"] = digest(fused.codes)
    values = {
        "first codebook": rounded(logits[0, 0, :, :3]), "last codebook": rounded(logits[0, -1, :, :3]),
        "second stage": rounded(denoised[0, :3, :4]),
    }  # fmt: skip
    return values, hashes


@torch.no_grad()
def codec_outputs(name):
    """Eight decoded samples and a hash; of a codec that encodes, the codes of frame 10 and a hash of all codes."""
    source = CODECS[name]
    codec = load_codec(source) if isinstance(source, str) else fixed_codec(source)
    wav = codec.decode(fixed_codes(codec.n_codebooks, codec.codebook_size, 12))  # [1, 1, S]
    assert wav.shape == (1, 1, 12 * codec.hop_length) and wav.std() > (0.002 if isinstance(source, str) else 0.04)
    values, hashes = {"decoded": rounded(wav[0, :, :: wav.shape[-1] // 8])}, {"decoded": digest(wav)}
    if name == "tiny":
        time = torch.arange(24_000) / 24_000
        tone = 0.4 * torch.sin(2 * torch.pi * 440 * time) + 0.2 * torch.sin(2 * torch.pi * 1000 * time)
        codes = codec.encode(tone[None, None])  # [1, K, 25]
        values["encoded"] = [[float(code) for code in codes[0, :, 10]]]
        hashes["encoded"] = digest(codes)
    return values, hashes


def assert_recorded(kind, name, found):
    recorded = json.loads(FILE.read_text())
    values, hashes = found
    expected = recorded["values"][kind][name]
    assert values.keys() == expected.keys()
    for key, value in values.items():
        torch.testing.assert_close(torch.tensor(value), torch.tensor(expected[key]), rtol=0, atol=1.1e-3)
    known = recorded["hashes"].get(processor(), {}).get(kind, {}).get(name)
    if known is not None:
        assert hashes.items() <= known.items()


@pytest.mark.parametrize("name", MODELS)
def test_embedded_model_outputs_are_fixed(name):
    assert_recorded("models", name, model_outputs(name))


@pytest.mark.parametrize("name", CODECS)
def test_codec_outputs_are_fixed(name):
    assert_recorded("codecs", name, codec_outputs(name))


def record():
    """Write the outputs of the present weights of ssmttm/assets. Their hashes on other processors are forgotten; what
    the codecs with fixed weights give stays as it is."""
    torch.set_num_threads(1)
    recorded = json.loads(FILE.read_text())
    outputs = {
        "models": {name: model_outputs(name) for name in MODELS},
        "codecs": {name: codec_outputs(name) for name, source in CODECS.items() if isinstance(source, str)},
    }
    for kind, named in outputs.items():
        for name, (values, hashes) in named.items():
            recorded["values"][kind][name] = values
            for by_kind in recorded["hashes"].values():
                by_kind[kind].pop(name, None)
            recorded["hashes"].setdefault(processor(), {"models": {}, "codecs": {}})[kind][name] = hashes
    lists = re.compile(r"\[\s+([^][]*?)\s+\]")  # the innermost ones, each on a line
    FILE.write_text(lists.sub(lambda found: f"[{' '.join(found[1].split())}]", json.dumps(recorded, indent=1)) + "\n")


if __name__ == "__main__":
    record()
