"""What each layer reads and puts out, and how much the model's answer depends on it (a diagonal Fisher), captured once.

The Fisher information of a layer's output O is E[(∂ log p(y|x) / ∂O)²] with labels y drawn from the model's own
predictions p: the Hessian of the loss at the full-precision model, from first derivatives (BRECQ, arXiv:2102.05426,
section 3.1; PTQ4ViT, arXiv:2111.12293, section 3.2). PTQ4ViT's public code differentiates the KL divergence to the
full-precision predictions instead; at the full-precision model itself that gradient is zero, and what is left of it is
rounding noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iasvit.calibration.observe import enabled
from iasvit.calibration.store import ActivationStore, Collector, Store, tensors
from iasvit.errors import IasvitError
from iasvit.models import Segment, adapter_for
from iasvit.nn import QuantConv2d, QuantLinear, QuantMatMul, quantizers_of

Product = QuantLinear | QuantConv2d | QuantMatMul


@dataclass(frozen=True)
class Capture:
    """One layer or product of activations, in full precision, on all calibration images.

    Attributes:
        name: its path in the model.
        layer: the module.
        inputs: what it reads: one tensor, or a product's left and right operand. Where a Linear or Conv2d reads maps of
            different sizes, they are rows (of a Conv2d: its patches), and so is the output.
        output: what it puts out.
        fisher: squared gradients of the log-likelihood, of output's shape; None where they were not asked for.
    """

    name: str
    layer: Product
    inputs: tuple[Tensor, ...]
    output: Tensor
    fisher: Tensor | None


@torch.no_grad()
def captures(
    model: nn.Module, images: Store, labels: torch.Generator | None, batch_size: int = 16
) -> Iterator[list[Capture]]:
    """The captures of one segment (block, patch embedding, head …) after the other, each segment run once for them.

    All quantizers of the model are off until the iterator is exhausted or closed, so that every layer is captured at
    the full-precision model, whatever was done to those captured before ("parallel" order in PTQ4ViT). Only one
    segment's activations are in memory, besides the inputs of all segments.

    Args:
        model: quantizable.
        images: calibration images.
        labels: draws the labels of the Fisher, one an image; None for no Fisher. With it, segments come from last to
            first, as gradients do; without it, from first to last.
        batch_size: images a pass.

    Raises:
        IasvitError: NaN or Inf in activations (the layer or block is named); an output that is no table of logits.
    """
    quantizers = [q for weights in (True, False) for q in quantizers_of(model, weights=weights)]
    adapter = adapter_for(model)
    chain = adapter.chain(model)
    with enabled(quantizers, False):
        if labels is None:
            for segment in chain:
                layers, images = _capture(segment, images, None, batch_size)
                yield layers
            return
        inputs = [images]
        for segment in chain[:-1]:
            inputs.append(inputs[-1].map(segment.run, batch_size, segment.name))
        chain[-1] = replace(chain[-1], run=lambda x: adapter.log_likelihood(model, x, labels))
        gradients: Store = ActivationStore()
        gradients.append(torch.ones(len(images), device=images.device))
        for segment in reversed(chain):
            layers, gradients = _capture(segment, inputs.pop(), gradients, batch_size)
            yield layers


def _capture(segment: Segment, inputs: Store, gradients: Store | None, batch_size: int) -> tuple[list[Capture], Store]:
    """The segment's captures, and its outputs; or where the gradients at its outputs are given, those at its inputs."""
    names = {
        module: f"{prefix}.{name}".strip(".")
        for prefix, root in segment.modules
        for name, module in root.named_modules()
        if isinstance(module, Product)
    }
    parts: dict[nn.Module, list[tuple[Tensor, ...]]] = {}  # layer → for each batch (*inputs, output, fisher or not)
    calls: list[tuple[nn.Module, tuple[Tensor, ...], Tensor]] = []
    result, done = Collector(inputs), 0
    hooks = [m.register_forward_hook(lambda module, args, output: calls.append((module, args, output))) for m in names]
    try:
        for batch in inputs.batches(batch_size):
            calls.clear()
            fishers: list[tuple[Tensor, ...]]
            if gradients is None:
                result.append(segment.run(batch), batch)
                fishers = [()] * len(calls)
            else:
                leaves = [tensor.requires_grad_(True) for tensor in tensors(batch)]
                with torch.enable_grad():
                    outputs = tensors(segment.run(batch))
                    wanted = (*leaves, *(output for *_, output in calls))
                    at_outputs = tensors(gradients.gather(range(done, done + len(leaves[0]))))
                    found = torch.autograd.grad(outputs, wanted, at_outputs)
                at_inputs, at_layers = found[: len(leaves)], found[len(leaves) :]
                result.append(at_inputs if isinstance(batch, tuple) else at_inputs[0])
                fishers = [(gradient.square(),) for gradient in at_layers]
                done += len(leaves[0])
            for (module, args, output), fisher in zip(calls, fishers, strict=True):
                parts.setdefault(module, []).append((*(x.detach() for x in args), output.detach(), *fisher))
    finally:
        for hook in hooks:
            hook.remove()
    layers = []
    for module, name in names.items():
        if module not in parts:
            raise IasvitError(f"layer {name!r} was not reached by the calibration images; is it part of the forward?")
        captured = _joined(module, parts.pop(module))
        fisher = None if gradients is None else captured.pop()
        if not torch.isfinite(captured[-1]).all():
            raise IasvitError(f"layer {name!r} puts out NaN or Inf for the calibration images; check the model")
        layers.append(Capture(name, module, tuple(captured[:-1]), captured[-1], fisher))
    return layers, result.store()


def _joined(layer: Product, pieces: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Input(s), output and Fisher of all calls of a layer, each joined; of maps of different sizes, as rows."""
    if isinstance(layer, QuantMatMul) or len({x.shape[1:] for x, *_ in pieces}) == 1:
        return [torch.cat(batches) for batches in zip(*pieces, strict=True)]
    rows = []
    for x, *outputs in pieces:
        if isinstance(layer, QuantConv2d):
            x = patches(layer, x)
            outputs = [output.flatten(2).mT for output in outputs]
        rows.append([tensor.flatten(0, -2) for tensor in (x, *outputs)])
    return [torch.cat(batches) for batches in zip(*rows, strict=True)]


def patches(layer: QuantConv2d, x: Tensor) -> Tensor:
    """What each output position of a convolution reads: (B, C, H, W) → (B, positions, C·kernel)."""
    return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
