"""The loaders: batch n is a pure function of (seed, n, world size, rank), and no item is dropped."""

import threading
from collections import Counter

import numpy as np
import pytest
import soundfile as sf
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmttm.data import AudioLoader, CodesLoader, StoreWriter
from ssmttm.data.permutation import Permutation, mix
from ssmttm.data.prefetch import prefetch_batches
from ssmttm.data.store import text_name
from ssmttm.data.text_table import write_text_table
from ssmttm.errors import UserError

N, K, RATE = 23, 2, 8000
SIZES = {"frame_rate": 25.0, "n_codebooks": K, "codebook_size": 99}
CODEC = {"name": "fake", "fingerprint": "f", "sample_rate": RATE, **SIZES}


def embed(caption: str) -> np.ndarray:
    return np.full((len(caption.split()) + 1, 4), len(caption), np.float16)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """23 segments of 10 to 32 frames; the codes of a frame are the numbers of segment and frame."""
    path = tmp_path_factory.mktemp("store")
    (path / "audio").mkdir()
    writer = StoreWriter(path, {"source": "test"}, CODEC, RATE)
    for i in range(N):
        codes = np.stack([np.full(10 + i, i + 1), np.arange(10 + i)])
        sf.write(path / f"audio/{i}.flac", np.full((10 + i) * 32, (i + 1) / 100), RATE)
        captions = [f"{'long ' * (i % 3)}caption {i} {v}" for v in range(3)]
        meta = {"id": f"s{i}", "split": "train", "licence": "CC0-1.0", "duration": (10 + i) * 32 / RATE}
        writer.add({**meta, "captions": captions, "audio": f"audio/{i}.flac"}, codes)
    captions = [f"{'long ' * (i % 3)}caption {i} {v}" for i in range(N) for v in range(3)]
    write_text_table(path / text_name("enc"), captions, lambda texts: [*map(embed, texts)], 4, "e")
    return writer.finish({"name": "enc", "fingerprint": "e", "dim": 4})


def codes_loader(store, **more) -> CodesLoader:
    return CodesLoader(store, "train", **{"batch_size": 6, "frames": 16, "seed": 3, "caption_dropout": 0.3} | more)


def audio_loader(store, **more) -> AudioLoader:
    return AudioLoader(store, "train", **{"batch_size": 6, "samples": 500, "seed": 3} | more)


def same(a: dict, b: dict) -> bool:
    return a["ids"] == b["ids"] and all(torch.equal(a[key], b[key]) for key in a if isinstance(a[key], torch.Tensor))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(), st.integers())
def test_permutation_is_a_bijection(n, seed, epoch):
    assert sorted(Permutation(n, seed, epoch)(np.arange(n))) == list(range(n))


