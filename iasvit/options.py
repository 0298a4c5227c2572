"""The options of methods: what type and range the fields of a method's dataclass declare, and whether values fit."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any

from iasvit.errors import IasvitError, shown

_WIDEST = 2**63 - 1  # what torch takes for an integer


@dataclass(frozen=True)
class Range:
    """Where a number may lie, declared beside its type: `batch_size: Annotated[int, Range(1)] = 64`.

    Attributes:
        least: the least value; None for no limit.
        most: the largest value; None for no limit.
        above: the value must be larger than this one; None for no limit.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a number lies in it."""
        return not (
            (self.least is not None and value < self.least)
            or (self.most is not None and value > self.most)
            or (self.above is not None and value <= self.above)
        )

    def __str__(self) -> str:
        if self.above is not None:
            return f"above {self.above}" + (f" and at most {self.most}" if self.most is not None else "")
        if self.most is None:
            return "" if self.least is None else f"of {self.least} or more"
        return f"up to {self.most}" if self.least is None else f"from {self.least} to {self.most}"


@dataclass(frozen=True)
class OneOf:
    """Which values an option may have, declared beside its type: `Annotated[str, OneOf(("sulq", "log2"))]`."""

    values: Iterable[Any]


@dataclass(frozen=True)
class Bytes:
    """A size in bytes, also as text: "8GiB", "500MiB". It bounds what is used and changes no result."""


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

MemoryBudget = Annotated[int | str | None, Bytes()]
"""The option `memory_budget` of a method: bytes of all that it allocates, the model and the images given apart."""


def bytes_of(size: int | str) -> int:
    """Bytes of a size, a whole number or text such as "8GiB", "1.5 GB" and "500MiB".

    Raises:
        IasvitError: it is no size, or not above 0.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)", size.strip()) if isinstance(size, str) else None
    count = size if _is_int(size) else float(match[1]) * _UNITS.get(match[2].upper(), 0) if match else 0
    if count < 1:
        raise IasvitError(f"memory_budget is {shown(size)}, but a size such as 8GiB or 500MiB is expected")
    return int(count)


def size_text(size: int) -> str:
    """A size as `bytes_of` takes it: "300 MiB", below a MiB in bytes; what is left of a MiB is dropped."""
    return f"{size} B" if size < 2**20 else f"{size // 2**20} MiB"


def without_bounds(cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that may change a result: those that only bound what is used are left out."""
    hints = _hints(cls)
    return {
        name: value for name, value in options.items() if not any(isinstance(r, Bytes) for r in _rules(hints.get(name)))
    }


def _rules(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint)[1:] if typing.get_origin(hint) is typing.Annotated else ()


def check_options(cls: type, options: Mapping[str, Any], of: str) -> dict[str, Any]:
    """Compare options with the types and ranges that the fields of a dataclass declare.

    A field of which the annotation cannot be resolved, or is none of int, float, bool, str, Literal, None and unions
    of them, takes any value.

    Args:
        cls: a method's dataclass.
        options: values by name; all are fields.
        of: whose options they are, for the message: "method 'ias_vit'".

    Returns:
        The options; a whole number given for a float is one, so that the same setting is written in one way.

    Raises:
        IasvitError: a value is of another type, not finite or out of its range.
    """
    hints = _hints(cls)
    checked = dict(options)
    for name, value in options.items():
        if name in hints and _check(hints[name], value, f"{of}: {name}") == (float,):
            checked[name] = float(value)
    return checked


def check_fields(method: Any) -> None:
    """The same for all fields of a method that was constructed directly: for `__post_init__`.

    Raises:
        IasvitError: as `check_options`.
    """
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method) if field.init}
    check_options(type(method), values, f"method {getattr(method, 'name', type(method).__name__)!r}")


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except (NameError, TypeError, AttributeError, SyntaxError):
        return {}  # annotations of names that only a type checker imports


def _check(hint: Any, value: Any, what: str) -> tuple[Any, ...]:
    """The types that the value may have, where it is to be compared with them."""
    hint, *rules = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return ()
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if any(isinstance(rule, Bytes) for rule in rules):
        bytes_of(value)
        return ()
    rules += [OneOf(typing.get_args(kind)) for kind in kinds if typing.get_origin(kind) is typing.Literal]
    for values in (list(rule.values) for rule in rules if isinstance(rule, OneOf)):
        if not isinstance(value, str | int | float) or value not in values:
            raise IasvitError(f"{what} is {shown(value)}, but there are {', '.join(map(str, values))}")
        return ()
    if any(kind not in _FITS for kind in kinds):
        return ()
    ranges = [rule for rule in rules if isinstance(rule, Range)]
    if not any(_FITS[kind](value) for kind in kinds) or not all(rule.holds(value) for rule in ranges):
        expected = " ".join([" or ".join(_NAMES[kind] for kind in kinds), *filter(None, map(str, ranges))])
        raise IasvitError(f"{what} is {shown(value)}, but {expected} is expected")
    return kinds


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) <= _WIDEST


def _is_float(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _is_text(value: Any) -> bool:
    """Text that a row can hold: its options are separated by ";"."""
    return isinstance(value, str) and value.isprintable() and ";" not in value


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


_FITS: dict[Any, Callable[[Any], bool]] = {
    int: _is_int,
    float: _is_float,
    bool: _is_bool,
    str: _is_text,
}
_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: 'printable text without ";"',
}
