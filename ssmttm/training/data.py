"""What training writes down about the store that it learns from."""

from pathlib import Path
from typing import Any

from ssmttm.codecs import Codec, load_codec
from ssmttm.data.store import Store
from ssmttm.errors import UserError


def store_facts(store: Store, name: str) -> dict[str, Any]:
    """Name, fingerprint, licences, hours by split, and name and fingerprint of codec and text encoder, as JSON."""
    info = store.info

    def part(kind: str) -> dict[str, Any] | None:
        return {key: info[kind][key] for key in ("name", "fingerprint")} if info.get(kind) else None

    return {
        "store": Path(name).name,
        "fingerprint": store.fingerprint,
        "licences": info["licences"],
        "hours": info["hours"],
        "codec": part("codec"),
        "text": part("text"),
    }


def check_complete(store: Store, name: str) -> None:
    """Raises UserError unless the store has both codes and caption embeddings."""
    if not store.info.get("codec") or not store.info.get("text"):
        raise UserError(
            f"{name} has no codes and caption embeddings to learn from: run `python -m data_prep pack --root {name}`"
        )


def codec_of(store: Store, name: str, n_codebooks: int | None = None) -> Codec:
    """The codec that a store's codes were made with, kept to its first codebooks.

    Raises:
        UserError: the store has no codes or captions, or the codec of that name here is another.
    """
    check_complete(store, name)
    codec = load_codec(store.info["codec"]["name"], n_codebooks)
    check_same("codec", codec.fingerprint, store.info)
    return codec


def check_same(kind: str, fingerprint: str, info: dict[str, Any]) -> None:
    """Raises UserError unless the codec or text encoder here is the one that the store was made with."""
    if fingerprint != info[kind]["fingerprint"]:
        raise UserError(
            f"the store was made with another {kind} than the {info[kind]['name']} that is installed here: prepare it "
            "again, or train where the original is"
        )
