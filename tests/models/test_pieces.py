"""Attention in pieces of the batch computes what it computes whole, to the bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_attention import attention, products, window_mask
from timm.layers import Attention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, fx, nn

from iasvit.models import pieces
from iasvit.models.attention import explicit_attention
from iasvit.quantizers import Quantizer

Run = Callable[[], Tensor]


def quantized(cls: type[nn.Module], **options: object) -> fx.GraphModule:
    explicit = explicit_attention(attention(cls, **options), "attn", *products())
    for quantizer in (module for module in explicit.modules() if isinstance(module, Quantizer)):
        quantizer.calibrate(torch.rand(50))
        quantizer.enabled = True
    return explicit


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of each softmax, of which there is one a piece."""
    seen: list[int] = []
    softmax = Tensor.softmax
    monkeypatch.setattr(Tensor, "softmax", lambda x, *a, **k: (seen.append(len(x)), softmax(x, *a, **k))[1])
    return seen


def in_pieces(monkeypatch: pytest.MonkeyPatch, values: int, run: Run) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(pieces, "PIECE", values)
        return run()


IMAGES = torch.randn(7, 10, 24, generator=torch.Generator().manual_seed(0))
MAP = 3 * 10 * 10  # values of an image's


def test_a_batch_in_pieces_equals_the_whole(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    explicit = quantized(Attention)
    with torch.inference_mode():
        whole = explicit(IMAGES)
        assert calls == [7]
        assert torch.equal(in_pieces(monkeypatch, 3 * MAP, lambda: explicit(IMAGES)), whole)
    assert calls == [7, 3, 3, 1]


def test_windows_stay_with_their_masks(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    explicit = quantized(WindowAttention, window_size=4)
    x = torch.randn(12, 16, 24, generator=torch.Generator().manual_seed(0))  # 4 images of 3 windows
    mask = window_mask(3, 16)
    with torch.no_grad():
        whole = explicit(x, mask=mask)
        assert torch.equal(in_pieces(monkeypatch, 1, lambda: explicit(x, mask=mask)), whole)
    assert calls == [12, 3, 3, 3, 3]


def test_what_is_learnt_gets_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    explicit = quantized(WindowAttention, window_size=4)
    x, mask = torch.randn(6, 16, 24, generator=torch.Generator().manual_seed(0)), window_mask(3, 16)
    table = explicit.get_parameter("relative_position_bias_table")  # neither query nor key nor value depend on it
    for parameter in explicit.parameters():
        parameter.requires_grad_(parameter is table)

    def gradient() -> Tensor:
        return torch.autograd.grad(explicit(x, mask=mask).square().sum(), table)[0]

    whole = gradient()
    assert whole.abs().max() > 0
    assert torch.equal(in_pieces(monkeypatch, 1, gradient), whole)


def test_autocast_is_not_evaded(monkeypatch: pytest.MonkeyPatch) -> None:
    explicit = quantized(Attention)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        whole = explicit(IMAGES)
        assert torch.equal(in_pieces(monkeypatch, MAP, lambda: explicit(IMAGES)), whole)
    with torch.inference_mode():
        assert not torch.equal(explicit(IMAGES), whole.float())
