"""WebDataset archives: deterministic export, round trip, and safe reading of untrusted archives."""

import gzip
import io
import json
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.sources.archives.export import export
from data_prep.sources.archives.tar_stream import BadArchive, Bounds, members
from data_prep.sources.archives.webdataset import ArchiveLimits, read_all_unpacked, read_archives, unpack_shard
from data_prep.track import KINDS, Rejection, Track
from ssmttm.data.store import Store
from ssmttm.data.writer import StoreWriter
from ssmttm.errors import UserError
from ssmttm.files import file_sha256

RATE, K = 8000, 2
IDS = ["a0-0000", "jamendo:948-0001", "disc 1/track.02", "100%.5", "é" * 40 + "x" * 80]
CODEC = {
    "name": "fake", "fingerprint": "0" * 16, "sample_rate": RATE, "frame_rate": 50.0, "n_codebooks": K,
    "codebook_size": 1024,
}  # fmt: skip


def write_store(path: Path, codec: bool = True) -> Store:
    rng = np.random.default_rng(0)
    writer = StoreWriter(path, {}, CODEC if codec else None, RATE)
    (path / "audio").mkdir(parents=True)
    for index, name in enumerate(IDS):
        sf.write(path / f"audio/{index}.flac", rng.uniform(-0.1, 0.1, RATE), RATE)
        row = {
            "id": name, "split": ("train", "valid", "test")[index % 3], "licence": "CC-BY-4.0", "duration": 1.0,
            "licence_url": "https://creativecommons.org/licenses/by/4.0/", "title": f"Title {index} – “x”",
            "author": "Ann", "source_url": f"https://example.org/{index}", "audio": f"audio/{index}.flac",
            "captions": ["a slow piece", "Ein langsames Stück"][: 1 + index % 2], "tags": ["genre---rock"],
            "truth": {"tempo": 100 + index}, "content_hash": "00",
        }  # fmt: skip
        writer.add(row, rng.integers(0, 1024, (K, 50 + index)) if codec else None)
    store = writer.finish()
    (path / "ATTRIBUTION.csv").write_text("title,author\n")
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return write_store(tmp_path_factory.mktemp("store") / "s")


def tar_of(path: Path, files: list[tuple[str | tarfile.TarInfo, bytes]], mode: str = "w", format: int = 2) -> Path:
    with tarfile.open(path, mode, format=format) as archive:
        for name, data in files:
            entry = tarfile.TarInfo(name) if isinstance(name, str) else name
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


LIMITS = ArchiveLimits()


def unpacked(path: Path, out: Path, limits: ArchiveLimits = LIMITS) -> tuple[list[Track], list[Rejection]]:
    """Tracks and rejections; `out` has a file for each track and no other."""
    results = list(read_archives(path, out, limits))
    tracks = [result for result in results if isinstance(result, Track)]
    rejections = [result for result in results if isinstance(result, Rejection)]
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == sorted(
        {track.path for track in tracks}
    )
    for rejection in rejections:
        assert rejection.kind in KINDS and rejection.reason.isprintable() and rejection.item.isprintable()
    return tracks, rejections


SAMPLE = [("a.wav", b"audio"), ("a.json", b'{"license": "CC0-1.0"}')]


def test_export_and_read_round_trip(store, tmp_path):
    archives = export(store, tmp_path / "tars")
    assert [path.name for path in archives] == ["shard-000000.tar"]
    tracks, rejections = unpacked(tmp_path / "tars", tmp_path / "in")
    assert not rejections and [track.id for track in tracks] == IDS
    for row, track in enumerate(tracks):
        known = store.manifest.slice(row, 1).to_pylist()[0]
        for name in ("licence", "title", "author", "source_url", "split"):
            assert getattr(track, name) == known[name]
        assert list(track.captions) == known["captions"] and list(track.tags) == known["tags"]
        assert (tmp_path / "in" / track.path).read_bytes() == store.audio_path(row).read_bytes()
        assert track.evidence.startswith("shard-000000.tar:") and track.path.startswith("shard-000000/")


