"""From a mixed folder to a store: exactly the right segments, counts and reasons; growing, changing, packing anew."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf
from planted import RATE, Planted, music, plant, save
from small_stores import small_codec

from data_prep.__main__ import main
from data_prep.audio.decoder_process import _ffmpeg
from data_prep.build import _BATCHES, _device
from data_prep.options import parser
from data_prep.stages import cut, pack
from data_prep.status import WORK
from ssmttm.codecs import load_codec
from ssmttm.data import CodesLoader, open_store
from ssmttm.errors import UserError


def rejected_rows(store: Path) -> dict[str, tuple[str, str]]:
    """Kind and reason by item; every item once."""
    with open(store / "rejected.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["item"] for row in rows}) == len(rows)
    return {row["item"]: (row["kind"], row["reason"]) for row in rows}


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"), _ffmpeg())


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("codec") / "small"
    small_codec(folder)
    return folder


BARE = ["--codec", "none", "--text", "none", "--workers", "1"]


def bare(root: Path, out: Path) -> list[str]:
    """The arguments of a store of audio only."""
    return ["--root", str(root), "--out", str(out), "--licence", "CC0-1.0", *BARE]


def shard_times(store: Path) -> dict[Path, int]:
    """When each shard of the stages `cut` and `codes` was finished."""
    return {path: path.stat().st_mtime_ns for path in (store / WORK).glob("c*/*/done.json")}


def prepare(planted: Planted, out: Path, codec: Path, *more: object) -> None:
    sets = [word for path in planted.against for word in ("--against", path)]
    words = ["folder", "--root", planted.root, "--out", out, "--licence", "CC0-1.0", "--segment", "20", *sets,
             "--codec", codec, "--sample-rate", "24000", "--min-bandwidth", "4500", "--text", "none", "--workers", "1",
             *more]  # fmt: skip
    main([str(word) for word in words])


@pytest.fixture(scope="module")
def made(planted, codec, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("made") / "store"
    prepare(planted, out, codec)
    return out


def test_exactly_the_right_segments(planted, made):
    store = open_store(made)
    counts: dict[str, int] = {}
    for track in store.manifest["track"].to_pylist():
        counts[track] = counts.get(track, 0) + 1
    assert counts == planted.kept
    assert sum(store.info["counts"].values()) == sum(planted.kept.values())
    rows = store.manifest.to_pylist()
    assert {row["track"]: row["captions"] for row in rows if row["captions"]} == planted.captions
    one = next(row for row in rows if row["track"] == "rock/one.flac")
    assert (one["title"], one["author"], one["source_url"]) == ("One", "Ann", "https://example.org/1")
    assert (one["licence"], one["licence_url"]) == ("CC-BY-4.0", "https://creativecommons.org/licenses/by/4.0/")
    assert one["evidence"] == "captions.csv line 2" and "resampled to 24000 Hz" in one["modifications"]
    assert {row["licence"] for row in rows} == {"CC0-1.0", "CC-BY-4.0"}
    assert all(-40 < row["loudness"] < 0 for row in rows)


def test_exactly_the_right_reasons(planted, made):
    told = rejected_rows(made)
    assert {item: kind for item, (kind, _) in told.items()} == planted.rejected
    words = {
        "copies/bytes.flac": "the same file as rock/one.flac",
        "copies/samples.wav": "the same sound as rock/one.flac",
        "copies/encoded.mp3": "nearly the same sound as rock/one.flac",
        "copies/louder.ogg": "nearly the same sound as three.ogg",
        "licences/nd.flac": "needs --policy nd",
        "licences/unknown.flac": "'all rights reserved' is not known",
        "licences/versionless.flac": "names no version",
        "evaluation/artist.flac": "its artist jamendo:artist:11 is in song_describer",
        "evaluation/sound.flac": "it sounds like clip.wav of kept_out",
        "bad/empty.wav": "empty",
        "bad/nan.wav": "NaN",
        "bad/short.flac": "shorter than 3 s",
        "bad/telephone.wav": "nothing above",
        "bad/cut short.wav": "cut short",
        "gone.wav": "no such file",
    }
    for item, word in words.items():
        assert word in told[item][1], (item, told[item])


def test_decontamination_is_told(made):
    report = json.loads((made / "decontamination.json").read_text())
    left_out = {set_["name"]: sorted(set_["left_out"]) for set_ in report["evaluation"]}
    assert left_out == {
        "song_describer": ["evaluation/artist.flac"],
        "kept_out": ["evaluation/sound again.ogg", "evaluation/sound.flac"],
    }


def test_the_sound_is_the_files_own(planted, made):
    """Every segment against the file, read and resampled in one go by other means."""
    from ssmttm import audio

    store = open_store(made)
    for index, row in enumerate(store.manifest.to_pylist()):
        wav, rate = sf.read(store.audio_path(index), dtype="float32")
        assert rate == RATE and len(wav) == round(row["duration"] * RATE)
        if row["track"].endswith(".m4a"):
            continue
        whole = audio.read(planted.root / row["track"], RATE)[0][0].numpy()
        first = int(row["id"].rsplit("-", 1)[1]) * 20 * RATE
        inner = slice(200, len(wav) - 200)  # a segment is resampled on its own
        np.testing.assert_allclose(wav[inner], whole[first : first + len(wav)][inner], atol=2e-3)


def test_codes_are_those_of_the_audio(made, codec):
    store, coder = open_store(made), load_codec(str(codec))
    from data_prep.stages.encode import Windows, encode_all
    from ssmttm import audio

    wavs = [audio.read(store.audio_path(index), coder.sample_rate)[0] for index in range(len(store))]
    for index, codes in enumerate(encode_all(wavs, coder, Windows(20.0))):
        np.testing.assert_array_equal(store.codes(index), codes)


def test_a_second_run_does_nothing_and_a_grown_folder_little(planted, made, codec, tmp_path, monkeypatch):
    root = tmp_path / "music"
    shutil.copytree(planted.root, root, symlinks=True)
    again = Planted(root, planted.against, planted.kept, planted.rejected, planted.captions)
    prepare(again, tmp_path / "s", codec)
    first = open_store(tmp_path / "s")
    assert first.fingerprint == open_store(made).fingerprint
    before = shard_times(tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.inputs.cut_shard", lambda *_: pytest.fail("cut again"))
        prepare(again, tmp_path / "s", codec)
    save(root / "new.flac", music(30))
    prepare(again, tmp_path / "s", codec)
    grown = open_store(tmp_path / "s")
    assert len(grown) == len(first) + 2
    fresh = [path for path, time in shard_times(tmp_path / "s").items() if before.get(path) != time]
    assert len(fresh) == 2, "the shard of the new track, cut and encoded"
    (root / "new.flac").unlink()
    prepare(again, tmp_path / "s", codec)
    assert open_store(tmp_path / "s").fingerprint == first.fingerprint
    assert len(list((tmp_path / "s" / "audio").rglob("*.flac"))) == len(first)


def test_other_settings_never_mix(planted, made, codec, tmp_path):
    before = open_store(made).fingerprint
    with pytest.raises(UserError, match=r"other settings .source\.cut\.tail 'keep' -> 'drop'"):
        prepare(planted, made, codec, "--tail", "drop")
    assert open_store(made).fingerprint == before


@pytest.mark.parametrize(("tail", "lengths"), [("drop", [20.0, 20.0]), ("overlap", [20.0, 20.0, 20.0])])
def test_tails(tmp_path, tail, lengths):
    save(tmp_path / "music" / "a.wav", np.concatenate([music(0), music(1)[: 7 * RATE]]))
    main(["folder", *bare(tmp_path / "music", tmp_path / "s"), "--segment", "20", "--tail", tail])
    store = open_store(tmp_path / "s")
    assert store.manifest["duration"].to_pylist() == lengths
    if tail == "overlap":
        last, _ = sf.read(store.audio_path(2), dtype="float32")
        np.testing.assert_allclose(last, np.concatenate([music(0)[27 * RATE :], music(1)[: 7 * RATE]]), atol=1e-4)


def test_a_store_is_packed_anew(made, codec, tmp_path):
    """Another codec into a new store, and an audio-only store that gets its codes in place."""
    main(["pack", "--root", str(made), "--out", str(tmp_path / "b"), *BARE])
    bare, first = open_store(tmp_path / "b"), open_store(made)
    assert bare.info["codec"] is None and bare.manifest["id"] == first.manifest["id"]
    assert rejected_rows(bare.path) == rejected_rows(made)
    assert (bare.path / "decontamination.json").read_bytes() == (made / "decontamination.json").read_bytes()
    more = ["--codec", str(codec), "--text", "minilm", "--workers", "1"]
    main(["pack", "--root", str(bare.path), *more])
    packed = open_store(bare.path)
    for index in range(len(first)):
        np.testing.assert_array_equal(packed.codes(index), first.codes(index))
    assert packed.text("a song that is known").shape[1] == 384 and packed.text("").shape[1] == 384
    split = packed.manifest["split"][0].as_py()
    assert CodesLoader(packed, split, 2, 50, 0).batch(0)["codes"].shape[0] == 2
    packed.verify()
    main(["pack", "--root", str(bare.path), *more, "--text", "none"])
    assert list((bare.path / "text").iterdir()) == [], "embeddings that the store does not name"


def test_copies_are_on_the_disk_before_they_have_their_names(tmp_path, monkeypatch):
    """Where a disk has no links, or the store is on another one."""
    (tmp_path / "a.flac").write_text("sound")
    seen = []
    monkeypatch.setattr(pack, "fsync", lambda path: seen.append((path, (tmp_path / "b" / "a.flac").exists())))
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    pack.share(tmp_path / "a.flac", tmp_path / "b" / "a.flac")
    assert seen == [(tmp_path / "b" / "a.tmp", False)] and (tmp_path / "b" / "a.flac").read_text() == "sound"


def test_an_interrupted_pack_in_place_goes_on(made, codec, tmp_path, monkeypatch):
    main(["pack", "--root", str(made), "--out", str(tmp_path / "b"), *BARE])
    words = ["pack", "--root", str(tmp_path / "b"), "--codec", str(codec), "--text", "none", "--workers", "1"]
    writer, packing = "ssmttm.data.writer", pack.__name__
    for place in (f"{writer}.write_text", f"{writer}.strictest", f"{packing}._settle", f"{packing}.write_attribution"):
        with monkeypatch.context() as patch:
            patch.setattr(place, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                main(words)
        if place.endswith("strictest"):
            with pytest.raises(UserError, match="is unfinished"):
                open_store(tmp_path / "b")
    main(words)
    assert open_store(tmp_path / "b").manifest["id"] == open_store(made).manifest["id"]


def test_in_place_a_store_gets_codes_and_nothing_else(codec, tmp_path):
    """What was done to its segments before stays known; a foreign one that names files elsewhere is refused."""
    save(tmp_path / "music" / "a.wav", music(0)[: 6 * RATE])
    (tmp_path / "music" / "captions.csv").write_text("path,tags\na.wav,genre---jazz\n")
    out = tmp_path / "s"
    main(["folder", *bare(tmp_path / "music", out), "--captions", "tags"])
    words = ["pack", "--root", str(out), "--text", "none", "--workers", "1"]
    for more in (["--captions", "tags"], ["--rephrase", "m:f"], ["--vocals", "remove"], ["--vocals", "refuse"]):
        with pytest.raises(UserError, match="name a new store with --out"):
            main([*words, "--codec", "none", *more, "--out", str(out / ".." / "s")])
    captions = open_store(out).info["config"]["captions"]
    main([*words, "--codec", str(codec)])
    assert captions and open_store(out).info["config"]["captions"] == captions and len(open_store(out).codes(0))
    table = pq.read_table(out / "manifest.parquet")
    foreign = table.set_column(0, table.schema.field("id"), pa.array(["../../../gone"]))
    pq.write_table(foreign, out / "manifest.parquet")
    with pytest.raises(UserError, match="no file's name"):
        main([*words, "--codec", str(codec)])


def test_a_store_packed_again_tells_what_its_root_tells_now(tmp_path):
    save(tmp_path / "music" / "a.wav", music(0)[: 6 * RATE])
    words = ["pack", "--root", str(tmp_path / "a"), "--out", str(tmp_path / "b"), *BARE]
    for _ in range(2):
        main(["folder", *bare(tmp_path / "music", tmp_path / "a")])
        main(words)
        assert rejected_rows(tmp_path / "b") == rejected_rows(tmp_path / "a")
        (tmp_path / "music" / "x.wav").touch()


def test_evaluation_sets_of_one_name_are_both_heard(tmp_path):
    save(tmp_path / "music" / "a.wav", music(0))
    save(tmp_path / "music" / "b.wav", music(1))
    save(tmp_path / "music" / "c.wav", music(2))
    sets = []
    for index in range(2):
        save(tmp_path / str(index) / "audio" / "clip.wav", music(index)[5 * RATE : 25 * RATE])
        sets += ["--against", str(tmp_path / str(index) / "audio")]
    main(["folder", *bare(tmp_path / "music", tmp_path / "s"), *sets])
    assert {item: kind for item, (kind, _) in rejected_rows(tmp_path / "s").items()} == dict.fromkeys(
        ("a.wav", "b.wav"), "evaluation"
    )


def test_a_run_may_go_on_where_there_is_a_gpu(codec, tmp_path, monkeypatch):
    """On a machine without one it stopped before the models; other batches are no other settings."""
    save(tmp_path / "music" / "a.wav", music(0)[: 6 * RATE])
    words = ["folder", "--root", str(tmp_path / "music"), "--out", str(tmp_path / "s"), "--licence", "CC0-1.0",
             "--codec", str(codec), "--sample-rate", "24000", "--text", "none", "--workers", "1"]  # fmt: skip
    main([*words, "--until", "select"])
    monkeypatch.setitem(_BATCHES, "cpu", 2)
    main(words)
    assert open_store(tmp_path / "s").info["codec"]["batch"] == 2
    monkeypatch.setitem(_BATCHES, "cpu", 3)
    main(words)
    assert open_store(tmp_path / "s").info["codec"]["batch"] == 3, "and codes are of one machine's kind"


@pytest.mark.parametrize(("asked", "device"), [("gres=gpu:2", "cuda"), ("partition=big", "cpu")])
def test_every_job_of_a_chain_has_one_device(asked, device):
    words = ["builtin", "--hours", "1", "--out", "x", "--executor", "slurm", "--sbatch-device", asked]
    for more in ([], ["--stage", "pack"]):
        assert _device(parser().parse_args([*words, *more])) == device


def test_a_file_that_goes_away_while_it_is_read_stops_nothing(tmp_path, monkeypatch):
    for name in ("a.wav", "b.wav"):
        save(tmp_path / "music" / name, music(ord(name[0]))[: 6 * RATE])
    whole = cut.file_sha256

    def digest(path: Path) -> str:
        if path.name == "a.wav":
            path.unlink()
        return whole(path)

    monkeypatch.setattr(cut, "file_sha256", digest)
    main(["folder", *bare(tmp_path / "music", tmp_path / "s")])
    assert open_store(tmp_path / "s").manifest["track"].to_pylist() == ["b.wav"]
    assert rejected_rows(tmp_path / "s")["a.wav"][0] == "missing"
    assert len(list((tmp_path / "s" / WORK).glob("cut-*/*/audio/*.flac"))) == 1


def test_captions_from_tags(tmp_path, capsys):
    save(tmp_path / "music" / "a.wav", music(0)[: 6 * RATE])
    (tmp_path / "music" / "captions.csv").write_text("path,tags\na.wav,genre---jazz;instrument---piano\n")
    out = tmp_path / "work" / "s"
    main(["folder", *bare(tmp_path / "music", out), "--captions", "tags"])
    assert "0.2 MB" in capsys.readouterr().out, "whatever the folders above it are called"
    captions = open_store(out).captions(0)
    assert captions != [""] and "jazz" in " ".join(captions).lower()


def test_a_store_inside_the_folder_is_not_prepared_again(tmp_path):
    save(tmp_path / "a.wav", music(0)[: 6 * RATE])
    for _ in range(2):
        main(["folder", *bare(tmp_path, tmp_path / "s")])
    assert len(open_store(tmp_path / "s")) == 1 and rejected_rows(tmp_path / "s") == {}


def test_nothing_usable_is_one_line_with_the_first_reason(tmp_path):
    (tmp_path / "music").mkdir()
    (tmp_path / "music" / "x.wav").touch()
    with pytest.raises(UserError, match=r"nothing can be used, .*rejected.csv says why: x.wav: it is empty"):
        main(["folder", *bare(tmp_path / "music", tmp_path / "s")])
    assert rejected_rows(tmp_path / "s") == {"x.wav": ("unreadable", "it is empty (0 bytes)")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--segment", "0"], "--segment must be between 1 and 3600"),
        (["--max-silence", "2"], "--max-silence must be between 0 and 1"),
        (["--sample-rate", "5"], "--sample-rate must be between 1000 and 192000"),
        (["--licence", "free beer"], "'free beer' is not known"),
        (["--against", "nowhere.csv"], "there is no nowhere.csv"),
        (["--codec", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(tmp_path, words, message):
    save(tmp_path / "music" / "a.wav", music(0)[: 6 * RATE])
    with pytest.raises(UserError, match=message):
        main(["folder", "--root", str(tmp_path / "music"), "--out", str(tmp_path / "s"), *words])
