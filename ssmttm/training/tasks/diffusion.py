"""Denoiser training: the latents of a segment's fine codebooks, given those of its coarse ones and its caption.

Shapes: b items of a micro-batch, K codebooks, V codes, T frames, S coarse channels, C channels to generate.
"""

from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ssmttm.codecs import Codec
from ssmttm.codecs.latents import LatentStatistics, latent_statistics
from ssmttm.data.loader import CodesLoader
from ssmttm.data.store import Store, open_store
from ssmttm.diffusion.objectives import get_objective
from ssmttm.errors import UserError
from ssmttm.generation.second_stage import SecondStage, SecondStageConfig, SecondStageInputs
from ssmttm.models import build_model
from ssmttm.models.controls import Controls
from ssmttm.models.latent_denoiser import Conditions, LatentDenoiser
from ssmttm.text.condition import TextCondition
from ssmttm.training.data import check_text_dim, codes_loader, load_store_codec
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
        model = build_model(config.model)
        assert isinstance(model, LatentDenoiser)
        self.model = model
        self.codec = load_store_codec(self.store, config.data.store)
        _check_fit(config, self.codec)
        check_text_dim(config, self.store.info)
        self.statistics = store_statistics(self.store, self.codec)
        self.model.set_statistics(*self.statistics)
        self.modules = {"model": self.model}
        self.objective = get_objective(config.diffusion.objective)
        SecondStageConfig.from_config(config)  # invalid settings fail here, not at the first samples
        self.controls = StoreControls(self.store, self.model.config, config.data, self.codec)

    def loader(self, split: str, batch_size: int, rank: int, world_size: int) -> CodesLoader:
        return codes_loader(self.store, self.config, split, batch_size, rank, world_size)

    def loss_denominators(self, batch: Batch) -> Tensor:
        """Valid frames, [1]."""
        return batch["frame_mask"].sum().float()[None]

    def losses(self, modules: Modules, batch: Batch, denominators: Tensor, step: int) -> dict[str, Losses]:
        """`denoising`: the mean square error of the objective's target, over valid frames and channels."""
        settings, items = self.config.diffusion, len(batch["ids"])
        has_coarse = torch.rand(items) >= settings.coarse_dropout  # [b]
        noise_level = torch.rand(items) * settings.coarse_noise_aug  # [b]
        controls = self.controls.drop(self.controls.load(batch))
        return {"model": self._denoising(modules["model"], batch, denominators, has_coarse, noise_level, controls)}

    def validation(self, modules: Modules, batch: Batch, denominators: Tensor, step: int) -> Losses:
        """The same without condition dropout and without noise on the coarse latents."""
        items = len(batch["ids"])
        has_coarse, noise_level = torch.ones(items, dtype=torch.bool), torch.zeros(items)
        controls = self.controls.load(batch)
        return self._denoising(modules["model"], batch, denominators, has_coarse, noise_level, controls)

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

    def _denoising(
        self,
        model: nn.Module,
        batch: Batch,
        denominators: Tensor,
        has_coarse: Tensor,
        noise_level: Tensor,
        controls: Controls,
    ) -> Losses:
        """The loss with the coarse latents of some items [b] only, and with noise of this level [b] added to them."""
        codes, mask = batch["codes"], batch["frame_mask"]
        device, n_coarse = codes.device, self.model.config.coarse_channels
        latents = self.model.normalise(self.codec.to(device).to_latents(codes).detach().float())  # [b, K * c, T]
        coarse_latents, clean = latents[:, :n_coarse], latents[:, n_coarse:]
        has_coarse, noise_level = has_coarse.to(device), noise_level.to(device)
        coarse_latents = coarse_latents + noise_level[:, None, None] * torch.randn_like(coarse_latents)
        noise, time = torch.randn_like(clean), self.objective.sample_times(len(codes)).to(device)
        conditions = Conditions(coarse_latents, batch["text"], has_coarse, noise_level, controls.to(device), mask)
        prediction = model(self.objective.add_noise(clean, noise, time), time, conditions).float()
        errors = (prediction - self.objective.target(clean, noise, time)).square().mean(1)  # [b, T]
        return {"denoising": errors.masked_fill(~mask, 0).sum() / denominators[0]}


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
