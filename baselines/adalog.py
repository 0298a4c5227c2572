"""AdaLog: logarithmic quantizers of a searched base after softmax and GELU (arXiv:2407.12951, ECCV 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from iasvit.blockwise import BlockReconstruction, Settings
from iasvit.blockwise.initialise import fold, observed
from iasvit.calibration import (
    ActivationStore,
    calibrate_weights,
    calibration_store,
    enabled,
    forward_need,
    images_share,
    share_of,
)
from iasvit.calibration.observe import watching
from iasvit.calibration.progressive import sample, search_linear, search_product
from iasvit.methods import Calibration
from iasvit.models import Segment, Site, prepare, segments
from iasvit.nn import QuantLinear, QuantMatMul, quant_layers, quantizers_of
from iasvit.options import MemoryBudget, Range, check_fields
from iasvit.progress import Progress
from iasvit.quantizers import WEIGHT_PERCENTILES, AdaLogQuantizer, Quantizer, ShiftedAdaLogQuantizer, UniformQuantizer
from iasvit.spec import QuantSpec

ROWS = 2048  # tokens that a Linear's quantizers are searched on
MAPS = 4  # images that a product's are searched on


@dataclass
class AdaLog:
    """AdaLog (arXiv:2407.12951), calibrated only: logarithmic quantizers with searched bases; no gradient.

    1. Activation quantizers choose ranges on the full-precision model's activations, post-LayerNorm ones per channel.
    2. Each LayerNorm→Linear pair is reparameterized to one scale and integer zero-point per tensor.
    3. Both operands of each Linear and each product are searched in turn, from coarse to fine, by the squared error of
       the output (`iasvit.calibration.progressive`), on full-precision inputs. After softmax and after GELU the base of
       the logarithm is searched too; GELU's outputs are shifted by its minimum to be positive.

    A code beyond the last is not set to zero as in the public code, where that makes 2^b + 1 levels: the last code is
    the zero. Operands of products have one range per tensor, not one for each head.

    Options:
        rounds: how often the two operands of a layer are searched in turn.
        steps: refinements of each search.
        seed: every method has one; nothing is drawn here.
        init_size: calibration images used.
        memory_budget: see `iasvit.options.MemoryBudget`.
    """

    rounds: Annotated[int, Range(1)] = 3
    steps: Annotated[int, Range(0, 16)] = 4
    seed: int = 0
    init_size: Annotated[int, Range(1)] = 32
    memory_budget: MemoryBudget = None

    name: ClassVar[str] = "adalog"
    reference: ClassVar[str] = "arXiv:2407.12951"
    published: ClassVar[str] = "W3A3, W4A4, W6A6 on ViT, DeiT, Swin, calibrated and retrained, with 2^b + 1 codes"
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_fields(self)

    def images_used(self, calib_size: int) -> int:
        """See `iasvit.methods.Method`; the first `init_size`."""
        return min(self.init_size, calib_size)

    def forwards(self, calib_size: int, detector: bool) -> float:
        """See `iasvit.methods.Method`; two passes, and the searches, measured."""
        return 2 * self.images_used(calib_size) + self.rounds * (16 + 32 * self.steps) * 45

    @torch.no_grad()
    def quantize(self, model: nn.Module, calibration: Calibration, spec: QuantSpec, progress: Progress) -> nn.Module:
        """See `iasvit.methods.Method`."""
        device = next(model.parameters()).device
        images = calibration_store(calibration, device, images_share(self.memory_budget), self.init_size)
        size = images.passes(self.init_size)

        def quantizable() -> nn.Module:
            return prepare(model, spec, self.weight_quantizer, self.activation_quantizer)

        def need(copy: nn.Module, few: Tensor) -> int:
            return 3 * forward_need(copy, few, min(size, len(images)))

        share = share_of(self.memory_budget, self.name, quantizable, images, need)
        quantized = quantizable()
        with progress.phase("calibration"):
            observe(quantized, images, self.init_size, share)
        chain = segments(quantized)
        with progress.phase("search", len(chain)) as bar:
            for _ in searched(quantized, images, size, self.rounds, self.steps):
                bar.update()
        for _, layer in quant_layers(quantized):
            layer.round_weight()
        return quantized

    def weight_quantizer(self, site: Site) -> Quantizer:
        """Uniform, one scale and zero-point per output channel."""
        return UniformQuantizer(site.n_bits, channel_dim=0, percentiles=WEIGHT_PERCENTILES)

    def activation_quantizer(self, site: Site) -> Quantizer:
        """See `activation_quantizer`."""
        return activation_quantizer(site)


@dataclass
class AdaLogRetrained(BlockReconstruction):
    """AdaLog (arXiv:2407.12951), retrained: `adalog`, then block reconstruction.

    The rounding of weights and the scales of uniform quantizers are learnt by the squared error of the block's output,
    on inputs of the full-precision model; the bases and scales of the logarithmic ones stay as they were found.

    Options: see `BlockReconstruction`; `initialisation` and `softmax` count for nothing here.
        rounds, steps: see `AdaLog`.
    """

    drop: Annotated[float, Range(0, 1)] = 0.0
    init_size: Annotated[int, Range(1)] = 32
    rounds: Annotated[int, Range(1)] = 3
    steps: Annotated[int, Range(0, 16)] = 4

    name: ClassVar[str] = "adalog_retrained"
    reference: ClassVar[str] = "arXiv:2407.12951"
    published: ClassVar[str] = "W3A3, W4A4, W6A6 on ViT, DeiT, Swin, with 2^b + 1 codes"

    def settings(self) -> Settings:
        """See `BlockReconstruction`."""
        return replace(super().settings(), full_inputs=True)

    def initialise(self, quantized: nn.Module, images: ActivationStore, share: int | None) -> None:
        """See `BlockReconstruction`."""
        size = images.passes(self.init_size)
        some = calibration_store(images.batches(size, limit=self.init_size), images.device, share)
        observe(quantized, some, self.init_size, share)
        for _ in searched(quantized, some, size, self.rounds, self.steps):
            pass

    def activation_quantizer(self, site: Site) -> Quantizer:
        """See `activation_quantizer`."""
        return activation_quantizer(site)


def activation_quantizer(site: Site) -> Quantizer:
    """Adaptive base after softmax and GELU, per channel after LayerNorm (until it is folded), per tensor elsewhere."""
    if site.role == "softmax":
        return AdaLogQuantizer(site.n_bits)
    if site.role == "gelu":
        return ShiftedAdaLogQuantizer(site.n_bits)
    return UniformQuantizer(site.n_bits, channel_dim=-1 if site.role == "norm" else None)


def observe(quantized: nn.Module, images: ActivationStore, size: int, share: int | None) -> None:
    """Steps 1 and 2 of `AdaLog` on the first `size` images, and weights' ranges of least error."""
    observed(quantized, images, size, share)
    fold(quantized)
    calibrate_weights(quant_layers(quantized))


