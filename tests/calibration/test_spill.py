"""Tensors in files: rows come back as they went, in the same layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from iasvit.calibration import spill
from iasvit.calibration.spill import FileTensor, TensorList, mapped, pieces, reordered


def values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "SLICE", 40)


@pytest.mark.parametrize("x", [values(33, 5), values(33), values(33, 3, 5), values(33, 3, 5).mT, values(4, 99)])
def test_rows_come_back_in_their_layout(x: Tensor) -> None:
    file = FileTensor(x[:3])
    file.append(x[3:])
    assert file.shape == x.shape
    assert (file.ndim, len(file), file.dtype, file.is_cpu) == (x.ndim, len(x), x.dtype, True)
    assert torch.equal(file[:], x)
    assert file[:].stride() == x.stride()
    assert torch.equal(file[1:3], x[1:3])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    assert torch.equal(file[order], x[order])
    assert torch.equal(reordered(file, order)[:], reordered(x, order))
    assert torch.equal(mapped(file, lambda a, b: a - 2 * b, file)[:], x - 2 * x)
    assert torch.equal(torch.cat([x[piece] for piece in pieces(file)]), x)
    assert min(piece.stop - piece.start for piece in pieces(file)) >= 2


def test_steps_and_files_cut_short_are_refused() -> None:
    file = FileTensor(values(8, 2))
    with pytest.raises(ValueError, match="in order"):
        file[::2]
    file._file.truncate(10)
    with pytest.raises(OSError, match="ends too early"):
        file[:]


@pytest.mark.parametrize("limit", [None, 0, 100])
def test_a_list_gives_back_what_it_holds_and_what_it_does_not(limit: int | None) -> None:
    given = [values(3, 4), values(7), values(2, 2, 2).to(torch.int64)]
    held = TensorList(limit)
    for x in given:
        held.append(x)
    assert [torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(held, given, strict=True)] == [True] * 3
    assert sum(isinstance(item, FileTensor) for item in held._items) == {None: 0, 0: 3, 100: 1}[limit]
