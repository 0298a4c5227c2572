"""A quantized model as an ONNX file that runtimes execute on integers."""

from iasvit.export.onnx_file import export_onnx
from iasvit.export.runtime import BACKENDS, ExportedModel

__all__ = ["BACKENDS", "ExportedModel", "export_onnx"]
