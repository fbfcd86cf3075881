"""Every recording once, nothing of an evaluation set, artists in one split; whatever the order of the rows."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.stages.select import Reference, Selection, select, splits_of
from data_prep.tables import SOUNDS, TRACKS
from ssmttm.data.splits import SPLITS, split_by_hash

LENGTH = 200  # words of a sound: 20 s


@dataclass
class Names:
    """An evaluation set."""

    name: str = "Song Describer"
    works: set = field(default_factory=set)
    artists: set = field(default_factory=set)
    audio: list = field(default_factory=list)


def words(number, length=LENGTH):
    return np.random.default_rng(number).integers(1, 2**32, length, dtype=np.uint32)


def spoilt(sound, share=0.1):
    """Every so manieth word all wrong on half its bits: a bit error rate of half the share."""
    out = sound.copy()
    out[:: round(1 / share)] ^= np.uint32(0x0F0F0F0F)
    return out


class Corpus:
    """Tracks as a table is made of them."""

    def __init__(self):
        self.tracks, self.sounds, self.prints = [], [], []

    def add(self, name, sound, file=None, pcm=None, seconds=20.0, **known):
        self.prints.append(words(sound) if isinstance(sound, int) else sound)
        file = file or f"file of {name}"
        self.sounds.append({"id": name, "file_sha256": file, "pcm_sha256": pcm or f"pcm of {file}", "seconds": seconds})
        blank = {column.name: [] if pa.types.is_list(column.type) else "" for column in TRACKS}
        self.tracks.append(blank | {"id": name, "path": name, "licence": "CC-BY-4.0", **known})
        return self

    def select(self, references=(), seed=None) -> Selection:
        rng = np.random.default_rng(seed)
        rows = [range(len(self.tracks)) if seed is None else rng.permutation(len(self.tracks)) for _ in range(2)]
        tracks = pa.Table.from_pylist([self.tracks[i] for i in rows[0]], TRACKS)
        sounds = pa.Table.from_pylist([self.sounds[i] for i in rows[1]], SOUNDS)
        return select(tracks, sounds, (self.prints[i] for i in rows[1]), references)


def reasons(selection):
    return {rejection.item: (rejection.kind, rejection.reason) for rejection in selection.rejections}


def split_by_id(selection):
    return dict(zip(selection.kept["id"].to_pylist(), selection.kept["split"].to_pylist(), strict=True))


def test_the_three_kinds_of_duplicates():
    corpus = Corpus().add("a", 1, captions=["x"]).add("b", 1, file="file of a").add("c", 1, pcm="pcm of file of a")
    corpus.add("d", spoilt(words(1))).add("e", 2)
    found = corpus.select()
    assert found.kept["id"].to_pylist() == ["a", "e"]
    assert reasons(found) == {
        "b": ("duplicate", "it is the same file as a"),
        "c": ("duplicate", "it is the same sound as a (only its tags or its format differ)"),
        "d": ("duplicate", "it is nearly the same sound as a (bit error rate 0.05 over 20 s)"),
    }
    assert found.report["duplicates"] == {"same file": 1, "same sound": 1, "nearly the same sound": 1}
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
@pytest.mark.parametrize("same", ["file", "sound"])
def test_the_better_described_one_stays(better, worse, same):
    for swapped in (False, True):
        corpus = Corpus()
        for known in [worse, better] if swapped else [better, worse]:
            told = {"name": "m" if known is better else "y", "file": "f" if same == "file" else None} | known
            if known is worse and better:
                told["name"] = "a"  # the id alone would let it stay
            corpus.add(sound=words(1) if known is better else spoilt(words(1)), **told)
        assert corpus.select().kept["id"].to_pylist() == ["m"], swapped


def test_a_clip_of_a_longer_track():
    whole = words(1, 2_400)
    found = Corpus().add("clip", whole[900:1_000].copy(), seconds=10).add("whole", whole, seconds=240).select()
    assert reasons(found) == {
        "clip": ("duplicate", "it is nearly the same sound as whole (bit error rate 0.00 over 10 s)")
    }


def test_a_shared_part_is_no_duplicate_but_stays_in_one_split():
    """Half of each sound is the same: both stay, together."""
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


def test_nothing_is_left_out_for_one_that_goes_itself():
    """Two clips of one long track: the long one goes, for a clip of it has captions, and the other clip stays."""
    whole = words(1, 600)
    corpus = Corpus().add("clip 1", whole[:200].copy(), captions=["x"], title="t").add("whole", whole, captions=["x"])
    found = corpus.add("clip 2", whole[400:].copy()).select()
    assert found.kept["id"].to_pylist() == ["clip 1", "clip 2"]


def test_many_copies_of_one_recording():
    corpus = Corpus().add("z", 1, captions=["x"])
    for number in range(40):
        corpus.add(f"copy {number}", spoilt(words(1)[number % 7 :], 0.08))
    assert corpus.select().kept["id"].to_pylist() == ["z"]
    reference = Reference(Names(audio=[Path("x.wav")]), [words(1)])
    assert len(corpus.select([reference]).kept) == 0


def test_silence_is_no_duplicate():
    corpus = Corpus()
    for name in "abc":
        corpus.add(name, np.zeros(LENGTH, np.uint32))
    assert len(corpus.select().kept) == 3


def test_evaluation_sets_are_kept_out():
    corpus = Corpus().add("a", 1, work="jamendo:1").add("b", spoilt(words(1)))
    corpus.add("c", 2, artist="jamendo:artist:7").add("d", 3).add("e", spoilt(words(3)))
    corpus.add("f", 4, work="jamendo:9", artist="x").add("g", 3, file="file of d")
    by_name = Reference(Names(works={"jamendo:1", ""}, artists={"jamendo:artist:7", ""}))
    files = [Path("x/one.wav"), Path("x/two.wav")]
    by_sound = Reference(Names("MusicCaps", audio=files), [words(3)[50:150], words(77)])
    found = corpus.select([by_name, by_sound])
    assert found.kept["id"].to_pylist() == ["f"]
    assert reasons(found) == {
        "a": ("evaluation", "its work jamendo:1 is in Song Describer"),
        "b": ("evaluation", "it is the same recording as a, which is left out: "
              "its work jamendo:1 is in Song Describer"),
        "c": ("evaluation", "its artist jamendo:artist:7 is in Song Describer"),
        "d": ("evaluation", "it sounds like one.wav of MusicCaps (bit error rate 0.00 over 10 s)"),
        "e": ("evaluation", "it sounds like one.wav of MusicCaps (bit error rate 0.05 over 10 s)"),
        "g": ("evaluation", "it is the same recording as d, which is left out: "
              "it sounds like one.wav of MusicCaps (bit error rate 0.00 over 10 s)"),
    }  # fmt: skip
    first, second = found.report["evaluation"]
    assert (first["name"], sorted(first["left_out"])) == ("Song Describer", ["a", "b", "c"])
    assert (second["heard"], sorted(second["left_out"])) == (2, ["d", "e", "g"])


def test_what_shares_some_sound_with_an_evaluation_set_is_kept_out():
    half, other = words(1, 150), words(2, 150)
    corpus = Corpus().add("a", np.concatenate([half, other]), work="w").add("b", np.concatenate([words(3, 150), half]))
    corpus.add("b again", corpus.prints[1], file="file of b").add("c", np.concatenate([words(3, 150), words(4, 150)]))
    found = corpus.select([Reference(Names(works={"w"}))])
    assert found.kept["id"].to_pylist() == ["c"]
    why = "it shares some sound with a, which is left out: its work w is in Song Describer"
    assert reasons(found)["b"] == reasons(found)["b again"] == ("evaluation", why)


def test_a_reference_that_cannot_be_heard():
    reference = Reference(Names(audio=[Path("broken.wav")]), [np.empty(0, np.uint32)])
    assert len(Corpus().add("a", 1).select([reference, Reference(Names(audio=[Path("not heard.wav")]))]).kept) == 1


def test_tracks_without_a_sound_are_no_matter():
    corpus = Corpus().add("a", 1).add("b", 1)
    corpus.sounds, corpus.prints = corpus.sounds[:1], corpus.prints[:1]
    sounds = pa.Table.from_pylist(corpus.sounds, SOUNDS)
    found = select(pa.Table.from_pylist(corpus.tracks, TRACKS), sounds, corpus.prints)
    assert found.kept["id"].to_pylist() == ["a"] and not found.rejections
    nothing = select(TRACKS.empty_table(), SOUNDS.empty_table(), [])
    assert len(nothing.kept) == 0 and nothing.report["kept"] == 0


def test_a_sources_own_split_holds_and_draws_the_artist_along():
    corpus = Corpus().add("a", 1, artist="A", split="valid").add("b", 2, artist="A")
    corpus.add("c", 3, artist="B", split="train").add("d", 4, artist="B", split="test").add("e", 5, artist="B")
    splits = split_by_id(corpus.select())
    assert splits == {"a": "valid", "b": "valid", "c": "train", "d": "test", "e": "test"}


def test_a_source_that_states_train_alone_gets_no_other_split():
    corpus = Corpus()
    for number in range(5):
        corpus.add(str(number), number, split="train")
    assert set(split_by_id(corpus.select()).values()) == {"train"}


@pytest.mark.parametrize("artists", [1, 2, 3, 8])
@pytest.mark.parametrize("tracks", [1, 2, 3, 5, 12])
def test_small_corpora_have_every_split(artists, tracks):
    for trial in range(10):
        corpus = Corpus()
        for number in range(tracks):
            corpus.add(f"{trial} {number}", number, artist=f"{trial} artist {number % artists}")
        found = corpus.select()
        assert set(split_by_id(found).values()) == set(SPLITS[:tracks])
        assert (found.report["split_by"] == "artist") == (min(artists, tracks) >= min(3, tracks))


def test_train_gets_the_artist_with_most_tracks():
    for trial in range(30):
        corpus = Corpus()
        for number in range(12):
            corpus.add(str(number), number, artist=f"{trial} {number if number < 2 else 'many'}")
        counts = corpus.select().report["splits"]
        assert counts == {"train": 10, "valid": 1, "test": 1}


def test_splits_are_by_hash():
    splits = [split_by_hash(str(index), hash_bytes=4) for index in range(4000)]
    assert [splits.count(name) / 4000 for name in SPLITS] == pytest.approx([0.9, 0.05, 0.05], abs=0.015)
    keys = [str(index) for index in range(500)]
    assert splits_of(keys) == {key: split_by_hash(key, hash_bytes=4) for key in keys}


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=4), st.integers(1, 9), max_size=8), st.sets(st.sampled_from(SPLITS)))
def test_splits_of(sizes, given_splits):
    splits = splits_of(reversed(list(sizes)), sizes, given_splits)
    assert set(splits) == set(sizes)
    needed = [name for name in SPLITS if name not in given_splits][: len(sizes)]
    assert set(needed) <= set(splits.values()) <= {*needed, *given_splits} or len(sizes) > len(needed)


@st.composite
def corpora(draw):
    """Few sounds, artists and works, so that everything meets."""
    corpus = Corpus()
    for number in range(draw(st.integers(0, 14))):
        sound, version = draw(st.integers(0, 8)), draw(st.integers(0, 3))
        base = words(sound)
        heard = {0: base, 1: base, 2: spoilt(base), 3: spoilt(base[40:], 0.2)}[version]
        corpus.add(
            f"t{number}", heard, file=f"{sound} {version} {draw(st.integers(0, 1))}", pcm=f"{sound} {max(version, 1)}",
            artist=draw(st.sampled_from(["", "A", "B", "C", "D", "E"])), work=draw(st.sampled_from(["", "u", "v"])),
            split=draw(st.sampled_from(["", "", "", "", *SPLITS])) if draw(st.booleans()) else "",
            captions=draw(st.sampled_from([[], ["x"]])), title=draw(st.sampled_from(["", "t"])),
        )  # fmt: skip
    chosen = {"works": draw(st.sets(st.sampled_from("uw"))), "artists": draw(st.sets(st.sampled_from("EF")))}
    return corpus, [Reference(Names(**chosen, audio=[Path("x.wav")]), [words(draw(st.sampled_from([0, 99])))])]


@settings(max_examples=30, deadline=None)
@given(corpora(), st.integers(0, 9))
def test_what_always_holds(made, seed):
    corpus, references = made
    found = corpus.select(references)
    splits, rejected = split_by_id(found), reasons(found)
    facts = {track["id"]: (track, sound, words) for track, sound, words in
             zip(corpus.tracks, corpus.sounds, corpus.prints, strict=True)}  # fmt: skip

    assert splits.keys() | rejected.keys() == facts.keys() and not splits.keys() & rejected.keys()
    for name in splits:
        track = facts[name][0]
        assert track["work"] not in references[0].set.works and track["artist"] not in references[0].set.artists
    assert len({facts[name][1]["pcm_sha256"].split()[0] for name in splits}) == len(splits)  # one of each recording

    again = corpus.select(references, seed)
    assert (again.kept, again.rejections, again.report) == (found.kept, found.rejections, found.report)

    rest = Corpus()
    for name in splits:
        track, sound, heard = facts[name]
        rest.tracks.append(track), rest.sounds.append(sound), rest.prints.append(heard)
    assert rest.select(references).kept == found.kept

    sets = {}
    for name, split in splits.items():
        track = facts[name][0]
        if not track["split"] and track["artist"]:
            sets.setdefault(track["artist"], set()).add(split)
        assert track["split"] in ("", split)
    assert found.report["split_by"] != "artist" or all(len(of_one) == 1 for of_one in sets.values())
