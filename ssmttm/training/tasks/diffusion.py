"""Denoiser training: the latents of a segment's fine codebooks, or of a VAE, given those of its coarse codebooks and
its caption.

Shapes: b items of a micro-batch, K codebooks, V codes, T frames, S coarse channels, C channels to generate.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ssmttm.codecs import Codec
from ssmttm.codecs.latents import LatentStatistics, channel_statistics, join_statistics, latent_statistics
from ssmttm.data.loader import CodesLoader, Field, Item, LatentCrops
from ssmttm.data.permutation import mix, uniform
from ssmttm.data.step_values import StepValues
from ssmttm.data.store import Store, open_store
from ssmttm.diffusion.objectives import get_objective
from ssmttm.errors import UserError
from ssmttm.generation.second_stage import SecondStage, SecondStageConfig, SecondStageInputs
from ssmttm.models import build_model
from ssmttm.models.latent_denoiser import Conditions, LatentDenoiser
from ssmttm.text.condition import TextCondition
from ssmttm.training.data import (
    check_model_kind,
    check_text_encoder,
    codes_loader,
    load_store_codec,
    load_store_vae,
)
from ssmttm.training.tasks.base import Batch, Losses, Modules, Sample, Task
from ssmttm.training.tasks.controls import StoreControls

if TYPE_CHECKING:
    from ssmttm.codecs.vae import PatchedVAE

_STATISTICS_SEGMENTS = 4_096  # evenly spread over the training split
_SAMPLES = 3


class DiffusionTask(Task):
    """Trains a LatentDenoiser to complete a store's codes from their first codebooks, or to generate its latents of a
    VAE from these.

    Args:
        config: `model` (kind latent_denoiser), `diffusion`, `data` (store, frames and condition dropouts), `losses`,
            `seed`. The store must have codes and captions of a codec and a text encoder that fit the model, and with
            `model.vae_channels` latents of a VAE that fits it.
    """

    def __init__(self, config: DictConfig) -> None:
        self.config, self.loss_weights = config, config.losses
        self.store = open_store(config.data.store)
        check_model_kind(config, "latent_denoiser")
        model = build_model(config.model)
        assert isinstance(model, LatentDenoiser)
        self.model = model
        n_codebooks = model.config.n_codebooks if model.config.vae_channels else None
        self.codec = load_store_codec(self.store, config.data.store, n_codebooks)
        _check_fit(config, self.codec)
        self.vae = self._load_vae() if model.config.vae_channels else None
        check_text_encoder(config, self.store.info)
        self.statistics = store_statistics(self.store, self.codec)
        if self.vae is not None:
            self.statistics = join_statistics(self.statistics, vae_statistics(self.store))
        self.model.set_statistics(*self.statistics)
        self.modules = {"model": self.model}
        self.objective = get_objective(config.diffusion.objective)
        SecondStageConfig.from_config(config)  # invalid settings fail here, not at the first samples
        self.controls = StoreControls(self.store, self.model.config, config.data, self.codec, config.seed)

    def _load_vae(self) -> "PatchedVAE":
        """The VAE of the store's latents, by patches of a code frame. Raises UserError if it does not fit the model."""
        from ssmttm.codecs.vae import PatchedVAE  # diffusers is slow to import

        vae, info, model = load_store_vae(self.store), self.store.vae_info, self.model.config
        found = info["latent_channels"], info["frames_per_code"]
        if found != (model.vae_channels, model.vae_frames):
            raise UserError(
                f"the denoiser takes {model.vae_channels} channels of a VAE and {model.vae_frames} frames of them in a "
                f"code frame, {self.config.data.store} has {found[0]} and {found[1]}: set model.vae_channels and "
                "model.vae_frames"
            )
        return PatchedVAE(vae, model.vae_frames)

    def loader(self, split: str, batch_size: int | StepValues, rank: int, world_size: int) -> CodesLoader:
        settings, is_train = self.config.diffusion, split == "train"
        draw = partial(
            draw_items,
            seed=self.config.seed,
            coarse_dropout=settings.coarse_dropout if is_train else 0.0,
            coarse_noise_aug=settings.coarse_noise_aug if is_train else 0.0,
        )
        fields: dict[str, Field] = {"controls": self.controls.field(split), "draws": draw}
        if self.vae is not None:
            fields["latents"] = LatentCrops(self.store)
        caption_row = self.controls.caption_row(split)
        return codes_loader(self.store, self.config, split, batch_size, rank, world_size, fields, caption_row)

    def loss_denominators(self, batch: Batch) -> Tensor:
        """Valid frames, [1]."""
        return batch["frame_mask"].sum().float()[None]

    def losses(self, modules: Modules, batch: Batch, denominators: Tensor, step: int) -> dict[str, Losses]:
        """`denoising`: the mean square error of the objective's target, over valid frames and channels."""
        return {"model": self._denoising(modules["model"], batch, denominators)}

    def validation(self, modules: Modules, batch: Batch, denominators: Tensor, step: int) -> Losses:
        """The same; the loader of the valid split drops no condition and adds no noise to the coarse latents."""
        return self._denoising(modules["model"], batch, denominators)

    def throughput(self, batch: Batch, step: int) -> tuple[float, float, float]:
        frames, config = float(batch["frame_mask"].sum()), self.model.config
        flops = len(batch["ids"]) * self.model.flops(batch["codes"].shape[-1], batch["text"].mask.shape[1])
        predicted = config.n_codebooks - config.n_coarse_codebooks + config.vae_frames * bool(config.vae_channels)
        return frames * predicted, frames / self.codec.frame_rate, flops

    def samples(self, step: int) -> list[Sample]:
        """Validation segments: original codes, and fine codes generated from the coarse ones; or latents of a VAE."""
        count = min(_SAMPLES, len(self.store.indices("valid")))
        frames = round(self.config.train.sample_seconds * self.codec.frame_rate)
        fields: dict[str, Field] = {} if self.vae is None else {"latents": LatentCrops(self.store)}
        batch = CodesLoader(self.store, "valid", count, frames, self.config.seed, fields=fields).batch(0)
        device = next(self.model.parameters()).device
        vae = None if self.vae is None else self.vae.to(device)
        settings = SecondStageConfig.from_config(self.config)
        second_stage = SecondStage(self.model, self.codec.to(device), settings, vae)
        null = TextCondition.stack([torch.from_numpy(self.store.text("").astype(np.float32))])
        original = (batch["codes"] if vae is None else self._patches(batch)).to(device)
        coarse_codes = batch["codes"][:, : self.config.model.n_coarse_codebooks].to(device)
        inputs = SecondStageInputs(batch["text"].to(device), null.to(device), seeds=list(range(count)))
        pairs = {"original": original, "generated": second_stage.generate(coarse_codes, inputs)}
        decoder = second_stage.decoder
        return [Sample(f"{i}-{kind}", decoder.decode(frames[i : i + 1])[0], decoder.sample_rate)
                for i in range(count) for kind, frames in pairs.items()]  # fmt: skip

    def metadata(self) -> dict[str, Any]:
        """With the fingerprint of the model's latent statistics, which may come from `init`, and the VAE."""
        statistics = LatentStatistics(self.model.latent_mean, self.model.latent_std)
        metadata = super().metadata() | {"latents": {"fingerprint": statistics.fingerprint}}
        if self.vae is None:
            return metadata
        return metadata | {"vae": {key: self.store.vae_info[key] for key in ("name", "fingerprint")}}

    def _patches(self, batch: Batch) -> Tensor:
        """The VAE's latents of a batch by patches, [b, C, T]."""
        from ssmttm.codecs.vae import to_patches

        return to_patches(batch["latents"], self.model.config.vae_frames)

    def _denoising(self, model: nn.Module, batch: Batch, denominators: Tensor) -> Losses:
        mask, draws = batch["frame_mask"], batch["draws"]
        latents = self.model.normalise(self._latents(batch))  # [b, S + C, T]
        sizes = self.model.config.coarse_channels, self.model.config.noisy_channels
        (coarse_latents, clean), (coarse_noise, noise) = (
            latents.split(sizes, 1),
            draws.noise_like(latents).split(sizes, 1),
        )
        coarse_latents = coarse_latents + draws.noise_level[:, None, None] * coarse_noise
        time = self.objective.training_times(draws.time)
        conditions = Conditions(
            coarse_latents, batch["text"], draws.has_coarse, draws.noise_level, batch["controls"], mask
        )
        prediction = model(self.objective.add_noise(clean, noise, time), time, conditions).float()
        errors = (prediction - self.objective.target(clean, noise, time)).square().mean(1)  # [b, T]
        return {"denoising": errors.masked_fill(~mask, 0).sum() / denominators[0]}

    def _latents(self, batch: Batch) -> Tensor:
        """Latents of all codebooks, or of the coarse ones and the VAE, [b, S + C, T]."""
        codes = batch["codes"][:, : self.codec.n_codebooks]
        latents = self.codec.to(codes.device).to_latents(codes).detach().float()
        return latents if self.vae is None else torch.cat([latents, self._patches(batch)], 1)


