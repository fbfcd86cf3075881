"""Changed inputs: what depends on them is rebuilt, nothing stale is used, and only one run writes a folder."""

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile as sf
from planted import RATE, music, save
from small_stores import small_codec

from data_prep.cli import main
from data_prep.shard_task import ShardResult
from data_prep.stages.cut import Cut, cut_shard
from data_prep.stages.plan import planned_shards, read_shard, write_plan
from data_prep.stages.segments import Segments, with_results
from data_prep.status import WORK
from data_prep.tables import REJECTED_FILE
from data_prep.track import Track
from ssmttm.data import open_store
from ssmttm.errors import UserError
from ssmttm.files import directory_lock


def prepare(folder: Path, out: Path, *more: str) -> None:
    words = ["folder", "--root", str(folder), "--out", str(out), "--licence", "CC0-1.0", "--workers", "1"]
    main([*words, "--codec", "none", "--text", "none", *more])


def tracks(out: Path) -> set[str]:
    return set(open_store(out).manifest["track"].to_pylist())


def rejected(folder: Path) -> dict[str, str]:
    return {row["item"]: row["reason"] for row in pq.read_table(folder / REJECTED_FILE).to_pylist()}


def plan(folder: Path, root: Path, found: list[Track], policy: str = "open-sa") -> Path:
    folder.mkdir()
    write_plan(found, root, "CC-BY-4.0", policy, folder)
    return folder


def test_plan_takes_each_id_once_and_allowed_licences_only(tmp_path):
    found = [Track("a", "a.wav"), Track("a", "b.wav"), Track("b", "b.wav", licence="CC BY-SA 4.0"),
             Track("c", "c.wav", licence="CC BY-NC 4.0"), Track("d", "d.wav", licence="CC BY")]  # fmt: skip
    folder = plan(tmp_path / "plan", tmp_path, found)
    rows = [row for index in range(len(planned_shards(folder))) for row in read_shard(folder, index)]
    assert {row["id"]: (row["path"], row["licence"]) for row in rows} == {
        "a": ("a.wav", "CC-BY-4.0"), "b": ("b.wav", "CC-BY-SA-4.0")
    }  # fmt: skip
    assert sorted(rejected(folder)) == ["a", "c", "d"] and "needs --policy research-nc" in rejected(folder)["c"]


def test_plan_changes_only_the_shard_of_a_changed_file(tmp_path):
    found = [Track(name, f"{name}.wav") for name in "abcdefgh"]
    for track in found:
        (tmp_path / track.path).write_text("audio")
    first = dict(planned_shards(plan(tmp_path / "1", tmp_path, found)))
    assert dict(planned_shards(plan(tmp_path / "2", tmp_path, found[::-1]))) == first
    (tmp_path / "c.wav").write_text("other audio")
    second = dict(planned_shards(plan(tmp_path / "3", tmp_path, found)))
    assert first.keys() == second.keys() and sum(first[key] != second[key] for key in first) == 1 < len(first)


def test_cut_leaves_no_segment_of_a_broken_track(tmp_path):
    wav = np.where(np.arange(80 * RATE) == 79 * RATE, np.nan, np.tile(music(0), 2)[: 80 * RATE])
    sf.write(tmp_path / "a.wav", wav, RATE, subtype="FLOAT")
    folder = plan(tmp_path / "plan", tmp_path, [Track("a", "a.wav")])
    (tmp_path / "shard").mkdir()
    counts = cut_shard(tmp_path, folder, 0, Cut(RATE, 5.0), tmp_path / "shard")
    assert counts["segments"] == counts["tracks"] == 0 and list(rejected(tmp_path / "shard")) == ["a"]
    assert list((tmp_path / "shard").rglob("*.flac")) == []


def test_with_results_inputs_depend_on_new_and_old_results(tmp_path):
    def inputs(new: str, old: str, audio: bool) -> str:
        segments = Segments("0", tmp_path / "rows", tmp_path / "old", old)
        (updated,) = with_results([segments], [ShardResult(tmp_path / "new", {}, new)], audio)
        assert updated.audio == tmp_path / ("new" if audio else "old") and updated.rows.parent == tmp_path / "new"
        return updated.inputs

    assert len({inputs("a", "b", False), inputs("a", "c", False), inputs("d", "b", False)}) == 3
    assert inputs("a", "b", True) != inputs("d", "b", True)


def test_store_of_a_changed_file_equals_store_of_a_fresh_folder(tmp_path):
    small_codec(tmp_path / "codec")
    more = ["--codec", str(tmp_path / "codec"), "--sample-rate", "24000", "--captions", "tags"]
    for index in range(2):
        save(tmp_path / "music" / "a.wav", music(index)[: 6 * RATE])
        prepare(tmp_path / "music", tmp_path / "s", *more)
    prepare(tmp_path / "music", tmp_path / "fresh", *more)
    assert open_store(tmp_path / "s").fingerprint == open_store(tmp_path / "fresh").fingerprint


def test_changed_evaluation_set_is_fingerprinted_again(tmp_path):
    for index, name in enumerate("ab"):
        save(tmp_path / "music" / f"{name}.wav", music(index))
    for index, kept in ((0, {"b.wav"}), (1, {"a.wav"})):
        save(tmp_path / "sets" / "clip.wav", music(index)[5 * RATE : 25 * RATE])
        prepare(tmp_path / "music", tmp_path / "s", "--exclude-eval-sets", str(tmp_path / "sets"))
        assert tracks(tmp_path / "s") == kept
        with open(tmp_path / "s" / "rejected.csv", encoding="utf-8", newline="") as file:
            assert [row["kind"] for row in csv.DictReader(file)] == ["evaluation"]


def test_run_locks_folder_and_removes_temporary_files(tmp_path):
    save(tmp_path / "music" / "a.wav", music(0)[: 6 * RATE])
    with directory_lock(tmp_path / "s" / WORK, "other run"):
        with pytest.raises(UserError, match="another data preparation is writing"):
            prepare(tmp_path / "music", tmp_path / "s")
        prepare(tmp_path / "music", tmp_path / "s", "--stage", "plan")
    temporary = [tmp_path / "s" / place / ".killed.0.tmp.json" for place in (".", "text", WORK)]
    for path in temporary:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    prepare(tmp_path / "music", tmp_path / "s")
    assert not any(path.exists() for path in temporary)