def test_export_is_deterministic_and_writes_an_index(store, tmp_path):
    first, second = export(store, tmp_path / "1", 20_000), export(store, tmp_path / "2", 20_000)
    assert len(first) > 2 and all(path.stat().st_size <= 20_480 for path in first)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    index = json.loads((tmp_path / "1" / "dataset.json").read_text())
    assert [entry["sha256"] for entry in index["shards"]] == [file_sha256(path) for path in first]
    assert index["codec"] == CODEC and (tmp_path / "1" / "ATTRIBUTION.csv").is_file()
    for path in first:
        with tarfile.open(path) as archive:
            for entry in archive:
                assert (entry.mtime, entry.uid, entry.gid, entry.uname, entry.mode) == (0, 0, 0, "", 0o644)


def test_export_keeps_samples_whole(store, tmp_path):
    codes_by_id = {}
    for path in export(store, tmp_path / "tars", 1):
        with tarfile.open(path) as archive:
            files = {name: archive.extractfile(name).read() for name in archive.getnames()}
        (known,) = (json.loads(data) for name, data in files.items() if name.endswith(".json"))
        (codes,) = (np.load(io.BytesIO(data)) for name, data in files.items() if name.endswith(".codes.npy"))
        assert len(files) == 3 and len({name.partition(".")[0] for name in files}) == 1
        codes_by_id[known["id"]] = codes
    for row, name in enumerate(IDS):
        assert codes_by_id[name].dtype == np.uint16 and np.array_equal(codes_by_id[name], store.codes(row))


def test_export_without_codes_and_with_a_missing_file(tmp_path):
    store = write_store(tmp_path / "s", codec=False)
    with tarfile.open(export(store, tmp_path / "tars")[0]) as archive:
        assert sorted({name.partition(".")[2] for name in archive.getnames()}) == ["flac", "json"]
    with pytest.raises(UserError, match="exists already"):
        export(store, tmp_path / "tars")
    (tmp_path / "s" / "audio" / "3.flac").unlink()
    with pytest.raises(UserError, match=r"3\.flac is missing"):
        export(store, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "tars"]


def test_webdataset_package_reads_exported_archives(store, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    paths = [str(path) for path in export(store, tmp_path / "tars", 20_000)]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert [sample["json"]["id"] for sample in samples] == IDS
    for row, sample in enumerate(samples):
        assert np.array_equal(sample["codes.npy"], store.codes(row))
        assert sample["flac"] == store.audio_path(row).read_bytes()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_reader_accepts_every_tar_format(tmp_path, format, mode):
    names = ["a.wav", "folder/b.WAV", "./c.flac", "f" * 90 + "/" + "n" * 60 + ".mp3"]
    names += [] if format == tarfile.USTAR_FORMAT else ["é" * 60 + "/" + "日" * 50 + ".ogg"]
    files = [(name, os.urandom(index * 700)) for index, name in enumerate(names)]
    tar_of(tmp_path / "x.tar", files, mode, format)
    tracks, rejections = unpacked(tmp_path / "x.tar", tmp_path / "in")
    assert not rejections and len(tracks) == len(files)
    for track, (_, data) in zip(tracks, files, strict=True):
        assert (tmp_path / "in" / track.path).read_bytes() == data


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(st.tuples(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=200)
                             .filter(lambda name: not name.endswith("/")), st.binary(max_size=1500)), max_size=6),
    format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)  # fmt: skip
def test_tar_reader_agrees_with_tarfile(tmp_path, files, format):
    tar_of(tmp_path / "x.tar", files, format=format)
    with tarfile.open(tmp_path / "x.tar") as archive:
        expected = [(entry.name, archive.extractfile(entry).read()) for entry in archive]
    with open(tmp_path / "x.tar", "rb") as file:
        assert [(entry.name, b"".join(entry.chunks())) for entry in members(file, Bounds())] == expected


def test_reader_maps_json_and_texts_to_metadata(tmp_path):
    known = {
        "license": "CC BY 4.0", "caption": " one ", "captions": ["two", "one", 3, None, ""], "text": "three",
        "artist": "Bob", "title": 7, "url": "https://example.org", "tags": "rock, slow", "split": "testing",
    }  # fmt: skip
    files = [
        ("a.mp3", b"1"), ("a.json", json.dumps(known).encode()), ("a.txt", b"\xef\xbb\xbffour\n"), ("a.png", b"2"),
        ("b.txt", b"alone with audio"), ("b.opus", b"3"), ("README", b"x"), ("._c.wav", b"x"),
        ("c.wav", b"4"), ("c.json", b'{"title": "\\ud800", "captions": {"no": "list"}, "id": "own"}'),
    ]  # fmt: skip
    tracks, rejections = unpacked(tar_of(tmp_path / "x.tar", files), tmp_path / "in")
    assert tracks == [
        Track("x/a.mp3", "x/a.mp3", "CC BY 4.0", "", "Bob", "https://example.org", evidence="x.tar:a.json",
              captions=("two", "one", "three", "four"), tags=("rock", "slow"), split="test"),
        Track("x/b.opus", "x/b.opus", captions=("alone with audio",)),
        Track("own", "x/c.wav", title="?"),
    ]  # fmt: skip
    assert [rejection.item for rejection in rejections] == []


