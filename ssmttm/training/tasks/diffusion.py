"""Denoiser training: the latents of a segment's last codebooks, given those of its first and its caption.

Shapes: b items of a micro-batch, K codebooks, V codes, T frames, S channels of the sketch, C channels to find.
"""

import math
from collections.abc import Mapping, Sequence
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
from ssmttm.models.latent_denoiser import Conditions
from ssmttm.text.condition import TextCondition
from ssmttm.training.data import codec_of, store_facts
from ssmttm.training.tasks.base import Batch, Losses, Sample
from ssmttm.training.tasks.controls import StoreControls

_COUNTED = 4_096  # segments, evenly spread over the training split, from which statistics are taken
_SAMPLES = 3


class DiffusionTask:
    """A LatentDenoiser learns to complete a store's codes from their first codebooks.

    Args:
        config: `model` (kind latent_denoiser), `diffusion`, `data` (store, frames, and the chances that captions, tempi
            and melodies are withheld), `losses`, `seed`.

    Raises:
        UserError: the store has no codes or captions, or its codec or text encoder does not fit the model.
    """

    frozen: Sequence[nn.Module] = ()

    def __init__(self, config: DictConfig) -> None:
        self.config, self.loss_weights = config, config.losses
        self.store = open_store(config.data.store)
        self.model = build_model(config.model)
        self.codec = codec_of(self.store, config.data.store)
        _check_fit(config, self.store.info, self.codec)
        _check_chances(config.diffusion)
        self.statistics = store_statistics(self.store, self.codec)
        self.model.set_statistics(*self.statistics)
        self.modules: dict[str, nn.Module] = {"model": self.model}
        self.objective = get_objective(config.diffusion.objective)
        SecondStageConfig.of(config)  # a wrong one is told now, not when there is something to sample
        self.controls = StoreControls(self.store, self.model.config, config.data, self.codec)

    def loader(self, split: str, batch_size: int, rank: int, world_size: int) -> CodesLoader:
        data, seed = self.config.data, self.config.seed
        dropout = data.caption_dropout if split == "train" else 0.0
        return CodesLoader(
            self.store, split, batch_size, data.frames, seed, rank, world_size, dropout, fixed=data.fixed_crops
        )

    def counts(self, batch: Batch) -> Tensor:
        """Real frames, [1]."""
        return batch["frame_mask"].sum().float()[None]

    def losses(self, trained_modules: Mapping[str, nn.Module], batch: Batch, counts: Tensor, step: int) -> dict[str, Losses]:
        """`denoising`, the mean square error of what the objective asks for, over real frames and channels."""
        settings, items = self.config.diffusion, len(batch["ids"])
        kept = torch.rand(items) >= settings.coarse_dropout
        spread = torch.rand(items) * settings.coarse_noise_aug
        controls = self.controls.dropped(self.controls.of(batch))
        return {"model": self._denoising(trained_modules["model"], batch, counts, kept, spread, controls)}

    def validation(self, trained_modules: Mapping[str, nn.Module], batch: Batch, counts: Tensor, step: int) -> Losses:
        """The same with nothing withheld and the sketch as it is."""
        items = len(batch["ids"])
        kept, spread = torch.ones(items, dtype=torch.bool), torch.zeros(items)
        return self._denoising(trained_modules["model"], batch, counts, kept, spread, self.controls.of(batch))

    def after_step(self, step: int) -> dict[str, float]:
        return {}

    def work(self, batch: Batch, step: int) -> tuple[float, float, float]:
        """Codes found, seconds of audio and FLOPs."""
        frames, config = float(batch["frame_mask"].sum()), self.config.model
        flops = len(batch["ids"]) * self.model.flops(batch["codes"].shape[-1], batch["text"].mask.shape[1])
        return frames * (config.n_codebooks - config.n_coarse_codebooks), frames / self.codec.frame_rate, flops

    def samples(self, step: int) -> list[Sample]:
        """Held-out sketches painted, beside the same segments through the codec."""
        count = min(_SAMPLES, len(self.store.indices("valid")))
        frames = round(self.config.train.sample_seconds * self.codec.frame_rate)
        batch = CodesLoader(self.store, "valid", count, frames, self.config.seed).batch(0)
        device = next(self.model.parameters()).device
        second_stage = SecondStage(self.model, self.codec.to(device), SecondStageConfig.of(self.config))
        null = TextCondition.stack([torch.from_numpy(self.store.text("").astype(np.float32))])
        codes = batch["codes"].to(device)
        coarse_codes = codes[:, : self.config.model.n_coarse_codebooks]
        painted = second_stage.generate(coarse_codes, SecondStageInputs(batch["text"].to(device), null.to(device), list(range(count))))
        pairs = {"original": codes, "painted": painted}
        rate = self.codec.sample_rate
        return [Sample(f"{i}-{what}", self.codec.decode(c[i : i + 1])[0], rate)
                for i in range(count) for what, c in pairs.items()]  # fmt: skip

    def facts(self) -> dict[str, Any]:
        held = LatentStatistics(self.model.latent_mean, self.model.latent_std)  # those of a model to start from, if any
        return store_facts(self.store, self.config.data.store) | {"latents": {"fingerprint": held.fingerprint}}

    def _denoising(
        self,
        model: nn.Module,
        batch: Batch,
        counts: Tensor,
        kept: Tensor,
        spread: Tensor,
        controls: Controls,
    ) -> Losses:
        """Kept [b] says whose sketch is told, spread [b] how much noise it is given."""
        codes, mask = batch["codes"], batch["frame_mask"]
        device, n_sketch = codes.device, self.model.config.coarse_channels
        latents = self.model.normalised(self.codec.to(device).to_latents(codes).detach().float())  # [b, K * c, T]
        coarse_codes, clean = latents[:, :n_sketch], latents[:, n_sketch:]
        kept, spread = kept.to(device), spread.to(device)
        coarse_codes = coarse_codes + spread[:, None, None] * torch.randn_like(coarse_codes)
        noise, time = torch.randn_like(clean), self.objective.draw_times(len(codes)).to(device)
        conditions = Conditions(coarse_codes, batch["text"], kept, spread, controls.to(device), mask)
        said = model(self.objective.noisy(clean, noise, time), time, conditions).float()
        errors = (said - self.objective.target(clean, noise, time)).square().mean(1)  # [b, T]
        return {"denoising": errors.masked_fill(~mask, 0).sum() / counts[0]}


