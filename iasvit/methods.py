"""The Method protocol, and the registry that finds methods by entry point."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from iasvit.errors import IasvitError
from iasvit.progress import Progress
from iasvit.spec import QuantSpec

GROUP = "iasvit.methods"
Calibration = torch.Tensor | Iterable[torch.Tensor]


@runtime_checkable
class Method(Protocol):
    """What a quantization method implements; its options are the fields of its dataclass (`seed` among them).

    Registered in a package's metadata, so that any installed package may add one:

        [project.entry-points."iasvit.methods"]
        my_method = "my_package.my_module:MyMethod"
    """

    name: str

    def quantize(self, model: nn.Module, calibration: Calibration, spec: QuantSpec, progress: Progress) -> nn.Module:
        """A quantized copy of `model`, which is left untouched; calibration is N×3×H×W images or batches of them."""
        ...


def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}


def list_methods() -> list[str]:
    """Names of all registered methods, sorted."""
    return list(_entries())


def split_variant(name: str) -> tuple[str, dict[str, bool]]:
    """Split "ias_vit[-sulq-sos]" into ("ias_vit", {"sulq": False, "sos": False}): ingredients that are off.

    Raises:
        IasvitError: the brackets hold anything but -ingredient, once or more.
    """
    match = re.fullmatch(r"(\w+)(?:\[((?:-\w+)+)\])?", name)
    if match is None:
        raise IasvitError(f"method {name!r} is neither a name nor a name[-ingredient...], such as ias_vit[-sulq]")
    off = (match[2] or "").split("-")[1:]
    return match[1], dict.fromkeys(off, False)


def load_method_class(name: str) -> type[Method]:
    """The class that a method's entry point names.

    Raises:
        IasvitError: no such method (the message lists what exists), or its module cannot be imported.
    """
    entries = _entries()
    if name not in entries:
        raise IasvitError(f"method {name!r} is not registered; registered are {', '.join(entries)}")
    try:
        return entries[name].load()
    except (ImportError, AttributeError) as error:
        raise IasvitError(
            f"method {name!r} is registered as {entries[name].value}, but loading that failed: {error}; "
            "mend or uninstall the package that registers it"
        ) from error


def method_options(name: str) -> list[str]:
    """The options that a method takes, by name: the fields of its dataclass."""
    base, _ = split_variant(name)
    return [field.name for field in dataclasses.fields(load_method_class(base)) if field.init]


def get_method(name: str, **options: Any) -> Method:
    """The method of that name with these options; its attribute `variant` is the name as given.

    Raises:
        IasvitError: no such method, or an option that it does not know; the message lists what exists.
    """
    base, switches = split_variant(name)
    known = method_options(base)
    for option in options:
        if option not in known:
            raise IasvitError(f"method {base!r} has no option {option!r}; it knows {', '.join(known)}")
    ingredients = [field.name for field in dataclasses.fields(load_method_class(base)) if field.default is True]
    for ingredient in switches:
        if ingredient not in ingredients:
            can = ", ".join(ingredients) or "none"
            raise IasvitError(f"method {base!r} has no ingredient {ingredient!r} to leave out; it has {can}")
        if ingredient in options:
            raise IasvitError(f"option {ingredient!r} and method {name!r} name the same ingredient; give one of them")
    method = load_method_class(base)(**options, **switches)
    method.variant = name
    return method
