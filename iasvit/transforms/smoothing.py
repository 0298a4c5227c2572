"""Channel smoothing: part of what differs between the channels of an activation goes into the weight that reads it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iasvit.calibration import calibration_store
from iasvit.errors import IasvitError
from iasvit.methods import Calibration
from iasvit.models import Activation, NormLinearPair, adapter_for, segments
from iasvit.transforms.record import Step, changeable, recorded


@torch.no_grad()
def smooth_channels(
    model: nn.Module, images: Calibration, *, alpha: float = 0.5, batch_size: int = 32, memory_budget: int | None = None
) -> nn.Module:
    """A copy whose LayerNorm→Linear pairs are smoothed (SmoothQuant, arXiv:2211.10438, equation 4).

    With s_j = max|X_j|^α / max|W_j|^(1-α) of channel j, over the images and over all Linears that read the LayerNorm,
    γ' = γ / s, β' = β / s and W' = W·diag(s): exact, and the channels differ less. Channels that are zero stay as they
    are.

    Args:
        model: of a family that names its pairs, in full precision; left as it is.
        images: calibration images, as for `iasvit.quantize`.
        alpha: from 0 (all that differs stays in the activation) to 1 (all goes to the weight).
        batch_size: images a forward pass.
        memory_budget: bytes of images to hold; None for what is free.

    Raises:
        IasvitError: alpha is out of its range, the model has no pairs, or NaN or Inf come out of a LayerNorm.
    """
    if not 0 <= alpha <= 1:
        raise IasvitError(f"alpha is {alpha}, but a number from 0 to 1 is expected")
    result = changeable(model)
    device = next(result.parameters()).device
    pairs = adapter_for(result).pairs(result)
    if not pairs:
        raise IasvitError(f"a {type(result).__name__} has no LayerNorm→Linear pairs to smooth")
    largest: dict[nn.Module, Tensor] = {}

    def watch(norm: nn.Module, _args: object, output: Tensor) -> None:
        found = output.abs().flatten(0, -2).amax(dim=0)
        largest[norm] = torch.maximum(largest[norm], found) if norm in largest else found

    handles = [pair.norm.register_forward_hook(watch) for pair in pairs]
    try:
        for batch in calibration_store(images, device, memory_budget).batches(batch_size):
            x: Activation = batch
            for segment in segments(result):
                x = segment.run(x)
    finally:
        for handle in handles:
            handle.remove()
    for pair in pairs:
        if pair.norm not in largest:
            raise IasvitError(f"layer {pair.name!r} was not reached by the calibration images")
        if not torch.isfinite(largest[pair.norm]).all():
            raise IasvitError(f"layer {pair.name!r} outputs NaN or Inf for the calibration images; check the model")
        _smooth(pair, largest[pair.norm], alpha)
    return recorded(result, Step("smooth_channels", {"alpha": alpha}, exact=True))


def _smooth(pair: NormLinearPair, activation: Tensor, alpha: float) -> None:
    weight = torch.stack([linear.weight.abs().amax(dim=0) for linear in pair.linears]).amax(dim=0)
    scale = activation.double() ** alpha / weight.double() ** (1 - alpha)
    scale = torch.where((activation > 0) & (weight > 0), scale, torch.ones_like(scale)).to(weight.dtype)
    pair.norm.weight.div_(scale)
    pair.norm.bias.div_(scale)
    for linear in pair.linears:
        linear.weight.mul_(scale)
