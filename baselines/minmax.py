"""Min-max: every range from the least value to the largest. What quantization costs when nothing is done about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import nn

from iasvit.calibration import calibrate_inputs, calibrate_weights, enabled, first_images
from iasvit.methods import Calibration
from iasvit.models import Site, prepare
from iasvit.nn import quant_layers, quantizers_of
from iasvit.options import Range, check_fields
from iasvit.progress import Progress
from iasvit.quantizers import Quantizer, UniformQuantizer
from iasvit.spec import QuantSpec

MIN_MAX = (1.0,)  # the percentile pair (1, 0): the largest value and the least


@dataclass
class MinMax:
    """Uniform quantizers over [min, max]: weights per output channel, activations per tensor on calibration images.

    Ranges are those of the full-precision model: nothing is quantized while they are observed.

    Options:
        seed: every method has one; nothing is drawn here.
        init_size: calibration images used.
    """

    seed: int = 0
    init_size: Annotated[int, Range(1)] = 32

    name: ClassVar[str] = "minmax"

    def __post_init__(self) -> None:
        check_fields(self)

    def images_used(self, calib_size: int) -> int:
        """See `iasvit.methods.Method`; the first `init_size`."""
        return min(self.init_size, calib_size)

    def forwards(self, calib_size: int) -> float:
        """See `iasvit.methods.Method`; two passes."""
        return 2 * self.images_used(calib_size)

    def quantize(self, model: nn.Module, calibration: Calibration, spec: QuantSpec, progress: Progress) -> nn.Module:
        """See `iasvit.methods.Method`."""
        quantized = prepare(model, spec, self.weight_quantizer, self.activation_quantizer)
        images = first_images(calibration, self.init_size, next(model.parameters()).device)
        with progress.phase("calibration"):
            with enabled(list(quantizers_of(quantized, weights=True)), False):  # ranges are the full-precision model's
                calibrate_inputs(list(quantizers_of(quantized, weights=False)), lambda: quantized(images))
            calibrate_weights(quant_layers(quantized))
            for _, layer in quant_layers(quantized):
                layer.round_weight()
        return quantized

    def weight_quantizer(self, site: Site) -> Quantizer:
        """Uniform, one scale and zero-point per output channel."""
        return UniformQuantizer(site.n_bits, channel_dim=0, percentiles=MIN_MAX)

    def activation_quantizer(self, site: Site) -> Quantizer:
        """Uniform, per tensor."""
        return UniformQuantizer(site.n_bits, percentiles=MIN_MAX)
