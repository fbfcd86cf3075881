"""Language-model training: cross-entropy of a token model on interleaved codes.

Shapes: b items of a micro-batch, K codebooks, T frames, S positions of the pattern's sequence, V codes per codebook.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import repeat
from omegaconf import DictConfig
from torch import Tensor

from ssmttm.codecs import Codec
from ssmttm.data.loader import Field
from ssmttm.data.step_values import StepValues
from ssmttm.data.store import open_store
from ssmttm.errors import UserError
from ssmttm.generation.pipeline import MusicPipeline
from ssmttm.generation.request import Sampling
from ssmttm.models import TokenLM, build_model
from ssmttm.models.control_predictor import prediction_losses
from ssmttm.models.controls import Controls
from ssmttm.ops.cross_entropy import cross_entropy
from ssmttm.patterns import Pattern, get_pattern
from ssmttm.text.condition import TextCondition
from ssmttm.text.encoders import TextEncoder, load_text_encoder
from ssmttm.text.null_condition import apply_null_condition
from ssmttm.training.adapters import add_adapter, check_adapter
from ssmttm.training.data import (
    check_complete,
    check_embedded_codec,
    check_fingerprint,
    check_model_kind,
    check_text_encoder,
    codes_loader,
    load_store_codec,
)
from ssmttm.training.initial_model import check_store, open_initial_model
from ssmttm.training.tasks.base import Batch, Loader, Losses, Modules, Sample, Task
from ssmttm.training.tasks.controls import StoreControls
from ssmttm.training.tasks.tag_head import TagHead, TagVocabulary, tag_losses


class LanguageModelTask(Task):
    """Trains a TokenLM to predict a store's codes from its captions.

    Args:
        config: `model`, `pattern`, `data` (store, frames and condition dropouts), `train` (label_smoothing,
            codebook_weights, and for samples sample_every, sample_seconds, prompts), `losses`, `tag_head` (if
            losses.tags), `seed`. The store must have codes and captions, and a codec and a text encoder that fit.
    """

    sampling_defaults = Sampling()  # of the samples
    null_condition: str = "empty_caption"

    def __init__(self, config: DictConfig) -> None:
        self.config, self.loss_weights = config, config.losses
        self.store = open_store(config.data.store)
        check_complete(self.store, config.data.store)
        check_embedded_codec(self.store, config.data.store)
        if config.get("model_from_init"):
            initial = open_initial_model(config)
            check_store(initial, config.data.store, self.store.info)
            self.null_condition = initial.null_condition
        self.has_adapter = "adapter" in config and check_adapter(config)
        self.adapter: dict[str, Any] | None = None
        _check_fit(config, self.store.info)
        model = build_model(config.model)
        assert isinstance(model, TokenLM)
        self.model = model
        self.modules = {"model": self.model}
        self.tags: TagVocabulary | None = None
        if config.losses.get("tags"):  # a student of a teacher has no tag head
            self.tags = TagVocabulary(self.store, config.tag_head.min_share)
            self.modules["tag_head"] = TagHead(config.model.d_model, self.tags.frequencies)
        self.n_codebooks, self.codebook_size = config.model.n_codebooks, config.model.codebook_size
        self.pattern = get_pattern(config.pattern, n_codebooks=self.n_codebooks)
        self.codebook_weights = _codebook_weights(config.train.codebook_weights, self.n_codebooks)
        self.frame_rate: float = self.store.info["codec"]["frame_rate"]
        self._codec: Codec | None = None
        self._text_encoder: TextEncoder | None = None
        if config.train.sample_every or self.model.config.chroma:
            self._codec = load_store_codec(self.store, config.data.store, self.n_codebooks)
        required = not config.get("model_from_init")
        self.controls = StoreControls(self.store, self.model.config, config.data, self._codec, config.seed, required)
        if config.train.sample_every:  # loaded now, so that a missing encoder stops the run at its start
            self._text_encoder = load_text_encoder(self.store.info["text"]["name"])
            check_fingerprint("text", self._text_encoder.fingerprint, self.store.info)

    def add_adapter(self) -> None:
        if self.has_adapter:
            self.adapter = add_adapter(self.model, self.config.adapter)

    def metadata(self) -> dict[str, Any]:
        """With the null condition, if it is not the usual one, and peft's config of the adapter, if there is one."""
        metadata = super().metadata()
        if self.null_condition != LanguageModelTask.null_condition:
            metadata["text"] = metadata["text"] | {"null_condition": self.null_condition}
        return metadata if self.adapter is None else metadata | {"adapter": self.adapter}

    def loader(self, split: str, batch_size: int | StepValues, rank: int, world_size: int) -> Loader:
        fields: dict[str, Field] = {"controls": self.controls.field(split)}
        if self.tags is not None:
            fields["tags"] = self.tags.targets
        if self.model.control_predictor is not None:
            fields["stated_controls"] = self.controls.stated
        caption_row = self.controls.caption_row(split)
        return codes_loader(self.store, self.config, split, batch_size, rank, world_size, fields, caption_row)

    def loss_denominators(self, batch: Batch) -> Tensor:
        """Valid positions by codebook and the number of items, [K + 1]."""
        positions = valid_positions(self.pattern, batch["frame_mask"], self.n_codebooks).sum((0, 2))  # [K]
        return torch.cat([positions, positions.new_tensor([len(batch["ids"])])]).float()

    def losses(self, modules: Modules, batch: Batch, denominators: Tensor, step: int) -> dict[str, Losses]:
        """`cross_entropy`: weighted mean over codebooks, with label smoothing; `codebook_k`: without, of each codebook.

        With a tag head also `tags`, and `tags_from_text`, the tag loss of the first position. With a control predictor
        also `controls`, the sum of the cross-entropies `predict_bpm`, `predict_key` and `predict_metre`.
        """
        return {"model": self._losses(modules, batch, denominators)}

    def validation(self, modules: Modules, batch: Batch, denominators: Tensor, step: int) -> Losses:
        """The same; the loader of the valid split drops no condition."""
        return self._losses(modules, batch, denominators)

    def _losses(self, modules: Modules, batch: Batch, denominators: Tensor) -> Losses:
        inputs, text = self._prepare_batch(batch), self._text(batch)
        blocks = [] if self.tags is None else [self.config.tag_head.block]
        predicts = self.model.control_predictor is not None
        output = modules["model"](
            inputs.codes, text, return_hidden_states_of=blocks, controls=inputs.controls, predict_controls=predicts
        )
        logits, hidden_states, predicted = unpack_output(output)
        losses: Losses = {}
        if self.tags is not None:
            tag_logits = modules["tag_head"](hidden_states[0])  # [b, S, n]
            from_text, mean = tag_losses(tag_logits, batch["tags"], inputs.valid.any(1))
            losses |= {
                "tags": (from_text + mean) / 2 / denominators[-1],
                "tags_from_text": from_text / denominators[-1],
            }
        if predicts:
            by_control = prediction_losses(predicted, batch["stated_controls"])
            losses |= {f"predict_{name}": loss / denominators[-1] for name, loss in by_control.items()}
            losses["controls"] = torch.stack(list(by_control.values())).sum() / denominators[-1]
        return losses | self._code_losses(logits, inputs, denominators)

    def _text(self, batch: Batch) -> TextCondition:
        """The captions with the model's null condition."""
        return apply_null_condition(self.null_condition, batch["text"], batch["captions"])

    def _prepare_batch(self, batch: Batch) -> "LMBatch":
        codes = batch["codes"][:, : self.n_codebooks]
        sequence, valid = interleave(self.pattern, codes, batch["frame_mask"], self.model.special_token_id)
        start = torch.full_like(sequence[..., :1], self.model.special_token_id)
        by_position = batch["controls"].gather_frames(self.pattern.frames(codes.shape[-1]).to(codes.device))
        return LMBatch(torch.cat([start, sequence[..., :-1]], dim=-1), sequence, valid, by_position)

    def _code_losses(self, logits: Tensor, inputs: "LMBatch", denominators: Tensor) -> Losses:
        """`cross_entropy`, each `codebook_k` and, if it has a weight, `z_loss` of logits [b, K, S, V']."""
        smoothing = self.config.train.label_smoothing
        plain, smoothed, z = token_losses(logits, inputs.targets, inputs.valid, self.codebook_size, smoothing)
        losses = {"cross_entropy": self._over_codebooks(smoothed, denominators)}
        losses |= {f"codebook_{k}": loss for k, loss in enumerate(plain / denominators[:-1])}
        if self.config.losses.get("z_loss"):  # the losses of a student have none
            losses["z_loss"] = self._over_codebooks(z, denominators)
        return losses

    def _over_codebooks(self, sums: Tensor, denominators: Tensor) -> Tensor:
        """The weighted mean over codebooks of sums over valid positions, [K]."""
        return (self.codebook_weights.to(sums.device) * sums / denominators[:-1]).sum()

    def throughput(self, batch: Batch, step: int) -> tuple[float, float, float]:
        frames = float(batch["frame_mask"].sum())
        items, length = len(batch["ids"]), self.pattern.sequence_length(batch["codes"].shape[-1])
        flops = items * self.model.flops(length, batch["text"].mask.shape[1])
        return frames * self.n_codebooks, frames / self.frame_rate, flops

    def samples(self, step: int) -> list[Sample]:
        """`train.prompts`, with the same seeds each time."""
        assert self._codec is not None and self._text_encoder is not None  # loaded when train.sample_every is set
        device = next(self.model.parameters()).device
        settings: dict[str, Any] = {"null_condition": self.null_condition, "sampling_defaults": self.sampling_defaults}
        pipe = MusicPipeline(self.model, self._codec.to(device), self._text_encoder, self.pattern, **settings)
        prompts = list(self.config.train.prompts)
        out = pipe(prompts, duration=self.config.train.sample_seconds, seeds=list(range(len(prompts))))
        return [Sample(f"{i}-{_file_name(prompt)}", out.audios[i], out.sample_rate) for i, prompt in enumerate(prompts)]


