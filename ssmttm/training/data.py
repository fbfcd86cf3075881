"""What training writes down about the store that it learns from."""

from pathlib import Path
from typing import Any

from ssmttm.data.store import Store


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