def searched(
    quantized: nn.Module, images: ActivationStore, batch_size: int, rounds: int, steps: int
) -> Iterator[Segment]:
    """Step 3 of `AdaLog`: the segments in order, each when it is searched."""
    quantizers = [pair for weights in (True, False) for pair in quantizers_of(quantized, weights=weights)]
    for segment in segments(quantized):
        with torch.no_grad(), enabled(quantizers, False):
            images = _search(segment, images, batch_size, rounds, steps)
        yield segment


def _search(segment: Segment, inputs: Any, batch_size: int, rounds: int, steps: int) -> Any:
    """Set the segment's quantizers; what it outputs in full precision."""
    modules = [module for _, root in segment.modules for module in root.modules()]
    seen: dict[nn.Module, list[tuple[Tensor, ...]]] = {
        module: [] for module in modules if isinstance(module, (QuantLinear, QuantMatMul)) and segment.reconstruct
    }
    with watching(seen, lambda module, args: seen[module].append(args)):
        outputs = inputs.map(segment.run, batch_size, segment.name)
    for module, calls in seen.items():
        if isinstance(module, QuantLinear) and calls:
            search_linear(module, sample([x for (x,) in calls], ROWS), rounds, steps)
        elif calls:
            left, right = calls[0]
            images = len(left) if left.ndim < 4 else min(len(left), MAPS)
            search_product(module, left[:images], right[:images], rounds, steps)
    return outputs
