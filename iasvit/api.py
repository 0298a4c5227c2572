"""The call that a user makes: quantize."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import nn

from iasvit.artifact import Quantization
from iasvit.errors import IasvitError
from iasvit.methods import Calibration, Method, get_method
from iasvit.models import describe
from iasvit.progress import Progress
from iasvit.spec import QuantSpec


def quantize(
    model: nn.Module,
    calibration: Calibration,
    spec: str | QuantSpec = "W3A3",
    method: str | Method = "ias_vit",
    *,
    progress: Progress | None = None,
    **options: Any,
) -> nn.Module:
    """A quantized copy of a model, called as the model is; the model given is left untouched.

    Args:
        model: a timm ViT, DeiT or Swin, on any device.
        calibration: images as the model takes them, a float tensor N×3×H×W or an iterable of such batches, with one
            pass in it.
        spec: "W3A3", "W4A8", "W3A3,head=W8A8" or a QuantSpec.
        method: a name of `list_methods()`, also with ingredients off, "ias_vit[-sulq]"; or a Method.
        progress: where to report to and to resume from; None for silence.
        **options: of the method: `seed` for all; `iterations`, `batch_size` and `lr` where it reconstructs.

    Returns:
        The quantized model in eval mode, on the same device. Every quantizer inside has `n_bits`, `encode`, `decode`
        and, where it has one, an integer `zero_point`. How it was made is in its attribute `quantization`.

    Raises:
        IasvitError: bad bits, method, option or calibration, a module that is not supported, NaN or Inf in activations
            (the message names the layer).
    """
    spec = QuantSpec.parse(spec)
    if isinstance(method, str):
        method = get_method(method, **options)
    elif options:
        raise IasvitError(f"options {', '.join(options)} go with a method's name; set them on the Method given instead")
    if hasattr(model, "quantization"):
        raise IasvitError("the model given is quantized already; give the full-precision one")
    description = describe(model)
    dtypes = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if dtypes:
        raise IasvitError(f"the model given has {dtypes.pop()} parameters; give it in float32, as model.float() is")
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():  # the caller's mode may be no_grad; methods learn
            quantized = method.quantize(model, calibration, spec, progress or Progress())
    finally:
        for module, mode in training.items():
            module.training = mode
    quantized.eval()
    known: dict[str, Any] = asdict(method) if is_dataclass(method) else {}
    data = {key: value for key, value in resolve_data_config(model=model).items() if value is not None}
    name = getattr(method, "variant", method.name)
    quantized.quantization = Quantization(name, str(spec), known, description, data)
    return quantized
