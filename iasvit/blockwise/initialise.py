"""How activation quantizers are set before anything is learnt; weights take the range of least error of their own."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import nn

from iasvit.calibration import (
    ActivationStore,
    calibrate_in_stream,
    calibrate_inputs,
    enabled,
    run_all,
)
from iasvit.models import find_pairs, segments
from iasvit.nn import quantizers_of
from iasvit.reparam import reparameterize


def propagated(quantized: nn.Module, images: ActivationStore, size: int, share: int | None) -> None:
    """Activation ranges by one pass of the quantized model, weights in full precision: I&S-ViT's code does so.

    Each quantizer sees what those before it, in its block and in earlier ones, have made of the activations.
    """
    with enabled(list(quantizers_of(quantized, weights=True)), False):
        batches = images.batches(images.passes(size), limit=size)
        calibrate_in_stream(quantized, run_all(lambda batch: batch, batches, share), share)


def observed(quantized: nn.Module, images: ActivationStore, size: int, share: int | None) -> None:
    """Each activation quantizer by itself on the full-precision model's activations, the range of least error."""
    with enabled(list(quantizers_of(quantized, weights=True)), False):
        activations = run_all(lambda batch: batch, images.batches(images.passes(size), limit=size), share)
        for segment in segments(quantized):
            run = partial(run_all, segment.run, activations, share)
            activations = calibrate_inputs(segment.quantizers(weights=False), run, share)


@torch.no_grad()
def fold(quantized: nn.Module, layers: Collection[nn.Module] | None = None) -> None:
    """Make LayerNorm→Linear pairs per tensor, exactly where weights are in full precision; those of these layers."""
    for pair in find_pairs(quantized):
        linear = pair.linears[0]
        quantizer = linear.input_quantizer
        per_channel = getattr(quantizer, "channel_dim", None) is not None
        if per_channel and quantizer.enabled and (layers is None or linear in layers):
            reparameterize(pair)


Initialisation = Callable[[nn.Module, ActivationStore, int, int | None], None]
INITIALISATIONS: dict[str, Initialisation] = {"propagated": propagated, "observed": observed}
