"""ATTRIBUTION.csv lists every work once, verbatim."""

import csv
import tracemalloc

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_stores import write_rows_store

from data_prep.reports import attribution
from data_prep.reports.attribution import COLUMNS, write_attribution

TEXT = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def read(path) -> list[tuple[str, ...]]:
    with open(path, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == COLUMNS
    return [tuple(row) for row in rows]


@example(works=[("a\rb", "c\nd", 1), ("\r", '"', 2)], batch=2)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(works=st.lists(st.tuples(TEXT, TEXT, st.integers(1, 4)), min_size=1, max_size=6), batch=st.integers(1, 5))
def test_attribution_lists_every_work_once_and_verbatim(tmp_path_factory, works, batch):
    rows = [
        {"id": f"{number:03d}-{index}", "split": "train", "licence": "CC0-1.0", "duration": 1.0, "title": title,
         "author": author, "evidence": f"table line {number}"}
        for number, (title, author, count) in enumerate(works) for index in range(count)
    ]  # fmt: skip
    store = write_rows_store(tmp_path_factory.mktemp("store"), rows)
    before, attribution._BATCH = attribution._BATCH, batch
    try:
        found = read(write_attribution(store))
    finally:
        attribution._BATCH = before
    assert found == [
        (title or "", author or "", "", "CC0-1.0", "", "", f"table line {number}", str(count))
        for number, (title, author, count) in enumerate(works)
    ]


def test_attribution_keeps_a_formula_as_text(tmp_path):
    rows = [{"id": "a", "split": "train", "licence": "CC0-1.0", "duration": 1.0, "title": '=HYPERLINK("x")'}]
    assert read(write_attribution(write_rows_store(tmp_path, rows)))[0][0] == '=HYPERLINK("x")'


def test_attribution_memory_does_not_grow_with_the_store(tmp_path):
    store = write_rows_store(
        tmp_path,
        [{"id": f"{n:06d}", "split": "train", "licence": "CC0-1.0", "duration": 1.0, "title": f"work {n} " + 40 * "x",
          "author": f"author {n}"} for n in range(30_000)],
    )  # fmt: skip
    store.manifest = store.manifest.combine_chunks()
    tracemalloc.start()
    write_attribution(store)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6  # all rows at once would take 10 MB
