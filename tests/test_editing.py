"""Music from music: continuation of a clip, a region generated again, audio-to-audio, loops, schedules, bars."""

from dataclasses import replace

import pytest
import torch
from small_pipelines import small_pipeline
from small_vaes import small_vae

from ssmttm import audio
from ssmttm.errors import UserError
from ssmttm.generation.clip_codes import ClipCodes
from ssmttm.generation.editing.loop import decode_loop
from ssmttm.generation.editing.repaint import known_around, mix_region, score_following
from ssmttm.generation.request import MAX_SEED
from ssmttm.models.controls import Controls

ENGINE = {"engine": "torch"}
HOP, RATE = 96, 2400


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    return {
        "one": small_pipeline(folder / "one"),
        "flatten": small_pipeline(folder / "flatten", "flatten"),
        "coarse_first": small_pipeline(folder / "coarse", "coarse_first"),
        "two": small_pipeline(folder / "two", two_stages=True),
        "vae": small_pipeline(folder / "vae", two_stages=True, vae=small_vae(ratios=(4, 4, 3))),
    }


@pytest.fixture(scope="module")
def pipe(pipes):
    return pipes["one"]


@pytest.fixture(scope="module")
def clip(pipe):
    """A little less than two seconds, ending within a frame: [1, S]."""
    return pipe("a harp", duration=2.0, seeds=9, **ENGINE).audios[0, :, : 2 * RATE - 17]


kinds = pytest.mark.parametrize("kind", ["one", "flatten", "coarse_first", "two", "vae"])


def mean_flux(wav):
    """Mean change of the log magnitude from each frame of the codec to the next, [1, S] -> [T - 1]."""
    frames = wav[0].unfold(0, 2 * HOP, HOP) * torch.hann_window(2 * HOP)
    return torch.log1p(100 * torch.fft.rfft(frames).abs()).diff(dim=0).abs().mean(1)


# --- continuation


@kinds
def test_continuation_is_the_clip_and_then_new_music(pipes, kind, clip):
    pipe, n = pipes[kind], clip.shape[-1]
    out = pipe(["drums", "drums"], duration=0.8, seeds=[3, 4], continue_from=clip, **ENGINE)
    assert out.audios.shape == (2, 1, n + round(0.8 * RATE))
    encoded = pipe.encode_clip(clip)
    assert torch.equal(out.codes[:, :, :50], encoded.codes.full.expand(2, -1, -1))
    rendered = pipe.decoder.decode(encoded.codes.full)[0, :, encoded.n_padding :]
    before_seam = slice(0, n - pipe.decoder.context[1] * HOP)
    torch.testing.assert_close(out.audios[0, :, before_seam], rendered[:, before_seam], rtol=0, atol=1e-5)
    assert not torch.equal(out.codes[0, :, 50:], out.codes[1, :, 50:])
    alone = pipe("drums", duration=0.8, seeds=4, continue_from=clip, **ENGINE)
    assert torch.equal(alone.codes[0], out.codes[1])
    other = pipe("drums", duration=0.8, seeds=4, continue_from=clip.flip(1), **ENGINE)
    assert not torch.equal(other.codes[0, :, 50:], alone.codes[0, :, 50:])
    session = pipe.session("drums", duration=0.8, seed=4, continue_from=clip, **ENGINE)
    torch.testing.assert_close(torch.cat(list(session), -1), alone.audios[0], rtol=0, atol=1e-5)


def test_seam_of_a_continuation_is_no_change_beyond_those_of_the_codec(pipe, clip):
    """Were the clip padded with silence to a whole frame, it would be one."""
    seams, others = [], []
    for seed in range(3):
        wav = pipe("drums", duration=1.0, seeds=seed, continue_from=clip, **ENGINE).audios[0]
        flux, seam = mean_flux(wav), clip.shape[-1] // HOP
        seams.append(flux[seam - 2 : seam + 2].max())
        others.append(torch.cat([flux[2 : seam - 2], flux[seam + 2 :]]))
    assert max(seams) <= torch.cat(others).max()


def test_last_frame_of_a_clip_ends_with_it(pipe):
    """Silence within the last frame would be heard at the seam."""
    wav = pipe("a harp", duration=3.0, seeds=2, **ENGINE).audios[0]
    cut = pipe.encode_clip(wav[:, 30 : 50 * HOP])
    assert cut.n_padding == 30 and torch.equal(
        cut.codes.full[..., 8:], pipe.encode_clip(wav[:, : 50 * HOP]).codes.full[..., 8:]
    )