NC_ND = b'{"licence": "CC-BY-NC-ND-4.0"}'


@pytest.mark.parametrize(
    "files",
    [
        [("Track 2.0 (x).flac", b"1"), ("Track 2.0 (x).json", NC_ND)],
        [("a.flac", b"1"), ("b.flac", b"2"), ("a.json", NC_ND), ("b.json", NC_ND)],
        [("b.json", NC_ND), ("A.JSON", NC_ND), ("a.flac", b"1"), ("b.FLAC", b"2")],
        [("caf\u00e9.flac", b"1"), ("cafe\u0301.json", NC_ND)],
        [("a.flac", b"1"), ("a.flac.json", NC_ND)],
        [("a.flac", b"1"), ("a.json", b'{"meta": {"License": "CC-BY-NC-ND-4.0"}}')],
    ],
)
def test_licence_reaches_its_track(tmp_path, files):
    tracks, rejections = unpacked(tar_of(tmp_path / "x.tar", files), tmp_path / "in")
    assert tracks and not rejections and {track.licence for track in tracks} == {"CC-BY-NC-ND-4.0"}


@pytest.mark.parametrize(
    "files",
    [
        [("Track 2.0 (x).flac", b"1"), ("Track 2.json", NC_ND)],
        [("audio/a.flac", b"1"), ("json/a.json", NC_ND)],
        [("a.flac", b"1"), ("a.json", b'{"license": {"name": "CC-BY-NC-ND-4.0"}}')],
        [("a.flac", b"1"), ("a.json", b'{"license": "CC-BY-NC-ND-4.0", "licence": "CC-BY-4.0"}')],
        [("a.flac", b"1"), (tarfile.TarInfo("a.json"), NC_ND), ("a.json", NC_ND)],
        [("a.flac", b"1"), ("a.json", b'{"split": "fold 3"}')],
    ],
)
def test_track_whose_statement_is_unclear_is_rejected(tmp_path, files):
    assert not unpacked(tar_of(tmp_path / "x.tar", files), tmp_path / "in")[0]


def test_track_whose_json_may_be_in_another_archive_is_rejected(tmp_path):
    for name, files in (("audio", [("a.wav", b"1")]), ("json", [("a.json", NC_ND)]), ("whole", SAMPLE)):
        (tmp_path / name).mkdir()
        unpack_shard(tar_of(tmp_path / f"{name}.tar", files), tmp_path / name)
    items = list(read_all_unpacked([tmp_path / name for name in ("audio", "json", "whole")]))
    assert [item.kind if isinstance(item, Rejection) else item.licence for item in items] == [
        "licence", "missing", "CC0-1.0",
    ]  # fmt: skip


def test_track_without_json_in_a_damaged_archive_is_rejected(tmp_path):
    data = tar_of(tmp_path / "x.tar", [("a.wav", b"1"), ("b.wav", b"2"), ("a.json", NC_ND)]).read_bytes()
    (tmp_path / "x.tar").write_bytes(data[:1536] + data[1536:2050])
    tracks, rejections = unpacked(tmp_path / "x.tar", tmp_path / "in")
    assert not tracks and "its JSON may be" in rejections[0].reason


def test_reader_sorts_archives_of_a_folder(tmp_path):
    for name in ("z.tar", "a.tgz", "deep/z.tar.gz", "deep/no.zip", "b.TAR"):
        (tmp_path / "tars" / name).parent.mkdir(parents=True, exist_ok=True)
        tar_of(tmp_path / "tars" / name, SAMPLE, "w:gz" if name.endswith("gz") else "w")
    tracks, _ = unpacked(tmp_path / "tars", tmp_path / "in")
    assert [track.path for track in tracks] == ["a/a.wav", "b/a.wav", "deep/z/a.wav", "z/a.wav"]
    assert [track.evidence for track in tracks][2] == "deep/z.tar.gz:a.json"
    with pytest.raises(UserError, match="no archive"):
        unpacked(tmp_path / "in", tmp_path / "other")


