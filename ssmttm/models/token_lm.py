"""TokenLM: an autoregressive model of codec codes given text, on a stack of state-space blocks.

Each position holds one code of every codebook: their embeddings are summed, and K heads give the logits of the K codes
of the next position. The interleaving of codebooks (`ssmttm.patterns`) is the caller's, as is the shift by one:
inputs = cat([special column], sequence[..., :-1]), targets = sequence. With the released settings this is Prefix SiMBA
of arXiv 2601.14786, 281,042,176 parameters. A melody and a tempo (`ssmttm.models.controls`) are added to the positions of
the audio: each is told the pitch classes of the frame that it predicts, which `Pattern.frames` names.
Shapes: B batch, K codebooks, S positions, V' = codebook_size (+ 1 with predict_special), L text tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmttm.errors import UserError
from ssmttm.mixers import build_mixer
from ssmttm.mixers.base import check_sizes, check_state, gather_positions
from ssmttm.models.blocks import MLP, SublayerConfig, SublayerState, build_block, build_norm
from ssmttm.models.conditioning import ProjectedText, TextProjection, prefix, sinusoids
from ssmttm.models.controls import ChromaEmbedding, Controls, TempoEmbedding
from ssmttm.models.cross_attention import CrossAttention
from ssmttm.ops.linear import Linear
from ssmttm.text.condition import TextCondition

MIXERS_IN_BLOCK = {"simba": 1, "mamba": 2}


@dataclass
class TokenLMConfig:
    """What a TokenLM is built from; the keys of a config's `model` section.

    layers: a mixer's name, or a list of names that is repeated over the layers, such as five mamba2 and an attention.
    block: "simba" (mixer and MLP) or "mamba" (two mixers). conditioning: "prefix", "cross_attention" or "adaln".
    n_heads: of attention and cross-attention. mlp_bias, attention_bias: biases of the MLP and of what leaves an
    attention. text_norm: LayerNorm behind the text's projection. positions: "none"; "sinusoidal", which count the audio
    from 0 and a text prefix down to it; "joint", sinusoidal over prefix and audio together, as the paper's released
    code has it; "rotary", in attention layers. norm: "rms" or "layer". layer_scale: where the learnt scale of every
    branch starts; null: none. predict_special: give the special token a logit. init_std: the spread of embeddings and
    heads at the start, with residual projections scaled down by the depth; null keeps the defaults of PyTorch, as the
    paper's released code does. chroma, tempo: whether it can be told a melody, a tempo.
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
    n_heads: int = 8
    block: str = "simba"
    mlp_ratio: float = 2.0
    mlp_bias: bool = True
    attention_bias: bool = True
    conditioning: str = "prefix"
    text_dim: int = 384
    text_norm: bool = True
    dropout: float = 0.0
    positions: str = "none"
    norm: str = "rms"
    layer_scale: float | None = None
    final_norm: bool = True
    predict_special: bool = False
    init_std: float | None = 0.02
    chroma: bool = False
    tempo: bool = False

    def __post_init__(self) -> None:
        _choice("block", self.block, *MIXERS_IN_BLOCK)
        _choice("conditioning", self.conditioning, "prefix", "cross_attention", "adaln")
        _choice("positions", self.positions, "none", "sinusoidal", "joint", "rotary")
        _choice("norm", self.norm, "rms", "layer")
        check_sizes(n_codebooks=self.n_codebooks, codebook_size=self.codebook_size, text_dim=self.text_dim)
        if self.positions == "joint" and self.conditioning != "prefix":
            raise UserError("model.positions=joint counts a text prefix: set conditioning=prefix or other positions")
        if not self.layer_names:
            raise UserError("model.layers is empty: name at least one mixer, such as mamba2")
        if self.positions == "rotary" and "attention" not in self.layer_names:
            raise UserError("model.positions=rotary acts in attention layers, and model.layers has none: set another")
        if self.tempo and self.d_model % 2:
            raise UserError(f"model.tempo=true needs an even model.d_model, not {self.d_model}: choose another")

    @property
    def layer_names(self) -> list[str]:
        """One period of the layer pattern."""
        return [self.layers] if isinstance(self.layers, str) else self.layers


