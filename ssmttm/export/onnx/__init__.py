"""Trained models as ONNX graphs, for programs without torch."""

from ssmttm.export.onnx.write import export_onnx

__all__ = ["export_onnx"]
