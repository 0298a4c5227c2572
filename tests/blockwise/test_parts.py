"""What stands in a quantizer's place while a block is learnt, the loop of steps, and the search of ranges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from iasvit.blockwise.core import rounding_error
from iasvit.blockwise.output_search import CANDIDATES, _product_error, search_base, search_layer, search_product
from iasvit.blockwise.parts import AdaRound, Dropped, Learnt, LearntScale
from iasvit.calibration.fisher import Capture
from iasvit.nn import QuantLinear, QuantMatMul
from iasvit.quantizers import AdaLogQuantizer, ShiftedAdaLogQuantizer, UniformQuantizer
from iasvit.quantizers.adalog import EXPONENTS
from iasvit.steps import Group, minimise


def calibrated(x: Tensor, n_bits: int = 3, channel_dim: int | None = None, percentile: float = 1.0) -> UniformQuantizer:
    quantizer = UniformQuantizer(n_bits, channel_dim, percentiles=(percentile,))
    quantizer.calibrate(x)
    return quantizer


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(6, 10, generator=torch.Generator().manual_seed(0))


def test_adaround_begins_at_the_float_weights_and_ends_on_codes(weight: Tensor) -> None:
    quantizer = calibrated(weight, channel_dim=0)
    rounding = AdaRound(quantizer, weight)
    scale, zero_point = quantizer._shaped(2)
    low, high = -zero_point * scale, (7 - zero_point) * scale
    assert torch.allclose(rounding(weight), weight.clamp(low, high), atol=2e-6)

    rounding.alpha.data.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    hard = rounding.hard()
    codes = hard / scale + zero_point
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert codes.round().min() >= 0
    assert codes.round().max() <= 7
    assert torch.equal(quantizer(hard), hard)  # to the bit: round_weight changes nothing
    up = (weight / scale).floor() + (rounding.alpha >= 0)
    assert torch.equal(codes.round(), (up + zero_point).clamp(0, 7))


def test_adaround_learns_only_where_its_sigmoid_is_not_cut(weight: Tensor) -> None:
    rounding = AdaRound(calibrated(weight, channel_dim=0), weight)
    rounding.alpha.data[0] = 20.0  # h is 1, beyond the stretch
    rounding(weight).sum().backward()
    assert torch.equal(rounding.alpha.grad[0], torch.zeros(10))
    assert (rounding.alpha.grad[1:] != 0).any()


def test_the_regulariser_is_off_while_warming_up_and_then_of_falling_power(weight: Tensor) -> None:
    rounding = AdaRound(calibrated(weight, channel_dim=0), weight)
    learnt = Learnt(roundings={nn.Identity(): rounding})
    h = rounding.up().detach()
    for step, beta in ((0, None), (19, None), (20, 20.0), (60, 11.0), (99, 2 + 18 / 80)):
        expected = 0.0 if beta is None else 0.01 * (1 - (2 * h - 1).abs() ** beta).sum().item()
        error = rounding_error(learnt, torch.tensor(float(step)), 100)
        assert error.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("channel_dim", [None, 0])
def test_a_learnt_scale_computes_what_the_quantizer_does(weight: Tensor, channel_dim: int | None) -> None:
    quantizer = calibrated(weight, channel_dim=channel_dim, percentile=0.9)
    assert torch.equal(LearntScale(quantizer)(weight), quantizer(weight))
    assert torch.allclose(LearntScale(quantizer, relative=True)(weight), quantizer(weight))


@pytest.mark.parametrize("relative", [False, True])
def test_the_gradient_of_a_scale_is_lsqs(weight: Tensor, relative: bool) -> None:
    quantizer = calibrated(weight, percentile=0.9)
    learnt, x = LearntScale(quantizer, relative), weight.clone().requires_grad_()
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    (learnt(x) * upstream).sum().backward()
    s, z = quantizer.scale.item(), quantizer.zero_point.item()
    expected, inside = 0.0, torch.zeros_like(weight, dtype=torch.bool)
    for place, value in enumerate(weight.flatten().tolist()):
        code = round(value / s) + z
        if 0 <= code <= 7:
            slope = round(value / s) - value / s
            inside.view(-1)[place] = True
        else:
            slope = (0 if code < 0 else 7) - z
        expected += slope * upstream.view(-1)[place].item()
    assert learnt.factor.grad.item() == pytest.approx(expected * (s if relative else 1), rel=1e-4)
    assert torch.allclose(x.grad, upstream * inside)
    assert not inside.all()


def test_drops_leave_a_part_in_full_precision_and_none_when_all_is_quantized(weight: Tensor) -> None:
    x = torch.randn(200, 100, generator=torch.Generator().manual_seed(3))
    quantizer = calibrated(x)
    drop = Dropped(quantizer, 0.3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = drop(x)
    left = values == x
    assert left.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(values[~left], quantizer(x)[~left])
    with Learnt(drops=[drop]).whole():
        assert torch.equal(drop(x), quantizer(x))
    assert drop.active


# ---- steps ---------------------------------------------------------------------------------------------------------


def test_steps_draw_each_image_at_most_once_and_follow_their_rates() -> None:
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    seen: list[list[int]] = []
    values: list[tuple[float, float]] = []

    def loss(images: Tensor, step: Tensor) -> Tensor:
        assert step.item() == len(seen)
        seen.append(images.tolist())
        return a.sum() + b.sum()

    before: list[int] = []
    minimise(
        loss,
        [Group([a], 0.1, cosine=False), Group([b], 0.1), Group([], 1.0)],
        images=7,
        iterations=4,
        batch_size=5,
        seed=0,
        before=lambda i: (before.append(i), values.append((a[0].item(), b[0].item()))),
    )
    values.append((a[0].item(), b[0].item()))
    assert before == [0, 1, 2, 3]
    assert all(len(set(images)) == 5 for images in seen)
    assert len({tuple(images) for images in seen}) > 1
    # Adam's step on a constant gradient is its learning rate.
    steps = torch.tensor(values).diff(dim=0).neg()
    assert torch.allclose(steps[:, 0], torch.full((4,), 0.1), rtol=1e-4)
    expected = torch.tensor([0.05 * (1 + math.cos(math.pi * i / 4)) for i in range(4)])
    assert torch.allclose(steps[:, 1], expected, rtol=1e-4)
    assert not a.requires_grad
    assert a.grad is None


def test_steps_leave_the_callers_random_numbers_alone_and_repeat() -> None:
    def run() -> Tensor:
        parameter = nn.Parameter(torch.zeros(4))
        minimise(
            lambda images, step: (parameter - torch.rand(4)).square().sum(),
            [Group([parameter], 0.1)],
            images=3,
            iterations=5,
            batch_size=2,
            seed=4,
        )
        return parameter.detach()

    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    first = run()
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first, run())


# ---- search of ranges ------------------------------------------------------------------------------------------------


def uniform(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return ((x / scale).round() + zero_point).clamp(0, 7).sub(zero_point) * scale


def tries(x: Tensor, quantizer: UniformQuantizer) -> list[tuple[Tensor, Tensor]]:
    """The candidates of one tensor or one row, as plainly as can be."""
    found = [(quantizer.scale.reshape(()), quantizer.zero_point.reshape(()).float())]
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    for step in range(1, CANDIDATES + 1):
        scale = torch.tensor((high - low) * step / CANDIDATES / 7)
        found.append((scale, torch.round(torch.tensor(-low * step / CANDIDATES) / scale)))
    return found


def test_a_layers_ranges_are_those_of_least_error_of_its_output() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(30, 4, generator=generator).exp()
    layer = QuantLinear.from_float(nn.Linear(4, 3), UniformQuantizer(3, 0), UniformQuantizer(3)).requires_grad_(False)
    layer.weight.copy_(torch.randn(3, 4, generator=generator))
    layer.weight_quantizer, layer.input_quantizer = calibrated(layer.weight, channel_dim=0), calibrated(x)
    w, inputs = [calibrated(row) for row in layer.weight], calibrated(x)
    y = x @ layer.weight.T
    for _ in range(3):
        read = inputs(x)
        for row, quantizer in enumerate(w):
            errors = [
                (read @ uniform(layer.weight[row], s, z) - y[:, row]).square().sum()
                for s, z in tries(layer.weight[row], quantizer)
            ]
            quantizer.set_parameters(*tries(layer.weight[row], quantizer)[int(torch.stack(errors).argmin())])
        rounded = torch.stack([quantizer(layer.weight[row]) for row, quantizer in enumerate(w)])
        errors = [(uniform(x, s, z) @ rounded.T - y).square().sum() for s, z in tries(x, inputs)]
        inputs.set_parameters(*tries(x, inputs)[int(torch.stack(errors).argmin())])
    search_layer(Capture("layer", layer, (x,), y + layer.bias, None))
    assert torch.allclose(layer.weight_quantizer.scale, torch.stack([quantizer.scale for quantizer in w]))
    assert layer.weight_quantizer.zero_point.tolist() == [quantizer.zero_point.item() for quantizer in w]
    assert layer.input_quantizer.scale.item() == pytest.approx(inputs.scale.item())
    assert layer.input_quantizer.zero_point == inputs.zero_point


def test_a_products_ranges_lower_its_error_or_stay() -> None:
    generator = torch.Generator().manual_seed(6)
    left, right = (torch.randn(2, 3, 5, 5, generator=generator).exp() for _ in range(2))
    product = QuantMatMul(calibrated(left), calibrated(right))
    y = left @ right
    before = (product(left, right) - y).square().sum()
    search_product(Capture("product", product, (left, right), y, None))
    after = (product(left, right) - y).square().sum()
    assert after < before
    assert not product.left_quantizer.zero_point.is_floating_point()


def test_a_base_is_chosen_by_what_the_product_puts_out() -> None:
    generator = torch.Generator().manual_seed(0)
    left = (3 * torch.randn(4, 32, 64, generator=generator)).softmax(-1)  # a few large values and a long tail
    right = torch.randn(4, 64, 16, generator=generator) + 1.0  # a mean, which the tail adds up to
    quantizer, values = AdaLogQuantizer(3), calibrated(right)
    quantizer.calibrate(left)
    product = QuantMatMul(quantizer, values)
    y = left @ right

    def error() -> float:
        return (product(left, right) - y).square().sum().item()

    before = error()
    search_base(Capture("product", product, (left, right), y, None))
    chosen, found = error(), (quantizer.scale.clone(), quantizer.exponent.clone())
    every = []
    for kept in torch.linspace(0.02, 1.0, 50):
        for exponent in EXPONENTS:
            quantizer.scale = left.max() * kept
            quantizer.exponent = torch.tensor(exponent, dtype=torch.int32)
            every.append(error())
    assert chosen < 0.8 * before
    assert chosen < 1.05 * min(every)
    assert found[0].ndim == found[1].ndim == 0


def test_a_base_after_gelu_is_chosen_by_what_the_layer_puts_out(weight: Tensor) -> None:
    x = torch.nn.functional.gelu(2 * torch.randn(200, 10, generator=torch.Generator().manual_seed(1)))
    quantizer = ShiftedAdaLogQuantizer(3)
    quantizer.calibrate(x)
    layer = QuantLinear(10, 6, False)
    layer.weight.data.copy_(weight)
    layer.weight_quantizer, layer.input_quantizer = calibrated(weight, channel_dim=0), quantizer
    y = x @ weight.T
    before = (layer(x) - y).square().sum()
    search_base(Capture("layer", layer, (x,), y, None))
    assert (layer(x) - y).square().sum() < before


@pytest.mark.parametrize("inner", [2, 9])
@pytest.mark.parametrize("first", [True, False])
def test_a_products_error_is_that_of_the_product_but_for_a_constant(first: bool, inner: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(3, *shape, generator=generator) for shape in ((5, inner), (inner, 4)))
    y = left @ right
    x, other = (left, right) if first else (right, left)
    error = _product_error(other + 0.1, y, first)
    tries = [x + 0.2 * torch.randn(x.shape, generator=generator) for _ in range(4)]
    plain = [((a @ (other + 0.1) if first else (other + 0.1) @ a) - y).square().sum() for a in tries]
    differences = [error(a) - error(tries[0]) for a in tries]
    torch.testing.assert_close(torch.cat(differences).float(), torch.stack(plain) - plain[0], rtol=1e-4, atol=1e-4)


def test_a_scale_that_a_step_brings_below_0_comes_back() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    learnt = LearntScale(calibrated(x))
    learnt.factor.data.fill_(-0.05)
    assert learnt.scale() > 0
    (learnt(x) - x).square().mean().backward()
    assert learnt.factor.grad < 0  # so that descent makes it larger


def test_a_layer_computes_its_weight_anew_after_steps_of_a_fused_adam(
    weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU Adam is fused, which leaves a parameter's version as it was."""
    layer = QuantLinear.from_float(nn.Linear(10, 6), calibrated(weight, channel_dim=0), None)
    layer.weight.data.copy_(weight)
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = layer(x)
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda groups, **options: adam(groups, fused=True))

    def loss(images: Tensor, step: Tensor) -> Tensor:
        return layer(x).square().mean()

    minimise(loss, [Group([layer.weight], 0.1)], images=4, iterations=5, batch_size=2, seed=0)
    with torch.no_grad():
        after = layer(x)
        assert torch.equal(after, x @ layer.weight_quantizer(layer.weight).T + layer.bias)
    assert not torch.equal(after, before)
