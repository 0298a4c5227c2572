"""Ranges of uniform quantizers by the error of a layer's output, operand by operand, in full-precision surroundings."""

from __future__ import annotations

import torch
from torch import nn

from iasvit.calibration import ActivationStore


def search_outputs(quantized: nn.Module, images: ActivationStore, size: int, share: int | None) -> None:
    """To come."""
    raise NotImplementedError
