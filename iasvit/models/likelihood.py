"""Labels drawn from a model's own predictions, and the gradient of their log-likelihood: what a Fisher is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from iasvit.errors import IasvitError


def label_gradient(logits: Tensor, generator: torch.Generator) -> Tensor:
    """∂ log p(y|x) / ∂logits = onehot(y) - p for a label y drawn from p = softmax(logits); both (B, classes).

    Args:
        logits: of any device.
        generator: a CPU generator; the same state gives the same labels.

    Raises:
        IasvitError: the output is no table of logits, or holds NaN or Inf.
    """
    if logits.ndim != 2:
        raise IasvitError(
            f"the model outputs {tuple(logits.shape)}, but a Fisher-weighted search needs logits (images, classes)"
        )
    if not torch.isfinite(logits).all():
        raise IasvitError("layer 'head' outputs NaN or Inf for the calibration images; check the model")
    p = logits.detach().cpu().double().softmax(dim=1)
    labels = torch.multinomial(p, 1, generator=generator)
    return (-p).scatter_add_(1, labels, torch.ones_like(p[:, :1])).to(logits)
