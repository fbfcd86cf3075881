"""Key, metre and bar position as conditions: how they are written, in a store, in a batch, in the models."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from small_denoisers import conditions, denoiser
from small_stores import FRAMES, lm_config, small_codec, write_codes_store, write_rows_store
from small_token_lms import VARIANTS, K, S, V, assert_equal, captions, randomised, small_token_lm

from data_prep.builtin.composition.annotations import excerpt
from data_prep.builtin.composition.compose import compose
from data_prep.builtin.composition.score import METRES as BUILTIN_METRES
from data_prep.builtin.composition.score import TICKS
from data_prep.sources import folder
from data_prep.stages.cut import segment_truth
from ssmttm.audio.notation import KEYS, METRES, beats_of, parse_key, parse_metre
from ssmttm.data import open_store
from ssmttm.data.loader import Item
from ssmttm.errors import UserError
from ssmttm.files import file_entry
from ssmttm.models.controls import BarPositionEmbedding, ClassEmbedding, Controls, bar_position
from ssmttm.text.condition import TextCondition
from ssmttm.training.tasks import lm

ALL = {"chroma": True, "tempo": True, "key": True, "metre": True, "bar_position": True, "timing": True}
TRAINED = ("model.tempo=true", "model.key=true", "model.metre=true", "model.bar_position=true", "model.timing=true")
DROPPED = ("tempo", "key", "metre", "bar_position", "timing")
NEVER = ("data.caption_dropout=0", *(f"data.{key}_dropout=0" for key in DROPPED))


# --- notation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key"),
    [("D minor", "D minor"), ("Dm", "D minor"), ("dmin", "D minor"), ("C# minor", "C# minor"), ("Db min", "C# minor"),
     ("B\u266d Major", "Bb major"), ("F sharp major", "F# major"), ("gb maj", "F# major"), ("D dorian", "D minor"),
     ("A_mixolydian", "A major"), ("a-flat major", "Ab major"), ("E harmonic minor", "E minor"), ("Bm", "B minor"),
     ("bb minor", "Bb minor"), ("cb major", "B major")],
)  # fmt: skip
def test_keys_are_read_as_people_write_them(text, key):
    assert KEYS[parse_key(text)] == key


@pytest.mark.parametrize("text", ["D", "minor", "H minor", "12", "", "D minor seven", "song-0001", "D moody"])
def test_text_that_is_no_key_is_refused_with_one_line(text):
    with pytest.raises(UserError, match="is no key: write a tonic and a mode, such as 'D minor'"):
        parse_key(text)


def test_classes_and_names_are_inverse():
    assert [parse_key(name) for name in KEYS] == list(range(24))
    assert [parse_metre(name) for name in METRES] == list(range(len(METRES)))
    assert all(beats_of(parse_metre(name)) == metre.beats for name, metre in BUILTIN_METRES.items())
    with pytest.raises(UserError, match=r"'11/8' is no known metre: choose from 2/4, 3/4"):
        parse_metre("11/8")


# --- bar position ---------------------------------------------------------------------------------------------------


def test_bar_position_is_linear_between_lines_with_one_bar_more_at_each_end():
    lines = torch.tensor([1.0, 3.0, 4.0], dtype=torch.float64)
    times = torch.tensor([-1.1, -1.0, 0.5, 1.0, 2.5, 3.0, 3.75, 4.5, 5.0, 9.0], dtype=torch.float64)
    bar, beat = bar_position(times, lines, beats=4)
    expected = [torch.nan, 0.0, 0.75, 0.0, 0.75, 0.0, 0.75, 0.5, torch.nan, torch.nan]
    torch.testing.assert_close(bar, torch.tensor(expected), equal_nan=True)
    torch.testing.assert_close(beat, torch.tensor(expected) * 4 % 1, equal_nan=True)
    assert bar_position(times, lines[:1], 4).isnan().all() and bar_position(times, lines[:0], 4).isnan().all()


@pytest.mark.parametrize("index", range(3))
def test_bar_position_of_an_excerpt_is_that_of_the_score(index):
    """Where the tempo is constant; the clock is the piece's own, the position in the bar is counted in its ticks."""
    piece = compose(3, index)
    start = 20.0
    truth = excerpt(piece, start, 40.0)
    times = torch.arange(0, 20, 0.04, dtype=torch.float64)
    found = bar_position(times, torch.tensor(truth["bars"], dtype=torch.float64), piece.metre.beats)
    ticks = (start + times) * piece.bpm / 60 * TICKS
    expected = torch.stack([ticks / piece.metre.bar % 1, ticks / TICKS % 1])
    slows = piece.ritardando
    steady = times < (piece.seconds(slows.first) - start if slows else 20.0)
    distance = (found - expected)[:, steady & ~found[0].isnan()].abs()
    assert torch.minimum(distance, 1 - distance).max() < 2e-3  # around the circle; the truth is rounded to 0.1 ms
    assert (~found[0].isnan())[steady].float().mean() > 0.9


