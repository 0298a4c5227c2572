"""Reconstruction of one block from parts: rounding, scales, drops and a loss, learnt together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iasvit.blockwise.losses import Block, Divergence, Loss
from iasvit.blockwise.parts import Learnt, learning
from iasvit.blockwise.teacher import Caller, Teacher, caller
from iasvit.calibration import tensors
from iasvit.models import Activation, Segment
from iasvit.nn import QuantLayer, QuantMatMul
from iasvit.progress import fingerprint
from iasvit.reconstruction import SegmentJob, worth_compiling
from iasvit.steps import Group, minimise

REGULARISER = 0.01  # weight of AdaRound's, as published
BETA = (20.0, 2.0)
WARM_UP = 0.2  # of the steps, without the regulariser


@dataclass(frozen=True)
class Settings:
    """How a block is learnt.

    Attributes:
        iterations: steps.
        batch_size: images a step.
        adaround: learn how weights are rounded, at a constant rate; else the weights by straight-through estimation.
        lr: of α, or of the weights (along a cosine).
        scale_lr: of activation scales, along a cosine; 0 to leave them.
        weight_scale_lr: of the weights' scales, where their rounding is not learnt; 0 to leave them.
        bias_lr: of the biases; 0 to leave them.
        norm_lr: of all else that a block has, LayerNorms and LayerScales; 0 to leave it.
        relative: scales are learnt as multiples of the first ones.
        drop: probability of leaving an element in full precision: of each activation that is quantized, and of the
            block's input, which then comes from the full-precision model.
        full_inputs: take the block's input from the full-precision model alone.
        head_divergence: compare a classifier's answers by their divergence, not by the method's loss.
        autocast: products in bfloat16.
        compile: fuse the blocks' operators by torch.compile.
    """

    iterations: int
    batch_size: int
    adaround: bool
    lr: float
    scale_lr: float = 0.0
    weight_scale_lr: float = 0.0
    bias_lr: float = 0.0
    norm_lr: float = 0.0
    relative: bool = False
    drop: float = 0.0
    full_inputs: bool = False
    head_divergence: bool = True
    autocast: bool = False
    compile: bool = False


def groups_of(settings: Settings, parts: Sequence[tuple[Segment, Learnt]]) -> list[Group]:
    """What is learnt of these segments, by learning rate."""
    layers = [layer for segment, _ in parts for layer in segment.layers()]
    alphas = [rounding.alpha for _, learnt in parts for rounding in learnt.roundings.values()]
    groups = [Group(alphas, settings.lr, cosine=False)]
    if not settings.adaround:
        groups.append(Group([layer.weight for layer in layers], settings.lr))
    groups.append(Group([s.factor for _, learnt in parts for s in learnt.scales.values()], settings.scale_lr))
    weight_scales = [s.factor for _, learnt in parts for s in learnt.weight_scales.values()]
    groups.append(Group(weight_scales, settings.weight_scale_lr))
    groups.append(Group([layer.bias for layer in layers if layer.bias is not None], settings.bias_lr))
    groups.append(Group([p for segment, _ in parts for p in _others(segment)], settings.norm_lr))
    return groups


def _others(segment: Segment) -> list[nn.Parameter]:
    """A segment's parameters that are of no quantized layer or product."""
    own = {
        parameter
        for _, root in segment.modules
        for module in root.modules()
        if isinstance(module, QuantLayer | QuantMatMul)
        for parameter in module.parameters()
    }
    return [p for _, root in segment.modules for p in root.parameters() if p not in own and p.is_floating_point()]


def inputs_of(job: SegmentJob, settings: Settings, images: Tensor) -> Activation:
    """A batch of a block's inputs: of the quantized prefix, of the full-precision one, or mixed by element (QDrop)."""
    if settings.full_inputs or job.inputs_q is job.inputs_fp:
        return job.inputs_fp.gather(images)
    quantized = job.inputs_q.gather(images)
    if settings.drop <= 0:
        return quantized
    full = job.inputs_fp.gather(images)
    mixed = tuple(
        torch.where(torch.rand_like(q) < settings.drop, f, q)
        for q, f in zip(tensors(quantized), tensors(full), strict=True)
    )
    return mixed if isinstance(quantized, tuple) else mixed[0]


def seed_of(*parts: object) -> int:
    """A seed for torch from anything."""
    return int(fingerprint(*parts), 16) % 2**62


def reconstruct(job: SegmentJob, teacher: Teacher, loss: Loss, settings: Settings, seed: int) -> None:
    """Learn a segment, whose quantizers are calibrated, and leave its quantizers and weights as they are learnt.

    With AdaRound weights are values of codes afterwards; else `round_weight` is still to come.

    Raises:
        IasvitError: a gradient that the loss reads is not finite.
    """
    if not len(job.targets) or settings.iterations < 1:
        job.bar.update(settings.iterations)
        if settings.adaround:
            for layer in job.segment.layers():
                layer.round_weight()
        return
    targets = job.targets.leading
    if settings.head_divergence and job.index + 1 == len(teacher.chain) and len(targets.shape_of(0)) == 1:
        loss = Divergence()
    device = targets.device
    call = caller(settings.compile and worth_compiling(job.segment))
    parts = learning(
        job.segment,
        adaround=settings.adaround,
        scales=settings.scale_lr > 0,
        weight_scales=settings.weight_scale_lr > 0,
        relative=settings.relative,
        drop=settings.drop,
    )
    with parts as learnt:
        block = Block(job, learnt, teacher, settings.iterations, seed_of(seed, job.index, "loss"))
        loss.begin(block)

        def output_of(images: Tensor, call: Caller = call) -> Tensor:
            # A cache of cast weights would outlive a captured step.
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast, cache_enabled=False):
                return tensors(call(job.segment.run, inputs_of(job, settings, images)))[0].float()

        def error(images: Tensor, step: Tensor) -> Tensor:
            output, target = output_of(images), targets.gather(images)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast, cache_enabled=False):
                value = loss(output, target, images)
            return value + rounding_error(learnt, step, settings.iterations)

        @torch.no_grad()
        def before(iteration: int) -> None:
            if loss.before(block, iteration) or iteration == 0:
                drawn = torch.randperm(len(targets), generator=generator)[: settings.batch_size].to(device)
                loss.set_unit(
                    output_of(drawn, caller(False)), targets.gather(drawn), drawn
                )  # once: not worth compiling

        generator = torch.Generator().manual_seed(seed_of(seed, job.index, "unit"))
        minimise(
            error,
            groups_of(settings, [(job.segment, learnt)]),
            images=len(targets),
            iterations=settings.iterations,
            batch_size=settings.batch_size,
            seed=seed_of(seed, job.index),
            graphs=job.inputs_q.resident and job.inputs_fp.resident and targets.resident and loss.resident,
            before=before,
            bar=job.bar,
        )
        learnt.finish()


def rounding_error(learnt: Learnt, step: Tensor, iterations: int) -> Tensor | float:
    """AdaRound's regulariser at a step: its weight is 0 while warming up, then β falls from 20 to 2 in a line."""
    if not learnt.roundings:
        return 0.0
    start = WARM_UP * iterations
    done = ((step - start) / max(1.0, iterations - start)).clamp(0, 1)
    beta = BETA[0] + (BETA[1] - BETA[0]) * done
    total = torch.stack([rounding.regulariser(beta) for rounding in learnt.roundings.values()]).sum()
    return REGULARISER * (step >= start) * total
