"""All blocks at once, after each by itself: the quantized network learns to answer as the full-precision one does."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iasvit.blockwise.core import Settings, groups_of, seed_of
from iasvit.blockwise.parts import learning
from iasvit.blockwise.teacher import Caller, Teacher, answers_of, caller
from iasvit.calibration import ActivationStore, tensors
from iasvit.models import Activation, Segment, relative_error, segments
from iasvit.progress import Progress
from iasvit.steps import minimise

TINY = 1e-12


@dataclass(frozen=True)
class Weights:
    """What is compared: each part over its value on the first batch, times its weight.

    Attributes:
        logits: KL(softmax(full precision) ‖ softmax(quantized)).
        features: squared error of what the last Linear reads; `relative_error` of what a detector's neck reads.
        local: squared error of what the blocks put out, each block's alike.
    """

    logits: float = 1.0
    features: float = 1.0
    local: float = 1.0


@dataclass(frozen=True)
class Augmentation:
    """How images are changed before both networks see them, which is why no labels are needed.

    Attributes:
        crop: least side of a random crop, enlarged again, as a part of the image's; 1 for none.
        flip: whether half of the images are mirrored.
        mix: part of the batches' images that are mixed with another image of the batch (mixup).
    """

    crop: float = 1.0
    flip: bool = False
    mix: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), changed by torch's own random numbers."""
        if self.flip or self.crop < 1:
            side = self.crop + (1 - self.crop) * torch.rand(len(x), device=x.device)
            shift = (2 * torch.rand(len(x), 2, device=x.device) - 1) * (1 - side)[:, None]
            signs = torch.where(torch.rand(len(x), device=x.device) < 0.5 * self.flip, -1.0, 1.0)
            zero = torch.zeros_like(side)
            rows = [torch.stack([side * signs, zero, shift[:, 0]], 1), torch.stack([zero, side, shift[:, 1]], 1)]
            grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
            x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
        if self.mix > 0 and len(x) > 1:
            part = torch.rand(len(x), device=x.device) * (torch.rand(len(x), device=x.device) < self.mix)
            part = (part / 2).view(-1, *[1] * (x.ndim - 1))
            x = x * (1 - part) + x.roll(1, 0) * part
        return x


def learn_jointly(
    quantized: nn.Module,
    teacher: Teacher,
    images: ActivationStore,
    settings: Settings,
    weights: Weights,
    augmentation: Augmentation,
    progress: Progress,
    seed: int,
) -> None:
    """Learn the weights, by straight-through estimation, and scales of all blocks together.

    Args:
        quantized: all its quantizers calibrated, its weights not rounded for good.
        teacher: the full-precision model. Where it puts out no table of logits, the blocks are compared, and what
            leaves the last of them.
        images: all calibration images, of one size.
        settings: `adaround` and `drop` count for nothing here.
        weights, augmentation: see there.
        progress: where to report to.
        seed: of what is drawn.
    """
    chain, full_chain = segments(quantized), teacher.chain
    if not any(segment.reconstruct for segment in chain) or settings.iterations < 1:
        return
    end = 1 + max(i for i, segment in enumerate(chain) if segment.reconstruct)
    whole = teacher.has_logits and end == len(chain)
    device = next(quantized.parameters()).device
    call = caller(settings.compile)
    measured = [i for i in range(end - whole) if chain[i].modules and chain[i].reconstruct]
    units = torch.ones(len(measured) + 2, device=device)

    def run(links: list[Segment], x: Activation, call: Caller) -> tuple[list[Tensor], Activation]:
        outputs = []
        for segment in links[: end - whole]:
            x = call(segment.run, x)
            outputs.append(tensors(x)[0].float())
        return outputs, x

    def parts(images_: Tensor, call: Caller = call) -> Tensor:
        x = augmentation(images.gather(images_))
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast, cache_enabled=False):
            with torch.no_grad():
                full, full_end = run(full_chain, x, call)
                answers = answers_of(full_chain[-1], full_end) if whole else None
            outputs, end_ = run(chain, x, call)
            errors = [(outputs[i] - full[i]).square().mean() for i in measured]
            if answers is None:
                return torch.stack([*errors, relative_error(end_, full_end), torch.zeros_like(errors[0])])
            logits, features = answers_of(chain[-1], end_)
        divergence = F.kl_div(
            logits.float().log_softmax(1), answers[0].float().log_softmax(1), reduction="batchmean", log_target=True
        )
        return torch.stack([*errors, (features.float() - answers[1].float()).square().mean(), divergence])

    factors = torch.tensor([weights.local / max(1, len(measured))] * len(measured) + [weights.features, weights.logits])
    factors = factors.to(device)

    def loss(images_: Tensor, step: Tensor) -> Tensor:
        return (parts(images_) / units * factors).sum()

    @torch.no_grad()
    def before(iteration: int) -> None:
        if iteration == 0:
            drawn = torch.arange(min(settings.batch_size, len(images)), device=device)
            units.copy_(parts(drawn, caller(False)).clamp_min(TINY))  # once: not worth compiling

    with ExitStack() as stack, progress.phase("reconstruction, all blocks", settings.iterations) as bar:
        learnt = [
            (
                segment,
                stack.enter_context(
                    learning(
                        segment,
                        adaround=False,
                        scales=settings.scale_lr > 0,
                        weight_scales=settings.weight_scale_lr > 0,
                        relative=settings.relative,
                    )
                ),
            )
            for segment in chain
            if segment.modules and segment.reconstruct
        ]
        minimise(
            loss,
            groups_of(settings, learnt),
            images=len(images),
            iterations=settings.iterations,
            batch_size=settings.batch_size,
            seed=seed_of(seed, "joint"),
            graphs=images.resident,
            before=before,
            bar=bar,
        )
        for _, part in learnt:
            part.finish()
