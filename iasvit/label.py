"""A label that says how a quantized model was made. It is kept in the state dict and compared when one is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from iasvit.errors import IasvitError
from iasvit.quantizers import Quantizer

if TYPE_CHECKING:
    from iasvit.artifact import Quantization

KEY = "quantization._extra_state"


def label(model: nn.Module, quantization: Quantization) -> None:
    """Put `quantization` on a quantized model, and method, spec and options into the state dicts that it gives.

    From then on the model refuses a state dict of another method or other bits before any of it is loaded, and takes
    over the options with the state of its own.
    """
    model.quantization = quantization
    model.register_state_dict_post_hook(_write)
    model.register_load_state_dict_pre_hook(_read)


def _write(model: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    quantization: Quantization = model.quantization
    made = {"method": quantization.method, "spec": quantization.spec, "options": quantization.options}
    state[prefix + KEY] = torch.tensor(list(json.dumps(made).encode()), dtype=torch.uint8)


def _read(
    model: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: dict[str, Any], strict: bool, *_: Any
) -> None:
    quantization: Quantization = model.quantization
    made = _decoded(state.pop(prefix + KEY, None))
    mine = f"{quantization.method} at {quantization.spec}"
    if made is not None and (made["method"], made["spec"]) != (quantization.method, quantization.spec):
        raise IasvitError(
            f"the given state comes from a model quantized by {made['method']} at {made['spec']}, but is loaded into "
            f"one by {mine}; load it into a model that was made in the same way"
        )
    quantizers = [(name, module) for name, module in model.named_modules() if isinstance(module, Quantizer)]
    if strict and not any(f"{prefix}{name}._extra_state" in state for name, _ in quantizers):
        raise IasvitError(
            f"the state given holds no quantizers, but is loaded into a model quantized by {mine}; load it into the "
            "full-precision model and quantize that"
        )
    for name, quantizer in quantizers:
        config = _decoded(state.get(f"{prefix}{name}._extra_state"))
        if config is None:
            continue
        theirs, own = ({key: c.get(key) for key in ("kind", "n_bits")} for c in (config, quantizer.config()))
        if theirs != own:
            raise IasvitError(
                f"the state given has at {name!r} a quantizer {theirs['kind']!r} of {theirs['n_bits']} bits, but the "
                f"model by {mine} has {own['kind']!r} of {own['n_bits']}; load it into a model that was made in the "
                "same way"
            )
    if made is not None:
        model.quantization = replace(quantization, options=made["options"])


def _decoded(state: Tensor | None) -> dict[str, Any] | None:
    return None if state is None else json.loads(bytes(state.tolist()))
