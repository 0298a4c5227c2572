"""iasvit: low-bit post-training quantization of vision transformers, and a benchmark of it.

```python
import iasvit, timm
model = timm.create_model("deit_small_patch16_224", pretrained=True)
quantized = iasvit.quantize(model, calibration_images, "W4A4")
iasvit.save(quantized, "deit_s_w4a4.safetensors")
iasvit.export_onnx(quantized, "deit_s_w4a4.onnx")
```
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("iasvit")

# Name → module; loaded when first used, so that `import iasvit` and `iasvit --help` are quick.
_EXPORTS = {
    "IasvitError": "iasvit.errors",
    "QuantSpec": "iasvit.spec",
    "export_onnx": "iasvit.export.onnx_file",
    "list_methods": "iasvit.methods",
    "load": "iasvit.artifact",
    "quantize": "iasvit.api",
    "save": "iasvit.artifact",
}
__all__ = ["IasvitError", "QuantSpec", "__version__", "export_onnx", "list_methods", "load", "quantize", "save"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'iasvit' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
