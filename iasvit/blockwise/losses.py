"""What a block's outputs are compared by: the part in which the methods of block reconstruction differ most."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from iasvit.blockwise.parts import Learnt
from iasvit.blockwise.teacher import Teacher
from iasvit.calibration import ActivationStore, Store, tensors
from iasvit.errors import IasvitError
from iasvit.models import Activation
from iasvit.reconstruction import SegmentJob

TINY = 1e-12
GRADIENT_IMAGES = 16  # whose gradients are taken at once


@dataclass(frozen=True)
class Block:
    """A segment while it is learnt.

    Attributes:
        job: its inputs and targets.
        learnt: what stands in its quantizers' place.
        teacher: the full-precision model.
        iterations: steps that it is learnt for.
        seed: of what is drawn.
    """

    job: SegmentJob
    learnt: Learnt
    teacher: Teacher
    iterations: int
    seed: int

    def batches(self, size: int = GRADIENT_IMAGES) -> Iterator[tuple[range, Activation]]:
        """(images, full-precision outputs) of all images in turn."""
        store = self.job.targets
        for images in store.ranges(store.leading.passes(size)):
            yield images, store.gather(images)

    @torch.no_grad()
    def outputs(self, inputs: Store, images: range) -> Tensor:
        """What the block puts out for these inputs, everything in it being quantized."""
        with self.learnt.whole():
            return tensors(self.job.segment.run(inputs.gather(images)))[0]

    def with_others(self, output: Tensor, given: Activation) -> Activation:
        """An output in the place of the first of the given ones."""
        return (output, *given[1:]) if isinstance(given, tuple) else output


def token_sum(error: Tensor) -> Tensor:
    """Mean over images and channels of errors summed over the tokens, (B, tokens..., C) → scalar; logits: over classes.

    This and the tenth of it is the scale that the published weight of AdaRound's regulariser, 0.01, goes with.
    """
    return error.sum(dim=1).mean() if error.ndim < 3 else error.flatten(1, -2).sum(dim=1).mean()


class Loss:
    """Compares outputs with targets; this one by their squared error (`token_sum` / 10).

    Attributes:
        reads_answers: whether it reads the model's logits, or what the heads of a model without logits read.
        one_size: whether it weighs positions of the block's output, so that all images need one size.
        reads_on: whether it runs the rest of the network behind the block, and takes gradients there.
    """

    reads_answers = False
    one_size = False
    reads_on = False

    @property
    def resident(self) -> bool:
        """Whether it reads from the device alone, so that a step can be captured."""
        return True

    def begin(self, block: Block) -> None:
        """Called once, with what is learnt in place and as it is at first."""

    def before(self, block: Block, iteration: int) -> bool:
        """Called before each step; True where `set_unit` is to follow."""
        return False

    def set_unit(self, output: Tensor, target: Tensor, images: Tensor) -> None:
        """Called with the first batch before the first step, and when `before` says so, without gradients."""

    def __call__(self, output: Tensor, target: Tensor, images: Tensor) -> Tensor:
        """The loss of a batch: output and target (B, ...), float32, of these images (B,), int64."""
        return token_sum((output - target).square()) / 10


class MeanSquare(Loss):
    """The mean squared error over everything."""

    def __call__(self, output: Tensor, target: Tensor, images: Tensor) -> Tensor:
        """See `Loss`."""
        return (output - target).square().mean()


class Divergence(Loss):
    """KL(softmax(target) ‖ softmax(output)) of logits, mean over the batch: for a classifier's last layer."""

    def __call__(self, output: Tensor, target: Tensor, images: Tensor) -> Tensor:
        """See `Loss`."""
        return F.kl_div(output.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True)


class Fisher(Loss):
    """BRECQ (arXiv:2102.05426, eq. 10): squared error weighted by the squared task gradient, element by element.

    The gradient is that of log p(y) at the full-precision model, for labels drawn from its own predictions, one an
    image. (The public code takes that of a KL divergence after the block is quantized.) Weights have a mean of 1.
    """

    reads_on = True

    def begin(self, block: Block) -> None:
        """See `Loss`."""
        generator = torch.Generator().manual_seed(block.seed)
        store = ActivationStore(block.job.targets.memory_budget, block.job.targets.folder)
        total = torch.zeros((), dtype=torch.float64, device=block.job.targets.device)
        count = 0
        for _, given in block.batches():
            weight = block.teacher.likelihood_gradient(block.job.index, given, generator).square()
            total += weight.sum(dtype=torch.float64)
            count += weight.numel()
            store.append(weight)
        _check_finite(total, block)
        self.weights, self.unit = store, (total / count).float().clamp_min(torch.finfo(torch.float32).tiny)

    @property
    def resident(self) -> bool:
        """See `Loss`."""
        return self.weights.resident

    def __call__(self, output: Tensor, target: Tensor, images: Tensor) -> Tensor:
        """See `Loss`."""
        return token_sum((output - target).square() * (self.weights.gather(images) / self.unit)) / 10


