"""Checkpoint folders, local or from the Hugging Face hub, and their fingerprints."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from ssmttm.errors import UserError
from ssmttm.files import file_sha256


def checkpoint_folder(name: str, files: Sequence[str], what: str, advice: str = "") -> Path:
    """The local folder of a path or a hub name, downloaded if it is not cached. Raises UserError if that fails.

    Args:
        files: patterns of the files to download.
        what: the kind of checkpoint, such as "text encoder", for the messages.
        advice: an alternative, for the messages.
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
            f"the {what} {name!r} cannot be fetched (the hub is unreachable or denied access): check the network, give "
            f"its folder{advice}"
        ) from error


def fingerprint_of(files: Iterable[Path]) -> str:
    """16 hex digits over the contents of files, in the given order."""
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()[:16]
