"""Codec training: reconstruction losses first, then a multi-resolution STFT discriminator with feature matching.

Codec and discriminator are updated in the same step from the same forward. The wrapped discriminator scores real and
reconstructed audio in one call; the codec's adversarial loss uses the discriminator with its weights frozen. So the
gradients of each loss reach one module only, and DDP sees one forward per module and micro-batch.

Shapes: b items of a micro-batch, S samples, K codebooks, T frames.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ssmttm.codecs import Codec, CodecOutput, build_codec
from ssmttm.codecs.discriminators import DiscriminatorOutput, MultiResolutionDiscriminator
from ssmttm.codecs.losses import adversarial_losses, discriminator_loss, reconstruction_losses
from ssmttm.codecs.students.cost import counted_flops
from ssmttm.data.loader import AudioLoader
from ssmttm.data.step_values import StepValues
from ssmttm.data.store import open_store
from ssmttm.errors import UserError
from ssmttm.training.tasks.base import Batch, Losses, Modules, Sample, Task

SAMPLE_SECONDS, N_SAMPLES = 5.0, 4


class CodecTask(Task):
    """Trains a codec to reconstruct crops of a store's audio, which must have the codec's sample rate.
from ssmttm.data.step_values import StepValues

    Args:
        config: `codec`, `codec_training`, `data` (store, seconds), `losses`, `seed`.
    """

    def __init__(self, config: DictConfig) -> None:
        self.config, self.loss_weights = config, config.losses
        self.store = open_store(config.data.store)
        self.codec = self.build(config)
        self.adversarial_start: int | None = config.codec_training.adversarial_start
        if self.store.info["sample_rate"] != self.codec.sample_rate:
            raise UserError(
                f"{config.data.store} holds audio at {self.store.info['sample_rate']} Hz and the codec works at "
                f"{self.codec.sample_rate} Hz: prepare the store at that rate, or set codec.sample_rate"
            )
        self.modules = {"model": self.codec}
        if self.adversarial_start is not None:
            self.modules["discriminator"] = MultiResolutionDiscriminator()
        self.samples_per_item = round(config.data.seconds * self.codec.sample_rate)
        self._flops_per_item = self.flops_per_item()
        self._restart_metrics: dict[str, float] = {}
        self._last_audio: Tensor | None = None

    def build(self, config: DictConfig) -> Codec:
        """The codec to train."""
        return build_codec(config.codec)

    @property
    def encoder(self) -> Codec:
        """The codec that encodes the samples."""
        return self.codec

    def reconstruct(self, model: nn.Module, wav: Tensor) -> CodecOutput:
        """The output of the wrapped codec for a waveform [b, 1, S]."""
        return model(wav)

    def flops_per_item(self) -> float:
        """Forward FLOPs of one item."""
        training = self.codec.training
        flops = count_flops(lambda: self.codec.eval()(torch.zeros(1, 1, self.samples_per_item)))
        self.codec.train(training)
        return flops

    def loader(self, split: str, batch_size: int | StepValues, rank: int, world_size: int) -> AudioLoader:
        samples, seed = self.samples_per_item, self.config.seed
        return AudioLoader(self.store, split, batch_size, samples, seed, rank, world_size, self.audio)

    def loss_denominators(self, batch: Batch) -> Tensor:
        return torch.tensor([float(len(batch["ids"]))])

    def losses(self, modules: Modules, batch: Batch, denominators: Tensor, step: int) -> dict[str, Losses]:
        self._last_audio = batch["audio"]
        output = self.reconstruct(modules["model"], batch["audio"])
        return self.output_losses(output, modules, batch, denominators, step)

    def output_losses(
        self, output: CodecOutput, modules: Modules, batch: Batch, denominators: Tensor, step: int
    ) -> dict[str, Losses]:
        """`losses` for an output of the codec."""
        wav = batch["audio"]  # [b, 1, S]
        fraction = len(wav) / denominators[0]  # of the global batch
        losses = {"model": reconstruction_losses(output, wav, self.codec.sample_rate)}
        if self.adversarial_start is not None and step >= self.adversarial_start:
            real, fake = _halves(modules["discriminator"](torch.cat([wav, output.audio.detach()])))
            losses["discriminator"] = {"discriminator": discriminator_loss(real, fake)}
            frozen = self.modules["discriminator"].requires_grad_(False)
            losses["model"] |= adversarial_losses(real, frozen(output.audio))
            frozen.requires_grad_(True)
        return {module: {name: fraction * loss for name, loss in named.items()} for module, named in losses.items()}

    def validation(self, modules: Modules, batch: Batch, denominators: Tensor, step: int) -> Losses:
        output = self.reconstruct(modules["model"], batch["audio"])
        losses = reconstruction_losses(output, batch["audio"], self.codec.sample_rate)
        return {name: len(batch["ids"]) / denominators[0] * loss for name, loss in losses.items()}

    def restart_codes(self, step: int) -> dict[str, Tensor]:
        """Every `restart_every` steps until `restart_until`."""
        every, until = self.config.codec_training.restart_every, self.config.codec_training.restart_until
        if (step + 1) % every or step >= until:
            return {}
        restarted = cast(Any, self.codec).restart_unused_codes(self._last_audio)
        self._restart_metrics = {"codes_restarted": float(sum(int(mask.sum()) for mask in restarted.values()))}
        return restarted

    def after_step(self, step: int) -> dict[str, float | Tensor]:
        return self._restart_metrics

    def throughput(self, batch: Batch, step: int) -> tuple[float, float, float]:
        items, seconds = len(batch["ids"]), self.samples_per_item / self.codec.sample_rate
        tokens = items * seconds * self.codec.frame_rate * self.codec.n_codebooks
        return tokens, items * seconds, items * self._flops_per_item

    def samples(self, step: int) -> list[Sample]:
        """Validation items, original and decoded."""
        rate = self.codec.sample_rate
        count = min(N_SAMPLES, len(self.store.indices("valid")))
        batch = AudioLoader(self.store, "valid", count, round(SAMPLE_SECONDS * rate), self.config.seed).batch(0)
        wav = batch["audio"].to(next(self.codec.parameters()).device)
        decoded = self.codec.decode(self.encoder.encode(wav))[..., : wav.shape[-1]]
        pairs = {"original": wav, "decoded": decoded}
        return [Sample(f"{i}-{kind}", audio[i], rate) for i in range(count) for kind, audio in pairs.items()]


def _halves(outputs: list[DiscriminatorOutput]) -> tuple[list[DiscriminatorOutput], list[DiscriminatorOutput]]:
    """The outputs for [real; fake], separated."""

    def half(index: int) -> list[DiscriminatorOutput]:
        return [DiscriminatorOutput(o.logits.chunk(2)[index], [f.chunk(2)[index] for f in o.features]) for o in outputs]

    return half(0), half(1)


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of what is run, as `counted_flops` denominators."""
    with torch.no_grad(), counted_flops() as flops:
        run()
    return flops()