class PerturbationHessian(Loss):
    """APHQ-ViT (arXiv:2504.02508): squared error weighted by the mean change of the task's gradient by a perturbation.

    H = mean over images of |g(z + δ) - g(z - δ)|, g the gradient of the KL divergence (T = 20) to the full-precision
    answers at the block's output z; the loss begins at 2.

    The public code adds a constant δ = 1e-6 to all of z. LayerNorm, before every layer that reads the residual stream,
    subtracts a constant, so that this moves nothing but the rounding noise. Here δ has a random sign at each element,
    and a size that float32 resolves: `step` times the root mean square of z.
    """

    reads_answers = True
    one_size = True
    reads_on = True

    def __init__(self, step: float = 1e-2, temperature: float = 20.0) -> None:
        self.step, self.temperature = step, temperature

    def begin(self, block: Block) -> None:
        """See `Loss`."""
        batches = block.batches()
        total = perturbed(block.teacher, block.job.index, batches, self.step, self.temperature, block.seed)
        _check_finite(total, block)
        self.weight = total / total.mean().clamp_min(torch.finfo(torch.float32).tiny)
        self.unit = torch.ones((), device=self.weight.device)

    def set_unit(self, output: Tensor, target: Tensor, images: Tensor) -> None:
        """See `Loss`."""
        self.unit.copy_(self._error(output, target).clamp_min(TINY) / 2)

    def _error(self, output: Tensor, target: Tensor) -> Tensor:
        return ((output - target).square() * self.weight).mean()

    def __call__(self, output: Tensor, target: Tensor, images: Tensor) -> Tensor:
        """See `Loss`."""
        return self._error(output, target) / self.unit