def entry(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        ([("../evil.wav", b"x")], "outside"),
        ([("/tmp/evil.wav", b"x")], "outside"),
        ([("b/../../evil.wav", b"x")], "outside"),
        ([(entry("evil.wav", tarfile.SYMTYPE, "/etc/passwd"), b"")], "unreadable"),
        ([(entry("evil", tarfile.SYMTYPE, ".."), b""), ("evil/evil.wav", b"x")], "unreadable"),
        ([(entry("evil.wav", tarfile.LNKTYPE, "a.wav"), b"")], "unreadable"),
        ([(entry("evil.wav", tarfile.CHRTYPE), b"")], "unreadable"),
        ([(entry("evil.wav", tarfile.FIFOTYPE), b"")], "unreadable"),
        ([("ev\nil.wav", b"x")], "metadata"),
        ([("e" * 300 + ".wav", b"x")], "metadata"),
        ([("evil.wav", b"x"), ("evil.mp3", b"y")], "metadata"),
        ([("evil.wav", b"x"), ("evil.json", b"{"), ("evil.txt", b"x")], "metadata"),
        ([("evil.wav", b"x"), ("evil.json", b"[" * 9_000)], "metadata"),
        ([("evil.wav", b"x"), ("evil.json", b"[]")], "metadata"),
        ([("evil.wav", b"x"), ("evil.json", b"{}"), ("evil.json", b"{}")], "metadata"),
        ([("evil.wav", b"x"), ("evil.txt", b"\xff\xfe")], "metadata"),
        ([("evil.json", b"{}")], "missing"),
        ([("evil.wav", b"x"), ("other.wav", b"y"), ("evil.wav", b"z")], "metadata"),
        ([("other.wav/evil.wav", b"x"), ("other.wav", b"y")], "metadata"),
        ([("evil.wav", bytes(2001))], "limit"),
        ([("evil.txt", bytes(10_001)), ("evil.wav", b"x")], "limit"),
    ],
)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_bad_entry_does_not_affect_other_samples(tmp_path, bad, kind, mode):
    tar_of(tmp_path / "x.tar", [*SAMPLE, *bad, ("z.wav", b"last"), ("z.json", b"{}")], mode)
    (tmp_path / "root").mkdir()
    tracks, rejections = unpacked(tmp_path / "x.tar", tmp_path / "root" / "in", ArchiveLimits(2000, 10_000))
    assert [track.path for track in tracks][:: len(tracks) - 1] == ["x/a.wav", "x/z.wav"]
    assert (tmp_path / "root" / "in" / "x" / "a.wav").read_bytes() == b"audio"
    assert kind in [rejection.kind for rejection in rejections]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root", "x.tar"]
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["in"]
    assert not any(path.is_symlink() for path in (tmp_path / "root").rglob("*"))


