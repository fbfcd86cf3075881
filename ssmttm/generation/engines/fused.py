"""The decoding step and the draw in one C++ call each (step.cpp), for models of Mamba-1, Mamba-2, attention and MLPs.

Weights stay in the model's memory as float32, or are packed once as bfloat16, or as int8 with a scale per row and
15-bit activations. A row has the same bits in any batch. States are updated in the LMState's own memory.
Shapes: O outputs, I inputs, B items, K codebooks, V' logits of a codebook, D model width, H heads, P head width.
"""

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.generation.engines.base import AddedEmbeddings, Engine, Steps, check_parts
from ssmttm.generation.engines.library import Pool, Unavailable, instruction_set, library
from ssmttm.generation.engines.sequences import compiled_sequences
from ssmttm.generation.request import Sampling
from ssmttm.mixers import Attention, Mamba1, Mamba2
from ssmttm.mixers.attention import AttentionState
from ssmttm.models.blocks import MLP, Sublayer, SublayerState
from ssmttm.models.controls import Controls
from ssmttm.models.cross_attention import CrossAttention
from ssmttm.models.token_lm import LMState, TokenLM
from ssmttm.ops.int8 import NOT_QUANTISED, Int8Linear, quantise_rows

FORMATS = {"fp32": 0, "bf16": 1, "int8": 2}
MAX_INT8_INPUTS = 4096  # a lane's sum of products stays below 2^31 with the narrowest vectors, of 4 lanes
LARGE = 100_000_000  # bytes of weights; waking threads for less costs more than they save
INT8_STRIDE = 64  # rows of int8 weights are padded to a multiple
NORMS: dict[type, int] = {nn.Identity: 0, nn.RMSNorm: 1, nn.LayerNorm: 2}

_pointer, _number, _float, _double = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_double


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("weight", "scale", "bias")),
        *((name, _number) for name in ("n_out", "n_in", "stride", "format")),
    ]


class _Sublayer(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("kind", "norm", "inner", "channels", "taps", "d_state")),
        *((name, _number) for name in ("heads", "headdim", "groups", "dt_rank", "rotary")),
        *((name, _pointer) for name in ("norm_weight", "norm_bias", "layer_scale")),
        ("linears", _Linear * 4),
        *((name, _pointer) for name in ("conv_weight", "conv_bias", "dt_bias", "A", "D", "gate_norm")),
    ]


class _State(ctypes.Structure):
    _fields_ = [*((name, _pointer) for name in ("first", "second", "adaln", "lengths", "mask")), ("slots", _number)]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("d_model", "n_codebooks", "embedding_rows", "n_sublayers", "norm")),
        *((name, _pointer) for name in ("embedding", "norm_weight", "norm_bias")),
        ("heads", _Linear),
        ("sublayers", ctypes.POINTER(_Sublayer)),
    ]


class _Draw(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("n_codebooks", "n_logits", "codebook_size", "top_k", "guided")),
        *((name, _float) for name in ("guidance_scale", "temperature")),
        *((name, _double) for name in ("top_p", "min_p")),
    ]


