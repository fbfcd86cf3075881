"""Checkpoint folders, local or from the Hugging Face hub, and their fingerprints.

A hub name may end in @ and a revision, a branch, a tag or a commit. What is downloaded is recorded with its commit, as
in "descript/dac_44khz@0f1a...", so a name from a card or a store gives the same files again.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from ssmttm.errors import UserError, first_line
from ssmttm.files import file_sha256


def checkpoint_folder(
    name: str, files: Sequence[str], what: str, advice: str = "", revision: str | None = None
) -> Path:
    """The local folder of a path or a hub name, downloaded if it is not cached. Raises UserError if that fails.

    Args:
        files: patterns of the files to download.
        what: the kind of checkpoint, such as "text encoder", for the messages.
        advice: an alternative, for the messages.
        revision: of a hub name without one.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")):
        raise UserError(f"there is no {what} folder {name}: check the path")
    repository, revision = split_revision(name, revision)
    advice = f", or {advice}" if advice else ""
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except RevisionNotFoundError as error:
        raise UserError(f"the {what} {repository!r} has no revision {revision!r}: check its name{advice}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"{name!r} is no {what} on the hub and no folder: check the name{advice}") from error
    except OSError as error:
        raise UserError(
            f"the {what} {name!r} cannot be fetched (the hub is unreachable or denied access): check the network, give "
            f"its folder{advice}"
        ) from error


def upload_folder(folder: Path, repo_id: str, private: bool, revision: str | None, message: str) -> str:
    """Upload a folder to a model repository of the hub, which is made if there is none. Returns the address of the
    commit. Raises UserError if the hub cannot be reached or refuses."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message
        )  # fmt: skip
    except (OSError, HFValidationError) as error:
        reason = first_line(error)
        raise UserError(
            f"cannot upload to {repo_id} ({reason}): check the name, the network and `hf auth login`"
        ) from error
    return str(commit)


def split_revision(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """A hub name without its revision, and the revision, or the given one. Raises UserError if the two differ."""
    repository, _, own = name.partition("@")
    if own and revision and own != revision:
        raise UserError(f"{name} names another revision than revision={revision}: give one of them")
    if name.endswith("@"):
        raise UserError(f"{name} names no revision after the @: leave the @ out, or give a branch, tag or commit")
    return repository, own or revision


def with_commit(name: str, folder: Path) -> str:
    """A hub name with the commit of its downloaded folder, a folder of the hub's cache; else the name as it is."""
    commit = commit_of(folder)
    return f"{split_revision(name)[0]}@{commit}" if commit else name


def commit_of(folder: Path) -> str | None:
    """The commit of a downloaded folder; None of any other."""
    return folder.name if folder.parent.name == "snapshots" else None


def fingerprint_of(files: Iterable[Path]) -> str:
    """16 hex digits over the contents of files, in the given order."""
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()[:16]
