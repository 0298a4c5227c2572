"""What the tasks' commands share: from options to cells, and what is checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from iasvit.benchmark.harness import Cell
from iasvit.errors import IasvitError
from iasvit.methods import get_method, method_options, parse_value
from iasvit.models import Site, insert_quantizers
from iasvit.quantizers import UniformQuantizer
from iasvit.spec import QuantSpec

T = TypeVar("T")


class Models(Protocol):
    """Full-precision models by name, as far as they are checked here."""

    def check(self, name: str) -> None:
        """Raise IasvitError where there is no model of that name (the message says what exists), or no weights file."""

    def architecture(self, name: str) -> nn.Module:
        """The model with any weights, or none."""


class Profile(Protocol):
    """What a run does unless told otherwise."""

    def options(self, spec: QuantSpec) -> dict[str, Any]:
        """Options for the methods that take them, at these bits."""


def make_cells(
    names: Sequence[str],
    specs: Sequence[QuantSpec],
    methods: Sequence[str],
    seeds: Sequence[int],
    calib_size: int,
    profile: Profile,
    given: dict[str, Any],
) -> list[Cell]:
    """All combinations, each with the options that its method takes: those given, else the profile's.

    Raises:
        IasvitError: an unknown method, or an option given that none of the methods takes.
    """
    takes = {method: method_options(method) for method in methods}
    for option in given:
        if not any(option in options for options in takes.values()):
            raise IasvitError(f"--{option.replace('_', '-')} is no option of {', '.join(methods)}")
    cells = []
    for name in names:
        for spec in specs:
            for method in methods:
                options = {k: v for k, v in {**profile.options(spec), **given}.items() if k in takes[method]}
                get_method(method, **options)  # says what is wrong with a value before anything runs
                for seed in seeds:
                    cells.append(Cell(name, method, str(spec), seed, calib_size, tuple(sorted(options.items()))))
    return cells


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """Options of methods from NAME=VALUE, the value being a number, true, false or text.

    Raises:
        IasvitError: a text without a name or a value.
    """
    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals or not value:
            raise IasvitError(f"--option {text!r} is not of the form NAME=VALUE, as autocast=true")
        options[name] = parse_value(value)
    return options


def check_models(models: Models, names: Sequence[str], specs: Sequence[QuantSpec]) -> None:
    """Find out before anything runs what would stop a model: name, weights file, module, or an override of bits.

    Raises:
        IasvitError: with the fault.
    """

    def quantizer(site: Site) -> UniformQuantizer:
        return UniformQuantizer(site.n_bits)

    for name in names:
        models.check(name)
        for spec in specs:
            try:
                insert_quantizers(models.architecture(name), spec, quantizer, quantizer)
            except IasvitError as error:
                raise IasvitError(f"model {name!r} cannot be quantized to {spec}: {error}") from None


def make_device(name: str | None) -> torch.device:
    """The device of that name; by default cuda where there is one, else cpu.

    Raises:
        IasvitError: there is no such device here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise IasvitError(f"--device {name} cannot be used here ({reason}); cpu can") from None
    return device


def unique(values: Iterable[T]) -> list[T]:
    """The values without repetitions, in order."""
    return list(dict.fromkeys(values))


def at_least(option: str, value: float | None, least: int) -> None:
    """Raise IasvitError where the value given for an option is too small."""
    if value is not None and value < least:
        raise IasvitError(f"{option} is {value}, but {least} or more is expected")
