"""Compiled quantizers: the values and gradients of eager ones, away from rounding ties."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from iasvit.quantizers import (
    Log2Quantizer,
    Quantizer,
    SULQuantizer,
    SymmetricQuantizer,
    TwinGELUQuantizer,
    TwinSoftmaxQuantizer,
    UniformQuantizer,
)

KINDS: dict[str, Callable[[], Quantizer]] = {
    "uniform": lambda: UniformQuantizer(3),
    "uniform, first axis": lambda: UniformQuantizer(3, channel_dim=0),
    "uniform, last axis": lambda: UniformQuantizer(3, channel_dim=-1),
    "symmetric": lambda: SymmetricQuantizer(4),
    "log2": lambda: Log2Quantizer(3),
    "sulq": lambda: SULQuantizer(3),
    "twin gelu": lambda: TwinGELUQuantizer(4),
    "twin softmax": lambda: TwinSoftmaxQuantizer(4),
}


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()  # a test's kinds of quantizers must not use up the limit of another's


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_is_eager(kind: str) -> None:
    """As it is traced; kernels that are made of it are tested on a GPU, in test_cuda.py."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, 8, generator=generator)
    if kind in ("log2", "sulq", "twin softmax"):
        x = (3 * x).softmax(-1)
    elif kind == "twin gelu":
        x = torch.nn.functional.gelu(x)
    quantizer = KINDS[kind]()
    quantizer.calibrate(x)
    x = 1.05 * x  # some values are clamped
    near = [quantizer.encode(x * factor) for factor in (1 - 1e-4, 1 + 1e-4)]
    apart = near[0] == near[1]  # no rounding tie next to the value
    assert apart.float().mean() > 0.9
    results = []
    for forward in (quantizer, torch.compile(quantizer, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_(True)
        values = forward(leaf)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        results.append((values.detach()[apart], gradient[apart]))
    (values, gradient), (compiled_values, compiled_gradient) = results
    assert len(values.unique()) > 3
    torch.testing.assert_close(compiled_values, values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(compiled_gradient, gradient, rtol=1e-4, atol=1e-5)


def test_a_disabled_quantizer_is_not_compiled() -> None:
    quantizer = UniformQuantizer(3)
    quantizer.enabled = False
    x = torch.randn(3)
    assert torch.equal(torch.compile(quantizer, backend="aot_eager", fullgraph=True)(x), x)