class Draws(NamedTuple):
    """The random choices of a batch.

    Attributes:
        has_coarse: bool [b], False where the coarse codes are dropped.
        noise_level: [b], the standard deviation of the noise on the coarse latents.
        time: [b], uniform in [0, 1); the objective makes times of it.
        noise_seeds: [b], seeds of each item's noise.
    """

    has_coarse: Tensor
    noise_level: Tensor
    time: Tensor
    noise_seeds: list[int]

    def to(self, device: torch.device | str) -> "Draws":
        has_coarse, noise_level, time = (part.to(device) for part in self[:3])
        return Draws(has_coarse, noise_level, time, self.noise_seeds)

    def noise_like(self, latents: Tensor) -> Tensor:
        """Gaussian noise [b, C, T], of each item from its own generator."""
        device = latents.device
        generators = [torch.Generator(device).manual_seed(seed) for seed in self.noise_seeds]
        return torch.stack([torch.randn(latents.shape[1:], generator=g, device=device) for g in generators])


def draw_items(
    items: Sequence[Item], batch: Mapping[str, Any], seed: int, coarse_dropout: float, coarse_noise_aug: float
) -> Draws:
    """The field `draws`, by hash(seed, epoch, id). Noise and time differ between epochs, with fixed crops too."""
    return Draws(
        torch.tensor([not item.is_dropped(seed, "coarse", coarse_dropout) for item in items]),
        torch.tensor([coarse_noise_aug * uniform(seed, item.epoch, item.id, "coarse_noise_aug") for item in items]),
        torch.tensor([uniform(seed, item.epoch, item.id, "time") for item in items]),
        [mix(seed, item.epoch, item.id, "noise") % 2**32 for item in items],
    )


