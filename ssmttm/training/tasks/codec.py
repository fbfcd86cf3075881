"""Codec training: reconstruction losses first, then a multi-resolution STFT discriminator with feature matching.

Codec and discriminator are updated in the same step from the same forward. The wrapped discriminator scores real and
reconstructed audio in one call; the codec's adversarial loss uses the discriminator with its weights frozen. So the
gradients of each loss reach one module only, and DDP sees one forward per module and micro-batch.

Shapes: b items of a micro-batch, C audio channels, S samples, K codebooks, T frames.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ssmttm.codecs import EMBEDDED, Autoencoder, Codec, CodecOutput, TinyCodec, build_codec, load_codec
from ssmttm.codecs.discriminators import DiscriminatorOutput, MultiResolutionDiscriminator
from ssmttm.codecs.losses import (
    adversarial_losses,
    channel_signals,
    discriminator_accuracy,
    discriminator_loss,
    fast_distances,
    reconstruction_losses,
)
from ssmttm.codecs.metrics import chroma_similarity, onset_f_measure
from ssmttm.codecs.students.cost import counted_flops
from ssmttm.data.audio_cache import AudioCache
from ssmttm.data.loader import AudioLoader
from ssmttm.data.step_values import StepValues
from ssmttm.data.store import open_store
from ssmttm.errors import UserError
from ssmttm.model_folder import training_licences
from ssmttm.training.tasks.base import Batch, Losses, Modules, Sample, Task

SAMPLE_SECONDS, N_SAMPLES = 5.0, 4
_START_ITEMS = 256  # crops that further codebooks are fitted to


class CodecTask(Task):
    """Trains a codec or a VAE to reconstruct crops of a store's audio, which must have its sample rate and channels.

    Args:
        config: `codec`, `codec_training`, `data` (store, seconds), `losses`, `seed`.
    """

    def __init__(self, config: DictConfig) -> None:
        self.config, self.loss_weights = config, config.losses
        self.store = open_store(config.data.store)
        self.audio = AudioCache(self.store, Path(config.data.cache)) if config.data.cache else None
        self.codec = self.build(config)
        self.adversarial_start: int | None = config.codec_training.adversarial_start
        self.fast_losses: bool = config.codec_training.fast_losses
        if self.store.info["sample_rate"] != self.codec.sample_rate:
            raise UserError(
                f"{config.data.store} holds audio at {self.store.info['sample_rate']} Hz and the codec works at "
                f"{self.codec.sample_rate} Hz: prepare the store at that rate, or set codec.sample_rate"
            )
        self.codec.check_channels(self.store.channels, str(config.data.store))
        self.start: dict[str, Any] | None = None  # the codec that this one grew from
        self.modules = {"model": self.codec}
        if self.adversarial_start is not None:
            self.modules["discriminator"] = MultiResolutionDiscriminator()
        self.samples_per_item = round(config.data.seconds * self.codec.sample_rate)
        if config.codec_training.get("start"):
            self._grow(config.codec_training.start)
        self._flops_per_item = self.flops_per_item()
        self._restart_metrics: dict[str, float | Tensor] = {}
        self._last_audio: Tensor | None = None

    def build(self, config: DictConfig) -> Autoencoder:
        """The codec to train."""
        return build_codec(config.codec)

    @property
    def encoder(self) -> Autoencoder:
        """The codec that encodes the samples."""
        return self.codec

    def reconstruct(self, model: nn.Module, wav: Tensor) -> CodecOutput:
        """The output of the wrapped codec for a waveform [b, C, S]."""
        return model(wav)

    def _grow(self, name: str) -> None:
        """Start from the weights of the codec `name`."""
        if self.config.init:
            raise UserError("init and codec_training.start both initialise the codec: set only one of them")
        smaller = load_codec(name)
        if not isinstance(self.codec, TinyCodec) or not isinstance(smaller, TinyCodec):
            raise UserError(f"codec_training.start={name}: only a tiny codec can start a tiny codec")
        loader = self.loader("train", self.config.data.batch_size, 0, 1)
        count = -(-_START_ITEMS // self.config.data.batch_size)
        self.codec.grow_from(smaller, torch.cat([loader.batch(n)["audio"] for n in range(count)]))
        self.start = {"name": name, "fingerprint": smaller.fingerprint}

    def metadata(self) -> dict[str, Any]:
        """With the codec that this one grew from, and the licences of its data."""
        metadata = super().metadata()
        if self.start is None:
            return metadata
        folder = EMBEDDED.get(self.start["name"]) or Path(self.start["name"])
        return metadata | {"start": self.start, "licences": training_licences(folder) | metadata["licences"]}

    def flops_per_item(self) -> float:
        """Forward FLOPs of one item."""
        training = self.codec.training
        flops = count_flops(lambda: self.codec.eval()(torch.zeros(1, self.codec.channels, self.samples_per_item)))
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
        wav = batch["audio"]  # [b, C, S]
        fraction = len(wav) / denominators[0]  # of the global batch
        losses = {"model": self.reconstruction(output, wav)}
        if self.adversarial_start is not None and step >= self.adversarial_start:
            items = slice(self.config.codec_training.adversarial_items)
            judged, original = (audio[items].flatten(0, 1)[:, None] for audio in (output.audio, wav))  # [b' * C, 1, S]
            real, fake = _halves(modules["discriminator"](torch.cat([original, judged.detach()])))
            losses["discriminator"] = {
                "discriminator": discriminator_loss(real, fake),
                "discriminator_accuracy": discriminator_accuracy(real, fake),
            }
            frozen = self.modules["discriminator"].requires_grad_(False)
            losses["model"] |= adversarial_losses(real, frozen(judged))
            frozen.requires_grad_(True)
        return {module: {name: fraction * loss for name, loss in named.items()} for module, named in losses.items()}

    def validation(self, modules: Modules, batch: Batch, denominators: Tensor, step: int) -> Losses:
        output = self.reconstruct(modules["model"], batch["audio"])
        decoded, wav, rate = output.audio.float().mean(1), batch["audio"].mean(1), self.codec.sample_rate  # [b, S]
        losses = self.reconstruction(output, batch["audio"])
        losses["chroma_similarity"] = chroma_similarity(decoded, wav, rate).mean()
        losses["onset_f"] = onset_f_measure(decoded, wav, rate).mean()
        return {name: len(batch["ids"]) / denominators[0] * loss for name, loss in losses.items()}

    def reconstruction(self, output: CodecOutput, wav: Tensor) -> Losses:
        """The losses of an output of the codec for the encoded audio [b, C, S], except the adversarial ones."""
        if self.fast_losses:
            signals = channel_signals(output.audio), channel_signals(wav)
            return fast_distances(*signals, self.codec.sample_rate) | output.losses
        return reconstruction_losses(output, wav, self.codec.sample_rate)

    def restart_codes(self, step: int) -> dict[str, Tensor]:
        """Every `restart_every` steps until `restart_until`; a VAE has no codes."""
        every, until = self.config.codec_training.restart_every, self.config.codec_training.restart_until
        if (step + 1) % every or step >= until or not isinstance(self.codec, Codec):
            return {}
        restarted = cast(Any, self.codec).restart_unused_codes(self._last_audio)
        self._restart_metrics = {"codes_restarted": float(sum(int(mask.sum()) for mask in restarted.values()))}
        return restarted

    def after_step(self, step: int) -> dict[str, float | Tensor]:
        return self._restart_metrics

    def throughput(self, batch: Batch, step: int) -> tuple[float, float, float]:
        items, seconds = len(batch["ids"]), self.samples_per_item / self.codec.sample_rate
        frames = items * seconds * self.codec.frame_rate
        tokens = frames * (self.codec.n_codebooks if isinstance(self.codec, Codec) else 1)  # of a VAE, latent frames
        return tokens, items * seconds, items * self._flops_per_item

    def samples(self, step: int) -> list[Sample]:
        """Validation items, original and decoded."""
        rate = self.codec.sample_rate
        count = min(N_SAMPLES, len(self.store.indices("valid")))
        samples = round(SAMPLE_SECONDS * rate)
        batch = AudioLoader(self.store, "valid", count, samples, self.config.seed, cache=self.audio).batch(0)
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
