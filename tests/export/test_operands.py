"""Each quantizer's integers stand for its values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("onnxruntime", reason="the extra export is not installed")

from graphs import run, run_by_openvino

from iasvit.errors import IasvitError
from iasvit.export.graph import Graph
from iasvit.export.operands import MOST_PLANES, operand
from iasvit.export.products import Emitter, Right
from iasvit.quantizers import (
    AdaLogQuantizer,
    Log2Quantizer,
    Quantizer,
    ShiftedAdaLogQuantizer,
    SULQuantizer,
    SymmetricQuantizer,
    TwinGELUQuantizer,
    TwinSoftmaxQuantizer,
    UniformQuantizer,
)

KINDS: dict[str, Callable[[int], Quantizer]] = {
    "uniform": UniformQuantizer,
    "symmetric": SymmetricQuantizer,
    "log2": Log2Quantizer,
    "log2_without_zero": lambda b: Log2Quantizer(b, percentiles=(1.0,), zero_code=False),
    "log_sqrt2": lambda b: Log2Quantizer(b, steps_per_octave=2),
    "adalog": AdaLogQuantizer,
    "adalog_gelu": ShiftedAdaLogQuantizer,
    "sulq": SULQuantizer,
    "twin_softmax": TwinSoftmaxQuantizer,
    "twin_gelu": TwinGELUQuantizer,
    "per_channel": lambda b: UniformQuantizer(b, channel_dim=-1),
}
SOFTMAX = {"log2", "log2_without_zero", "log_sqrt2", "adalog", "sulq", "twin_softmax"}


def values_of(kind: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 50, generator=generator)
    if kind in SOFTMAX:
        return torch.softmax(3 * x, dim=-1)
    return torch.nn.functional.gelu(2 * x) if kind.endswith("_gelu") else x


def exported(quantizer: Quantizer, x: Tensor, centred: bool = False) -> tuple[np.ndarray, int]:
    """Values that the graph's integers stand for, and how many planes they have."""
    graph = Graph("q_", centred)
    made = operand(quantizer, graph, "x")
    if made.values:
        return run(graph, [made.values], x=x.numpy())[0], 0
    codes = run(graph, [plane.codes for plane in made.planes], x=x.numpy())
    for array, plane in zip(codes, made.planes, strict=True):
        assert array.dtype == (np.int8 if plane.signed else np.uint8)
        assert np.abs(array.astype(int)).max() <= plane.largest
    parts = [
        plane.scale * (array.astype(np.float64) - plane.zero_point - plane.rest)
        for array, plane in zip(codes, made.planes, strict=True)
    ]
    return np.sum(parts, axis=0) + made.constant, len(made.planes)


