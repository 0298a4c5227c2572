"""Which adapter knows which model, and what is asked of any model through its adapter."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

from torch import nn

from iasvit.errors import IasvitError
from iasvit.models.base import Inserter, NormLinearPair, QuantizerFactory, Segment
from iasvit.models.swin import SwinAdapter
from iasvit.models.vit import ViTAdapter
from iasvit.nn import QuantConv2d, QuantLinear
from iasvit.spec import QuantSpec


class Adapter(Protocol):
    """What makes one family of models quantizable."""

    model_class: type[nn.Module]

    def insert(self, model: nn.Module, inserter: Inserter) -> None:
        """Replace layers and products by quantized ones, in place."""

    def pairs(self, model: nn.Module) -> list[NormLinearPair]:
        """LayerNorm→Linear pairs of a quantizable model."""

    def segments(self, model: nn.Module) -> list[Segment]:
        """The chain of segments that computes model(images), of a float or quantizable model."""

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """JSON types from which `build` makes an equal model of random weights."""

    def build(self, description: dict[str, Any]) -> nn.Module:
        """See `describe`."""


ADAPTERS: tuple[Adapter, ...] = (ViTAdapter(), SwinAdapter())
# Adapters of models whose package is optional: its name → module and class, imported when such a model comes.
_OPTIONAL = {"mmdet": ("iasvit.models.mmdet_detector", "DetectorAdapter")}


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model.

    Raises:
        IasvitError: no adapter knows its class; the message says which are known.
    """
    packages = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    for adapter in (*ADAPTERS, *(_optional(package) for package in _OPTIONAL if package in packages)):
        if isinstance(model, adapter.model_class):
            return adapter
    known = ", ".join(adapter.model_class.__name__ for adapter in ADAPTERS)
    raise IasvitError(
        f"model {type(model).__name__} has no supported attention; supported are timm's {known} and mmdet's two-stage "
        "detectors with a Swin backbone"
    )


def _optional(package: str) -> Adapter:
    module, name = _OPTIONAL[package]
    try:
        return getattr(import_module(module), name)()
    except ImportError as error:
        raise IasvitError(f"{package} cannot be imported: {error}") from error


def insert_quantizers(
    model: nn.Module, spec: QuantSpec, weight: QuantizerFactory, activation: QuantizerFactory
) -> nn.Module:
    """Make a model quantizable, in place: all Linear and Conv2d layers and all products of activations.

    Args:
        model: a model that an adapter knows, in full precision; changed in place.
        spec: bits of each layer.
        weight: Site → quantizer of a weight.
        activation: Site → quantizer of a layer's or a product's input.

    Returns:
        The model, every quantizer enabled and none calibrated yet.

    Raises:
        IasvitError: no adapter knows the model, a module in it is not supported, or an override matches no layer.
    """
    inserter = Inserter(spec, weight, activation)
    device = next(model.parameters()).device
    adapter_for(model).insert(model, inserter)
    model.to(device)  # quantizers too, although empty: a state that a journal restores goes where they are
    spec.check_overrides(inserter.names)
    for name, module in model.named_modules():
        if name in inserter.left:
            continue
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not isinstance(module, (QuantLinear, QuantConv2d)):
            raise IasvitError(f"module {name!r} ({type(module).__name__}) is in no place that the adapter quantizes")
    return model


def find_pairs(model: nn.Module, under: str = "") -> list[NormLinearPair]:
    """The LayerNorm→Linear pairs of a quantizable model, of those the ones whose name starts with `under`.

    A LayerNorm whose Linears the spec leaves in full precision makes no pair.

    Raises:
        IasvitError: the spec leaves some of a LayerNorm's Linears in full precision, and not all.
    """
    result = []
    for pair in adapter_for(model).pairs(model):
        quantized = [isinstance(linear, QuantLinear) for linear in pair.linears]
        if any(quantized) != all(quantized):
            raise IasvitError(
                f"of the layers that read {pair.name!r} some are quantized and some not; treat them alike"
            )
        if all(quantized) and f"{pair.name}.".startswith(under):
            result.append(pair)
    return result


def segments(model: nn.Module) -> list[Segment]:
    """The chain of segments that computes model(images)."""
    return adapter_for(model).segments(model)


def describe(model: nn.Module) -> dict[str, Any]:
    """JSON types from which `build` makes a model of the same architecture."""
    return {"adapter": type(adapter_for(model)).__name__, **adapter_for(model).describe(model)}


def build(description: dict[str, Any]) -> nn.Module:
    """A model of random weights from what `describe` returned, in eval mode.

    Raises:
        IasvitError: the description names no adapter that exists here.
    """
    arguments = dict(description)
    name = arguments.pop("adapter", None)
    for adapter in ADAPTERS:
        if type(adapter).__name__ == name:
            return adapter.build(arguments).eval()
    for package, (_, adapter_name) in _OPTIONAL.items():
        if adapter_name == name:
            return _optional(package).build(arguments).eval()
    raise IasvitError(f"the file's architecture {name!r} is not known to this version of iasvit")
