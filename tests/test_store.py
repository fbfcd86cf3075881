"""The store on disk: round trip, damage, other settings or codecs, atomic writes."""

import json
import shutil
import time
import timeit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from small_stores import SAMPLE_RATE, write_audio_store, write_rows_store

from data_prep.cli import main as data_prep_main
from ssmttm.data import StoreWriter, open_store
from ssmttm.data.store import FORMAT, SCHEMA, shard_name, text_name
from ssmttm.data.tensorfile import map_tensors, read_header, write_tensors
from ssmttm.data.text_table import TextTable, merge_text_tables, write_text_table
from ssmttm.errors import UserError
from ssmttm.files import atomic_folder, atomic_write, config_hash, file_entry, new_folder

CODEC = {
    "name": "fake", "fingerprint": "f" * 16, "sample_rate": 8000, "frame_rate": 25.0,
    "n_codebooks": 3, "codebook_size": 64,
}  # fmt: skip
TEXT = {"name": "some/encoder", "fingerprint": "e" * 16, "dim": 5}


class OtherCodec:
    name, fingerprint = "other", "0" * 16


def row(index: int, split: str = "train", **more) -> dict:
    known = {"id": f"seg-{index}", "split": split, "licence": "CC0-1.0", "duration": 2.0}
    return {**known, "captions": [f"song {index}"], **more}


def some_codes(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 64, (3, 20 + index))


def embed(caption: str) -> np.ndarray:
    rng = np.random.default_rng(len(caption))
    return rng.standard_normal((1 + len(caption) % 4, 5)).astype(np.float16)


@pytest.fixture
def store_and_embeddings(tmp_path):
    """A finished store of 10 segments in three shards."""
    writer = StoreWriter(tmp_path / "s", {"source": "test"}, CODEC, 8000, shard_segments=4)
    for index in range(10):
        annotations = {"tempo": 120} if index == 3 else None
        writer.add(row(index, "valid" if index == 9 else "train", truth=annotations), some_codes(index))
    captions = ["", *(f"song {i}" for i in range(10))]
    table = tmp_path / "s" / text_name(TEXT["name"])
    write_text_table(table, captions, lambda texts: [*map(embed, texts)], 5, "e" * 16)
    return writer.finish(TEXT), {caption: embed(caption) for caption in captions}


def test_store_round_trip(store_and_embeddings):
    store, table = store_and_embeddings
    assert len(store) == 10 and list(store.indices("valid")) == [9] and len(store.indices("train")) == 9
    for index in range(10):
        assert store.codes(index).dtype == np.uint16
        np.testing.assert_array_equal(store.codes(index), some_codes(index))
    for caption, embedding in table.items():
        np.testing.assert_array_equal(store.text(caption), embedding)
    assert store.annotations(3) == {"tempo": 120} and store.annotations(4) is None
    assert store.info["counts"] == {"train": 9, "valid": 1, "test": 0}
    store.verify()
    with pytest.raises(KeyError, match="no embedding of the caption 'unknown'"):
        store.text("unknown")
    with pytest.raises(UserError, match="no test segments"):
        store.indices("test")


