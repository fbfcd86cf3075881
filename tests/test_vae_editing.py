"""Clips continued, repainted and looped by a model that generates a VAE's latents, in stereo and at another rate than
the codec's. What it has in common with models of codes: tests/test_editing.py."""

import math
from dataclasses import replace

import pytest
import torch
from small_pipelines import small_pipeline
from small_vaes import small_vae

from ssmttm import audio
from ssmttm.errors import UserError
from ssmttm.generation.clip_codes import ClipCodes
from ssmttm.generation.code_generation import second_stage_inputs
from ssmttm.generation.second_stage import SecondStageStream
from ssmttm.models.controls import Controls

ENGINE = {"engine": "torch"}
RATE, HOP = 3600, 144  # of the VAE by patches; the codec has 2,400 Hz and 96
CONTEXT = 11  # frames on either side that the VAE's decoder depends on


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    vae = small_vae(ratios=(4, 3, 6), sample_rate=RATE, channels=2)
    made = small_pipeline(tmp_path_factory.mktemp("pipeline"), two_stages=True, vae=vae)
    assert (made.sample_rate, made.decoder.hop_length) == (RATE, HOP) and max(made.decoder.context) <= CONTEXT
    return made


@pytest.fixture(scope="module")
def clip(pipe):
    """1.6 seconds of two different channels, ending within a frame: [2, S]."""
    return pipe("a harp", duration=1.6, seeds=9, **ENGINE).audios[0, :, :-17]


def rendered(pipe, wav):
    """The clip as the VAE alone renders it, padded at its start to whole frames."""
    n_padding = -wav.shape[-1] % HOP
    padded = torch.nn.functional.pad(wav, (n_padding, 0))[None]
    return pipe.decoder.decode(pipe.decoder.encode(padded))[0, :, n_padding:]


def inputs_of(pipe, seed=3):
    conditions = pipe.text_conditions(pipe.session("drums", **ENGINE).request)
    return second_stage_inputs(conditions, [seed], Controls(), torch.device("cpu"))


# --- encoding


@pytest.mark.parametrize("n_samples", [HOP, HOP + 1, 7 * HOP - 1, 31 * HOP + 70])
def test_clip_is_encoded_by_vae_and_codec_frame_by_frame(pipe, clip, n_samples):
    wav = clip[:, :n_samples]
    found, n_padding = pipe.encode_clip(wav), -n_samples % HOP
    padded = torch.cat([torch.zeros(2, n_padding), wav], 1)
    assert torch.equal(found.codes.full, pipe.decoder.encode(padded[None]))
    of_codec = audio.resample(padded.mean(0, keepdim=True), RATE, 2400)
    assert torch.equal(found.codes.coarse, pipe.codec.encode(of_codec[None]))
    n_frames = math.ceil(n_samples / HOP)
    assert found.codes.coarse.shape == (1, 1, n_frames) and found.codes.n_frames == n_frames
    assert torch.equal(found.wav, wav) and found.n_padding == n_padding


def test_channels_and_rates_are_those_of_the_vae(pipe, clip, tmp_path):
    mono = clip[:1]
    doubled = pipe.encode_clip(torch.cat([mono, mono])).codes
    assert torch.equal(pipe.encode_clip(mono).codes.full, doubled.full)
    assert torch.equal(pipe.encode_clip(mono[0]).codes.coarse, doubled.coarse)
    path = audio.write(tmp_path / "clip.wav", clip.clamp(-1, 1), RATE)
    assert (pipe.encode_clip(path).wav - clip.clamp(-1, 1)).abs().max() < 1e-4  # 16 bit
    faster = audio.resample(clip, RATE, 5512)
    assert abs(pipe.encode_clip((faster, 5512)).n_samples - clip.shape[-1]) <= 1
    mixed = small_pipeline(tmp_path / "mono", two_stages=True, vae=small_vae(ratios=(4, 3, 6), sample_rate=RATE))
    assert torch.equal(mixed.encode_clip(clip).codes.full, mixed.encode_clip(clip.mean(0)).codes.full)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (torch.randn(2, HOP - 1) * 0.1, "the audio of 0.040 s is shorter than a frame of 0.040 s: give more"),
        (torch.randn(3, 5000) * 0.1, "the audio has 3 channels: mix it down to two"),
        (torch.zeros(2, 5000), "holds no music to use: it is silent"),
        (torch.full((2, 500), torch.nan), "NaN"),
    ],
)
def test_clips_that_cannot_be_encoded_are_errors_of_one_line(pipe, source, message):
    for edit in (
        lambda: pipe("drums", duration=1.0, continue_from=source), lambda: pipe.repaint("drums", source, (0.1, 0.5)),
        lambda: pipe.session("drums", continue_from=source), lambda: pipe.audio_to_audio("drums", source),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message) as error:
            edit()
        assert "\n" not in str(error.value)


