"""Fake quantization in one pass gives what torch's operators give: values, gradients and strides, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_evaluation import KINDS, hard_values, same_bits, seen_by
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from iasvit.quantizers import Quantizer, UniformQuantizer, evaluation, kernels

needs_compiler = pytest.mark.skipif(kernels.library() is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def fresh_library() -> Iterator[None]:
    yield
    kernels.library.cache_clear()


def learnt(quantizer: Quantizer, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """What a step of learning takes from a quantizer: its values, and the gradient to x."""
    x = x.detach().requires_grad_(True)
    values = quantizer(x)
    return values.detach(), torch.autograd.grad(values, x, gradient)[0]


def by_operators(monkeypatch: pytest.MonkeyPatch, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What torch's operators give, with no loop in C."""
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "serve", lambda x: False)
        return work()


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.stride() == other.stride()
        assert same_bits(mine, other)


@needs_compiler
@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_around_every_threshold(kind: str, n_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = KINDS[kind](n_bits)
    quantizer.calibrate(seen_by(kind))
    x = hard_values(kind, quantizer)
    x = torch.cat([x, seen_by(kind, seed=1).flatten()])  # where values lie in use
    assert kernels.serve(x)
    gradient = torch.randn(len(x), generator=torch.Generator().manual_seed(2))

    def work() -> tuple[Tensor, Tensor]:
        return learnt(quantizer, x, gradient)

    assert_same(work(), by_operators(monkeypatch, work))
    with torch.no_grad():
        assert same_bits(quantizer(x), quantizer.decode(quantizer.encode(x)))


@needs_compiler
@pytest.mark.parametrize("flags", ["-mno-avx512f", "-mno-avx2 -mno-avx512f", "-mno-avx512vbmi"])
def test_processors_without_some_instructions_give_the_same(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FLAGS", (*kernels.FLAGS, *flags.split()))
    kernels.library.cache_clear()
    if kernels.library() is None:
        pytest.skip(f"the compiler has no {flags}: another kind of processor")
    for kind in KINDS:
        for n_bits in range(2, 9):
            quantizer = KINDS[kind](n_bits)
            quantizer.calibrate(seen_by(kind))
            x = torch.cat([hard_values(kind, quantizer), seen_by(kind, seed=1).flatten()])
            for count in (len(x) - 1, len(x)):
                values = quantizer(x[:count])
                assert same_bits(values, quantizer.decode(quantizer.encode(x[:count]))), (kind, n_bits)


@needs_compiler
@pytest.mark.parametrize("n_bits", range(2, 9))
@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind](2).log_domain])
def test_steps_know_every_value(kind: str, n_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = KINDS[kind](n_bits)
    quantizer.calibrate(seen_by(kind))
    x = hard_values(kind, quantizer)
    steps = quantizer._step_function(x)[0]
    assert steps is not None
    assert steps.least <= 2.0**-126
    x = x[x >= steps.least]
    expected = quantizer.decode(quantizer.encode(x))

    def compute(rest: Tensor) -> Tensor:
        raise AssertionError(f"{rest} are not known")

    for count in range(len(x) - 17, len(x) + 1):  # whatever the width of a vector
        assert same_bits(evaluation.look_up(x[:count], steps, compute), expected[:count])
    monkeypatch.setattr(kernels, "serve", lambda x: False)
    assert same_bits(evaluation.look_up(x, steps, compute), expected)


@pytest.mark.parametrize("n_bits", [3, 8])
@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
def test_what_is_not_known_is_computed(compiled: bool, n_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(kernels, "serve", lambda x: False)
    quantizer = KINDS["sulq"](n_bits)
    quantizer.calibrate(seen_by("sulq"))
    x = seen_by("sulq", seed=1).flatten().repeat(40)
    steps = quantizer._step_function(x)[0]
    assert steps is not None
    where = torch.tensor([0, 100, len(x) - 1])
    x[where] = torch.tensor([torch.nan, -1.0, torch.nan])
    given: list[Tensor] = []

    def compute(rest: Tensor) -> Tensor:
        given.append(rest)
        return torch.tensor([1.0, 2.0, 3.0])

    values = evaluation.look_up(x, steps, compute)
    assert [rest.isnan().tolist() for rest in given] == [[True, False, True]]
    assert values[where].tolist() == [1.0, 2.0, 3.0]


def test_steps_that_are_not_even_or_do_not_ascend_are_left_to_the_formula() -> None:
    def step_function(
        codes_of: Callable[[Tensor], Tensor], values_of: Callable[[Tensor], Tensor] = Tensor.clone
    ) -> evaluation.Steps | None:
        return evaluation.step_function(codes_of, values_of, 0.0)

    assert step_function(lambda x: (-x.log2()).round().clamp(0, 7)) is not None
    assert step_function(lambda x: (x / 0.3).round().clamp(0, 7)) is None
    assert step_function(lambda x: x.log2().abs().round().clamp(0, 7)) is None
    assert step_function(lambda x: x * torch.nan) is None
    assert step_function(lambda x: (-x.log2()).round().clamp(0, 7), Tensor.double) is None


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT,
    "permuted": lambda x: x.permute(2, 0, 1),
    "with gaps": lambda x: x[:, :, ::2],
    "a part of a product, its heads first": lambda x: x.unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)[1],
    "repeated": lambda x: x[:1].expand_as(x),
}