def test_clips_of_any_rate_channels_and_length_and_files(pipe, clip, tmp_path):
    path = audio.write(tmp_path / "clip.wav", clip.clamp(-1, 1), RATE)
    stereo = torch.cat([clip, clip])
    same = [clip, clip[0], (clip, RATE), stereo, path, str(path)]
    codes = [pipe.encode_clip(source) for source in same]
    for found in codes[:4]:
        assert torch.equal(found.codes.full, codes[0].codes.full)
    for found in codes[4:]:  # 16 bit
        differs = found.codes.full != codes[0].codes.full
        assert found.n_samples == codes[0].n_samples and differs.float().mean() < 0.1
    faster = audio.resample(clip, RATE, 5512)
    assert abs(pipe.encode_clip((faster, 5512)).n_samples - clip.shape[-1]) <= 1
    for n in (HOP, HOP + 1, 5 * HOP - 1):
        found = pipe.encode_clip(clip[:, :n])
        assert (found.codes.n_frames, found.n_padding) == (-(-n // HOP), -n % HOP)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (torch.zeros(1, 5000), "holds no music to use: it is silent"),
        (torch.full((1, 5000), 0.3), "constant"),
        (torch.randn(1, HOP - 1) * 0.1, "shorter than a frame of 0.040 s"),
        (torch.zeros(1, 0), "no samples"),
        (torch.full((1, 500), torch.nan), "NaN"),
        (torch.zeros(1, 500, dtype=torch.int16), "audio must be float"),
        (torch.zeros(1, 1, 500), "audio must be float"),
        (torch.zeros(1, 500).numpy(), "use torch.from_numpy for an array"),
        ((torch.zeros(1, 500), 0), "a tensor and its sample rate"),
        ("nowhere.wav", "nowhere.wav"),
    ],
)
def test_clips_that_cannot_be_continued_are_errors_of_one_line(pipe, source, message):
    for call in (pipe, pipe.session):
        with pytest.raises(UserError, match=message) as error:
            call("drums", duration=1.0, continue_from=source)
        assert "\n" not in str(error.value)


# --- a region generated again


@kinds
def test_repaint_keeps_the_rest_bit_for_bit(pipes, kind, clip):
    pipe, region = pipes[kind], (0.61, 1.27)
    out = pipe.repaint("drums", clip, region, candidates=2, **ENGINE)
    wav = out.audios[0]
    assert wav.shape == clip.shape
    history, look_ahead = pipe.decoder.context
    n_padding = -clip.shape[-1] % HOP
    first, last = (15 - look_ahead) * HOP - n_padding, (32 + history) * HOP - n_padding  # the decoder's reach
    changed = (wav != clip)[0].nonzero()[:, 0]
    assert first <= changed[0] and changed[-1] <= last
    inside = slice(round(0.65 * RATE), round(1.25 * RATE))
    assert (wav - clip)[:, inside].abs().amax() > 1e-3
    codes = pipe.encode_clip(clip).codes.full
    frames = slice(15, 32)
    assert torch.equal(out.codes[..., :15], codes[..., :15]) and torch.equal(out.codes[..., 32:], codes[..., 32:])
    assert not torch.equal(out.codes[:, :1, frames], codes[:, :1, frames])  # of both stages
    about = out.metadata["repaint"]
    assert about["seed"] == max(zip(about["scores"], (0, 1), strict=True))[1]
    again = pipe.repaint("drums", clip, region, candidates=1, seed=about["seed"], **ENGINE)
    assert torch.equal(again.codes[:, :1, frames], out.codes[:, :1, frames])


def test_repaint_forks_one_prefill(pipe, clip, monkeypatch):
    prefills = []
    real = pipe.model.prefill
    monkeypatch.setattr(pipe.model, "prefill", lambda *inputs: prefills.append(inputs[0].shape) or real(*inputs))
    pipe.repaint("drums", clip, (1.0, 1.5), candidates=3, **ENGINE)
    assert len(prefills) == 1 and prefills[0][-1] > 20


def test_codes_after_the_region_are_inputs_of_its_last_codes(pipe):
    """In a delay pattern the region's last codes are sampled after the first codebooks of the frames that follow."""
    codes = torch.arange(60).expand(1, 4, 60) % 16
    known = known_around(codes, (20, 30), pipe.pattern)
    assert (known[..., 20:30] == -1).all() and torch.equal(known[..., :20], codes[..., :20])
    assert torch.equal(known[..., 30:], codes[..., 30 : known.shape[-1]]) and known.shape[-1] == 34


