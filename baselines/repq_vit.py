"""RepQ-ViT: log-sqrt2 after softmax, and per-channel quantizers after LayerNorm that become per tensor afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from iasvit.calibration import (
    calibrate_in_stream,
    calibrate_weights,
    calibration_store,
    forward_need,
    images_share,
    run_all,
    share_of,
)
from iasvit.methods import Calibration
from iasvit.models import Site, find_pairs, prepare
from iasvit.nn import quant_layers
from iasvit.options import MemoryBudget, Range, check_fields
from iasvit.progress import Progress
from iasvit.quantizers import WEIGHT_PERCENTILES, Log2Quantizer, Quantizer, UniformQuantizer
from iasvit.reparam import reparameterize
from iasvit.spec import QuantSpec


@dataclass
class RepQViT:
    """RepQ-ViT (arXiv:2212.08254): scales per channel after LayerNorm, folded per tensor; log-sqrt2 after softmax.

    No gradient, no search beyond each quantizer's own range.

    1. Quantize the weights, one scale and zero-point per output channel.
    2. Calibrate the activation quantizers in the order of the forward, in one pass over `init_size` images, each on
       what quantized weights and the quantizers before it have made of the activations, as in the public code:
       post-LayerNorm ones per channel, post-softmax ones log-sqrt2, the others per tensor.
    3. Reparameterize each LayerNorm→Linear pair to one scale and zero-point per tensor. This changes the Linear's
       weight, so its quantizer is calibrated again, and what the quantized weight loses is not made up for (I&S-ViT
       reparameterizes before it quantizes weights).

    Options:
        seed: every method has one; nothing is drawn here.
        init_size: calibration images used.
        memory_budget: see `iasvit.options.MemoryBudget`.
    """

    seed: int = 0
    init_size: Annotated[int, Range(1)] = 32
    memory_budget: MemoryBudget = None

    name: ClassVar[str] = "repq_vit"
    reference: ClassVar[str] = "arXiv:2212.08254"
    published: ClassVar[str] = "W4A4, W6A6 by its authors, with 2^b + 1 codes and fractional zero-points; COCO"
    version: ClassVar[int] = 2
    changelog: ClassVar[dict[int, str]] = {
        2: "detectors: images keep their sizes, and a head's quantizers see all feature levels while ranges are chosen"
    }

    def __post_init__(self) -> None:
        check_fields(self)

    def images_used(self, calib_size: int) -> int:
        """See `iasvit.methods.Method`; the first `init_size`."""
        return min(self.init_size, calib_size)

    def forwards(self, calib_size: int, detector: bool) -> float:
        """See `iasvit.methods.Method`; measured."""
        return 30 * self.images_used(calib_size)

    @torch.no_grad()
    def quantize(self, model: nn.Module, calibration: Calibration, spec: QuantSpec, progress: Progress) -> nn.Module:
        """See `iasvit.methods.Method`."""
        device = next(model.parameters()).device
        images = calibration_store(calibration, device, images_share(self.memory_budget), self.init_size)
        size = images.passes(self.init_size)

        def quantizable() -> nn.Module:
            return prepare(model, spec, self.weight_quantizer, self.activation_quantizer)

        def need(copy: nn.Module, few: Tensor) -> int:
            return forward_need(copy, few, min(size, len(images)))

        share = share_of(self.memory_budget, self.name, quantizable, images, need)
        quantized = quantizable()
        with progress.phase("calibration"):
            calibrate_weights(quant_layers(quantized))
            calibrate_in_stream(quantized, run_all(lambda batch: batch, images.batches(size), share), share)
        with progress.phase("reparameterization"):
            for pair in find_pairs(quantized):
                reparameterize(pair)
                for linear in pair.linears:
                    linear.calibrate_weight()
        for _, layer in quant_layers(quantized):
            layer.round_weight()
        return quantized

    def weight_quantizer(self, site: Site) -> Quantizer:
        """Uniform, one scale and zero-point per output channel."""
        return UniformQuantizer(site.n_bits, channel_dim=0, percentiles=WEIGHT_PERCENTILES)

    def activation_quantizer(self, site: Site) -> Quantizer:
        """Log-sqrt2 after softmax, per channel after LayerNorm (until step 3), per tensor elsewhere."""
        if site.role == "softmax":
            return Log2Quantizer(site.n_bits, steps_per_octave=2)
        return UniformQuantizer(site.n_bits, channel_dim=-1 if site.role == "norm" else None)
