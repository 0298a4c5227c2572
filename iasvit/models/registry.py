"""Find the adapter of a model by entry point, and what can be asked of any model through its adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import nn

from iasvit.errors import IasvitError, reason
from iasvit.models.base import Adapter, Inserter, NormLinearPair, QuantizerFactory, Segment
from iasvit.models.plain import copy_of
from iasvit.nn import QuantConv2d, QuantLinear
from iasvit.plugins import load
from iasvit.spec import QuantSpec

GROUP = "iasvit.models"
INCOMPLETE = "incomplete"  # a key of descriptions that miss something of their model: what is known of it


def _entries() -> list[EntryPoint]:
    return sorted(entry_points(group=GROUP), key=lambda entry: entry.name)


def list_families() -> list[str]:
    """Names of all registered model families, sorted: "timm.swin", "timm.vit"."""
    return [entry.name for entry in _entries()]


def _load(entry: EntryPoint) -> Adapter:
    return load(entry, f"model family {entry.name!r}")()


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model. Only adapters of packages that the model's class or its bases come from are imported.

    Raises:
        IasvitError: no adapter knows its class (the message says which families there are), or one cannot be imported.
    """
    packages = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    for entry in _entries():
        if entry.name.partition(".")[0] in packages:
            adapter = _load(entry)
            if isinstance(model, adapter.model_class):
                return adapter
    raise IasvitError(
        f"model {type(model).__name__} has no supported attention: it belongs to none of the families "
        f"{', '.join(list_families())}"
    )


def prepare(model: nn.Module, spec: QuantSpec, weight: QuantizerFactory, activation: QuantizerFactory) -> nn.Module:
    """A quantizable copy of a model, which is left untouched; what every method begins with.

    Args:
        model: a model that an adapter knows, in full precision.
        spec, weight, activation: see `insert_quantizers`.

    Returns:
        The copy, every quantizer enabled and none calibrated yet, no parameter requiring a gradient.

    Raises:
        IasvitError: as `insert_quantizers`.
    """
    return insert_quantizers(copy_of(model), spec, weight, activation).requires_grad_(False)


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
    adapter = adapter_for(model)
    with _complete(model):
        adapter.insert(model, inserter)
    model.to(device)  # quantizers too, although empty: a state that a checkpoint restores goes where they are
    spec.check_overrides(inserter.names)
    for name, module in model.named_modules():
        if name in inserter.left:
            continue
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not isinstance(module, (QuantLinear, QuantConv2d)):
            raise IasvitError(f"module {name!r} ({type(module).__name__}) is not in a place that the adapter quantizes")
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
                f"some of the layers that read {pair.name!r} are quantized and some are not; treat them alike"
            )
        if all(quantized) and f"{pair.name}.".startswith(under):
            result.append(pair)
    return result


def segments(model: nn.Module) -> list[Segment]:
    """The chain of segments that computes model(images)."""
    adapter = adapter_for(model)
    with _complete(model):
        return adapter.chain(model)


def describe(model: nn.Module) -> dict[str, Any]:
    """JSON types from which `build` makes a model of the same architecture."""
    adapter = adapter_for(model)
    with _complete(model):
        return {"adapter": type(adapter).__name__, **adapter.describe(model)}


@contextmanager
def _complete(model: nn.Module) -> Iterator[None]:
    """Name a part that a model lacks, or that is of no use to its adapter, in an IasvitError."""
    try:
        yield
    except IasvitError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise IasvitError(
            f"the {type(model).__name__} given lacks a part that its family has ({reason(error)}); give a model with "
            "the modules of its family"
        ) from error


def build(description: dict[str, Any]) -> nn.Module:
    """A model of random weights from what `describe` returned, in eval mode.

    Raises:
        IasvitError: the description names no adapter that exists here, or says itself that it is incomplete.
    """
    if INCOMPLETE in description:
        raise IasvitError(f"no model can be built from its description: {description[INCOMPLETE]}")
    arguments = dict(description)
    name = arguments.pop("adapter", None)
    for entry in _entries():
        if entry.value.rpartition(":")[2] == name:
            return _load(entry).build(arguments).eval()
    raise IasvitError(f"the file's architecture {name!r} is not known to this version of iasvit")


def is_detector(model: nn.Module) -> bool:
    """Whether the model's last segment, neck and heads, is not reconstructed with its blocks."""
    return not segments(model)[-1].reconstruct