def test_score_is_the_log_likelihood_of_what_follows(pipe, clip):
    request = pipe.session("a harp", **ENGINE).request
    conditions = pipe.text_conditions(request)
    codes = pipe("a harp", duration=1.0, seeds=2, guidance_scale=1.0, **ENGINE).codes
    scrambled = codes.clone()
    scrambled[..., 15:] = codes[..., 15:].flip(-1)
    scores = score_following(pipe.model, pipe.pattern, torch.cat([codes, scrambled]), 15, conditions, Controls())
    assert scores[0] > scores[1]
    sequence = pipe.pattern.build(codes, 16)
    inputs = torch.cat([torch.full_like(sequence[..., :1], 16), sequence[..., :-1]], -1)
    with torch.no_grad():
        log_p = pipe.model(inputs, conditions.texts[0]).log_softmax(-1)
    expected = [log_p[0, k, t + k, codes[0, k, t]] for k in range(4) for t in range(15, 25)]
    torch.testing.assert_close(scores[0], torch.stack(expected).mean())


def test_mix_leaves_the_clip_outside_and_the_new_audio_inside():
    original, decoded = torch.rand(1, 100), torch.rand(1, 100)
    mixed = mix_region(original, decoded, 40, 60, 10)
    assert torch.equal(mixed[:, :30], original[:, :30]) and torch.equal(mixed[:, 70:], original[:, 70:])
    assert torch.equal(mixed[:, 40:60], decoded[:, 40:60])
    assert (mixed[:, 30:40] != original[:, 30:40]).all()
    assert torch.equal(mix_region(original, decoded, 0, 100, 10), decoded)


@pytest.mark.parametrize("region", [(1.0, 3.0), (-1.0, 1.0), (1.0, 1.0), (1.5, 1.0), (5.0, 8.0), (0.0, float("nan"))])
def test_region_outside_the_clip_is_an_error_of_one_line(pipe, clip, region):
    with pytest.raises(UserError, match=r"the region .* must be within the clip of 1.99 s") as error:
        pipe.repaint("drums", clip, region)
    assert "\n" not in str(error.value)


def test_region_may_reach_the_ends_of_the_clip(pipe, clip):
    for region in ((0.0, 0.5), (1.5, clip.shape[-1] / RATE)):
        wav = pipe.repaint("drums", clip, region, candidates=2, **ENGINE).audios[0]
        assert wav.shape == clip.shape and not torch.equal(wav, clip)
    assert pipe.repaint("drums", clip, (1.0, 1.2), candidates=1, **ENGINE).metadata["repaint"]["seed"] == 0
    with pytest.raises(UserError, match="candidates must be at least 1"):
        pipe.repaint("drums", clip, (0.0, 1.0), candidates=0)


# --- audio-to-audio


def test_edits_tell_the_engine_and_the_diffusion_steps_that_made_them(pipes, clip):
    out = pipes["two"].repaint(
        "drums", clip, (1.0, 1.2), candidates=2, seed=MAX_SEED, diffusion_steps=1, engine="torch"
    )
    assert out.metadata["engine"]["name"] == "torch" and out.metadata["second_stage"]["steps"] == 1
    assert out.metadata["repaint"]["seed"] in (MAX_SEED, 0)
    out = pipes["two"].audio_to_audio("drums", clip, 1.0, diffusion_steps=1)
    assert out.metadata["second_stage"]["steps"] == 1


def test_audio_to_audio_keeps_the_coarse_codes_and_less_of_the_others_with_strength(pipes, clip):
    pipe = pipes["two"]
    codes = pipe.encode_clip(clip).codes.full
    kept = []
    for strength in (0.34, 0.67, 1.0):
        out = pipe.audio_to_audio("drums", clip, strength)
        assert out.audios.shape == (1, *clip.shape) and torch.equal(out.codes[:, :1], codes[:, :1])
        kept.append((out.codes[:, 1:] == codes[:, 1:]).float().mean().item())
    assert kept[0] > kept[1] > kept[2]
    assert torch.equal(pipe.audio_to_audio("drums", clip, 0.67).codes, pipe.audio_to_audio("drums", clip, 0.67).codes)
    for strength, message in [
        (0.0, r"strength must be in \(0, 1\]"),
        (1.5, "strength must be"),
        (0.1, "leaves none of 3 steps"),
    ]:
        with pytest.raises(UserError, match=message):
            pipe.audio_to_audio("drums", clip, strength)
    with pytest.raises(UserError, match="one stage"):
        pipes["one"].audio_to_audio("drums", clip)


# --- loops