@pytest.fixture(scope="module")
def million_rows(tmp_path_factory):
    """A store of a million segments in 489 row groups: only what its manifest needs."""
    path, n = tmp_path_factory.mktemp("million"), 1_000_000
    numbers = np.arange(n)
    truth = pa.array([None, '{"piece": "a, b", "bpm": 90, "chords": [{"bpm": 1}]}', '{"bpm": 120.5}', '{"key": "D"}'])
    tags = pa.array([["slow", "piano", "slow"], [], None, ["piano"]], pa.list_(pa.string()))
    captions = pa.array([["one", "two"], ["one"], [], None], pa.list_(pa.string()))
    columns = {
        "id": pc.binary_join_element_wise("segment", pa.array(numbers).cast(pa.string()), "-"),
        "split": pa.array(["train", "valid"]).take(pa.array(numbers % 10 // 9)),
        **{name: values.take(pa.array(numbers % 4))
           for name, values in (("truth", truth), ("tags", tags), ("captions", captions))},
    }  # fmt: skip
    rest = {field.name: pa.nulls(n, field.type) for field in SCHEMA if field.name not in columns}
    table = pa.table({name: (columns | rest)[name] for name in SCHEMA.names})
    pq.write_table(table, path / "manifest.parquet", row_group_size=2048)
    info = {"format": FORMAT, "version": 1, "codec": None, "text": None, "sample_rate": 8, "counts": {"train": 900_000},
            "files": {"manifest.parquet": file_entry(path / "manifest.parquet")}}  # fmt: skip
    (path / "store.json").write_text(json.dumps(info))
    return open_store(path)


def test_ids_of_a_batch_take_less_than_a_millisecond_of_a_million_rows(million_rows):
    rows = np.random.default_rng(0).integers(0, 1_000_000, 64)
    assert million_rows.ids(rows) == [f"segment-{row}" for row in rows]
    assert min(timeit.repeat(lambda: million_rows.ids(rows), number=1, repeat=20)) < 1e-3


def test_tempi_tags_and_captions_of_a_million_rows_need_seconds(million_rows):
    """75 s with a loop over the rows."""
    start = time.process_time()
    tempi = million_rows.tempi()
    table = million_rows.tag_table()
    captions = million_rows.distinct_captions("train")
    assert time.process_time() - start < 20
    np.testing.assert_array_equal(tempi[:8], [np.nan, 90, 120.5, np.nan] * 2)
    names = [table.names[tag] for tag in table.tags[:6]]
    assert table.rows[:6].tolist() == [0, 0, 3, 4, 4, 7] and len(table.rows) == 750_000
    assert [sorted(names[:2]), names[2]] == [["piano", "slow"], "piano"]
    assert captions == {"one", "two", ""}


def test_tempi_equal_those_of_the_annotations_row_by_row(tmp_path):
    annotations = [
        '{"bpm": 120}', '{"bpm": 98.25, "sections": [{"bpm": 1}]}', '{"sections": [{"bpm": 70}], "bpm": 140}',
        '{"sections": [{"bpm": 70}]}', '{"title": "so called \\"bpm\\": 7", "bpm": 60}', '{"bpm": null}', "{}",
        '{"title": "{a, [b", "bpm":  1.2e2 }', '{\n "bpm" : 77\n}', '{"bpm_class": 3}', None, '{"bpm": 60, "bpm": 61}',
        "[3]",
    ]  # fmt: skip
    rows = [{"id": f"{i}", "split": "train", "licence": "CC0-1.0", "duration": 1.0, "truth": text}
            for i, text in enumerate(annotations)]  # fmt: skip
    found = write_rows_store(tmp_path / "store", rows).tempi()
    nan = np.nan
    np.testing.assert_array_equal(found, [120, 98.25, 140, nan, 60, nan, nan, 120, 77, nan, nan, 61, nan])


@pytest.mark.parametrize("bpm", ["0", "-3", '"fast"', "true", "1e400", "[3]"])
def test_tempo_that_is_not_a_positive_number_is_a_user_error(tmp_path, bpm):
    row = {"id": "a", "split": "train", "licence": "CC0-1.0", "duration": 1.0, "truth": f'{{"bpm": {bpm}}}'}
    with pytest.raises(UserError, match="bpm of segment a is not a positive number"):
        write_rows_store(tmp_path / "store", [row]).tempi()


def test_codes_are_a_read_only_view_of_the_file(store_and_embeddings):
    store, _ = store_and_embeddings
    base = store.codes(0)
    while not isinstance(base, np.memmap):
        base = base.base
    assert base.filename and not store.codes(0).flags.writeable


def test_store_files_are_safetensors(store_and_embeddings):
    store, _ = store_and_embeddings
    tensors = load_file(store.path / shard_name(0))
    assert tensors["codes"].shape == (3, 20 + 21 + 22 + 23) and list(tensors["offsets"]) == [0, 20, 41, 63, 86]
    assert not [path for path in store.path.rglob("*") if path.suffix in (".pkl", ".pt", ".npy", ".npz")]


def test_text_table_finds_captions_whose_hashes_share_a_prefix(tmp_path, monkeypatch):
    start = b"\x00" * 8
    keys = {"a": start + b"\x01" * 8, "b": start + b"\x02" * 8, "c": b"\xff" * 16, "d": start + b"\x03" * 8}
    monkeypatch.setattr("ssmttm.data.text_table.caption_hash", keys.__getitem__)
    hashes = np.frombuffer(keys["a"] + keys["b"] + keys["c"], np.uint8).reshape(3, 16)
    embeddings = np.arange(6, dtype=np.float16).reshape(6, 1)
    tensors = {"hashes": hashes, "offsets": np.array([0, 1, 3, 6]), "embeddings": embeddings}
    write_tensors(tmp_path / "t.safetensors", tensors)
    table = TextTable(tmp_path / "t.safetensors")
    assert [table.find(key) for key in "abcd"] == [0, 1, 2, None]
    assert table["b"][:, 0].tolist() == [1, 2]


def test_merge_text_tables_keeps_the_first_embedding(tmp_path):
    parts = []
    for index, captions in enumerate((["b", "a", "b"], ["a", "ccc"], [])):
        parts.append(tmp_path / f"{index}.safetensors")
        write_text_table(parts[-1], captions, lambda texts, i=index: [embed(text) + i for text in texts], 5, "one")
    merge_text_tables(tmp_path / "text" / "all.safetensors", parts)
    table = TextTable(tmp_path / "text" / "all.safetensors")
    for caption, index in {"": 0, "a": 0, "b": 0, "ccc": 1}.items():
        np.testing.assert_array_equal(table[caption], embed(caption) + index)
    assert "d" not in table and read_header(tmp_path / "text" / "all.safetensors")[1] == {"fingerprint": "one"}


@settings(deadline=None, max_examples=20)
@given(st.lists(st.lists(st.text(max_size=8), max_size=30), min_size=1, max_size=4))
def test_merged_text_table_finds_every_caption(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("tables")
    parts = [folder / f"{index}" for index in range(len(shards))]
    for part, captions in zip(parts, shards, strict=True):
        write_text_table(part, captions, lambda texts: [*map(embed, texts)], 5, "one")
    merge_text_tables(folder / "all", parts)
    table = TextTable(folder / "all")
    for caption in ["", *(caption for captions in shards for caption in captions)]:
        np.testing.assert_array_equal(table[caption], embed(caption))


def test_store_fingerprint_depends_on_the_content_only(tmp_path):
    def build(name: str, licence: str):
        writer = StoreWriter(tmp_path / name, {"source": "test"}, CODEC, 8000)
        writer.add(row(0) | {"licence": licence}, some_codes(0))
        return writer.finish()

    assert build("a", "CC0-1.0").fingerprint == build("b", "CC0-1.0").fingerprint
    assert build("c", "CC-BY-4.0").fingerprint != build("a2", "CC0-1.0").fingerprint


def test_store_without_finish_is_unfinished(tmp_path):
    writer = StoreWriter(tmp_path / "s", {"source": "test"}, CODEC, 8000, shard_segments=2)
    for index in range(5):
        writer.add(row(index), some_codes(index))
    with pytest.raises(UserError, match="unfinished"):
        open_store(tmp_path / "s")


def test_writer_rejects_other_settings(store_and_embeddings):
    store, _ = store_and_embeddings
    with pytest.raises(UserError, match=r"other settings .source 'test' -> 'folder'"):
        StoreWriter(store.path, {"source": "folder"}, CODEC, 8000)
    assert open_store(store.path).fingerprint == store.fingerprint


def test_require_codec_rejects_another_codec(store_and_embeddings):
    store, _ = store_and_embeddings
    with pytest.raises(UserError, match=r"'fake' \(ffffffffffffffff\).*'other' \(0000000000000000\)"):
        store.require_codec(OtherCodec())


def test_open_store_rejects_what_is_not_a_store(tmp_path):
    with pytest.raises(UserError, match="no store at"):
        open_store(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a store"):
        open_store(tmp_path)
    (tmp_path / "store.json").write_text("{}")
    with pytest.raises(UserError, match=r"store\.json is damaged"):
        open_store(tmp_path)
    (tmp_path / "store.json").write_text('{"format": "ssmttm-store", "version": 99}')
    with pytest.raises(UserError, match="version 99"):
        open_store(tmp_path)


@pytest.mark.parametrize("name", ["manifest.parquet", shard_name(1), text_name(TEXT["name"])])
def test_missing_or_truncated_file_is_a_user_error_with_its_name(store_and_embeddings, name):
    store, _ = store_and_embeddings
    file = store.path / name
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match="truncated") as caught:
        open_store(store.path)
    assert file.name in str(caught.value)
    file.unlink()
    with pytest.raises(UserError, match="missing"):
        open_store(store.path)


def test_verify_finds_a_flipped_bit(store_and_embeddings):
    store, _ = store_and_embeddings
    file = store.path / shard_name(2)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        open_store(store.path).verify()


@pytest.mark.parametrize("damage", ["sample", "header", "truncated", "missing"])
def test_verify_finds_damaged_audio(tmp_path, damage):
    store = open_store(write_audio_store(tmp_path / "store"))
    store.verify()
    file = store.audio_path(3)
    data = bytearray(file.read_bytes())
    data[30 if damage == "header" else -2] ^= 1
    file.write_bytes(data[:-2] if damage == "truncated" else data)
    if damage == "missing":
        file.unlink()
    with pytest.raises(UserError, match=rf"audio/3\.wav is {'missing' if damage == 'missing' else 'damaged'}"):
        open_store(store.path).verify()


def test_command_verify_names_a_damaged_file(tmp_path, capsys):
    store = open_store(write_audio_store(tmp_path / "store"))
    assert data_prep_main(["verify", str(store.path)]) == 0
    assert capsys.readouterr().out == f"{store.path}: 12 segments, no file is missing or damaged\n"
    store.audio_path(3).write_bytes(store.audio_path(4).read_bytes())
    with pytest.raises(UserError, match=r"audio/3\.wav is damaged"):
        data_prep_main(["verify", str(store.path)])


def test_fingerprint_depends_on_the_audio(tmp_path):
    one = write_audio_store(tmp_path / "one")
    other = write_audio_store(tmp_path / "other")
    assert open_store(one).fingerprint == open_store(other).fingerprint
    tone = write_audio_store(tmp_path / "tone", seconds=1.4) / "audio/3.wav"
    (tmp_path / "third/audio").mkdir(parents=True)
    writer = StoreWriter(tmp_path / "third", {"sample_rate": SAMPLE_RATE}, sample_rate=SAMPLE_RATE)
    for known in open_store(one).manifest.to_pylist():
        shutil.copy(tone if known["id"] == "s3" else one / known["audio"], tmp_path / "third" / known["audio"])
        writer.add(known)
    assert writer.finish().fingerprint != open_store(one).fingerprint


def test_verify_says_that_audio_of_an_older_store_has_no_hashes(tmp_path, capsys):
    path = write_audio_store(tmp_path / "store")
    manifest = pq.read_table(path / "manifest.parquet").drop_columns(["audio_bytes", "audio_sha256"])
    pq.write_table(manifest, path / "manifest.parquet")
    info = json.loads((path / "store.json").read_text())
    info["files"]["manifest.parquet"] = file_entry(path / "manifest.parquet")
    (path / "store.json").write_text(json.dumps(info))
    open_store(path).verify()
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "no hashes of 12 audio files" in warning
    (path / "audio/3.wav").unlink()
    with pytest.raises(UserError, match=r"audio/3\.wav is missing"):
        open_store(path).verify()


def test_map_tensors_rejects_damaged_headers(tmp_path):
    for name, data in {"empty": b"", "huge": b"\xff" * 64, "text": b"hello, no safetensors file at all"}.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data)
        with pytest.raises(UserError, match="truncated or damaged"):
            map_tensors(path)
    header = json.dumps({"x": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(UserError, match="BF16"):
        map_tensors(path)


def test_atomic_write_keeps_the_old_file_on_a_full_disk(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(UserError, match="disk is full"), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_writer_raises_value_error_for_invalid_rows(tmp_path):
    writer = StoreWriter(tmp_path / "s", {}, CODEC, 8000)
    with pytest.raises(ValueError, match=r"missing .'licence'"):
        writer.add(row(0) | {"licence": None}, some_codes(0))
    with pytest.raises(ValueError, match="needs codes"):
        writer.add(row(1), np.zeros((2, 5), int))
    writer.add(row(2), some_codes(2))
    writer.add(row(2), some_codes(2))
    with pytest.raises(ValueError, match="seg-2 was added twice"):
        writer.finish()


def test_config_hash_is_stable():
    """Stores and shards are found by these digits."""
    assert config_hash({"b": 1, "a": {"c": None}}) == config_hash({"a": {"c": None}, "b": 1}) == "c6147cfd87eacc1b"


def test_atomic_folder_replaces_a_folder_or_keeps_it(tmp_path):
    path = tmp_path / "model"
    for content in ("one", "two"):
        with atomic_folder(path) as temporary:
            (temporary / "file").write_text(content)
        assert (path / "file").read_text() == content
    with pytest.raises(RuntimeError), atomic_folder(path) as temporary:
        raise RuntimeError
    with pytest.raises(UserError, match="exists already"), new_folder(path):
        pass
    assert (path / "file").read_text() == "two" and list(tmp_path.iterdir()) == [path]