def test_permutation_of_a_trillion_items_is_well_mixed():
    n = 10**12 + 39
    values = Permutation(n, 0)(np.arange(1000) + n // 2)
    assert len(set(values.tolist())) == 1000 and values.min() >= 0 and values.max() < n
    assert abs(values.mean() / n - 0.5) < 0.05 and abs(np.corrcoef(np.arange(1000), values)[0, 1]) < 0.15
    orders = [tuple(Permutation(50, 0, epoch)(np.arange(50))) for epoch in range(20)]
    assert len(set(orders)) == 20


def test_permutation_is_uniform_over_keys():
    first = Counter(int(Permutation(7, key)(np.array([0]))[0]) for key in range(7000))
    assert all(850 < first[value] < 1150 for value in range(7))


def test_mix_hash_is_stable():
    """Runs resume only as long as this number stays."""
    assert mix(1, 2, "crop") == mix(1, 2, "crop") != mix(12, "crop")
    assert mix(0, 0, "id", "crop") == 14284071164724280445


@pytest.mark.parametrize("make", [codes_loader, audio_loader])
def test_batches_do_not_depend_on_the_order_of_calls(store, make):
    loader = make(store)
    forward = [loader.batch(n) for n in range(9)]
    for n in (8, 2, 5, 0, 8):
        assert same(make(store).batch(n), forward[n])
    assert not same(forward[0], make(store, seed=4).batch(0))


@pytest.mark.parametrize("make", [codes_loader, audio_loader])
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_global_batch_is_the_same_for_any_world_size(store, make, world_size):
    for n in range(8):
        expected = make(store).batch(n)
        parts = [make(store, rank=rank, world_size=world_size).batch(n) for rank in range(world_size)]
        assert [name for part in parts for name in part["ids"]] == expected["ids"]
        for key in ("codes", "frame_mask", "audio"):
            if key in expected:
                assert torch.equal(torch.cat([part[key] for part in parts]), expected[key])
        if "text" in expected:
            rows = [row[mask] for part in parts for row, mask in zip(*part["text"], strict=True)]
            assert all(torch.equal(a, b[m]) for a, b, m in zip(rows, *expected["text"], strict=True))


@pytest.mark.parametrize("batch_size", [1, 6, 23, 60])
def test_every_epoch_covers_every_item_once(store, batch_size):
    loader = codes_loader(store, batch_size=batch_size)
    batches = -(-2 * N // batch_size)
    ids = [name for n in range(batches) for name in loader.batch(n)["ids"]]
    assert sorted(ids[:N]) == sorted(ids[N : 2 * N]) == sorted(f"s{i}" for i in range(N))
    assert ids[:N] != ids[N : 2 * N]
    assert loader.steps_per_epoch == -(-N // batch_size) and len(loader) == N


def test_codes_loader_crops_and_pads(store):
    loader = codes_loader(store)
    starts = set()
    for n in range(20):
        batch = loader.batch(n)
        assert batch["codes"].shape == (6, K, 16) and batch["codes"].dtype == torch.int64
        for codes, mask, name in zip(batch["codes"], batch["frame_mask"], batch["ids"], strict=True):
            index, valid = int(name[1:]), int(mask.sum())
            assert valid == min(16, 10 + index) and bool(mask[:valid].all()) and not codes[:, valid:].any()
            assert bool((codes[0, :valid] == index + 1).all())
            assert torch.equal(codes[1, :valid], codes[1, 0] + torch.arange(valid))
            starts.add((index, int(codes[1, 0])))
    last = {start for index, start in starts if index == N - 1}
    assert len(last) >= 3 and max(start + 16 for index, start in starts if index >= 6) <= 32


def test_audio_loader_crops_and_pads(store):
    batch = audio_loader(store).batch(0)
    assert batch["audio"].shape == (6, 1, 500) and batch["audio"].dtype == torch.float32
    for audio, name in zip(batch["audio"][:, 0], batch["ids"], strict=True):
        index = int(name[1:])
        valid = min(500, (10 + index) * 32)
        torch.testing.assert_close(audio[:valid], torch.full((valid,), (index + 1) / 100), atol=1e-4, rtol=0)
        assert not audio[valid:].any()


def test_captions_vary_and_are_dropped(store):
    loader = codes_loader(store, caption_dropout=0.3)
    lengths: dict[str, set[float]] = {}
    dropped = total = 0
    for n in range(100):
        batch = loader.batch(n)
        for row, mask, name in zip(*batch["text"], batch["ids"], strict=True):
            length = float(row[mask][0, 0])
            total += 1
            dropped += length == 0
            lengths.setdefault(name, set()).add(length)
            assert int(mask.sum()) >= 1
    assert 0.24 < dropped / total < 0.36
    never = codes_loader(store, caption_dropout=0.0).batch(0)["text"]
    always = codes_loader(store, caption_dropout=1.0).batch(0)["text"]
    assert (never.embeddings[:, -1] > 0).all() and not always.embeddings.any() and always.mask.sum() == 6


def test_iterate_yields_the_batches_from_start(store):
    loader = codes_loader(store)
    for prefetch in (0, 2):
        batches = loader.iterate(4, prefetch=prefetch)
        assert all(same(next(batches), loader.batch(n)) for n in range(4, 9))
        batches.close()


def test_prefetch_thread_ends_and_reraises_errors():
    def make(n: int) -> int:
        if n == 3:
            raise UserError("broken file")
        return n

    before = threading.active_count()
    batches = prefetch_batches(make, 0, 2)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="broken file"):
        next(batches)
    assert threading.active_count() == before
    batches = prefetch_batches(lambda n: n, 0, 2)
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_unreadable_audio_is_a_user_error_with_its_path(store, tmp_path):
    (tmp_path / "audio").mkdir()
    sf.write(tmp_path / "audio/a.flac", np.zeros(900), RATE)
    writer = StoreWriter(tmp_path, {}, None, RATE)
    meta = {"split": "train", "licence": "CC0-1.0", "duration": 0.1}
    writer.add({"id": "a", "audio": "audio/a.flac", **meta})
    audio_store = writer.finish()
    data = (tmp_path / "audio/a.flac").read_bytes()
    (tmp_path / "audio/a.flac").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"a\.flac"):
        AudioLoader(audio_store, "train", 1, 800, 0).batch(0)
    sf.write(tmp_path / "audio/a.flac", np.zeros(900), 2 * RATE)
    with pytest.raises(UserError, match="16000 Hz"):
        AudioLoader(audio_store, "train", 1, 800, 0).batch(0)
    (tmp_path / "audio/a.flac").unlink()
    with pytest.raises(UserError, match=r"a\.flac"):
        AudioLoader(audio_store, "train", 1, 800, 0).batch(0)
    with pytest.raises(UserError, match="audio only"):
        CodesLoader(audio_store, "train", 1, 5, 0)


def test_invalid_loader_arguments_are_user_errors(store):
    with pytest.raises(UserError, match="multiple of the 4 processes"):
        codes_loader(store, batch_size=6, world_size=4)
    with pytest.raises(UserError, match="frames must be at least 1, got 0"):
        codes_loader(store, frames=0)
    with pytest.raises(UserError, match=r"must be in \[0, 1\], got 1\.5"):
        codes_loader(store, caption_dropout=1.5)
