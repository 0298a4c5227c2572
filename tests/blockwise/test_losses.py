"""Each loss against a slow, plain version of its paper's equations, on a block of a tiny ViT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_models import images, vit
from torch import Tensor, nn

from iasvit.blockwise import (
    BlockReconstruction,
    Divergence,
    Fisher,
    FrozenSuffix,
    LeastSquaresHessian,
    Loss,
    LowRankFisher,
    MeanSquare,
    PerturbationHessian,
    Teacher,
    learning,
)
from iasvit.blockwise.initialise import initialise
from iasvit.blockwise.losses import Block, damped_inverse, token_sum
from iasvit.calibration import ActivationStore, calibration_store
from iasvit.errors import IasvitError
from iasvit.models import prepare
from iasvit.progress import Progress
from iasvit.reconstruction import SegmentJob, stream
from iasvit.spec import QuantSpec

INDEX = 2  # of blocks.0 among the segments
COUNT = 10


class Example:
    """A block of a quantized tiny ViT, all before it quantized, and what the losses are to be compared on."""

    def __init__(self) -> None:
        self.model = vit().requires_grad_(False)
        method = BlockReconstruction()
        quantized = prepare(self.model, QuantSpec.parse("W3A3"), method.weight_quantizer, method.activation_quantizer)
        self.images = calibration_store(images(COUNT), torch.device("cpu"))
        self.teacher = Teacher(self.model, self.images, "test")
        found: list[SegmentJob] = []
        stream(
            self.model,
            quantized,
            self.images,
            found.append,
            Progress(),
            start=lambda store: initialise("propagated", quantized, store, 8, None),
        )
        self.job = next(job for job in found if job.index == INDEX)
        self.z = self.job.targets.gather(range(COUNT))
        generator = torch.Generator().manual_seed(9)
        self.output = self.z + 0.3 * torch.randn(self.z.shape, generator=generator)
        self.every = torch.arange(COUNT)

    @torch.no_grad()
    def quantized_output(self, inputs: ActivationStore) -> Tensor:
        return self.job.segment.run(inputs.gather(range(COUNT)))

    def answers(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and features behind the block in full precision, in plain calls."""
        features = self.model.norm(self.model.blocks[1](z))[:, 0]
        return self.model.head(features), features

    def gradients(self, z: Tensor, temperature: float) -> Tensor:
        """∂KL/∂z, image by image."""
        found = []
        for each, full in zip(z, self.z, strict=True):
            leaf = each[None].clone().requires_grad_()
            p = (self.answers(full[None])[0] / temperature).softmax(1)
            q = (self.answers(leaf)[0] / temperature).softmax(1)
            (p * (p.log() - q.log())).sum().backward()
            found.append(leaf.grad)
        return torch.cat(found)

    @contextmanager
    def begun(self, loss: Loss, iterations: int = 4) -> Iterator[Block]:
        with learning(self.job.segment, adaround=True, drop=0.5) as learnt:
            block = Block(self.job, learnt, self.teacher, iterations, seed=3)
            loss.begin(block)
            yield block


@pytest.fixture(scope="module")
def example() -> Example:
    return Example()


def close(value: Tensor, expected: Tensor | float, rel: float = 2e-3) -> bool:
    return value.item() == pytest.approx(float(expected), rel=rel)


def test_the_squared_error_is_summed_over_tokens_and_a_tenth(example: Example) -> None:
    error = (example.output - example.z) ** 2
    expected = sum(error[i, :, c].sum() for i in range(COUNT) for c in range(32)) / (COUNT * 32) / 10
    assert close(Loss()(example.output, example.z, example.every), expected)
    assert close(token_sum(error.view(COUNT, -1, 1, 32)), 10 * expected)
    assert close(MeanSquare()(example.output, example.z, example.every), error.mean())


def test_divergence() -> None:
    p, q = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).softmax(2)
    assert close(Divergence()(q.log(), p.log() + 3, torch.arange(5)), (p * (p / q).log()).sum() / 5, 1e-5)


def test_brecq_weights_by_the_squared_gradient_of_labels_drawn(example: Example) -> None:
    loss = Fisher()
    with example.begun(loss):
        value = loss(example.output[2:5], example.z[2:5], example.every[2:5])
    generator = torch.Generator().manual_seed(3)
    leaf = example.z.clone().requires_grad_()
    log_p = example.answers(leaf)[0].log_softmax(1)
    labels = torch.multinomial(log_p.detach().double().exp(), 1, generator=generator)
    log_p.gather(1, labels).sum().backward()
    weight = leaf.grad**2 / (leaf.grad**2).mean()
    error = (weight * (example.output - example.z) ** 2)[2:5]
    assert close(value, error.sum(1).mean() / 10)


def test_aphq_weights_by_the_mean_change_of_the_gradient(example: Example) -> None:
    loss = PerturbationHessian()
    with example.begun(loss):
        loss.set_unit(example.output[:3], example.z[:3], example.every[:3])
        first, value = (loss(example.output[s], example.z[s], example.every[s]) for s in (slice(3), slice(3, 7)))
    generator = torch.Generator().manual_seed(3)
    signs = torch.randint(0, 2, example.z.shape, generator=generator) * 2.0 - 1
    delta = signs * 0.01 * example.z.square().mean().sqrt()
    change = (example.gradients(example.z + delta, 20.0) - example.gradients(example.z - delta, 20.0)).abs().mean(0)
    error = change * (example.output - example.z) ** 2
    assert close(first, 2.0)
    assert close(value, 2 * error[3:7].mean() / error[:3].mean(), 2e-2)


