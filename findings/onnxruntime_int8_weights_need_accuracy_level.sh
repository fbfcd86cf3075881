#!/bin/bash
# onnxruntime's MatMulNBits with 8-bit weights is many times slower without accuracy_level=4, which is not the default.
# A guess would be that 8-bit weights are fast by themselves: without it they are unpacked to float32 at every call.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
"$folder/venv/bin/python" - <<'PYTHON'
import statistics
import sys
import time

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

SIZE, BLOCK, BITS = 2048, 32, 8
rng = np.random.default_rng(0)
packed = rng.integers(0, 256, size=(SIZE, SIZE // BLOCK, BLOCK * BITS // 8), dtype=np.uint8)
scales = np.full(SIZE * SIZE // BLOCK, 1e-3, dtype=np.float32)


def session(**attributes):
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=SIZE, N=SIZE, bits=BITS, block_size=BLOCK,
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, SIZE])],
        [numpy_helper.from_array(packed, "w"), numpy_helper.from_array(scales, "s")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


sessions = {"default": session(), "accuracy_level=4": session(accuracy_level=4)}
x = rng.normal(size=(1, SIZE)).astype(np.float32)
times = {name: [] for name in sessions}
for _ in range(60):  # in turn, so that other load hits both
    for name, model in sessions.items():
        start = time.perf_counter()
        model.run(None, {"x": x})
        times[name].append(time.perf_counter() - start)
medians = {name: statistics.median(values[10:]) for name, values in times.items()}
ratio = medians["default"] / medians["accuracy_level=4"]
print(f"onnxruntime {ort.__version__}, MatMulNBits, {BITS}-bit weights {SIZE} x {SIZE}, block {BLOCK}, one row, one thread")
print(", ".join(f"{name}: {1000 * seconds:.2f} ms" for name, seconds in medians.items()), f"(ratio {ratio:.1f})")
sys.exit(0 if ratio > 1.5 else 1)
PYTHON
