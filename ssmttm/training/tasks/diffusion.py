"""Denoiser training: the latents of a segment's fine codebooks, given those of its coarse ones and its caption.

Shapes: b items of a micro-batch, K codebooks, V codes, T frames, S coarse channels, C channels to generate.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ssmttm.codecs import Codec
from ssmttm.codecs.latents import LatentStatistics, latent_statistics
from ssmttm.data.loader import CodesLoader, Field, Item
from ssmttm.data.permutation import mix, uniform
from ssmttm.data.step_values import StepValues
from ssmttm.data.store import Store, open_store
from ssmttm.diffusion.objectives import get_objective
from ssmttm.errors import UserError
from ssmttm.generation.second_stage import SecondStage, SecondStageConfig, SecondStageInputs
from ssmttm.models import build_model
from ssmttm.models.latent_denoiser import Conditions, LatentDenoiser
from ssmttm.text.condition import TextCondition
from ssmttm.training.data import check_model_kind, check_text_encoder, codes_loader, load_store_codec
from ssmttm.training.tasks.base import Batch, Losses, Modules, Sample, Task
from ssmttm.training.tasks.controls import StoreControls

_STATISTICS_SEGMENTS = 4_096  # evenly spread over the training split
_SAMPLES = 3


class DiffusionTask(Task):
    """Trains a LatentDenoiser to complete a store's codes from their first codebooks.

    Args:
        config: `model` (kind latent_denoiser), `diffusion`, `data` (store, frames and condition dropouts), `losses`,
            `seed`. The store must have codes and captions of a codec and a text encoder that fit the model.
    """

    def __init__(self, config: DictConfig) -> None:
        self.config, self.loss_weights = config, config.losses
        self.store = open_store(config.data.store)
        check_model_kind(config, "latent_denoiser")
        model = build_model(config.model)
        assert isinstance(model, LatentDenoiser)
        self.model = model
        self.codec = load_store_codec(self.store, config.data.store)
        _check_fit(config, self.codec)
        check_text_encoder(config, self.store.info)
        self.statistics = store_statistics(self.store, self.codec)
        self.model.set_statistics(*self.statistics)
        self.modules = {"model": self.model}
        self.objective = get_objective(config.diffusion.objective)
        SecondStageConfig.from_config(config)  # invalid settings fail here, not at the first samples
        self.controls = StoreControls(self.store, self.model.config, config.data, self.codec, config.seed)

    def loader(self, split: str, batch_size: int | StepValues, rank: int, world_size: int) -> CodesLoader:
        settings, is_train = self.config.diffusion, split == "train"
        draw = partial(
            draw_items,
            seed=self.config.seed,
            coarse_dropout=settings.coarse_dropout if is_train else 0.0,
            coarse_noise_aug=settings.coarse_noise_aug if is_train else 0.0,
        )
        fields: dict[str, Field] = {"controls": self.controls.field(split), "draws": draw}
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
        frames, config = float(batch["frame_mask"].sum()), self.config.model
        flops = len(batch["ids"]) * self.model.flops(batch["codes"].shape[-1], batch["text"].mask.shape[1])
        return frames * (config.n_codebooks - config.n_coarse_codebooks), frames / self.codec.frame_rate, flops

    def samples(self, step: int) -> list[Sample]:
        """Validation segments: original codes, and fine codes generated from the coarse ones."""
        count = min(_SAMPLES, len(self.store.indices("valid")))
        frames = round(self.config.train.sample_seconds * self.codec.frame_rate)
        batch = CodesLoader(self.store, "valid", count, frames, self.config.seed).batch(0)
        device = next(self.model.parameters()).device
        second_stage = SecondStage(self.model, self.codec.to(device), SecondStageConfig.from_config(self.config))
        null = TextCondition.stack([torch.from_numpy(self.store.text("").astype(np.float32))])
        codes = batch["codes"].to(device)
        coarse_codes = codes[:, : self.config.model.n_coarse_codebooks]
        inputs = SecondStageInputs(batch["text"].to(device), null.to(device), seeds=list(range(count)))
        pairs = {"original": codes, "generated": second_stage.generate(coarse_codes, inputs)}
        rate = self.codec.sample_rate
        return [Sample(f"{i}-{kind}", self.codec.decode(c[i : i + 1])[0], rate)
                for i in range(count) for kind, c in pairs.items()]  # fmt: skip

    def metadata(self) -> dict[str, Any]:
        """With the fingerprint of the model's latent statistics, which may come from `init`."""
        statistics = LatentStatistics(self.model.latent_mean, self.model.latent_std)
        return super().metadata() | {"latents": {"fingerprint": statistics.fingerprint}}

    def _denoising(self, model: nn.Module, batch: Batch, denominators: Tensor) -> Losses:
        codes, mask, draws = batch["codes"], batch["frame_mask"], batch["draws"]
        latents = self.model.normalise(self.codec.to(codes.device).to_latents(codes).detach().float())  # [b, K * c, T]
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
    rows = store.indices("train")
    rows = rows[:: -(-len(rows) // _STATISTICS_SEGMENTS)]
    counts = np.zeros((codec.n_codebooks, codec.codebook_size), np.int64)  # [K, V]
    for row in rows:
        for k, codes in enumerate(store.codes(int(row))):
            counts[k] += np.bincount(codes, minlength=codec.codebook_size)
    return latent_statistics(codec.codebook_vectors()[: codec.n_codebooks], torch.from_numpy(counts))


def _check_fit(config: DictConfig, codec: Codec) -> None:
    store, model = config.data.store, config.model
    channels = codec.latent_channels // codec.n_codebooks
    if (model.n_codebooks, model.codebook_dim) != (codec.n_codebooks, channels):
        raise UserError(
            f"the denoiser takes {model.n_codebooks} codebooks of width {model.codebook_dim}, codec {codec.name} of "
            f"{store} has {codec.n_codebooks} of {channels}: set model.n_codebooks and model.codebook_dim"
        )