def test_link_in_the_output_folder_is_not_followed(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in" / "x").symlink_to("../elsewhere")
    results = list(read_archives(tar_of(tmp_path / "x.tar", SAMPLE), tmp_path / "in"))
    assert [result.kind for result in results if isinstance(result, Rejection)] == ["outside"]
    assert not list((tmp_path / "elsewhere").iterdir())


def patched(path: Path, place: int, data: bytes) -> None:
    """Change bytes of the first header of a tar, and its checksum with them."""
    header = bytearray(path.read_bytes())
    header[place : place + len(data)] = data
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    path.write_bytes(header)


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        (b"77777777777\0", "limit"),  # 8 GiB, above the limit
        (b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7, "limit"),
        (b"\x80" + b"\0" * 8 + b"\x10\0\0", "unreadable"),  # 1 MiB, beyond the end
        (b"\xff" + b"\xff" * 9 + b"\xfe\0", "unreadable"),  # -512
        (b"-0000000512\0", "unreadable"),
        (b"00000000 12\0", "unreadable"),
    ],
)
def test_wrong_sizes_are_rejected(tmp_path, size, kind):
    tar_of(tmp_path / "x.tar", [("b.wav", b"x"), *SAMPLE])
    patched(tmp_path / "x.tar", 124, size)
    start = time.process_time()
    tracks, rejections = unpacked(tmp_path / "x.tar", tmp_path / "in")
    assert not tracks and {rejection.kind for rejection in rejections} >= {kind} and time.process_time() - start < 5


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_truncated_archives_keep_earlier_samples(tmp_path, fraction, mode):
    pairs = ([(f"{index}.json", NC_ND), (f"{index}.wav", os.urandom(5000))] for index in range(10))
    files = [file for pair in pairs for file in pair]
    data = tar_of(tmp_path / "x.tar", files, mode).read_bytes()
    (tmp_path / "x.tar").write_bytes(data[: round(len(data) * fraction) | 1])
    tracks, rejections = unpacked(tmp_path / "x.tar", tmp_path / "in")
    assert len(tracks) < 10 and rejections[-1].item == "x.tar" and rejections[-1].kind == "unreadable"
    for track, (_, data) in zip(tracks, files[1::2], strict=False):
        assert (tmp_path / "in" / track.path).read_bytes() == data


def test_archive_bombs_end_at_the_limits(tmp_path):
    """A gigabyte of zeros in a megabyte; a header of a gigabyte; too many entries; too many bytes."""
    with gzip.open(tmp_path / "bomb.tar.gz", "wb", 1) as file:
        header = tarfile.TarInfo("a.wav")
        header.size = 1 << 30
        file.write(header.tobuf())
        for _ in range(64):
            file.write(bytes(1 << 20))
    start = time.process_time()
    _, rejections = unpacked(tmp_path / "bomb.tar.gz", tmp_path / "1")
    assert ("limit", "the archive unpacks to more than 100 times its size") in [(r.kind, r.reason) for r in rejections]
    assert time.process_time() - start < 5

    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 30
    with open(tmp_path / "header.tar", "wb") as file:
        file.write(header.tobuf())
        file.truncate(1 << 31)
    _, rejections = unpacked(tmp_path / "header.tar", tmp_path / "2")
    assert [rejection.kind for rejection in rejections] == ["limit"]

    limits = ArchiveLimits(bounds=Bounds(members=10, total_bytes=1 << 20))
    tar_of(tmp_path / "many.tar", [(f"{index}.wav", b"") for index in range(40)])
    tracks, rejections = unpacked(tmp_path / "many.tar", tmp_path / "3", limits)
    assert len(tracks) < 40 and rejections[-1].kind == "limit"
    tar_of(tmp_path / "large.tar", [("a.json", NC_ND), ("a.wav", bytes(1 << 19)), ("b.wav", bytes(1 << 20))])
    tracks, rejections = unpacked(tmp_path / "large.tar", tmp_path / "4", limits)
    assert [track.id for track in tracks] == ["large/a.wav"] and rejections[-1].kind == "limit"


@pytest.mark.parametrize(
    "data", [b"", b"\x1f\x8b", b"text" * 1000, b"\x1f\x8b" + bytes(5000), bytes(100), b"PK\3\4" * 500]
)
def test_other_files_are_rejected(tmp_path, data):
    (tmp_path / "x.tar").write_bytes(data)
    tracks, rejections = unpacked(tmp_path / "x.tar", tmp_path / "in")
    assert not tracks and all(rejection.kind == "unreadable" for rejection in rejections)
    assert len(rejections) == (0 if not data.strip(b"\0") else 1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 3000), st.binary(min_size=1, max_size=20)), min_size=1, max_size=4),
    repair=st.booleans(),
    packed=st.booleans(),
)
def test_edited_archives_write_nothing_outside(tmp_path, edits, repair, packed):
    path = tar_of(tmp_path / "x.tar", [("é" * 60 + ".wav", b"x" * 600), *SAMPLE])
    for place, data in edits:
        raw = bytearray(path.read_bytes())
        raw[place : place + len(data)] = data
        path.write_bytes(raw)
    if repair:
        patched(path, 0, b"")
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes(), 1))
    with open(path, "rb") as file:
        try:
            for member in members(file, Bounds()):
                assert sum(map(len, member.chunks())) == member.size
        except BadArchive:
            pass
    list(read_archives(path, tmp_path / "in"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in", "x.tar"]
