"""GPTQ, GPTAQ and ERQ's regressions against slow, plain versions of their equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from iasvit.closed_form import Moments, correct, gptq, round_with_correction
from iasvit.closed_form.ridge import refined
from iasvit.errors import IasvitError

ROWS, COLUMNS, TOKENS, BITS = 6, 21, 80, 3


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weight, scale, zero-point of rows; inputs, and those that they should be, all float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)
    x = torch.randn(TOKENS, COLUMNS, generator=generator, dtype=torch.float64) @ mix
    wanted = x + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    scale = (weight.amax(1) - weight.amin(1)) / (2**BITS - 1)
    return weight, scale, (-weight.amin(1) / scale).round(), x, wanted


def rounded(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return ((w / scale).round() + zero).clamp(0, 2**BITS - 1).sub(zero).mul(scale)


def plain_gptq(weight: Tensor, scale: Tensor, zero: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """GPTQ without a Cholesky factor: after each column the inverse Hessian of those left is computed anew.

    The columns left take δ = -(w_j - q_j) / [H⁻¹]_jj · [H⁻¹]_j, (equation 2).
    """
    w, result = weight.clone(), torch.zeros_like(weight)
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(damped[j:, j:])
        result[:, j] = rounded(w[:, j], scale, zero)
        w[:, j:] -= torch.outer((w[:, j] - result[:, j]) / inverse[0, 0], inverse[0])
    return result


@pytest.mark.parametrize("block", [1, 4, 128])
def test_gptq_is_the_plain_column_loop(block: int) -> None:
    weight, scale, zero, x, _ = problem()
    found = gptq(weight, x.T @ x, scale, zero, BITS, damping=0.02, act_order=False, block=block)
    torch.testing.assert_close(found, plain_gptq(weight, scale, zero, x.T @ x, 0.02))


def test_act_order_is_a_permutation_of_columns() -> None:
    weight, scale, zero, x, _ = problem(1)
    order = (x.T @ x).diagonal().argsort(descending=True)
    found = gptq(weight, x.T @ x, scale, zero, BITS, damping=0.02)
    expected = plain_gptq(weight[:, order], scale, zero, x[:, order].T @ x[:, order], 0.02)
    torch.testing.assert_close(found[:, order], expected)


def test_gptq_is_better_than_rounding_to_nearest() -> None:
    weight, scale, zero, x, _ = problem(2)
    found = gptq(weight, x.T @ x, scale, zero, BITS, damping=0.01)
    error = (x @ (found - weight).T).square().sum()
    assert error < 0.6 * (x @ (rounded(weight, scale[:, None], zero[:, None]) - weight).T).square().sum()


@pytest.mark.parametrize("block", [1, 5, 128])
def test_gptaq_is_the_plain_column_loop(block: int) -> None:
    weight, scale, zero, x, wanted = problem(3)
    difference = (wanted - x).T @ x
    hessian = x.T @ x + 0.02 * (x.T @ x).diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    pull = 0.25 * torch.triu(difference @ upper.T, 1) @ upper
    w, expected = weight.clone(), torch.zeros_like(weight)
    for j in range(COLUMNS):
        column = w[:, j].clone()
        expected[:, j] = rounded(column, scale, zero)
        w[:, j + 1 :] -= torch.outer((column - expected[:, j]) / upper[j, j], upper[j, j + 1 :])
        w[:, j + 1 :] += torch.outer(column, pull[j, j + 1 :])
    found = gptq(weight, x.T @ x, scale, zero, BITS, damping=0.02, act_order=False, asymmetry=difference, block=block)
    torch.testing.assert_close(found, expected)
    without = gptq(weight, x.T @ x, scale, zero, BITS, damping=0.02, asymmetry=difference, alpha=0.0)
    torch.testing.assert_close(without, gptq(weight, x.T @ x, scale, zero, BITS, damping=0.02))


def test_a_singular_hessian_is_damped() -> None:
    weight, scale, zero, x, _ = problem()
    few = x[:3].clone()  # fewer tokens than columns
    few[:, 5] = 0  # and a dead column
    for damping in (0.0, 0.01):
        assert torch.isfinite(gptq(weight, few.T @ few, scale, zero, BITS, damping=damping)).all()
    dead = torch.zeros(COLUMNS, COLUMNS, dtype=torch.float64)
    nearest = rounded(weight, scale[:, None], zero[:, None])
    torch.testing.assert_close(gptq(weight, dead, scale, zero, BITS, damping=0.01), nearest)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_hessian_that_is_not_finite_is_refused(value: float) -> None:
    weight, scale, zero, x, wanted = problem()
    bad = x.T @ x
    bad[2, 3] = value
    with pytest.raises(IasvitError, match="its Hessian holds NaN or Inf"):
        gptq(weight, bad, scale, zero, BITS, damping=0.01)
    with pytest.raises(IasvitError, match="its Hessian holds NaN or Inf"):
        gptq(weight, x.T @ x, scale, zero, BITS, damping=0.01, asymmetry=bad)
    moments = moments_of(x, wanted)
    moments.mixed[0, 0] = value
    with pytest.raises(IasvitError, match="its moments hold NaN or Inf"):
        correct(weight, None, moments, 1.0)
    with pytest.raises(IasvitError, match="its Hessian is singular beyond any damping"):
        gptq(weight, -(10.0**12) * torch.eye(COLUMNS, dtype=torch.float64), scale, zero, BITS, damping=0.01)


def moments_of(x: Tensor, wanted: Tensor) -> Moments:
    return Moments(x.T @ x, x.T @ wanted, torch.stack([x.sum(0), wanted.sum(0)]), len(x))


@pytest.mark.parametrize("with_bias", [True, False])
def test_ridge_is_least_squares_with_augmented_rows(with_bias: bool) -> None:
    weight, _, _, x, wanted = problem(4)
    bias = torch.arange(float(ROWS), dtype=torch.float64) if with_bias else None
    ridge = 7.0
    found, found_bias = correct(weight, bias, moments_of(x, wanted), ridge)
    ones = torch.ones(TOKENS, 1, dtype=torch.float64)
    augmented, target = (torch.cat([x, ones], 1), torch.cat([wanted, ones], 1)) if with_bias else (x, wanted)
    whole = torch.cat([weight, bias[:, None]], 1) if with_bias else weight
    residual = target @ whole.T - augmented @ whole.T
    size = augmented.shape[1]
    rows = torch.cat([augmented, ridge**0.5 * torch.eye(size, dtype=torch.float64)])
    right = torch.cat([residual, torch.zeros(size, ROWS, dtype=torch.float64)])
    expected = whole + torch.linalg.lstsq(rows, right).solution.T
    torch.testing.assert_close(found, expected[:, :COLUMNS])
    if with_bias:
        torch.testing.assert_close(found_bias, expected[:, COLUMNS])


def plain_refined(weight: Tensor, moments: Tensor, scale: Tensor, zero: Tensor, flips: int) -> Tensor:
    """One row, one flip at a time, the proxy computed anew each time."""
    result = []
    for w, s, z in zip(weight, scale, zero, strict=True):
        codes = ((w / s).round() + z).clamp(0, 2**BITS - 1)
        for _ in range(flips):
            error = w - (codes - z) * s
            slope = moments @ error
            best, at = 0.0, -1
            for i in range(len(w)):
                turned = codes[i] + error[i].sign()
                if slope[i] * error[i] > 0 and 0 <= turned <= 2**BITS - 1 and slope[i].abs() > best:
                    best, at = float(slope[i].abs()), i
            if at < 0:
                break
            turned = codes.clone()
            turned[at] += error[at].sign()
            other = w - (turned - z) * s
            if other @ moments @ other >= error @ moments @ error:
                break
            codes = turned
        result.append((codes - z) * s)
    return torch.stack(result)


def test_refinement_is_the_plain_loop_and_lowers_the_proxy() -> None:
    weight, scale, zero, x, _ = problem(5)
    moments = x.T @ x
    found = refined(weight, moments, scale, zero, BITS, 100)
    torch.testing.assert_close(found, plain_refined(weight, moments, scale, zero, 100))
    nearest = refined(weight, moments, scale, zero, BITS, 0)
    torch.testing.assert_close(nearest, rounded(weight, scale[:, None], zero[:, None]))

    def proxy(q: Tensor) -> Tensor:
        return ((weight - q) @ moments * (weight - q)).sum(1)

    assert (proxy(found) <= proxy(nearest)).all()
    assert (proxy(found) < 0.9 * proxy(nearest)).any()


def test_rounding_by_halves_is_the_plain_version() -> None:
    weight, scale, zero, x, _ = problem(6)
    moments, ridge = x.T @ x, 5.0
    w, start = weight.clone(), 0
    halves = []
    while start < COLUMNS:
        left = COLUMNS - start
        stop = start + max(1, left // 2)
        halves.append(stop - start)
        q = plain_refined(w[:, start:stop], moments[start:stop, start:stop], scale, zero, 100)
        error, w[:, start:stop] = w[:, start:stop] - q, q
        if stop < COLUMNS:  # min ‖X_s e + X_r δ‖² + λ‖δ‖² turned round: the columns left take the error over
            kept = COLUMNS - stop
            rows = torch.cat([x[:, stop:], ridge**0.5 * torch.eye(kept, dtype=torch.float64)])
            right = torch.cat([x[:, start:stop] @ error.T, torch.zeros(kept, ROWS, dtype=torch.float64)])
            w[:, stop:] += torch.linalg.lstsq(rows, right).solution.T
        start = stop
    assert halves == [10, 5, 3, 1, 1, 1]
    torch.testing.assert_close(round_with_correction(weight, moments, scale, zero, BITS, ridge=ridge, flips=100), w)
