"""Trained models in other forms: model folders, int8 weights, ONNX graphs, other projects' checkpoints."""
