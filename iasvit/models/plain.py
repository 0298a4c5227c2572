"""A model as its adapter expects it: without wrappers, and with each parameter a separate tensor, stored as it is used.

What users bring besides: DataParallel and torch.compile, pruning masks, weight and spectral norms, shared weights.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm
from torch.optim.swa_utils import AveragedModel

from iasvit.errors import IasvitError, reason

logger = logging.getLogger(__name__)

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel, AveragedModel and what torch.compile returns.

    Raises:
        IasvitError: it is no Module, or a wrapper has hooks, which would be lost.
    """
    if not isinstance(model, nn.Module):
        raise IasvitError(f"the model given is a {type(model).__name__}; give a torch.nn.Module")
    while True:
        if isinstance(model, _WRAPPERS):
            inner = model.module
        elif "_orig_mod" in model._modules:
            inner = model._orig_mod
        else:
            return model
        if model._forward_hooks or model._forward_pre_hooks:
            raise IasvitError(
                f"the {type(model).__name__} around the model given has hooks; put them on the model itself"
            )
        model = inner


def check_parameters(model: nn.Module) -> None:
    """Raise IasvitError, naming the tensor, unless all parameters are ordinary float32 tensors on one device."""
    first: tuple[str, torch.device] | None = None
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, UninitializedTensorMixin):
            raise IasvitError(f"{name!r} of the model given has no shape yet; run the model once on images")
        if type(tensor) not in (nn.Parameter, Tensor, nn.Buffer) or tensor.layout != torch.strided:
            kind = type(tensor).__name__ if tensor.layout == torch.strided else f"{tensor.layout} tensor"
            raise IasvitError(f"{name!r} of the model given is a {kind}; give a model with ordinary float32 parameters")
        if tensor.is_meta:
            raise IasvitError(f"{name!r} of the model given is on the meta device and has no values; load its weights")
        first = first or (name, tensor.device)
        if tensor.device != first[1]:
            raise IasvitError(
                f"the model given has {first[0]!r} on {first[1]} and {name!r} on {tensor.device}; put it on one device"
            )
    dtypes = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if dtypes:
        raise IasvitError(f"the model given has {dtypes.pop()} parameters; give it in float32, as model.float() is")


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy of a model. Tensors that a forward left in attributes, as masks and hooks do, are copied by value.

    Raises:
        IasvitError: the model holds something that cannot be copied.
    """
    memo = {id(tensor): tensor.detach().clone() for tensor in _computed(model)}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise IasvitError(
            f"the {type(model).__name__} given cannot be copied ({reason(error)}); remove what is at fault"
        ) from error


def plain(model: nn.Module) -> nn.Module:
    """The model itself where each parameter is stored as it is used; else a copy, in eval mode, that is so.

    Masks of `torch.nn.utils.prune`, parametrizations and the older weight and spectral norms are folded into the
    weights; shared modules and parameters get values of their own; parameters made in inference mode and modules that
    compile themselves become ordinary ones. Outputs in eval mode stay as they were. Warnings report masks and shared
    parameters, because quantization does not keep them.
    """
    tensors = (*model.parameters(), *model.buffers())
    if not (
        any(_folds(module) for module in model.modules())
        or any(count > 1 for count in _uses(model).values())
        or any(tensor.is_inference() for tensor in tensors)
        or any(True for _ in _computed(model))
        or any(module._compiled_call_impl is not None for module in model.modules())
    ):
        return model
    result = copy_of(model).eval()  # a spectral norm counts each use in training mode
    masked = [f"{name}.{tensor}".strip(".") for name, module in result.named_modules() for tensor in _fold(module)]
    if masked:
        logger.warning("pruning masks are folded into %s; what is learnt may fill their zeros", _some(masked))
    shared = list(_unshare(result, "", {}))
    if shared:
        logger.warning("%s shared values with others in the model given and have their own now", _some(shared))
    return result


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _computed(model: nn.Module) -> Iterator[Tensor]:
    """Tensors in the modules' attributes that autograd computed; a deep copy would stop at them."""
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor) and not value.is_leaf:
                yield value


def _folds(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()
    return parametrize.is_parametrized(module) or any(
        isinstance(hook, (prune.BasePruningMethod, WeightNorm, SpectralNorm)) for hook in hooks
    )


def _fold(module: nn.Module) -> Iterator[str]:
    """Store a module's computed weights as they are used; the names of those that had a pruning mask."""
    if parametrize.is_parametrized(module):
        # Not by remove_parametrizations: it changes the class, which a copy shares with the model given.
        values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
        cls = parametrize.type_before_parametrizations(module)
        del module._modules["parametrizations"]
        module.__class__ = cls
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value))
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            yield hook._tensor_name
            prune.remove(module, hook._tensor_name)
        elif isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)


def _uses(model: nn.Module) -> Counter[int]:
    return Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))


def _unshare(module: nn.Module, prefix: str, seen: dict[int, object]) -> Iterator[str]:
    """Give each module with parameters, and each parameter, one place; the paths that got a copy."""
    for name, child in module._modules.items():
        if child is None or next(child.parameters(), None) is None:
            continue
        if id(child) in seen:
            module._modules[name] = child = copy.deepcopy(child)
            yield f"{prefix}{name}"
        seen[id(child)] = child
        yield from _unshare(child, f"{prefix}{name}.", seen)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if id(parameter) in seen:
            module._parameters[name] = parameter = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            yield f"{prefix}{name}"
        seen[id(parameter)] = parameter
