"""Codecs of two channels: order, levels, latents, streaming, names, errors; the models that use them."""

import pytest
import torch
from small_codecs import hf_codec
from small_pipelines import small_pipeline
from small_stores import small_codec, write_audio_store

from ssmttm.codecs import ChannelwiseCodec, build_codec, load_codec
from ssmttm.codecs.base import Codec
from ssmttm.errors import UserError

ENCODEC_STEREO = {
    "num_filters": 4, "upsampling_ratios": [5, 2], "hidden_size": 16, "codebook_size": 64, "codebook_dim": 16,
    "target_bandwidths": [7.2], "sampling_rate": 4000, "audio_channels": 2, "normalize": True, "chunk_length_s": 0.1,
    "overlap": 2 / 40, "norm_type": "time_group_norm", "use_causal_conv": False,
}  # fmt: skip


class Pcm(Codec):
    """Samples of 8 bits as codes, so that all errors are those of what is around it."""

    name, sample_rate, hop_length, n_codebooks, codebook_size = "pcm", 800, 4, 4, 256
    context, similarity = (0, 0), "euclidean"

    def __init__(self) -> None:
        super().__init__()
        self.books = torch.nn.Parameter(((torch.arange(256) - 128) / 128).repeat(4, 1)[..., None])

    def codebook_vectors(self) -> torch.Tensor:
        return self.books.detach()

    def _encode(self, wav: torch.Tensor) -> torch.Tensor:
        return (wav * 128 + 128).round().long().clamp(0, 255)[:, 0].unflatten(-1, (-1, 4)).mT

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        samples = torch.zeros(len(codes), 4, codes.shape[-1])
        samples[:, : codes.shape[1]] = (codes - 128) / 128
        return samples.mT.flatten(1)[:, None]


def encodec_stereo() -> Codec:
    torch.manual_seed(0)
    codec = build_codec({"kind": "encodec", **ENCODEC_STEREO}).eval()
    for name, buffer in codec.named_buffers():
        if name.endswith("codebook.embed"):
            buffer.normal_()
    return codec


def level(wav: torch.Tensor) -> float:
    return float(20 * wav.square().mean().sqrt().clamp_min(1e-9).log10())


@pytest.mark.parametrize("coding", ["left_right", "mid_side"])
@pytest.mark.parametrize("gains", [(1, 0), (0, 1), (1, -1), (1, 1), (1, 0.5)])
def test_channelwise_codec_keeps_order_and_levels(coding, gains):
    codec = ChannelwiseCodec(Pcm(), coding, "x")
    assert codec.channels == 2 and codec.n_codebooks == 8
    signal = 0.5 * torch.sin(torch.arange(400) * 0.3)
    wav = torch.stack([gain * signal for gain in gains])[None]
    decoded = codec.decode(codec.encode(wav))
    assert decoded.shape == wav.shape
    for channel, original in zip(decoded[0], wav[0], strict=True):
        if original.any():
            assert abs(level(channel) - level(original)) < 0.1
        else:
            assert level(channel) < -40


def test_channelwise_codebooks_alternate_and_the_first_are_a_lower_rate_of_both():
    mono = hf_codec("dac")
    codec = ChannelwiseCodec(mono, "left_right", "x").eval()
    wav = torch.randn(2, 2, 3000) * 0.1
    codes = codec.encode(wav)
    left, right = mono.encode(wav[:, :1]), mono.encode(wav[:, 1:])
    assert torch.equal(codes[:, 0::2], left) and torch.equal(codes[:, 1::2], right)
    decoded = codec.decode(codes)
    assert torch.equal(decoded[:, :1], mono.decode(left)) and torch.equal(decoded[:, 1:], mono.decode(right))
    assert torch.equal(codec.from_latents(codec.to_latents(codes)), codes)
    streamed = torch.cat(list(codec.decode_stream(codes.split(3, dim=-1))), dim=-1)
    torch.testing.assert_close(streamed, decoded, atol=1e-5, rtol=1e-5)
    codec.keep_codebooks(3)
    assert torch.equal(codec.encode(wav), codes[:, :3]) and codec.decode(codes[:, :3]).shape == decoded.shape
    with pytest.raises(UserError, match="at least 2"):
        codec.keep_codebooks(1)


def test_channelwise_codec_is_loaded_by_name_and_differs_by_coding(tmp_path):
    mono = small_codec(tmp_path / "mono")
    both = [load_codec(f"{coding}:{tmp_path / 'mono'}") for coding in ("left_right", "mid_side")]
    assert len({both[0].fingerprint, both[1].fingerprint, mono.fingerprint}) == 3
    again = load_codec(both[0].name)
    assert again.fingerprint == both[0].fingerprint and again.n_codebooks == 2 * mono.n_codebooks
    assert load_codec(both[1].name, 3).n_codebooks == 3
    with pytest.raises(UserError, match="stereo codec already"):
        load_codec(f"mid_side:{both[0].name}")
    with pytest.raises(UserError, match="no such folder"):
        load_codec("mid_side:nowhere")