def test_a_constant_perturbation_as_published_moves_only_rounding_noise(example: Example) -> None:
    """LayerNorm subtracts it before anything reads the residual stream: why `PerturbationHessian` draws signs."""
    model = example.model.double()
    try:
        z = example.z.double()
        with torch.no_grad():
            logits = [model.head(model.norm(model.blocks[1](z + delta))[:, 0]) for delta in (0.0, 1e-2)]
        assert (logits[0] - logits[1]).abs().max() < 1e-9
    finally:
        model.float()


def test_fima_adds_a_row_at_each_refresh(example: Example) -> None:
    loss = LowRankFisher(refreshes=2)
    with example.begun(loss, iterations=4) as block:
        assert loss.before(block, 0)
        assert not loss.before(block, 1)
        rounding = next(iter(block.learnt.roundings.values()))
        rounding.alpha.data.add_(2.0)
        with block.learnt.whole():
            outputs = [example.quantized_output(example.job.inputs_fp)]
            rounding.alpha.data.sub_(2.0)
            outputs.insert(0, example.quantized_output(example.job.inputs_fp))
            rounding.alpha.data.add_(2.0)
        assert loss.before(block, 2)
        assert not loss.before(block, 3)
        batches = slice(3), slice(3, 8)
        loss.set_unit(example.output[batches[0]], example.z[batches[0]], example.every[batches[0]])
        value = loss(example.output[batches[1]], example.z[batches[1]], example.every[batches[1]])
    rows_g = torch.stack([example.gradients(o, 20.0).flatten(1).abs().mean(0) for o in outputs]).double()
    rows_d = torch.stack([(o - example.z).flatten(1).abs().mean(0) for o in outputs]).double()
    gram = rows_d @ rows_d.T
    inverse = torch.linalg.inv(gram + 1e-6 * gram.diagonal().mean() * torch.eye(2))

    def parts(which: slice) -> tuple[float, float]:
        low_rank, diagonal = [], []
        for e in (example.output - example.z)[which].flatten(1).abs().double():
            a = rows_g @ e
            low_rank.append(float(a @ inverse @ a))
            diagonal.append(float((e**2 * rows_g.mean(0)).mean()))
        return sum(low_rank) / len(low_rank), sum(diagonal) / len(diagonal)

    unit, got = parts(batches[0]), parts(batches[1])
    assert close(value, got[0] / unit[0] + got[1] / unit[1], 1e-2)


def test_a_singular_matrix_is_damped() -> None:
    row = torch.tensor([[1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    assert torch.isfinite(damped_inverse(row @ row.T, 1e-6)).all()
    assert torch.equal(damped_inverse(torch.zeros(2, 2), 1e-6), torch.zeros(2, 2))


def test_ls_vit_fits_a_hessian_by_least_squares(example: Example) -> None:
    loss = LeastSquaresHessian()
    with example.begun(loss) as block:
        with block.learnt.whole():
            quantized = example.quantized_output(example.job.inputs_q)
        loss.set_unit(example.output[:3], example.z[:3], example.every[:3])
        value = loss(example.output[3:8], example.z[3:8], example.every[3:8])
    g = example.gradients(quantized, 1.0).flatten(1)
    dz = (quantized - example.z).flatten(1)
    numerator, denominator = torch.zeros_like(g[0]), torch.zeros_like(g[0])
    direction, work = torch.zeros_like(g[0]), 0.0
    for g_n, dz_n in zip(g, dz, strict=True):
        numerator += g_n * dz_n
        denominator += dz_n**2
        along = max(0.0, float(g_n @ dz_n))
        direction += g_n * along**0.5
        work += along
    h, u = (numerator / denominator).clamp_min(0), direction / work

    def parts(which: slice) -> tuple[float, float]:
        errors = (example.output - example.z)[which].flatten(1)
        return float(torch.stack([e @ (h * e) for e in errors]).mean()), float(
            torch.stack([(u @ e) ** 2 for e in errors]).mean()
        )

    unit, got = parts(slice(3)), parts(slice(3, 8))
    assert close(value, got[0] / unit[0] + got[1] / unit[1], 1e-2)


def test_glf_compares_the_features_behind_the_block(example: Example) -> None:
    loss = FrozenSuffix(features=1.0, local=2.0, logits=0.5, inner=MeanSquare())
    with example.begun(loss):
        loss.set_unit(example.output[:3], example.z[:3], example.every[:3])
        value = loss(example.output[3:8], example.z[3:8], example.every[3:8])

    def parts(which: slice) -> Tensor:
        (q, f_q), (p, f_p) = example.answers(example.output[which]), example.answers(example.z[which])
        kl = (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1).mean()
        return torch.stack([(f_q - f_p).square().mean(), (example.output - example.z)[which].square().mean(), kl])

    expected = parts(slice(3, 8)) / parts(slice(3)) @ torch.tensor([1.0, 2.0, 0.5])
    assert close(value, expected)


@pytest.mark.parametrize("make", [Fisher, PerturbationHessian, LeastSquaresHessian])
def test_a_gradient_that_is_not_finite_is_one_sentence(
    example: Example, make: Callable[[], Loss], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad(*args: object, **kwargs: object) -> Tensor:
        return torch.full_like(example.z, torch.nan)

    monkeypatch.setattr(Teacher, "divergence_gradient", bad)
    monkeypatch.setattr(Teacher, "likelihood_gradient", bad)
    with pytest.raises(IasvitError, match=r"gradient at the output of 'blocks\.0' is NaN"), example.begun(make()):
        pass


def test_the_quantizers_are_back_afterwards(example: Example) -> None:
    before = [type(module) for module in example.job.segment.modules[0][1].modules()]
    with example.begun(Loss()):
        assert [type(m) for m in example.job.segment.modules[0][1].modules()] != before
    assert [type(module) for module in example.job.segment.modules[0][1].modules()] == before
    assert not any(isinstance(m, nn.Parameter) and m.requires_grad for m in example.model.parameters())