class FusedEngine(Engine):
    """Raises Unavailable if the library cannot be built, or the model has a part that step.cpp does not.

    `threads`: None is one, or torch's number for weights of more than 100 MB. `isa`: a key of INSTRUCTION_SETS.

    Attributes:
        n_bytes: of the weights that a step reads.
    """

    name = "fused"

    def __init__(
        self, model: TokenLM, weights: str = "fp32", threads: int | None = None, isa: str | None = None
    ) -> None:
        super().__init__(model, weights)
        _check(model)
        self.library = library(isa)
        sizes = [ctypes.sizeof(struct) for struct in (_Linear, _Sublayer, _State, _Model, _Draw)]
        if sizes != [self.library.ssmttm_size(which) for which in range(len(sizes))]:
            raise Unavailable("the library's structures are not those of fused.py")
        self.n_bytes = 0
        self._format = FORMATS[weights]
        self._kept: list[Tensor] = []  # what the structures point to
        sublayers = [sublayer for block in model.blocks for sublayer in block.sublayers]
        structs = (_Sublayer * len(sublayers))(*map(self._sublayer, sublayers))
        self.struct = _Model(
            model.config.d_model, model.config.n_codebooks, model.config.codebook_size + 1, len(sublayers),
            NORMS[type(model.norm)], self._at(model.embedding.weight), *self._norm(model.norm),
            self._linear(model.heads), structs,
        )  # fmt: skip
        self._structs = structs
        threads = threads or (1 if self.n_bytes < LARGE else torch.get_num_threads())
        self.pool = Pool(self.library, threads)
        if any(isinstance(module, Int8Linear) for module in model.modules()):
            self.weights = "int8"
        self.reason = f"compiled for {isa or instruction_set()}, {threads} thread{'s' * (threads != 1)}"

    def bind(self, state: LMState, n_items: int, n_conditional: int | None = None) -> "FusedSteps":
        return FusedSteps(self, state, n_items, n_conditional)

    def prefill_context(self) -> AbstractContextManager[None]:
        return compiled_sequences(self.model.embedding.weight.device)

    def draw(self, logits: Tensor, uniforms: Tensor, sampling: Sampling, guided: bool) -> Tensor:
        logits, uniforms = logits.float().contiguous(), uniforms.double().contiguous()
        codes, settings = torch.empty(uniforms.shape, dtype=torch.long), self.draw_settings(sampling, guided)
        at = ctypes.addressof(settings), logits.data_ptr(), len(uniforms), uniforms.data_ptr(), codes.data_ptr()
        self.library.ssmttm_draw(*at)
        return codes

    def draw_settings(self, sampling: Sampling, guided: bool) -> _Draw:
        """The library's settings of a draw."""
        config = self.model.config
        return _Draw(
            config.n_codebooks, self.model.n_logits, config.codebook_size, sampling.top_k, guided,
            sampling.guidance_scale, sampling.temperature, sampling.top_p, sampling.min_p,
        )  # fmt: skip

    def _at(self, tensor: Tensor | None) -> int | None:
        """Address of a tensor as contiguous float32, which is kept."""
        if tensor is None:
            return None
        self._kept.append(tensor.detach().float().contiguous())
        return self._kept[-1].data_ptr()

    def _norm(self, norm: nn.Module) -> tuple[int | None, int | None]:
        return self._at(getattr(norm, "weight", None)), self._at(getattr(norm, "bias", None))

    def _linear(self, linear: nn.Linear, packed: bool = True, with_bias: bool = True) -> _Linear:
        """packed: in the format of the engine's weights; an int8 layer stays as it is."""
        bias = linear.bias if with_bias else None
        n_out, n_in, format_, scale = linear.out_features, linear.in_features, self._format if packed else 0, None
        if isinstance(linear, Int8Linear):
            format_, weight, scale = FORMATS["int8"], linear.int8, linear.scale
        elif format_ == FORMATS["int8"]:
            weight, scale = quantise_rows(linear.weight)
        else:
            weight = linear.weight.detach().to(torch.bfloat16 if format_ == FORMATS["bf16"] else torch.float32)
        if scale is not None:
            if n_in > MAX_INT8_INPUTS:
                raise Unavailable(f"int8 sums are exact up to {MAX_INT8_INPUTS} inputs, a layer has {n_in}")
            weight = F.pad(weight, (0, -n_in % INT8_STRIDE))
        weight = weight.contiguous()
        self._kept.append(weight)
        self.n_bytes += weight.nbytes + (0 if scale is None else scale.nbytes)
        at = weight.data_ptr(), self._at(scale), self._at(bias)
        return _Linear(*at, n_out, n_in, weight.shape[1], format_)

    def _sublayer(self, sublayer: Sublayer) -> _Sublayer:
        struct = _Sublayer(norm=NORMS[type(sublayer.norm)], layer_scale=self._at(sublayer.layer_scale))
        struct.norm_weight, struct.norm_bias = self._norm(sublayer.norm)
        fill: dict[type, Callable[[_Sublayer, Any], None]] = {
            Mamba2: self._mamba2,
            Mamba1: self._mamba1,
            MLP: self._mlp,
        }
        fill.get(type(sublayer.inner), self._attention)(struct, sublayer.inner)
        return struct

    def _mamba2(self, struct: _Sublayer, mixer: Mamba2) -> None:
        struct.kind, struct.inner, struct.channels, struct.taps = 0, mixer.d_inner, mixer.conv_dim, mixer.d_conv
        struct.d_state, struct.heads, struct.headdim, struct.groups = (
            mixer.d_state, mixer.nheads, mixer.headdim, mixer.ngroups,
        )  # fmt: skip
        struct.linears[0], struct.linears[1] = self._linear(mixer.in_proj), self._linear(mixer.out_proj)
        struct.gate_norm = self._at(mixer.norm.weight)
        self._ssm(struct, mixer, mixer.dt_bias)

    def _mamba1(self, struct: _Sublayer, mixer: Mamba1) -> None:
        struct.kind, struct.inner, struct.channels, struct.taps = 1, mixer.d_inner, mixer.d_inner, mixer.d_conv
        struct.d_state, struct.dt_rank = mixer.d_state, mixer.dt_rank
        names = ("in_proj", "out_proj", "x_proj", "dt_proj")
        for index, name in enumerate(names):
            linear = getattr(mixer, name)
            struct.linears[index] = self._linear(linear, name not in NOT_QUANTISED, name != "dt_proj")
        self._ssm(struct, mixer, mixer.dt_proj.bias)

    def _ssm(self, struct: _Sublayer, mixer: Mamba1 | Mamba2, dt_bias: Tensor) -> None:
        struct.conv_weight, struct.conv_bias = self._at(mixer.conv1d.weight[:, 0].t()), self._at(mixer.conv1d.bias)
        struct.dt_bias, struct.A, struct.D = self._at(dt_bias), self._at(-mixer.A_log.exp()), self._at(mixer.D)

    def _attention(self, struct: _Sublayer, attention: Attention | CrossAttention) -> None:
        struct.kind = 2 if isinstance(attention, Attention) else 3
        struct.heads, struct.headdim = attention.n_heads, attention.d_model // attention.n_heads
        struct.rotary = getattr(attention, "rotary", False)
        names = ("q_proj", "k_proj", "v_proj", "out_proj") if struct.kind == 2 else ("q_proj", "", "", "out_proj")
        for index, name in enumerate(names):
            if name:
                struct.linears[index] = self._linear(getattr(attention, name))

    def _mlp(self, struct: _Sublayer, mlp: MLP) -> None:
        struct.kind = 4
        struct.linears[0], struct.linears[1] = self._linear(mlp.fc1), self._linear(mlp.fc2)


