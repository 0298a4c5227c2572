"""A detector's neck and heads, after its blocks: they learn to predict what they predict in full precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iasvit.blockwise.core import Settings, groups_of, seed_of
from iasvit.blockwise.parts import learning
from iasvit.blockwise.teacher import Teacher
from iasvit.calibration import ActivationStore, Store
from iasvit.models import adapter_for, is_detector, segments
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
    chain, adapter = segments(quantized), adapter_for(quantized)
    if not is_detector(quantized) or not chain[-1].layers() or settings.iterations < 1:
        return
    inputs_fp: Store = images
    inputs_q: Store = images
    for full, segment in zip(teacher.chain[:-1], chain[:-1], strict=True):
        inputs_fp = inputs_fp.map(full.run, BATCH, f"{full.name} (full precision)")
        inputs_q = inputs_q.map(segment.run, BATCH, segment.name)

    def errors(images_: Tensor) -> Tensor:
        return adapter.answer_errors(quantized, inputs_q.gather(images_), teacher.model, inputs_fp.gather(images_))

    with torch.no_grad():
        units = errors(torch.arange(min(settings.batch_size, len(images)))).clamp_min(TINY)
    with (
        learning(chain[-1], adaround=False, weight_scales=settings.weight_scale_lr > 0, relative=True) as learnt,
        progress.phase("reconstruction, heads", settings.iterations) as bar,
    ):
        minimise(
            lambda images_, step: (errors(images_) / units).sum(),
            groups_of(settings, [(chain[-1], learnt)]),
            images=len(images),
            iterations=settings.iterations,
            batch_size=settings.batch_size,
            seed=seed_of(seed, "heads"),
            graphs=False,  # how many regions there are differs from step to step
            bar=bar,
        )
        learnt.finish()