def test_controls_of_a_clip_begin_on_a_bar_line():
    controls = Controls.create(2, 100, 25.0, bpm=120, key="D minor", metre="3/4")
    bar, beat = controls.bar_position[1]  # a bar of 1.5 s, 37.5 frames
    assert controls.bar_position.shape == (2, 2, 100) and bar[0] == 0 and beat[0] == 0 and bar[75] == 0
    frames = torch.arange(100)
    torch.testing.assert_close(bar, frames / 37.5 % 1, atol=1e-5, rtol=0)
    torch.testing.assert_close(beat, frames / 12.5 % 1, atol=1e-5, rtol=0)
    assert controls.bpm.tolist() == [120, 120] and controls.chroma is None
    assert [KEYS[k] for k in controls.key] == ["D minor"] * 2 and controls.metre.tolist() == [parse_metre("3/4")] * 2
    assert Controls.create(1, 10, 25.0, metre="3/4").bar_position is None  # the length of a bar is not known
    assert Controls.create(1, 10, 25.0) == Controls()


@pytest.mark.parametrize(
    ("given", "message"),
    [({"bpm": 0}, "bpm must be above 0 and at most 1000 beats per minute, got 0"), ({"bpm": float("nan")}, "got nan"),
     ({"bpm": 1e9, "metre": "3/4"}, "got 1000000000.0"),
     ({"key": "H dur"}, "'H dur' is no key"), ({"metre": "waltz"}, "'waltz' is no known metre")],
)  # fmt: skip
def test_values_that_are_no_controls_are_refused_with_one_line(given, message):
    with pytest.raises(UserError, match=message) as caught:
        Controls.create(1, 10, 25.0, **given)
    assert "\n" not in str(caught.value)


# --- store ----------------------------------------------------------------------------------------------------------


def annotated_row(index, **truth):
    return {"id": f"s{index}", "split": "train", "licence": "CC0-1.0", "duration": 5.0, "truth": truth}


def test_columns_of_a_store_come_from_the_annotations(tmp_path):
    rows = [annotated_row(0, key="D", mode="dorian", metre="6/8", bars=[0.5, 1.5]), annotated_row(1, bpm=90),
            annotated_row(2, key="Bb major")]  # fmt: skip
    rows[2]["truth"] = json.dumps(rows[2]["truth"])
    store = write_rows_store(tmp_path, rows)
    assert store.manifest["key"].to_pylist() == ["D minor", None, "Bb major"]
    assert store.manifest["metre"].to_pylist() == ["6/8", None, None]
    assert store.keys().tolist() == [parse_key("D minor"), -1, parse_key("Bb major")]
    assert store.metres().tolist() == [parse_metre("6/8"), -1, -1]
    assert store.bars(0).tolist() == [0.5, 1.5] and len(store.bars(1)) == 0 and store.has_bars()


@pytest.mark.parametrize(
    ("truth", "message"),
    [({"key": "D", "mode": "sad"}, "'D sad' is no key"), ({"metre": "4"}, "'4' is no known metre"),
     ({"bars": [1.0, 0.5]}, "bars must be rising"), ({"bars": "soon"}, "bars must be a list")],
)  # fmt: skip
def test_annotations_that_cannot_be_read_name_the_segment(tmp_path, truth, message):
    with pytest.raises(UserError, match=f"segment s0: {message}"):
        write_rows_store(tmp_path, [annotated_row(0, **truth)])