def perturbed(
    teacher: Teacher,
    index: int,
    batches: Iterable[tuple[range, Activation]],
    step: float = 1e-2,
    temperature: float = 20.0,
    seed: int = 0,
) -> Tensor:
    """Σ over images of |g(z + δ) - g(z - δ)| at the outputs z of a segment, (1, ...); see `PerturbationHessian`.

    Args:
        teacher: the full-precision model.
        index: of the segment.
        batches: (images, what the segment puts out for them).
        step: root mean square of δ over that of z.
        temperature: of the divergence.
        seed: of the signs.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(())
    for images, given in batches:
        z, *others = tensors(given)
        signs = torch.randint(0, 2, z.shape, generator=generator).to(z) * 2 - 1
        delta = signs * (step * z.square().mean().sqrt())
        up, down = (
            teacher.divergence_gradient(
                index,
                (z + side * delta, *others) if isinstance(given, tuple) else z + side * delta,
                given,
                images,
                temperature,
            )
            for side in (1, -1)
        )
        total = total.to(z) + (up - down).abs().sum(dim=0, keepdim=True)
    return total


def mlp_weights(teacher: Teacher, images: ActivationStore, seed: int) -> dict[str, Tensor]:
    """Segment's name → the perturbation Hessian of its output, of root mean square 1, for `relu_mlps`.

    That of an MLP's output is the same where nothing stands between it and the residual stream.
    """
    result: dict[str, Tensor] = {}
    store: Store = images
    blocks = {mlp.segment for mlp in teacher.adapter.mlps(teacher.model)}
    for index, segment in enumerate(teacher.chain[:-1]):
        store = store.map(segment.run, 64, segment.name)
        if segment.name in blocks:
            batches = ((some, store.gather(some)) for some in store.ranges(store.leading.passes(GRADIENT_IMAGES)))
            weight = perturbed(teacher, index, batches, seed=seed).flatten(1, -2)  # an MLP may read maps as rows
            result[segment.name] = weight / weight.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return result


class LowRankFisher(Loss):
    """FIMA-Q (arXiv:2506.11543): a diagonal and a low-rank Fisher, both from the KL divergence's gradient, refreshed.

    `refreshes` times, evenly over the steps, the block as it is then runs on all images: r, the mean |∂KL/∂output|
    (T = 20), and d, the mean |output - target|, become rows of G and D. With M = (D Dᵀ)⁻¹ (damped: rows of D differ
    little) and e = |output - target| the loss is mean(e G ᵀ M G eᵀ) + mean(e² ⊙ mean of G's rows), each part over its
    value at the last refresh.
    """

    reads_answers = True
    one_size = True
    reads_on = True

    def __init__(self, refreshes: int = 5, temperature: float = 20.0, damping: float = 1e-6) -> None:
        self.refreshes, self.temperature, self.damping = refreshes, temperature, damping

    def begin(self, block: Block) -> None:
        """See `Loss`."""
        width = tensors(block.job.targets.gather([0]))[0].numel()
        device = block.job.targets.device
        self.rows = 0
        # Rows to come are zero, and count for nothing; a captured step reads these very tensors.
        self.gradients = torch.zeros(self.refreshes, width, device=device)
        self.errors = torch.zeros(self.refreshes, width, device=device)
        self.inverse = torch.zeros(self.refreshes, self.refreshes, device=device)
        self.diagonal = torch.zeros(width, device=device)
        self.units = torch.ones(2, device=device)

    def before(self, block: Block, iteration: int) -> bool:
        """See `Loss`."""
        every = max(1, block.iterations // self.refreshes)
        if iteration % every or self.rows == self.refreshes:
            return False
        gradient, error = torch.zeros_like(self.diagonal), torch.zeros_like(self.diagonal)
        for images, given in block.batches():
            output = block.outputs(block.job.inputs_fp, images)
            z = block.with_others(output, given)
            found = block.teacher.divergence_gradient(block.job.index, z, given, images, self.temperature)
            gradient += found.flatten(1).abs().sum(dim=0)
            error += (output - tensors(given)[0]).flatten(1).abs().sum(dim=0)
        count = len(block.job.targets)
        _check_finite(gradient.sum() + error.sum(), block)
        self.gradients[self.rows], self.errors[self.rows] = gradient / count, error / count
        self.rows += 1
        known = self.errors[: self.rows].double()
        self.inverse[: self.rows, : self.rows] = damped_inverse(known @ known.T, self.damping).float()
        self.diagonal.copy_(self.gradients[: self.rows].mean(dim=0))
        return True

    def set_unit(self, output: Tensor, target: Tensor, images: Tensor) -> None:
        """See `Loss`."""
        self.units.copy_(self._parts(output, target).clamp_min(torch.finfo(torch.float32).tiny))

    def _parts(self, output: Tensor, target: Tensor) -> Tensor:
        error = (output - target).abs().flatten(1)
        projected = error @ self.gradients.T
        low_rank = ((projected @ self.inverse) * projected).sum(dim=1).mean()
        return torch.stack([low_rank, (error.square() * self.diagonal).mean()])

    def __call__(self, output: Tensor, target: Tensor, images: Tensor) -> Tensor:
        """See `Loss`."""
        return (self._parts(output, target) / self.units).sum()


def damped_inverse(matrix: Tensor, damping: float) -> Tensor:
    """(A + damping·mean(diag A)·I)⁻¹ of a symmetric A that is not negative, and 0 of A = 0; float64."""
    size = matrix.diagonal().mean()
    if size <= 0:
        return torch.zeros_like(matrix)
    damped = matrix + damping * size * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.inv(damped)


class LeastSquaresHessian(Loss):
    """LS-ViT (CVPR 2026): a diagonal and a rank-1 Hessian that fit g = H Δz over the images by least squares.

    g is the gradient of the KL divergence to the full-precision answers at the output of the block, quantized and
    behind a quantized prefix, and Δz the output's error: one backward pass a block. h = Σ g Δz / Σ Δz², elementwise,
    and u = Σ g sqrt(Δzᵀg) / Σ Δzᵀg; e = output - target costs eᵀ diag(h) e + (uᵀe)², each over its first value. What
    makes a Hessian negative counts as 0: elements of h, and images of Δzᵀg < 0.
    """

    reads_answers = True
    one_size = True
    reads_on = True

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = temperature

    def begin(self, block: Block) -> None:
        """See `Loss`."""
        sums: list[Tensor] | None = None
        for images, given in block.batches():
            output = block.outputs(block.job.inputs_q, images)
            z = block.with_others(output, given)
            g = block.teacher.divergence_gradient(block.job.index, z, given, images, self.temperature).flatten(1)
            dz = (output - tensors(given)[0]).flatten(1)
            work = (dz * g).sum(dim=1, keepdim=True).clamp_min(0)
            parts = [(g * dz).sum(dim=0), dz.square().sum(dim=0), (g * work.sqrt()).sum(dim=0), work.sum()]
            sums = parts if sums is None else [total + part for total, part in zip(sums, parts, strict=True)]
        _check_finite(torch.stack([part.sum() for part in sums]), block)
        tiny = torch.finfo(torch.float32).tiny
        self.diagonal = (sums[0] / sums[1].clamp_min(tiny)).clamp_min(0)
        self.direction = sums[2] / sums[3].clamp_min(tiny)
        self.units = torch.ones(2, device=self.diagonal.device)

    def set_unit(self, output: Tensor, target: Tensor, images: Tensor) -> None:
        """See `Loss`."""
        self.units.copy_(self._parts(output, target).clamp_min(torch.finfo(torch.float32).tiny))

    def _parts(self, output: Tensor, target: Tensor) -> Tensor:
        error = (output - target).flatten(1)
        return torch.stack([(error.square() @ self.diagonal).mean(), (error @ self.direction).square().mean()])

    def __call__(self, output: Tensor, target: Tensor, images: Tensor) -> Tensor:
        """See `Loss`."""
        return (self._parts(output, target) / self.units).sum()


@dataclass
class FrozenSuffix(Loss):
    """GLF-Q: the error of the model's features behind the frozen full-precision rest, and the block's own.

    MSE(features) / c₁ · `features` + KL(logits) · `logits` + MSE(block) / c₂ · `local`, c what each is on the first
    batch. The last segment has its own part alone. A model without logits compares `Teacher.error_behind` for features.

    Attributes:
        features: weight of the error of what the last Linear reads.
        local: weight of the block's own error.
        logits: weight of the divergence of the answers, over its first value.
        inner: what the block's own error is measured by.
    """

    features: float = 1.0
    local: float = 2.0
    logits: float = 0.0
    inner: Loss = field(default_factory=Loss)

    reads_answers = True
    reads_on = True

    def begin(self, block: Block) -> None:
        """See `Loss`."""
        self.inner.begin(block)
        self.teacher, self.index = block.teacher, block.job.index
        self.is_last = block.job.index + 1 == len(block.teacher.chain)
        self.others = block.job.targets if isinstance(block.job.targets.gather([0]), tuple) else None
        self.targets = block.teacher.answers() if block.teacher.has_logits else None
        if self.logits and self.targets is None:
            raise IasvitError(f"{block.teacher.of}: the model puts out no table of logits to compare; give 0 for them")
        self.units = torch.ones(3, device=block.job.targets.device)

    def before(self, block: Block, iteration: int) -> bool:
        """See `Loss`."""
        return self.inner.before(block, iteration)

    @property
    def resident(self) -> bool:
        """See `Loss`."""
        return self.inner.resident and (self.others is None or self.others.resident)

    def set_unit(self, output: Tensor, target: Tensor, images: Tensor) -> None:
        """See `Loss`."""
        self.inner.set_unit(output, target, images)
        self.units.copy_(self._parts(output, target, images).clamp_min(TINY))

    def _whole(self, output: Tensor, target: Tensor, images: Tensor) -> tuple[Activation, Activation]:
        """Output and target, each with what the block hands on beside it."""
        if self.others is None:
            return output, target
        others = tensors(self.others.gather(images))[1:]
        return (output, *others), (target, *others)

    def _parts(self, output: Tensor, target: Tensor, images: Tensor) -> Tensor:
        own = self.inner(output, target, images)
        if self.is_last:
            return torch.stack([torch.zeros_like(own), own, torch.zeros_like(own)])
        x, full = self._whole(output, target, images)
        if self.targets is None:
            error = self.teacher.error_behind(self.index, x, full)
            return torch.stack([error, own, torch.zeros_like(own)])
        logits, features = self.teacher.behind(self.index, x)
        full_logits, full_features = (answers[images] for answers in self.targets)
        divergence = F.kl_div(
            logits.float().log_softmax(1), full_logits.log_softmax(1), reduction="batchmean", log_target=True
        )
        return torch.stack([(features.float() - full_features).square().mean(), own, divergence])

    def __call__(self, output: Tensor, target: Tensor, images: Tensor) -> Tensor:
        """See `Loss`."""
        global_, own, divergence = (self._parts(output, target, images) / self.units).unbind()
        return self.features * global_ + self.local * own + self.logits * divergence


def _check_finite(value: Tensor, block: Block) -> None:
    if not torch.isfinite(value).all():
        raise IasvitError(
            f"the gradient at the output of {block.job.segment.name!r} is NaN or Inf; check the model and the images"
        )
