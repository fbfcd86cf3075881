"""TokenLM: an autoregressive model of codec codes given text, on a stack of state-space blocks.

Each position holds one code of every codebook: their embeddings are summed, and K heads give the logits of the K codes
of the next position. The interleaving of codebooks (`ssmttm.patterns`) is the caller's, as is the shift by one:
inputs = cat([special column], sequence[..., :-1]), targets = sequence. With the released settings this is Prefix SiMBA
of arXiv 2601.14786, 281,042,176 parameters.
Shapes: B batch, K codebooks, S positions, V' = codebook_size (+ 1 with predict_special), L text tokens.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmttm.errors import UserError
from ssmttm.mixers import MixerState, build_mixer
from ssmttm.mixers.base import check_state, take_positions
from ssmttm.models.blocks import build_block
from ssmttm.models.conditioning import TextProjection, prefix, sinusoids
from ssmttm.text.condition import TextCondition

MIXERS_IN_BLOCK = {"simba": 1, "mamba": 2}


@dataclass
class TokenLMConfig:
    """What a TokenLM is built from; the keys of a config's `model` section.

    layers: a mixer's name, or a list of names that is repeated over the layers. block: "simba" (mixer and MLP) or
    "mamba" (two mixers). conditioning: "prefix". positions: "none" or "sinusoidal". predict_special: give the special
    token a logit. init_std: the spread of embeddings and heads at the start, with residual projections scaled down by
    the depth; null keeps the defaults of PyTorch, as the paper's released code does.
    """

    n_codebooks: int = 8
    codebook_size: int = 1024
    d_model: int = 256
    n_layers: int = 8
    layers: str | list[str] = "mamba2"
    d_state: int = 64
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    chunk_size: int = 64
    block: str = "simba"
    mlp_ratio: float = 2.0
    conditioning: str = "prefix"
    text_dim: int = 384
    dropout: float = 0.0
    positions: str = "none"
    final_norm: bool = True
    predict_special: bool = False
    init_std: float | None = 0.02

    def __post_init__(self) -> None:
        _choice("block", self.block, *MIXERS_IN_BLOCK)
        _choice("conditioning", self.conditioning, "prefix")
        _choice("positions", self.positions, "none", "sinusoidal")
        if not isinstance(self.layers, str) and not self.layers:
            raise UserError("model.layers is empty: name at least one mixer, such as mamba2")


@dataclass
class LMState:
    """What a TokenLM carries from one position to the next: its blocks' states and the audio positions seen."""

    blocks: list[list[MixerState | None]]
    batch_size: int
    position: int = 0

    def clone(self) -> "LMState":
        blocks = [[None if state is None else state.clone() for state in states] for states in self.blocks]
        return LMState(blocks, self.batch_size, self.position)

    def put(self, rows: slice, part: "LMState") -> None:
        """Copy a smaller state into some rows; all parts of a state must stand at the same position."""
        for states, parts in zip(self.blocks, part.blocks, strict=True):
            for state, other in zip(states, parts, strict=True):
                if state is not None:
                    for field in fields(state):
                        getattr(state, field.name)[rows].copy_(getattr(other, field.name))
        self.position = part.position