def unpack_output(output: Any) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """What `TokenLM.forward` returns, with nothing in place of what was not requested."""
    if isinstance(output, Tensor):
        return output, [], {}
    return output if len(output) == 3 else (*output, {})


class LMBatch(NamedTuple):
    """A batch as inputs and targets of the model.

    Attributes:
        codes: [b, K, S], the input: the start column and the sequence without its last position.
        targets: [b, K, S], the sequence.
        valid: bool [b, K, S], True where the target is a code.
        controls: by position.
    """

    codes: Tensor
    targets: Tensor
    valid: Tensor
    controls: Controls


def valid_positions(pattern: Pattern, frame_mask: Tensor, n_codebooks: int) -> Tensor:
    """True where a sequence holds a code, neither special token nor padding: [b, T] -> bool [b, K, S]."""
    mask = repeat(frame_mask.long(), "b t -> b k t", k=n_codebooks)
    return pattern.build(mask, 0).bool()


def interleave(pattern: Pattern, codes: Tensor, frame_mask: Tensor, special_token_id: int) -> tuple[Tensor, Tensor]:
    """The target sequence, with the special token where there is no code, and the valid mask: [b, K, S] each."""
    padded = codes.masked_fill(~frame_mask[:, None], special_token_id)
    return pattern.build(padded, special_token_id), valid_positions(pattern, frame_mask, codes.shape[1])