@needs_compiler
@pytest.mark.parametrize("channel_dim", [None, 0, 1, -1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_channel(layout: str, channel_dim: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    x = LAYOUTS[layout](torch.randn(20, 50, 60, generator=torch.Generator().manual_seed(0)))
    assert kernels.serve(x)
    quantizer = UniformQuantizer(3, channel_dim=channel_dim)
    quantizer.calibrate(x * 0.7)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for grad in (gradient, gradient.mT.contiguous().mT, torch.ones(()).expand_as(x)):

        def work(grad: Tensor = grad) -> tuple[Tensor, Tensor]:
            return learnt(quantizer, x, grad)

        assert_same(work(), by_operators(monkeypatch, work))

    def evaluated() -> tuple[Tensor]:
        with torch.no_grad():
            return (quantizer(x),)

    ours, theirs = evaluated(), by_operators(monkeypatch, evaluated)
    assert same_bits(ours[0].contiguous(), theirs[0].contiguous())


@needs_compiler
@pytest.mark.parametrize("size", [(10, 1000), (400, 1000)])  # less than a piece, and more than two
@pytest.mark.parametrize("kind", ["log2", "sulq", "adalog", "twin softmax"])
def test_attention_maps(kind: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).mul(3).softmax(dim=-1)
    quantizer = KINDS[kind](3)
    quantizer.calibrate(x)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for view, grad in ((x, gradient), (x.T, gradient.T), (x, gradient.T.contiguous().T)):

        def work(view: Tensor = view, grad: Tensor = grad) -> tuple[Tensor, Tensor]:
            return learnt(quantizer, view, grad)

        assert_same(work(), by_operators(monkeypatch, work))


@needs_compiler
@pytest.mark.parametrize("kind", ["uniform", "twin softmax", "twin gelu"])
def test_parameters_of_another_type_are_left_to_torch(kind: str) -> None:
    quantizer = KINDS[kind](3)
    x = seen_by(kind).repeat(10, 1)
    quantizer.calibrate(x)
    quantizer.scale = quantizer.scale.double()
    assert quantizer._fused(x, gradient=True) is None
    assert not kernels.serve(x.double())
    assert not kernels.serve(x[0])  # too few to be worth it


@needs_compiler
@pytest.mark.parametrize("kind", ["uniform", "sulq", "twin softmax", "twin gelu"])
def test_what_has_no_memory_is_left_to_torch(kind: str) -> None:
    x = seen_by(kind, seed=1).repeat(60, 1)
    quantizer = KINDS[kind](3)
    quantizer.calibrate(seen_by(kind))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert not kernels.serve(mode.from_tensor(x))
    exported = torch.export.export(quantizer, (x,)).module()
    assert same_bits(exported(x), quantizer(x))


@needs_compiler
def test_more_threads_than_a_loop_is_worth_take_torchs_operators() -> None:
    x, threads = torch.randn(100, 100), torch.get_num_threads()
    try:
        torch.set_num_threads(kernels.THREADS + 1)
        assert not kernels.serve(x)
    finally:
        torch.set_num_threads(threads)
    assert kernels.serve(x)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_compiler_the_values_are_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = KINDS[kind](3)
    quantizer.calibrate(seen_by(kind))
    x = seen_by(kind, seed=1).repeat(60, 1)
    gradient = torch.ones_like(x)
    ours = learnt(quantizer, x, gradient)
    monkeypatch.setenv("CC", "no-such-compiler")
    kernels.library.cache_clear()
    assert kernels.library() is None
    assert_same(ours, learnt(quantizer, x, gradient))


@needs_compiler
@pytest.mark.parametrize("flag", ["-DCHANGED", "-no-such-option"])
def test_a_compiler_that_does_not_keep_to_ieee_or_fails_is_not_used(
    flag: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = kernels.SOURCE.read_text()
    file = tmp_path / "kernels.c"
    file.write_text(source.replace("x / s", "x * (1.0f / s)") if "CHANGED" in flag else source)
    monkeypatch.setattr(kernels, "SOURCE", file)
    monkeypatch.setattr(kernels, "FLAGS", (*kernels.FLAGS, *flag.split()))
    kernels.library.cache_clear()
    assert kernels.library() is None
    assert not list(tmp_path.glob("*.so"))
