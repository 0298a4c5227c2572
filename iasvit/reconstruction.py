"""Block-wise reconstruction that streams from block to block: O(L) block passes for a model of L blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from iasvit.calibration import ActivationStore, calibration_store
from iasvit.methods import Calibration
from iasvit.models import Segment, segments
from iasvit.progress import Progress


@dataclass(frozen=True)
class SegmentJob:
    """What reconstruction of one segment works with.

    Attributes:
        index: position of the segment in the model.
        segment: of the quantized model.
        inputs_fp: inputs of the segment in the full-precision model.
        inputs_q: inputs of the segment in the quantized model, all segments before it being quantized.
        targets: the full-precision segment's outputs for inputs_fp.
        bar: progress bar, to be moved as work is done.
    """

    index: int
    segment: Segment
    inputs_fp: ActivationStore
    inputs_q: ActivationStore
    targets: ActivationStore
    bar: tqdm


def stream(
    model: nn.Module,
    quantized: nn.Module,
    calibration: Calibration,
    fit: Callable[[SegmentJob], None],
    progress: Progress,
    *,
    batch_size: int = 64,
    steps: int = 0,
    memory_budget: int | None = None,
) -> None:
    """Quantize a model segment by segment; `fit` does the work on one.

    The outputs of a segment are the inputs of the next, in both models, so that no segment runs twice on the same
    activations. After each segment the quantized model goes to the progress journal, and a later run with the same
    journal goes on from there.

    Args:
        model: full precision, eval mode.
        quantized: its quantizable copy; `fit` changes the segments in order.
        calibration: images N×3×H×W, or batches of them.
        fit: called for each segment that has quantized layers.
        progress: of one phase, "reconstruction".
        batch_size: images a forward pass.
        steps: what `fit` moves the bar by in all, for the time left.
        memory_budget: bytes for each store of activations.
    """
    device = next(model.parameters()).device
    inputs_fp = inputs_q = calibration_store(calibration, device, memory_budget)
    chain = list(zip(segments(model), segments(quantized), strict=True))
    done = -1
    restored = progress.restore()
    if restored is not None:
        done, state = restored
        quantized.load_state_dict(state)
    with progress.phase("reconstruction", steps) as bar:
        if restored is not None and steps:
            bar.update(steps * sum(bool(q.modules) for _, q in chain[: done + 1]) // len(chain))
        for index, (full, segment) in enumerate(chain):
            targets = inputs_fp.map(full.run, batch_size, f"{full.name} (full precision)")
            if index > done and segment.modules:
                fit(SegmentJob(index, segment, inputs_fp, inputs_q, targets, bar))
                progress.save(index, quantized.state_dict())
            if index + 1 < len(chain):
                inputs_q = inputs_q.map(segment.run, batch_size, segment.name)
            inputs_fp = targets


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of the squared error summed over a sample: both (B, ...) → scalar (I&S-ViT eq. 9)."""
    return (output - target).square().flatten(1).sum(dim=1).mean()


def optimize(
    run: Callable[[Tensor], Tensor],
    parameters: Sequence[nn.Parameter],
    inputs: ActivationStore,
    targets: ActivationStore,
    *,
    iterations: int,
    batch_size: int,
    lr: float,
    generator: torch.Generator,
    bar: tqdm | None = None,
) -> float:
    """Minimise `squared_error(run(inputs), targets)` over parameters: Adam, no weight decay, cosine from lr to 0.

    Args:
        run: the segment's forward.
        parameters: what is learnt; they require gradients only meanwhile.
        inputs, targets: of the same images.
        iterations: steps, each on `batch_size` images drawn without replacement.
        generator: a CPU generator; the same state gives the same result.
        bar: moved by one a step.

    Returns:
        The last step's loss; nan where there were no steps.
    """
    if not parameters or iterations < 1:
        return math.nan
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=iterations)
    batch_size = min(batch_size, len(inputs))
    loss = torch.zeros(())
    try:
        for _ in range(iterations):
            indices = torch.randperm(len(inputs), generator=generator)[:batch_size]
            loss = squared_error(run(inputs.gather(indices)), targets.gather(indices))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if bar is not None:
                bar.update()
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
    return float(loss.detach())
