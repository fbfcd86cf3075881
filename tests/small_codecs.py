"""Small codecs of every kind with random weights, and tones to encode."""

import numpy as np
import torch

from ssmttm.codecs import TinyCodec, TinyCodecConfig, build_codec
from ssmttm.codecs.losses import Scale

RATE = 8000
SMALL = TinyCodecConfig(
    sample_rate=RATE, hop_length=320, window=640, n_codebooks=3, codebook_size=32, codebook_dim=4,
    encoder_width=32, encoder_blocks=(1, 1), decoder_width=48, decoder_blocks=(2, 2), decoder_look_ahead=(1, 1),
)  # fmt: skip
SCALES_SMALL = (Scale(1024, 80), Scale(256, 20))
HF_CODECS = {
    "dac": {
        "encoder_hidden_size": 8, "decoder_hidden_size": 64, "downsampling_ratios": [2, 4, 5, 8],
        "sampling_rate": 24000, "n_codebooks": 3, "codebook_size": 64, "codebook_dim": 4, "quantizer_dropout": 0.5,
    },
    "encodec": {
        "num_filters": 4, "upsampling_ratios": [8, 5, 4, 2], "hidden_size": 16, "codebook_size": 32,
        "target_bandwidths": [1.5], "sampling_rate": 24000,
    },
    "mimi": {
        "hidden_size": 32, "num_filters": 4, "codebook_size": 32, "codebook_dim": 16, "num_quantizers": 4,
        "vector_quantization_hidden_dimension": 16, "num_hidden_layers": 2, "intermediate_size": 32,
        "num_attention_heads": 4, "num_key_value_heads": 4, "upsample_groups": 32, "sliding_window": 20,
    },
    "xcodec": {
        "codebook_size": 32, "target_bandwidths": [0.5],
        "acoustic_model_config": {
            "model_type": "dac", "encoder_hidden_size": 4, "decoder_hidden_size": 64, "hidden_size": 16,
        },
        "semantic_model_config": {
            "model_type": "hubert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16, "conv_dim": [8] * 7, "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
    },
}  # fmt: skip


def small_codec(**changes):
    torch.manual_seed(0)
    return TinyCodec(TinyCodecConfig(**{**vars(SMALL), **changes}))


def hf_codec(kind):
    torch.manual_seed(0)
    codec = build_codec({"kind": kind, **HF_CODECS[kind]}).eval()
    for name, buffer in codec.named_buffers():  # transformers starts these codebooks at zero
        if name.endswith(("codebook.embed", "codebook.embed_sum")):
            buffer.normal_()
    return codec


def tones(batch, samples, seed=0):
    rng = np.random.default_rng(seed)
    time = np.arange(samples) / RATE
    notes = [220 * 2 ** (rng.integers(0, 24, 3) / 12) for _ in range(batch)]
    waves = [sum(np.sin(2 * np.pi * f * time) for f in chord) * 0.2 * np.exp(-3 * (time % 0.5)) for chord in notes]
    noise = rng.normal(size=(batch, samples)) * 3e-3
    return torch.tensor(np.stack(waves) + noise, dtype=torch.float32)[:, None]  # [B, 1, S]


def build_codec_of(kind):
    return small_codec(codebook_size=256) if kind == "tiny" else hf_codec(kind)
