"""The transforms that methods of this package apply to the network before they quantize it."""

from __future__ import annotations

import importlib
from contextlib import suppress
from typing import Any

from torch import nn

from iasvit.calibration import ActivationStore
from iasvit.errors import IasvitError
from iasvit.progress import Progress


def _transforms() -> Any:
    try:
        return importlib.import_module("iasvit.transforms")
    except ImportError as error:
        raise IasvitError("this version of iasvit has no transforms; give rotation=false and relu=false") from error


def rotated(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose residual stream and heads are rotated; only the heads where the stream cannot be."""
    transforms = _transforms()
    with suppress(IasvitError):  # Swin: LayerNorms between streams of several widths stay
        model = transforms.rotate_residual(model, seed)
    return transforms.rotate_heads(model, seed)


def relu_transformed(
    model: nn.Module, images: ActivationStore, progress: Progress, *, iterations: int, lr: float, seed: int
) -> nn.Module:
    """A copy with ReLU MLPs, reconstructed in full precision."""
    return _transforms().relu_mlps(
        model, images, iterations=iterations, lr=lr, batch_size=32, seed=seed, clamp_percentile=0.99, progress=progress
    )
