"""TokenLM: an autoregressive model of codec codes given text, on a stack of state-space blocks.

Each position holds one code of every codebook: their embeddings are summed, and K heads predict the K codes of the next
position. The caller interleaves the codebooks (`ssmttm.patterns`) and shifts by one: inputs = cat([start column],
sequence[..., :-1]), targets = sequence. With the released settings this is Prefix SiMBA of arXiv 2601.14786, with
281,042,176 parameters. Controls (`ssmttm.models.controls`) are added to the audio positions: each gets the chroma and
the bar position of the frame that it predicts (`Pattern.frames`).
Shapes: B batch, K codebooks, S positions, V' = codebook_size (+ 1 with predict_special), L text tokens, D model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ssmttm.config.model import TokenLMConfig
from ssmttm.errors import UserError
from ssmttm.mixers import build_mixer
from ssmttm.mixers.base import check_state, gather_positions
from ssmttm.models.blocks import (
    MLP,
    Block,
    CrossAttentionSublayer,
    MLPSublayer,
    Sublayer,
    SublayerConfig,
    SublayerState,
    build_norm,
)
from ssmttm.models.conditioning import ProjectedText, TextProjection, prefix, sinusoids
from ssmttm.models.control_predictor import ControlPredictor
from ssmttm.models.controls import ControlledModel, Controls
from ssmttm.models.cross_attention import CrossAttention
from ssmttm.ops.linear import Linear
from ssmttm.text.condition import TextCondition


@dataclass
class LMState:
    """The recurrent state of a TokenLM: its blocks' states, the number of audio positions processed and, with joint
    positions, the number of text tokens before them, [B, 1]."""

    blocks: list[list[SublayerState]]
    batch_size: int
    position: int = 0
    n_text: Tensor | None = None

    def clone(self) -> "LMState":
        blocks = [[state.clone() for state in states] for states in self.blocks]
        return LMState(blocks, self.batch_size, self.position, None if self.n_text is None else self.n_text.clone())

    def write_rows(self, rows: slice, part: "LMState") -> None:
        """Copy the state of a smaller batch into some rows; all rows must be at the same position."""
        for states, parts in zip(self.blocks, part.blocks, strict=True):
            for state, other in zip(states, parts, strict=True):
                state.write_rows(rows, other)
        if self.n_text is not None and part.n_text is not None:
            self.n_text[rows] = part.n_text
        self.position = part.position


class TokenLM(ControlledModel):
    """The model. `special_token_id` (= codebook_size) is the start token and the pattern's padding."""

    offsets: Tensor
    blocks: Any  # nn.ModuleList of Block

    def __init__(self, config: TokenLMConfig) -> None:
        super().__init__()
        self.config = config
        self.special_token_id = config.codebook_size
        self.n_logits = config.codebook_size + int(config.predict_special)
        rows = config.codebook_size + 1  # of one codebook's embedding
        self.embedding = nn.Embedding(config.n_codebooks * rows, config.d_model)  # row k * rows + code
        self.register_buffer("offsets", torch.arange(config.n_codebooks) * rows, persistent=False)
        self.text = TextProjection(config.text_dim, config.d_model, config.text_norm)
        self.add_control_embeddings(config, config.d_model, config.d_model)
        self.blocks = nn.ModuleList(self._block(index) for index in range(config.n_layers))
        self.norm = build_norm(config.norm, config.d_model) if config.final_norm else nn.Identity()
        self.heads = Linear(config.d_model, config.n_codebooks * self.n_logits, bias=False)  # row k * V' + code
        self.control_predictor = ControlPredictor(config) if config.predict_controls else None
        if config.init_std is not None:
            self._init_weights(config.init_std)

    def forward(
        self,
        codes: Tensor,
        text: TextCondition | None,
        return_hidden_states_of: Sequence[int] = (),
        controls: Controls | None = None,
        predict_controls: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]] | tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        """Logits of every next position.

        Args:
            codes: [B, K, S] int64 in [0, special_token_id].
            text: B captions; None: no text.
            return_hidden_states_of: also return the hidden states after these blocks, counted from 1.
            controls: by position; None: no controls.
            predict_controls: also return the logits of the control predictor; the captions are needed.

        Returns:
            logits [B, K, S, V']: [..., s, :] depends on codes and controls [..., : s + 1] and predicts the codes at
            s + 1. A view: `logits.transpose(1, 2)` is contiguous. With `return_hidden_states_of` or
            `predict_controls`, also a list of [B, S, D]; with `predict_controls`, also what the predictor returns.

        Raises:
            UserError: the number of codebooks, the batch sizes, the text width or the controls do not fit.
        """
        *hidden_states, hidden = self._hidden(codes, text, None, controls, return_hidden_states_of)  # [B, S, D] each
        logits = self._logits(hidden).transpose(1, 2)
        if predict_controls:
            assert self.control_predictor is not None and text is not None
            return logits, hidden_states, self.control_predictor(text)
        return (logits, hidden_states) if return_hidden_states_of else logits

    @torch.no_grad()
    def prefill(
        self, codes: Tensor, text: TextCondition | None, state: LMState, controls: Controls | None = None
    ) -> Tensor:
        """Process the text, then codes [B, K, S], S >= 1, with their controls -> the last logits, [B, K, V'].

        `state` is updated in place.
        """
        return self._logits(self._hidden(codes, text, state, controls)[-1][:, -1])

    @torch.no_grad()
    def step(self, codes: Tensor, state: LMState, controls: Controls | None = None) -> Tensor:
        """Process one position, codes [B, K], with its controls -> logits [B, K, V']. Updates `state` in place."""
        check_state(state.batch_size, len(codes))
        x = F.embedding_bag(codes + self.offsets, self.embedding.weight, mode="sum")  # [B, D]
        x = self._add_controls(x[:, None], controls)[:, 0]
        x = self.add_positions(x, torch.full((1,), state.position, device=x.device), state.n_text)
        logits = self.step_embedded(x, state)
        state.position += 1
        return logits

    @torch.no_grad()
    def step_embedded(self, x: Tensor, state: LMState) -> Tensor:
        """A step from the embedded codes with all that is added to them, x [B, D] -> logits [B, K, V']. Updates the
        blocks' states in place, and leaves the position to the caller."""
        for block, states in zip(self.blocks, state.blocks, strict=True):
            x = block.step(x, states)
        return self._logits(x)

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LMState:
        """The state before the text. `dtype` is that of the activations; recurrent states are always float32."""
        blocks = [block.init_state(batch_size, device, dtype) for block in self.blocks]
        device = device or self.embedding.weight.device
        joint = self.config.positions == "joint"
        return LMState(blocks, batch_size, 0, torch.zeros(batch_size, 1, device=device).long() if joint else None)

    def flops(self, n_frames: int, n_text_tokens: int) -> int:
        """Forward FLOPs of a sequence of `n_frames` positions and `n_text_tokens` text tokens."""
        n_positions = n_frames + n_text_tokens * (self.config.conditioning == "prefix")
        flops = sum(block.flops(n_positions, n_text_tokens) for block in self.blocks)
        flops += self.control_flops(n_frames) + self.text.flops(n_text_tokens)
        return flops + 2 * n_frames * self.heads.weight.numel()

    def _hidden(
        self,
        codes: Tensor,
        text: TextCondition | None,
        state: LMState | None,
        controls: Controls | None,
        return_hidden_states_of: Sequence[int] = (),
    ) -> list[Tensor]:
        """Hidden states at the audio after the given blocks, then after the last block, [B, S, D] each."""
        self._check(codes, text, state)
        batch, _, length = codes.shape
        rows = rearrange(codes + self.offsets[:, None], "b k s -> (b s) k")
        summed = F.embedding_bag(rows, self.embedding.weight, mode="sum")  # [B * S, D]
        x = rearrange(summed, "(b s) d -> b s d", b=batch)
        x = self._add_controls(x, controls)
        start = 0 if state is None else state.position
        projected = None if text is None else self.text(text)
        n_text = None if state is None else state.n_text
        if projected is not None and self.config.positions == "joint":
            n_text = (n_text if n_text is not None else 0) + projected.mask.sum(1, keepdim=True)  # [B, 1]
        x = self.add_positions(x, torch.arange(start, start + length, device=x.device), n_text)
        mask = audio = None
        if projected is not None and self.config.conditioning == "prefix":
            x, mask, audio = prefix(self._embed_prefix(projected, start), x)
            projected = None
            if state is None or bool(mask.all()):
                mask = None  # padding comes after the audio: only the final state would depend on it
        kept = {}
        for index, block in enumerate(self.blocks):
            x = block(x, projected, None if state is None else state.blocks[index], mask)
            if index + 1 in return_hidden_states_of:
                kept[index + 1] = x
        if state is not None:
            state.position += length
            state.n_text = n_text
        hidden_states = [*(kept[number] for number in return_hidden_states_of), x]
        return hidden_states if audio is None else [gather_positions(hidden, audio) for hidden in hidden_states]

    def _add_controls(self, x: Tensor, controls: Controls | None) -> Tensor:
        """Add the controls to the audio positions x [B, S, D]."""
        controls = controls or Controls()
        controls.check(self.config, "language model", x.shape[0], x.shape[1])
        for embedding in self.embed_frames(controls):
            x = x + embedding
        for embedding in self.embed_items(controls):
            x = x + embedding[:, None]
        return x

    def add_positions(self, x: Tensor, positions: Tensor, n_text: Tensor | None) -> Tensor:
        """Add embeddings of the audio positions [S] to x [B, S, D] or, in a step, [B, D]."""
        if self.config.positions not in ("sinusoidal", "joint"):
            return x
        embedding = sinusoids(positions if n_text is None else positions + n_text, x.shape[-1]).to(x.dtype)
        return x + embedding.view(-1, *x.shape[1:])

    def _embed_prefix(self, text: ProjectedText, start: int) -> ProjectedText:
        """Add position embeddings to a prefix: counted down to the audio's start, or up from 0 if joint."""
        if self.config.positions not in ("sinusoidal", "joint"):
            return text
        count = text.mask.cumsum(1)  # [B, L]
        first = 1 if self.config.positions == "joint" else 1 + text.mask.sum(1, keepdim=True) - start
        return text._replace(tokens=text.tokens + sinusoids(count - first, text.tokens.shape[-1]).to(text.tokens.dtype))

    def _logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., K, V']."""
        return self.heads(self.norm(hidden)).unflatten(-1, (self.config.n_codebooks, self.n_logits))

    def _block(self, index: int) -> Block:
        c = self.config
        name = c.layer_names[index % len(c.layer_names)]
        options = c.mixer_options | {"rotary": c.positions == "rotary", "out_bias": c.attention_bias}
        n_mixers = {"simba": 1, "mamba": 2}[c.block]
        inner: list[tuple[type[Sublayer], Any]]
        inner = [(Sublayer, build_mixer(name, c.d_model, **options)) for _ in range(n_mixers)]
        if c.conditioning == "cross_attention":
            cross = CrossAttention(c.d_model, c.n_heads, c.dropout, c.attention_bias)
            inner.insert(1, (CrossAttentionSublayer, cross))
        mlp = MLP(c.d_model, c.mlp_ratio, c.dropout, c.mlp_bias)  # always built: keeps the order of random draws
        if c.block == "simba":
            inner.append((MLPSublayer, mlp))
        config = SublayerConfig(c.dropout, c.norm, c.layer_scale, c.conditioning == "adaln")
        return Block([sublayer(c.d_model, module, config) for sublayer, module in inner])

    def _init_weights(self, std: float) -> None:
        """Normal embeddings and heads, zero biases, residual projections scaled down by the depth (as in GPT-2)."""
        nn.init.normal_(self.embedding.weight, std=std)
        nn.init.normal_(self.heads.weight, std=std)
        self.text.init_weights()
        self.init_control_embeddings(std)
        sublayers = [sublayer for block in self.blocks for sublayer in block.sublayers]
        for sublayer in sublayers:
            sublayer.init_weights(len(sublayers))

    def _check(self, codes: Tensor, text: TextCondition | None, state: LMState | None) -> None:
        batch, n_codebooks, length = codes.shape
        if n_codebooks != self.config.n_codebooks:
            raise UserError(f"the codes have {n_codebooks} codebooks, the model has {self.config.n_codebooks}")
        if length == 0:
            raise UserError("the codes are empty: give at least the start column")
        if text is not None and len(text.mask) != batch:
            raise UserError(f"got {len(text.mask)} captions for a batch of {batch}: give one per item")
        if state is not None:
            check_state(state.batch_size, batch)
