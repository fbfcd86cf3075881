"""Streams: equal to calls, changed while they play, copied, saved and restored exactly, at constant memory."""

import pytest
import torch
from safetensors.torch import save_file
from small_pipelines import small_pipeline

from ssmttm.errors import UserError
from ssmttm.generation import pretrained
from ssmttm.generation.engine import generate
from ssmttm.generation.request import Sampling
from ssmttm.generation.streaming import state
from ssmttm.generation.streaming.session import CONTEXT_SECONDS

ENGINE = {"engine": "torch"}  # the reference; the engines are compared with it elsewhere
CHANGES = {
    "prompt": {"prompt": "loud drums"},
    "blend": {"prompt": {"loud drums": 1, "calm harp": 3}},
    "negative_prompt": {"negative_prompt": "drums"},
    "guidance_scale": {"guidance_scale": 99.0},
    "temperature": {"temperature": 0.2},
    "top_k": {"top_k": 1},
    "min_p": {"min_p": 0.9},
    "bpm": {"bpm": 240.0},
}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    return {
        "one": small_pipeline(folder / "one"),
        "flatten": small_pipeline(folder / "flatten", "flatten"),
        "two": small_pipeline(folder / "two", two_stages=True),
        "hybrid": small_pipeline(folder / "hybrid", layers=["mamba2", "attention"], positions="rotary"),
        "cross": small_pipeline(folder / "cross", conditioning="cross_attention", positions="sinusoidal"),
        "adaln": small_pipeline(folder / "adaln", conditioning="adaln", layers="mamba1"),
    }


@pytest.fixture
def pipe(pipes):
    return pipes["one"]


kinds = pytest.mark.parametrize("kind", ["one", "flatten", "two", "hybrid", "cross", "adaln"])


def take(session, seconds):
    """At least that much audio, [C, S]."""
    chunks = []
    while sum(chunk.shape[-1] for chunk in chunks) < seconds * session.sample_rate:
        chunks.append(session.next_chunk())
    return torch.cat(chunks, -1)


def open_session(pipe, prompt="a slow waltz", **options):
    return pipe.session(prompt, **({"seed": 5, "chunk_seconds": 0.2} | ENGINE | options))


# --- equal to a call


@kinds
def test_session_of_a_duration_equals_a_call(pipes, kind):
    pipe = pipes[kind]
    whole = pipe("a slow waltz", duration=1.3, seeds=5, **ENGINE).audios[0]
    for chunk_seconds in (0.04, 0.5) if kind == "one" else (0.2,):
        session = open_session(pipe, duration=1.3, chunk_seconds=chunk_seconds)
        streamed = torch.cat(list(session), -1)
        torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-5)
    assert session.position == pytest.approx(1.3) and session.channels == len(streamed)
    assert session.next_chunk() is None


@pytest.mark.parametrize("kind", ["one", "flatten"])
def test_endless_session_begins_like_a_call(pipes, kind):
    """But for the last codes of the call, which the pattern's padding follows."""
    pipe = pipes[kind]
    whole = pipe("a slow waltz", duration=2.0, seeds=5, **ENGINE).audios[0]
    same = round(1.4 * pipe.sample_rate)
    torch.testing.assert_close(take(open_session(pipe), 2)[:, :same], whole[:, :same], rtol=0, atol=1e-5)


def test_endless_session_needs_a_pattern_of_one_pass(tmp_path):
    pipe = small_pipeline(tmp_path, "coarse_first")
    with pytest.raises(UserError, match="a clip without an end needs a pattern of one pass"):
        open_session(pipe)
    assert open_session(pipe, duration=1.0).next_chunk() is not None


def test_endless_session_needs_a_codec_that_streams(pipe, monkeypatch):
    monkeypatch.setattr(pipe.codec, "context", None)
    with pytest.raises(UserError, match="decodes whole clips only: give a duration"):
        open_session(pipe)


# --- changes


@pytest.mark.parametrize("change", CHANGES)
def test_change_before_the_first_chunk_is_another_beginning(pipe, change):
    session = open_session(pipe)
    session.change(**CHANGES[change])
    expected = open_session(pipe, **CHANGES[change])
    assert torch.equal(take(session, 0.8), take(expected, 0.8))


