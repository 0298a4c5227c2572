"""I&S-ViT: SULQ for post-softmax activations, and SOS, the three-stage smooth optimization (arXiv:2311.10126)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

from torch import Tensor, nn

from iasvit.calibration import (
    ActivationStore,
    calibrate_in_stream,
    calibration_store,
    enabled,
    forward_need,
    images_share,
    learning_need,
    run_all,
    share_of,
)
from iasvit.methods import Calibration
from iasvit.models import Site, find_pairs, prepare, segments
from iasvit.nn import quantizers_of
from iasvit.options import MemoryBudget, OneOf, Range, check_fields
from iasvit.progress import Progress, fingerprint
from iasvit.quantizers import SOFTMAX_QUANTIZERS, WEIGHT_PERCENTILES, Quantizer, UniformQuantizer
from iasvit.reconstruction import SegmentJob, optimize, share_code, stream, worth_compiling
from iasvit.reparam import reparameterize
from iasvit.spec import QuantSpec


@dataclass(frozen=True)
class Recipe:
    """What a run does unless told otherwise.

    Attributes:
        iterations: steps of a stage below 6 bits, and from 6 bits on.
        lr: Adam's initial learning rate.
        stage1_share: of both stages' steps, those of stage 1.
        softmax: the post-softmax quantizer.
    """

    iterations: tuple[int, int]
    lr: float
    stage1_share: float
    softmax: str


RECIPES = {
    "paper": Recipe((1000, 200), 4e-5, 0.5, "sulq"),
    "fast": Recipe((150, 30), 4e-4, 0.25, "log2_searched"),
}


@dataclass
class IASViT:
    """I&S-ViT (arXiv:2311.10126): the quantizer SULQ after softmax, and block reconstruction in three smooth stages
    (SOS).

    Initialisation: one forward pass of the quantized model on the first `init_size` images. Activations are quantized,
    weights are in full precision, nothing is learnt yet; so each activation quantizer chooses its range on what the
    quantizers before it, in its block and in all earlier ones, have made of the activations. This is the paper's code.
    (Ranges from the full-precision model's activations, or from what the learnt quantized model gives a block, before
    stage 1 or again before stage 3, lose 3 to 10 points at W3A3 on a real ViT: docs/real-vit.md.) Weight quantizers
    choose theirs on the weight alone, when stage 3 begins.

    Then for each segment (block, patch embedding, patch merging, head), in order:

    - Stage 1: weights in full precision, activations quantized, post-LayerNorm ones per channel; learn the weights on
      inputs from the full-precision model.
    - Stage 2: reparameterize each LayerNorm→Linear pair to one scale and zero-point per tensor; exact, because the
      weights are still in full precision.
    - Stage 3: quantize the weights per output channel and learn them again (STE) on inputs from the quantized model.

    The paper runs a stage over all blocks before the next begins; since stage 1 reads the full-precision model alone,
    to run the three on each block in turn is the same computation, and needs one pass through the model.

    Options:
        recipe: what iterations, lr, stage1_share and softmax are where they are not given. "paper": 1000 steps of a
            stage below 6 bits and 200 from 6 bits on, from 4e-5 on, and SULQ. "fast": 15% of the steps, from ten times
            that on, and log2 of a searched scale in place of SULQ, which needs more steps; on a real ViT as accurate as
            the paper's (docs/real-vit.md).
        iterations: optimization steps of a stage, if stages 1 and 3 have equally many.
        batch_size: images a step.
        lr: Adam's initial learning rate.
        stage1_share: the share of their steps that stage 1 has; stage 3 has the rest. On a real ViT a step of stage 3
            is worth more than one of stage 1, so the fast recipe has a quarter (docs/real-vit.md).
        seed: of the batches drawn.
        init_size: images that the quantizers are initialised on.
        softmax: the post-softmax quantizer, a name in `SOFTMAX_QUANTIZERS`: "sulq", or "log2", the one that the paper's
            ablation has in place of it (ias_vit[-sulq]), or another. Where not given, the recipe's.
        sos: False for direct reconstruction, per-tensor quantizers and all in one stage of twice the steps (ablation).
        autocast: learn with products in bfloat16; on a GPU faster by half.
        compile: learn with steps that torch.compile has fused; needs its compiler, and seconds for each kind of block.
        memory_budget: see `iasvit.options.MemoryBudget`.
    """

    iterations: Annotated[int | None, Range(0)] = None
    batch_size: Annotated[int, Range(1)] = 64
    lr: Annotated[float | None, Range(above=0)] = None
    stage1_share: Annotated[float | None, Range(0, 1)] = None
    seed: int = 0
    init_size: Annotated[int, Range(1)] = 64
    softmax: Annotated[str | None, OneOf(SOFTMAX_QUANTIZERS)] = None
    sos: bool = True
    autocast: bool = False
    compile: bool = False
    recipe: Annotated[str, OneOf(tuple(RECIPES))] = "paper"
    memory_budget: MemoryBudget = None

    name: ClassVar[str] = "ias_vit"
    reference: ClassVar[str] = "arXiv:2311.10126"
    published: ClassVar[str] = "W3A3, W4A4, W6A6 on ViT, DeiT, Swin; COCO"
    version: ClassVar[int] = 2
    changelog: ClassVar[dict[int, str]] = {
        2: "quantizers are initialised by one pass of the quantized model, not on full-precision activations; [-sulq] "
        "has the paper's log2"
    }
    ablations: ClassVar[dict[str, dict[str, str]]] = {"sulq": {"softmax": "log2"}}

    def __post_init__(self) -> None:
        check_fields(self)

    def quantize(self, model: nn.Module, calibration: Calibration, spec: QuantSpec, progress: Progress) -> nn.Module:
        """See `iasvit.methods.Method`."""
        quantized = self._quantizable(model, spec)
        stage_1, stage_3 = self._iterations(spec)
        pairs = find_pairs(quantized)
        if self.compile:
            share_code(quantized)

        images = calibration_store(calibration, next(model.parameters()).device, images_share(self.memory_budget))
        share = share_of(
            self.memory_budget, self.name, partial(self._quantizable, model, spec), images, self._need(images)
        )

        def initialise(images: ActivationStore) -> None:
            with (
                progress.phase("calibration"),
                enabled(list(quantizers_of(quantized, weights=True)), False),
            ):
                batches = images.batches(images.passes(self.init_size), limit=self.init_size)
                calibrate_in_stream(quantized, run_all(lambda batch: batch, batches, share), share)

        def fit(job: SegmentJob) -> None:
            if self.sos:
                for layer in job.segment.layers():
                    layer.weight_quantizer.enabled = False
                with progress.phase("reconstruction, stage 1"):
                    self.optimize_stage(job, 1, stage_1)
                with progress.phase("reconstruction, stage 2"):
                    for pair in pairs:
                        if pair.linears[0] in job.segment.layers():
                            reparameterize(pair)
            with progress.phase("reconstruction, stage 3"):
                for layer in job.segment.layers():
                    layer.calibrate_weight()
                self.optimize_stage(job, 3, stage_3)
            for layer in job.segment.layers():
                layer.round_weight()

        steps = (stage_1 + stage_3) * sum(bool(segment.modules) for segment in segments(quantized))
        stream(model, quantized, images, fit, progress, start=initialise, batch_size=self.batch_size, steps=steps)
        return quantized

    def _iterations(self, spec: QuantSpec) -> tuple[int, int]:
        """The steps of stage 1 and of stage 3. Without SOS all are in stage 3."""
        recipe = RECIPES[self.recipe]
        iterations = self.iterations
        if iterations is None:
            iterations = recipe.iterations[min(spec.w_bits, spec.a_bits) >= 6]
        share = recipe.stage1_share if self.stage1_share is None else self.stage1_share
        stage_1 = round(2 * iterations * share) if self.sos else 0
        return stage_1, 2 * iterations - stage_1

    def _quantizable(self, model: nn.Module, spec: QuantSpec) -> nn.Module:
        return prepare(model, spec, self.weight_quantizer, self.activation_quantizer)

    def _need(self, images: ActivationStore) -> Callable[[nn.Module, Tensor], int]:
        """See `share_of`: a pass that initialises, one from block to block, and a step of learning."""
        count = min(len(images), max(self.batch_size, images.passes(self.init_size)))
        step = min(len(images), self.batch_size)
        return lambda model, few: max(forward_need(model, few, count), learning_need(model, few, step))

    def optimize_stage(self, job: SegmentJob, stage: int, iterations: int) -> None:
        """Learn the segment's weights and biases on full-precision inputs (stage 1) or the quantized model's (3)."""
        parameters = [p for layer in job.segment.layers() for p in (layer.weight, layer.bias) if p is not None]
        if stage == 1 and not job.segment.quantizers(weights=False):
            job.bar.update(iterations)  # the image is not quantized: before the weights are, there is nothing to learn
            return
        optimize(
            job.segment.run,
            parameters,
            job.inputs_fp if stage == 1 else job.inputs_q,
            job.targets,
            iterations=iterations,
            batch_size=self.batch_size,
            lr=RECIPES[self.recipe].lr if self.lr is None else self.lr,
            seed=int(fingerprint(self.seed, job.index, stage), 16) % 2**63,
            autocast=self.autocast,
            compile=self.compile and worth_compiling(job.segment),
            bar=job.bar,
        )

    def weight_quantizer(self, site: Site) -> Quantizer:
        """Uniform, one scale and zero-point per output channel."""
        return UniformQuantizer(site.n_bits, channel_dim=0, percentiles=WEIGHT_PERCENTILES)

    def activation_quantizer(self, site: Site) -> Quantizer:
        """SULQ or `softmax` after softmax, per channel after LayerNorm (until stage 2), per tensor elsewhere."""
        if site.role == "softmax":
            return SOFTMAX_QUANTIZERS[self.softmax or RECIPES[self.recipe].softmax](site.n_bits)
        return UniformQuantizer(site.n_bits, channel_dim=-1 if site.role == "norm" and self.sos else None)
