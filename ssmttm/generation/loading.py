"""Opening a model: find its folder, check that its parts belong together, build it and load its weights."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from ssmttm import checkpoint
from ssmttm.adapters import without_adapter
from ssmttm.codecs import Codec
from ssmttm.codecs.latents import LatentStatistics
from ssmttm.empty_weights import EmptyWeights
from ssmttm.errors import UserError, first_line
from ssmttm.generation.request import Sampling
from ssmttm.hub import split_revision
from ssmttm.model_folder import (
    CODEC,
    SECOND_STAGE,
    TEXT_ENCODER,
    VAE,
    check_layout,
    check_tensor_names,
    folder_to_write,
    is_exported,
    read_card,
    to_half,
    write_card,
)
from ssmttm.models import LatentDenoiser, TokenLM, build_model
from ssmttm.models.controls import CONFIG_KEYS
from ssmttm.ops.int8 import quantise
from ssmttm.text.encoders import TextEncoder

if TYPE_CHECKING:
    from ssmttm.codecs.vae import PatchedVAE

ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED = ASSETS / "tiny_lm"
HUB_FILES = ["config.yaml", "model.safetensors", "card.json", "codec/*", "text_encoder/*", "vae/*", f"{SECOND_STAGE}/*"]
KINDS = {"lm": "a language model", "diffusion": "a denoiser", "codec": "a codec", "distill_codec": "a codec's decoder"}


@dataclass(frozen=True)
class ModelFolder:
    """A language model or a denoiser on disk.

    Attributes:
        path: an exported folder or a checkpoint.
        name: as in the card; else the names of the run and the checkpoint.
        config: the training config.
        card: card.json of an exported folder, state.json of a checkpoint.
        weights_file: the averaged weights if there are any; of a sharded checkpoint the first part.
    """

    path: Path
    name: str
    config: DictConfig
    card: dict[str, Any]
    weights_file: Path

    @property
    def weights_sha256(self) -> str:
        """The hash of the weights; see `ssmttm.checkpoint.weights_sha256`."""
        return checkpoint.weights_sha256(self.path)

    def provenance(self, kind: str) -> dict[str, Any]:
        """Name and fingerprint of the `codec` or `text` encoder of the training data; fingerprint of the `latents`
        statistics of a denoiser. Raises UserError if the card does not have it."""
        value = self._data.get(kind)
        if not isinstance(value, dict) or "fingerprint" not in value:
            raise UserError(f"the card of {self.path} names no {kind} that it was trained with: export the model again")
        return value

    def source(self, kind: str) -> str:
        """Where to load its codec or text encoder from; a name that begins with ./ is a subfolder of the model's."""
        name = self.provenance(kind)["name"]
        return str((self.path / name).resolve()) if name.startswith("./") else name

    @property
    def sampling(self) -> Sampling:
        """The sampling settings of a call that gives none: those of the card's `sampling`; else of the model that it
        was initialised from or distilled from, but without guidance if that is distilled; else the usual ones. Raises
        UserError if the card's are no such settings."""
        own = self.card.get("sampling") or {}
        sources = (self.card.get("init"), (self.card.get("data") or {}).get("teacher"))
        found = [source["sampling"] for source in sources if source and source.get("sampling")]
        inherited: dict[str, Any] = found[0] if found else {}
        distilled = {} if self.distilled_guidance_scale == 1 else {"guidance_scale": 1.0}
        try:
            return Sampling(**{**inherited, **distilled, **own})
        except (TypeError, UserError) as error:
            raise UserError(f"the card of {self.path} has no valid sampling settings, {own}: {error}") from error

    @property
    def distilled_guidance_scale(self) -> float:
        """The guidance scale that was distilled into it or into its teacher; 1: none."""
        own = self.config.distill.guidance_scale if self.config.get("task") == "distill" else 1.0
        teacher = (self.card.get("data") or {}).get("teacher") or {}
        return own if own != 1 else teacher.get("distilled_guidance_scale", 1.0)

    @property
    def null_condition(self) -> str:
        """See `ssmttm.text.null_condition`."""
        return self.provenance("text").get("null_condition", "empty_caption")

    @property
    def licences(self) -> dict[str, Any] | None:
        """Licence counts of its training data and of that of the model that it was initialised from."""
        initial, own = (self.card.get("init") or {}).get("licences"), self._data.get("licences")
        return initial | own if initial and own else initial or own

    @property
    def _data(self) -> dict[str, Any]:
        data = self.card.get("data")
        if not isinstance(data, dict):
            raise UserError(f"the card of {self.path} has no training data: export the model again")
        return data


