"""Admission rules: which of them a quantized model keeps, computed from the model and not from what its method
claims."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from iasvit.nn import QuantLayer, quant_layers, quantizers_of
from iasvit.quantizers import Quantizer
from iasvit.spec import FULL_PRECISION
from iasvit.transforms import transforms_of

PROBES = 2049  # values that a quantizer is asked for, evenly and by their logarithm, on either side of 0
IMAGE = "image"
ATTENTION_MAP = "matmul_av.left_quantizer"


@dataclass(frozen=True)
class Admission:
    """What of the rules a quantized model keeps.

    Attributes:
        n_bits, codes: of the quantizer that has most values beyond its 2^b codes, or else most values: its bits, and
            how many different values it gives (of a channel, where it has parameters for each).
        integer_zero_points: whether every zero-point is a whole number.
        static: whether what becomes of a value never depends on the others that stand beside it.
        granularity: of activations: "tensor", "channel" or "token", the finest there is.
        weight_granularity: of weights: "tensor", "group" or "row".
        floats: operands that no quantizer touches: "image", and how many weights and activations.
        transforms: (name, whether it is exact) of what was done to the network before.
    """

    n_bits: int
    codes: int
    integer_zero_points: bool
    static: bool
    granularity: str
    weight_granularity: str
    floats: tuple[str, ...]
    transforms: tuple[tuple[str, bool], ...]

    @property
    def violations(self) -> list[str]:
        """What breaks the common rule, each in a few words. A changed network is not among them; the row says so
        itself."""
        found = []
        if self.codes > 2**self.n_bits:
            found.append(f"{self.codes} values at {self.n_bits} bits")
        if not self.integer_zero_points:
            found.append("fractional zero-points")
        if not self.static:
            found.append("dynamic parameters")
        if self.granularity != "tensor":
            found.append(f"activations per {self.granularity}")
        found += [f"{text} in float" for text in self.floats if text != IMAGE]
        return found

    def __str__(self) -> str:
        """One line: "8 codes at 3 bits; integer zero-points; static; …"."""
        changed = [name for name, exact in self.transforms if not exact]
        exact = [name for name, exact in self.transforms if exact]
        network = f"network changed by {', '.join(changed)}" if changed else "network unchanged"
        parts = [
            f"{self.codes} codes at {self.n_bits} bits",
            "integer zero-points" if self.integer_zero_points else "fractional zero-points",
            "static" if self.static else "dynamic",
            f"activations per {self.granularity}",
            f"weights per {self.weight_granularity}",
            f"float: {', '.join(self.floats) or 'nothing'}",
            network + (f" ({', '.join(exact)} exact)" if exact else ""),
        ]
        return "; ".join(parts)


@torch.no_grad()
def admission(model: nn.Module) -> Admission:
    """Compute the rules that a quantized model keeps, by asking each quantizer for its output on a range of values."""
    layers = quant_layers(model)
    activations = list(quantizers_of(model, weights=False))
    on = {quantizer: _probes(name, quantizer) for name, quantizer in activations if _works(quantizer)}
    weights = [layer for _, layer in layers if _works(layer.weight_quantizer)]
    counts = [
        (quantizer.n_bits, _different(quantizer(probes).reshape(len(probes), -1).T)) for quantizer, probes in on.items()
    ]
    counts += [(w.weight_quantizer.n_bits, _different(w.weight_quantizer(w.weight).flatten(1))) for w in weights]
    n_bits, codes = max(counts, key=lambda pair: (pair[1] - 2 ** pair[0], pair[1]), default=(FULL_PRECISION, 0))
    made = transforms_of(model)
    stored = getattr(getattr(model, "quantization", None), "transforms", ())
    steps = stored if made is None else [asdict(step) for step in made.steps]
    return Admission(
        n_bits,
        codes,
        all(map(_whole, [*on, *(layer.weight_quantizer for layer in weights)])),
        all(_static(quantizer, probes) for quantizer, probes in on.items()),
        max(map(_granularity, on), key=("tensor", "channel", "token").index, default="tensor"),
        max(map(_granularity_of_weight, weights), key=("tensor", "group", "row").index, default="tensor"),
        _floats(model, layers, [quantizer for _, quantizer in activations]),
        tuple((str(step["name"]), bool(step["exact"])) for step in steps),
    )


def _works(quantizer: Quantizer) -> bool:
    return quantizer.enabled and quantizer.calibrated


def _floats(model: nn.Module, layers: list[tuple[str, QuantLayer]], activations: list[Quantizer]) -> tuple[str, ...]:
    found = [IMAGE] if any(layer.input_quantizer is None for _, layer in layers) else []
    left = sum(isinstance(m, (nn.Linear, nn.Conv2d)) and not isinstance(m, QuantLayer) for m in model.modules())
    numbers = {
        "weights": left + sum(not layer.weight_quantizer.enabled for _, layer in layers),
        "activations": left + sum(not quantizer.enabled for quantizer in activations),
    }
    return (*found, *(f"{count} {what}" for what, count in numbers.items() if count))


def _parameter(quantizer: Quantizer) -> Tensor:
    """The largest of the quantizer's parameters."""
    return max((getattr(quantizer, name) for name in quantizer.parameters_), key=torch.numel)


def _probes(name: str, quantizer: Quantizer) -> Tensor:
    """Values to ask for, from far below to far above the range: (n, *shape of the largest parameter).

    An attention map holds none below 0.
    """
    shape = _parameter(quantizer).shape + (1,) * (getattr(quantizer, "channel_dim", None) == -2)
    codes = torch.arange(quantizer.n_levels, dtype=torch.uint8, device=_parameter(quantizer).device)
    ends = quantizer.decode(codes.view(-1, *[1] * len(shape)).expand(-1, *shape)).abs().amax().clamp_min(1e-6)
    values = torch.cat([torch.linspace(0, 1.5, PROBES), torch.logspace(-7, 0.5, PROBES)]).to(ends.device) * ends
    if not name.endswith(ATTENTION_MAP):
        values = torch.cat([-values, values])
    return values.view(-1, *[1] * len(shape)).repeat(1, *shape)


def _different(values: Tensor) -> int:
    """The most different values in a row; NaN counts for nothing."""
    ordered = values.sort(dim=1).values
    return int((ordered[:, 1:] > ordered[:, :-1]).sum(dim=1).max()) + 1


def _whole(quantizer: Quantizer) -> bool:
    return bool((torch.as_tensor(getattr(quantizer, "zero_point", 0)).double() % 1 == 0).all())


def _static(quantizer: Quantizer, probes: Tensor) -> bool:
    """Whether values give the same output when values ten times as large are in the same tensor."""
    return torch.equal(quantizer(torch.cat([probes, 10 * probes]))[: len(probes)], quantizer(probes))


def _granularity(quantizer: Quantizer) -> str:
    parameter = _parameter(quantizer)
    if parameter.numel() == 1:
        return "tensor"
    by_row = parameter.ndim > 1 and parameter.shape[-1] == 1
    return "token" if by_row or getattr(quantizer, "channel_dim", None) == -2 else "channel"


def _granularity_of_weight(layer: QuantLayer) -> str:
    """By how many different scales there are; a group's is stored for each of its rows."""
    count = len(_parameter(layer.weight_quantizer).reshape(-1).unique())
    return "tensor" if count == 1 else "row" if 2 * count > len(layer.weight) else "group"