# --- continuation


def test_continuation_begins_with_the_clip_as_the_vae_renders_it(pipe, clip):
    n = clip.shape[-1]
    out = pipe(["drums", "drums", "drums"], duration=0.9, seeds=[3, 3, 4], continue_from=clip, **ENGINE)
    assert out.audios.shape == (3, 2, n + round(0.9 * RATE))
    kept = slice(0, n - CONTEXT * HOP)
    for wav in out.audios:
        torch.testing.assert_close(wav[:, kept], rendered(pipe, clip)[:, kept], rtol=0, atol=1e-5)
    new = out.audios[..., n:]
    assert torch.equal(new[0], new[1]) and not torch.allclose(new[0], new[2], atol=1e-3)
    assert out.codes.shape[-1] == 40 + 23 and out.codes.is_floating_point()


@pytest.mark.parametrize("chunk_seconds", [0.04, 0.3, 60.0])
def test_streamed_continuation_equals_the_whole_one(pipe, clip, chunk_seconds):
    whole = pipe("drums", duration=1.3, seeds=4, continue_from=clip, **ENGINE).audios[0]
    session = pipe.session("drums", duration=1.3, seed=4, continue_from=clip, chunk_seconds=chunk_seconds, **ENGINE)
    torch.testing.assert_close(torch.cat(list(session), -1), whole, rtol=0, atol=1e-5)


def test_new_frames_depend_on_the_latents_of_the_clip_and_on_its_coarse_codes(pipe, clip):
    codes, later = pipe.encode_clip(clip).codes, torch.randint(0, 16, (1, 1, 9))
    other_latents = replace(codes, full=codes.full.flip(-1))
    other_coarse = replace(codes, coarse=(codes.coarse + 1) % 16)
    made = []
    for given in (codes, codes, other_latents, other_coarse):
        stream = SecondStageStream(pipe.second_stage, inputs_of(pipe), given)
        made.append(ClipCodes.cat([*stream.push(later), stream.finish()]))
    assert made[0].n_frames == 9 and torch.equal(made[0].coarse, later)
    assert torch.equal(made[0].full, made[1].full)
    assert not torch.allclose(made[0].full, made[2].full, atol=1e-3)
    assert not torch.allclose(made[0].full, made[3].full, atol=1e-3)


# --- a region, the whole, a loop


def test_repaint_keeps_the_samples_and_the_latents_around_the_region(pipe, clip):
    out = pipe.repaint("drums", clip, (0.61, 0.99), candidates=2, **ENGINE)
    wav, codes = out.audios[0], pipe.encode_clip(clip).codes.full
    n_padding = -clip.shape[-1] % HOP
    assert wav.shape == clip.shape
    changed = (wav != clip).any(0).nonzero()[:, 0]
    assert (15 - 2) * HOP - n_padding <= changed[0] and changed[-1] < (25 + 2) * HOP - n_padding  # two frames are mixed
    region = slice(round(0.65 * RATE), round(0.95 * RATE))
    decoded = pipe.decoder.decode(out.codes)[0, :, n_padding:]
    assert torch.equal(wav[:, region], decoded[:, region])
    assert torch.equal(out.codes[..., :15], codes[..., :15]) and torch.equal(out.codes[..., 25:], codes[..., 25:])
    seed = out.metadata["repaint"]["seed"]
    again = pipe.repaint("drums", clip, (0.61, 0.99), candidates=1, seed=seed, **ENGINE)
    other = pipe.repaint("drums", clip, (0.61, 0.99), candidates=1, seed=seed + 5, **ENGINE)
    assert torch.equal(again.audios, out.audios)
    assert not torch.allclose(other.audios[0, :, region], wav[:, region], atol=1e-3)


@pytest.mark.parametrize("frames", [(10, 30), (0, 30), (10, 40), (0, 40)])
def test_regenerated_frames_know_the_latents_on_both_sides(pipe, clip, frames):
    """Of more than one window: from its first frame to its last it depends on both."""
    codes, (start, stop) = pipe.encode_clip(clip).codes, frames
    made = pipe.second_stage.regenerate(codes, frames, inputs_of(pipe))
    outside = torch.ones(40, dtype=torch.bool)
    outside[start:stop] = False
    assert torch.equal(made.coarse, codes.coarse)
    assert torch.equal(made.full[..., outside], codes.full[..., outside])
    assert not torch.allclose(made.full[..., start:stop], codes.full[..., start:stop], atol=1e-3)
    for side in (slice(start - 4, start), slice(stop, stop + 4)):
        if side.start < 0 or side.start == 40:
            continue
        changed = codes.full.clone()
        changed[..., side] += 1
        other = pipe.second_stage.regenerate(replace(codes, full=changed), frames, inputs_of(pipe)).full
        nearest = start if side.start < start else stop - 1
        assert not torch.allclose(other[..., nearest], made.full[..., nearest], atol=1e-3)


