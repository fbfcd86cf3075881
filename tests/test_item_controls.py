"""Controls of a request: tempo, key and metre drawn from the caption, the time in the piece, what metadata state."""

import json

import pytest
import torch
from small_pipelines import small_pipeline

import sample
from ssmttm import MusicPipeline
from ssmttm.audio.notation import KEYS, METRES
from ssmttm.cli.main import main
from ssmttm.generation.editing import edits
from ssmttm.generation.item_controls import build_controls, draw_controls
from ssmttm.generation.request import Request, Sampling

ENGINE = {"engine": "torch"}
CONTROLS = {"key": True, "metre": True, "bar_position": True, "timing": True, "predict_controls": True}
RATE = 25.0  # frames a second


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return small_pipeline(tmp_path_factory.mktemp("planned"), **CONTROLS)


def drawn(pipe, prompts, seeds, **given):
    return pipe(prompts, duration=0.2, seeds=seeds, **given, **ENGINE).metadata["controls"]


def open_session(pipe, prompt="a slow waltz", **options):
    return pipe.session(prompt, **({"seed": 5, "chunk_seconds": 0.2} | ENGINE | options))


def request_of(pipe, prompts="a harp", duration=1.0, **options):
    return Request.create(prompts, duration, 3, Sampling(), **options)


# --- drawn from the caption


def test_controls_are_drawn_by_caption_and_seed_alone_or_in_a_batch(pipe):
    prompts, seeds = ["a slow waltz", "drums", "a slow waltz", "drums"], [3, 4, 5, 3]
    together = pipe(prompts, duration=0.4, seeds=seeds, **ENGINE)
    found = together.metadata["controls"]
    assert all(
        set(one) == {"bpm", "key", "metre", "drawn"} and one["drawn"] == ["bpm", "key", "metre"] for one in found
    )
    assert all(30 <= one["bpm"] <= 300 and one["key"] in KEYS and one["metre"] in METRES for one in found)
    assert len({json.dumps(one) for one in found}) == 4, "seeds and captions count"
    for item in (1, 2):
        alone = pipe(prompts[item], duration=0.4, seeds=seeds[item], **ENGINE)
        assert alone.metadata["controls"] == [found[item]] and torch.equal(alone.codes[0], together.codes[item])
    assert together.metadata_of(1)["controls"] == found[1] and "controls" not in pipe.metadata


def test_drawn_controls_act_like_given_ones_and_leave_the_codes_random_numbers(pipe):
    clip = pipe("a harp", duration=1.0, seeds=8, **ENGINE)
    own = dict(clip.metadata["controls"][0])
    assert own.pop("drawn") == ["bpm", "key", "metre"]
    given = pipe("a harp", duration=1.0, seeds=8, **own, **ENGINE)
    assert torch.equal(given.codes, clip.codes) and given.metadata["controls"] == [own | {"drawn": []}]
    other = pipe("a harp", duration=1.0, seeds=8, **own | {"bpm": own["bpm"] * 1.5}, **ENGINE)
    assert not torch.equal(other.codes, clip.codes)


def test_what_the_caller_gives_is_not_drawn_and_changes_no_other_draw(pipe):
    free = drawn(pipe, "a harp", 8)[0]
    held = drawn(pipe, "a harp", 8, key="D minor")[0]
    assert held == free | {"key": "D minor", "drawn": ["bpm", "metre"]}


def test_draws_follow_the_predicted_distribution(pipe):
    """Of tempi below and above the median class, over 300 seeds."""
    request = Request.create(["a harp"] * 300, 1.0, 0, Sampling())
    captions = pipe.text_conditions(request).heaviest_text()
    with torch.no_grad():
        expected = (2 * pipe.model.control_predictor(captions)["key"][0]).softmax(-1)  # drawn at a temperature of 0.5
    keys = [one["key"] for one in draw_controls(pipe.model.control_predictor, request, captions).drawn]
    found = torch.tensor([keys.count(name) / 300 for name in KEYS])
    assert (found - expected).abs().max() < 0.08 and expected.max() > 0.08


