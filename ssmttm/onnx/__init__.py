"""A trained model as ONNX graphs, for programs that have no torch."""

from ssmttm.onnx.export import export_onnx

__all__ = ["export_onnx"]
