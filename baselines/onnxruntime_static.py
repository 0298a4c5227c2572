"""ONNX Runtime's own static quantization, as its documentation advises it for transformers on a CPU."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from torch import nn

from iasvit.errors import IasvitError
from iasvit.export.extras import imported
from iasvit.export.floats import first_batches, model_of_file, require_bits, write_float
from iasvit.methods import Calibration
from iasvit.options import Range, check_fields
from iasvit.progress import Progress
from iasvit.spec import QuantSpec


@dataclass
class OnnxRuntimeStatic:
    """8 bits: MatMul, Gemm and Conv between QuantizeLinear and DequantizeLinear, weights int8 per output channel.

    Activations are uint8 over [min, max]. The model that comes of it is computed by ONNX Runtime. Extra: `runtimes`.

    Options:
        seed: every method has one; nothing is drawn here.
        init_size: calibration images used.
        reduce_range: 7-bit weights, which ONNX Runtime advises for CPUs without VNNI, where 8 bits saturate.
    """

    seed: int = 0
    init_size: Annotated[int, Range(1)] = 32
    reduce_range: bool = True

    name: ClassVar[str] = "onnxruntime_static"

    def __post_init__(self) -> None:
        check_fields(self)

    def images_used(self, calib_size: int) -> int:
        """See `iasvit.methods.Method`; the first `init_size`."""
        return min(self.init_size, calib_size)

    def forwards(self, calib_size: int, detector: bool) -> float:
        """See `iasvit.methods.Method`; one pass."""
        return float(self.images_used(calib_size))

    def quantize(self, model: nn.Module, calibration: Calibration, spec: QuantSpec, progress: Progress) -> nn.Module:
        """See `iasvit.methods.Method`.

        Raises:
            IasvitError: other bits than W8A8, a detector, or the extra is missing.
        """
        require_bits(spec, ("W8A8",), self.name)
        quantization = imported("onnxruntime.quantization", "runtimes")
        images = [image.numpy() for image in first_batches(calibration, self.init_size)]
        if not images:
            raise IasvitError("an empty calibration was given; at least one image is needed")

        class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                self.rest = iter(images)

            def get_next(self) -> Any:
                image = next(self.rest, None)
                return None if image is None else {"images": image}

        with progress.phase("calibration"), tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
            write_float(model, next(first_batches(calibration, 1)), source)
            quantization.quantize_static(
                str(source),
                str(target),
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=["MatMul", "Gemm", "Conv"],
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
                reduce_range=self.reduce_range,
            )
            return model_of_file(target, "onnxruntime")