def test_blend_draws_from_its_heaviest_prompt(pipe):
    assert drawn(pipe, {"drums": 1, "a harp": 3}, 8) == drawn(pipe, "a harp", 8) != drawn(pipe, "drums", 8)


def test_models_without_a_predictor_draw_nothing(tmp_path):
    pipe = small_pipeline(tmp_path, **CONTROLS | {"predict_controls": False})
    assert "controls" not in pipe("a harp", duration=0.2, **ENGINE).metadata and open_session(pipe).controls == {}


def test_bars_set_the_metre_that_they_are_counted_in(pipe):
    found = pipe("a harp", bars=1, bpm=240.0, seeds=8, **ENGINE)
    assert found.audios.shape[-1] == pipe.sample_rate
    assert found.metadata["controls"][0] | {"key": ""} == {"bpm": 240.0, "metre": "4/4", "key": "", "drawn": ["key"]}


def test_continued_clip_has_controls_of_its_own(pipe):
    clip = pipe("a harp", duration=0.6, seeds=8, **ENGINE).audios[0]
    assert "controls" not in pipe("drums", duration=0.2, continue_from=clip, **ENGINE).metadata
    session = open_session(pipe, continue_from=clip)
    session.change(prompt="drums")
    assert session.controls == {}
    assert "controls" not in pipe.repaint("drums", clip, (0.2, 0.4), candidates=1, **ENGINE).metadata


def test_new_words_draw_again_and_keep_what_is_given(pipe):
    session = open_session(pipe, key="D minor")
    session.next_chunk()
    before = session.controls
    session.change(bpm=90.0)
    assert session.controls == before | {"bpm": 90.0, "drawn": ["metre"]}
    session.change(prompt="drums")
    expected = drawn(pipe, "drums", 5)[0]
    assert session.controls == {"bpm": 90.0, "key": "D minor", "metre": expected["metre"], "drawn": ["metre"]}
    bars = session.generator.sampler.frame_controls(0, 50).bar_position
    wanted = build_controls(request_of(pipe, bpm=90.0, metre=expected["metre"]), pipe.codec, "cpu", 0, 50).bar_position
    torch.testing.assert_close(bars, wanted)


def test_change_before_the_first_chunk_draws_as_a_session_of_these_words(pipe):
    session, expected = open_session(pipe), open_session(pipe, "drums")
    session.change(prompt="drums")
    assert session.controls == expected.controls and torch.equal(session.next_chunk(), expected.next_chunk())


def test_scheduled_words_draw_again(pipe):
    session = open_session(pipe, duration=1.0, schedule=[(0.5, {"prompt": "drums"})])
    before = session.controls
    list(session)
    assert session.controls == open_session(pipe, "drums").controls != before


def test_fork_keeps_the_drawn_controls_and_so_does_its_saved_state(pipe, tmp_path):
    session = open_session(pipe)
    session.next_chunk()
    fork = session.clone(seed=77)
    assert fork.controls == session.controls != open_session(pipe, seed=77).controls
    path = pipe.save_state(tmp_path / "fork", fork)
    rest = [fork.next_chunk() for _ in range(2)]
    loaded = pipe.resume(pipe.load_state(path))
    assert loaded.controls == fork.controls and torch.equal(loaded.next_chunk(), rest[0])
    assert torch.equal(loaded.next_chunk(), rest[1])


def test_second_stage_takes_the_drawn_tempo(tmp_path):
    pipe = small_pipeline(tmp_path, two_stages=True, key=True, predict_controls=True)
    session = open_session(pipe)
    assert session.generator.second_stage.inputs.controls.bpm.tolist() == pytest.approx([session.controls["bpm"]])
    session.change(prompt="drums")
    assert session.generator.second_stage.inputs.controls.bpm.tolist() == pytest.approx([session.controls["bpm"]])


def test_predictor_of_half_precision(tmp_path):
    pipe = small_pipeline(tmp_path, **CONTROLS).to(dtype=torch.bfloat16)
    assert open_session(pipe).controls["key"] in KEYS


