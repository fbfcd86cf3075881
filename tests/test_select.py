"""Track selection: duplicates, leakage, splits; independent of the order of the rows."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.sources.evaluation_sets import EvaluationSet
from data_prep.stages.selection.splits import assign_splits
from data_prep.stages.selection.tracks import Selection, select_tracks
from data_prep.tables import RECORDINGS, TRACKS
from ssmttm.data.splits import SPLITS, split_by_hash

LENGTH = 200  # words of a fingerprint: 20 s


def words(number, length=LENGTH):
    return np.random.default_rng(number).integers(1, 2**32, length, dtype=np.uint32)


def corrupt(fingerprint, fraction=0.1):
    """Flip half of the bits of a fraction of the words: a bit error rate of half the fraction."""
    out = fingerprint.copy()
    out[:: round(1 / fraction)] ^= np.uint32(0x0F0F0F0F)
    return out


class Corpus:
    """Rows of tracks and recordings."""

    def __init__(self):
        self.tracks, self.recordings, self.fingerprints = [], [], []

    def add(self, name, fingerprint, file=None, pcm=None, seconds=20.0, **metadata):
        self.fingerprints.append(words(fingerprint) if isinstance(fingerprint, int) else fingerprint)
        file = file or f"file of {name}"
        pcm = pcm or f"pcm of {file}"
        self.recordings.append({"id": name, "file_sha256": file, "pcm_sha256": pcm, "seconds": seconds})
        blank = {column.name: [] if pa.types.is_list(column.type) else "" for column in TRACKS}
        self.tracks.append(blank | {"id": name, "path": name, "licence": "CC-BY-4.0", **metadata})
        return self

    def select(self, evaluation_sets=(), seed=None) -> Selection:
        rng = np.random.default_rng(seed)
        rows = [range(len(self.tracks)) if seed is None else rng.permutation(len(self.tracks)) for _ in range(2)]
        tracks = pa.Table.from_pylist([self.tracks[i] for i in rows[0]], TRACKS)
        recordings = pa.Table.from_pylist([self.recordings[i] for i in rows[1]], RECORDINGS)
        return select_tracks(tracks, recordings, (self.fingerprints[i] for i in rows[1]), evaluation_sets)


def reasons(selection):
    return {rejection.item: (rejection.kind, rejection.reason) for rejection in selection.rejections}


def split_by_id(selection):
    return dict(zip(selection.kept["id"].to_pylist(), selection.kept["split"].to_pylist(), strict=True))


def test_select_rejects_same_file_same_samples_and_near_duplicates():
    corpus = Corpus().add("a", 1, captions=["x"]).add("b", 1, file="file of a").add("c", 1, pcm="pcm of file of a")
    corpus.add("d", corrupt(words(1))).add("e", 2)
    found = corpus.select()
    assert found.kept["id"].to_pylist() == ["a", "e"]
    assert reasons(found) == {
        "b": ("duplicate", "it is the same file as a"),
        "c": ("duplicate", "it is the same samples as a (only tags or format differ)"),
        "d": ("duplicate", "it is a near-duplicate of a (bit error rate 0.05 over 20 s)"),
    }
    assert found.report["duplicates"] == {"same file": 1, "same samples": 1, "near-duplicate": 1}
    assert (found.report["tracks"], found.report["kept"]) == (5, 2)


BETTER = [
    ({"captions": ["x"]}, {"title": "t", "author": "a", "tags": ["genre---rock"]}),
    ({"title": "t"}, {"licence": "CC0-1.0"}),
    ({"licence": "CC0-1.0"}, {"licence": "CC-BY-NC-4.0", "seconds": 25.0}),
    ({"licence": "CC-BY-3.0"}, {"licence": "of my own"}),
    ({"seconds": 25.0}, {}),
    ({}, {"name": "z"}),
]


@pytest.mark.parametrize(("better", "worse"), BETTER)
@pytest.mark.parametrize("same", ["file", "audio"])
def test_select_keeps_the_better_described_copy(better, worse, same):
    for swapped in (False, True):
        corpus = Corpus()
        for row in [worse, better] if swapped else [better, worse]:
            metadata = {"name": "m" if row is better else "y", "file": "f" if same == "file" else None} | row
            if row is worse and better:
                metadata["name"] = "a"  # the first id
            corpus.add(fingerprint=words(1) if row is better else corrupt(words(1)), **metadata)
        assert corpus.select().kept["id"].to_pylist() == ["m"], swapped


def test_select_rejects_clip_of_a_longer_track():
    whole = words(1, 2_400)
    found = Corpus().add("clip", whole[900:1_000].copy(), seconds=10).add("whole", whole, seconds=240).select()
    assert reasons(found) == {
        "clip": ("duplicate", "it is a near-duplicate of whole (bit error rate 0.00 over 10 s)")
    }


def test_select_keeps_tracks_that_share_audio_in_one_split():
    """Half of each recording is the same."""
    corpus = Corpus()
    for number in range(40):
        common = words(1_000 + number, 150)
        corpus.add(f"{number}a", np.concatenate([words(number, 150), common]))
        corpus.add(f"{number}b", np.concatenate([common, words(500 + number, 150)]))
    found = corpus.select()
    splits = split_by_id(found)
    assert len(splits) == 80 and len(set(splits.values())) == 3
    assert all(splits[f"{number}a"] == splits[f"{number}b"] for number in range(40))
    assert found.report["suspected_duplicates"]["pairs"] == 40


def test_select_rejects_duplicates_of_kept_tracks_only():
    """The whole track duplicates the captioned clip 1; clip 2 duplicates only the rejected whole track."""
    whole = words(1, 600)
    corpus = Corpus().add("clip 1", whole[:200].copy(), captions=["x"], title="t").add("whole", whole, captions=["x"])
    found = corpus.add("clip 2", whole[400:].copy()).select()
    assert found.kept["id"].to_pylist() == ["clip 1", "clip 2"]


def test_select_keeps_one_of_many_copies():
    corpus = Corpus().add("z", 1, captions=["x"])
    for number in range(40):
        corpus.add(f"copy {number}", corrupt(words(1)[number % 7 :], 0.08))
    assert corpus.select().kept["id"].to_pylist() == ["z"]
    evaluation_set = EvaluationSet("set", audio=[Path("x.wav")], fingerprints=[words(1)])
    assert len(corpus.select([evaluation_set]).kept) == 0


def test_select_keeps_silent_tracks():
    corpus = Corpus()
    for name in "abc":
        corpus.add(name, np.zeros(LENGTH, np.uint32))
    assert len(corpus.select().kept) == 3


def test_select_excludes_evaluation_sets_by_work_artist_and_audio():
    corpus = Corpus().add("a", 1, work="jamendo:1").add("b", corrupt(words(1)))
    corpus.add("c", 2, artist="jamendo:artist:7").add("d", 3).add("e", corrupt(words(3)))
    corpus.add("f", 4, work="jamendo:9", artist="x").add("g", 3, file="file of d")
    by_name = EvaluationSet("Song Describer", works={"jamendo:1", ""}, artists={"jamendo:artist:7", ""})
    files = [Path("x/one.wav"), Path("x/two.wav")]
    by_audio = EvaluationSet("MusicCaps", audio=files, fingerprints=[words(3)[50:150], words(77)])
    found = corpus.select([by_name, by_audio])
    assert found.kept["id"].to_pylist() == ["f"]
    assert reasons(found) == {
        "a": ("evaluation", "its work jamendo:1 is in Song Describer"),
        "b": ("evaluation", "it is the same recording as a, which is excluded: "
              "its work jamendo:1 is in Song Describer"),
        "c": ("evaluation", "its artist jamendo:artist:7 is in Song Describer"),
        "d": ("evaluation", "its audio matches one.wav of MusicCaps (bit error rate 0.00 over 10 s)"),
        "e": ("evaluation", "its audio matches one.wav of MusicCaps (bit error rate 0.05 over 10 s)"),
        "g": ("evaluation", "it is the same recording as d, which is excluded: "
              "its audio matches one.wav of MusicCaps (bit error rate 0.00 over 10 s)"),
    }  # fmt: skip
    first, second = found.report["evaluation"]
    assert (first["name"], sorted(first["left_out"])) == ("Song Describer", ["a", "b", "c"])
    assert (second["fingerprinted"], sorted(second["left_out"])) == (2, ["d", "e", "g"])


def test_select_excludes_tracks_that_share_audio_with_a_leak():
    half, other = words(1, 150), words(2, 150)
    corpus = Corpus().add("a", np.concatenate([half, other]), work="w").add("b", np.concatenate([words(3, 150), half]))
    corpus.add("b again", corpus.fingerprints[1], file="file of b")
    corpus.add("c", np.concatenate([words(3, 150), words(4, 150)]))
    found = corpus.select([EvaluationSet("Song Describer", works={"w"})])
    assert found.kept["id"].to_pylist() == ["c"]
    why = "it shares audio with a, which is excluded: its work w is in Song Describer"
    assert reasons(found)["b"] == reasons(found)["b again"] == ("evaluation", why)


def test_select_with_evaluation_audio_without_fingerprint():
    broken = EvaluationSet("broken", audio=[Path("broken.wav")], fingerprints=[np.empty(0, np.uint32)])
    unread = EvaluationSet("unread", audio=[Path("unread.wav")])
    assert len(Corpus().add("a", 1).select([broken, unread]).kept) == 1


def test_select_ignores_tracks_without_recording():
    corpus = Corpus().add("a", 1).add("b", 1)
    corpus.recordings, corpus.fingerprints = corpus.recordings[:1], corpus.fingerprints[:1]
    recordings = pa.Table.from_pylist(corpus.recordings, RECORDINGS)
    found = select_tracks(pa.Table.from_pylist(corpus.tracks, TRACKS), recordings, corpus.fingerprints)
    assert found.kept["id"].to_pylist() == ["a"] and not found.rejections
    nothing = select_tracks(TRACKS.empty_table(), RECORDINGS.empty_table(), [])
    assert len(nothing.kept) == 0 and nothing.report["kept"] == 0


def test_splits_of_the_source_apply_to_the_artist():
    corpus = Corpus().add("a", 1, artist="A", split="valid").add("b", 2, artist="A")
    corpus.add("c", 3, artist="B", split="train").add("d", 4, artist="B", split="test").add("e", 5, artist="B")
    splits = split_by_id(corpus.select())
    assert splits == {"a": "valid", "b": "valid", "c": "train", "d": "test", "e": "test"}


def test_splits_of_a_source_with_train_only_stay_train():
    corpus = Corpus()
    for number in range(5):
        corpus.add(str(number), number, split="train")
    assert set(split_by_id(corpus.select()).values()) == {"train"}


@pytest.mark.parametrize("artists", [1, 2, 3, 8])
@pytest.mark.parametrize("tracks", [1, 2, 3, 5, 12])
def test_splits_of_small_corpora_are_not_empty(artists, tracks):
    for trial in range(10):
        corpus = Corpus()
        for number in range(tracks):
            corpus.add(f"{trial} {number}", number, artist=f"{trial} artist {number % artists}")
        found = corpus.select()
        assert set(split_by_id(found).values()) == set(SPLITS[:tracks])
        assert (found.report["split_by"] == "artist") == (min(artists, tracks) >= min(3, tracks))


def test_splits_put_the_largest_artist_into_train():
    for trial in range(30):
        corpus = Corpus()
        for number in range(12):
            corpus.add(str(number), number, artist=f"{trial} {number if number < 2 else 'many'}")
        counts = corpus.select().report["splits"]
        assert counts == {"train": 10, "valid": 1, "test": 1}


def test_assign_splits_equals_split_by_hash():
    splits = [split_by_hash(str(index), hash_bytes=4) for index in range(4000)]
    assert [splits.count(name) / 4000 for name in SPLITS] == pytest.approx([0.9, 0.05, 0.05], abs=0.015)
    keys = [str(index) for index in range(500)]
    assert assign_splits(keys) == {key: split_by_hash(key, hash_bytes=4) for key in keys}


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=4), st.integers(1, 9), max_size=8), st.sets(st.sampled_from(SPLITS)))
def test_assign_splits_fills_needed_splits(sizes, given_splits):
    splits = assign_splits(reversed(list(sizes)), sizes, given_splits)
    assert set(splits) == set(sizes)
    needed = [name for name in SPLITS if name not in given_splits][: len(sizes)]
    assert set(needed) <= set(splits.values()) <= {*needed, *given_splits} or len(sizes) > len(needed)


@st.composite
def corpora(draw):
    """Few recordings, artists and works, so that all cases occur."""
    corpus = Corpus()
    for number in range(draw(st.integers(0, 14))):
        number_of_recording, version = draw(st.integers(0, 8)), draw(st.integers(0, 3))
        base = words(number_of_recording)
        fingerprint = {0: base, 1: base, 2: corrupt(base), 3: corrupt(base[40:], 0.2)}[version]
        corpus.add(
            f"t{number}", fingerprint, file=f"{number_of_recording} {version} {draw(st.integers(0, 1))}",
            pcm=f"{number_of_recording} {max(version, 1)}",
            artist=draw(st.sampled_from(["", "A", "B", "C", "D", "E"])), work=draw(st.sampled_from(["", "u", "v"])),
            split=draw(st.sampled_from(["", "", "", "", *SPLITS])) if draw(st.booleans()) else "",
            captions=draw(st.sampled_from([[], ["x"]])), title=draw(st.sampled_from(["", "t"])),
        )  # fmt: skip
    works, artists = draw(st.sets(st.sampled_from("uw"))), draw(st.sets(st.sampled_from("EF")))
    fingerprints = [words(draw(st.sampled_from([0, 99])))]
    return corpus, [EvaluationSet("set", works, artists, [Path("x.wav")], fingerprints)]


@settings(max_examples=30, deadline=None)
@given(corpora(), st.integers(0, 9))
def test_select_invariants(example, seed):
    corpus, evaluation_sets = example
    found = corpus.select(evaluation_sets)
    splits, rejected = split_by_id(found), reasons(found)
    rows = {track["id"]: (track, recording, words) for track, recording, words in
            zip(corpus.tracks, corpus.recordings, corpus.fingerprints, strict=True)}  # fmt: skip

    assert splits.keys() | rejected.keys() == rows.keys() and not splits.keys() & rejected.keys()
    for name in splits:
        track = rows[name][0]
        assert track["work"] not in evaluation_sets[0].works and track["artist"] not in evaluation_sets[0].artists
    assert len({rows[name][1]["pcm_sha256"].split()[0] for name in splits}) == len(splits)  # one of each recording

    again = corpus.select(evaluation_sets, seed)
    assert (again.kept, again.rejections, again.report) == (found.kept, found.rejections, found.report)

    rest = Corpus()
    for name in splits:
        track, recording, fingerprint = rows[name]
        rest.tracks.append(track), rest.recordings.append(recording), rest.fingerprints.append(fingerprint)
    assert rest.select(evaluation_sets).kept == found.kept

    sets = {}
    for name, split in splits.items():
        track = rows[name][0]
        if not track["split"] and track["artist"]:
            sets.setdefault(track["artist"], set()).add(split)
        assert track["split"] in ("", split)
    assert found.report["split_by"] != "artist" or all(len(of_one) == 1 for of_one in sets.values())