@pytest.mark.parametrize("kind", ["one", "two", "vae"])
def test_loop_ends_where_it_begins(pipes, kind):
    """Twice in a row it is decoded as one piece: the decoder hears no end."""
    pipe = pipes[kind]
    out = pipe("drums", duration=4.0, seeds=3, loop=True, **ENGINE)
    assert out.audios.shape == (1, 1, 4 * RATE)
    twice = pipe.decoder.decode(torch.cat([out.codes] * 3, -1))[0, :, 2 * RATE : 10 * RATE]
    repeated = torch.cat([out.audios[0]] * 3, -1)[:, 2 * RATE : 10 * RATE]
    torch.testing.assert_close(repeated, twice, rtol=0, atol=1e-5)
    plain = pipe("drums", duration=4.0, seeds=3, **ENGINE)
    assert torch.equal(plain.codes[..., :50], out.codes[..., :50])
    assert not torch.equal(plain.codes[..., 50:], out.codes[..., 50:])


def test_loop_of_no_whole_number_of_frames_has_its_length_and_no_step_at_the_seam(pipe):
    codes = pipe("drums", duration=4.0, seeds=3, loop=True, **ENGINE).codes
    n_samples = 4 * RATE - 50
    wav = decode_loop(pipe.codec, codes, n_samples)
    assert wav.shape == (1, n_samples)
    circle = decode_loop(pipe.codec, codes, 4 * RATE)
    assert torch.equal(wav[:, -1], circle[:, -1]) and torch.equal(wav[:, :-80], circle[:, : n_samples - 80])


def test_loops_that_cannot_be_are_errors(pipe, clip):
    with pytest.raises(UserError, match="at least 4 s, got 1 s"):
        pipe("drums", duration=1.0, loop=True)
    with pytest.raises(UserError, match="no clip to continue"):
        pipe("drums", duration=5.0, loop=True, continue_from=clip)


# --- schedules, bars, negative prompts, blends


def test_schedule_changes_what_a_session_would(pipe):
    schedule = [(1.2, {"temperature": 0.5}), (0.6, {"prompt": "loud drums", "guidance_scale": 5.0})]
    out = pipe("a harp", duration=2.0, seeds=5, schedule=schedule, **ENGINE)
    plain = pipe("a harp", duration=2.0, seeds=5, **ENGINE)
    assert torch.equal(out.codes[:, 0, :15], plain.codes[:, 0, :15]) and not torch.equal(out.codes, plain.codes)
    session = pipe.session("a harp", duration=2.0, seed=5, chunk_seconds=0.6, **ENGINE)
    assert session.generator.next_codes(15).n_frames == 15
    session.change(**schedule[1][1])
    codes = [session.generator.next_codes(15)]
    session.change(**schedule[0][1])
    while (chunk := session.generator.next_codes(15)) is not None:
        codes.append(chunk)
    assert torch.equal(ClipCodes.cat(codes).full, out.codes[..., 15:])
    streamed = torch.cat(list(pipe.stream("a harp", 2.0, seed=5, schedule=schedule, **ENGINE)), -1)
    torch.testing.assert_close(streamed, out.audios[0], rtol=0, atol=1e-5)


def test_scheduled_changes_outlive_a_saved_state(pipe, tmp_path):
    schedule = [(0.4, {"prompt": "loud drums"}), (1.2, {"temperature": 0.3})]
    session = pipe.session("a harp", duration=2.0, seed=5, schedule=schedule, chunk_seconds=0.4, **ENGINE)
    session.next_chunk(), session.next_chunk()
    path = pipe.save_state(tmp_path / "state", session)
    rest = torch.cat(list(session), -1)
    restored = pipe.resume(pipe.load_state(path))
    assert torch.equal(torch.cat(list(restored), -1), rest)
    assert restored.request.prompts == ["loud drums"] and restored.request.sampling.temperature == 0.3


def test_scheduled_changes_keep_what_was_changed_by_hand(pipe):
    schedule = [(1.0, {"temperature": 0.5}), (1.4, {"guidance_scale": 4.0})]
    session = pipe.session("a harp", duration=2.0, seed=5, schedule=schedule, chunk_seconds=0.4, **ENGINE)
    session.next_chunk()
    session.change(prompt="loud drums", min_p=0.1)
    list(session)
    assert session.request.prompts == ["loud drums"]
    sampling = session.request.sampling
    assert (sampling.temperature, sampling.guidance_scale, sampling.min_p) == (0.5, 4.0, 0.1)