@pytest.mark.parametrize("change", CHANGES)
def test_change_is_heard_within_a_second_and_not_before_it(pipes, change):
    pipe = pipes["cross"]  # in which the words act at every position
    session, unchanged = open_session(pipe), open_session(pipe)
    assert torch.equal(take(session, 1), take(unchanged, 1))
    session.change(**CHANGES[change])
    changed, same = take(session, 1), take(unchanged, 1)
    differs = (changed - same).abs().amax(0) > 1e-4
    assert differs.any() and int(differs.nonzero()[0]) < session.sample_rate


def test_new_words_replace_the_old_ones(pipe):
    """After the fade the codes are those of a model that has the recent codes and the new words only."""
    session = open_session(pipe)
    take(session, 6)
    session.change(prompt="loud drums")
    take(session, 1)
    sampler = session.generator.sampler
    assert len(sampler._rows) == 1 and len(sampler._sequence) < (CONTEXT_SECONDS + 2) * pipe.codec.frame_rate
    assert session.request.prompts == ["loud drums"]


def test_fade_moves_the_logits_from_the_old_words_to_the_new(pipe):
    session = open_session(pipe)
    take(session, 1)
    sampler = session.generator.sampler
    old, other = sampler.clone(), sampler.clone()
    session.change(prompt="loud drums")
    faded = sampler.clone()
    other.change(session.generator.sampler.conditions)  # at once
    with torch.inference_mode():
        old._process_last_codes()
    logits = [one._logits()[:2] for one in (old, faded, other)]
    n = sampler._fade[1]
    torch.testing.assert_close(logits[1], logits[0].lerp(logits[2], 1 / n))
    assert n == 6 and not torch.allclose(logits[0], logits[2])


def test_guidance_can_be_switched_on_and_off(pipe):
    session = open_session(pipe, guidance_scale=1.0)
    take(session, 1)
    session.change(guidance_scale=4.0)
    on = take(session, 2)
    session.change(guidance_scale=1.0)
    off = take(session, 2)
    assert session.generator.sampler.guided and on.isfinite().all() and off.isfinite().all()


def test_settings_out_of_range_change_nothing(pipe):
    session, unchanged = open_session(pipe), open_session(pipe)
    take(session, 1), take(unchanged, 1)
    for wrong, message in [
        ({"temperature": 0}, "temperature"),
        ({"prompt": " "}, "prompt 1 is empty"),
        ({"bpm": -1}, "bpm must be above 0"),
        ({"guidance_scale": float("nan")}, "guidance"),
        ({"prompt": {"a": -1}}, "weights must be at least 0"),
        ({"prompt": {"a": 1e308, "b": 1e308}}, "not all 0 and finite"),
        ({"prompt": 5}, "prompt 1 must be text"),
        ({"negative_prompt": "drums", "guidance_scale": 0.5}, "0.5 .towards the negative prompt."),
        ({"negative_prompt": "drums", "guidance_scale": 1.0}, "acts through guidance"),
    ]:
        with pytest.raises(UserError, match=message):
            session.change(**wrong)
    assert torch.equal(take(session, 1), take(unchanged, 1))


def test_change_after_the_end_is_an_error(pipe):
    session = open_session(pipe, duration=0.5)
    list(session)
    with pytest.raises(UserError, match="the stream has ended"):
        session.change(temperature=0.5)


def test_change_of_a_control_the_model_lacks_is_an_error(tmp_path):
    session = open_session(small_pipeline(tmp_path, tempo=False))
    with pytest.raises(UserError, match="not trained with bpm"):
        session.change(bpm=90)


# --- snapshots, forks, saved states


@pytest.mark.parametrize("kind", ["one", "two", "hybrid", "adaln"])
def test_snapshot_continues_exactly_and_forks_with_another_seed(pipes, kind):
    pipe = pipes[kind]
    session = open_session(pipe)
    take(session, 1)
    moment = session.snapshot()
    position, rest = session.position, take(session, 1)
    again = pipe.resume(moment)
    assert again.position == moment.position == position
    assert torch.equal(take(again, 1), rest)
    forks = [take(pipe.resume(moment, seed=seed), 1) for seed in (7, 7, 8)]
    assert torch.equal(forks[0], forks[1])
    assert not torch.equal(forks[0], rest) and not torch.equal(forks[0], forks[2])


