"""RTN: weights rounded to the nearest of their 2^b levels, activations in floating point. What weights alone cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from iasvit.calibration import calibrate_weights
from iasvit.methods import Calibration
from iasvit.models import Site, prepare
from iasvit.nn import quant_layers, quantizers_of
from iasvit.progress import Progress
from iasvit.quantizers import Quantizer, UniformQuantizer
from iasvit.spec import QuantSpec


@dataclass
class RTN:
    """Round to nearest, weights only; no range depends on an activation.

    At "W3A3" a row of this method has 3-bit weights and float32 activations.

    Weights are uniform over [min, max] of each output channel. The activation quantizers are there, of the spec's bits,
    but switched off: what the spec says of activations is not done, which no other method here does.

    Options:
        seed: every method has one; nothing is drawn here.
    """

    seed: int = 0

    name: ClassVar[str] = "rtn"

    def images_used(self, calib_size: int) -> int:
        """See `iasvit.methods.Method`; none."""
        return 0

    def forwards(self, calib_size: int, detector: bool) -> float:
        """See `iasvit.methods.Method`; no image is read."""
        return 0.0

    def quantize(self, model: nn.Module, calibration: Calibration, spec: QuantSpec, progress: Progress) -> nn.Module:
        """See `iasvit.methods.Method`; the calibration images are not used."""
        quantized = prepare(model, spec, self.weight_quantizer, self.activation_quantizer)
        for _, quantizer in quantizers_of(quantized, weights=False):
            quantizer.enabled = False
        with progress.phase("calibration"):
            calibrate_weights(quant_layers(quantized))
            for _, layer in quant_layers(quantized):
                layer.round_weight()
        return quantized

    def weight_quantizer(self, site: Site) -> Quantizer:
        """Uniform, one scale and zero-point per output channel."""
        return UniformQuantizer(site.n_bits, channel_dim=0, percentiles=(1.0,))

    def activation_quantizer(self, site: Site) -> Quantizer:
        """Never enabled."""
        return UniformQuantizer(site.n_bits)