def test_a_piece_of_the_composer_fills_the_columns(tmp_path):
    piece = compose(0, 1)
    store = write_rows_store(tmp_path, [annotated_row(0, **excerpt(piece, 0.0, 20.0))])
    assert store.manifest["metre"].to_pylist() == [piece.metre.name]
    third = "major" if piece.truth["mode"] in ("major", "mixolydian") else "minor"
    assert store.keys().tolist() == [parse_key(f"{piece.truth['key']} {third}")]
    np.testing.assert_allclose(store.bars(0), [time for time in piece.truth["bars"] if time < 20])


def test_folder_reads_controls_of_its_tables(tmp_path, caplog):
    for name in "abc":
        (tmp_path / f"{name}.wav").touch()
    (tmp_path / "captions.csv").write_text(
        "path,bpm,Key,Time Signature,downbeats\na.wav,120,Dm,3/4,0.5 2 3.5\nb.wav,fast,song-1,11/8,2 1\nc.wav,,,,\n"
    )
    tracks = {track.id: track for track in folder.tracks(tmp_path, allow_unmatched=False)}
    truth = {"bpm": 120.0, "key": "D minor", "metre": "3/4", "bars": [0.5, 2.0, 3.5]}
    assert json.loads(tracks["a.wav"].truth) == truth and tracks["b.wav"].truth == tracks["c.wav"].truth == ""
    for value in ("bpm of 1 tracks is not read, such as 'fast'", "'song-1'", "'11/8'", "'2 1'"):
        assert value in caplog.text


def test_bars_of_a_track_are_counted_from_its_segments():
    truth = json.dumps({"bpm": 120.0, "bars": [0.5, 2.0, 3.5, 5.0, 6.5, 8.0]})
    assert json.loads(segment_truth(truth, 3.0, 3.0)) == {"bpm": 120.0, "bars": [-1.0, 0.5, 2.0, 3.5]}
    assert json.loads(segment_truth(truth, 0.0, 1.0))["bars"] == [0.5, 2.0]
    assert segment_truth("", 0.0, 1.0) is None


# --- training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("controls")
    return write_codes_store(root / "codes", codec=small_codec(root / "codec"))


def make_task(store, tmp_path, *overrides):
    return lm.LanguageModelTask(lm_config(store, tmp_path / "run", *TRAINED, *overrides))


def test_batch_has_the_key_the_metre_and_the_bar_position_of_its_crop(store, tmp_path):
    task, opened = make_task(store, tmp_path, "data.frames=9", *NEVER), open_store(store)
    rows = dict(zip(opened.manifest["id"].to_pylist(), range(len(opened)), strict=True))
    batch, firsts = task.loader("train", 16, 0, 1).batch(1), set()
    for index, name in enumerate(batch["ids"]):
        truth, mask = opened.annotations(rows[name]), batch["frame_mask"][index]
        key, metre, position = (getattr(batch["controls"], part)[index] for part in ("key", "metre", "bar_position"))
        if not truth:
            assert key == metre == -1 and position.isnan().all()
            continue
        assert KEYS[key] == truth["key"] and list(METRES)[metre] == truth["metre"]
        firsts.add(int(batch["first"][index]))
        times = (int(batch["first"][index]) + torch.arange(9, dtype=torch.float64)) / 25
        expected = (times - truth["bars"][0]) / (truth["bars"][1] - truth["bars"][0]) % 1
        torch.testing.assert_close(position[0][mask], expected[mask].float(), rtol=0, atol=1e-5)
        assert position[:, ~mask].isnan().all()
    assert len(firsts) > 2


def test_each_control_is_dropped_by_itself_and_by_the_item(store, tmp_path):
    rates = {"tempo": 0.2, "key": 0.4, "metre": 0.6, "bar_position": 0.8, "timing": 0.5}
    dropouts = (f"data.{key}_dropout={rate}" for key, rate in rates.items())
    task = make_task(store, tmp_path, *dropouts, "data.caption_dropout=0")
    items = [Item(epoch, epoch, 1, "s1", 0, FRAMES) for epoch in range(1500)]
    batch = {"frame_mask": torch.ones(1500, FRAMES, dtype=torch.bool)}

    def absent(split, chosen=items):
        found = task.controls.field(split)(chosen, {"frame_mask": batch["frame_mask"][: len(chosen)]})
        by_frame = (found.bar_position[:, 0, 5], found.timing[:, 0, 5], found.timing[:, 1, 5])
        return torch.stack([found.bpm.isnan(), found.key < 0, found.metre < 0, *(value.isnan() for value in by_frame)])

    dropped = absent("train")
    expected = torch.tensor([*rates.values(), rates["timing"]])
    torch.testing.assert_close(dropped.float().mean(1), expected, atol=0.04, rtol=0)
    assert torch.corrcoef(dropped.float()).fill_diagonal_(0).abs().max() < 0.1
    assert torch.equal(absent("train", items[700:900]), dropped[:, 700:900])
    assert not absent("valid").any()


