"""Hooks of a whole model, run where the chain of its segments begins and ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from iasvit.errors import IasvitError

if TYPE_CHECKING:
    from iasvit.models.base import Segment


def with_hooks(model: nn.Module, links: list[Segment]) -> list[Segment]:
    """The segments of a model, the first behind the model's forward pre-hooks and the last before its forward hooks.

    A model may normalise its own input in such a hook, or scale its logits. Forward hooks are given no inputs.
    """
    links = list(links)
    if model._forward_pre_hooks:
        links[0] = replace(links[0], run=_behind(model, links[0].run))
    if model._forward_hooks:
        links[-1] = replace(links[-1], run=_before(model, links[-1].run))
    return links


def _behind(model: nn.Module, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def hooked(images: Any) -> Any:
        args: tuple[Any, ...] = (images,)
        for key, hook in model._forward_pre_hooks.items():
            if key in model._forward_pre_hooks_with_kwargs:
                result = hook(model, args, {})
                if result is not None:
                    args, kwargs = result
                    if kwargs:
                        raise IasvitError(
                            f"a pre-hook of the {type(model).__name__} given adds arguments "
                            f"({', '.join(kwargs)}); it may only change the images"
                        )
            else:
                result = hook(model, args)
                if result is not None:
                    args = result if isinstance(result, tuple) else (result,)
        return run(args[0])

    return hooked


def _before(model: nn.Module, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def hooked(x: Any) -> Any:
        output = run(x)
        for key, hook in model._forward_hooks.items():
            arguments: tuple[Any, ...] = ((), {}) if key in model._forward_hooks_with_kwargs else ((),)
            result = hook(model, *arguments, output)
            output = output if result is None else result
        return output

    return hooked
