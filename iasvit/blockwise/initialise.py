"""How quantizers are set before anything is learnt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from iasvit.blockwise.output_search import search_outputs
from iasvit.calibration import (
    ActivationStore,
    calibrate_in_stream,
    calibrate_inputs,
    calibrate_weights,
    enabled,
    run_all,
)
from iasvit.models import find_pairs, segments
from iasvit.nn import quant_layers, quantizers_of
from iasvit.reparam import reparameterize


def propagated(quantized: nn.Module, images: ActivationStore, size: int, share: int | None) -> None:
    """Activation ranges by one pass of the quantized model, weights in full precision: I&S-ViT's code does so.

    Each quantizer sees what those before it, in its block and in earlier ones, have made of the activations. Then
    LayerNorm→Linear pairs become per tensor, and weights get the range of least error of their own.
    """
    with enabled(list(quantizers_of(quantized, weights=True)), False):
        batches = images.batches(images.passes(size), limit=size)
        calibrate_in_stream(quantized, run_all(lambda batch: batch, batches, share), share)
    _fold(quantized)
    calibrate_weights(quant_layers(quantized))


def observed(quantized: nn.Module, images: ActivationStore, size: int, share: int | None) -> None:
    """Each activation quantizer by itself on the full-precision model's activations, the range of least error."""
    with enabled(list(quantizers_of(quantized, weights=True)), False):
        activations = run_all(lambda batch: batch, images.batches(images.passes(size), limit=size), share)
        for segment in segments(quantized):
            run = partial(run_all, segment.run, activations, share)
            activations = calibrate_inputs(segment.quantizers(weights=False), run, share)
    _fold(quantized)
    calibrate_weights(quant_layers(quantized))


def searched(quantized: nn.Module, images: ActivationStore, size: int, share: int | None) -> None:
    """As `observed`, then each layer's operands in turn by the error of its output (AdaLog's code line); see there."""
    observed(quantized, images, size, share)
    search_outputs(quantized, images, size, share)


@torch.no_grad()
def _fold(quantized: nn.Module) -> None:
    for pair in find_pairs(quantized):
        quantizer = pair.linears[0].input_quantizer
        if getattr(quantizer, "channel_dim", None) is not None and quantizer.enabled:
            reparameterize(pair)


Initialisation = Callable[[nn.Module, ActivationStore, int, int | None], None]
INITIALISATIONS: dict[str, Initialisation] = {"propagated": propagated, "observed": observed, "searched": searched}
