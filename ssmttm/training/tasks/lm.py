"""Language-model training: cross-entropy of a token model on interleaved codes.

Shapes: b items of a micro-batch, K codebooks, T frames, S positions of the pattern's sequence, V codes a codebook.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.codecs import Codec
from ssmttm.data.loader import CodesLoader
from ssmttm.data.store import open_store
from ssmttm.errors import UserError
from ssmttm.generation.loading import GUIDANCE_SCALE
from ssmttm.generation.pipeline import MusicPipeline
from ssmttm.models import build_model
from ssmttm.models.controls import Controls
from ssmttm.patterns import Pattern, get_pattern
from ssmttm.text.condition import TextCondition
from ssmttm.text.encoders import TextEncoder, load_text_encoder
from ssmttm.text.null_condition import apply_null_condition
from ssmttm.training.data import check_complete, check_same, codec_of, store_facts
from ssmttm.training.tasks.base import Batch, Losses, Sample
from ssmttm.training.tasks.controls import StoreControls
from ssmttm.training.tasks.tag_head import TagHead, TagVocabulary, tag_losses


class LanguageModelTask:
    """A TokenLM learns to predict a store's codes from its captions.

    Args:
        config: `model`, `pattern`, `data` (store, frames, and the chances that captions, tempi and melodies are
            withheld), `train` (label_smoothing, codebook_weights, and for samples sample_every, sample_seconds,
            prompts), `losses`, `tag_head` (if losses.tags), `seed`.

    Raises:
        UserError: the store has no codes or captions, or its codec or text encoder does not fit the model; weights that
            are not one positive number a codebook.
    """

    frozen: Sequence[nn.Module] = ()
    guidance_scale, null_condition = GUIDANCE_SCALE, "empty_caption"  # how it is sampled

    def __init__(self, config: DictConfig) -> None:
        self.config, self.loss_weights = config, config.losses
        self.store = open_store(config.data.store)
        check_complete(self.store, config.data.store)
        _check_fit(config, self.store.info)
        self.model = build_model(config.model)
        self.modules: dict[str, nn.Module] = {"model": self.model}
        self.tags: TagVocabulary | None = None
        if config.losses.tags:
            _check_block(config.tag_head.block, config.model.n_layers)
            self.tags = TagVocabulary(self.store, config.tag_head.min_share)
            self.modules["tag_head"] = TagHead(config.model.d_model, self.tags.shares)
        self.n_codebooks, self.codebook_size = config.model.n_codebooks, config.model.codebook_size
        self.pattern = get_pattern(config.pattern, n_codebooks=self.n_codebooks)
        self.codebook_weights = _codebook_weights(config.train.codebook_weights, self.n_codebooks)
        self.frame_rate: float = self.store.info["codec"]["frame_rate"]
        self._codec: Codec | None = None
        self._text_encoder: TextEncoder | None = None
        if config.train.sample_every or self.model.config.chroma:
            self._codec = codec_of(self.store, config.data.store, self.n_codebooks)
        self.controls = StoreControls(self.store, self.model.config, config.data, self._codec)
        if config.train.sample_every:  # now, so that an encoder that is not here stops the run before it begins
            self._text_encoder = load_text_encoder(self.store.info["text"]["name"])
            check_same("text", self._text_encoder.fingerprint, self.store.info)

    def loader(self, split: str, batch_size: int, rank: int, world_size: int) -> CodesLoader:
        data, seed = self.config.data, self.config.seed
        dropout = data.caption_dropout if split == "train" else 0.0
        return CodesLoader(
            self.store, split, batch_size, data.frames, seed, rank, world_size, dropout, fixed=data.fixed_crops
        )

    def counts(self, batch: Batch) -> Tensor:
        """Valid positions by codebook and the number of items, [K + 1]."""
        positions = real_positions(self.pattern, batch["frame_mask"], self.n_codebooks).sum((0, 2))  # [K]
        return torch.cat([positions, positions.new_tensor([len(batch["ids"])])]).float()

    def losses(self, trained_modules: Mapping[str, nn.Module], batch: Batch, counts: Tensor, step: int) -> dict[str, Losses]:
        """`cross_entropy`, weighted mean over codebooks with smoothed labels, to train on; each `codebook_k`, plain;
        with a tag head `tags`, to train on, and `tags_from_text`, that of the first position."""
        controls = self.controls.dropped(self.controls.of(batch))
        return {"model": self._losses(trained_modules, batch, counts, controls)}

    def validation(self, trained_modules: Mapping[str, nn.Module], batch: Batch, counts: Tensor, step: int) -> Losses:
        """The same with neither tempo nor melody withheld."""
        return self._losses(trained_modules, batch, counts, self.controls.of(batch))

    def _losses(self, trained_modules: Mapping[str, nn.Module], batch: Batch, counts: Tensor, controls: Controls) -> Losses:
        given, text = self._prepare_batch(batch, controls), self._text(batch)
        if self.tags is None:
            return self._code_losses(trained_modules["model"](given.codes, text, controls=given.controls), given, counts)
        behind = [self.config.tag_head.block]
        logits, (stream,) = trained_modules["model"](given.codes, text, return_hidden_states_of=behind, controls=given.controls)
        log_odds = trained_modules["tag_head"](stream)  # [b, S, n]
        targets = self.tags.targets(batch["ids"]).to(log_odds.device)
        from_text, mean = tag_losses(log_odds, targets, given.real.any(1))
        named = {"tags": (from_text + mean) / 2 / counts[-1], "tags_from_text": from_text / counts[-1]}
        return named | self._code_losses(logits, given, counts)

    def _text(self, batch: Batch) -> TextCondition:
        """The captions as the model reads them."""
        return apply_null_condition(self.null_condition, batch["text"], batch["captions"])

    def _prepare_batch(self, batch: Batch, controls: Controls) -> "LMBatch":
        codes = batch["codes"][:, : self.n_codebooks]
        sequence, real = interleave(self.pattern, codes, batch["frame_mask"], self.model.special_token_id)
        start = torch.full_like(sequence[..., :1], self.model.special_token_id)
        told = controls.at(self.pattern.frames(codes.shape[-1])).to(codes.device)  # by position
        return LMBatch(torch.cat([start, sequence[..., :-1]], dim=-1), sequence, real, told)

    def _code_losses(self, logits: Tensor, given: "LMBatch", counts: Tensor) -> Losses:
        """`cross_entropy` and each `codebook_k` of logits [b, K, S, V']."""
        smoothing = self.config.train.label_smoothing
        plain, smoothed = token_losses(logits, given.sequence, given.real, self.codebook_size, smoothing)
        named = {f"codebook_{k}": share for k, share in enumerate(plain / counts[:-1])}
        return {"cross_entropy": self._over_codebooks(smoothed, counts), **named}

    def _over_codebooks(self, sums: Tensor, counts: Tensor) -> Tensor:
        """The weighted mean over codebooks of what is summed over real positions, [K]."""
        return (self.codebook_weights.to(sums.device) * sums / counts[:-1]).sum()

    def after_step(self, step: int) -> dict[str, float]:
        return {}

    def work(self, batch: Batch, step: int) -> tuple[float, float, float]:
        frames = float(batch["frame_mask"].sum())
        items, length = len(batch["ids"]), self.pattern.sequence_length(batch["codes"].shape[-1])
        flops = items * self.model.flops(length, batch["text"].mask.shape[1])
        return frames * self.n_codebooks, frames / self.frame_rate, flops

    def samples(self, step: int) -> list[Sample]:
        """`train.prompts`, always with the same seeds."""
        assert self._codec is not None and self._text_encoder is not None  # loaded when train.sample_every is set
        device = next(self.model.parameters()).device
        how = {"null_condition": self.null_condition, "guidance_scale": self.guidance_scale}
        pipe = MusicPipeline(self.model, self._codec.to(device), self._text_encoder, self.pattern, **how)
        prompts = list(self.config.train.prompts)
        out = pipe(prompts, duration=self.config.train.sample_seconds, seeds=list(range(len(prompts))))
        return [Sample(f"{i}-{_file_name(prompt)}", out.audios[i], out.sample_rate) for i, prompt in enumerate(prompts)]

    def facts(self) -> dict[str, Any]:
        return store_facts(self.store, self.config.data.store)


class LMBatch(NamedTuple):
    """A batch as the model is shown it.

    Attributes:
        codes: [b, K, S], the sequence behind its start.
        sequence: [b, K, S], what is to be predicted. real: bool [b, K, S], True where it holds codes.
        wishes: by position.
    """

    codes: Tensor
    sequence: Tensor
    real: Tensor
    controls: Controls


def real_positions(pattern: Pattern, frame_mask: Tensor, n_codebooks: int) -> Tensor:
    """True where a sequence holds a real code, neither fill nor padding: [b, T] -> bool [b, K, S]."""
    mask = frame_mask[:, None].expand(-1, n_codebooks, -1).long()  # [b, K, T]
    return pattern.build(mask, 0).bool()


def interleave(pattern: Pattern, codes: Tensor, frame_mask: Tensor, special_token_id: int) -> tuple[Tensor, Tensor]:
    """The sequence to predict, with the special token on fill and padding, and where it is real: [b, K, S] each."""
    padded = codes.masked_fill(~frame_mask[:, None], special_token_id)
    return pattern.build(padded, special_token_id), real_positions(pattern, frame_mask, codes.shape[1])


def token_losses(
    logits: Tensor, targets: Tensor, real: Tensor, codebook_size: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy by codebook, summed over real positions.

    Label smoothing (arXiv 1512.00567) spreads its mass over the V codes; the special token, where the model has a logit
    for it, gets none.

    Args:
        logits: [b, K, S, V'], V' = V or V + 1.
        targets: int64 [b, K, S].
        real: bool [b, K, S].

    Returns:
        Plain and smoothed sums, [K] each.
    """
    log_p = F.log_softmax(logits.float(), dim=-1)
    right = targets.masked_fill(~real, 0)[..., None]
    plain = -log_p.gather(-1, right)[..., 0]  # [b, K, S]
    smoothed = plain
    if smoothing:
        smoothed = (1 - smoothing) * plain - smoothing * log_p[..., :codebook_size].mean(-1)
    return plain.masked_fill(~real, 0).sum((0, 2)), smoothed.masked_fill(~real, 0).sum((0, 2))


def _codebook_weights(given: Sequence[float] | None, n_codebooks: int) -> Tensor:
    """Shares of the loss by codebook, [K], that add up to 1; None: all the same."""
    weights = torch.tensor(given if given is not None else [1.0] * n_codebooks, dtype=torch.float32)
    if len(weights) != n_codebooks or not bool((weights > 0).all()):
        raise UserError(
            f"train.codebook_weights={list(given or [])}: give {n_codebooks} positive numbers, one a codebook"
        )
    return weights / weights.sum()


def _check_block(block: int, n_layers: int) -> None:
    if not 1 <= block <= n_layers:
        raise UserError(f"tag_head.block={block}: the model has blocks 1 to {n_layers}")


def _file_name(prompt: str) -> str:
    """A prompt as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]


def _check_fit(config: DictConfig, info: dict[str, Any]) -> None:
    store, model = config.data.store, config.model
    codec, text = info["codec"], info["text"]
    if model.codebook_size != codec["codebook_size"] or model.n_codebooks > codec["n_codebooks"]:
        raise UserError(
            f"the model takes {model.n_codebooks} codebooks of {model.codebook_size}, {store} has "
            f"{codec['n_codebooks']} of {codec['codebook_size']}: set model.n_codebooks and model.codebook_size"
        )
    if model.text_dim != text["dim"]:
        raise UserError(
            f"the model takes text of width {model.text_dim}, {store} holds {text['name']} of width {text['dim']}: "
            f"set model.text_dim={text['dim']}, or prepare with another text encoder"
        )