class FusedSteps(Steps):
    """Steps on one LMState."""

    engine: FusedEngine

    def __init__(self, engine: FusedEngine, state: LMState, n_items: int, n_conditional: int | None = None) -> None:
        super().__init__(engine, state, n_items, n_conditional)
        model, self.rows = engine.model, state.batch_size
        self.added = AddedEmbeddings(model)
        self.codes = torch.zeros(self.rows, model.config.n_codebooks, dtype=torch.long)
        self.shape = self.rows, model.config.n_codebooks, model.n_logits
        self.sublayers = [sublayer for block in state.blocks for sublayer in block]
        self.states = (_State * len(self.sublayers))()
        self.structs = engine.pool.address, ctypes.addressof(engine.struct), ctypes.addressof(self.states)
        self.kept: list[list[Tensor]] = [[] for _ in self.sublayers]  # what the structures point to
        self._reserve(0)

    @torch.inference_mode()
    def step(self, codes: Tensor, controls: Controls, index: int) -> Tensor:
        torch.index_select(codes, 0, self.item_of_row, out=self.codes)
        self._reserve(1)
        added = self._added(controls, index, 1)
        logits = torch.empty(self.shape)
        at = None if added is None else added.data_ptr()
        failed = self.engine.library.ssmttm_step(*self.structs, self.codes.data_ptr(), at, logits.data_ptr(), self.rows)
        self._check(failed)
        self.state.position += 1
        return logits

    @torch.inference_mode()
    def run(
        self, codes: Tensor | None, logits: Tensor, template: Tensor, uniforms: Tensor, controls: Controls, index: int,
        sampling: Sampling, guided: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        count = len(template)
        if not template.shape == uniforms.shape == (count, self.n_items, self.shape[1]) or logits.shape != self.shape:
            shapes = [list(tensor.shape) for tensor in (template, uniforms, logits)]
            raise ValueError(f"got a template, uniforms and logits of shapes {shapes} for {self.n_items} items")
        n_steps = count - (codes is None)
        self._reserve(n_steps)
        added = self._added(controls, index + count - n_steps, n_steps) if n_steps else None
        stride = 0 if added is None or len(added) == 1 else added[0].numel()
        found = torch.empty(template.shape, dtype=torch.long)
        logits = logits.float().contiguous().clone()
        template, uniforms = template.contiguous(), uniforms.double().contiguous()
        codes = None if codes is None else codes.contiguous()
        at = [None if tensor is None else tensor.data_ptr() for tensor in (codes, added)]
        settings = self.engine.draw_settings(sampling, guided)
        failed = self.engine.library.ssmttm_run(
            *self.structs, ctypes.addressof(settings), *at, stride, template.data_ptr(),
            uniforms.data_ptr(), count, self.n_items, self.rows, logits.data_ptr(), found.data_ptr(),
        )  # fmt: skip
        self._check(failed)
        self.state.position += n_steps
        return found, logits

    def _check(self, failed: int) -> None:
        if failed:
            raise IndexError(f"codes must be in [0, {self.engine.model.special_token_id}]")

    def _added(self, controls: Controls, index: int, count: int) -> Tensor | None:
        return None if self.added.is_empty else self.added.compute(self, controls, index, count)

    def _reserve(self, count: int) -> None:
        """Make space for positions in the caches of attention, where the library stores them and counts them in
        `lengths`; point to tensors that have taken the place of others."""
        for number, sublayer in enumerate(self.sublayers):
            if isinstance(sublayer.inner, AttentionState):
                sublayer.inner.longest += count
                sublayer.inner.reserve(sublayer.inner.longest)
            kept, found = self.kept[number], _tensors(sublayer)
            if len(kept) != len(found) or any(tensor is not known for tensor, known in zip(found, kept, strict=True)):
                _point_to(self.states[number], sublayer)
                self.kept[number] = _tensors(sublayer)


def _tensors(state: SublayerState) -> list[Tensor]:
    values = [state.adaln] if state.inner is None else [state.adaln, *vars(state.inner).values()]
    return [value for value in values if isinstance(value, Tensor)]


def _point_to(struct: _State, state: SublayerState) -> None:
    """Point to a sublayer's state, whose tensors are made contiguous float32 first."""
    inner = state.inner
    if state.adaln is not None:
        state.adaln = state.adaln.float().contiguous()
        struct.adaln = state.adaln.data_ptr()
    if hasattr(inner, "conv_state"):
        past = inner.conv_state.transpose(1, 2).float().contiguous()  # [B, taps - 1, C]
        inner.conv_state, inner.ssm_state = past.transpose(1, 2), inner.ssm_state.contiguous()
        struct.first, struct.second = past.data_ptr(), inner.ssm_state.data_ptr()
    elif isinstance(inner, AttentionState):
        inner.keys, inner.values = inner.keys.float().contiguous(), inner.values.float().contiguous()
        struct.first, struct.second, struct.slots = inner.keys.data_ptr(), inner.values.data_ptr(), inner.keys.shape[1]
        struct.lengths = inner.lengths.data_ptr()
    elif inner is not None:
        inner.k, inner.v, inner.mask = (
            inner.k.float().contiguous(),
            inner.v.float().contiguous(),
            inner.mask.contiguous(),
        )
        struct.first, struct.second, struct.slots = inner.k.data_ptr(), inner.v.data_ptr(), inner.mask.shape[1]
        struct.mask = inner.mask.data_ptr()


def _check(model: TokenLM) -> None:
    """Raises Unavailable for what step.cpp does not have."""
    device, dtype = model.embedding.weight.device, model.embedding.weight.dtype
    if device.type != "cpu":
        raise Unavailable(f"it runs on a CPU, the model is on {device}")
    if dtype != torch.float32:
        raise Unavailable(f"its activations are float32, the model is {dtype}")
    check_parts(model, {Mamba1, Mamba2, Attention, CrossAttention, MLP})
