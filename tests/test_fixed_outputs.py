"""Fixed outputs of the embedded models and of the codecs: no change of the code may change them.

Float values are compared to 1e-3 on every processor. Matrix libraries round differently on other processors, and one
code that is sampled differently changes all later ones, so hashes are compared only on the processors recorded here.
"""

import hashlib
import re
from pathlib import Path

import pytest
import torch

from ssmttm import MusicPipeline
from ssmttm.codecs import build_codec, load_codec
from ssmttm.generation.loading import ASSETS
from ssmttm.models.latent_denoiser import Conditions

PROMPTS = ["a slow waltz in D minor on a music box", "fast energetic drum and bass"]
AUDIO_HASHES = {  # by processor and model: of codes and of audio
    ("AVX512", "GenuineIntel"): {
        "tiny_lm": ("9309de37e1282407", "2433a9505b9a0adf"),
        "tiny_two_stage": ("542cacb9b678f5af", "814bd31817c3c4a7"),
        "tinyttm_tiny": ("e62aba714c9db290", "6d29d8ba34f9007d"),
    }
}
# Of codes, where they are not torch's: its int8 step rounds activations to bfloat16, the fused one to 15 bits.
FUSED_HASHES = {"tinyttm_tiny": "11363a531429ac51"}
DECODED_HASHES = {  # by processor and codec
    ("AVX512", "GenuineIntel"): {
        "tiny": "30737a7b9dc6d48e",
        "tinyttm_tiny": "13f22e1910584aee",
        "dac": "cec3233b1b3e7341",
        "encodec": "df33c8431e4dc996",
        "mimi": "c4055c6255dadd28",
    }
}
ENCODED_HASHES = {("AVX512", "GenuineIntel"): "c3a0601a69e39a58"}
LOGITS = {  # of the first four positions and three codes, in the first and the last codebook
    "tiny_lm": (
        [[3.0213, -1.5615, 1.1712], [1.331, -0.3912, -1.4828], [2.2941, -1.4873, 1.2485], [-0.1434, -6.321, -3.1962]],
        [[-2.9721, 0.153, -1.361], [-1.3006, -3.3227, 5.5419], [4.3725, -3.3821, -7.0581], [-6.0538, 3.9025, 12.4985]],
    ),
    "tiny_two_stage": (
        [[1.5579, 0.9417, 1.0217], [0.3528, -0.0832, -1.4809], [0.8026, -2.0084, -0.6896], [0.7467, -1.4402, 0.0744]],
        [[1.5579, 0.9417, 1.0217], [0.3528, -0.0832, -1.4809], [0.8026, -2.0084, -0.6896], [0.7467, -1.4402, 0.0744]],
    ),
    "tinyttm_tiny": (
        [[2.3642, -0.1194, 4.5504], [0.0836, 3.3673, 3.4488], [1.6809, -1.4756, 3.682], [-0.5064, -6.1797, -0.2716]],
        [[-2.5305, -2.0483, 5.1413], [-3.1732, -3.622, 11.9805], [1.8407, 0.5748, -5.5185], [-7.0014, 1.4886, 2.2298]],
    ),
}
DENOISER_OUTPUT = [  # of the first three channels and four frames
    [-0.3748, 0.9917, 0.7174, 1.2025], [-0.1792, -0.2544, -0.5991, -0.2928], [0.6855, 0.2474, -0.3642, -0.3921],
]  # fmt: skip
DECODED = {  # eight samples
    "tiny": [-0.0789, 0.0407, 0.0342, -0.0112, 0.0123, 0.0206, -0.028, -0.1235],
    "tinyttm_tiny": [-0.0587, 0.0055, 0.0493, -0.0061, 0.0213, 0.0256, 0.0029, -0.1612],
    "dac": [0.0408, 0.0795, 0.2434, -0.0848, 0.3511, -0.0853, 0.07, 0.0009],
    "encodec": [0.0922, 0.0074, 0.0964, 0.0074, 0.0098, 0.0371, -0.054, 0.014],
    "mimi": [-0.001, 0.0569, -0.0668, -0.0525, 0.0721, 0.0535, -0.0014, 0.0385],
}
ENCODED_FRAME = [369, 132, 950, 817, 517, 728, 966, 252]  # the codes of frame 10
CODECS = {
    "tiny": "tiny",
    "tinyttm_tiny": str(ASSETS / "tinyttm_tiny" / "codec"),
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
    return torch.backends.cpu.get_cpu_capability(), vendor and vendor[1]


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


def assert_values(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["tiny_lm", "tiny_two_stage", "tinyttm_tiny"])
def test_embedded_model_outputs_are_fixed(name):
    pipe = MusicPipeline.from_pretrained(name, device="cpu")
    config = pipe.model.config
    codes = fixed_codes(config.n_codebooks, config.codebook_size, 4)
    with torch.no_grad():
        logits = pipe.model(codes, pipe.text_encoder.encode(PROMPTS[:1]))  # [1, K, 4, V]
    assert_values(logits[0, 0, :, :3], LOGITS[name][0])
    assert_values(logits[0, -1, :, :3], LOGITS[name][1])
    output = pipe(PROMPTS, duration=3.0, seeds=[1, 2], engine="torch")
    assert output.codes.shape == (2, 8, 75) and output.audios.shape == (2, 1, 72_000)
    assert output.codes.min() >= 0 and output.codes.max() < pipe.codec.codebook_size
    assert output.audios.isfinite().all() and (output.audios.square().mean((1, 2)).sqrt() > 1e-3).all()
    if processor() in AUDIO_HASHES:
        assert (digest(output.codes), digest(output.audios)) == AUDIO_HASHES[processor()][name]
        fused = pipe(PROMPTS, duration=3.0, seeds=[1, 2])
        if fused.metadata["engine"]["name"] == "fused":
            assert digest(fused.codes) == FUSED_HASHES.get(name, AUDIO_HASHES[processor()][name][0])


def test_embedded_denoiser_output_is_fixed():
    pipe = MusicPipeline.from_pretrained("tiny_two_stage", device="cpu")
    model, text = pipe.second_stage.model, pipe.text_encoder.encode(PROMPTS[:1])
    codes = fixed_codes(pipe.codec.n_codebooks, pipe.codec.codebook_size, 6)
    latents = model.normalise(pipe.codec.to_latents(codes))  # [1, C', 6]
    coarse, noisy = latents.split([model.config.coarse_channels, model.config.noisy_channels], 1)
    with torch.no_grad():
        output = model(noisy, torch.tensor([0.5]), Conditions(coarse, text))  # [1, C, 6]
    assert_values(output[0, :3, :4], DENOISER_OUTPUT)


@pytest.mark.parametrize("name", CODECS)
def test_codec_outputs_are_fixed(name):
    source = CODECS[name]
    codec = load_codec(source) if isinstance(source, str) else fixed_codec(source)
    codes = fixed_codes(codec.n_codebooks, codec.codebook_size, 12)
    with torch.no_grad():
        wav = codec.decode(codes)  # [1, 1, S]
    assert wav.shape == (1, 1, 12 * codec.hop_length) and wav.std() > 0.04
    assert_values(wav[0, 0, :: wav.shape[-1] // 8], DECODED[name])
    if processor() in DECODED_HASHES:
        assert digest(wav) == DECODED_HASHES[processor()][name]


def test_embedded_codec_codes_are_fixed():
    codec, time = load_codec("tiny"), torch.arange(24_000) / 24_000
    wav = 0.4 * torch.sin(2 * torch.pi * 440 * time) + 0.2 * torch.sin(2 * torch.pi * 1000 * time)
    codes = codec.encode(wav[None, None])
    assert codes.shape == (1, 8, 25) and codes[0, :, 10].tolist() == ENCODED_FRAME
    if processor() in ENCODED_HASHES:
        assert digest(codes) == ENCODED_HASHES[processor()]
