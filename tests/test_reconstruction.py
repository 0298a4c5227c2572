"""Streaming reconstruction against re-running the model from its images, and the optimizer against plain torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import Tensor, nn

import iasvit
from iasvit import reconstruction
from iasvit.calibration import ActivationStore, calibrate_inputs, tensors
from iasvit.errors import IasvitError
from iasvit.models import Activation, segments
from iasvit.progress import Progress
from iasvit.quantizers import Quantizer
from iasvit.reconstruction import SegmentJob, optimize, squared_error, stream

BATCH = 5  # 12 images: batches of 5, 5 and 2


def everything(store: ActivationStore) -> Tensor:
    return store.gather(range(len(store)))


@torch.no_grad()
def rerun(model: nn.Module, images: Tensor, end: int) -> Tensor:
    """The activations entering segment `end`, computed from the images anew: the plain, slow way."""
    outputs = []
    for x in images.split(BATCH):
        for segment in segments(model)[:end]:
            x = segment.run(x)
        outputs.append(x)
    return torch.cat(outputs)


def quantize_only(job: SegmentJob) -> None:
    """Quantizers set, weights rounded, nothing learnt."""
    for layer in job.segment.layers():
        layer.weight_quantizer.enabled = False
    calibrate_inputs(job.segment.quantizers(weights=False), lambda: job.segment.run(everything(job.inputs_fp)))
    for layer in job.segment.layers():
        layer.calibrate_weight()
        layer.round_weight()


def learn(job: SegmentJob) -> None:
    """Also moves the weights: in a way that depends on all that the job holds."""
    quantize_only(job)
    parameters = [layer.weight for layer in job.segment.layers()]
    settings = {"iterations": 3, "batch_size": 4, "lr": 1e-2, "seed": job.index, "bar": job.bar}
    optimize(job.segment.run, parameters, job.inputs_q, job.targets, **settings)


def quantizable_copy(model: nn.Module) -> nn.Module:
    name = {"VisionTransformerDistilled": "deit", "SwinTransformer": "swin"}.get(type(model).__name__, "vit")
    return tiny_models.quantizable(tiny_models.MODELS[name]()).requires_grad_(False)


@pytest.mark.parametrize("budget", [None, 0])
def test_streaming_equals_rerunning_the_model_for_every_segment(
    model: nn.Module, images: Tensor, budget: int | None
) -> None:
    quantized = quantizable_copy(model)
    seen: list[int] = []

    def fit(job: SegmentJob) -> None:
        assert torch.equal(everything(job.inputs_fp), rerun(model, images, job.index))
        assert torch.equal(everything(job.targets), rerun(model, images, job.index + 1))
        assert torch.equal(everything(job.inputs_q), rerun(quantized, images, job.index))
        if job.index:
            assert not torch.allclose(everything(job.inputs_q), everything(job.inputs_fp), atol=1e-2)
        learn(job)
        seen.append(job.index)

    stream(model, quantized, images, fit, Progress(), batch_size=BATCH, memory_budget=budget)
    assert seen == [index for index, segment in enumerate(segments(model)) if segment.modules]


def count_runs(model: nn.Module) -> Counter[str]:
    """Counts how often each block, merging or embedding of the model runs, from now on."""
    counts: Counter[str] = Counter()
    for segment in segments(model):
        for name, module in segment.modules:
            module.register_forward_hook(lambda *_, name=name: counts.update([name]))
    return counts


def test_every_segment_runs_once_a_batch_however_deep_the_model(images: Tensor) -> None:
    model, quantized = tiny_models.vit(depth=6), tiny_models.quantizable(tiny_models.vit(depth=6))
    tiny_models.switch(quantized, False)
    full_runs, quantized_runs = count_runs(model), count_runs(quantized)
    stream(model, quantized, images, lambda job: None, Progress(), batch_size=BATCH)
    names = ["patch_embed", *(f"blocks.{i}" for i in range(6))]
    assert full_runs == {name: 3 for name in [*names, "head"]}
    assert quantized_runs == dict.fromkeys(names, 3)  # the head's output is nobody's input


def test_a_segment_between_layers_is_run_but_not_fitted(vit: nn.Module, images: Tensor) -> None:
    quantized = quantizable_copy(vit)
    names = []
    stream(vit, quantized, images, lambda job: (names.append(job.segment.name), quantize_only(job)), Progress())
    assert names == ["patch_embed", "blocks.0", "blocks.1", "head"]


class Interrupted(Exception):
    """Stands for whatever ends a run."""


def failing(fit: Callable[[SegmentJob], None], at: int) -> Callable[[SegmentJob], None]:
    def run(job: SegmentJob) -> None:
        fit(job)
        if job.index == at:  # after the work and before the record: the block has to be done again
            raise Interrupted

    return run


@pytest.mark.parametrize("at", [0, 2, -1])
def test_a_run_resumes_at_the_interrupted_segment_to_the_bit(
    model: nn.Module, images: Tensor, at: int, tmp_path: Path
) -> None:
    at %= len(segments(model))
    expected = quantizable_copy(model)
    stream(model, expected, images, learn, Progress(), batch_size=BATCH)

    first, second = quantizable_copy(model), quantizable_copy(model)
    with pytest.raises(Interrupted):
        stream(model, first, images, failing(learn, at), Progress(checkpoint=tmp_path), batch_size=BATCH)
    fitted: list[int] = []
    fit = lambda job: (fitted.append(job.index), learn(job))  # noqa: E731
    stream(model, second, images, fit, Progress(checkpoint=tmp_path), batch_size=BATCH)
    assert fitted == [index for index, s in enumerate(segments(model)) if s.modules and index >= at]
    assert tiny_models.same_bits(expected.state_dict(), second.state_dict())
    assert all(not parameter.requires_grad for parameter in second.parameters())

    third = quantizable_copy(model)  # all done: nothing is left to fit
    stream(model, third, images, pytest.fail, Progress(checkpoint=tmp_path), batch_size=BATCH)
    assert tiny_models.same_bits(expected.state_dict(), third.state_dict())


def test_the_bar_reaches_its_end_also_in_a_resumed_run(vit: nn.Module, images: Tensor, tmp_path: Path) -> None:
    class Watched(Progress):
        moved = 0

        def update(self, steps: int = 1) -> None:
            self.moved += steps

        @contextmanager
        def phase(self, name: str, total: int = 0) -> Iterator[Progress]:
            assert total == 12
            yield self

    # Four segments learn, 3 steps each.
    whole, cut, rest = Watched(), Watched(checkpoint=tmp_path), Watched(checkpoint=tmp_path)
    stream(vit, quantizable_copy(vit), images, learn, whole, steps=12)
    assert whole.moved == 12
    with pytest.raises(Interrupted):
        stream(vit, quantizable_copy(vit), images, failing(learn, 3), cut, steps=12)
    stream(vit, quantizable_copy(vit), images, learn, rest, steps=12)
    assert rest.moved == 12


def test_a_checkpoint_of_another_model_or_bits_is_refused(vit: nn.Module, images: Tensor, tmp_path: Path) -> None:
    stream(vit, quantizable_copy(vit), images, quantize_only, Progress(checkpoint=tmp_path))
    for other, spec in ((tiny_models.vit(depth=3), "W3A3"), (tiny_models.vit(), "W3A3,head=W4A3")):
        quantized = tiny_models.quantizable(other, spec)
        with pytest.raises(IasvitError, match=f"checkpoint in {tmp_path} belongs to another model or other bits"):
            stream(
                tiny_models.vit(depth=len(other.blocks)), quantized, images, pytest.fail, Progress(checkpoint=tmp_path)
            )


def test_nan_names_the_layer_it_left(images: Tensor) -> None:
    model = tiny_models.vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[0] = math.nan
    with pytest.raises(IasvitError, match=r"layer 'blocks\.1 \(full precision\)' outputs NaN or Inf"):
        stream(model, quantizable_copy(tiny_models.vit()), images, quantize_only, Progress())

    def spoil(job: SegmentJob) -> None:
        quantize_only(job)
        if job.index == 2:
            job.segment.layers()[-1].bias.fill_(math.inf)

    with pytest.raises(IasvitError, match=r"layer 'blocks\.0' outputs NaN or Inf"):
        stream(tiny_models.vit(), quantizable_copy(tiny_models.vit()), images, spoil, Progress())


# ---- optimizer -----------------------------------------------------------------------------------------------------


def stores(count: int = 10) -> tuple[ActivationStore, ActivationStore, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, 4, 3, generator=generator), torch.randn(count, 4, 2, generator=generator)
    inputs, targets = ActivationStore(), ActivationStore()
    inputs.append(x)
    targets.append(y)
    return inputs, targets, x, y


def linear() -> nn.Module:
    return tiny_models.stir(nn.Linear(3, 2)).requires_grad_(False)


def test_the_loss_is_the_mean_over_images_of_the_sum_over_their_values() -> None:
    output, target = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]]), torch.tensor([[[0.0, 0.0]], [[3.0, 0.0]]])
    assert squared_error(output, target).item() == (1 + 4 + 9) / 2


@pytest.mark.parametrize("batch_size", [3, 10, 64])
def test_it_is_adam_with_a_cosine_to_zero(batch_size: int) -> None:
    inputs, targets, x, y = stores()
    module = linear()
    parameters = list(module.parameters())
    settings = {"iterations": 20, "batch_size": batch_size, "lr": 0.05, "seed": 7}
    optimize(module, parameters, inputs, targets, **settings)

    plain = linear().requires_grad_(True)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.05, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.0)
    generator = torch.Generator().manual_seed(7)
    for _ in range(20):
        indices = torch.randperm(10, generator=generator)[:batch_size]
        error = ((plain(x[indices]) - y[indices]) ** 2).sum(dim=(1, 2)).mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(module.weight, plain.weight.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module.bias, plain.bias.detach(), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(module.weight, linear().weight, atol=1e-2)


def test_only_what_is_given_is_learnt_and_gradients_are_needed_only_meanwhile() -> None:
    inputs, targets, _, _ = stores()
    module = linear()
    needed: list[list[bool]] = []

    def run(x: Tensor) -> Tensor:
        needed.append([parameter.requires_grad for parameter in (module.weight, module.bias)])
        return module(x)

    settings = {"iterations": 2, "batch_size": 4, "lr": 0.1, "seed": 0}
    optimize(run, [module.weight], inputs, targets, **settings)
    assert needed == [[True, False]] * 2
    assert torch.equal(module.bias, linear().bias)
    assert not torch.equal(module.weight, linear().weight)
    assert module.weight.grad is None
    assert not module.weight.requires_grad

    def fail(x: Tensor) -> Tensor:
        raise Interrupted

    with pytest.raises(Interrupted):
        optimize(fail, [module.weight], inputs, targets, **settings)
    assert not module.weight.requires_grad


def test_the_seed_alone_decides() -> None:
    inputs, targets, _, _ = stores()
    results = []
    for seed, disturbance in ((0, 0), (0, 1), (1, 0)):
        torch.manual_seed(disturbance)
        module = linear()
        state = torch.get_rng_state()
        settings = {"iterations": 5, "batch_size": 4, "lr": 0.1, "seed": seed}
        optimize(module, list(module.parameters()), inputs, targets, **settings)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(module.weight)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_where_nothing_is_to_be_learnt_nothing_changes() -> None:
    inputs, targets, _, _ = stores()
    module = linear()
    settings = {"batch_size": 4, "lr": 0.1, "seed": 0}
    optimize(module, list(module.parameters()), inputs, targets, iterations=0, **settings)
    optimize(module, [], inputs, targets, iterations=5, **settings)
    assert tiny_models.same_bits(module.state_dict(), linear().state_dict())


def test_a_checkpoint_has_quantizers_under_their_names(vit: nn.Module, images: Tensor, tmp_path: Path) -> None:
    quantized = quantizable_copy(vit)
    stream(vit, quantized, images, quantize_only, Progress(checkpoint=tmp_path))
    _, state = Progress(checkpoint=tmp_path).restore()
    names = {name for name, module in quantized.named_modules() if isinstance(module, Quantizer)}
    assert {name.removesuffix("._extra_state") for name in state if name.endswith("_extra_state")} == names


@pytest.fixture
def _aot_eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile without a C++ compiler."""
    torch._dynamo.reset()
    reconstruction._compiled_loss.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    reconstruction._compiled_loss.cache_clear()


