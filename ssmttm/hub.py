"""Checkpoints as folders: one that is here, or one of the Hugging Face hub; and what tells their weights apart."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from ssmttm.errors import UserError
from ssmttm.files import file_sha256


def checkpoint_folder(name: str, files: Sequence[str], what: str, advice: str = "") -> Path:
    """The folder of that path, or of a hub name: in the local cache, fetched if need be.

    Args:
        files: patterns of what is fetched.
        what: what the checkpoint is of, such as "text encoder".
        advice: what else to try, for the messages.

    Raises:
        UserError: no such folder or name, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")):
        raise UserError(f"there is no {what} folder {name}: check the path")
    advice = f", or {advice}" if advice else ""
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"{name!r} is no {what} on the hub and no folder: check the name{advice}") from error
    except OSError as error:
        raise UserError(
            f"the {what} {name!r} cannot be fetched (the hub is out of reach or refused): "
            f"check the network, give a folder that holds it{advice}"
        ) from error


def fingerprint_of(files: Iterable[Path]) -> str:
    """16 hex digits over the contents of files, in their order."""
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()[:16]
