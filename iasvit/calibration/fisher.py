"""What each layer reads and outputs, and how much the model's answer depends on it (a diagonal Fisher), captured once.

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
from iasvit.calibration.spill import FileTensor, Table, pieces
from iasvit.calibration.store import ActivationStore, Collector, Store, tensors
from iasvit.errors import IasvitError
from iasvit.models import Segment, adapter_for
from iasvit.nn import QuantConv2d, QuantLinear, QuantMatMul, quantizers_of

BATCH_SIZE = 16  # images a pass

Product = QuantLinear | QuantConv2d | QuantMatMul


@dataclass(frozen=True)
class Capture:
    """One layer or product of activations, in full precision, on all calibration images.

    Attributes:
        name: its path in the model.
        layer: the module.
        inputs: what it reads: one tensor, or a product's left and right operand. Where a Linear or Conv2d reads maps of
            different sizes, or where captures are in files, they are rows (of a Conv2d: its patches), and so is the
            output; of a product in files, they are matrices.
        output: what it outputs.
        fisher: squared gradients of the log-likelihood, of output's shape; None where they were not asked for.
    """

    name: str
    layer: Product
    inputs: tuple[Table, ...]
    output: Table
    fisher: Table | None


@torch.no_grad()
def captures(
    model: nn.Module,
    images: ActivationStore,
    labels: torch.Generator | None,
    batch_size: int = BATCH_SIZE,
    memory_budget: int | None = None,
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
        batch_size: images a pass; large ones are fewer.
        memory_budget: bytes of captures of a segment beyond which they go to files; None for no limit.

    Raises:
        IasvitError: NaN or Inf in activations (the layer or block is named); an output that is no table of logits.
    """
    quantizers = [q for weights in (True, False) for q in quantizers_of(model, weights=weights)]
    adapter = adapter_for(model)
    chain = adapter.chain(model)
    batch_size = images.passes(batch_size, gradients=True)
    size = (batch_size, memory_budget)
    inputs: list[Store] = [images]
    with enabled(quantizers, False):
        if labels is None:
            for segment in chain:
                layers, outputs = _capture(segment, inputs.pop(), None, *size)
                inputs.append(outputs)
                yield layers
            return
        for segment in chain[:-1]:
            inputs.append(inputs[-1].map(segment.run, batch_size, segment.name))
        chain[-1] = replace(chain[-1], run=lambda x: adapter.log_likelihood(model, x, labels))
        gradients: Store = ActivationStore(images.memory_budget, images.folder)
        gradients.append(torch.ones(len(images), device=images.device))
        for segment in reversed(chain):
            layers, gradients = _capture(segment, inputs.pop(), gradients, *size)
            yield layers


def _capture(
    segment: Segment, inputs: Store, gradients: Store | None, batch_size: int, memory_budget: int | None
) -> tuple[list[Capture], Store]:
    """The segment's captures, and its outputs; or where the gradients at its outputs are given, those at its inputs."""
    names = {
        module: f"{prefix}.{name}".strip(".")
        for prefix, root in segment.modules
        for name, module in root.named_modules()
        if isinstance(module, Product)
    }
    parts: dict[nn.Module, list[tuple[Tensor, ...]]] = {}  # layer → for each batch (*inputs, output, fisher or not)
    files: dict[nn.Module, list[FileTensor]] | None = None
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
            found_here = [
                (module, (*(x.detach() for x in args), output.detach(), *fisher))
                for (module, args, output), fisher in zip(calls, fishers, strict=True)
            ]
            if not parts and files is None and memory_budget is not None:
                size = sum(x.numel() * x.element_size() for _, captured in found_here for x in captured)
                files = {} if size * len(inputs) > memory_budget * len(tensors(batch)[0]) else None
            while found_here:
                module, captured = found_here.pop(0)
                if files is None:
                    parts.setdefault(module, []).append(captured)
                else:
                    _to_files(files, module, captured)
    finally:
        for hook in hooks:
            hook.remove()
    layers = []
    for module, name in names.items():
        if module not in (parts if files is None else files):
            raise IasvitError(f"layer {name!r} was not reached by the calibration images; is it part of the forward?")
        captured = _joined(module, parts.pop(module)) if files is None else files.pop(module)
        fisher = None if gradients is None else captured.pop()
        if not all(torch.isfinite(captured[-1][piece]).all() for piece in pieces(captured[-1])):
            raise IasvitError(f"layer {name!r} outputs NaN or Inf for the calibration images; check the model")
        layers.append(Capture(name, module, tuple(captured[:-1]), captured[-1], fisher))
    return layers, result.store()


def _joined(layer: Product, calls: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Input(s), output and Fisher of all calls of a layer, each joined; of maps of different sizes, as rows."""
    if not (isinstance(layer, QuantMatMul) or len({x.shape[1:] for x, *_ in calls}) == 1):
        calls = [as_rows(layer, call) for call in calls]
    return [torch.cat(batches) for batches in zip(*calls, strict=True)]


def as_rows(layer: Product, call: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Input, output and Fisher of one call of a Linear or Conv2d as rows; of a product, as matrices."""
    x, *outputs = call
    if isinstance(layer, QuantMatMul):
        return tuple(tensor.flatten(0, -3) for tensor in call)
    if isinstance(layer, QuantConv2d):
        x = patches(layer, x)
        outputs = [output.flatten(2).mT for output in outputs]
    return tuple(tensor.flatten(0, -2) for tensor in (x, *outputs))


def _to_files(files: dict[nn.Module, list[FileTensor]], layer: Product, call: tuple[Tensor, ...]) -> None:
    rows = as_rows(layer, call)
    if layer not in files:
        files[layer] = [FileTensor(x) for x in rows]
    else:
        for file, x in zip(files[layer], rows, strict=True):
            file.append(x)


def patches(layer: QuantConv2d, x: Tensor) -> Tensor:
    """What each output position of a convolution reads: (B, C, H, W) → (B, positions, C·kernel)."""
    return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