class TokenLM(nn.Module):
    """The model. `special_token_id` (= codebook_size) stands for the start and for what a pattern fills in."""

    def __init__(self, config: TokenLMConfig) -> None:
        super().__init__()
        self.config = config
        self.special_token_id = config.codebook_size
        self.n_logits = config.codebook_size + int(config.predict_special)
        rows = config.codebook_size + 1  # of one codebook's embedding
        self.embedding = nn.Embedding(config.n_codebooks * rows, config.d_model)  # row k * rows + code
        self.register_buffer("offsets", torch.arange(config.n_codebooks) * rows, persistent=False)
        self.text = TextProjection(config.text_dim, config.d_model)
        self.blocks = nn.ModuleList(self._block(index) for index in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=1e-5) if config.final_norm else nn.Identity()
        self.heads = nn.Linear(config.d_model, config.n_codebooks * self.n_logits, bias=False)  # row k * V' + code
        if config.init_std is not None:
            self._init_weights(config.init_std)

    def forward(self, codes: Tensor, text: TextCondition | None) -> Tensor:
        """Logits of every next position.

        Args:
            codes: [B, K, S] int64, values up to and with `special_token_id`.
            text: B captions; None means no prefix at all.

        Returns:
            logits [B, K, S, V'], where [..., s, :] is computed from codes[..., : s + 1] and predicts position s + 1. A
            view: `logits.transpose(1, 2)` is contiguous.

        Raises:
            UserError: the number of codebooks, the batch sizes or the text width do not fit.
        """
        hidden = self._hidden(codes, text, None)  # [B, S, D]
        return self._logits(hidden).transpose(1, 2)

    @torch.no_grad()
    def prefill(self, codes: Tensor, text: TextCondition | None, state: LMState) -> Tensor:
        """Take in the text, then codes [B, K, S], S >= 1; `state` moves on. Returns the last logits, [B, K, V']."""
        return self._logits(self._hidden(codes, text, state)[:, -1])

    @torch.no_grad()
    def step(self, codes: Tensor, state: LMState) -> Tensor:
        """Take in one position, codes [B, K]; `state` moves on in place. Returns logits [B, K, V']."""
        check_state(state.batch_size, len(codes))
        x = F.embedding_bag(codes + self.offsets, self.embedding.weight, mode="sum")  # [B, D]
        if self.config.positions == "sinusoidal":
            x = x + sinusoids(torch.tensor([state.position], device=x.device), x.shape[-1]).to(x.dtype)
        for block, states in zip(self.blocks, state.blocks, strict=True):
            x = block.step(x, states)
        state.position += 1
        return self._logits(x)

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LMState:
        """The state before the text. `dtype` is that of the activations; recurrent states are float32 all the same."""
        return LMState([block.init_state(batch_size, device, dtype) for block in self.blocks], batch_size)

    def flops(self, n_frames: int, n_text_tokens: int) -> int:
        """Forward FLOPs of one sequence of `n_frames` positions and `n_text_tokens` tokens of text."""
        blocks = sum(block.flops(n_frames + n_text_tokens) for block in self.blocks)
        return blocks + self.text.flops(n_text_tokens) + 2 * n_frames * self.heads.weight.numel()

    def _hidden(self, codes: Tensor, text: TextCondition | None, state: LMState | None) -> Tensor:
        """The stream behind the last block at the audio's positions, [B, S, D]."""
        self._check(codes, text, state)
        batch, n_codebooks, length = codes.shape
        rows = (codes + self.offsets[:, None]).transpose(1, 2).reshape(-1, n_codebooks)  # [B*S, K]
        x = F.embedding_bag(rows, self.embedding.weight, mode="sum").view(batch, length, -1)  # [B, S, D]
        start = 0 if state is None else state.position
        if self.config.positions == "sinusoidal":
            x = x + sinusoids(torch.arange(start, start + length, device=x.device), x.shape[-1]).to(x.dtype)
        mask = audio = None
        if text is not None:
            x, mask, audio = prefix(self._text(text, start), text.mask, x)
            if state is None or bool(mask.all()):
                mask = None  # padding stands behind the audio: only a final state could tell it
        for index, block in enumerate(self.blocks):
            x = block(x, None if state is None else state.blocks[index], mask)
        if state is not None:
            state.position += length
        return x if audio is None else take_positions(x, audio)

    def _text(self, text: TextCondition, start: int) -> Tensor:
        """The projected text, [B, L, D]; with positions, its tokens count down to the audio's start."""
        projected = self.text(text)
        if self.config.positions == "none":
            return projected
        to_audio = text.mask.sum(1, keepdim=True) - text.mask.cumsum(1) + 1  # [B, L]
        return projected + sinusoids(start - to_audio, projected.shape[-1]).to(projected.dtype)

    def _logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., K, V']."""
        return self.heads(self.norm(hidden)).unflatten(-1, (self.config.n_codebooks, self.n_logits))

    def _block(self, index: int) -> nn.Module:
        c = self.config
        name = c.layers if isinstance(c.layers, str) else c.layers[index % len(c.layers)]
        options = {key: getattr(c, key) for key in ("d_state", "d_conv", "expand", "headdim", "ngroups", "chunk_size")}
        mixers = [build_mixer(name, c.d_model, **options) for _ in range(MIXERS_IN_BLOCK[c.block])]
        return build_block(c.block, c.d_model, mixers, c.mlp_ratio, c.dropout)

    def _init_weights(self, std: float) -> None:
        """Small embeddings and heads, no biases, and what is added to the stream scaled by 1/sqrt(its addends)."""
        nn.init.normal_(self.embedding.weight, std=std)
        nn.init.normal_(self.heads.weight, std=std)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith(("out_proj.weight", "inner.3.weight")):
                    parameter.div_(math.sqrt(2 * self.config.n_layers))
                elif name.endswith(("inner.0.bias", "inner.3.bias", "text.linear.bias")):
                    parameter.zero_()

    def _check(self, codes: Tensor, text: TextCondition | None, state: LMState | None) -> None:
        batch, n_codebooks, length = codes.shape
        if n_codebooks != self.config.n_codebooks:
            raise UserError(f"the codes have {n_codebooks} codebooks, the model has {self.config.n_codebooks}")
        if length == 0:
            raise UserError("the codes are empty: give at least the special column")
        if text is not None and len(text.mask) != batch:
            raise UserError(f"there are {len(text.mask)} captions for a batch of {batch}: give one each")
        if state is not None:
            check_state(state.batch_size, batch)


def _choice(key: str, value: str, *known: str) -> None:
    if value not in known:
        raise UserError(f"unknown model.{key} {value!r}: choose from {', '.join(known)}")