def open_model_folder(
    folder_or_hub_id: str | Path | None, task: str = "lm", revision: str | None = None
) -> ModelFolder:
    """Find a model: an exported folder, a checkpoint, a run folder, the name of an embedded model (tiny_lm,
    tinyttm_tiny), or a hub id, at a revision; None is tiny_lm. Raises UserError if there is none, it is damaged, or it
    was trained for another task."""
    path = checkpoint.find_model(find_folder(folder_or_hub_id, revision))
    check_layout(path)
    config = checkpoint.read_config(path)
    found = config.get("task", "lm")
    found = "lm" if found == "distill" else found
    if found == "distill_text":
        raise UserError(f"{path} holds a text encoder and its language model apart: join them with `ssmttm export`")
    if found != task:
        kind = KINDS.get(found, found)
        raise UserError(f"{path} holds {kind}, not {KINDS[task]}: give the folder of a run with task={task}")
    card = read_card(path)
    files = checkpoint.tensor_files(path, "ema") or checkpoint.tensor_files(path, "model")
    weights_file = files[0] if files else path / "model.safetensors"
    run = f"{path.parent.parent.name}/" if path.parent.name == "checkpoints" else ""
    return ModelFolder(path, card.get("name") or f"{run}{path.name}", config, card, weights_file)


def open_second_stage_folder(first: ModelFolder, path: str | Path | None) -> ModelFolder | None:
    """The second stage at `path`, by default in the first stage's folder; None if there is none. Raises UserError if it
    is not a denoiser, or was trained with another codec or text encoder than the first stage."""
    if path is None and not (first.path / SECOND_STAGE).is_dir():
        return None
    second = open_model_folder(path or first.path / SECOND_STAGE, task="diffusion")
    for kind in ("codec", "text"):
        one, other = first.provenance(kind), second.provenance(kind)
        if one["fingerprint"] != other["fingerprint"]:
            parts = [f"{part['name']} ({part['fingerprint']})" for part in (one, other)]
            raise UserError(f"both stages must come from one store, but were trained with {kind} {' and '.join(parts)}")
    return second


def describe_controls_of(folder_or_hub_id: str | Path) -> list[tuple[str, str, str]]:
    """Each music control of a model, the stages that take it, and where it comes from if the caller does not give it:
    for `ssmttm info`."""
    folder = open_model_folder(folder_or_hub_id)
    second = open_second_stage_folder(folder, None)
    stages = {"language model": folder.config.model}
    if second is not None:
        stages["second stage"] = second.config.model
    drawn = bool(folder.config.model.get("predict_controls"))
    rows = []
    for key in CONFIG_KEYS.values():
        takers = [name for name, config in stages.items() if config.get(key)]
        absent = "a null vector"
        if key == "timing":
            absent = "known: a clip begins and ends like a piece"
        elif key == "bar_position":
            absent = "known from tempo and metre"
        elif key != "chroma" and drawn and folder.config.model.get(key):
            absent = "drawn from the caption"
        rows.append((key, " and ".join(takers) or "nothing", absent if takers else ""))
    return rows


def load_language_model(folder: ModelFolder) -> TokenLM:
    """The language model of a folder, in eval mode. Raises UserError if the weights are damaged or do not fit."""
    model = _load_model(folder)
    assert isinstance(model, TokenLM)
    return model


def load_denoiser(folder: ModelFolder) -> LatentDenoiser:
    """The denoiser of a folder, in eval mode. Raises UserError if the weights are damaged or do not fit, or the latent
    statistics are not those in the card."""
    model = _load_model(folder)
    assert isinstance(model, LatentDenoiser)
    fingerprint = LatentStatistics(model.latent_mean, model.latent_std).fingerprint
    if fingerprint != folder.provenance("latents")["fingerprint"]:
        raise UserError(f"{folder.path} has other latent statistics than those it was trained with: export it again")
    return model


def load_vae_of(
    folder: ModelFolder, denoiser: LatentDenoiser, codec: Codec, device: torch.device
) -> "PatchedVAE | None":
    """The VAE whose latents a denoiser generates, by patches of a code frame; None if it generates codes. Raises
    UserError if it is not the one that it was trained with, or its frame rate does not fit the codec's."""
    config = denoiser.config
    if not config.vae_channels:
        return None
    from ssmttm.codecs.vae import PatchedVAE, frames_per_code, load_vae  # diffusers is slow to import

    original, vae = folder.provenance("vae"), load_vae(folder.source("vae"))
    if original["fingerprint"] != vae.fingerprint:
        raise UserError(
            f"{folder.name} was trained with the latents of VAE {original['name']!r} ({original['fingerprint']}), got "
            f"{vae.fingerprint}: restore the original"
        )
    ratio = frames_per_code(vae.frame_rate, codec.frame_rate, vae.name, codec.name)
    if (vae.latent_channels, ratio) != (config.vae_channels, config.vae_frames):
        raise UserError(f"{folder.path} mixes two models: the latents of its VAE are not those of its denoiser")
    return PatchedVAE(vae, ratio).to(device)


def _load_model(folder: ModelFolder) -> nn.Module:
    with EmptyWeights():
        model = build_model(folder.config.model)
    weights_format = folder.card.get("weights")
    if weights_format == "int8":
        quantise(model)
    elif weights_format is not None:
        raise UserError(f"unknown weights format {weights_format!r} in {folder.path}, known is int8: update ssmttm")
    weights = without_adapter(checkpoint.load_weights(folder.path), folder.card)
    check_tensor_names(weights, folder.weights_file)
    checkpoint.load_into(model, weights, folder.weights_file)
    return model.eval()


