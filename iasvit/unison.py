"""This suite's own method: the best of what the others have, block by block, all blocks at once, a detector's heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import mode
from typing import Annotated, ClassVar

from torch import Tensor, nn

from iasvit.blockwise import (
    BlockRecipe,
    BlockReconstruction,
    Fisher,
    FrozenSuffix,
    LeastSquaresHessian,
    Loss,
    LowRankFisher,
    MeanSquare,
    PerturbationHessian,
)
from iasvit.blockwise.core import Settings
from iasvit.blockwise.heads import learn_heads
from iasvit.blockwise.initialise import INITIALISATIONS
from iasvit.blockwise.joint import Augmentation, Weights, learn_jointly
from iasvit.blockwise.output_search import search_bases
from iasvit.blockwise.teacher import Teacher
from iasvit.blockwise.transforms import rotated
from iasvit.calibration import ActivationStore, network_need
from iasvit.models import Site, is_detector
from iasvit.nn import quantizers_of
from iasvit.options import OneOf, Range
from iasvit.progress import Progress
from iasvit.quantizers import SOFTMAX_QUANTIZERS, Quantizer, ShiftedAdaLogQuantizer

LOSSES: dict[str, Callable[[], Loss]] = {
    "mse": Loss,
    "fisher": Fisher,
    "perturbation": PerturbationHessian,
    "low_rank": LowRankFisher,
    "least_squares": LeastSquaresHessian,
    "suffix": MeanSquare,  # and what FrozenSuffix adds
}


JOINT_BATCH = 32


@dataclass
class Unison(BlockReconstruction):
    """Unison: weights and scales learnt straight-through, first block by block, then in all blocks at once.

    1. One pass of the quantized model sets the activation quantizers (I&S-ViT's code); LayerNorm→Linear pairs are
       folded to one scale a tensor; weights get the range of least error.
    2. Block by block, on inputs of the quantized prefix: weights, biases and all quantizers' scales (zero-points stay).
    3. All blocks of a classifier at once: answers, features and blocks' outputs against the full-precision model's, on
       images that are cropped, mirrored and mixed at random.
    4. A detector's neck and heads, by the divergence of what they predict from what they predict in full precision.

    Options, besides those of `BlockReconstruction`; rates of scales are of multiples of the first scale:
        softmax: the post-softmax quantizer.
        gelu: the post-GELU quantizer, "uniform" or "adalog".
        bases: what AdaLog's scales and bases are chosen by: the error of the quantized "values" themselves, or of what
            the layer "outputs" (`iasvit.blockwise.output_search.search_bases`).
        rounding: "straight" learns the weights, "adaround" only their rounding (no step 3 then).
        block_loss: what blocks are compared by, a name in `LOSSES`.
        suffix_features, suffix_logits, suffix_local: weights in the loss "suffix".
        weight_scale_lr: of the weights' scales; 0 leaves them.
        biases: learn the biases too, at `lr`.
        norm_lr: of LayerNorms and LayerScales; 0 leaves them.
        smooth_iterations: steps of a block before its weights are quantized (I&S-ViT's stage 1).
        rotation: rotate the residual stream and the heads before.
        relu: ReLU for GELU before; the network is another function then.
        relu_iterations: steps of an MLP; the recipe's where not given.
        joint_iterations: steps of all blocks at once; where not given the recipe's, and none for a detector, which
            gains nothing by them.
        joint_batch_size: images of such a step; where not given 32, or `batch_size` for a detector, whose images are
            large and may differ in size.
        joint_lr, joint_scale_lr: rates of these; the scale's rate for activations, as for weights.
        joint_decay: these rates, and those of neck and heads, are multiplied by it for each bit beyond 3: finer codes
            need smaller corrections.
        joint_logits, joint_features, joint_local: weights of what is compared.
        head_iterations: steps of a detector's neck and heads (`iasvit.blockwise.heads`); a block's number where
            not given.
        crop: least side of a random crop, as a part of the image's; 1 for none.
        flip: mirror half of the images.
        mix: part of the images that are mixed with another.
    """

    iterations: Annotated[int | None, Range(0)] = None
    drop: Annotated[float, Range(0, 1)] = 0.0
    initialisation: Annotated[str, OneOf(tuple(INITIALISATIONS))] = "propagated"
    init_size: Annotated[int, Range(1)] = 64
    softmax: Annotated[str, OneOf(tuple(SOFTMAX_QUANTIZERS))] = "adalog"
    gelu: Annotated[str, OneOf(("uniform", "adalog"))] = "adalog"
    bases: Annotated[str, OneOf(("values", "outputs"))] = "outputs"
    rounding: Annotated[str, OneOf(("straight", "adaround"))] = "straight"
    block_loss: Annotated[str, OneOf(tuple(LOSSES))] = "mse"
    suffix_features: Annotated[float, Range(0)] = 1.0
    suffix_logits: Annotated[float, Range(0)] = 0.0
    suffix_local: Annotated[float, Range(0)] = 2.0
    weight_scale_lr: Annotated[float, Range(0)] = 1e-3
    biases: bool = True
    norm_lr: Annotated[float, Range(0)] = 0.0
    smooth_iterations: Annotated[int, Range(0)] = 0
    rotation: bool = False
    relu: bool = False
    relu_iterations: Annotated[int | None, Range(0)] = None
    joint_iterations: Annotated[int | None, Range(0)] = None
    joint_batch_size: Annotated[int | None, Range(1)] = None
    joint_lr: Annotated[float, Range(above=0)] = 5e-5
    joint_scale_lr: Annotated[float, Range(0)] = 5e-4
    joint_decay: Annotated[float, Range(above=0, most=1)] = 0.5
    joint_logits: Annotated[float, Range(0)] = 1.0
    joint_features: Annotated[float, Range(0)] = 1.0
    joint_local: Annotated[float, Range(0)] = 1.0
    head_iterations: Annotated[int | None, Range(0)] = None
    crop: Annotated[float, Range(above=0, most=1)] = 0.7
    flip: bool = True
    mix: Annotated[float, Range(0, 1)] = 0.0

    name: ClassVar[str] = "unison"
    version: ClassVar[int] = 3
    changelog: ClassVar[dict[int, str]] = {
        2: "AdaLog after softmax from 6 bits on; the mini recipe has 300 steps a block and 600 of all blocks",
        3: "AdaLog after softmax and GELU at all bits, its scale and base chosen by the output's error; the rates "
        "of step 3 are halved for each bit beyond 3",
    }
    recipes: ClassVar[dict[str, BlockRecipe]] = {
        "paper": BlockRecipe(500, 2e-4, 2e-3, 2000, 4e-4),
        "fast": BlockRecipe(100, 4e-4, 4e-3, 500, 4e-4),
        "mini": BlockRecipe(300, 1e-3, 4e-3, 300, 1e-3),
    }
    joint_steps: ClassVar[dict[str, int]] = {"paper": 3000, "fast": 300, "mini": 600}

    @property
    def adaround(self) -> bool:  # type: ignore[override]
        """Whether the rounding is learnt, not the weights."""
        return self.rounding == "adaround"

    def activation_quantizer(self, site: Site) -> Quantizer:
        """See `BlockReconstruction`."""
        if site.role == "gelu" and self.gelu == "adalog":
            return ShiftedAdaLogQuantizer(site.n_bits)
        return super().activation_quantizer(site)

    def refine(self, quantized: nn.Module, images: ActivationStore, share: int | None) -> None:
        """See `BlockReconstruction`."""
        if self.bases == "outputs":
            search_bases(quantized, images, self.init_size, share)

    def loss(self) -> Loss:
        """See `BlockReconstruction`."""
        inner = LOSSES[self.block_loss]()
        if self.block_loss != "suffix":
            return inner
        return FrozenSuffix(self.suffix_features, self.suffix_local, self.suffix_logits, inner)

    def settings(self) -> Settings:
        """See `BlockReconstruction`."""
        settings = super().settings()
        straight = not self.adaround
        return replace(
            settings,
            relative=True,
            weight_scale_lr=self.weight_scale_lr if straight else 0.0,
            bias_lr=settings.lr if self.biases and straight else 0.0,
            norm_lr=self.norm_lr,
        )

    def smooth_settings(self, settings: Settings) -> Settings | None:
        """See `BlockReconstruction`."""
        if not self.smooth_iterations:
            return None
        lr = self.recipes[self.recipe].lr
        return replace(
            settings,
            iterations=self.smooth_iterations,
            adaround=False,
            lr=lr,
            bias_lr=lr,
            scale_lr=0.0,
            weight_scale_lr=0.0,
            drop=0.0,
            full_inputs=True,
        )

    def joint_settings(self, n_bits: int = 3, detector: bool = False) -> Settings:
        """How all blocks are learnt at once; `n_bits`: of most quantizers."""
        batch_size = self.joint_batch_size or (self.batch_size if detector else JOINT_BATCH)
        settings, slower = self.settings(), self.joint_decay ** max(0, n_bits - 3)
        lr, scale_lr = self.joint_lr * slower, self.joint_scale_lr * slower
        usual = 0 if detector else self.joint_steps[self.recipe]
        steps = usual if self.joint_iterations is None else self.joint_iterations
        return replace(
            settings,
            iterations=0 if self.adaround else steps,
            batch_size=batch_size,
            adaround=False,
            lr=lr,
            bias_lr=lr if self.biases else 0.0,
            scale_lr=scale_lr,
            weight_scale_lr=scale_lr if self.weight_scale_lr else 0.0,
            norm_lr=lr if self.norm_lr else 0.0,
        )

    def head_settings(self, n_bits: int = 3) -> Settings:
        """How a detector's neck and heads are learnt; `n_bits`: of most quantizers."""
        settings, slower = self.settings(), self.joint_decay ** max(0, n_bits - 3)
        steps = settings.iterations if self.head_iterations is None else self.head_iterations
        return replace(
            settings,
            iterations=0 if self.adaround else steps,
            lr=settings.lr * slower,
            bias_lr=settings.bias_lr * slower,
            scale_lr=settings.scale_lr * slower,
            weight_scale_lr=settings.weight_scale_lr * slower,
        )

    def forwards(self, calib_size: int, detector: bool) -> float:
        """See `iasvit.methods.Method`."""
        joint, heads = self.joint_settings(detector=detector), self.head_settings()
        of_heads = 2.5 * heads.iterations * heads.batch_size if detector else 0.0
        return super().forwards(calib_size, detector) + 5.0 * joint.iterations * joint.batch_size + of_heads

    def transform(self, model: nn.Module, images: ActivationStore, progress: Progress) -> nn.Module:
        """See `BlockReconstruction`."""
        if self.rotation:
            model = rotated(model, self.seed)
        return self.relu_model(model, images, progress, self.relu_iterations) if self.relu else model

    def need(self, images: ActivationStore) -> Callable[[nn.Module, Tensor], int]:
        """See `BlockReconstruction`; and a step of all blocks at once, or of a detector's heads."""
        of_blocks = super().need(images)

        def largest(model: nn.Module, few: Tensor) -> int:
            detector = is_detector(model)
            joint = self.joint_settings(detector=detector)
            steps = [s for s in (joint, self.head_settings() if detector else joint) if s.iterations]
            sizes = [network_need(model, few, min(len(images), s.batch_size), learn=True) for s in steps]
            return max([of_blocks(model, few), *sizes])

        return largest

    def finish(self, quantized: nn.Module, teacher: Teacher, settings: Settings, progress: Progress) -> None:
        """See `BlockReconstruction`."""
        weights = Weights(self.joint_logits, self.joint_features, self.joint_local)
        augmentation = Augmentation(self.crop, self.flip, self.mix)
        n_bits = mode(q.n_bits for w in (True, False) for _, q in quantizers_of(quantized, weights=w))
        joint = self.joint_settings(n_bits, is_detector(quantized))
        learn_jointly(quantized, teacher, teacher.images, joint, weights, augmentation, progress, self.seed)
        learn_heads(quantized, teacher, teacher.images, self.head_settings(n_bits), progress, self.seed)