def test_forks_cost_no_prefill(pipe, monkeypatch):
    session = open_session(pipe)
    take(session, 1)
    moment = session.snapshot()
    monkeypatch.setattr(pipe.model, "prefill", None)
    for seed in range(4):
        take(pipe.resume(moment, seed=seed), 1)


def test_forks_do_not_change_each_other(pipe):
    session = open_session(pipe)
    take(session, 1)
    moment = session.snapshot()
    alone = take(pipe.resume(moment, seed=3), 1)
    one, two = pipe.resume(moment, seed=3), pipe.resume(moment, seed=4)
    chunks = []
    while sum(chunk.shape[-1] for chunk in chunks) < alone.shape[-1]:
        chunks.append(one.next_chunk())
        two.change(prompt="loud drums")
        two.next_chunk()
    assert torch.equal(torch.cat(chunks, -1)[:, : alone.shape[-1]], alone)


@pytest.mark.parametrize(
    ("kind", "moment"),
    [("one", "start"), ("one", "middle"), *((k, "fading") for k in ("one", "two", "hybrid"))],
)
def test_saved_state_continues_exactly(pipes, kind, moment, tmp_path):
    pipe = pipes[kind]
    session = open_session(pipe, negative_prompt="noise", bpm=90.0)
    if moment != "start":
        take(session, 1)
    if moment == "fading":
        session.change(prompt={"loud drums": 1, "calm harp": 2})
    path = pipe.save_state(tmp_path / "moment.safetensors", session)
    rest = take(session, 1)
    loaded = pipe.load_state(path)
    assert torch.equal(take(pipe.resume(loaded), 1), rest)
    assert not torch.equal(take(pipe.resume(loaded, seed=9), 1), rest)


def test_save_state_takes_the_last_session_or_the_end_of_the_last_call(tmp_path):
    pipe, path = small_pipeline(tmp_path), tmp_path / "state.safetensors"
    with pytest.raises(UserError, match="no state to save"):
        pipe.save_state(path)
    stream = pipe.stream("a slow waltz", duration=None, seed=5, **ENGINE)
    next(stream)
    pipe.save_state(path)
    rest = next(stream)
    assert torch.equal(pipe.resume(pipe.load_state(path)).next_chunk(), rest)
    clip = pipe("a slow waltz", duration=2.0, seeds=5, **ENGINE)
    pipe.save_state(path)
    conditions = pipe.text_conditions(pipe.resume(pipe.load_state(path)).request)
    codes = generate(
        pipe.model, *conditions.texts, conditions.null_text, pipe.pattern, 100, Sampling(), [5], clip.codes
    )
    expected = pipe.codec.decode(codes)[0, :, 2 * pipe.sample_rate :]
    found = take(pipe.resume(pipe.load_state(path)), 1)
    torch.testing.assert_close(found, expected[:, : found.shape[-1]], rtol=0, atol=1e-5)
    pipe("a slow waltz", duration=0.8, schedule=[(0.4, {"prompt": "loud drums"})], **ENGINE)
    pipe.save_state(path)
    assert pipe.resume(pipe.load_state(path)).request.prompts == ["loud drums"], "the words at the end of the call"
    pipe(["a", "b"], duration=0.2, **ENGINE)
    with pytest.raises(UserError, match="the last call made 2 clips"):
        pipe.save_state(path)


def test_finished_session_has_no_state_to_save(pipe, tmp_path):
    session = open_session(pipe, duration=0.3)
    list(session)
    with pytest.raises(UserError, match="the stream has ended"):
        pipe.save_state(tmp_path / "x", session)


