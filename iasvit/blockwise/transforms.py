"""The transforms that methods of this package apply to the network before they quantize it."""

from __future__ import annotations

from torch import Tensor, nn

from iasvit.calibration import ActivationStore
from iasvit.errors import IasvitError
from iasvit.progress import Progress
from iasvit.transforms import relu_mlps, rotate_heads, rotate_residual


def rotated(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose residual stream and heads are rotated, or one of them where the other cannot be (Swin's stream).

    Raises:
        IasvitError: neither can be.
    """
    faults = []
    for rotate in (rotate_residual, rotate_heads):
        try:
            model = rotate(model, seed)
        except IasvitError as error:
            faults.append(str(error))
    if len(faults) == 2:
        raise IasvitError(f"nothing can be rotated here ({'; '.join(faults)}); give rotation=false")
    return model


def relu_transformed(
    model: nn.Module,
    images: ActivationStore,
    progress: Progress,
    *,
    iterations: int,
    lr: float,
    batch_size: int,
    seed: int,
    weights: dict[str, Tensor] | None = None,
) -> nn.Module:
    """A copy with ReLU MLPs, reconstructed in full precision; `weights` of their outputs' errors by block's name."""
    options = {"iterations": iterations, "lr": lr, "batch_size": batch_size, "seed": seed}
    return relu_mlps(model, images, **options, weights=weights, progress=progress)