def test_all_controls_are_dropped_with_the_caption(store, tmp_path):
    task = make_task(store, tmp_path, *NEVER[1:], "data.caption_dropout=0.5")
    batch = task.loader("train", 64, 0, 1).batch(0)
    controls, dropped = batch["controls"], torch.tensor([not caption for caption in batch["captions"]])
    assert 20 < dropped.sum() < 44
    assert controls.bpm[dropped].isnan().all() and (controls.key[dropped] < 0).all()
    assert controls.bar_position[dropped].isnan().all() and controls.timing[dropped].isnan().all()
    assert not controls.timing[~dropped][:, :, 0].isnan().any()


def test_timing_counts_from_the_start_of_the_track_to_its_end(store, tmp_path):
    task, opened = make_task(store, tmp_path, "data.frames=9", *NEVER), open_store(store)
    rows = dict(zip(opened.manifest["id"].to_pylist(), range(len(opened)), strict=True))
    batch = task.loader("train", 16, 0, 1).batch(1)
    for index, name in enumerate(batch["ids"]):
        number = int(name[1:])  # of the segment: it starts at half as many seconds, and its track ends 1 s after it
        start, rest = 0.5 * number, opened.manifest["duration"][rows[name]].as_py() + 1
        mask, found = batch["frame_mask"][index], batch["controls"].timing[index]
        times = (int(batch["first"][index]) + torch.arange(9)) / 25
        torch.testing.assert_close(found[:, mask], torch.stack([start + times, rest - times]).float()[:, mask])
        assert found[:, ~mask].isnan().all()
    assert len(set(opened.timing()[:, 0])) > 1


def strip_columns(store, names):
    """A store as an earlier version wrote it."""
    path = store / "manifest.parquet"
    pq.write_table(pq.read_table(path).drop_columns(names), path)
    info = json.loads((store / "store.json").read_text())
    info["files"]["manifest.parquet"] = file_entry(path)
    (store / "store.json").write_text(json.dumps(info))


def test_store_of_an_earlier_version_trains_without_the_new_controls(tmp_path):
    store = write_codes_store(tmp_path / "codes", codec=small_codec(tmp_path / "codec"))
    strip_columns(store, ["key", "metre", "bars"])
    task = lm.LanguageModelTask(lm_config(store, tmp_path / "run", "model.tempo=true"))
    assert task.loader("train", 4, 0, 1).batch(0)["controls"].bpm.shape == (4,)
    for key, column in (("key", "key"), ("metre", "metre"), ("bar_position", "bars")):
        with pytest.raises(UserError, match=f"states its {column}: set model.{key}=false, .* pack --root") as caught:
            lm.LanguageModelTask(lm_config(store, tmp_path / "run", f"model.{key}=true"))
        assert "\n" not in str(caught.value)


# --- models ---------------------------------------------------------------------------------------------------------


def make_controls(length=S):
    g = torch.Generator().manual_seed(5)
    position = torch.rand(3, 2, length, generator=g)
    position[0, :, 4:7] = torch.nan
    timing = 20 * torch.rand(3, 2, length, generator=g)
    timing[1, 0], timing[2, 1, :3] = torch.nan, torch.nan
    return Controls(
        torch.rand(3, 12, length, generator=g), torch.tensor([90.0, torch.nan, 131.0]), torch.tensor([3, 20, -1]),
        torch.tensor([-1, 2, 4]), position, timing,
    )  # fmt: skip


