"""Clips of several durations in one call: each is as it would be alone."""

import pytest
import torch
from small_pipelines import small_pipeline

from ssmttm.errors import UserError

ENGINE = {"engine": "torch"}
PROMPTS, DURATIONS, SEEDS = ["a harp", "drums", "a flute"], [0.8, 0.33, 0.8], [3, 4, 5]
PLANNED = {"key": True, "metre": True, "predict_controls": True}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    return {
        "delay": small_pipeline(folder / "delay", **PLANNED),
        "coarse_first": small_pipeline(folder / "coarse", "coarse_first"),
        "two stages": small_pipeline(folder / "two", two_stages=True),
    }


@pytest.mark.parametrize("kind", ["delay", "coarse_first", "two stages"])
def test_each_clip_is_as_long_as_requested_and_as_it_is_alone(pipes, kind):
    pipe, seconds = pipes[kind], []
    out = pipe(PROMPTS, duration=DURATIONS, seeds=SEEDS, progress=seconds.append, **ENGINE)
    assert out.lengths == [round(duration * pipe.sample_rate) for duration in DURATIONS]
    assert out.audios.shape == (3, 1, out.lengths[0]) and out.codes.shape[-1] == 20
    for item, (prompt, duration, seed) in enumerate(zip(PROMPTS, DURATIONS, SEEDS, strict=True)):
        alone = pipe(prompt, duration=duration, seeds=seed, **ENGINE)
        n_frames = alone.codes.shape[-1]
        assert torch.equal(out.clip(item), alone.audios[0]) and torch.equal(
            out.codes[item, :, :n_frames], alone.codes[0]
        )
        assert not out.audios[item, :, out.lengths[item] :].any() and (out.codes[item, :, n_frames:] == -1).all()
        assert out.metadata_of(item).get("controls") == alone.metadata_of(0).get("controls")
    assert [clip["audio"].shape[-1] for clip in out.as_dicts()] == out.lengths
    assert sum(seconds) == pytest.approx(0.8 + 0.36 + 0.8)  # whole frames


def test_continued_clips_of_several_durations(pipes):
    pipe = pipes["delay"]
    clip = pipe("a harp", duration=0.6, seeds=3, **ENGINE).audios[0]
    out = pipe(["drums", "a harp"], duration=[0.2, 0.4], seeds=[1, 2], continue_from=clip, **ENGINE)
    assert out.lengths == [round(0.8 * pipe.sample_rate), pipe.sample_rate]
    alone = pipe("drums", duration=0.2, seeds=1, continue_from=clip, **ENGINE)
    assert torch.equal(out.clip(0), alone.audios[0])


def test_wrong_durations_are_errors_of_one_line(pipes, tmp_path):
    pipe = pipes["delay"]
    for durations, message in [
        ([1.0], "got 1 durations for 2 prompts"), ([1.0, 0.0], "above 0 seconds, got 0"),
        ([1.0, 601.0], "at most 600 s"), ([1.0, float("nan")], "above 0 seconds, got nan"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            pipe(["a", "b"], duration=durations)
    with pytest.raises(UserError, match=r"there is no second 0\.5 in the music"):
        pipe(["a", "b"], duration=[0.4, 1.0], schedule=[(0.5, {"prompt": "c"})])
    with pytest.raises(UserError, match="a loop must be of at least 4 s, got 2 s"):
        pipe(["a", "b"], duration=[4.0, 2.0], loop=True)
    pipe(["a", "b"], duration=[0.1, 0.2], **ENGINE)
    with pytest.raises(UserError, match="the last call made 2 clips"):
        pipe.save_state(tmp_path / "state")
