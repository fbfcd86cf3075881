"""The store of a training: its metadata for the model card, and checks of its codec and text encoder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ssmttm.codecs import EMBEDDED, EMBEDDED_STEREO, Codec, load_codec
from ssmttm.data.loader import CodesLoader, Field, Item
from ssmttm.data.step_values import StepValues
from ssmttm.data.store import Store
from ssmttm.errors import UserError

if TYPE_CHECKING:
    from ssmttm.codecs.vae import OobleckVAE


def store_metadata(store: Store, name: str) -> dict[str, Any]:
    """Name, fingerprint, licences, hours by split, and name and fingerprint of codec and text encoder, as JSON."""
    info = store.info
    codec, text = (
        {key: info[kind][key] for key in ("name", "fingerprint")} if info.get(kind) else None
        for kind in ("codec", "text")
    )
    return {
        "store": Path(name).name,
        "fingerprint": store.fingerprint,
        "licences": info["licences"],
        "hours": info["hours"],
        "codec": codec,
        "text": text,
    }


def codes_loader(
    store: Store,
    config: DictConfig,
    split: str,
    batch_size: int | StepValues,
    rank: int,
    world_size: int,
    fields: Mapping[str, Field],
    caption_row: Callable[[Item], int] | None = None,
) -> CodesLoader:
    """The loader of `config.data` with further fields; captions are dropped, and lengths change, in the train split
    only."""
    data = config.data
    dropout = data.caption_dropout if split == "train" else 0.0
    frames = StepValues(data.frames, data.frames_schedule if split == "train" else ())
    fixed = data.fixed_crops
    captions = (dropout, fixed, fields, caption_row)
    return CodesLoader(store, split, batch_size, frames, config.seed, rank, world_size, *captions)


def check_complete(store: Store, name: str) -> None:
    """Raises UserError unless the store has both codes and caption embeddings."""
    if not store.info.get("codec") or not store.info.get("text"):
        raise UserError(
            f"{name} has no codes and caption embeddings to learn from: run `python -m data_prep pack --root {name}`"
        )


def no_captions_warning(store: Store, name: str, batch: Mapping[str, Any]) -> str | None:
    """A warning if a training reads captions (its batches have them) and no segment that it learns from has one."""
    if "captions" not in batch or store.has_captions("train"):
        return None
    return (f"no training segment of {name} has a caption, so the model cannot learn to follow one: if captions exist, "
            "prepare the store again with them")  # fmt: skip


def short_segments_warning(store: Store, name: str, config: DictConfig) -> str | None:
    """A warning if a training reads codes and every segment that it learns from is shorter than an item."""
    frames = config.data.get("frames")
    if frames is None or not store.info.get("codec"):
        return None
    longest = store.longest("train")
    if longest >= frames:
        return None
    return (f"every training segment of {name} is shorter than data.frames={frames}, so each item is padded: set "
            f"data.frames={longest}, the longest, or prepare longer segments")  # fmt: skip


def load_store_codec(store: Store, name: str, n_codebooks: int | None = None) -> Codec:
    """The codec of a store's codes, limited to `n_codebooks`. Raises UserError if the installed one is another."""
    check_complete(store, name)
    codec = load_codec(store.info["codec"]["name"], n_codebooks)
    store.require_codec(codec)
    return codec


def load_store_vae(store: Store) -> "OobleckVAE":
    """The VAE of a store's latents. Raises UserError if the store has none, or the installed VAE is another."""
    from ssmttm.codecs.vae import load_vae

    vae = load_vae(store.vae_info["name"])
    store.require_vae(vae)
    return vae


def check_embedded_codec(store: Store, name: str) -> None:
    """Raises UserError if a store was encoded by an embedded codec of another version: a model of its codes could be
    trained, and not be sampled."""
    if store.info["codec"]["name"] in EMBEDDED | EMBEDDED_STEREO:
        load_store_codec(store, name)


def check_fingerprint(kind: str, fingerprint: str, info: dict[str, Any]) -> None:
    """Raises UserError unless the installed codec or text encoder (`kind`) is that of the store."""
    if fingerprint != info[kind]["fingerprint"]:
        raise UserError(
            f"the store was made with another {kind} than the installed {info[kind]['name']}: prepare it again, or "
            f"install the original {kind}"
        )


def check_model_kind(config: DictConfig, kind: str) -> None:
    """Raises UserError unless the model is of the kind that the task trains."""
    if config.model.kind != kind:
        raise UserError(f"task={config.task} trains a {kind}, not a {config.model.kind}: choose another model or task")


def check_text_encoder(config: DictConfig, info: dict[str, Any]) -> None:
    """Raises UserError unless the store has the text encoder `data.text_encoder`, if that is set, and the model takes
    text of the width of its embeddings."""
    text, text_dim, store = info["text"], config.model.text_dim, config.data.store
    wanted = config.data.text_encoder
    if wanted is not None and _last_name(wanted) != _last_name(text["name"]):
        raise UserError(
            f"{store} holds the text of {text['name']}, not of data.text_encoder={wanted}: prepare it with "
            f"--text {wanted}, or set data.text_encoder=null and model.text_dim={text['dim']}"
        )
    if text_dim != text["dim"]:
        raise UserError(
            f"the model takes text of width {text_dim}, {store} holds {text['name']} of width {text['dim']}: "
            f"set model.text_dim={text['dim']}, or prepare with another text encoder"
        )


def _last_name(name: str) -> str:
    """Without owner and revision: a local copy of google/flan-t5-base is the folder flan-t5-base."""
    return Path(name).name.partition("@")[0]
