"""From a mixed folder to a store: segments, counts and reasons; growing, changing and repacking."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf
from planted import RATE, Planted, music, plant, save
from small_stores import small_codec

from data_prep.audio.decoder_process import _ffmpeg
from data_prep.cli import main, parser
from data_prep.pipeline import _BATCH_SIZES, device_of
from data_prep.stages import cut, pack
from data_prep.status import WORK
from ssmttm.codecs import load_codec
from ssmttm.data import CodesLoader, open_store
from ssmttm.errors import UserError


def rejected_rows(store: Path) -> dict[str, tuple[str, str]]:
    """Kind and reason by item. Every item occurs once."""
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


AUDIO_ONLY = ["--codec", "none", "--text", "none", "--workers", "1"]


def audio_only(root: Path, out: Path) -> list[str]:
    """The arguments of a store of audio only."""
    return ["--root", str(root), "--out", str(out), "--licence", "CC0-1.0", *AUDIO_ONLY]


def shard_times(store: Path) -> dict[Path, int]:
    """When each shard of the stages `cut` and `codes` was finished."""
    return {path: path.stat().st_mtime_ns for path in (store / WORK).glob("c*/*/done.json")}


def prepare(planted: Planted, out: Path, codec: Path, *more: object) -> None:
    words = ["folder", "--root", planted.root, "--out", out, "--licence", "CC0-1.0", "--segment", "20",
             "--allow-unmatched",
             "--exclude-eval-sets", *planted.evaluation_sets,
             "--codec", codec, "--sample-rate", "24000", "--min-bandwidth", "4500", "--text", "none", "--workers", "1",
             *more]  # fmt: skip
    main([str(word) for word in words])


@pytest.fixture(scope="module")
def store_path(planted, codec, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "store"
    prepare(planted, out, codec)
    return out


def test_pipeline_keeps_exactly_the_planted_segments(planted, store_path):
    store = open_store(store_path)
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


def test_pipeline_rejects_with_the_planted_reasons(planted, store_path):
    rows = rejected_rows(store_path)
    assert {item: kind for item, (kind, _) in rows.items()} == planted.rejected
    words = {
        "copies/bytes.flac": "the same file as rock/one.flac",
        "copies/samples.wav": "the same samples as rock/one.flac",
        "copies/encoded.mp3": "a near-duplicate of rock/one.flac",
        "copies/louder.ogg": "a near-duplicate of three.ogg",
        "licences/nd.flac": "needs --policy nd",
        "licences/unknown.flac": "'all rights reserved' is not known",
        "licences/versionless.flac": "names no version",
        "evaluation/artist.flac": "its artist jamendo:artist:11 is in song_describer",
        "evaluation/clip.flac": "its audio matches clip.wav of kept_out",
        "bad/empty.wav": "empty",
        "bad/nan.wav": "NaN",
        "bad/short.flac": "shorter than 3 s",
        "bad/telephone.wav": "nothing above",
        "bad/cut short.wav": "cut short",
        "gone.wav": "no such file",
    }
    for item, word in words.items():
        assert word in rows[item][1], (item, rows[item])


def test_decontamination_report_lists_excluded_tracks(store_path):
    report = json.loads((store_path / "decontamination.json").read_text())
    left_out = {set_["name"]: sorted(set_["left_out"]) for set_ in report["evaluation"]}
    assert left_out == {
        "song_describer": ["evaluation/artist.flac"],
        "kept_out": ["evaluation/clip.flac", "evaluation/copy.ogg"],
    }


def test_segments_equal_the_files_resampled_as_a_whole(planted, store_path):
    from ssmttm import audio

    store = open_store(store_path)
    for index, row in enumerate(store.manifest.to_pylist()):
        wav, rate = sf.read(store.audio_path(index), dtype="float32")
        assert rate == RATE and len(wav) == round(row["duration"] * RATE)
        if row["track"].endswith(".m4a"):
            continue
        whole = audio.read(planted.root / row["track"], RATE)[0][0].numpy()
        first = int(row["id"].rsplit("-", 1)[1]) * 20 * RATE
        inner = slice(200, len(wav) - 200)  # a segment is resampled on its own
        np.testing.assert_allclose(wav[inner], whole[first : first + len(wav)][inner], atol=2e-3)


def test_codes_equal_those_of_the_stored_audio(store_path, codec):
    store, loaded = open_store(store_path), load_codec(str(codec))
    from data_prep.stages.encode import Windows, encode_all
    from ssmttm import audio

    wavs = [audio.read(store.audio_path(index), loaded.sample_rate)[0] for index in range(len(store))]
    for index, codes in enumerate(encode_all(wavs, loaded, Windows(20.0))):
        np.testing.assert_array_equal(store.codes(index), codes)


def test_second_run_and_grown_folder_rebuild_only_what_changed(planted, store_path, codec, tmp_path, monkeypatch):
    root = tmp_path / "music"
    shutil.copytree(planted.root, root, symlinks=True)
    copied = replace(planted, root=root)
    prepare(copied, tmp_path / "s", codec)
    first = open_store(tmp_path / "s")
    assert first.fingerprint == open_store(store_path).fingerprint
    before = shard_times(tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.inputs.cut_shard", lambda *_: pytest.fail("cut again"))
        prepare(copied, tmp_path / "s", codec)
    save(root / "new.flac", music(30))
    prepare(copied, tmp_path / "s", codec)
    grown = open_store(tmp_path / "s")
    assert len(grown) == len(first) + 2
    fresh = [path for path, time in shard_times(tmp_path / "s").items() if before.get(path) != time]
    assert len(fresh) == 2, "the shard of the new track, cut and encoded"
    (root / "new.flac").unlink()
    prepare(copied, tmp_path / "s", codec)
    assert open_store(tmp_path / "s").fingerprint == first.fingerprint
    assert len(list((tmp_path / "s" / "audio").rglob("*.flac"))) == len(first)


def test_other_settings_are_rejected(planted, store_path, codec, tmp_path):
    before = open_store(store_path).fingerprint
    with pytest.raises(UserError, match=r"other settings .source\.cut\.tail 'keep' -> 'drop'"):
        prepare(planted, store_path, codec, "--tail", "drop")
    assert open_store(store_path).fingerprint == before


@pytest.mark.parametrize(("tail", "lengths"), [("drop", [20.0, 20.0]), ("overlap", [20.0, 20.0, 20.0])])
def test_tail_option_decides_last_segment(tmp_path, tail, lengths):
    save(tmp_path / "music" / "a.wav", np.concatenate([music(0), music(1)[: 7 * RATE]]))
    main(["folder", *audio_only(tmp_path / "music", tmp_path / "s"), "--segment", "20", "--tail", tail])
    store = open_store(tmp_path / "s")
    assert store.manifest["duration"].to_pylist() == lengths
    if tail == "overlap":
        last, _ = sf.read(store.audio_path(2), dtype="float32")
        np.testing.assert_allclose(last, np.concatenate([music(0)[27 * RATE :], music(1)[: 7 * RATE]]), atol=1e-4)


def test_pack_into_new_store_and_in_place(store_path, codec, tmp_path):
    main(["pack", "--root", str(store_path), "--out", str(tmp_path / "b"), *AUDIO_ONLY])
    new, first = open_store(tmp_path / "b"), open_store(store_path)
    assert new.info["codec"] is None and new.manifest["id"] == first.manifest["id"]
    assert rejected_rows(new.path) == rejected_rows(store_path)
    assert (new.path / "decontamination.json").read_bytes() == (store_path / "decontamination.json").read_bytes()
    more = ["--codec", str(codec), "--text", "minilm", "--workers", "1"]
    main(["pack", "--root", str(new.path), *more])
    packed = open_store(new.path)
    for index in range(len(first)):
        np.testing.assert_array_equal(packed.codes(index), first.codes(index))
    assert packed.text("a song that is known").shape[1] == 384 and packed.text("").shape[1] == 384
    split = packed.manifest["split"][0].as_py()
    assert CodesLoader(packed, split, 2, 50, 0).batch(0)["codes"].shape[0] == 2
    packed.verify()
    main(["pack", "--root", str(new.path), *more, "--text", "none"])
    assert list((new.path / "text").iterdir()) == [], "embeddings that the store does not name"


def test_link_or_copy_fsyncs_a_copy_before_renaming_it(tmp_path, monkeypatch):
    """Where the file system allows no link."""
    (tmp_path / "a.flac").write_text("audio")
    calls = []
    monkeypatch.setattr(pack, "fsync", lambda path: calls.append((path, (tmp_path / "b" / "a.flac").exists())))
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    pack.link_or_copy(tmp_path / "a.flac", tmp_path / "b" / "a.flac")
    assert calls == [(tmp_path / "b" / "a.tmp", False)] and (tmp_path / "b" / "a.flac").read_text() == "audio"


def test_interrupted_pack_in_place_continues(store_path, codec, tmp_path, monkeypatch):
    main(["pack", "--root", str(store_path), "--out", str(tmp_path / "b"), *AUDIO_ONLY])
    words = ["pack", "--root", str(tmp_path / "b"), "--codec", str(codec), "--text", "none", "--workers", "1"]
    writer, packing = "ssmttm.data.writer", pack.__name__
    for place in (f"{writer}.write_text", f"{writer}.strictest", f"{packing}._remove_others",
                  f"{packing}.write_attribution"):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(place, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                main(words)
        if place.endswith("strictest"):
            with pytest.raises(UserError, match="is unfinished"):
                open_store(tmp_path / "b")
    main(words)
    assert open_store(tmp_path / "b").manifest["id"] == open_store(store_path).manifest["id"]


def test_pack_in_place_adds_codes_only(codec, tmp_path):
    """The earlier processing stays in the config; a store with ids that are paths is rejected."""
    save(tmp_path / "music" / "a.wav", music(0)[: 6 * RATE])
    (tmp_path / "music" / "captions.csv").write_text("path,tags\na.wav,genre---jazz\n")
    out = tmp_path / "s"
    main(["folder", *audio_only(tmp_path / "music", out), "--captions", "tags"])
    words = ["pack", "--root", str(out), "--text", "none", "--workers", "1"]
    for more in (["--captions", "tags"], ["--rephrase", "m:f"], ["--vocals", "remove"], ["--vocals", "reject"]):
        with pytest.raises(UserError, match="give a new store as --out"):
            main([*words, "--codec", "none", *more, "--out", str(out / ".." / "s")])
    captions = open_store(out).info["config"]["captions"]
    main([*words, "--codec", str(codec)])
    assert captions and open_store(out).info["config"]["captions"] == captions and len(open_store(out).codes(0))
    table = pq.read_table(out / "manifest.parquet")
    foreign = table.set_column(0, table.schema.field("id"), pa.array(["../../../gone"]))
    pq.write_table(foreign, out / "manifest.parquet")
    with pytest.raises(UserError, match="not a valid file name"):
        main([*words, "--codec", str(codec)])


def test_pack_copies_current_rejections_of_its_root(tmp_path):
    save(tmp_path / "music" / "a.wav", music(0)[: 6 * RATE])
    words = ["pack", "--root", str(tmp_path / "a"), "--out", str(tmp_path / "b"), *AUDIO_ONLY]
    for _ in range(2):
        main(["folder", *audio_only(tmp_path / "music", tmp_path / "a")])
        main(words)
        assert rejected_rows(tmp_path / "b") == rejected_rows(tmp_path / "a")
        (tmp_path / "music" / "x.wav").touch()


def test_evaluation_sets_of_the_same_name_are_both_excluded(tmp_path):
    save(tmp_path / "music" / "a.wav", music(0))
    save(tmp_path / "music" / "b.wav", music(1))
    save(tmp_path / "music" / "c.wav", music(2))
    sets = []
    for index in range(2):
        save(tmp_path / str(index) / "audio" / "clip.wav", music(index)[5 * RATE : 25 * RATE])
        sets += ["--exclude-eval-sets", str(tmp_path / str(index) / "audio")]
    main(["folder", *audio_only(tmp_path / "music", tmp_path / "s"), *sets])
    assert {item: kind for item, (kind, _) in rejected_rows(tmp_path / "s").items()} == dict.fromkeys(
        ("a.wav", "b.wav"), "evaluation"
    )


def test_run_continues_with_another_batch_size(codec, tmp_path, monkeypatch):
    """As on a machine with a GPU, after the stages without a model."""
    save(tmp_path / "music" / "a.wav", music(0)[: 6 * RATE])
    words = ["folder", "--root", str(tmp_path / "music"), "--out", str(tmp_path / "s"), "--licence", "CC0-1.0",
             "--codec", str(codec), "--sample-rate", "24000", "--text", "none", "--workers", "1"]  # fmt: skip
    main([*words, "--until", "select"])
    monkeypatch.setitem(_BATCH_SIZES, "cpu", 2)
    main(words)
    assert open_store(tmp_path / "s").info["codec"]["batch"] == 2
    monkeypatch.setitem(_BATCH_SIZES, "cpu", 3)
    main(words)
    assert open_store(tmp_path / "s").info["codec"]["batch"] == 3, "all codes are made again"


@pytest.mark.parametrize(("sbatch_option", "device"), [("gres=gpu:2", "cuda"), ("partition=big", "cpu")])
def test_device_is_the_same_for_all_jobs_of_a_chain(sbatch_option, device):
    words = ["builtin", "--hours", "1", "--out", "x", "--executor", "slurm", "--sbatch-device", sbatch_option]
    for more in ([], ["--stage", "pack"]):
        assert device_of(parser().parse_args([*words, *more])) == device


def test_file_that_disappears_while_read_is_rejected(tmp_path, monkeypatch):
    for name in ("a.wav", "b.wav"):
        save(tmp_path / "music" / name, music(ord(name[0]))[: 6 * RATE])
    file_sha256 = cut.file_sha256

    def remove_and_hash(path: Path) -> str:
        if path.name == "a.wav":
            path.unlink()
        return file_sha256(path)

    monkeypatch.setattr(cut, "file_sha256", remove_and_hash)
    main(["folder", *audio_only(tmp_path / "music", tmp_path / "s")])
    assert open_store(tmp_path / "s").manifest["track"].to_pylist() == ["b.wav"]
    assert rejected_rows(tmp_path / "s")["a.wav"][0] == "missing"
    assert len(list((tmp_path / "s" / WORK).glob("cut-*/*/audio/*.flac"))) == 1


def test_captions_option_makes_captions_from_tags(tmp_path, capsys):
    save(tmp_path / "music" / "a.wav", music(0)[: 6 * RATE])
    (tmp_path / "music" / "captions.csv").write_text("path,tags\na.wav,genre---jazz;instrument---piano\n")
    out = tmp_path / "work" / "s"
    main(["folder", *audio_only(tmp_path / "music", out), "--captions", "tags"])
    assert "0.2 MB" in capsys.readouterr().out, "a parent folder named work counts"
    captions = open_store(out).captions(0)
    assert captions != [""] and "jazz" in " ".join(captions).lower()


def test_store_inside_the_source_folder_is_ignored(tmp_path):
    save(tmp_path / "a.wav", music(0)[: 6 * RATE])
    for _ in range(2):
        main(["folder", *audio_only(tmp_path, tmp_path / "s")])
    assert len(open_store(tmp_path / "s")) == 1 and rejected_rows(tmp_path / "s") == {}


def test_all_rejected_error_names_the_first_reason(tmp_path):
    (tmp_path / "music").mkdir()
    (tmp_path / "music" / "x.wav").touch()
    with pytest.raises(UserError, match=r"all tracks are rejected, see .*rejected.csv; the first: x.wav: it is empty"):
        main(["folder", *audio_only(tmp_path / "music", tmp_path / "s")])
    assert rejected_rows(tmp_path / "s") == {"x.wav": ("unreadable", "it is empty (0 bytes)")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--segment", "0"], r"--segment must be in \[1, 3600\], got 0"),
        (["--max-silence", "2"], r"--max-silence must be in \[0, 1\], got 2"),
        (["--sample-rate", "5"], r"--sample-rate must be in \[1000, 192000\], got 5"),
        (["--licence", "free beer"], "'free beer' is not known"),
        (["--exclude-eval-sets", "nowhere.csv"], "no nowhere.csv"),
        (["--codec", "nowhere"], "nowhere"),
    ],
)
def test_invalid_options_are_user_errors(tmp_path, words, message):
    save(tmp_path / "music" / "a.wav", music(0)[: 6 * RATE])
    with pytest.raises(UserError, match=message):
        main(["folder", "--root", str(tmp_path / "music"), "--out", str(tmp_path / "s"), *words])


def test_store_of_an_older_version_names_the_new_file(store_path, tmp_path):
    shutil.copytree(store_path, tmp_path / "old", ignore=shutil.ignore_patterns(WORK))
    (tmp_path / "old" / "rejected.csv").rename(tmp_path / "old" / "quarantine.csv")
    words = ["pack", "--root", str(tmp_path / "old"), "--out", str(tmp_path / "new"), *AUDIO_ONLY]
    with pytest.raises(UserError, match=r"quarantine\.csv is now named rejected\.csv"):
        main(words)
    (tmp_path / "new" / WORK / "cut-0" / "0").mkdir(parents=True)
    (tmp_path / "new" / WORK / "cut-0" / "0" / "quarantine.parquet").touch()
    (tmp_path / "old" / "quarantine.csv").rename(tmp_path / "old" / "rejected.csv")
    with pytest.raises(UserError, match="is of an older version"):
        main(words)
