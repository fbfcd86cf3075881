"""What a model folder holds, read and checked before any weight reaches a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from omegaconf import DictConfig

from ssmttm import checkpoint
from ssmttm.codecs import Codec
from ssmttm.codecs.latents import LatentStatistics
from ssmttm.errors import UserError
from ssmttm.models import LatentDenoiser, TokenLM, build_model
from ssmttm.ops.int8 import quantise
from ssmttm.text.encoders import TextEncoder

ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED = ASSETS / "tiny_lm"
GUIDANCE_SCALE = 3.0
SECOND_STAGE = "second_stage"  # of an exported model of two stages, the folder with the second
HUB_FILES = ["config.yaml", "model.safetensors", "card.json", "codec/*", "text_encoder/*", f"{SECOND_STAGE}/*"]


@dataclass(frozen=True)
class ModelFolder:
    """A language model or a denoiser on disk.

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
        """`codec` or `text`: the name and fingerprint of what the training data was made with; of a denoiser also
        `latents`, the fingerprint of their statistics.

        Raises:
            UserError: the card does not say it.
        """
        value = self._data.get(kind)
        if not isinstance(value, dict) or "fingerprint" not in value:
            raise UserError(f"the card of {self.path} names no {kind} that it was trained with: export the model again")
        return value

    def source(self, kind: str) -> str:
        """Where its codec or text encoder is to be loaded from; a name that begins with ./ is a folder in its own."""
        name = self.fact(kind)["name"]
        return str((self.path / name).resolve()) if name.startswith("./") else name

    @property
    def guidance_scale(self) -> float:
        """What it is sampled with unless asked otherwise: 1 for a student that has its teacher's guidance within."""
        return GUIDANCE_SCALE if self.distilled_guidance_scale == 1 else 1.0

    @property
    def distilled_guidance_scale(self) -> float:
        """The guidance that it follows in one pass, learnt from its teacher or in it already; 1: none."""
        own = self.config.distill.guidance_scale if self.config.get("task") == "distill" else 1.0
        teacher = (self.card.get("data") or {}).get("teacher") or {}
        return own if own != 1 else teacher.get("distilled_guidance_scale", 1.0)

    @property
    def null_condition(self) -> str:
        """What it reads of a caption, see `ssmttm.text.null_condition`."""
        return self.fact("text").get("null_condition", "empty_caption")

    @property
    def licences(self) -> Any:
        """Licences of the training data, as its store counts them, and of what it was started from."""
        of_start, of_store = (self.card.get("init") or {}).get("licences"), self._data.get("licences")
        return of_start | of_store if of_start and of_store else of_start or of_store

    @property
    def _data(self) -> dict[str, Any]:
        data = self.card.get("data")
        if not isinstance(data, dict):
            raise UserError(f"the card of {self.path} does not say what data it was trained on: export the model again")
        return data


def open_model_folder(folder_or_hub_id: str | Path | None, task: str = "lm") -> ModelFolder:
    """Find a model: None is the embedded one; else an exported folder, a checkpoint, a run folder, the name of an
    embedded model (tiny_lm, tiny_two_stage), or a hub id.

    Raises:
        UserError: there is none, it is damaged, or it was trained for another task.
    """
    path = checkpoint.find_model(_local(folder_or_hub_id))
    config = checkpoint.read_config(path)
    found = config.get("task", "lm")
    found = "lm" if found == "distill" else found
    if found != task:
        if found == "distill_text":
            raise UserError(f"{path} holds a text encoder beside its language model: `ssmttm export` makes one of them")
        kinds = {"lm": "a language model", "diffusion": "a denoiser", "codec": "a codec",
                 "distill_codec": "a codec's decoder"}  # fmt: skip
        raise UserError(
            f"{path} holds {kinds.get(found, found)}, not {kinds[task]}: give the folder of a run with task={task}"
        )
    card = checkpoint.read_document(path, "card" if (path / "card.json").is_file() else "state")
    if not isinstance(card, dict):
        raise UserError(f"the card of {path} is no JSON object: export the model again")
    averaged = path / "ema.safetensors"
    weights_file = averaged if averaged.is_file() else path / "model.safetensors"
    run = f"{path.parent.parent.name}/" if path.parent.name == "checkpoints" else ""
    return ModelFolder(path, card.get("name") or f"{run}{path.name}", config, card, weights_file)