@dataclass
class LMState:
    """What a TokenLM carries from one position to the next: its blocks' states, the audio positions seen, and for joint
    positions the text tokens in front of them, [B]."""

    blocks: list[list[SublayerState]]
    batch_size: int
    position: int = 0
    n_text: Tensor | None = None

    def clone(self) -> "LMState":
        blocks = [[state.clone() for state in states] for states in self.blocks]
        return LMState(blocks, self.batch_size, self.position, None if self.n_text is None else self.n_text.clone())

    def put(self, rows: slice, part: "LMState") -> None:
        """Copy a smaller state into some rows; all parts of a state must stand at the same position."""
        for states, parts in zip(self.blocks, part.blocks, strict=True):
            for state, other in zip(states, parts, strict=True):
                state.put(rows, other)
        if self.n_text is not None:
            self.n_text[rows] = part.n_text
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
        self.text = TextProjection(config.text_dim, config.d_model, config.text_norm)
        self.chroma = ChromaEmbedding(config.d_model) if config.chroma else None
        self.tempo = TempoEmbedding(config.d_model) if config.tempo else None
        self.blocks = nn.ModuleList(self._block(index) for index in range(config.n_layers))
        self.norm = build_norm(config.norm, config.d_model) if config.final_norm else nn.Identity()
        self.heads = Linear(config.d_model, config.n_codebooks * self.n_logits, bias=False)  # row k * V' + code
        if config.init_std is not None:
            self._init_weights(config.init_std)

    def forward(
        self,
        codes: Tensor,
        text: TextCondition | None,
        return_hidden_states_of: Sequence[int] = (),
        controls: Controls | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Logits of every next position.

        Args:
            codes: [B, K, S] int64, values up to and with `special_token_id`.
            text: B captions; None means no text at all.
            return_hidden_states_of: also return the residual stream behind each of these blocks, counted from 1.
            wishes: chroma [B, 12, S], a column a position, and tempo; None: no wishes at all.

        Returns:
            logits [B, K, S, V'], where [..., s, :] is computed from codes and chroma [..., : s + 1] and predicts what
            codes[..., s + 1] is to be. A view: `logits.transpose(1, 2)` is contiguous. With `return_hidden_states_of`, these and
            the streams, [B, S, D] each.

        Raises:
            UserError: the number of codebooks, the batch sizes, the text width or the wishes do not fit.
        """
        *hidden_states, hidden = self._hidden(codes, text, None, controls, return_hidden_states_of)  # [B, S, D] each
        logits = self._logits(hidden).transpose(1, 2)
        return (logits, hidden_states) if return_hidden_states_of else logits

    @torch.no_grad()
    def prefill(
        self, codes: Tensor, text: TextCondition | None, state: LMState, controls: Controls | None = None
    ) -> Tensor:
        """Take in the text, then codes [B, K, S], S >= 1, under wishes with chroma [B, 12, S]; `state` moves on.

        Returns:
            the last logits, [B, K, V'].
        """
        return self._logits(self._hidden(codes, text, state, controls)[-1][:, -1])

    @torch.no_grad()
    def step(self, codes: Tensor, state: LMState, controls: Controls | None = None) -> Tensor:
        """Take in one position, codes [B, K], under wishes with chroma [B, 12, 1]; `state` moves on in place.

        Returns:
            logits [B, K, V'].
        """
        check_state(state.batch_size, len(codes))
        x = F.embedding_bag(codes + self.offsets, self.embedding.weight, mode="sum")  # [B, D]
        x = self._add_controls(x[:, None], controls)[:, 0]
        x = self._add_positions(x, torch.tensor([state.position], device=x.device), state.n_text)
        for block, states in zip(self.blocks, state.blocks, strict=True):
            x = block.step(x, states)
        state.position += 1
        return self._logits(x)

    def init_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LMState:
        """The state before the text. `dtype` is that of the activations; recurrent states are float32 all the same."""
        blocks = [block.init_state(batch_size, device, dtype) for block in self.blocks]
        device = device or self.embedding.weight.device
        joint = self.config.positions == "joint"
        return LMState(blocks, batch_size, 0, torch.zeros(batch_size, 1, device=device).long() if joint else None)

    def flops(self, n_frames: int, n_text_tokens: int) -> int:
        """Forward FLOPs of one sequence of `n_frames` positions and `n_text_tokens` tokens of text."""
        n_positions = n_frames + n_text_tokens * (self.config.conditioning == "prefix")
        flops = sum(block.flops(n_positions, n_text_tokens) for block in self.blocks)
        if self.chroma is not None:
            flops += self.chroma.flops(n_frames)
        if self.tempo is not None:
            flops += self.tempo.flops()
        return flops + self.text.flops(n_text_tokens) + 2 * n_frames * self.heads.weight.numel()

    def _hidden(
        self,
        codes: Tensor,
        text: TextCondition | None,
        state: LMState | None,
        controls: Controls | None,
        return_hidden_states_of: Sequence[int] = (),
    ) -> list[Tensor]:
        """The streams behind some blocks, as asked for, then that behind the last, at the audio: [B, S, D] each."""
        self._check(codes, text, state)
        batch, n_codebooks, length = codes.shape
        rows = (codes + self.offsets[:, None]).transpose(1, 2).reshape(-1, n_codebooks)  # [B*S, K]
        x = F.embedding_bag(rows, self.embedding.weight, mode="sum").view(batch, length, -1)  # [B, S, D]
        x = self._add_controls(x, controls)
        start = 0 if state is None else state.position
        projected = None if text is None else self.text(text)
        n_text = None if state is None else state.n_text
        if projected is not None and self.config.positions == "joint":
            n_text = (n_text if n_text is not None else 0) + projected.mask.sum(1, keepdim=True)  # [B, 1]
        x = self._add_positions(x, torch.arange(start, start + length, device=x.device), n_text)
        mask = audio = None
        if projected is not None and self.config.conditioning == "prefix":
            x, mask, audio = prefix(self._embed_prefix(projected, start), x)
            projected = None
            if state is None or bool(mask.all()):
                mask = None  # padding stands behind the audio: only a final state could tell it
        behind = {}
        for index, block in enumerate(self.blocks):
            x = block(x, projected, None if state is None else state.blocks[index], mask)
            if index + 1 in return_hidden_states_of:
                behind[index + 1] = x
        if state is not None:
            state.position += length
            state.n_text = n_text
        hidden_states = [*(behind[number] for number in return_hidden_states_of), x]
        return hidden_states if audio is None else [gather_positions(stream, audio) for stream in hidden_states]

    def _add_controls(self, x: Tensor, controls: Controls | None) -> Tensor:
        """Add what is wished to x [B, S, D], positions of the audio."""
        controls = controls or Controls()
        controls.check(self.config, "language model", *x.shape[:2])
        if self.chroma is not None:
            x = x + self.chroma(controls.chroma)
        if self.tempo is not None:
            x = x + self.tempo(controls.tempo)[:, None]
        return x

    def _add_positions(self, x: Tensor, positions: Tensor, n_text: Tensor | None) -> Tensor:
        """Add what the positions [S] of the audio say to x [B, S, D] or, at a step, [B, D]."""
        if self.config.positions not in ("sinusoidal", "joint"):
            return x
        where = sinusoids(positions if n_text is None else positions + n_text, x.shape[-1]).to(x.dtype)
        return x + where.view(-1, *x.shape[1:])

    def _embed_prefix(self, text: ProjectedText, start: int) -> ProjectedText:
        """The same for a prefix: its tokens count down to the audio's start, or up from 0 with joint positions."""
        if self.config.positions not in ("sinusoidal", "joint"):
            return text
        count = text.mask.cumsum(1)  # [B, L]
        first = 1 if self.config.positions == "joint" else 1 + text.mask.sum(1, keepdim=True) - start
        return text._replace(tokens=text.tokens + sinusoids(count - first, text.tokens.shape[-1]).to(text.tokens.dtype))

    def _logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., K, V']."""
        return self.heads(self.norm(hidden)).unflatten(-1, (self.config.n_codebooks, self.n_logits))

    def _block(self, index: int) -> nn.Module:
        c = self.config
        name = c.layer_names[index % len(c.layer_names)]
        sizes = ("d_state", "d_conv", "expand", "headdim", "ngroups", "chunk_size", "n_heads", "dropout")
        options = {key: getattr(c, key) for key in sizes}
        options |= {"rotary": c.positions == "rotary", "out_bias": c.attention_bias}
        mixers = [build_mixer(name, c.d_model, **options) for _ in range(MIXERS_IN_BLOCK[c.block])]
        cross = None
        if c.conditioning == "cross_attention":
            cross = CrossAttention(c.d_model, c.n_heads, c.dropout, c.attention_bias)
        mlp = MLP(c.d_model, c.mlp_ratio, c.dropout, c.mlp_bias)
        style = SublayerConfig(c.dropout, c.norm, c.layer_scale, c.conditioning == "adaln")
        return build_block(c.block, c.d_model, mixers, cross, mlp, style)

    def _init_weights(self, std: float) -> None:
        """Small embeddings and heads, no biases, and what is added to the stream scaled by 1/sqrt(its addends)."""
        nn.init.normal_(self.embedding.weight, std=std)
        nn.init.normal_(self.heads.weight, std=std)
        if self.chroma is not None:
            nn.init.normal_(self.chroma.linear.weight, std=std)
        if self.tempo is not None:
            nn.init.normal_(self.tempo.number.layers[2].weight, std=std)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith(("out_proj.weight", "fc2.weight")):
                    parameter.div_(math.sqrt(2 * self.config.n_layers))
                elif name.endswith(("fc1.bias", "fc2.bias", "linear.bias", "layers.0.bias", "layers.2.bias")):
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
