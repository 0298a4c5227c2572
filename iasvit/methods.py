"""The Method protocol, and the registry that finds methods by entry point."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from iasvit.errors import IasvitError, reason, shown
from iasvit.options import check_options
from iasvit.plugins import load
from iasvit.progress import Progress
from iasvit.spec import QuantSpec

GROUP = "iasvit.methods"
BY_NAME = "iasvit.methods.by_name"  # methods that run only by name, and not by default
Calibration = torch.Tensor | Iterable[torch.Tensor]


@runtime_checkable
class Method(Protocol):
    """What a quantization method implements; its options are the fields of its dataclass (`seed` among them).

    Registered in a package's metadata, so that any installed package may add one:

        [project.entry-points."iasvit.methods"]
        my_method = "my_package.my_module:MyMethod"

    A class may also have `version: ClassVar[int]`, raised whenever its numbers change (1 without it), and `changelog:
    ClassVar[dict[int, str]]`, version → what changed them. Rows say which version measured them. A method that does not
    read all calibration images says so in `images_used(self, calib_size: int) -> int`; see there. `forwards(self,
    calib_size: int, detector: bool) -> float` says roughly how long it takes on a classifier or a detector, counted in
    forward passes of one image in full precision; `--dry-run` and the time left rest on it.

    `describe(self) -> Description` says what the method is, for `iasvit list methods`. A method without it is described
    by its class.

    An option's value must be of its field's type, and in the range that stands beside it: `Annotated[int, Range(1)]`
    of `iasvit.options`.
    """

    name: str

    def quantize(self, model: nn.Module, calibration: Calibration, spec: QuantSpec, progress: Progress) -> nn.Module:
        """A quantized copy of `model`, which is left untouched; calibration is N×3×H×W images or batches of them."""
        ...


@dataclasses.dataclass(frozen=True)
class Description:
    """What a method is.

    Attributes:
        name: in the registry.
        summary: one line.
        reference: the paper; "" for none.
        published: which numbers the paper or other papers report, in a few words; "" where none are known.
        calib_used: of 1024 calibration images how many it reads.
        iterations: optimization steps of a block; None where it learns nothing or the bits decide.
        transforms: of the network before, by name; those that are not exact have "(changes the network)" behind.
    """

    name: str
    summary: str
    reference: str = ""
    published: str = ""
    calib_used: int = 0
    iterations: int | None = None
    transforms: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [("reference", self.reference or "none"), ("published", self.published or "nothing")]
        parts.append(("images", f"{self.calib_used} of 1024"))
        parts.append(("iterations", "none, or as the bits say" if self.iterations is None else str(self.iterations)))
        parts.append(("transforms", ", ".join(self.transforms) or "none"))
        return "\n".join([f"{self.name}: {self.summary}", *(f"  {name + ':':<12}{value}" for name, value in parts)])


def describe_method(method: Method) -> Description:
    """What a method says of itself, or what its class says: `reference`, `published` and `transforms`, class variables.

    The summary is the first sentence of its docstring.
    """
    own: Callable[[], Description] | None = getattr(method, "describe", None)
    if own is not None:
        return own()
    cls = type(method)
    return Description(
        method.name,
        " ".join((cls.__doc__ or "").split("\n\n")[0].split()).partition(". ")[0].rstrip("."),
        getattr(cls, "reference", ""),
        getattr(cls, "published", ""),
        images_used(method, 1024),
        getattr(method, "iterations", None),
        tuple(getattr(method, "transforms", ())),
    )


def descriptions() -> list[Description]:
    """Those of all registered methods, by name."""
    return [describe_method(get_method(name)) for name in list_methods(by_name=True)]


def _entries() -> dict[str, EntryPoint]:
    found = [*entry_points(group=GROUP), *entry_points(group=BY_NAME)]
    return {entry.name: entry for entry in sorted(found, key=lambda entry: entry.name)}


def list_methods(*, by_name: bool = False) -> list[str]:
    """Names of the methods that run by default, sorted.

    Args:
        by_name: list those of the group BY_NAME too, which take long or need packages of their own.
    """
    return [name for name, entry in _entries().items() if by_name or entry.group != BY_NAME]


_OPTION = r"\w+=(?:\d[\d.]*[eE]-\d+|[\w.+]+)"  # 1e-5 leaves no ingredient "5" out
_VARIANT = re.compile(rf"(\w+)(?:\[((?:-\w+|{_OPTION})(?:,?-\w+|,{_OPTION})*)\])?")


def split_variant(name: str) -> tuple[str, list[str], dict[str, Any]]:
    """Split "ias_vit[-sos,softmax=uniform]" into ("ias_vit", ["sos"], {"softmax": "uniform"}).

    In brackets stand ingredients that are left out, -ingredient, and options with their values, comma-separated.

    Raises:
        IasvitError: the brackets hold anything else, or an option twice.
    """
    match = _VARIANT.fullmatch(name)
    if match is None:
        raise IasvitError(
            f"method {shown(name)} is neither a name nor a name[-ingredient,option=value...], such as ias_vit[-sulq]"
        )
    off, options = [], {}
    for part in re.findall(rf"-\w+|{_OPTION}", match[2] or ""):
        key, _, value = part.partition("=")
        if part.startswith("-"):
            off.append(part[1:])
        elif key in options:
            raise IasvitError(f"method {name!r} gives option {key!r} twice")
        else:
            options[key] = parse_value(value)
    return match[1], off, options


def parse_value(text: str) -> Any:
    """An option's value from text: a number, true, false or null as JSON has them, else the text itself."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, list | dict) else value


