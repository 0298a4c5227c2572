"""What was done to a network before it is quantized, kept on the network itself and on every copy of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from iasvit.errors import IasvitError
from iasvit.models import check_parameters, copy_of, describe, plain, unwrap


@dataclass(frozen=True)
class Step:
    """One transform.

    Attributes:
        name: of the function.
        options: that it was called with; JSON types.
        exact: whether the network computes what it did, to rounding.
    """

    name: str
    options: dict[str, Any]
    exact: bool


@dataclass(frozen=True, eq=False)
class Transforms:
    """All transforms of a network, in order.

    Attributes:
        steps: what was done.
        architecture: what `iasvit.models.build` makes the transformed network from.
        network: the network in full precision after the last step that was not exact, whose own value a table shows;
            None where all were exact.
    """

    steps: tuple[Step, ...]
    architecture: dict[str, Any]
    network: nn.Module | None = field(default=None, repr=False)

    def __deepcopy__(self, _memo: object) -> Transforms:
        return self


def transforms_of(model: nn.Module) -> Transforms | None:
    """What was done to a model, or to the one that it is a quantized copy of; None where nothing was."""
    return getattr(model, "transforms", None)


def changeable(model: nn.Module) -> nn.Module:
    """A copy of a model in full precision, whose parameters a transform may change in place.

    Raises:
        IasvitError: it is quantized already, or its parameters are not ordinary float32 tensors.
    """
    model = unwrap(model)
    if hasattr(model, "quantization"):
        raise IasvitError("the model given is quantized already; transform the full-precision one")
    check_parameters(model)
    return copy_of(plain(model))


def recorded(model: nn.Module, step: Step) -> nn.Module:
    """The model itself, on which this step is now recorded."""
    before = transforms_of(model)
    steps = (*(before.steps if before else ()), step)
    network = model if not step.exact else before.network if before else None
    model.__dict__["transforms"] = Transforms(steps, describe(model), network)  # no submodule
    return model
