"""A quantized model as an ONNX file that runtimes execute on integers."""

from iasvit.export.onnx_file import export_onnx
from iasvit.export.runtime import BACKENDS, ExportedModel, check_backend, exported_twin

__all__ = ["BACKENDS", "ExportedModel", "check_backend", "export_onnx", "exported_twin"]
