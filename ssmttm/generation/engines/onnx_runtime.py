"""The decoding step in ONNX Runtime, with its fused operators: it needs no compiler and runs on many platforms.

Models of Mamba-2 and MLPs with a text prefix; weights are float32, or int8 in blocks of 16 with int8 activations. One
buffer is bound as each state's input and output, and it is also the LMState's memory. The graph is built node by node;
weights stay outside the protobuf, in the memory they lie in.
Shapes: B rows, K codebooks, D width, I inner width, H heads, P head width, N state, G groups, V' logits of a codebook.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, NotImplemented
from torch import Tensor, nn

from ssmttm.errors import first_line
from ssmttm.generation.engines.base import AddedEmbeddings, Engine, Steps, check_parts
from ssmttm.generation.engines.library import Unavailable
from ssmttm.mixers import Mamba2
from ssmttm.mixers.mamba2 import GatedRMSNorm
from ssmttm.models.blocks import MLP
from ssmttm.models.controls import Controls
from ssmttm.models.token_lm import LMState, TokenLM
from ssmttm.ops.int8 import Int8Linear

ONNX_ERRORS = Fail, InvalidArgument, InvalidGraph, NotImplemented, RuntimeError
MICROSOFT = "com.microsoft"
OPSET = helper.make_opsetid("", 24), helper.make_opsetid(MICROSOFT, 1)
BLOCK = 16  # int8 weights, and as many activations, share a scale; 32 would cost 0.001 nats more
EMBEDDED_BYTES = 1024  # smaller constants are part of the model: shape inference reads axes and sizes
ZERO_POINT = 128  # that of MatMulNBits for int8
_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int64): TensorProto.INT64,
}


class OrtEngine(Engine):
    """Raises Unavailable for another model, and if ONNX Runtime lacks an operator.

    Attributes:
        n_bytes: of the weights that a step reads.
    """

    name = "ort"

    def __init__(self, model: TokenLM, weights: str = "fp32") -> None:
        if any(isinstance(module, Int8Linear) for module in model.modules()):
            weights = "int8"
        super().__init__(model, weights)
        _check(model, weights)
        graph = StepGraph(model, weights)
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_cpu_mem_arena = False
        options.log_severity_level = 3
        self._values = [ort.OrtValue.ortvalue_from_numpy(array) for array in graph.weights.values()]
        options.add_external_initializers(list(graph.weights), self._values)
        document = graph.build()
        try:
            self.session = ort.InferenceSession(document, options, providers=["CPUExecutionProvider"])
        except ONNX_ERRORS as error:
            reason = first_line(error)[:200]
            raise Unavailable(f"onnxruntime {ort.__version__} does not run the graph ({reason})") from error
        self._arrays = graph.weights  # read in place
        self.states, self.n_bytes = graph.states, graph.n_bytes
        self.reason = f"onnxruntime {ort.__version__}, 1 thread"

    def bind(self, state: LMState, n_items: int, n_conditional: int | None = None) -> "OrtSteps":
        return OrtSteps(self, state, n_items, n_conditional)


class OrtSteps(Steps):
    """Steps on one LMState, whose tensors are made views of the buffers that the session is bound to."""

    engine: OrtEngine

    def __init__(self, engine: OrtEngine, state: LMState, n_items: int, n_conditional: int | None = None) -> None:
        super().__init__(engine, state, n_items, n_conditional)
        model, rows = engine.model, state.batch_size
        self.added = AddedEmbeddings(model)
        self.codes = np.zeros((rows, model.config.n_codebooks), np.int64)
        self.embedded = np.zeros((rows, 1, model.config.d_model), np.float32)
        self.logits = np.zeros((rows, 1, model.config.n_codebooks * model.n_logits), np.float32)
        self.shape = rows, model.config.n_codebooks, model.n_logits
        self.binding = engine.session.io_binding()
        self._bind("codes", self.codes)
        if not self.added.is_empty:
            self._bind("added", self.embedded)
        self._bind("logits", self.logits, is_output=True)
        mixers = [sublayer.inner for block in state.blocks for sublayer in block if sublayer.inner is not None]
        self.buffers = []
        for number, inner in enumerate(mixers):
            past = inner.conv_state.transpose(1, 2).contiguous()  # [B, taps - 1, C]
            ssm = inner.ssm_state.transpose(2, 3).contiguous()  # [B, H, N, P]
            inner.conv_state, inner.ssm_state = past.transpose(1, 2), ssm.transpose(2, 3)
            for name, buffer in ((f"m{number}.conv", past.numpy()), (f"m{number}.ssm", ssm.numpy())):
                self._bind(name, buffer)
                self._bind(f"{name}.next", buffer, is_output=True)
                self.buffers.append(buffer)

    @torch.inference_mode()
    def step(self, codes: Tensor, controls: Controls, index: int) -> Tensor:
        self.codes[:] = codes[self.item_of_row].numpy()
        if not self.added.is_empty:
            self.embedded[:, 0] = self.added.compute(self, controls, index, 1)[0].numpy()
        self.engine.session.run_with_iobinding(self.binding)
        self.state.position += 1
        return torch.from_numpy(self.logits.copy()).view(self.shape)

    def _bind(self, name: str, array: np.ndarray, is_output: bool = False) -> None:
        """The binding holds the address only."""
        bind = self.binding.bind_output if is_output else self.binding.bind_input
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


class StepGraph:
    """The graph of a step: codes [B, K], added embeddings [B, 1, D] where the model has them, and the states -> logits
    [B, 1, K V'] and the states behind."""

    def __init__(self, model: TokenLM, weights: str) -> None:
        self.model, self.is_int8 = model, weights == "int8"
        self.weights: dict[str, np.ndarray] = {}  # handed to the session apart
        self.states: dict[str, tuple[int, ...]] = {}  # shapes behind the batch
        self.n_bytes = 0
        self._nodes: list[NodeProto] = []
        self._constants: list[TensorProto] = []
        self._has_added = not AddedEmbeddings(model).is_empty
        self._trace()

    def build(self) -> bytes:
        """The serialised model."""
        c = self.model.config
        inputs = [helper.make_tensor_value_info("codes", TensorProto.INT64, ["B", c.n_codebooks])]
        if self._has_added:
            inputs.append(helper.make_tensor_value_info("added", TensorProto.FLOAT, ["B", 1, c.d_model]))
        n_logits = c.n_codebooks * self.model.n_logits
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", 1, n_logits])]
        for name, shape in self.states.items():
            inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", *shape]))
            outputs.append(helper.make_tensor_value_info(f"{name}.next", TensorProto.FLOAT, ["B", *shape]))
        constants = [*self._constants, *(_declaration(*weight) for weight in self.weights.items())]
        graph = helper.make_graph(self._nodes, "step", inputs, outputs, constants)
        return helper.make_model(graph, opset_imports=OPSET, ir_version=11).SerializeToString()

    def _trace(self) -> None:
        model = self.model
        rows = self._node("Add", "codes", self._constant(model.offsets, np.int64))[0]
        x = self._node("Gather", self._constant(model.embedding.weight), rows)[0]  # [B, K, D]
        x = self._node("ReduceSum", x, self._constant([1], np.int64), keepdims=1)[0]  # [B, 1, D]
        if self._has_added:
            x = self._node("Add", x, "added")[0]
        sublayers = [sublayer for block in model.blocks for sublayer in block.sublayers]
        n_mixers = 0
        for sublayer in sublayers:
            h = self._norm(x, sublayer.norm)
            if isinstance(sublayer.inner, Mamba2):
                y = self._mamba2(h, sublayer.inner, f"m{n_mixers}")
                n_mixers += 1
            else:
                y = self._mlp(h, sublayer.inner)
            if sublayer.layer_scale is not None:
                y = self._node("Mul", y, self._constant(sublayer.layer_scale))[0]
            x = self._node("Add", x, y)[0]
        if isinstance(model.norm, nn.RMSNorm):
            x = self._norm(x, model.norm)
        self._node("Identity", self._linear(x, model.heads), outputs=["logits"])

    def _norm(self, x: str, norm: nn.RMSNorm | GatedRMSNorm) -> str:
        return self._node("RMSNormalization", x, self._constant(norm.weight), axis=-1, epsilon=1e-5)[0]

    def _mlp(self, h: str, mlp: MLP) -> str:
        h = self._node("Gelu", self._linear(h, mlp.fc1))[0]
        return self._linear(h, mlp.fc2)

    def _mamba2(self, h: str, m: Mamba2, name: str) -> str:
        """[B, 1, D] -> [B, 1, D]. LinearAttention's query is C, its key B, its value dt x and its decay dt A."""
        heads, width, n = m.nheads, m.headdim, m.d_state
        self.states |= {f"{name}.conv": (m.d_conv - 1, m.conv_dim), f"{name}.ssm": (heads, n, width)}
        sizes = self._constant([m.d_inner, m.conv_dim, heads], np.int64)
        z, xbc, a = self._node("Split", self._linear(h, m.in_proj), sizes, outputs=3, axis=-1)
        bias = m.conv1d.bias if m.conv1d.bias is not None else torch.zeros(m.conv_dim)
        inputs = xbc, self._constant(m.conv1d.weight), self._constant(bias), f"{name}.conv"
        outputs = [f"{name}.y", f"{name}.conv.next"]
        xbc = self._node(
            "CausalConvWithState", *inputs, outputs=outputs, domain=MICROSOFT, activation="silu", channels_last=1
        )[0]
        x, b, c = self._node("Split", xbc, self._constant([m.d_inner, n, n], np.int64), outputs=3, axis=-1)
        A = -m.A_log.detach().exp()
        gate = a, self._constant(m.dt_bias), self._constant(A)
        decay = self._node("LinearAttentionGate", *gate, domain=MICROSOFT)[0]  # dt A, [B, 1, H]
        dt = self._node("Mul", decay, self._constant(1 / A))[0]
        by_head = self._node("Reshape", x, self._constant([0, 0, heads, width], np.int64))[0]
        value = self._node("Mul", by_head, self._node("Unsqueeze", dt, self._constant([-1], np.int64))[0])[0]
        value = self._node("Reshape", value, self._constant([0, 0, m.d_inner], np.int64))[0]
        outputs = [f"{name}.o", f"{name}.ssm.next"]
        y = self._node(
            "LinearAttention", c, b, value, f"{name}.ssm", decay, outputs=outputs, domain=MICROSOFT, q_num_heads=1,
            kv_num_heads=heads, update_rule="gated", scale=1.0,
        )[0]  # fmt: skip
        skip = self._node("Mul", x, self._constant(m.D.detach().repeat_interleave(width)))[0]
        silu = self._node("QuickGelu", z, domain=MICROSOFT, alpha=1.0)[0]
        gated = self._node("Mul", self._node("Add", y, skip)[0], silu)[0]
        return self._linear(self._norm(gated, m.norm), m.out_proj)

    def _linear(self, x: str, layer: nn.Linear) -> str:
        """With its bias. FusedMatMul takes the weight as torch keeps it, [O, I]."""
        weight = layer.weight.detach().numpy()
        if self.is_int8:
            packed, scale = of_rows(layer) if isinstance(layer, Int8Linear) else pack_int8(weight)
            self.n_bytes += packed.nbytes + scale.nbytes
            sizes = {"N": len(weight), "K": weight.shape[1], "bits": 8, "block_size": BLOCK, "accuracy_level": 4}
            y = self._node(
                "MatMulNBits", x, self._constant(packed, np.uint8), self._constant(scale), domain=MICROSOFT, **sizes
            )[0]
        else:
            self.n_bytes += weight.nbytes
            y = self._node("FusedMatMul", x, self._constant(weight), domain=MICROSOFT, transB=1)[0]
        return y if layer.bias is None else self._node("Add", y, self._constant(layer.bias))[0]

    def _constant(self, values: Tensor | np.ndarray | Sequence[int], dtype: type = np.float32) -> str:
        array = values.detach().numpy() if isinstance(values, Tensor) else np.asarray(values)
        name, array = f"w{len(self.weights) + len(self._constants)}", np.ascontiguousarray(array, dtype)
        if array.nbytes < EMBEDDED_BYTES:
            self._constants.append(numpy_helper.from_array(array, name))
        else:
            self.weights[name] = array
        return name

    def _node(
        self, kind: str, *inputs: str, outputs: int | list[str] = 1, domain: str = "", **attributes: Any
    ) -> list[str]:
        names = [f"t{len(self._nodes)}_{i}" for i in range(outputs)] if isinstance(outputs, int) else outputs
        self._nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        return names


def pack_int8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[O, I] -> uint8 [O, I / BLOCK, BLOCK] around ZERO_POINT, and scales [O, I / BLOCK]."""
    blocks = weight.reshape(len(weight), -1, BLOCK)
    scale = np.maximum(np.abs(blocks).max(-1) / (ZERO_POINT - 1), 1e-12).astype(np.float32)
    return np.clip(np.rint(blocks / scale[..., None]) + ZERO_POINT, 0, 255).astype(np.uint8), scale


def of_rows(layer: Int8Linear) -> tuple[np.ndarray, np.ndarray]:
    """The same of a layer that has a scale per row."""
    n_blocks = layer.int8.shape[1] // BLOCK
    packed = (layer.int8.short() + ZERO_POINT).to(torch.uint8).unflatten(1, (n_blocks, BLOCK))
    return packed.numpy(), layer.scale[:, None].repeat(1, n_blocks).numpy()


def _declaration(name: str, array: np.ndarray) -> TensorProto:
    """The declaration of a weight that the session is handed apart."""
    tensor = TensorProto(name=name, data_type=_TYPES[array.dtype], dims=array.shape)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="memory")
    return tensor


def _check(model: TokenLM, weights: str) -> None:
    """Raises Unavailable for a model that StepGraph does not build."""
    c, weight = model.config, model.embedding.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise Unavailable(f"it runs float32 models on a CPU, this one is {weight.dtype} on {weight.device}")
    if weights == "bf16":
        raise Unavailable("it does not read bf16 weights")
    if c.norm != "rms" or c.conditioning != "prefix" or c.ngroups != 1:
        raise Unavailable("its graph has RMSNorm, a text prefix and one group only")
    check_parts(model, {Mamba2, MLP})
    inputs = {module.in_features for module in model.blocks.modules() if isinstance(module, nn.Linear)}
    if weights == "int8" and any(size % BLOCK for size in inputs | {c.d_model}):
        raise Unavailable(f"int8 weights need layers whose width is a multiple of {BLOCK}")
