"""optimum-quanto: Linear and Conv2d layers with integer weights and activations, in PyTorch."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from iasvit.export.extras import imported
from iasvit.export.floats import first_batches, require_bits
from iasvit.methods import Calibration
from iasvit.options import Range, check_fields
from iasvit.progress import Progress
from iasvit.spec import QuantSpec


@dataclass
class Quanto:
    """Weights of 8, 4 or 2 bits and activations of 8, as quanto has them; products of attention stay in float.

    Extra: `runtimes`.

    Options:
        seed: every method has one; nothing is drawn here.
        init_size: calibration images used.
    """

    seed: int = 0
    init_size: Annotated[int, Range(1)] = 32

    name: ClassVar[str] = "quanto"

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
            IasvitError: bits that quanto has not, or the extra is missing.
        """
        require_bits(spec, ("W8A8", "W4A8", "W2A8"), self.name)
        quanto = imported("optimum.quanto", "runtimes")
        device = next(model.parameters()).device
        quantized = copy.deepcopy(model).eval()
        with progress.phase("calibration"), torch.no_grad():
            quanto.quantize(quantized, weights=getattr(quanto, f"qint{spec.w_bits}"), activations=quanto.qint8)
            with quanto.Calibration():
                for image in first_batches(calibration, self.init_size):
                    quantized(image.to(device))
            quanto.freeze(quantized)
        return _OutsideInference(quantized)


class _OutsideInference(nn.Module):
    """A model that is computed as under torch.no_grad: quanto's packed weights fail under torch.inference_mode."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            outputs: Tensor = self.model(images.clone())  # which is no tensor of inference mode
        return outputs
