"""What each layer reads and puts out, and how much the model's answer depends on it (a diagonal Fisher), captured once.

The Fisher information of a layer's output O is E[(∂ log p(y|x) / ∂O)²] with labels y drawn from the model's own
predictions p: the Hessian of the loss at the full-precision model, from first derivatives (BRECQ, arXiv:2102.05426,
section 3.1; PTQ4ViT, arXiv:2111.12293, section 3.2). PTQ4ViT's public code differentiates the KL divergence to the
full-precision predictions instead; at the full-precision model itself that gradient is zero, and what is left of it is
rounding noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iasvit.calibration import ActivationStore, enabled
from iasvit.errors import IasvitError
from iasvit.models import Segment, segments
from iasvit.nn import QuantConv2d, QuantLinear, QuantMatMul, quantizers_of

Product = QuantLinear | QuantConv2d | QuantMatMul


@dataclass(frozen=True)
class Capture:
    """One layer or product of activations, in full precision, on all calibration images.

    Attributes:
        name: its path in the model.
        layer: the module.
        inputs: what it reads: one tensor, or a product's left and right operand.
        output: what it puts out.
        fisher: squared gradients of the log-likelihood, of output's shape; None where they were not asked for.
    """

    name: str
    layer: Product
    inputs: tuple[Tensor, ...]
    output: Tensor
    fisher: Tensor | None


def label_gradient(logits: Tensor, generator: torch.Generator) -> Tensor:
    """∂ log p(y|x) / ∂logits = onehot(y) - p for a label y drawn from p = softmax(logits); both (B, classes).

    Args:
        logits: of any device.
        generator: a CPU generator; the same state gives the same labels.

    Raises:
        IasvitError: the output is no table of logits.
    """
    if logits.ndim != 2:
        raise IasvitError(
            f"the model puts out {tuple(logits.shape)}, but a Fisher-weighted search needs logits (images, classes)"
        )
    p = logits.detach().cpu().double().softmax(dim=1)
    labels = torch.multinomial(p, 1, generator=generator)
    return (-p).scatter_add_(1, labels, torch.ones_like(p[:, :1])).to(logits)


@torch.no_grad()
def captures(
    model: nn.Module, images: ActivationStore, labels: torch.Generator | None, batch_size: int = 16
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
    chain = segments(model)
    with enabled(quantizers, False):
        if labels is None:
            for segment in chain:
                layers, images = _capture(segment, images, None, batch_size)
                yield layers
            return
        inputs = [images]
        for segment in chain:
            inputs.append(inputs[-1].map(segment.run, batch_size, segment.name))
        gradients = inputs.pop().map(lambda logits: label_gradient(logits, labels), batch_size, "head")
        for segment in reversed(chain):
            layers, gradients = _capture(segment, inputs.pop(), gradients, batch_size)
            yield layers


def _capture(
    segment: Segment, inputs: ActivationStore, gradients: ActivationStore | None, batch_size: int
) -> tuple[list[Capture], ActivationStore]:
    """The segment's captures, and its outputs; or where the gradients at its outputs are given, those at its inputs."""
    names = {
        module: f"{prefix}.{name}".strip(".")
        for prefix, root in segment.modules
        for name, module in root.named_modules()
        if isinstance(module, Product)
    }
    parts: dict[nn.Module, list[tuple[Tensor, ...]]] = {}  # layer → for each batch (*inputs, output, fisher or not)
    calls: list[tuple[nn.Module, tuple[Tensor, ...], Tensor]] = []
    result = ActivationStore(inputs.memory_budget)
    hooks = [m.register_forward_hook(lambda module, args, output: calls.append((module, args, output))) for m in names]
    try:
        for batch in inputs.batches(batch_size):
            calls.clear()
            fishers: list[tuple[Tensor, ...]]
            if gradients is None:
                result.append(segment.run(batch))
                fishers = [()] * len(calls)
            else:
                with torch.enable_grad():
                    outputs = segment.run(batch.requires_grad_(True))
                    wanted = (batch, *(output for *_, output in calls))
                    at_outputs = gradients.gather(range(len(result), len(result) + len(batch)))
                    at_inputs, *at_layers = torch.autograd.grad(outputs, wanted, at_outputs)
                result.append(at_inputs)
                fishers = [(gradient.square(),) for gradient in at_layers]
            for (module, args, output), fisher in zip(calls, fishers, strict=True):
                parts.setdefault(module, []).append((*(x.detach() for x in args), output.detach(), *fisher))
    finally:
        for hook in hooks:
            hook.remove()
    layers = []
    for module, name in names.items():
        if module not in parts:
            raise IasvitError(f"layer {name!r} was not reached by the calibration images; is it part of the forward?")
        tensors = [torch.cat(batches) for batches in zip(*parts.pop(module), strict=True)]
        fisher = None if gradients is None else tensors.pop()
        if not torch.isfinite(tensors[-1]).all():
            raise IasvitError(f"layer {name!r} puts out NaN or Inf for the calibration images; check the model")
        layers.append(Capture(name, module, tuple(tensors[:-1]), tensors[-1], fisher))
    return layers, result