def load_method_class(name: str) -> type[Method]:
    """The class that a method's entry point names.

    Raises:
        IasvitError: no such method (the message lists what exists), or its module cannot be imported.
    """
    entries = _entries()
    if name not in entries:
        raise IasvitError(f"method {shown(name)} is not registered; the registered ones are {', '.join(entries)}")
    return load(entries[name], f"method {name!r}")


def method_options(name: str) -> list[str]:
    """The options that a method takes, by name: the fields of its dataclass, less those that a variant's name sets."""
    base, off, options = split_variant(name)
    fixed = {**_left_out(base, off), **options} if off or options else {}
    return [field for field in _fields(base) if field not in fixed]


def _fields(base: str) -> list[str]:
    return [field.name for field in dataclasses.fields(load_method_class(base)) if field.init]


def _left_out(base: str, off: Iterable[str]) -> dict[str, Any]:
    """The options that leave these ingredients of a method out.

    An ingredient is a field that is True by default, or a name in the class's `ablations`, which says what options the
    method has without it.
    """
    cls = load_method_class(base)
    ingredients = {field.name: {field.name: False} for field in dataclasses.fields(cls) if field.default is True}
    ingredients = {**getattr(cls, "ablations", {}), **ingredients}
    options: dict[str, Any] = {}
    for ingredient in off:
        if ingredient not in ingredients:
            can = ", ".join(ingredients) or "none"
            raise IasvitError(f"method {base!r} has no ingredient {ingredient!r} to leave out; it has {can}")
        options.update(ingredients[ingredient])
    return options


def get_method(name: str, **options: Any) -> Method:
    """The method of that name with these options; its attribute `variant` is the name as given.

    Raises:
        IasvitError: no such method, an option that it does not know (the message lists what exists), or a value of
            another type or out of the range that the method declares.
    """
    base, off, named = split_variant(name)
    known = _fields(base)
    for option in (*named, *options):
        if option not in known:
            raise IasvitError(f"method {base!r} has no option {shown(option)}; it knows {', '.join(known)}")
    left_out = _left_out(base, off)
    for option in (*left_out, *named):
        if option in options or (option in left_out and option in named):
            raise IasvitError(f"option {option!r} is given twice, one of them by method {name!r}; give it once")
    cls = load_method_class(base)
    values = check_options(cls, {**options, **left_out, **named}, f"method {base!r}")
    try:
        method: Any = cls(**values)
    except (TypeError, ValueError) as error:
        if isinstance(error, IasvitError):
            raise
        raise IasvitError(f"method {base!r} does not take its options: {reason(error)}") from error
    method.variant = name
    return method


def images_used(method: Method, calib_size: int) -> int:
    """How many of `calib_size` calibration images a method reads: all, unless its own `images_used` says otherwise."""
    count: Callable[[int], int] | None = getattr(method, "images_used", None)
    return calib_size if count is None else count(calib_size)