def changed(controls, field):
    """Another value for every item."""
    value = getattr(controls, field)
    given = {"chroma": lambda: value.roll(1, 1), "bpm": lambda: value.nan_to_num(100.0) * 1.3,
             "bar_position": lambda: (value.nan_to_num(0.0) + 0.25) % 1,
             "timing": lambda: value.nan_to_num(0.0) + 1.0}  # fmt: skip
    other = given[field]() if field in given else (value + 1) % 8
    return Controls(**{**vars(controls), field: other})


def build(name="ours", **changes):
    return randomised(small_token_lm(**{**VARIANTS[name], **ALL, **changes}).double().eval())


@pytest.fixture
def codes():
    return torch.randint(V + 1, (3, K, S), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["ours", "cross transformer", "adaln"])
@pytest.mark.parametrize("field", ["bpm", "key", "metre", "bar_position", "timing"])
def test_each_control_changes_every_item(codes, name, field):
    model, text, controls = build(name), captions(4, 0, 7), make_controls()
    difference = model(codes, text, controls=controls) - model(codes, text, controls=changed(controls, field))
    assert difference.abs().amax((1, 2, 3)).min() > 1e-4


def test_bar_position_of_a_frame_changes_no_earlier_logits(codes):
    model, controls = build(), make_controls()
    position = controls.bar_position.clone()
    position[:, :, 9] = (position[:, :, 9] + 0.4) % 1
    difference = model(codes, None, controls=controls) - model(
        codes, None, controls=Controls(**{**vars(controls), "bar_position": position})
    )
    assert_equal(difference[:, :, :9], torch.zeros_like(difference[:, :, :9]))
    assert difference[:, :, 9].abs().amax((1, 2)).min() > 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_equals_prefill_and_steps_with_all_controls(codes, name):
    model, text, controls = build(name), captions(4, 0, 7), make_controls()
    expected, state = model(codes, text, controls=controls), model.init_state(3)
    found = [model.prefill(codes[..., :9], text, state, controls.select_frames(slice(9)))]
    found += [model.step(codes[..., s], state, controls.select_frames(slice(s, s + 1))) for s in range(9, S)]
    assert_equal(torch.stack(found, 2), expected[:, :, 8:])


@pytest.mark.parametrize("field", ["key", "metre", "bar_position", "timing"])
def test_denoiser_follows_each_control(field):
    model = randomised(denoiser(**ALL).eval())
    given, noisy = conditions(5, controls=make_controls(5)), torch.randn(3, model.config.noisy_channels, 5)
    other = conditions(5, controls=changed(make_controls(5), field))
    with torch.no_grad():
        difference = model(noisy, torch.full((3,), 0.5), given) - model(noisy, torch.full((3,), 0.5), other)
    assert difference.abs().amax((1, 2)).min() > 1e-5


def test_absent_values_train_the_null_vector_only():
    cases = [(ClassEmbedding(24, 6), torch.tensor([3, 7]), torch.tensor([-1, -1])),
             (BarPositionEmbedding(6), torch.rand(2, 2, 5), torch.full((2, 2, 5), torch.nan))]  # fmt: skip
    for module, present, absent in cases:
        for value, trains_null in ((present, False), (absent, True), (None, True)):
            module.zero_grad()
            module(value).square().add(module(value)).sum().backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
            assert bool(module.null.grad is not None and module.null.grad.abs().sum()) == trains_null
            others = [p.grad for name, p in module.named_parameters() if name != "null"]
            assert bool(sum(0 if g is None else g.abs().sum() for g in others)) != trains_null


@pytest.mark.parametrize("key", ALL)
def test_model_that_was_not_trained_with_a_control_refuses_it_in_one_line(codes, key):
    with pytest.raises(UserError, match=f"was not trained with {key}: leave it out, or set model.{key}=true"):
        build(**{key: False})(codes, None, controls=make_controls())


def test_config_of_a_model_with_all_controls_composes():
    from ssmttm import config

    model = config.load("model=tiny_controls").model
    assert all(OmegaConf.select(model, key) is True for key in ALL if key != "chroma")


def lesson(field):
    """Controls of 16 items of 8 frames, and codes that they decide, [16, 1, 8]."""
    if field == "bar_position":
        phases = torch.rand(16, 2, 8)
        return Controls(bar_position=phases), (4 * phases[:, :1]).long()
    classes = torch.randint(8, (16,))
    shuffled = (classes[:, None] + 3 * torch.arange(8)) % 8  # another code in each frame
    return Controls(**{field: classes}), shuffled[:, None]


