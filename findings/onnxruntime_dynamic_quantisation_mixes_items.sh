#!/bin/bash
# After onnxruntime's quantize_dynamic an item's result depends on the other items of its batch: DynamicQuantizeLinear
# takes one scale for the whole tensor. A guess would be one scale for each row.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic

rng = np.random.default_rng(0)
weight = (rng.normal(size=(256, 256)) / 16).astype(np.float32)
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "w"], ["y"])],
    "linear",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 256])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 256])],
    [numpy_helper.from_array(weight, "w")],
)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "linear.onnx")
quantize_dynamic("linear.onnx", "int8.onnx")
session = ort.InferenceSession("int8.onnx", providers=["CPUExecutionProvider"])
item = rng.normal(size=(1, 256)).astype(np.float32)
print(f"onnxruntime {ort.__version__}, quantize_dynamic of one MatMul: the same row alone and beside another row")
errors = []
exact = (item @ weight)[0]
for gain in (0, 1, 30):
    beside = gain * rng.normal(size=(1, 256)).astype(np.float32)
    y = session.run(None, {"x": np.concatenate([item, beside]) if gain else item})[0][0]
    errors.append(float(np.abs(y - exact).max() / np.abs(exact).max()))
    print(f"{f'beside a row {gain} times as large' if gain else 'alone'}: error {errors[-1]:.1%} of the largest value")
sys.exit(0 if errors[2] > 5 * errors[0] else 1)
PYTHON
