"""What a model folder holds, read and checked before any weight reaches a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from omegaconf import DictConfig

from ssmttm import checkpoint
from ssmttm.codecs import Codec
from ssmttm.errors import UserError
from ssmttm.models import build_model
from ssmttm.models.token_lm import TokenLM
from ssmttm.text.encoders import TextEncoder

EMBEDDED = Path(__file__).parent.parent / "assets" / "tiny_lm"
HUB_FILES = ["config.yaml", "model.safetensors", "card.json", "codec/*", "text_encoder/*"]


@dataclass(frozen=True)
class ModelFolder:
    """A language model on disk.

    Attributes:
        path: an exported folder or a checkpoint.
        name: what the card calls it, else the run's and the checkpoint's folder names.
        config: the config it was trained with.
        card: card.json of an exported folder, state.json of a checkpoint: training data, licences, codec, text encoder.
        weights_file: the averaged weights where there are any.
    """

    path: Path
    name: str
    config: DictConfig
    card: dict[str, Any]
    weights_file: Path

    def fact(self, kind: str) -> dict[str, Any]:
        """`codec` or `text`: the name and fingerprint of what the training data was made with.

        Raises:
            UserError: the card does not say it.
        """
        value = self._data.get(kind)
        if not isinstance(value, dict) or not {"name", "fingerprint"} <= value.keys():
            raise UserError(f"the card of {self.path} names no {kind} that it was trained with: export the model again")
        return value

    def source(self, kind: str) -> str:
        """Where its codec or text encoder is to be loaded from; a name that begins with ./ is a folder in its own."""
        name = self.fact(kind)["name"]
        return str((self.path / name).resolve()) if name.startswith("./") else name

    @property
    def reading(self) -> str:
        """What it reads of a caption, see `ssmttm.text.reading`."""
        return self.fact("text").get("reading", "plain")

    @property
    def licences(self) -> Any:
        """Licences of the training data, as its store counts them."""
        return self._data.get("licences")

    @property
    def _data(self) -> dict[str, Any]:
        data = self.card.get("data")
        if not isinstance(data, dict):
            raise UserError(f"the card of {self.path} does not say what data it was trained on: export the model again")
        return data


def open_model_folder(folder_or_hub_id: str | Path | None) -> ModelFolder:
    """Find a model: None is the embedded one; else an exported folder, a checkpoint, a run folder, or a hub id.

    Raises:
        UserError: there is none, it is damaged, or it is no language model.
    """
    path = checkpoint.find_model(_local(folder_or_hub_id))
    config = checkpoint.read_config(path)
    if config.get("task", "lm") != "lm":
        raise UserError(f"{path} holds a {config.task}, not a language model: give the folder of a run with task=lm")
    card = checkpoint.read_document(path, "card" if (path / "card.json").is_file() else "state")
    if not isinstance(card, dict):
        raise UserError(f"the card of {path} is no JSON object: export the model again")
    averaged = path / "ema.safetensors"
    weights_file = averaged if averaged.is_file() else path / "model.safetensors"
    run = f"{path.parent.parent.name}/" if path.parent.name == "checkpoints" else ""
    return ModelFolder(path, card.get("name") or f"{run}{path.name}", config, card, weights_file)


def load_model(folder: ModelFolder) -> TokenLM:
    """Build the model of the folder's config and fill it, in eval mode.

    Raises:
        UserError: the weights cannot be read or belong to another model.
    """
    model = build_model(folder.config.model)
    checkpoint.fill(model, checkpoint.load_weights(folder.path, ema=True), folder.weights_file)
    return model.eval()


def check_fit(folder: ModelFolder, model: TokenLM, codec: Codec, text_encoder: TextEncoder) -> None:
    """Check that codec and text encoder are those that the model was trained with.

    Raises:
        UserError: a fingerprint or a size differs.
    """
    for kind, part in (("codec", codec), ("text", text_encoder)):
        trained_with = folder.fact(kind)
        if trained_with["fingerprint"] != part.fingerprint:
            raise UserError(
                f"{folder.name} was trained with {kind} {trained_with['name']!r} of fingerprint "
                f"{trained_with['fingerprint']}, but what is found under that name is {part.fingerprint}: "
                "put the original back, or train again"
            )
    wanted, given = model.config, (codec.n_codebooks, codec.codebook_size, text_encoder.dim)
    if (wanted.n_codebooks, wanted.codebook_size, wanted.text_dim) != given:
        raise UserError(
            f"{folder.path / 'config.yaml'} has {wanted.n_codebooks} codebooks of {wanted.codebook_size} and text of "
            f"width {wanted.text_dim}, but its codec and text encoder give {given}: the folder mixes two models"
        )


def _local(folder_or_hub_id: str | Path | None) -> Path:
    """The folder meant, downloaded from the hub where it is no folder here."""
    if folder_or_hub_id is None:
        return EMBEDDED
    path, name = Path(folder_or_hub_id), str(folder_or_hub_id)
    if path.exists() or isinstance(folder_or_hub_id, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return path
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"no folder {name} here, and the hub gave no such model ({reason}): check the name or the network"
        ) from error