@pytest.mark.usefixtures("_aot_eager")
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_compiled_step_has_the_loss_and_gradients_of_an_eager_one(name: str, images: Tensor) -> None:
    quantized = iasvit.quantize(tiny_models.MODELS[name](), images, "W4A4", "ias_vit", iterations=0)
    x: Activation = images
    compared = 0
    for segment in segments(quantized):
        parameters = [layer.weight for layer in segment.layers()]
        if parameters and "block" in segment.name:
            targets = tensors(segment.run(x))[0].detach() + 0.1
            results = []
            for loss in (reconstruction._loss, reconstruction._compiled_loss()):
                for parameter in parameters:
                    parameter.requires_grad_(True)
                value = loss(segment.run, x, targets, False)
                results.append((value, *torch.autograd.grad(value, parameters)))
            for eager, compiled in zip(*results, strict=True):
                torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4 * float(eager.abs().max()))
            compared += 1
        with torch.no_grad():
            x = segment.run(x)
    assert compared == 2 + 2 * (name == "swin")


@pytest.mark.usefixtures("_aot_eager")
def test_what_is_compiled_for_one_block_serves_all(images: Tensor) -> None:
    compiled = []
    for depth in (2, 4):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = tiny_models.vit(depth=depth)
        iasvit.quantize(model, images, "W4A4", "ias_vit", iterations=1, batch_size=4, compile=True)
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert compiled == [2, 2]  # a block in stages 1 and 3; neither the patch embedding nor the head
