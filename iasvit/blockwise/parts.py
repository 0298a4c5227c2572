"""What stands in a quantizer's place while a block is learnt: learnt rounding, learnt scales, QDrop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from iasvit.errors import IasvitError
from iasvit.models import Segment
from iasvit.nn import QuantLayer, QuantMatMul
from iasvit.quantizers import Quantizer, UniformQuantizer

GAMMA, ZETA = -0.1, 1.1  # ends of the stretched sigmoid
SMALLEST_SCALE = 1e-8


def rounded(x: Tensor) -> Tensor:
    """round(x), with the gradient of x. Exact: round(x) - x is, by Sterbenz's lemma, and so is the sum."""
    return x + (x.round() - x).detach()


def clamped(x: Tensor, low: float, high: float) -> Tensor:
    """clamp(x, low, high), of x's shape and type, with a gradient of 1 at the ends too.

    Codes lie on the ends, and there torch.clamp has no gradient from torch 2.15 on.
    """
    return torch.where((x < low) | (x > high), x.detach().clamp(low, high), x)


class AdaRound(nn.Module):
    """A weight whose rounding, down or up, is learnt (AdaRound, arXiv:2004.10568, eq. 22 to 24).

    Ŵ = s·(clamp(⌊W / s⌋ + h(α) + z, 0, 2^b - 1) - z), h(α) = clamp(σ(α)(ζ - γ) + γ, 0, 1), and α begins where h(α) is
    what ⌊⌋ cuts off, so that Ŵ is W, clipped to the quantizer's range.

    Args:
        quantizer: calibrated; its scale and zero-point stay.
        weight: as it is before.

    Attributes:
        alpha: α, of the weight's shape.
    """

    enabled = True

    def __init__(self, quantizer: UniformQuantizer, weight: Tensor) -> None:
        super().__init__()
        scale, zero_point = quantizer._shaped(weight.ndim)
        self.most = quantizer.n_levels - 1
        steps = weight.detach() / scale
        self.register_buffer("scale", scale.clone(), persistent=False)
        self.register_buffer("zero_point", zero_point.clone(), persistent=False)
        self.register_buffer("floor", steps.floor(), persistent=False)
        part = (steps - self.floor).clamp(0.0, 1.0)
        self.alpha = nn.Parameter(-torch.log((ZETA - GAMMA) / (part - GAMMA) - 1))

    def up(self) -> Tensor:
        """h(α), in [0, 1]."""
        return clamped(torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, softly rounded."""
        return self._values(self.up())

    def _values(self, up: Tensor) -> Tensor:
        codes = clamped(self.floor + up + self.zero_point, 0, self.most)
        return (codes - self.zero_point) * self.scale

    def regulariser(self, beta: Tensor | float) -> Tensor:
        """Σ 1 - |2h(α) - 1|^β: 0 where all is rounded."""
        return (1 - (2 * self.up() - 1).abs().clamp_min(1e-12).pow(beta)).sum()

    @torch.no_grad()
    def hard(self) -> Tensor:
        """The weight, rounded: values of codes."""
        return self._values((self.alpha >= 0).to(self.alpha.dtype))


class LearntScale(nn.Module):
    """A uniform quantizer whose scale is learnt by LSQ's gradient (arXiv:1902.08153, eq. 3); its zero-point stays.

    x̂ = s·(clamp(round(x / s) + z, 0, 2^b - 1) - z), the gradient passing through round: to s it is x̂/s - x/s where x is
    not clamped, and the end of the grid, -z or 2^b - 1 - z, where it is.

    Args:
        quantizer: calibrated.
        relative: learn the ratio to the first scale, so that a learning rate means the same for every quantizer.
    """

    enabled = True

    def __init__(self, quantizer: UniformQuantizer, relative: bool = False) -> None:
        super().__init__()
        self.channel_dim, self.most = quantizer.channel_dim, quantizer.n_levels - 1
        self.register_buffer("zero_point", quantizer.zero_point.float(), persistent=False)
        unit = quantizer.scale.clone() if relative else torch.ones_like(quantizer.scale)
        self.register_buffer("unit", unit, persistent=False)
        self.factor = nn.Parameter(quantizer.scale / unit)

    def scale(self) -> Tensor:
        """s, of the quantizer's shape, above 0; a step that goes below it can be taken back, as the gradient stays."""
        scale = self.factor * self.unit
        return scale + (scale.clamp_min(SMALLEST_SCALE) - scale).detach()

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized x, float32."""
        x = x.float() if x.dtype.itemsize < 4 else x
        scale, zero_point = self.scale(), self.zero_point
        if self.channel_dim is not None:
            shape = [1] * x.ndim
            shape[self.channel_dim] = -1
            scale, zero_point = scale.view(shape), zero_point.view(shape)
        codes = clamped(rounded(x / scale) + zero_point, 0, self.most)
        return (codes - zero_point) * scale


class Dropped(nn.Module):
    """A quantizer that leaves each element alone with probability p while a block is learnt (QDrop, arXiv:2203.05740).

    Args:
        quantizer: what quantizes the others.
        p: of leaving an element in full precision.
    """

    enabled = True

    def __init__(self, quantizer: nn.Module, p: float) -> None:
        super().__init__()
        self.quantizer, self.p = quantizer, p
        self.active = True

    def forward(self, x: Tensor) -> Tensor:
        """x with some elements quantized."""
        values = self.quantizer(x)
        if not self.active:
            return values
        return torch.where(torch.rand_like(x, dtype=torch.float32) < self.p, x.to(values.dtype), values)


@dataclass
class Learnt:
    """What is learnt of a segment.

    Attributes:
        roundings: layer → its AdaRound.
        scales: activation quantizer → its learnt scale.
        weight_scales: the same of weight quantizers.
        drops: of the activations.
    """

    roundings: dict[QuantLayer, AdaRound] = field(default_factory=dict)
    scales: dict[UniformQuantizer, LearntScale] = field(default_factory=dict)
    weight_scales: dict[UniformQuantizer, LearntScale] = field(default_factory=dict)
    drops: list[Dropped] = field(default_factory=list)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Quantize every element for a while: what the block will compute."""
        for drop in self.drops:
            drop.active = False
        try:
            yield
        finally:
            for drop in self.drops:
                drop.active = True

    @torch.no_grad()
    def finish(self) -> None:
        """Give the quantizers their scales and the layers their rounded weights."""
        for quantizer, learnt in (*self.scales.items(), *self.weight_scales.items()):
            quantizer.set_parameters(learnt.scale(), learnt.zero_point)
        for layer, rounding in self.roundings.items():
            layer.weight.copy_(rounding.hard())


@contextmanager
def learning(
    segment: Segment,
    *,
    adaround: bool,
    scales: bool = True,
    weight_scales: bool = False,
    relative: bool = False,
    drop: float = 0.0,
) -> Iterator[Learnt]:
    """Put learnt parts in the place of a segment's quantizers for a while.

    Args:
        segment: of a quantizable model, all its quantizers calibrated.
        adaround: learn the rounding; else the weights themselves stay and their quantizers pass the gradient through.
        scales: learn the scales of activations. Quantizers that are not uniform have none that could be learnt.
        weight_scales: learn the weights' scales too, where their rounding is not.
        relative: see `LearntScale`.
        drop: probability of leaving an element of an activation alone.

    Raises:
        IasvitError: a weight's quantizer is not uniform.
    """
    learnt, before = Learnt(), []
    for layer in segment.layers():
        quantizer = layer.weight_quantizer
        if not isinstance(quantizer, UniformQuantizer):
            raise IasvitError(
                f"a weight has a {type(quantizer).__name__}, but rounding is learnt for uniform ones only"
            )
        new: nn.Module = quantizer
        if not quantizer.enabled:
            continue
        if adaround:
            new = learnt.roundings[layer] = AdaRound(quantizer, layer.weight)
        elif weight_scales:
            new = learnt.weight_scales[quantizer] = LearntScale(quantizer, relative)
        before.append((layer, "weight_quantizer", quantizer, new))
    for module, name, quantizer in _activation_quantizers(segment):
        if not quantizer.enabled:
            continue
        new = quantizer
        if scales and isinstance(quantizer, UniformQuantizer):
            new = learnt.scales[quantizer] = LearntScale(quantizer, relative)
        if drop > 0:
            new = Dropped(new, drop)
            learnt.drops.append(new)
        before.append((module, name, quantizer, new))
    try:
        for module, name, _, new in before:
            setattr(module, name, new)
        yield learnt
    finally:
        for module, name, quantizer, _ in before:
            setattr(module, name, quantizer)


def _activation_quantizers(segment: Segment) -> Iterator[tuple[nn.Module, str, Quantizer]]:
    """(module that holds it, attribute, quantizer); attention's products may be held twice, and come once."""
    names: Sequence[str] = ("input_quantizer", "left_quantizer", "right_quantizer")
    seen: set[nn.Module] = set()
    for _, root in segment.modules:
        for module in root.modules():
            if isinstance(module, QuantLayer | QuantMatMul) and module not in seen:
                seen.add(module)
                for name in names:
                    quantizer = getattr(module, name, None)
                    if isinstance(quantizer, Quantizer):
                        yield module, name, quantizer
