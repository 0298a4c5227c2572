"""Tensors in files that have no name: they go with the object, or with the process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from math import prod

import torch
from torch import Tensor

SLICE = 2**22  # values of a slice of `FileTensor`


class FileTensor:
    """A tensor in a file, which grows along its first dimension and of which rows are read when they are asked for.

    Args:
        first: the first rows (R, ...); their shape, dtype and device are those of all, and so is whether the last two
            dimensions are swapped in memory, which products of matrices may depend on to the bit.
    """

    def __init__(self, first: Tensor) -> None:
        self._swapped = first.ndim > 2 and first.mT.is_contiguous() and not first.is_contiguous()
        self.dtype, self.device, self._row = first.dtype, first.device, tuple(first.shape[1:])
        self._bytes = prod(self._row) * first.element_size()
        self._count = 0
        self._file = tempfile.TemporaryFile(prefix="iasvit-", buffering=0)  # noqa: SIM115
        self.append(first)

    def __len__(self) -> int:
        return self._count

    @property
    def shape(self) -> torch.Size:
        """That of all rows together."""
        return torch.Size((self._count, *self._row))

    @property
    def ndim(self) -> int:
        """Dimensions."""
        return 1 + len(self._row)

    @property
    def is_cpu(self) -> bool:
        """Whether rows come back on the CPU."""
        return self.device.type == "cpu"

    def append(self, rows: Tensor) -> None:
        """Add rows; OSError where the disk is full."""
        step = max(1, SLICE // max(1, prod(self._row)))
        for some in rows.detach().split(step):  # a copy in the file's layout is no larger than a slice
            data = memoryview(
                (some.mT if self._swapped else some).cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            )
            while len(data):
                data = data[os.write(self._file.fileno(), data) :]
        self._count += len(rows)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        indices = range(*rows.indices(self._count)) if isinstance(rows, slice) else rows.tolist()
        row = (*self._row[:-2], *self._row[:-3:-1]) if self._swapped else self._row
        result = torch.empty(len(indices), *row, dtype=self.dtype)
        data = memoryview(result.view(-1).view(torch.uint8).numpy()) if result.numel() else memoryview(b"")
        if isinstance(rows, slice):
            if indices.step != 1:
                raise ValueError("rows are read in order")
            self._read(data, indices.start)
        else:
            for place, index in enumerate(indices):
                self._read(data[place * self._bytes : (place + 1) * self._bytes], index)
        return (result.mT if self._swapped else result).to(self.device)

    def _read(self, data: memoryview, row: int) -> None:
        offset = row * self._bytes
        while len(data):
            count = os.preadv(self._file.fileno(), [data], offset)
            if not count:
                raise OSError("a temporary file of activations ends too early")
            data, offset = data[count:], offset + count


Table = Tensor | FileTensor


def pieces(x: Table) -> Iterator[slice]:
    """Slices of rows, of a fixed size and two rows or more each where there are as many."""
    step = max(2, SLICE // max(1, prod(x.shape[1:])))
    starts = list(range(0, max(1, len(x) - 1), step))
    for start, stop in zip(starts, [*starts[1:], len(x)], strict=True):
        yield slice(start, stop)


def mapped(x: Table, function: Callable[..., Tensor], *others: Table) -> Table:
    """function(x, *others), of what it does row by row; in a file where x is in one."""
    if isinstance(x, Tensor):
        return function(x, *others)
    result: FileTensor | None = None
    for piece in pieces(x):
        value = function(x[piece], *(other[piece] for other in others))
        if result is None:
            result = FileTensor(value)
        else:
            result.append(value)
    assert result is not None
    return result


def reordered(x: Table, order: Tensor) -> Table:
    """x[order]; in a file where x is in one."""
    if isinstance(x, Tensor):
        return x[order]
    result: FileTensor | None = None
    for piece in pieces(x):
        rows = x[order[piece]]
        if result is None:
            result = FileTensor(rows)
        else:
            result.append(rows)
    assert result is not None
    return result


class TensorList(Sequence[Tensor]):
    """Tensors of any shapes, in files beyond so many bytes.

    Args:
        memory_budget: bytes to hold; None for no limit.
    """

    def __init__(self, memory_budget: int | None = None) -> None:
        self.memory_budget = memory_budget
        self._held = 0
        self._items: list[Table] = []

    def __len__(self) -> int:
        return len(self._items)

    def append(self, x: Tensor) -> None:
        """Add a tensor; OSError where the disk is full."""
        size = x.numel() * x.element_size()
        if self.memory_budget is not None and self._held + size > self.memory_budget:
            self._items.append(FileTensor(x))
        else:
            self._held += size
            self._items.append(x)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        item = self._items[index]
        return item if isinstance(item, Tensor) else item[:]