def test_audio_to_audio_keeps_less_of_the_latents_with_strength(pipe, clip):
    codes, distances = pipe.encode_clip(clip).codes.full, []
    for strength in (0.34, 0.67, 1.0):
        out = pipe.audio_to_audio("drums", clip, strength)
        assert out.audios.shape == (1, *clip.shape) and out.codes.shape == codes.shape
        distances.append((out.codes - codes).square().mean())
    assert distances[0] < distances[1] < distances[2]


def test_loops_join_in_both_channels_alone_and_in_a_batch(pipe):
    both = pipe(["a harp", "drums"], duration=4.0, seeds=[2, 3], loop=True, **ENGINE)
    alone = pipe("drums", duration=4.0, seeds=3, loop=True, **ENGINE)
    assert both.audios.shape == (2, 2, 4 * RATE) and torch.equal(both.audios[1], alone.audios[0])
    twice = pipe.decoder.decode(torch.cat([alone.codes] * 2, -1))[0, :, 2 * RATE : 6 * RATE]
    torch.testing.assert_close(torch.cat([alone.audios[0]] * 2, -1)[:, 2 * RATE : 6 * RATE], twice, rtol=0, atol=1e-5)
    plain = pipe("drums", duration=4.0, seeds=3, **ENGINE).codes
    assert torch.equal(plain[..., :50], alone.codes[..., :50])
    assert not torch.allclose(plain[..., 50:], alone.codes[..., 50:], atol=1e-3)


# --- saved states


@pytest.mark.parametrize("n_chunks", [0, 1, 2])
def test_state_of_a_continuing_stream_goes_on_as_it_does(pipe, clip, tmp_path, n_chunks):
    """Before the clip is returned, within the stream, and after a window of the second stage."""
    session = pipe.session("drums", seed=5, continue_from=clip, chunk_seconds=0.4, **ENGINE)
    for _ in range(n_chunks):
        session.next_chunk()
    path = pipe.save_state(tmp_path / "state", session)
    expected = [session.next_chunk() for _ in range(3)]
    restored = pipe.resume(pipe.load_state(path))
    for chunk in expected:
        assert torch.equal(restored.next_chunk(), chunk)


@pytest.mark.parametrize("options", [{}, {"continue_from": True}, {"loop": True, "duration": 4.0}])
def test_state_after_a_call_goes_on_from_its_end(pipe, clip, tmp_path, options):
    """Both stages go on from the codes that the call made, not from its audio encoded again."""
    if "continue_from" in options:
        options = options | {"continue_from": clip}
    out = pipe("drums", seeds=5, **({"duration": 1.0} | options), **ENGINE)
    restored = pipe.resume(pipe.load_state(pipe.save_state(tmp_path / "state")))
    generator = restored.generator
    assert torch.equal(generator._ready[0].full, out.codes)
    assert torch.equal(generator.second_stage.known, out.codes[..., -4:])
    assert torch.equal(generator.second_stage.coarse_codes, generator._ready[0].coarse[..., -4:])
    following = restored.clone().generator
    codes = ClipCodes.cat([following.next_codes(13) for _ in range(4)])
    expected = pipe.decoder.decode(codes.full)[0, :, out.codes.shape[-1] * HOP :]
    chunk = restored.next_chunk()
    torch.testing.assert_close(chunk, expected[:, : chunk.shape[-1]], rtol=0, atol=1e-5)


# --- the codes of both stages


def test_clip_codes_are_cut_and_joined_together():
    codes = ClipCodes(torch.arange(12).view(2, 1, 6), torch.arange(36.0).view(2, 3, 6))
    assert torch.equal(ClipCodes.cat([codes.frames(0, 2), codes.frames(2)]).full, codes.full)
    assert torch.equal(ClipCodes.cat(codes.items(), dim=0).coarse, codes.coarse)
    last = codes.frames(-2)
    assert last.n_frames == 2 and torch.equal(last.coarse, codes.coarse[..., 4:])
    assert codes.items()[0].expand(3).full.shape == (3, 3, 6)