def store_statistics(store: Store, codec: Codec) -> LatentStatistics:
    """Statistics of the latents of a store's training split, from at most 4,096 segments spread over it."""
    rows = store.indices("train")
    rows = rows[:: -(-len(rows) // _COUNTED)]
    counts = np.zeros((codec.n_codebooks, codec.codebook_size), np.int64)  # [K, V]
    for row in rows:
        for k, codes in enumerate(store.codes(int(row))):
            counts[k] += np.bincount(codes, minlength=codec.codebook_size)
    return latent_statistics(codec.codebook_vectors()[: codec.n_codebooks], torch.from_numpy(counts))


def _check_chances(settings: DictConfig) -> None:
    limits = {"coarse_dropout": 1, "coarse_noise_aug": math.inf}
    for name, most in limits.items():
        value = settings[name]
        if not isinstance(value, int | float) or not 0 <= value <= most:
            wanted = "no chance: give 0 to 1" if most == 1 else "no spread: give 0 or more"
            raise UserError(f"diffusion.{name}={value} is {wanted}")


def _check_fit(config: DictConfig, info: dict[str, Any], codec: Codec) -> None:
    store, model = config.data.store, config.model
    channels = codec.latent_channels // codec.n_codebooks
    if (model.n_codebooks, model.codebook_dim) != (codec.n_codebooks, channels):
        raise UserError(
            f"the denoiser takes {model.n_codebooks} codebooks of width {model.codebook_dim}, codec {codec.name} of "
            f"{store} has {codec.n_codebooks} of {channels}: set model.n_codebooks and model.codebook_dim"
        )
    if model.text_dim != info["text"]["dim"]:
        raise UserError(
            f"the denoiser takes text of width {model.text_dim}, {store} holds width {info['text']['dim']}: set "
            f"model.text_dim={info['text']['dim']}"
        )
