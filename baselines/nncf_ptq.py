"""NNCF, OpenVINO's own post-training quantization, with its settings for transformers."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from torch import nn

from iasvit.export.extras import imported
from iasvit.export.floats import first_batches, model_of_file, require_bits, write_float
from iasvit.methods import Calibration
from iasvit.options import Range, check_fields
from iasvit.progress import Progress
from iasvit.spec import QuantSpec


@dataclass
class NNCF:
    """8 bits, with SmoothQuant and fast bias correction, as NNCF does it when told that the model is a transformer.

    The model that comes of it is computed by OpenVINO. Extra: `runtimes`.

    Options:
        seed: every method has one; nothing is drawn here.
        init_size: calibration images used; NNCF's own default is 300.
    """

    seed: int = 0
    init_size: Annotated[int, Range(1)] = 300

    name: ClassVar[str] = "nncf"

    def __post_init__(self) -> None:
        check_fields(self)

    def images_used(self, calib_size: int) -> int:
        """See `iasvit.methods.Method`; the first `init_size`."""
        return min(self.init_size, calib_size)

    def forwards(self, calib_size: int, detector: bool) -> float:
        """See `iasvit.methods.Method`; two passes."""
        return 2.0 * self.images_used(calib_size)

    def quantize(self, model: nn.Module, calibration: Calibration, spec: QuantSpec, progress: Progress) -> nn.Module:
        """See `iasvit.methods.Method`.

        Raises:
            IasvitError: other bits than W8A8, a detector, or the extra is missing.
        """
        require_bits(spec, ("W8A8",), self.name)
        openvino, nncf = imported("openvino", "runtimes"), imported("nncf", "runtimes")
        logging.getLogger("nncf").setLevel(logging.ERROR)
        images = [image.numpy() for image in first_batches(calibration, self.init_size)]
        with progress.phase("calibration"), tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "float.onnx", Path(folder) / "int8.xml"
            write_float(model, next(first_batches(calibration, 1)), source)
            quantized = nncf.quantize(
                openvino.Core().read_model(str(source)),
                nncf.Dataset(images),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(images),
            )
            openvino.save_model(quantized, str(target), compress_to_fp16=False)
            return model_of_file(target, "openvino")
