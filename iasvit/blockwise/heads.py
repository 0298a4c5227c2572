"""A detector's neck and heads, after its blocks: they learn to put out what they put out in full precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from iasvit.blockwise.core import Settings, groups_of, seed_of
from iasvit.blockwise.parts import learning
from iasvit.blockwise.teacher import Teacher
from iasvit.calibration import ActivationStore, Store
from iasvit.models import Activation, Segment, adapter_for, is_detector, relative_error, segments
from iasvit.progress import Progress
from iasvit.steps import minimise

TINY = 1e-12
BATCH = 32  # images a pass through the blocks


def learn_heads(
    quantized: nn.Module, teacher: Teacher, images: ActivationStore, settings: Settings, progress: Progress, seed: int
) -> None:
    """Learn weights and scales of the last segment where nothing else does: a detector's neck and heads.

    They read what the quantized blocks put out, and are compared with the full-precision model's on its own
    activations, by `Adapter.answer_errors`: each kind of error over its value on the first images.

    Args:
        quantized: all its quantizers calibrated, its blocks learnt.
        teacher: the full-precision model.
        images: calibration images.
        settings: `adaround` and `drop` count for nothing here.
        progress: where to report to.
        seed: of what is drawn.
    """
    if not is_detector(quantized):
        return
    adapter, heads = adapter_for(quantized), segments(quantized)[-1]

    def errors(inputs: Activation, full_inputs: Activation) -> Tensor:
        return adapter.answer_errors(quantized, inputs, teacher.model, full_inputs)

    _learn("heads", heads, errors, quantized, teacher, images, settings, progress, seed)


def learn_neck(
    quantized: nn.Module, teacher: Teacher, images: ActivationStore, settings: Settings, progress: Progress, seed: int
) -> None:
    """Learn weights and scales of a detector's neck by the `relative_error` of the maps that it puts out.

    Arguments, and what it reads and is compared with: see `learn_heads`.

    Raises:
        IasvitError: the detector's family knows no neck.
    """
    if not is_detector(quantized):
        return
    adapter = adapter_for(quantized)
    neck, full_neck = adapter.neck(quantized), adapter.neck(teacher.model)

    def errors(inputs: Activation, full_inputs: Activation) -> Tensor:
        with torch.no_grad():
            wanted = full_neck.run(full_inputs)
        return relative_error(neck.run(inputs), wanted)[None]

    _learn("neck", neck, errors, quantized, teacher, images, settings, progress, seed)


def _learn(
    name: str,
    segment: Segment,
    errors_of: Callable[[Activation, Activation], Tensor],
    quantized: nn.Module,
    teacher: Teacher,
    images: ActivationStore,
    settings: Settings,
    progress: Progress,
    seed: int,
) -> None:
    """Learn a part of the last segment.

    Args:
        name: of the part, for progress and its seed.
        segment: the part, of the quantized model.
        errors_of: (inputs of the quantized model's last segment, of the full-precision one's) → errors, one dimension.
        quantized, teacher, images, settings, progress, seed: see `learn_heads`.
    """
    if not segment.layers() or settings.iterations < 1:
        return
    inputs_fp: Store = images
    inputs_q: Store = images
    for full, block in zip(teacher.chain[:-1], segments(quantized)[:-1], strict=True):
        inputs_fp = inputs_fp.map(full.run, BATCH, f"{full.name} (full precision)")
        inputs_q = inputs_q.map(block.run, BATCH, block.name)

    def errors(images_: Tensor) -> Tensor:
        return errors_of(inputs_q.gather(images_), inputs_fp.gather(images_))

    with torch.no_grad():
        units = errors(torch.arange(min(settings.batch_size, len(images)))).clamp_min(TINY)
    with (
        learning(
            segment, adaround=False, weight_scales=settings.weight_scale_lr > 0, relative=settings.relative
        ) as learnt,
        progress.phase(f"reconstruction, {name}", settings.iterations) as bar,
    ):
        minimise(
            lambda images_, step: (errors(images_) / units).sum(),
            groups_of(settings, [(segment, learnt)]),
            images=len(images),
            iterations=settings.iterations,
            batch_size=settings.batch_size,
            seed=seed_of(seed, name),
            graphs=False,  # how many regions there are differs from step to step
            bar=bar,
        )
        learnt.finish()