def test_encode_refuses_other_channels_and_nan_latents(tmp_path):
    mono = small_codec(tmp_path / "mono")
    stereo = load_codec(f"left_right:{tmp_path / 'mono'}")
    with pytest.raises(UserError, match=r"takes a stereo waveform \[batch, 2, samples\], got \[1, 1, 9\]"):
        stereo.encode(torch.zeros(1, 1, 9))
    with pytest.raises(UserError, match=r"takes a mono waveform \[batch, 1, samples\], got \[1, 2, 9\]"):
        mono.encode(torch.zeros(1, 2, 9))
    with pytest.raises(UserError, match="is stereo, and the audio is mono: prepare it with --channels 2"):
        stereo.check_channels(1, "a store")
    latents = torch.zeros(1, stereo.latent_channels, 3)
    latents[0, 0, 1] = float("nan")
    with pytest.raises(UserError, match="latents contain NaN"):
        stereo.from_latents(latents)


@pytest.mark.parametrize("n_frames", [1, 39, 40, 41, 78, 79, 113])
def test_stereo_encodec_equals_transformers_by_chunk(n_frames):
    """Chunks of 40 frames that overlap by 2: the same codes, levels to 0.05 dB of a step, the same cross-fades."""
    codec = encodec_stereo()
    hop, model = codec.hop_length, codec.model
    assert codec.channels == 2 and codec.n_codebooks == 1 + model.config.num_quantizers
    wav = torch.randn(2, 2, n_frames * hop) * torch.tensor([0.1, 0.02])[:, None, None]
    codes = codec.encode(wav)
    assert codes.shape == (2, codec.n_codebooks, n_frames)
    with torch.no_grad():
        theirs = model.encode(wav, bandwidth=7.2)
    starts = [start for start in range(0, n_frames, 38) if start == 0 or n_frames - start > 2]
    for start, own, scale in zip(starts, theirs.audio_codes, theirs.audio_scales, strict=False):
        kept = min(38 if start + 40 < n_frames else 40, n_frames - start)
        assert torch.equal(codes[:, 1:, start : start + kept], own[..., :kept])
        found = codec._level(codes[:, 0, start])
        assert float((20 * (found / scale[:, 0]).log10()).abs().max()) < 102.4 / 64 / 2 + 1e-3
    chunks = [codes[:, 1:, start : start + 40] for start in starts]
    padding = chunks[0].shape[-1] - chunks[-1].shape[-1]
    chunks[-1] = torch.nn.functional.pad(chunks[-1], (0, padding))
    scales = [codec._level(codes[:, 0, start])[:, None] for start in starts]
    with torch.no_grad():
        expected = model.decode(torch.stack(chunks), scales, last_frame_pad_length=padding).audio_values
    decoded = codec.decode(codes)
    assert decoded.shape == wav.shape
    torch.testing.assert_close(decoded, expected[..., : wav.shape[-1]])


def test_stereo_encodec_levels_follow_the_input_and_latents_convert_back():
    codec = encodec_stereo()
    wav = torch.randn(1, 2, 60 * codec.hop_length) * 0.05
    quiet, loud = codec.encode(wav), codec.encode(4 * wav)
    assert torch.equal(quiet[:, 1:], loud[:, 1:])
    ratio = level(codec.decode(loud)) - level(codec.decode(quiet))
    assert ratio == pytest.approx(12.04, abs=102.4 / 64)
    assert torch.equal(codec.from_latents(codec.to_latents(quiet)), quiet)
    with pytest.raises(UserError, match="codes levels first"):
        codec.keep_codebooks(1)
    codes = codec.keep_codebooks(2).encode(wav)
    assert torch.equal(codes, quiet[:, :2]) and codec.decode(codes).shape == wav.shape


def test_stereo_pipeline_gives_two_channels_whole_streamed_and_edited(tmp_path):
    pipe = small_pipeline(tmp_path)
    coded = load_codec(f"left_right:{tmp_path / 'codec'}", pipe.codec.n_codebooks)
    pipe.codec = coded.eval()
    out = pipe(["a drum", "a flute"], duration=1.2, seeds=[1, 2])
    assert out.audios.shape == (2, 2, round(1.2 * pipe.sample_rate))
    session = pipe.session("a drum", duration=1.2, seed=1, chunk_seconds=0.3)
    assert session.channels == 2
    torch.testing.assert_close(torch.cat(list(session), -1), out.audios[0], atol=1e-5, rtol=1e-5)
    clip = out.audios[0]
    continued = pipe("a drum", duration=0.4, continue_from=clip).audios
    assert continued.shape[1] == 2
    mono = pipe("a drum", duration=0.4, continue_from=clip[:1]).audios
    assert mono.shape[1] == 2
    with pytest.raises(UserError, match="has 6 channels: mix it down to two"):
        pipe("a drum", duration=0.4, continue_from=clip[:1].expand(6, -1))
    edited = pipe.repaint("a flute", clip, (0.4, 0.8), candidates=1).audios[0]
    assert edited.shape == clip.shape
    torch.testing.assert_close(edited[:, :100], clip[:, :100])


def test_mono_codec_training_refuses_a_stereo_store(tmp_path):
    from small_stores import codec_config

    from ssmttm.data import open_store
    from ssmttm.training.tasks.codec import CodecTask

    path = write_audio_store(tmp_path / "store", segments=4, seconds=0.5)
    info = (path / "store.json").read_text()
    (path / "store.json").write_text(info.replace('"channels": 1', '"channels": 2'))
    assert open_store(path).channels == 2
    with pytest.raises(UserError, match="store: codec tiny is mono, and the audio has 2 channels"):
        CodecTask(codec_config(path, tmp_path / "run"))
