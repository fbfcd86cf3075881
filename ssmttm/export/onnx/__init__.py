"""A trained model as ONNX graphs, for programs that have no torch."""

from ssmttm.export.onnx.write import export_onnx

__all__ = ["export_onnx"]