def open_second_stage_folder(coarse_codes: ModelFolder, given: str | Path | None) -> ModelFolder | None:
    """The second stage that is given, else the one that lies in the first one's folder, else None.

    Raises:
        UserError: it is no denoiser, or was trained with another codec or text encoder than the first stage.
    """
    if given is None and not (coarse_codes.path / SECOND_STAGE).is_dir():
        return None
    folder = open_model_folder(given or coarse_codes.path / SECOND_STAGE, task="diffusion")
    for kind in ("codec", "text"):
        first, second = coarse_codes.fact(kind), folder.fact(kind)
        if first["fingerprint"] != second["fingerprint"]:
            raise UserError(
                f"{coarse_codes.name} was trained with {kind} {first['name']} ({first['fingerprint']}), {folder.name} with "
                f"{second['name']} ({second['fingerprint']}): both stages must come from one store"
            )
    return folder


def load_denoiser(folder: ModelFolder) -> LatentDenoiser:
    """The denoiser of a folder, in eval mode.

    Raises:
        UserError: the weights cannot be read, belong to another model, or hold other latent statistics than its card.
    """
    model = load_model(folder)
    held = LatentStatistics(model.latent_mean, model.latent_std).fingerprint
    if held != folder.fact("latents")["fingerprint"]:
        raise UserError(f"{folder.path} holds other statistics of latents than it was trained with: export it again")
    return model


def load_model(folder: ModelFolder) -> TokenLM | LatentDenoiser:
    """Build the model of the folder's config and fill it, in eval mode; with int8 weights where the card says so.

    Raises:
        UserError: the weights cannot be read, belong to another model or are kept in a way that is not known here.
    """
    model = build_model(folder.config.model)
    kept_as = folder.card.get("weights")
    if kept_as == "int8":
        quantise(model)
    elif kept_as is not None:
        raise UserError(f"the weights of {folder.path} are {kept_as!r}, int8 is known: a newer ssmttm may read them")
    checkpoint.load_into(model, checkpoint.load_weights(folder.path, ema=True), folder.weights_file)
    return model.eval()


def check_fit(
    folder: ModelFolder,
    model: TokenLM,
    codec: Codec,
    text_encoder: TextEncoder,
    denoiser: LatentDenoiser | None = None,
) -> None:
    """Check that codec and text encoder are those that the model was trained with, and that the stages fit.

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
    written = codec.n_codebooks
    if denoiser is not None:
        check_stages(folder, model, denoiser)
        written = model.config.n_codebooks
    wanted, given = model.config, (written, codec.codebook_size, text_encoder.dim)
    if (wanted.n_codebooks, wanted.codebook_size, wanted.text_dim) != given:
        raise UserError(
            f"{folder.path / 'config.yaml'} has {wanted.n_codebooks} codebooks of {wanted.codebook_size} and text of "
            f"width {wanted.text_dim}, but its codec and text encoder give {given}: the folder mixes two models"
        )


def check_stages(folder: ModelFolder, model: TokenLM, denoiser: LatentDenoiser) -> None:
    """Raises UserError unless the folder's model, the first stage, writes what the second is to be told."""
    told = denoiser.config.n_coarse_codebooks
    if model.config.n_codebooks != told:
        raise UserError(
            f"{folder.name} writes {model.config.n_codebooks} codebooks, the denoiser is to be told {told}: the first "
            "stage needs model.n_codebooks as the second has model.n_coarse_codebooks"
        )


def _local(folder_or_hub_id: str | Path | None) -> Path:
    """The folder meant, downloaded from the hub where it is no folder here."""
    if folder_or_hub_id is None:
        return EMBEDDED
    path, name = Path(folder_or_hub_id), str(folder_or_hub_id)
    if not path.exists() and path.name == name and (ASSETS / name / "card.json").is_file():
        return ASSETS / name
    if path.exists() or isinstance(folder_or_hub_id, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return path
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"no folder {name} here, and the hub gave no such model ({reason}): check the name or the network"
        ) from error
