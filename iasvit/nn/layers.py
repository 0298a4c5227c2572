"""Linear, Conv2d and matrix product with quantized operands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iasvit.quantizers import Quantizer


class _Computed(NamedTuple):
    """A quantized weight, and what it was computed from."""

    values: Tensor
    sources: tuple[Tensor, ...]  # weight and the quantizer's buffers; held, so that no other tensor gets their memory
    versions: tuple[int, ...]  # how often torch had changed each in place
    config: dict[str, Any]  # the quantizer's

    def is_of(self, sources: tuple[Tensor, ...], config: dict[str, Any]) -> bool:
        """Whether it would be the same, computed from these."""
        now = [(source.data_ptr(), source._version) for source in sources]
        before = [(source.data_ptr(), version) for source, version in zip(self.sources, self.versions, strict=True)]
        return now == before and self.config == config


class _QuantWeight:
    """What QuantLinear and QuantConv2d share: the quantizers of the weight and of the input (None: not quantized)."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_quantizer: Quantizer
    input_quantizer: Quantizer | None
    _computed: _Computed | None = None

    def add_quantizers(self, weight_quantizer: Quantizer, input_quantizer: Quantizer | None) -> None:
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = input_quantizer

    @torch.no_grad()
    def calibrate_weight(self) -> None:
        """Choose the weight quantizer's parameters for the weight as it is now, and enable it."""
        self.weight_quantizer.calibrate(self.weight)
        self.weight_quantizer.enabled = True

    @torch.no_grad()
    def round_weight(self) -> None:
        """Set the weight to the values of its codes. What `forward` computes stays the same to the bit."""
        self.weight.copy_(self.weight_quantizer.decode(self.weight_quantizer.encode(self.weight)))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if self.bias is None and prefix + "bias" in state_dict:  # gained by reparameterization
            bias = torch.zeros_like(state_dict[prefix + "bias"], device=self.weight.device)
            self.bias = nn.Parameter(bias, requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        return x, self._quantized_weight()

    def _quantized_weight(self) -> Tensor:
        """The values of the weight's codes. Where no gradient is wanted they are computed once, and after a change."""
        weight, quantizer = self.weight, self.weight_quantizer
        if not isinstance(quantizer, Quantizer):  # what stands in its place while something of it is learnt
            return quantizer(weight)
        learning = torch.is_grad_enabled() and weight.requires_grad
        if torch.compiler.is_compiling() or learning or not quantizer.enabled:
            return quantizer(weight)
        sources = (weight, *[getattr(quantizer, name) for name in quantizer.parameters_])
        if any(source.is_inference() for source in sources):  # they have no version
            return quantizer(weight)
        config = quantizer.config()
        if self._computed is None or not self._computed.is_of(sources, config):
            with torch.inference_mode(False), torch.no_grad():  # the values may serve a backward pass later
                values = quantizer(weight)
                if torch.equal(values, weight):  # rounded already: no second copy
                    values = weight.detach()
                held = tuple(source.detach() for source in sources)
            self._computed = _Computed(values, held, tuple(source._version for source in sources), config)
        return self._computed.values


class QuantLinear(_QuantWeight, nn.Linear):
    """nn.Linear, x̂ Ŵᵀ + c: x (..., in_features) → (..., out_features)."""

    @classmethod
    def from_float(
        cls, linear: nn.Linear, weight_quantizer: Quantizer, input_quantizer: Quantizer | None
    ) -> QuantLinear:
        """A quantized layer that takes over the parameters of `linear`."""
        new = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        new.weight, new.bias = linear.weight, linear.bias
        new.add_quantizers(weight_quantizer, input_quantizer)
        return new.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self._operands(x)
        return F.linear(x, weight, self.bias)


class QuantConv2d(_QuantWeight, nn.Conv2d):
    """nn.Conv2d with quantized weight and input: x (B, in_channels, H, W) → (B, out_channels, H', W')."""

    @classmethod
    def from_float(cls, conv: nn.Conv2d, weight_quantizer: Quantizer, input_quantizer: Quantizer | None) -> QuantConv2d:
        """A quantized layer that takes over the parameters of `conv`."""
        new = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device="meta",
        )
        new.weight, new.bias = conv.weight, conv.bias
        new.add_quantizers(weight_quantizer, input_quantizer)
        return new.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self._operands(x)
        return self._conv_forward(x, weight, self.bias)


QuantLayer = QuantLinear | QuantConv2d


class QuantMatMul(nn.Module):
    """Matrix product of two activations, left (..., M, K) and right (..., K, N), each with its quantizer."""

    def __init__(self, left_quantizer: Quantizer, right_quantizer: Quantizer) -> None:
        super().__init__()
        self.left_quantizer = left_quantizer
        self.right_quantizer = right_quantizer

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        if left.is_cpu and left.requires_grad and not torch.compiler.is_compiling():
            left, right = left.contiguous(), right.contiguous()  # matmul would copy them, and backward the masks, too
        return self.left_quantizer(left) @ self.right_quantizer(right)


def quantizers_of(module: nn.Module, *, weights: bool) -> Iterator[tuple[str, Quantizer]]:
    """(path, quantizer) of all weight quantizers in a module, or of all activation quantizers."""
    for name, child in module.named_modules():
        if isinstance(child, Quantizer) and (name.rpartition(".")[2] == "weight_quantizer") == weights:
            yield name, child


def quant_layers(module: nn.Module) -> list[tuple[str, QuantLayer]]:
    """(path, layer) of all quantized Linear and Conv2d layers in a module."""
    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, QuantLayer)]
