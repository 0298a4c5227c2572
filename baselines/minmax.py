"""Min-max: every range from the least value to the largest. What quantization costs when nothing is done about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

from torch import Tensor, nn

from iasvit.calibration import (
    calibrate_inputs,
    calibrate_weights,
    calibration_store,
    enabled,
    first_images,
    forward_need,
    images_share,
    nbytes,
    run_all,
    share_of,
)
from iasvit.methods import Calibration
from iasvit.models import Activation, Site, prepare, segments
from iasvit.nn import quant_layers, quantizers_of
from iasvit.options import MemoryBudget, Range, check_fields
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
        memory_budget: see `iasvit.options.MemoryBudget`.
    """

    seed: int = 0
    init_size: Annotated[int, Range(1)] = 32
    memory_budget: MemoryBudget = None

    name: ClassVar[str] = "minmax"

    def __post_init__(self) -> None:
        check_fields(self)

    def images_used(self, calib_size: int) -> int:
        """See `iasvit.methods.Method`; the first `init_size`."""
        return min(self.init_size, calib_size)

    def forwards(self, calib_size: int, detector: bool) -> float:
        """See `iasvit.methods.Method`; two passes."""
        return 2 * self.images_used(calib_size)

    def quantize(self, model: nn.Module, calibration: Calibration, spec: QuantSpec, progress: Progress) -> nn.Module:
        """See `iasvit.methods.Method`."""
        device = next(model.parameters()).device
        first = first_images(calibration, self.init_size, device, images_share(self.memory_budget))
        images = calibration_store(first, device)
        size = images.passes(self.init_size)

        def quantizable() -> nn.Module:
            return prepare(model, spec, self.weight_quantizer, self.activation_quantizer)

        def need(copy: nn.Module, few: Tensor) -> int:
            return forward_need(copy, few, min(size, len(images))) + nbytes(first)

        share = share_of(self.memory_budget, self.name, quantizable, images, need)
        quantized = quantizable()
        with progress.phase("calibration"):
            with enabled(list(quantizers_of(quantized, weights=True)), False):  # ranges are the full-precision model's
                activations: Sequence[Activation] = first.split(size)
                for segment in segments(quantized):
                    run = partial(run_all, segment.run, activations, share)
                    activations = calibrate_inputs(segment.quantizers(weights=False), run, share)
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