def test_schedule_of_a_continued_clip_outlives_a_saved_state(pipe, clip, tmp_path):
    options = {"schedule": [(1.0, {"prompt": "loud drums"})], "continue_from": clip, "chunk_seconds": 0.4}
    session = pipe.session("a harp", duration=2.0, seed=5, **options, **ENGINE)
    session.next_chunk(), session.next_chunk()
    restored = pipe.resume(pipe.load_state(pipe.save_state(tmp_path / "state", session)))
    assert [change.frame for change in restored.generator.schedule] == [50 + 25]
    assert torch.equal(torch.cat(list(session), -1), torch.cat(list(restored), -1))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([(2.0, {"prompt": "x"})], "there is no second 2 in the music"),
        ([(-1.0, {"prompt": "x"})], "there is no second -1"),
        ([(1.0, {"prompt": ""})], "prompt 1 is empty"),
        ([(1.0, {"seed": 2})], "seed cannot change while the music plays: choose from prompt"),
        ([(1.0, {"key": "D minor"})], "not trained with key"),
        ([(1.0, "drums")], "a schedule lists seconds and what changes"),
    ],
)
def test_wrong_schedules_are_errors_of_one_line(pipe, schedule, message):
    with pytest.raises(UserError, match=message):
        pipe("a harp", duration=2.0, schedule=schedule)


def test_bars_give_the_duration(pipe, tmp_path, caplog):
    assert pipe("a harp", bars=1, bpm=240.0, **ENGINE).audios.shape[-1] == RATE
    without = small_pipeline(tmp_path, tempo=False)
    assert without("a harp", bars=1, bpm=240.0, metre="3/4", **ENGINE).audios.shape[-1] == round(0.75 * RATE)
    assert "bpm gives the length of 1 bars only" in caplog.text
    for wrong, message in [
        ({"bars": 2}, "needs a tempo"), ({"bars": 0, "bpm": 90.0}, "bars must be above 0"),
        ({"bars": 2, "bpm": 90.0, "duration": 10.0}, "bars and a duration are two lengths"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            pipe("a harp", **wrong)
    assert torch.cat(list(pipe.stream("a harp", bars=1, bpm=240.0, **ENGINE)), -1).shape[-1] == RATE
    with pytest.raises(UserError, match="bars and a duration are two lengths"):
        pipe.stream("a harp", 10.0, bars=1, bpm=240.0)


def test_options_without_an_effect_on_the_second_stage_are_refused(tmp_path, clip):
    pipe = small_pipeline(tmp_path, two_stages=True)
    stage = pipe.second_stage
    stage.settings = replace(stage.settings, guidance_scale=1.0)
    with pytest.raises(UserError, match="a negative prompt acts through guidance, which the second stage has none of"):
        pipe.audio_to_audio("drums", clip, negative_prompt="noise")
    with pytest.raises(UserError, match=r"a negative prompt acts through guidance, which is 1 \(none\)"):
        pipe("drums", duration=0.2, guidance_scale=1.0, negative_prompts="noise")
    stage.model.config = replace(stage.model.config, tempo=False)
    with pytest.raises(UserError, match="second stage, which alone runs here, was not trained with bpm"):
        pipe.audio_to_audio("drums", clip, bpm=90.0)


def test_blend_and_negative_prompt(pipe):
    def codes(prompt, **options):
        return pipe(prompt, duration=0.8, seeds=5, **(ENGINE | options)).codes

    assert torch.equal(codes({"a harp": 1, "drums": 0}), codes("a harp"))
    assert torch.equal(codes({"a harp": 3, "drums": 1}), codes({"a harp": 0.75, "drums": 0.25}))
    assert torch.equal(codes("a harp", negative_prompts=[""]), codes("a harp"))
    strong = {"guidance_scale": 30.0}
    assert not torch.equal(codes("a harp", negative_prompts="drums", **strong), codes("a harp", **strong))
    both = pipe(["a harp", {"a harp": 1, "drums": 2}], duration=0.8, seeds=[5, 5], **ENGINE).codes
    assert torch.equal(both[:1], codes("a harp")) and torch.equal(both[1:], codes({"a harp": 1, "drums": 2}))
    with pytest.raises(UserError, match="a negative prompt acts through guidance"):
        pipe("a harp", guidance_scale=1.0, negative_prompts="drums")
    with pytest.raises(UserError, match="got 2 negative prompts for 1 prompts"):
        pipe("a harp", negative_prompts=["a", "b"])
    with pytest.raises(UserError, match="got 1 seeds for 2 prompts"):
        pipe(["a harp", "drums"], seeds=[1])
