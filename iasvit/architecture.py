"""The architecture in a file's header, compared with the file's tensors before a model is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from iasvit.errors import IasvitError
from iasvit.models import build, describe

ROOM = 2**22  # elements of buffers that a model computes and a file does not hold


def check_architecture(
    architecture: dict[str, Any], state: dict[str, Tensor], shapes: dict[str, torch.Size], path: Path
) -> None:
    """Build the architecture without memory, and compare its shapes with the file's.

    A few letters in a header can ask for a model of any size: more parts than the file has tensors for end it at once.

    Args:
        architecture: what `iasvit.models.build` takes.
        state: the file's tensors.
        shapes: of the weights that the file holds as codes.
        path: the file, for messages.

    Raises:
        IasvitError: no such model can be built, or it has other tensors than the file.
    """
    held = sum(shape.numel() for shape in shapes.values()) + sum(tensor.numel() for tensor in state.values())
    if (largest := _largest(architecture)) > held + ROOM:
        raise IasvitError(f"{path} does not fit its architecture, which has a size of {largest:,}")
    with torch.device("meta"), _RealNumbers(), _at_most(2 * len(state) + 100):
        model = build(architecture)
    if unknown := sorted(set(architecture) - set(describe(model))):
        raise IasvitError(f"{path} has an architecture with {unknown[0]!r}, which save does not describe")
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    elements = sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])
    if elements > held + ROOM:
        raise IasvitError(f"{path} does not fit its architecture, which has {elements:,} values; the file has {held:,}")
    found = {name: tensor.shape for name, tensor in state.items()} | {f"{n}.weight": s for n, s in shapes.items()}
    for name, shape in expected.items():
        if name in found and found[name] != shape:
            raise IasvitError(
                f"{path} does not fit its architecture: {name} has shape {tuple(found[name])} for {tuple(shape)}"
            )
    if missing := [name for name, _ in model.named_parameters() if name not in found]:
        raise IasvitError(f"{path} does not fit its architecture: {', '.join(missing[:4])}")


def _largest(value: Any) -> int:
    """The largest whole number in JSON."""
    if isinstance(value, (dict, list)):
        return max(map(_largest, value.values() if isinstance(value, dict) else value), default=0)
    return value if isinstance(value, int) else 0


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Let models that are built meanwhile have so many parameters and buffers, and as many modules."""
    numbers = {"parameters": 0, "modules": 0}

    def counter(kind: str) -> Callable[[nn.Module, str, object], None]:
        def hook(_module: nn.Module, _name: str, value: object) -> None:
            numbers[kind] += value is not None
            if numbers[kind] > 8 * count:
                raise IasvitError(f"its architecture has more than {8 * count} {kind}, too many for its tensors")

        return hook

    handles = [
        register_module_parameter_registration_hook(counter("parameters")),
        register_module_buffer_registration_hook(counter("parameters")),
        register_module_module_registration_hook(counter("modules")),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _RealNumbers(TorchFunctionMode):
    """Compute `linspace` on the CPU: models read their rates of stochastic depth from it while they are built."""

    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: Sequence = (), kwargs: Mapping | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.linspace:
            kwargs.setdefault("device", "cpu")
        return function(*args, **kwargs)