def token_losses(
    logits: Tensor, targets: Tensor, valid: Tensor, codebook_size: int, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses by codebook, summed over valid positions, [K] each: cross-entropy without and with label smoothing, and
    the z-loss, the square of the log of the softmax's denominator (arXiv 2204.02311).

    Label smoothing (arXiv 1512.00567) is spread over the V codes; the special token gets none.

    Args:
        logits: [b, K, S, V'], V' = V or V + 1.
        targets: int64 [b, K, S].
        valid: bool [b, K, S].
    """
    by_position = logits.transpose(1, 2)  # [b, S, K, V'], contiguous
    codes = targets.masked_fill(~valid, 0).transpose(1, 2)
    rows = cross_entropy(by_position.flatten(0, 2), codes.flatten(), codebook_size if smoothing else 0)  # [b * S * K]
    plain, mean, log_z = (row.view(codes.shape).transpose(1, 2).masked_fill(~valid, 0) for row in rows)  # [b, K, S]
    smoothed = (1 - smoothing) * plain + smoothing * mean if smoothing else plain
    return plain.sum((0, 2)), smoothed.sum((0, 2)), log_z.square().sum((0, 2))


def _codebook_weights(weights: Sequence[float] | None, n_codebooks: int) -> Tensor:
    """Loss weights by codebook, [K], that add up to 1; None: equal weights."""
    values = torch.tensor(weights if weights is not None else [1.0] * n_codebooks, dtype=torch.float32)
    if len(values) != n_codebooks or not bool((values > 0).all()):
        raise UserError(
            f"train.codebook_weights must be {n_codebooks} positive numbers, one per codebook, got {weights}"
        )
    return values / values.sum()


def _file_name(prompt: str) -> str:
    """A prompt as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]


def _check_fit(config: DictConfig, info: dict[str, Any]) -> None:
    check_model_kind(config, "token_lm")
    store, model = config.data.store, config.model
    codec = info["codec"]
    if model.codebook_size != codec["codebook_size"] or model.n_codebooks > codec["n_codebooks"]:
        raise UserError(
            f"the model takes {model.n_codebooks} codebooks of {model.codebook_size}, {store} has "
            f"{codec['n_codebooks']} of {codec['codebook_size']}: set model.n_codebooks and model.codebook_size"
        )
    check_text_encoder(config, info)
    if config.losses.get("tags") and not 1 <= config.tag_head.block <= model.n_layers:
        raise UserError(f"tag_head.block={config.tag_head.block} must be a block of the model, 1 to {model.n_layers}")
