"""Fake quantization on a CPU where no gradient is wanted: as few passes over the data as give the very same values.

A quantizer of one scale is a function of one float32 with at most 256 values, constant from one threshold to the next.
A table over the upper bits of a float32 holds that function, and tables over the next bits those few cells of it that a
threshold cuts, to the single float. So log2, log-sqrt2, AdaLog, SULQ and both twins cost alike, whatever their
formulas; at 2 and 3 bits a few comparisons cost even less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iasvit.quantizers import kernels

FINE = 128  # parts of a cell that a threshold cuts, and floats of a part
SHIFT = 14  # lower bits of a float32 that a cell leaves out: 512 cells from one power of 2 to the next
NAN = 0x7FC00000  # its lower bits may be anything
MARGIN = 64  # floats; log2 of two floats that are neighbours may come in the wrong order, so nearby is cut, too
LEAST = 2**15  # values; below it the few calls of the formula cost less
THREADS = 2  # the look-up runs in one; with more than so many the formula, which all share, is as fast
# A quantizer is several passes, and values that do not fit the cache wait for memory in each. So many do, of a thread.
PIECE = 2**17


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, cut along the first dimension into pieces of about PIECE values a thread."""
    if tensors[0].numel() <= PIECE:
        return iter((tensors,))
    flat = all(tensor.is_contiguous() for tensor in tensors)
    tensors = tuple(tensor.view(-1) for tensor in tensors) if flat else tensors
    size, rows = PIECE * torch.get_num_threads(), len(tensors[0])
    return zip(*(t.split(max(1, size * rows // t.numel())) for t in tensors), strict=True)


class Cells(NamedTuple):
    """A function of one float32 that is constant but for a few thresholds.

    Attributes:
        values: of each cell, and NaN where its floats have several: 2^18, float32, at `bits of x >> SHIFT`.
        fine: rows of FINE values. The lowest bits of a cell's NaN say which row is that of its parts, and those of a
            part's NaN which row is that of its floats. Row 0, of those that have none, is NaN.
        first, change: int32, kernels.STEPS entries; none where there are more steps. The function's bits at x are the
            exclusive or of the `change` of all whose `first` is at most x's bits, as an integer.
    """

    values: Tensor
    fine: Tensor
    first: Tensor
    change: Tensor


def cell_table(codes_of: Callable[[Tensor], Tensor], values_of: Callable[[Tensor], Tensor]) -> Cells:
    """The values of all floats.

    Args:
        codes_of: code of each float; from one float to the next it never turns back, on either side of 0.
        values_of: value of each code.
    """
    rows = 1  # row 0 is of NaN

    def constant(first: NDArray[np.uint32], width: int, margin: int) -> tuple[Tensor, NDArray[np.uint32]]:
        """Values of `width` floats from each of the first on, and the first of those that have several values.

        A value is NaN where there is none, and a NaN that says the row where there are several.
        """
        nonlocal rows
        zero = (first & np.uint32(0x7FFFFFFF)) == 0
        low, high = np.where(zero, first, first - np.uint32(margin)), first + np.uint32(width - 1 + margin)
        low_codes, high_codes = (codes_of(torch.from_numpy(bits.view(np.float32))) for bits in (low, high))
        same = low_codes == high_codes  # NaN is not
        values = torch.where(same, values_of(torch.where(same, low_codes, 0.0)), torch.nan)
        where = (~same & ~low_codes.isnan() & ~high_codes.isnan()).nonzero()[:, 0]
        values.view(torch.int32)[where] = NAN + torch.arange(rows, rows + len(where), dtype=torch.int32)
        rows += len(where)
        return values, first[where.numpy()]

    def parts(first: NDArray[np.uint32], width: int) -> NDArray[np.uint32]:
        """The first of each of FINE parts of `width` floats from each of the first on."""
        return (first[:, None] + np.arange(FINE, dtype=np.uint32) * np.uint32(width // FINE)).reshape(-1)

    first = np.arange(2 ** (32 - SHIFT), dtype=np.uint32) << np.uint32(SHIFT)
    values, cut = constant(first, 2**SHIFT, MARGIN)
    of_parts = parts(cut, 2**SHIFT)
    fine, cut = constant(of_parts, 2**SHIFT // FINE, MARGIN)
    of_floats = parts(cut, FINE)
    exact, _ = constant(of_floats, 1, 0)
    steps = _steps((first, of_parts, of_floats), (values, fine, exact))
    return Cells(values, torch.cat([torch.full((FINE,), torch.nan), fine, exact]), *steps)


def _steps(first: Sequence[NDArray[np.uint32]], values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`first` and `change` of `Cells`, from the first float and the value of each cell, part and float."""
    begin, bits = np.concatenate(first).view(np.int32), torch.cat(list(values)).view(torch.int32).numpy()
    known = bits <= NAN  # the NaN of others says where their parts are
    begin, bits = begin[known], bits[known]
    order = np.argsort(begin, kind="stable")
    begin, bits = begin[order], bits[order]
    change = np.concatenate([bits[:1], bits[1:] ^ bits[:-1]])
    begin, change = begin[change != 0], change[change != 0]
    if len(begin) > kernels.STEPS:
        return torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
    more = (0, kernels.STEPS - len(begin))
    return torch.from_numpy(np.pad(begin, more)), torch.from_numpy(np.pad(change, more))


def worth_a_table(x: Tensor) -> bool:
    """Whether `look_up` takes x, and is faster than a formula."""
    return x.dtype == torch.float32 and x.numel() >= LEAST and torch.get_num_threads() <= THREADS


def look_up(x: Tensor, table: Cells, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Values of a table for x (float32, any shape), and what `compute` gives for those x whose cell has none.

    Only the loop in C looks at parts of cells.
    """
    x = x.contiguous()
    if kernels.serve(x):
        return kernels.look_up(x, table, SHIFT, compute)
    values = torch.empty_like(x)
    cells = torch.empty(min(PIECE, x.numel()), dtype=torch.int32)
    open_, start = [], 0
    for source, target in zip(x.view(-1).split(PIECE), values.view(-1).split(PIECE), strict=True):
        cell = cells[: len(source)]
        np.right_shift(source.numpy().view(np.uint32), SHIFT, out=cell.numpy().view(np.uint32))
        torch.index_select(table.values, 0, cell, out=target)
        open_.append(np.flatnonzero(np.isnan(target.numpy())) + start)
        start += len(source)
    where = torch.from_numpy(np.concatenate(open_))
    if len(where):
        values.view(-1)[where] = compute(x.view(-1)[where])
    return values
