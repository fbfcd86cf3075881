"""croissant.json of a store: the structure that Croissant 1.1 requires, and how mlcroissant reads it."""

import json

import pytest
from small_stores import write_rows_store

from data_prep.reports.attribution import write_attribution
from data_prep.reports.croissant import write_croissant
from ssmttm.files import file_sha256

REQUIRED = ("@context", "@type", "conformsTo", "description", "license", "name", "url", "creator", "datePublished",
            "distribution")  # fmt: skip


@pytest.fixture()
def store(tmp_path):
    rows = [
        {"id": f"{split}-{n}", "split": split, "licence": "CC0-1.0" if n else "CC-BY-4.0", "duration": 1.5,
         "licence_url": f"https://creativecommons.org/{n}", "audio": f"audio/ab/{split}-{n}.flac", "title": "é, \"x\"",
         "captions": ["slow", "a song"], "tags": ["genre---rock"]}
        for split, amount in (("train", 3), ("valid", 2), ("test", 1)) for n in range(amount)
    ]  # fmt: skip
    (tmp_path / "my-store" / "audio" / "ab").mkdir(parents=True)
    made = write_rows_store(tmp_path / "my-store", rows)
    write_attribution(made)
    return made


def test_croissant_has_the_required_structure(store):
    path = write_croissant(store)
    assert path == store.path / "croissant.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert all(found[name] for name in REQUIRED)
    assert found["@type"] == "sc:Dataset" and found["conformsTo"] == "http://mlcommons.org/croissant/1.1"
    assert found["name"] == "my-store" and "train 3" in found["description"] and "CC-BY-4.0 3" in found["description"]
    assert found["license"] == [f"https://creativecommons.org/{n}" for n in range(3)]
    parts = {part["@id"]: part for part in found["distribution"]}
    assert set(parts) == {"manifest.parquet", "ATTRIBUTION.csv", "store.json", "audio"}
    for name in ("manifest.parquet", "ATTRIBUTION.csv", "store.json"):
        assert parts[name]["sha256"] == file_sha256(store.path / name)
        assert parts[name]["contentSize"] == f"{(store.path / name).stat().st_size} B"
    assert {part["@type"] for part in parts.values()} == {"cr:FileObject", "cr:FileSet"}
    splits, segments = found["recordSet"]
    assert [row["splits/segments"] for row in splits["data"]] == [3, 2, 1]
    fields = {field["name"]: field for field in segments["field"]}
    assert set(fields) == set(store.manifest.column_names)
    assert all(field["source"]["extract"]["column"] == name for name, field in fields.items())
    assert fields["captions"]["isArray"] and fields["duration"]["dataType"] == "cr:Float64"
    assert all(field["description"] != name for name, field in fields.items())
    assert fields["split"]["references"] == {"field": {"@id": "splits/name"}}
    ids = [node["@id"] for node in (*found["distribution"], splits, segments, *splits["field"], *segments["field"])]
    assert len(ids) == len(set(ids))


def test_croissant_is_read_by_mlcroissant_without_issues(store):
    import mlcroissant

    data = mlcroissant.Dataset(jsonld=str(write_croissant(store)))
    assert data.metadata.ctx.issues.report() == ""
    assert str(data.metadata.ctx.conforms_to.value).endswith("1.1")
    records = list(data.records("segments"))
    assert [record["segments/id"].decode() for record in records] == store.manifest["id"].to_pylist()
    assert records[0]["segments/captions"] == [b"slow", b"a song"]
    assert records[0]["segments/title"].decode() == 'é, "x"'
    assert [record["splits/name"] for record in data.records("splits")] == ["train", "valid", "test"]


def test_croissant_of_the_same_store_is_the_same_file(store):
    assert write_croissant(store).read_bytes() == write_croissant(store).read_bytes()
