"""Check on one image, before any work, that the chain of segments computes what the model computes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from iasvit.errors import IasvitError, reason
from iasvit.models.base import Adapter
from iasvit.models.plain import copy_of
from iasvit.models.registry import adapter_for, build, describe, insert_quantizers, segments
from iasvit.quantizers import Quantizer, UniformQuantizer
from iasvit.spec import QuantSpec

# Of the largest output. Attention that is made explicit adds in another order than timm's fused one: some 1e-6.
TOLERANCE = 1e-4


@torch.no_grad()
def check_chain(model: nn.Module, image: Tensor, spec: QuantSpec) -> None:
    """Compare the model's segments, and those of a quantizable copy with its quantizers off, with the model itself.

    Args:
        model: in full precision and eval mode; left as it is.
        image: float32 (1, C, H, W), on the model's device.
        spec: bits, as the model is to be quantized.

    Raises:
        IasvitError: the model cannot run on the image, outputs NaN or Inf, computes something other than its segments
            (the message names the module from which on), or cannot be made quantizable.
    """
    adapter = adapter_for(model)
    expected = _whole(adapter, model, image)
    if not all(torch.isfinite(x).all() for x in expected):
        raise IasvitError(f"layer {_not_finite(model, image)!r} outputs NaN or Inf for the first calibration image")
    _compare(adapter, model, model, image, expected)
    quantizable = insert_quantizers(copy_of(model), spec, _switched_off, _switched_off)
    _compare(adapter, model, quantizable, image, expected)


@torch.no_grad()
def check_size(model: nn.Module, image: Tensor) -> None:
    """Raise IasvitError unless the model's first segments take an image (1, C, H, W) of this size.

    Cheaper than `check_chain`, for images that differ from the first in their size alone.
    """
    x: Any = image
    try:
        for segment in segments(model)[:2]:
            x = segment.run(x)
    except Exception as error:
        raise _cannot_run(model, image, error) from error


@torch.no_grad()
def why_not_saved(model: nn.Module, image: Tensor) -> str | None:
    """Why a file could not rebuild this model, or None if it could. `iasvit.save` checks the same on the quantized
    model.

    Args:
        model: in full precision and eval mode; left as it is.
        image: float32 (1, C, H, W), on the model's device.
    """
    adapter = adapter_for(model)
    devices = [image.device] if image.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            rebuilt = build(json.loads(json.dumps(describe(model))))
        rebuilt.load_state_dict(model.state_dict())
        rebuilt.to(image.device)
        found = _whole(adapter, rebuilt, image)
    except Exception as error:
        return reason(error).split("; ")[0]
    if not _close(found, _whole(adapter, model, image), 0.0):
        return "a model of its weights that is built by its description answers otherwise"
    return None


def _switched_off(_: object) -> Quantizer:
    quantizer = UniformQuantizer(8)
    quantizer.enabled = False
    return quantizer


def _whole(adapter: Adapter, model: nn.Module, image: Tensor) -> tuple[Tensor, ...]:
    try:
        outputs = adapter.run_whole(model, image)
    except IasvitError:
        raise
    except Exception as error:
        raise _cannot_run(model, image, error) from error
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for output in outputs:
        if not isinstance(output, Tensor):
            raise IasvitError(f"the {type(model).__name__} given outputs a {type(output).__name__}, not a tensor")
    return outputs


def _cannot_run(model: nn.Module, image: Tensor, error: Exception) -> IasvitError:
    size = "×".join(map(str, image.shape[1:]))
    return IasvitError(
        f"the {type(model).__name__} given cannot run on calibration images of {size} ({reason(error)}); give "
        "channels×height×width as the model takes them, and the model with all its parts"
    )


def _not_finite(model: nn.Module, image: Tensor) -> str:
    x: Any = image
    for segment in segments(model):
        x = segment.run(x)
        if not all(torch.isfinite(part).all() for part in (x if isinstance(x, tuple) else (x,))):
            return segment.name
    return type(model).__name__


def _close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> bool:
    if [x.shape for x in found] != [x.shape for x in expected]:
        return False
    pairs = [(x, y) for x, y in zip(found, expected, strict=True) if y.numel()]
    return all((x - y).abs().max() <= tolerance * y.abs().max() for x, y in pairs)


def _compare(
    adapter: Adapter, model: nn.Module, chained: nn.Module, image: Tensor, expected: tuple[Tensor, ...]
) -> None:
    """Raise IasvitError where the segments of `chained`, the model or a copy, compute something else."""
    try:
        found = adapter.run_chain(chained, image)
    except Exception as error:
        raise IasvitError(
            f"the {type(model).__name__} given runs on the first calibration image, but the chain of its segments does "
            f"not ({reason(error)}); give a model whose parts are those of its family"
        ) from error
    found = found if isinstance(found, tuple) else (found,)
    if all(isinstance(x, Tensor) for x in found) and _close(found, expected, TOLERANCE):
        return
    name = _fault(
        model,
        _digests(model, lambda: adapter.run_whole(model, image)),
        _digests(chained, lambda: adapter.run_chain(chained, image)),
    )
    where = f"from module {name!r} on" if name else "after its last module"
    package, family = (cls.__module__.partition(".")[0] for cls in (type(model), adapter.model_class))
    what = f"{'' if package == family else f'the code of {type(model).__name__}, '}a hook or a changed part"
    raise IasvitError(
        f"the {type(model).__name__} given computes something other than the chain of its segments {where}, because of "
        f"{what}; only what the family's own forward and modules compute can be quantized"
    )


Digests = dict[str, list[tuple[int, float, float]]]


def _digests(model: nn.Module, run: Callable[[], object]) -> Digests:
    """For each module that `run` runs, in the order in which they end: of each output, number, sum and size of
    its values.

    The sum has a weight for each place, so that values in another order give another one.
    """
    seen: Digests = {}

    def watch(name: str) -> Callable[..., None]:
        def note(_module: nn.Module, _args: object, output: object) -> None:
            values = [x.double().flatten() for x in _tensors(output)]
            weights = [torch.arange(len(x), device=x.device).double().sin_() for x in values]
            seen.pop(name, None)  # of several calls the last counts: of a detector's heads that for the fixed region
            seen[name] = [
                (len(x), (x * w).mean().item(), x.abs().mean().item()) for x, w in zip(values, weights, strict=True)
            ]

        return note

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _fault(model: nn.Module, whole: Digests, chain: Digests) -> str:
    """The first module whose outputs differ, or that the chain leaves out and that may compute something of its own."""
    for name, digest in whole.items():
        if name in chain:
            if [count for count, *_ in digest] != [count for count, *_ in chain[name]]:
                continue  # quantizable Swin blocks fill up windows earlier; what comes of it is compared
            for mine, theirs in zip(digest, chain[name], strict=True):
                if any(abs(x - y) > TOLERANCE * mine[2] for x, y in zip(mine[1:], theirs[1:], strict=True)):
                    return name
        else:
            module = model.get_submodule(name)
            leaf = not isinstance(module, nn.Identity) and not any(True for _ in module.children())
            if module._forward_hooks or module._forward_pre_hooks or leaf:
                return name
    return ""
