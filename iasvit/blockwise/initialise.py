"""How activation quantizers are set before anything is learnt; weights take the range of least error of their own."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor, nn

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
from iasvit.nn import QuantLayer, QuantMatMul, quant_layers, quantizers_of
from iasvit.quantizers import Quantizer, UniformQuantizer
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
INITIALISATIONS: dict[str, Initialisation] = {"propagated": propagated, "observed": observed, "searched": observed}


def initialise(name: str, quantized: nn.Module, images: ActivationStore, size: int, share: int | None) -> None:
    """Set all quantizers of a quantizable model: activations, then pairs made per tensor, then weights.

    Args:
        name: of the activations' initialisation. "searched" is "observed", and then a search of all ranges by what each
            layer puts out (`search_outputs`). After "propagated" those of layers that nothing learns are searched so, a
            detector's neck and heads.
        quantized: none of its quantizers calibrated.
        images: calibration images.
        size: how many of them are read.
        share: bytes for each store of activations; None for no limit.
    """
    INITIALISATIONS[name](quantized, images, size, share)
    fold(quantized)
    calibrate_weights(quant_layers(quantized))
    if name == "searched":
        search_outputs(quantized, images, size, share)
    elif name == "propagated" and (fixed := _not_learnt(quantized)):
        search_outputs(quantized, images, size, share, fixed)


def _not_learnt(quantized: nn.Module) -> set[nn.Module]:
    """Layers and products of the segments that are calibrated only."""
    roots = [root for segment in segments(quantized) if not segment.reconstruct for _, root in segment.modules]
    return {module for root in roots for module in root.modules() if isinstance(module, QuantLayer | QuantMatMul)}


@torch.no_grad()
def per_token(quantized: nn.Module, image: Tensor) -> None:
    """Give uniform activation quantizers of one scale a scale and zero-point for each token's position, all equal yet.

    A Linear's inputs (B, tokens, C) and the left operands of products, queries and attention maps, have them along the
    tokens, and right operands along their last dimension: keys along the tokens, values along the channels. What has
    another shape, as the head's inputs and Swin's maps (B, H, W, C), keeps its one scale. (FIMA-Q's public
    configurations also have one for each head, and for each position of a map.)

    Args:
        quantized: all its quantizers calibrated.
        image: (1, 3, H, W), to see how many tokens there are.
    """
    found: dict[Quantizer, tuple[int, int]] = {}

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if isinstance(module, QuantMatMul):
            found[module.left_quantizer] = -2, args[0].shape[-2]
            found[module.right_quantizer] = -1, args[1].shape[-1]
        elif module.input_quantizer is not None and args[0].ndim == 3:
            found[module.input_quantizer] = -2, args[0].shape[-2]

    modules = [module for module in quantized.modules() if isinstance(module, QuantLayer | QuantMatMul)]
    handles = [module.register_forward_pre_hook(see) for module in modules]
    try:
        quantized(image)
    finally:
        for handle in handles:
            handle.remove()
    for quantizer, (dim, size) in found.items():
        if isinstance(quantizer, UniformQuantizer) and quantizer.channel_dim is None and quantizer.calibrated:
            quantizer.channel_dim = dim
            quantizer.set_parameters(quantizer.scale.expand(size), quantizer.zero_point.expand(size))
