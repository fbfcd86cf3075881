"""The parts of a pipeline: loaded from a folder or the hub, saved, moved to a device, adapted.

Shapes: C channels, S samples, K codebooks, T frames.
"""

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ssmttm import __version__
from ssmttm.adapters import Adapter, check_base, merge, read_adapter, unmerge
from ssmttm.codecs import Autoencoder, Codec, encoder_of, load_codec
from ssmttm.errors import UserError
from ssmttm.generation import loading
from ssmttm.generation.editing.continuation import AudioInput, EncodedClip, encode_clip
from ssmttm.generation.engines import Engine, EngineCache
from ssmttm.generation.item_controls import describe_controls
from ssmttm.generation.loading import ModelFolder
from ssmttm.generation.request import MAX_DURATION, Request, Sampling
from ssmttm.generation.second_stage import SecondStage, SecondStageConfig
from ssmttm.hub import commit_of, upload_folder
from ssmttm.models.controls import SupportsControls
from ssmttm.models.token_lm import TokenLM
from ssmttm.patterns import Pattern, get_pattern
from ssmttm.text.encoders import TextEncoder, load_text_encoder
from ssmttm.text.null_condition import build_null_condition

_DECODED_SECONDS = 60.0  # of a clip at once


class PipelineParts:
    """A language model, its codec, its text encoder and, in a two-stage model, the second stage: loaded, saved, moved,
    adapted.

    Attributes:
        metadata: model and weights hash, codec, text encoder, licences of the training data, software: what goes into
            the sidecar of each audio file.
        second_stage: None for a one-stage model.
        sampling_defaults: the sampling settings of a call that gives none; `save_pretrained` keeps them.
        max_duration: longest clip that a call accepts, in seconds; may be raised.
    """

    def __init__(
        self, model: TokenLM, codec: Codec, text_encoder: TextEncoder, pattern: Pattern,
        metadata: dict[str, Any] | None = None, max_duration: float = MAX_DURATION,
        null_condition: str = "empty_caption", second_stage: SecondStage | None = None,
        sampling_defaults: Sampling | None = None,
    ) -> None:  # fmt: skip
        self.model = model.eval()
        self.codec = codec.eval()
        self.text_encoder = text_encoder
        self.pattern = pattern
        self.metadata = metadata or {}
        self.max_duration = max_duration
        self.second_stage = second_stage
        self.sampling_defaults = sampling_defaults or Sampling()
        self._encode_caption = build_null_condition(null_condition, text_encoder)
        self._engines = EngineCache()
        self._folders: tuple[ModelFolder, ModelFolder | None] | None = None  # that it was loaded from
        self._adapters: list[tuple[Adapter, float]] = []
        self._unadapted: dict[str, Tensor] = {}  # weights before adapters were merged
        self._encoder: Codec | None = None  # loaded when audio is first encoded

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: str | Path | None = None, device: str | torch.device | None = None,
        codec: str | Path | None = None, text_encoder: str | Path | None = None,
        second_stage: str | Path | None = None, revision: str | None = None, dtype: torch.dtype | None = None,
    ) -> Self:  # fmt: skip
        """Load a model, with EMA weights if there are any, and the codec and text encoder that it was trained with.
        Raises UserError if nothing is there, a file is damaged, or model, codec and text encoder do not belong
        together.

        Args:
            folder_or_hub_id: an exported model, a checkpoint, a run folder (its newest good checkpoint), or the id of
                an exported model on the Hugging Face hub. None: the embedded tiny model.
            device: of the model and the codec; default a GPU if there is one.
            codec, text_encoder: where to load these from, such as a folder, if not by the name in the model's card.
                Their fingerprints must match.
            second_stage: a run, a checkpoint or an exported denoiser, if it is not in the model's folder.
            revision: branch, tag or commit of a hub id, which may also end in @ and the revision.
            dtype: of the language model's weights, such as torch.bfloat16; None: float32, which the others always are.
        """
        folder = loading.open_model_folder(folder_or_hub_id, revision=revision)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = loading.load_language_model(folder)
        second_folder = loading.open_second_stage_folder(folder, second_stage)
        denoiser = None if second_folder is None else loading.load_denoiser(second_folder).to(device)
        n_codebooks = (model if denoiser is None else denoiser).config.n_codebooks
        loaded_codec = load_codec(codec or folder.source("codec"), n_codebooks).to(device)
        loaded_encoder = load_text_encoder(text_encoder or folder.source("text"))
        loading.check_fit(folder, model, loaded_codec, loaded_encoder, denoiser)
        stage = None
        if second_folder is not None and denoiser is not None:
            vae = loading.load_vae_of(second_folder, denoiser, loaded_codec, device)
            stage = SecondStage(denoiser, loaded_codec, SecondStageConfig.from_config(second_folder.config), vae)
        pipeline = cls(
            model.to(device), loaded_codec, loaded_encoder,
            get_pattern(folder.config.pattern, n_codebooks=model.config.n_codebooks),
            _metadata(folder, loaded_codec, loaded_encoder, second_folder, stage),
            null_condition=folder.null_condition, second_stage=stage, sampling_defaults=folder.sampling,
        )  # fmt: skip
        pipeline._folders = (folder, second_folder)
        return pipeline if dtype is None else pipeline.to(dtype=dtype)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the models to a device, and the language model's weights to a dtype. Returns self.

        Codec and denoiser stay in float32: a residual quantiser needs it. Streams that are open, and states saved
        before, are of other weights.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise UserError(f"the weights cannot be {dtype}: choose float32, bfloat16 or float16")
        self.model.to(device=device, dtype=dtype)
        self.codec.to(device=device)
        self._encoder = None
        if self.second_stage is not None:
            self.second_stage.model.to(device=device)
            self.decoder.to(device=device)
        return self

    def load_adapter(self, folder: str | Path, strength: float = 1.0) -> None:
        """Add an adapter (LoRA or DoRA) to the language model's weights; several add up, see `ssmttm.adapters`. Raises
        UserError if it is damaged, or was trained on another model. A stream that is open does not go on with other
        adapters than its own."""
        if self._folders is None:
            raise UserError("adapters need a model that was loaded from a folder: use from_pretrained")
        adapter, model = read_adapter(folder), self._folders[0]
        check_base(adapter, self.metadata["model"]["weights_sha256"], model.name)
        adapters = [*self._adapters, (adapter, strength)]
        unmerge(self.model, self._unadapted)
        try:
            self._unadapted = merge(self.model, adapters)
        except UserError:
            self._unadapted = merge(self.model, self._adapters)
            raise
        self._adapters = adapters
        self.metadata["adapters"] = [
            {"name": own.name, "strength": value, "licence": own.card.get("licence"), "data": own.card.get("data")}
            for own, value in adapters
        ]

    def weights_in_use(self) -> tuple[Any, ...]:
        """What the weights are of besides the model: equal tuples mean equal weights."""
        weight = self.model.embedding.weight
        return weight.dtype, weight.device, *((id(adapter), strength) for adapter, strength in self._adapters)

    def unload_adapters(self) -> None:
        """Restore the weights without adapters."""
        unmerge(self.model, self._unadapted)
        self._adapters, self._unadapted = [], {}
        self.metadata.pop("adapters", None)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the model folder that this pipeline was loaded from, with its second stage, codec and text encoder if
        they are in it. Loaded adapters are merged into its weights. Raises UserError if it was loaded from a run, or
        not from a folder."""
        if self._folders is None:
            raise UserError("only a pipeline that was loaded from a folder can be saved: use from_pretrained")
        merged = self.model.state_dict() if self._adapters else None
        adapters = self.metadata.get("adapters")
        loading.copy_model_folder(*self._folders, Path(folder), merged, adapters, self.sampling_defaults)
        return Path(folder)

    def push_to_hub(
        self, repo_id: str, private: bool = False, revision: str | None = None, message: str = "Upload of a model"
    ) -> str:
        """Upload the model folder to the Hugging Face hub, with the login of `hf auth login`. Returns the address of
        the commit. Raises UserError as `save_pretrained`, or if the hub cannot be reached or refuses."""
        with tempfile.TemporaryDirectory() as temporary:
            return upload_folder(self.save_pretrained(Path(temporary) / "model"), repo_id, private, revision, message)

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of a call that gives none; it may be set."""
        return self.sampling_defaults.guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, scale: float) -> None:
        self.sampling_defaults = replace(self.sampling_defaults, guidance_scale=scale)

    def sampling(self, **given: Any) -> Sampling:
        """The settings that are given, and the model's for those that are None. Raises UserError as `Sampling`."""
        return replace(self.sampling_defaults, **{name: value for name, value in given.items() if value is not None})

    @property
    def decoder(self) -> Autoencoder:
        """What decodes the frames that the last stage generates: the codec, or a VAE by patches, whose frame rate is
        the codec's."""
        return self.codec if self.second_stage is None else self.second_stage.decoder

    @property
    def sample_rate(self) -> int:
        """Of the audio, in Hz."""
        return self.decoder.sample_rate

    def engine(self, engine: str = "auto", weights: str = "fp32") -> Engine:
        """The engine that runs the language model's steps; arguments and errors: `ssmttm.generation.engines.build`.

        It is built once, and again if the model's weights have changed.
        """
        return self._engines.get(self.model, engine, weights)

    def metadata_of_call(
        self, second_stage: SecondStage | None, engine: Engine | None = None, request: Request | None = None
    ) -> dict[str, Any]:
        """The metadata with the engine (if it ran) and the diffusion steps of a call, and as `controls` a list of those
        of each item, if some were drawn."""
        metadata = self.metadata if engine is None else self.metadata | {"engine": engine.description()}
        if request is not None and (controls := describe_controls(request)):
            metadata = metadata | {"controls": controls}
        if second_stage is None:
            return metadata
        steps = {"steps": second_stage.settings.sampler.steps}
        return metadata | {"second_stage": metadata.get("second_stage", {}) | steps}

    def supports(self, key: str) -> bool:
        """Whether a stage was trained with a control, by its key in the model's config: tempo, chroma, key or metre."""
        stages: list[SupportsControls] = [self.model.config]
        if self.second_stage is not None:
            stages.append(self.second_stage.model.config)
        return any(getattr(config, key) for config in stages)

    def encode_clip(self, source: AudioInput) -> EncodedClip:
        """Encode audio that generation starts from with the codec, or the teacher of one that only decodes, and with
        the VAE whose latents are generated, if there is one. Raises UserError as `continuation.encode_clip`."""
        if self._encoder is None:
            self._encoder = encoder_of(self.codec).to(next(self.model.parameters()).device)
        vae = None if self.second_stage is None else self.second_stage.vae
        return encode_clip(source, self._encoder, self.model.config.n_codebooks, vae)

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Audio of codes [1, K, T], or of a VAE's patches. A long clip is decoded in parts, so that an hour needs no
        more memory than they."""
        decoder = self.decoder
        n_frames = math.ceil(_DECODED_SECONDS * decoder.frame_rate)
        if codes.shape[-1] <= n_frames or decoder.context is None:
            return decoder.decode(codes).float().cpu()
        return torch.cat([wav.float().cpu() for wav in decoder.decode_stream(codes.split(n_frames, -1))], -1)


def _metadata(
    folder: ModelFolder, codec: Codec, text_encoder: TextEncoder, second_folder: ModelFolder | None,
    second_stage: SecondStage | None,
) -> dict[str, Any]:  # fmt: skip
    metadata: dict[str, Any] = {
        "model": {"name": folder.name, "weights_sha256": folder.weights_sha256},
        "codec": {"name": codec.name, "fingerprint": codec.fingerprint},
        "text_encoder": {"name": text_encoder.name, "fingerprint": text_encoder.fingerprint},
        "training_data_licences": folder.licences, "software": f"ssmttm {__version__}",
    }  # fmt: skip
    if commit := commit_of(folder.path):
        metadata["model"]["revision"] = commit
    if second_folder is not None and second_stage is not None:
        settings = second_stage.settings
        metadata["training_data_licences"] = (folder.licences or {}) | (second_folder.licences or {})
        metadata["second_stage"] = {
            "name": second_folder.name, "weights_sha256": second_folder.weights_sha256,
            "sampler": settings.sampler.name, "steps": settings.sampler.steps,
            "guidance_scale": settings.guidance_scale, "coarse_guidance_scale": settings.coarse_guidance_scale,
        }  # fmt: skip
        if (vae := second_stage.vae) is not None:
            metadata["vae"] = {"name": vae.name, "fingerprint": vae.fingerprint}
    return metadata
