"""Quantizers that are calibrated one after the other, each on what those before it left."""

from __future__ import annotations

import math

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from iasvit.calibration import calibrate_in_sequence, calibrate_in_stream
from iasvit.errors import IasvitError
from iasvit.nn import quant_layers, quantizers_of
from iasvit.quantizers import Quantizer, UniformQuantizer


class Chain(nn.Module):
    """Two quantizers one behind the other; the second is shared by two paths where `shared` is."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.shared = UniformQuantizer(2), UniformQuantizer(2), shared
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        x = self.first(x) + 0.1 * x
        return self.second(x) + (self.second(3 * x) if self.shared else 0)

    def named_quantizers(self) -> list[tuple[str, Quantizer]]:
        return [("second", self.second), ("first", self.first)]  # the order of the list is not the forward's


def expected(x: Tensor, shared: bool) -> tuple[UniformQuantizer, UniformQuantizer, Tensor]:
    first, second = UniformQuantizer(2), UniformQuantizer(2)
    first.calibrate(x)
    x = first(x) + 0.1 * x
    second.calibrate(torch.cat([x, 3 * x]) if shared else x)
    return first, second, second(x) + (second(3 * x) if shared else 0)


def values(count: int = 6) -> Tensor:
    return torch.randn(count, 50, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("shared", "size", "passes"), [(False, 6, 1), (True, 6, 4), (False, 4, 8), (True, 4, 8)])
def test_each_sees_what_those_before_it_left_of_all_batches_and_calls(shared: bool, size: int, passes: int) -> None:
    """One pass where each is reached once; else all that reaches a quantizer is pooled, in a pass for each."""
    chain, x = Chain(shared), values()
    first, second, output = expected(x, shared)
    outputs = calibrate_in_sequence(chain.named_quantizers(), lambda: [chain(batch) for batch in x.split(size)])
    for quantizer, wanted in ((chain.first, first), (chain.second, second)):
        assert torch.equal(quantizer.scale, wanted.scale)
        assert torch.equal(quantizer.zero_point, wanted.zero_point)
        assert quantizer.enabled
        assert not quantizer._forward_pre_hooks
    torch.testing.assert_close(torch.cat(outputs), output)
    assert chain.runs == passes


def test_what_is_calibrated_already_is_calibrated_anew() -> None:
    chain, x = Chain(), values()
    for quantizer in (chain.first, chain.second):
        quantizer.calibrate(100 * x)
    calibrate_in_sequence(chain.named_quantizers(), lambda: chain(x))
    first, second, _ = expected(x, False)
    assert torch.equal(chain.first.scale, first.scale)
    assert torch.equal(chain.second.scale, second.scale)


def test_bad_values_and_what_nothing_reaches_are_named() -> None:
    chain = Chain()
    with pytest.raises(IasvitError, match="layer 'first': NaN or Inf was given"):
        calibrate_in_sequence(chain.named_quantizers(), lambda: chain(torch.tensor([1.0, math.nan])))
    with pytest.raises(IasvitError, match="layer 'second' was not reached"):
        calibrate_in_sequence(chain.named_quantizers(), lambda: chain.first(torch.rand(4)))
    with pytest.raises(IasvitError, match="layer 'second' was not reached"):  # two calls in all, of two quantizers
        calibrate_in_sequence(
            chain.named_quantizers(), lambda: (chain.first(torch.rand(4)), chain.first(torch.rand(4)))
        )
    assert not chain.first._forward_pre_hooks


@pytest.mark.parametrize("sizes", [[12], [5, 5, 2]])
def test_in_a_stream_every_quantizer_is_set_as_in_one_forward_of_the_whole_model(
    model: nn.Module, images: Tensor, sizes: list[int]
) -> None:
    """Batches of a size or not: the ranges are those of all images in one batch."""
    name = {"VisionTransformerDistilled": "deit", "SwinTransformer": "swin"}.get(type(model).__name__, "vit")
    whole, streamed = (tiny_models.quantizable(tiny_models.MODELS[name]()) for _ in range(2))
    for quantized in (whole, streamed):
        for _, layer in quant_layers(quantized):
            layer.weight_quantizer.enabled = False
    calibrate_in_sequence(list(quantizers_of(whole, weights=False)), lambda: whole(images))
    runs: list[Tensor] = []
    streamed.forward = runs.append
    calibrate_in_stream(streamed, images.split(sizes))
    assert not runs
    for (path, quantizer), (_, wanted) in zip(
        quantizers_of(streamed, weights=False), quantizers_of(whole, weights=False), strict=True
    ):
        for parameter in quantizer.parameters_:
            torch.testing.assert_close(
                getattr(quantizer, parameter), getattr(wanted, parameter), msg=f"{path} {parameter}", rtol=1e-4, atol=0
            )