def store_statistics(store: Store, codec: Codec) -> LatentStatistics:
    """Statistics of the latents of a store's training split, from at most 4,096 of its segments."""
    counts = np.zeros((codec.n_codebooks, codec.codebook_size), np.int64)  # [K, V]
    for row in _statistics_rows(store):
        for k, codes in enumerate(store.codes(row)[: codec.n_codebooks]):
            counts[k] += np.bincount(codes, minlength=codec.codebook_size)
    return latent_statistics(codec.codebook_vectors()[: codec.n_codebooks], torch.from_numpy(counts))


def vae_statistics(store: Store) -> LatentStatistics:
    """Statistics of a store's latents of a VAE, from the same segments. Raises UserError if one is not finite."""
    return channel_statistics((store.latents(row) for row in _statistics_rows(store)), str(store.path))


def _statistics_rows(store: Store) -> list[int]:
    rows = store.indices("train")
    return [int(row) for row in rows[:: -(-len(rows) // _STATISTICS_SEGMENTS)]]


def _check_fit(config: DictConfig, codec: Codec) -> None:
    store, model = config.data.store, config.model
    channels = codec.latent_channels // codec.n_codebooks
    if (model.n_codebooks, model.codebook_dim) != (codec.n_codebooks, channels):
        raise UserError(
            f"the denoiser takes {model.n_codebooks} codebooks of width {model.codebook_dim}, codec {codec.name} of "
            f"{store} has {codec.n_codebooks} of {channels}: set model.n_codebooks and model.codebook_dim"
        )
