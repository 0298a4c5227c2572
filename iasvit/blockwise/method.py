"""What the methods have in common that learn a network block by block and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

from torch import Tensor, nn

from iasvit.blockwise.core import Settings, reconstruct
from iasvit.blockwise.initialise import INITIALISATIONS, fold, initialise
from iasvit.blockwise.losses import GRADIENT_IMAGES, Loss
from iasvit.blockwise.parts import learning
from iasvit.blockwise.teacher import Teacher, frozen
from iasvit.blockwise.transforms import relu_transformed
from iasvit.calibration import (
    ActivationStore,
    calibration_store,
    forward_need,
    images_share,
    learning_need,
    network_need,
    share_of,
)
from iasvit.errors import IasvitError
from iasvit.methods import Calibration, Description
from iasvit.models import Site, prepare, segments
from iasvit.nn import quant_layers
from iasvit.options import MemoryBudget, OneOf, Range, check_fields
from iasvit.progress import Progress
from iasvit.quantizers import SOFTMAX_QUANTIZERS, WEIGHT_PERCENTILES, Quantizer, UniformQuantizer
from iasvit.reconstruction import SegmentJob, share_code, stream
from iasvit.spec import QuantSpec


@dataclass(frozen=True)
class BlockRecipe:
    """What a run does unless told otherwise.

    Attributes:
        iterations: steps of a block.
        lr: of the weights, or of their rounding.
        scale_lr: of activation scales.
        relu_iterations: steps of an MLP whose GELU has become a ReLU, where a method has that.
        relu_lr: of these.
    """

    iterations: int
    lr: float
    scale_lr: float
    relu_iterations: int = 20_000
    relu_lr: float = 4e-5


LEARNT_BYTES = 64  # a weight: α, what ⌊⌋ leaves, gradient, Adam's two moments, and what h(α) and its regulariser make

# AdaRound: the papers'; a fortieth of the steps at rates that reach as far; the same for the embedded mini models.
ROUNDING_RECIPES = {
    "paper": BlockRecipe(20_000, 1e-3, 4e-5),
    "fast": BlockRecipe(500, 2e-2, 4e-4, 500, 4e-4),
    "mini": BlockRecipe(300, 3e-2, 1e-3, 300, 1e-3),
}


@dataclass
class BlockReconstruction:
    """A method that sets all quantizers, then learns block after block in the order of the forward.

    All quantizers are uniform unless `softmax` says otherwise: of weights per output channel, of activations per tensor
    (per channel after LayerNorm until that is folded into the LayerNorm and its Linears, before anything is learnt). A
    subclass chooses the loss, and what else makes it different.

    Options:
        recipe: what iterations and learning rates are where they are not given: "paper", "fast" or "mini", which is for
            the embedded models.
        iterations: steps of a block.
        batch_size: images a step.
        lr: Adam's learning rate of the rounding, constant, or of the weights, along a cosine to 0.
        scale_lr: of activation scales, along a cosine to 0.
        drop: probability of an element's staying in full precision while a block is learnt (QDrop).
        initialisation: of quantizers, a name in `INITIALISATIONS`.
        init_size: images that quantizers are initialised on.
        softmax: the post-softmax quantizer, a name in `SOFTMAX_QUANTIZERS`.
        seed: of what is drawn.
        autocast: learn with products in bfloat16.
        compile: learn with blocks that torch.compile has fused.
        memory_budget: see `iasvit.options.MemoryBudget`.
    """

    recipe: Annotated[str, OneOf(("paper", "fast", "mini"))] = "paper"
    iterations: Annotated[int | None, Range(0)] = None
    batch_size: Annotated[int, Range(1)] = 32
    lr: Annotated[float | None, Range(0)] = None
    scale_lr: Annotated[float | None, Range(0)] = None
    drop: Annotated[float, Range(0, 1)] = 0.5
    initialisation: Annotated[str, OneOf(tuple(INITIALISATIONS))] = "searched"
    init_size: Annotated[int, Range(1)] = 128
    softmax: Annotated[str, OneOf(SOFTMAX_QUANTIZERS)] = "uniform"
    seed: int = 0
    autocast: bool = False
    compile: bool = False
    memory_budget: MemoryBudget = None

    name: ClassVar[str]
    reference: ClassVar[str] = ""
    published: ClassVar[str] = ""
    version: ClassVar[int] = 1
    changelog: ClassVar[dict[int, str]] = {}
    recipes: ClassVar[dict[str, BlockRecipe]] = ROUNDING_RECIPES
    adaround: ClassVar[bool] = True  # learn the rounding; else the weights
    suffixes: ClassVar[bool] = False  # whether each step runs the rest of the network too
    head_divergence: ClassVar[bool] = True  # whether a classifier's answers are compared by their divergence

    def __post_init__(self) -> None:
        check_fields(self)

    def loss(self) -> Loss:
        """What a block's outputs are compared by; one for each block."""
        return Loss()

    def settings(self) -> Settings:
        """How a block is learnt."""
        recipe = self.recipes[self.recipe]
        return Settings(
            iterations=recipe.iterations if self.iterations is None else self.iterations,
            batch_size=self.batch_size,
            adaround=self.adaround,
            lr=recipe.lr if self.lr is None else self.lr,
            scale_lr=recipe.scale_lr if self.scale_lr is None else self.scale_lr,
            drop=self.drop,
            head_divergence=self.head_divergence,
            autocast=self.autocast,
            compile=self.compile,
        )

    def smooth_settings(self, settings: Settings) -> Settings | None:
        """How a block is learnt before its weights are quantized; None where it is not (I&S-ViT's stage 1)."""
        return None

    def forwards(self, calib_size: int, detector: bool) -> float:
        """See `iasvit.methods.Method`; a step is a forward and a backward with quantizers, and of what is behind."""
        steps = self.settings().iterations * self.batch_size
        return (3.5 + (12 if self.suffixes else 0)) * steps + 30 * calib_size

    @property
    def transforms(self) -> tuple[str, ...]:
        """What `transform` does, for descriptions."""
        done = {"rotation": ("rotate_residual", "rotate_heads"), "relu": ("relu_mlps (changes the network)",)}
        return tuple(name for option, names in done.items() if getattr(self, option, False) for name in names)

    def describe(self) -> Description:
        """See `iasvit.methods.Method`."""
        cls, iterations = type(self), self.settings().iterations
        summary = " ".join((cls.__doc__ or "").split("\n\n")[0].split()).partition(". ")[0].rstrip(".")
        return Description(self.name, summary, cls.reference, cls.published, 1024, iterations, self.transforms)

    def transform(self, model: nn.Module, images: ActivationStore, progress: Progress) -> nn.Module:
        """The network that is quantized in the model's place; the model itself unless a subclass changes it."""
        return model

    def relu_model(
        self,
        model: nn.Module,
        images: ActivationStore,
        progress: Progress,
        iterations: int | None,
        weights: dict[str, Tensor] | None = None,
    ) -> nn.Module:
        """The network with ReLU MLPs, for `transform`; see `relu_transformed`. Iterations: None for the recipe's."""
        recipe = self.recipes[self.recipe]
        iterations, lr = recipe.relu_iterations if iterations is None else iterations, recipe.relu_lr
        options = {"iterations": iterations, "lr": lr, "batch_size": self.batch_size, "seed": self.seed}
        return relu_transformed(model, images, progress, **options, weights=weights)

    def quantize(self, model: nn.Module, calibration: Calibration, spec: QuantSpec, progress: Progress) -> nn.Module:
        """See `iasvit.methods.Method`."""
        settings = self.settings()
        device = next(model.parameters()).device
        images = calibration_store(calibration, device, images_share(self.memory_budget))
        if self.loss().one_size and len(list(images.ranges(len(images)))) > 1:
            raise IasvitError(
                f"{self.name} weighs each position of a block's output, so all calibration images need one size"
            )
        quantizable = partial(prepare, model, spec, self.weight_quantizer, self.activation_quantizer)
        share = share_of(self.memory_budget, self.name, quantizable, images, self.need(images))
        model = self.transform(model, images, progress)
        quantized = prepare(model, spec, self.weight_quantizer, self.activation_quantizer)
        if self.compile:
            share_code(quantized)
        teacher = Teacher(model, images, self.name, self.compile)
        if self.loss().reads_answers and teacher.has_logits:
            teacher.answers()

        smooth = self.smooth_settings(settings)

        def start(images: ActivationStore) -> None:
            with progress.phase("calibration"):
                if smooth is None:
                    self.initialise(quantized, images, share)
                else:
                    INITIALISATIONS[self.initialisation](quantized, images, self.init_size, share)
                self.refine(quantized, images, share)

        def fit(job: SegmentJob) -> None:
            with progress.phase("reconstruction, blocks"):
                if smooth is not None:
                    layers = job.segment.layers()
                    for layer in layers:
                        layer.weight_quantizer.enabled = False
                    reconstruct(job, teacher, Loss(), smooth, self.seed)
                    fold(quantized, layers)
                    for layer in layers:
                        layer.calibrate_weight()
                reconstruct(job, teacher, self.loss(), settings, self.seed)

        steps = (settings.iterations + (smooth.iterations if smooth else 0)) * sum(
            bool(segment.modules) for segment in segments(quantized)
        )
        with frozen(model):
            stream(model, quantized, images, fit, progress, start=start, batch_size=64, steps=steps)
            self.finish(quantized, teacher, settings, progress)
        for _, layer in quant_layers(quantized):
            layer.round_weight()
        return quantized

    def initialise(self, quantized: nn.Module, images: ActivationStore, share: int | None) -> None:
        """Set all quantizers before anything is learnt; `share`: bytes for each store of activations."""
        initialise(self.initialisation, quantized, images, self.init_size, share)

    def refine(self, quantized: nn.Module, images: ActivationStore, share: int | None) -> None:
        """Change quantizers that are set, before anything is learnt; nothing by default."""

    def finish(self, quantized: nn.Module, teacher: Teacher, settings: Settings, progress: Progress) -> None:
        """What is done when all blocks are learnt, before weights are rounded for good; nothing by default."""

    def need(self, images: ActivationStore) -> Callable[[nn.Module, Tensor], int]:
        """See `share_of`: a pass that initialises, a step of learning, gradients behind the block."""
        count = min(len(images), max(self.batch_size, images.passes(self.init_size)))
        step, drop = min(len(images), self.batch_size), self.settings().drop
        parts = partial(learning, adaround=False, drop=drop)  # the weights' are no part of what grows with images

        def largest(model: nn.Module, few: Tensor) -> int:
            behind = network_need(model, few, max(step, GRADIENT_IMAGES), learn=False) if self.loss().reads_on else 0
            of_block = learning_need(model, few, step, parts, LEARNT_BYTES, inputs=4 if drop else 1)
            return max(forward_need(model, few, count), of_block, behind)

        return largest

    def weight_quantizer(self, site: Site) -> Quantizer:
        """Uniform, one scale and zero-point per output channel."""
        return UniformQuantizer(site.n_bits, channel_dim=0, percentiles=WEIGHT_PERCENTILES)

    def activation_quantizer(self, site: Site) -> Quantizer:
        """`softmax` after softmax, per channel after LayerNorm (until that is folded), per tensor elsewhere."""
        if site.role == "softmax":
            return SOFTMAX_QUANTIZERS[self.softmax](site.n_bits)
        return UniformQuantizer(site.n_bits, channel_dim=-1 if site.role == "norm" else None)