# --- the time in the piece


def timing(pipe, n_clip_frames, n_frames, **options):
    return build_controls(request_of(pipe, **options), pipe.codec, torch.device("cpu"), n_clip_frames, n_frames).timing


def test_clip_begins_and_ends_like_a_piece(pipe):
    start, end = timing(pipe, 0, 26, prompts=["a", "b"], duration=1.02)[1]
    torch.testing.assert_close(start, torch.arange(26) / RATE)
    torch.testing.assert_close(end, (1.02 - torch.arange(26) / RATE).clamp(min=0))


def test_continued_clip_counts_from_its_start(pipe):
    start, end = timing(pipe, 10, 35)[0]
    assert start[10] == pytest.approx(10 / RATE) and end[10] == pytest.approx(1.0) and end[0] == pytest.approx(1.4)


def test_stream_without_an_end_has_no_end(pipe):
    start, end = timing(pipe, 0, None, duration=None)[0]
    assert start[50] == 2.0 and end.isnan().all()


def test_model_gets_the_timing_in_calls_and_streams(pipe):
    given = {"bpm": 120.0, "key": "D minor", "metre": "3/4"}
    session = open_session(pipe, duration=1.0, **given)
    torch.testing.assert_close(session.generator.sampler.frame_controls(0, 25).timing, timing(pipe, 0, 25))
    codes = [pipe("a harp", duration=d, seeds=3, **given, **ENGINE).codes[..., :12] for d in (1.0, 4.0)]
    assert not torch.equal(*codes), "the end of the clip is known to the model"


def test_loops_and_repainted_regions_are_parts(pipe, monkeypatch):
    found = []
    real = MusicPipeline.controls

    def controls(self, request, *frames):
        found.append(real(self, request, *frames))
        return found[-1]

    monkeypatch.setattr(MusicPipeline, "controls", controls)
    loop = pipe("a harp", duration=4.0, loop=True, seeds=3, **ENGINE)
    assert len(found) == 2 and all(one.timing is None for one in found)
    assert found[1].bpm.tolist() == pytest.approx([loop.metadata["controls"][0]["bpm"]])
    pipe.repaint("a harp", loop.audios[0], (0.2, 0.4), candidates=1, **ENGINE)
    assert found[2].timing is None


def test_start_of_a_loop_comes_again_with_its_own_bars(pipe, monkeypatch):
    found = []
    real = edits.CodeSampler

    def sampler(*inputs):
        found.append(inputs[7])
        return real(*inputs)

    monkeypatch.setattr(edits, "CodeSampler", sampler)
    pipe("a harp", duration=4.0, loop=True, bpm=100.0, metre="3/4", seeds=3, **ENGINE)  # 2.2 bars
    bars = found[0].bar_position[0]
    assert torch.equal(bars[:, 100:], bars[:, : bars.shape[-1] - 100]) and bars.shape[-1] > 101 and bars[0, 100] == 0


# --- what is stated


def test_sidecars_state_the_controls_of_each_clip(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(MusicPipeline, "from_pretrained", classmethod(lambda cls, *a, **b: pipe))
    words = ["a harp", "drums", "--duration", "0.2", "--bpm", "120", "--engine", "torch", "--out", f"{tmp_path}/"]
    assert sample.main([*map(str, words)]) == 0
    found = [json.loads((tmp_path / f"{name}.json").read_text())["controls"] for name in ("a-harp", "drums")]
    assert found == drawn(pipe, ["a harp", "drums"], 0, bpm=120.0) and found[0]["drawn"] == ["key", "metre"]


def test_info_states_the_controls_of_a_model(capsys):
    main(["info", "tiny_lm"])
    rows = capsys.readouterr().out.partition("control of tiny_lm")[2].splitlines()
    assert [row.split()[0] for row in rows[1:7]] == ["chroma", "tempo", "key", "metre", "bar_position", "timing"]
    assert rows[1].endswith("  a null vector") and rows[2].endswith("  drawn from the caption")
    assert all(" language model " in row and "second stage" not in row for row in rows[1:7])