@pytest.mark.parametrize("field", ["key", "bar_position"])
def test_a_control_is_learnt(field):
    """Codes that it decides are predictable from the first frame on, with it only."""
    losses = {}
    for supported in (True, False):
        torch.manual_seed(0)
        model = small_token_lm(n_codebooks=1, **{field: supported})
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(35):
            controls, codes = lesson(field)
            shifted = torch.cat([torch.full((16, 1, 1), V), codes[..., :-1]], -1)
            logits = model(shifted, None, controls=controls if supported else None)
            of_frame = torch.nn.functional.cross_entropy(logits.flatten(0, 2), codes.flatten(), reduction="none")
            loss = of_frame.view(16, 8)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
        losses[supported] = loss[:, 0].mean().item()
    assert losses[True] < 0.6 * losses[False]


# --- a caption that contradicts a control ---------------------------------------------------------------------------


def test_swapped_captions_are_of_items_that_keep_all_their_controls(store, tmp_path):
    task, opened = make_task(store, tmp_path, "data.caption_swap=0.4", "data.key_dropout=0.5"), open_store(store)
    loader, swapped, annotated = task.loader("train", 20, 0, 1), 0, 0
    rows = dict(zip(opened.manifest["id"].to_pylist(), range(len(opened)), strict=True))
    for n in range(20):
        batch = loader.batch(n)
        for index, name in enumerate(batch["ids"]):
            own, row = batch["captions"][index] in ("", *opened.captions(rows[name])), rows[name]
            annotated += bool(opened.annotations(row))
            if not own:
                swapped += 1
                controls = batch["controls"].select_rows(slice(index, index + 1))
                assert controls.key >= 0 and controls.metre >= 0 and controls.bpm.isfinite()
                assert controls.bar_position[0, :, batch["frame_mask"][index]].isfinite().any()
    expected = 0.4 * 0.9 * 5 / 6  # captions are dropped too, and of 6 captions one is the own one
    assert swapped / annotated == pytest.approx(expected, abs=0.08)
    valid = task.loader("valid", 4, 0, 1).batch(0)
    assert [[caption] for caption in valid["captions"]] == [opened.captions(rows[name]) for name in valid["ids"]]


def share_that_follows_the_tempo(swap):
    """Of a small model whose next code depends on the tempo, which the caption tells too; here the two disagree."""
    torch.manual_seed(0)
    words, tempi = torch.randn(3, 2, 12), torch.tensor([60.0, 110.0, 170.0])
    model = small_token_lm(n_codebooks=1, tempo=True, conditioning="cross_attention")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

    def logits(codes, of_text, of_tempo, dropped):
        bpm = (tempi[of_tempo] * (0.95 + 0.1 * torch.rand(len(codes)))).masked_fill(dropped, torch.nan)
        text = TextCondition(words[of_text], torch.ones(len(codes), 2, dtype=torch.bool))
        return model(codes, text, controls=Controls(bpm=bpm))[:, 0]

    for _ in range(90):
        pace = torch.randint(3, (24,))
        codes = torch.randint(V, (24, 1, 1)) + (3 * (pace + 1))[:, None, None] * torch.arange(8)
        swapped = torch.rand(24) < swap
        of_text = torch.where(swapped, torch.randint(3, (24,)), pace)
        found = logits(codes[..., :-1] % V, of_text, pace, (torch.rand(24) < 0.3) & ~swapped)
        loss = torch.nn.functional.cross_entropy(found.flatten(0, 1), (codes[:, 0, 1:] % V).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pace, first = torch.arange(96) % 3, torch.arange(96)[:, None, None] % V
    with torch.no_grad():
        found = logits(first, (pace + 1) % 3, pace, torch.zeros(96, dtype=torch.bool))[:, 0].argmax(-1)
    return float((found == (first[:, 0, 0] + 3 * (pace + 1)) % V).float().mean())


def test_tempo_counts_against_a_caption_that_contradicts_it():
    """With swapped captions in the training; without, the caption counts."""
    assert share_that_follows_the_tempo(swap=0.25) > 0.5 > 0.2 > share_that_follows_the_tempo(swap=0.0)
