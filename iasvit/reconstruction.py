"""Block-wise reconstruction that streams from block to block: O(L) block passes for a model of L blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from iasvit import distributed
from iasvit.calibration import ActivationStore, Store, calibration_store, tensors
from iasvit.errors import IasvitError
from iasvit.methods import Calibration
from iasvit.models import Activation, Segment, segments
from iasvit.progress import Progress
from iasvit.quantizers import Quantizer
from iasvit.steps import Group, minimise


@dataclass(frozen=True)
class SegmentJob:
    """What reconstruction of one segment works with.

    Attributes:
        index: position of the segment in the model.
        segment: of the quantized model.
        inputs_fp: inputs of the segment in the full-precision model.
        inputs_q: inputs of the segment in the quantized model, all segments before it being quantized.
        targets: the full-precision segment's outputs for inputs_fp; empty for a segment that is not reconstructed.
        bar: progress bar, to be moved as work is done.
    """

    index: int
    segment: Segment
    inputs_fp: Store
    inputs_q: Store
    targets: Store
    bar: tqdm


def stream(
    model: nn.Module,
    quantized: nn.Module,
    calibration: Calibration | ActivationStore,
    fit: Callable[[SegmentJob], None],
    progress: Progress,
    *,
    start: Callable[[Store], None] | None = None,
    batch_size: int = 64,
    steps: int = 0,
    memory_budget: int | None = None,
) -> None:
    """Quantize a model segment by segment; `fit` does the work on one.

    The outputs of a segment are the inputs of the next, in both models, so that no segment runs twice on the same
    activations. After each segment the quantized model goes to the progress checkpoint, and a later run with the same
    checkpoint goes on from there. Processes share the batches of these passes; each holds all activations.

    Args:
        model: full precision, eval mode.
        quantized: its quantizable copy; `fit` changes the segments in order.
        calibration: images N×3×H×W, batches of them, or a store of them, whose budget then is that of every store.
        fit: called for each segment that has quantized layers.
        progress: of one phase, "reconstruction".
        start: called once with the images before the first segment; not by a run that a checkpoint resumes.
        batch_size: images a forward pass.
        steps: what `fit` moves the bar by in all, for the time left.
        memory_budget: bytes for each store of activations, where no store is given.

    Raises:
        IasvitError: NaN or Inf between two segments (the message names the first), a checkpoint of another model, or
            processes that have learnt different weights.
    """
    device = next(model.parameters()).device
    images: ActivationStore = (
        calibration
        if isinstance(calibration, ActivationStore)
        else calibration_store(calibration, device, memory_budget)
    )
    inputs_fp: Store = images
    inputs_q: Store = images
    chain = list(zip(segments(model), segments(quantized), strict=True))
    done = -1
    restored = progress.restore()
    if restored is not None:
        done, state = restored
        _load(state, quantized, progress)
    elif start is not None:
        start(images)
    with progress.phase("reconstruction", steps) as bar:
        if restored is not None and steps:
            fits = [bool(segment.modules) for _, segment in chain]
            bar.update(steps * sum(fits[: done + 1]) // sum(fits))
        for index, (full, segment) in enumerate(chain):
            last = index + 1 == len(chain)
            outputs: Store = ActivationStore()
            targets: Store = outputs
            if segment.reconstruct or not last:
                outputs = inputs_fp.map(full.run, batch_size, f"{full.name} (full precision)")
                targets = outputs if segment.reconstruct else targets
            if index > done and segment.modules:
                fit(SegmentJob(index, segment, inputs_fp, inputs_q, targets, bar))
                learnt = [module.state_dict().values() for _, module in segment.modules]
                distributed.check_equal(f"the weights learnt for {segment.name}", *learnt)
                progress.save(index, quantized.state_dict())
            if not last:
                inputs_q = inputs_q.map(segment.run, batch_size, segment.name)
            inputs_fp = outputs


def _load(state: dict[str, Tensor], quantized: nn.Module, progress: Progress) -> None:
    """Take over a checkpoint's state; another model's or other bits' is refused."""
    before = {name: m.n_bits for name, m in quantized.named_modules() if isinstance(m, Quantizer)}
    try:
        quantized.load_state_dict(state)
        fits = all(quantized.get_submodule(name).n_bits == n_bits for name, n_bits in before.items())
    except (RuntimeError, KeyError):
        fits = False
    if not fits:
        raise IasvitError(
            f"the checkpoint in {progress.checkpoint} belongs to another model or other bits; give another folder"
        )


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of the squared error summed over a sample: both (B, ...) → scalar (I&S-ViT eq. 9)."""
    return (output - target).square().flatten(1).sum(dim=1).mean()


def _loss(run: Callable[[Activation], Activation], inputs: Activation, targets: Tensor, autocast: bool) -> Tensor:
    # A cache of cast weights would outlive a captured step.
    with torch.autocast(targets.device.type, torch.bfloat16, enabled=autocast, cache_enabled=False):
        outputs = tensors(run(inputs))[0]
    return squared_error(outputs.float(), targets)


@cache
def _compiled_loss() -> Callable[..., Tensor]:
    compiled = torch.compile(_loss, dynamic=False)

    def loss(*arguments: Any) -> Tensor:
        # Past the limit on kinds of segments torch falls back to eager mode.
        with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):
            return compiled(*arguments)

    return loss


def share_code(model: nn.Module) -> None:
    """Give traced modules of equal code one class, so that what torch.compile makes for one block serves all."""
    classes: dict[str, type[fx.GraphModule]] = {}
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            module.__class__ = classes.setdefault(module.code, type(module))


def worth_compiling(segment: Segment) -> bool:
    """Whether a segment has attention. Others, such as a patch embedding or a head, have little to fuse: tracing one
    takes longer than its compiled steps save."""
    return any(isinstance(module, fx.GraphModule) for _, root in segment.modules for module in root.modules())


def optimize(
    run: Callable[[Activation], Activation],
    parameters: Sequence[nn.Parameter],
    inputs: Store,
    targets: Store,
    *,
    iterations: int,
    batch_size: int,
    lr: float,
    seed: int,
    autocast: bool = False,
    compile: bool = False,
    bar: tqdm | None = None,
) -> None:
    """Minimise `squared_error(run(inputs), targets)` over parameters: Adam, no weight decay, cosine from lr to 0.

    Args:
        run: the segment's forward.
        parameters: what is learnt; they require gradients only meanwhile.
        inputs, targets: of the same images; no targets, nothing is learnt. Of tuples, the first tensor counts: it is
            what the segment computes.
        iterations, batch_size, seed: see `iasvit.steps.minimise`.
        autocast: compute products in bfloat16; parameters, losses and the optimizer stay in float32.
        compile: fuse the step's operators by torch.compile; a segment of a kind takes seconds once.
        bar: moved by one a step.
    """
    if not len(targets):
        if bar is not None:
            bar.update(iterations)
        return
    leading, loss_of = targets.leading, _compiled_loss() if compile else _loss
    minimise(
        lambda images, _: loss_of(run, inputs.gather(images), leading.gather(images), autocast),
        [Group(parameters, lr)],
        images=len(inputs),
        iterations=iterations,
        batch_size=batch_size,
        seed=seed,
        graphs=inputs.resident and leading.resident,
        bar=bar,
    )