def check_fit(
    folder: ModelFolder, model: TokenLM, codec: Codec, text_encoder: TextEncoder, denoiser: LatentDenoiser | None = None
) -> None:
    """Check that the parts are those that the model was trained with, and that the stages fit. Raises UserError if a
    fingerprint or a size differs."""
    for kind, part in (("codec", codec), ("text", text_encoder)):
        original = folder.provenance(kind)
        if original["fingerprint"] != part.fingerprint:
            expected = f"{kind} {original['name']!r} ({original['fingerprint']})"
            raise UserError(
                f"{folder.name} was trained with {expected}, got {part.fingerprint}: restore the original, or use a "
                f"model that was trained with the present one"
            )
    n_codebooks, config = codec.n_codebooks, model.config
    if denoiser is not None:
        check_stages(folder, model, denoiser)
        n_codebooks = config.n_codebooks
    sizes = (n_codebooks, codec.codebook_size, text_encoder.dim)
    wanted = (config.n_codebooks, config.codebook_size, config.text_dim)
    if wanted != sizes:
        raise UserError(f"{folder.path} mixes two models: codebooks, codes and text width are {sizes}, not {wanted}")


def check_stages(folder: ModelFolder, model: TokenLM, denoiser: LatentDenoiser) -> None:
    """Raises UserError unless the first stage generates the number of codebooks that the second one expects."""
    first, second = model.config.n_codebooks, denoiser.config.n_coarse_codebooks
    if first != second:
        raise UserError(f"{folder.name} generates {first} codebooks, the second stage expects {second}: they must fit")


def find_folder(folder_or_hub_id: str | Path | None, revision: str | None = None) -> Path:
    """The local folder, or that of an embedded model; a hub id is downloaded. Raises UserError if the hub does not give
    it, or there is a revision of something else than a hub id."""
    local = _local_folder(folder_or_hub_id)
    if local is None:
        return _download(str(folder_or_hub_id), revision)
    if revision is not None:
        raise UserError(f"revision={revision} is of a hub id, and {local} is a local folder: leave it out")
    return local


def _local_folder(folder_or_hub_id: str | Path | None) -> Path | None:
    """The path that a name means without the hub; None for a hub id."""
    if folder_or_hub_id is None:
        return EMBEDDED
    path, name = Path(folder_or_hub_id), str(folder_or_hub_id)
    if not path.exists() and path.name == name and (ASSETS / name / "card.json").is_file():
        return ASSETS / name
    if path.exists() or isinstance(folder_or_hub_id, Path) or name.startswith((".", "/", "~")):
        return path
    return None if split_revision(name, None)[0].count("/") == 1 else path


def _download(name: str, revision: str | None) -> Path:
    """The folder of a hub id, which may end in @ and a revision."""
    repository, revision = split_revision(name, revision)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=HUB_FILES))
    except (OSError, HFValidationError) as error:
        reason = first_line(error)
        raise UserError(f"no folder {name}, nor on the hub ({reason}): check the name or the network") from error


def copy_model_folder(
    folder: ModelFolder, second: ModelFolder | None, out: Path, merged: dict[str, Tensor] | None,
    adapters: list[dict[str, Any]] | None, sampling: Sampling,
) -> None:  # fmt: skip
    """Write an exported folder again, with its parts, and the second stage in its subfolder.

    Args:
        merged: the weights to write; None: those of the folder.
        adapters: what is merged into them, for the card.
        sampling: the settings of a call that gives none, for the card if they are not the folder's.

    Raises:
        UserError: a folder is a run or a checkpoint, or `out` is in it.
    """
    for source in (folder, second):
        if source is not None and not is_exported(source.path):
            raise UserError(f"{source.path} is a run: write it as a model folder with `ssmttm export` first")
    if out.resolve().is_relative_to(folder.path.resolve()):
        raise UserError(f"{out} is inside the model's own folder {folder.path}: give another place")
    with folder_to_write(out) as target:
        for part in ("config.yaml", "model.safetensors", CODEC, TEXT_ENCODER):
            _copy(folder.path / part, target / part)
        if second is not None:
            (target / SECOND_STAGE).mkdir()
            for part in ("config.yaml", "model.safetensors", "card.json", VAE):
                _copy(second.path / part, target / SECOND_STAGE / part)
        if merged is not None:
            half = any(value.dtype == torch.float16 for value in checkpoint.load_weights(folder.path).values())
            save_file(to_half(merged) if half else merged, target / "model.safetensors")
        changes: dict[str, Any] = {} if merged is None else {"adapters": adapters}
        if sampling != folder.sampling:
            changes["sampling"] = asdict(sampling)
        write_card(target, folder.card | changes)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.is_file():
        shutil.copyfile(source, target)