@pytest.mark.parametrize("n_bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_integers_stand_for_the_values(kind: str, n_bits: int) -> None:
    x = values_of(kind)
    quantizer = KINDS[kind](n_bits)
    quantizer.calibrate(x)
    for centred in (False, True):
        theirs, planes = exported(quantizer, x, centred)
        mine = quantizer(x).numpy()
        different = np.abs(theirs - mine) > 1e-5 * np.abs(mine) + 1e-7
        assert different.sum() <= 1  # a value that lies on a tie
        assert planes <= MOST_PLANES


def test_what_a_softmax_of_three_and_four_bits_takes() -> None:
    """3 bits of log2 fit one plane; 4 bits, 15 octaves, take two, and log-sqrt2 one for even and one for odd codes."""
    given = (
        ("log2", 3, 1),
        ("log2", 4, 2),
        ("log_sqrt2", 4, 2),
        ("log2", 6, 0),
        ("adalog", 4, 1),
        ("adalog_gelu", 4, 2),
    )
    for kind, n_bits, planes in given:
        x = values_of(kind)
        quantizer = KINDS[kind](n_bits)
        quantizer.calibrate(x)
        assert exported(quantizer, x)[1] == planes, (kind, n_bits)


def near_thresholds(quantizer: Log2Quantizer) -> np.ndarray:
    """Floats around each value that its planes turn at, those whose 24 bits are all 1, and others; n×32×32."""
    k, scale = quantizer.steps_per_octave, float(quantizer.scale)
    values = [np.exp2(-12 * np.random.default_rng(0).random(4000)).astype(np.float32)]
    for odd in range(k):
        factor = np.float32(0.75 * 2 ** ((odd + 0.5) / k) / scale)
        for start in (1.0, 1.5):
            bits = (start * np.exp2(np.arange(-14, 2)) / float(factor)).astype(np.float32).view(np.int32)
            values.append((bits[:, None] + np.arange(-20, 21, dtype=np.int32)).view(np.float32).ravel())
    x = np.concatenate(values)
    x = x[x <= 1]
    return x[: len(x) // 1024 * 1024].reshape(-1, 32, 32)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "openvino, fixed"])
@pytest.mark.parametrize(("n_bits", "k", "zero_code"), [(3, 1, True), (4, 1, False), (4, 2, True), (6, 2, True)])
def test_powers_without_a_logarithm(n_bits: int, k: int, zero_code: bool, runtime: str) -> None:
    """A code turns within float32's rounding of its threshold; a runtime that fuses operations gives the same."""
    quantizer = Log2Quantizer(n_bits, steps_per_octave=k, zero_code=zero_code)
    quantizer.scale = torch.tensor(0.8312)
    x = near_thresholds(quantizer)
    target = runtime.partition(",")[0]
    graph = Graph("q_", target == "openvino")
    made = operand(quantizer, graph, "x")
    zero = np.zeros((), np.int64)
    one = Right(graph.constant(np.eye(32), np.int8), np.int8, np.float32(1), zero, zero, np.ones(32))
    emit = Emitter(graph, target, False)
    product = emit.float_matmul(made.values, one) if made.values else emit.matmul(made, one)
    if target == "onnxruntime":
        (theirs,) = run(graph, [product], x=x)
    else:
        theirs = run_by_openvino(graph, product, x, fixed=runtime.endswith("fixed"))
    mine = quantizer(torch.from_numpy(x)).numpy()
    wrong = x[np.abs(theirs - mine) > 1e-5 * mine + 1e-7].astype(np.float64)
    codes = -k * np.log2(wrong / np.float32(0.8312))
    assert np.all(np.abs(codes - np.floor(codes) - 0.5) < 1e-5)


@pytest.mark.parametrize("zero_point", [-300, -100, 0, 15, 255, 256, 1000])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_a_zero_point_that_no_byte_holds(zero_point: int, signed: bool, centred: bool) -> None:
    from iasvit.export.operands import uniform_plane

    quantizer = UniformQuantizer(4)
    quantizer.set_parameters(torch.tensor(0.1), torch.tensor(zero_point))
    x = torch.linspace(-0.1, 0.2, 100) * 20 - 0.1 * (zero_point - 7)
    graph = Graph("q_", centred)
    plane = uniform_plane(quantizer, graph, "x", signed=signed)
    (codes,) = run(graph, [plane.codes], x=x.numpy())
    theirs = np.float32(0.1) * (codes.astype(np.float32) - plane.zero_point - plane.rest)
    assert np.allclose(theirs, quantizer(x).numpy(), rtol=1e-5, atol=1e-6)
    assert len(np.unique(codes)) == 16


def test_an_unknown_kind_is_named() -> None:
    class Other(UniformQuantizer.__mro__[1]):  # type: ignore[misc, name-defined]
        kind = "other"
        parameters_ = ()

    with pytest.raises(IasvitError, match="kind 'other' cannot be exported"):
        operand(Other(4), Graph("q_"), "x")


def test_a_uniform_quantizer_rounds_ties_as_torch_does() -> None:
    quantizer = UniformQuantizer(4)
    quantizer.set_parameters(torch.tensor(1.0), torch.tensor(3))
    x = torch.arange(-8, 20) / 2
    theirs, _ = exported(quantizer, x)
    assert np.array_equal(theirs, quantizer(x).numpy())


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("kind", ["uniform", "symmetric"])
def test_openvino_rounds_as_exactly_with_an_open_batch(kind: str, fixed: bool) -> None:
    """Beside ties its FakeQuantize is a hundred times less exact for int8, unless it is given integers."""
    quantizer = KINDS[kind](4)
    quantizer.calibrate(values_of(kind))
    scale = float(quantizer.scale)
    generator = np.random.default_rng(0)
    ties = generator.integers(-7, 8, size=(8, 32, 32)) + 0.5
    x = (scale * (ties + generator.choice([-2e-6, 2e-6], ties.shape))).astype(np.float32)
    graph = Graph("q_", True)
    (plane,) = operand(quantizer, graph, "x").planes
    emit = Emitter(graph, "openvino", False)
    theirs = run_by_openvino(graph, emit.values(plane), x, fixed=fixed)
    low = -int(quantizer.zero_point)
    exact = np.clip(np.round(x.astype(np.float64) / scale), low, low + 15) * scale
    assert (np.abs(theirs - exact) > scale / 2).sum() == 0
