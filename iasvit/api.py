"""The call that a user makes: quantize."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from iasvit import distributed
from iasvit.artifact import Quantization
from iasvit.calibration import looked_at
from iasvit.errors import IasvitError
from iasvit.label import label
from iasvit.methods import Calibration, Method, get_method
from iasvit.models import (
    INCOMPLETE,
    adapter_for,
    check_chain,
    check_parameters,
    check_size,
    describe,
    plain,
    unwrap,
    why_not_saved,
)
from iasvit.options import without_bounds
from iasvit.progress import Progress
from iasvit.spec import QuantSpec
from iasvit.transforms import transforms_of

logger = logging.getLogger(__name__)


def quantize(
    model: nn.Module,
    calibration: Calibration,
    spec: str | QuantSpec = "W3A3",
    method: str | Method = "ias_vit",
    *,
    progress: Progress | None = None,
    **options: Any,
) -> nn.Module:
    """Return a quantized copy of a model, which is called like the model. The given model is left untouched.

    Before any work, one image shows whether the quantizable parts compute what the model computes. If they do not, as
    with a forward of its own or a hook inside, the model is refused. Hooks of the whole model are supported. Shared
    parameters, pruning masks and parametrizations become ordinary values in the copy.

    If a group of torch.distributed is initialised, all its processes must make this call with the same arguments, each
    with the model on its own device. They share the work and get the same quantized model.

    Args:
        model: a timm ViT, DeiT or Swin, on any device; out of DataParallel and torch.compile it is taken.
        calibration: images as the model takes them, a float tensor N×3×H×W or an iterable of such batches, with one
            pass in it.
        spec: "W3A3", "W4A8", "W3A3,head=W8A8" or a QuantSpec.
        method: a name of `list_methods()`, also with ingredients off, "ias_vit[-sulq]"; or a Method.
        progress: where to report to and to resume from; None for silence.
        **options: of the method: `seed` for all; `iterations`, `batch_size` and `lr` where it reconstructs;
            `memory_budget`, as "8GiB", which bounds what is allocated and changes no result.

    Returns:
        The quantized model in eval mode, on the same device. Every quantizer inside has `n_bits`, `encode`, `decode`
        and, where it has one, an integer `zero_point`. How it was made is in its attribute `quantization`.

    Raises:
        IasvitError: bad bits, method, option or calibration, a module that is not supported or computes what its family
            does not, NaN or Inf in activations (the message names the layer), or processes of a group that are given
            different things.
    """
    spec = QuantSpec.parse(spec)
    if isinstance(method, str):
        method = get_method(method, **options)
    elif options:
        raise IasvitError(f"options {', '.join(options)} go with a method's name; set them on the Method given instead")
    given = model = unwrap(model)
    if hasattr(model, "quantization"):
        raise IasvitError("the model given is quantized already; give the full-precision one")
    adapter = adapter_for(model)
    check_parameters(model)
    training = {module: module.training for module in given.modules()}
    given.eval()
    try:
        with _usual_modes(next(given.parameters()).device):
            model = plain(given)
            description, data = describe(model), adapter.data(model)
            image, calibration = _checked(model, calibration, spec)
            options = asdict(method) if is_dataclass(method) else {}
            known: dict[str, Any] = without_bounds(type(method), options)
            others = (spec, method.name, options, progress is not None and progress.checkpoint is not None)
            distributed.check_equal("the model, images, bits or options", model.state_dict().values(), image, *others)
            why = why_not_saved(model, image)
            if why is not None:
                description[INCOMPLETE] = why
                logger.warning("the %s given can be quantized but not saved: %s", type(model).__name__, why)
            quantized = method.quantize(model, calibration, spec, progress or Progress())
            distributed.check_equal("the quantized models", quantized.state_dict().values())
    finally:
        for module, mode in training.items():
            module.training = mode
    quantized.eval()
    steps = []
    if (transforms := transforms_of(quantized)) is not None:
        unknown = {key: value for key, value in description.items() if key == INCOMPLETE}
        description, steps = {**transforms.architecture, **unknown}, [asdict(step) for step in transforms.steps]
    variant = getattr(method, "variant", method.name)
    label(quantized, Quantization(variant, str(spec), known, description, data, steps))
    return quantized


@contextmanager
def _usual_modes(device: torch.device) -> Iterator[None]:
    """torch's own modes and defaults, whatever the caller's are: gradients, as methods learn; float32; the CPU.

    The current GPU is the model's.
    """
    dtype = torch.get_default_dtype()
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    # Not torch.get_default_device, which fails in torch 2.7 and 2.8 after set_default_device(None).
    default = nullcontext() if torch.empty(0).device.type == "cpu" else torch.device("cpu")
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            default,
            current,
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _checked(model: nn.Module, calibration: Calibration, spec: QuantSpec) -> tuple[Tensor, Calibration]:
    """The first calibration image, on the model's device and through all that is checked before the work; and all."""
    device = next(model.parameters()).device

    def on_device(image: Tensor) -> Tensor:
        return image.to(device, torch.float32)

    first, images = looked_at(calibration, lambda image: check_size(model, on_device(image)))
    first = on_device(first)
    if not torch.isfinite(first).all():
        raise IasvitError("calibration images hold NaN or Inf; give normalised, finite images")
    check_chain(model, first, spec)
    return first, list(images) if isinstance(calibration, (list, tuple)) else images