def test_state_of_another_model_is_refused_in_one_line(pipes, pipe, tmp_path):
    session = open_session(pipe)
    path = pipe.save_state(tmp_path / "moment.safetensors", session)
    other = small_pipeline(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"is of another model \(language model .*\): load the model") as error:
        other.load_state(path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="another pipeline"):
        pipes["two"].resume(session.snapshot())
    with pytest.raises(UserError, match="another pipeline"):
        pipes["two"].save_state(tmp_path / "unusable", session)
    assert not (tmp_path / "unusable").exists()


def test_damaged_states_are_refused_in_one_line(pipe, tmp_path):
    path = pipe.save_state(tmp_path / "good", open_session(pipe))
    content = path.read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    (tmp_path / "text").write_text("not a state")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    save_file({"x": torch.zeros(1)}, tmp_path / "header", {"format": state._FORMAT, "model": "{"})
    for name, message in [
        ("cut", "damaged"), ("text", "damaged"), ("header", "damaged"), ("absent", "there is no state"),
        ("other", "no state saved by"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message) as error:
            pipe.load_state(tmp_path / name)
        assert "\n" not in str(error.value)


def test_state_with_a_changed_byte_is_damaged(pipe, tmp_path):
    content = bytearray(pipe.save_state(tmp_path / "good", open_session(pipe)).read_bytes())
    generator = torch.Generator().manual_seed(0)
    text = [content.index(word) for word in (b'"state":', b"temperature", b"sha256", b"waltz")]
    for place in [*text, *torch.randint(len(content), (30,), generator=generator).tolist()]:
        changed = content.copy()
        changed[place] ^= 1
        (tmp_path / "changed").write_bytes(changed)
        with pytest.raises(UserError, match=r"is damaged|no state saved by") as error:
            pipe.load_state(tmp_path / "changed")
        assert "\n" not in str(error.value)


def test_stream_does_not_go_on_with_other_weights(tmp_path):
    pipe = small_pipeline(tmp_path)
    session = open_session(pipe)
    session.next_chunk()
    moment = session.snapshot()
    pipe.to(dtype=torch.float64)
    for call in (session.next_chunk, lambda: session.change(top_k=3), lambda: pipe.resume(moment),
                 lambda: pipe.save_state(tmp_path / "state", session)):  # fmt: skip
        with pytest.raises(UserError, match="dtype or the device of the pipeline changed while this stream was open"):
            call()
    assert not (tmp_path / "state").exists()
    pipe.to(dtype=torch.float32)
    assert torch.equal(pipe.resume(moment).next_chunk(), session.next_chunk())


# --- memory


def test_memory_of_a_session_does_not_grow(pipe):
    def size(session):
        state = session.state()
        parts, total = [state], 0
        while parts:
            part = parts.pop()
            if isinstance(part, torch.Tensor):
                total += part.numel() * part.element_size()
            elif isinstance(part, dict | list):
                parts += part.values() if isinstance(part, dict) else part
            elif hasattr(part, "__dict__"):
                parts += vars(part).values()
        return total

    session = open_session(pipe)
    sizes = []
    for _ in range(100):
        session.next_chunk()
        sizes.append(size(session))
    # The uniforms of 256 positions are drawn together: compare the largest of two spans.
    assert max(sizes[55:]) <= 1.03 * max(sizes[20:55])


def test_long_clips_are_decoded_in_parts(pipe, monkeypatch):
    whole = pipe("a harp", duration=2.0, seeds=1, **ENGINE).audios
    longest, real = [], pipe.codec.decode
    monkeypatch.setattr(
        pipe.codec, "decode", lambda codes, *start: longest.append(codes.shape[-1]) or real(codes, *start)
    )
    monkeypatch.setattr(pretrained, "_DECODED_SECONDS", 0.4)
    torch.testing.assert_close(pipe("a harp", duration=2.0, seeds=1, **ENGINE).audios, whole, rtol=0, atol=1e-5)
    assert len(longest) > 4 and max(longest) < 10 + sum(pipe.codec.context) + 1


def test_session_that_is_not_read_does_nothing(pipe, monkeypatch):
    session = open_session(pipe)
    session.next_chunk()
    monkeypatch.setattr(pipe.model, "step", None)
    position = session.position
    session.snapshot()
    assert session.position == position
