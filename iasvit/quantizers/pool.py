"""Values to calibrate on, read in slices of a fixed size, so that no search copies all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Values of a slice: small enough for a CPU's cache, large enough to fill an accelerator. What is chosen must not depend
# on how much memory there is, so neither do these.
CPU_SLICE, ACCELERATOR_SLICE = 2**20, 2**24


class Pool:
    """The values of one or several tensors, a row for each channel.

    Args:
        parts: tensors with the same channels; a sequence that reads a tensor from a file when it is asked for will do.
        channel_dim: dimension of the channels; None for one row of all values.

    Attributes:
        rows: channels, 1 without a channel_dim.
        count: values of a row.
    """

    def __init__(self, parts: Sequence[Tensor], channel_dim: int | None = None) -> None:
        self.parts, self.channel_dim = parts, channel_dim
        self.rows, values = 1, 0
        for part in parts:
            self.rows = 1 if channel_dim is None else part.shape[channel_dim]
            self.device = part.device
            values += part.numel()
        self.count = values // max(1, self.rows)

    @property
    def size(self) -> int:
        """Values of a slice, of all rows together."""
        return CPU_SLICE if self.device.type == "cpu" else ACCELERATOR_SLICE

    def slices(self) -> Iterator[Tensor]:
        """rows × some of the values, float32, until there are no more; not to be written to."""
        for part in self.parts:
            x = part.detach()
            if self.channel_dim is None:
                step = x.shape[0] if x.is_contiguous() and x.ndim else max(1, self.size * len(x) // max(1, x.numel()))
                for some in x.split(max(1, step)) if x.ndim else (x,):
                    yield from (values.float()[None] for values in some.reshape(-1).split(self.size))
                continue
            step = max(1, self.size // self.rows)
            if self.channel_dim % x.ndim == x.ndim - 1:
                yield from (values.float().T.contiguous() for values in x.reshape(-1, self.rows).split(step))
            else:
                rows = x.movedim(self.channel_dim, 0).reshape(self.rows, -1)
                yield from (values.float() for values in rows.split(step, dim=1))

    def blocks(self) -> list[Pool]:
        """Pools of some of the rows each: of a weight, whose channels come first, blocks that make one slice."""
        if self.channel_dim is None or len(self.parts) > 1 or self.channel_dim % self.parts[0].ndim:
            return [self]
        step = max(1, self.size // max(1, self.count))
        return [Pool([rows], self.channel_dim) for rows in self.parts[0].split(step)]

    def ends(self) -> Tensor:
        """The least and the largest of all values."""
        pairs = [torch.stack([x.amin(), x.amax()]) for x in self.slices()]
        return torch.stack([torch.stack([low for low, _ in pairs]).amin(), torch.stack([h for _, h in pairs]).amax()])

    def is_finite(self) -> bool:
        """Whether no value is NaN or Inf."""
        return all(bool(torch.isfinite(x).all()) for x in Pool(self.parts).slices())
