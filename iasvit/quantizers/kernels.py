"""Fake quantization on a CPU in one pass over memory: loops in C, which the machine's own compiler translates once.

torch has no operator for it, so that a quantizer is a dozen passes, each of which waits for memory. The loops of
`kernels.c` compute to the bit what those passes do. Where there is no C compiler, where what it makes is not equal on
a few values, or where torch has more threads than THREADS, the passes are taken; nothing but speed differs.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from iasvit.quantizers.evaluation import Steps

SOURCE = Path(__file__).with_name("kernels.c")
_EXACT = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
FLAGS = ("-O3", "-funroll-loops", "-march=native", *_EXACT, "-shared", "-fPIC")
SECONDS = 60  # for a translation, which takes half of one
THREADS = 4  # the loops run in one thread, torch's passes in all
SIZES = (32, 64, 256)  # of the tables that `look_up` takes
LEAST = 2**10  # values; who has fewer only need not wait for a compiler

_POINTER, _COUNT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "uniform_runs": [*[_POINTER] * 3, _FLOAT, *[_COUNT] * 3, *[_POINTER] * 2],
    "uniform_columns": [*[_POINTER] * 3, _FLOAT, *[_COUNT] * 2, *[_POINTER] * 2],
    "twin": [_POINTER, *[_FLOAT] * 5, _COUNT, *[_POINTER] * 2],
    "masked": [*[_POINTER] * 2, _COUNT, _POINTER],
    "look_up": [*[_POINTER] * 3, *[_FLOAT] * 5, ctypes.c_int, _COUNT, _POINTER],
    "log_gradient": [*[_POINTER] * 3, *[_FLOAT] * 3, _COUNT, _POINTER],
}


def serve(x: Tensor) -> bool:
    """Whether the functions below take x, and are faster than torch's operators."""
    return (
        type(x) in (Tensor, Parameter)  # a subclass, such as those that tracers pass, may have no memory
        and x.is_cpu
        and x.dtype == torch.float32
        and x.numel() >= LEAST
        and torch.get_num_threads() <= THREADS
        and library() is not None
    )


@cache
def library() -> ctypes.CDLL | None:
    """The loops, translated for this machine by $CC, or cc; None where that cannot be done. Nothing of it is kept."""
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return None
    try:
        with tempfile.TemporaryDirectory(prefix="iasvit-kernels-") as folder:
            file = Path(folder) / "kernels.so"
            command = [compiler, *FLAGS, "-o", str(file), str(SOURCE), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
            loaded = ctypes.CDLL(str(file))
    except (OSError, subprocess.SubprocessError):
        return None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, ctypes.c_int if name == "look_up" else None
    return loaded if _is_exact(loaded) else None


def _is_exact(loaded: ctypes.CDLL) -> bool:
    """Whether codes next to ties are those of torch: a compiler may have options of its own."""
    scale, zero_point = torch.tensor(0.3), torch.tensor(40, dtype=torch.int32)
    ties = (torch.arange(-50, 50) + 0.5) * scale
    x = torch.cat([ties, *(torch.nextafter(ties, end.expand_as(ties)) for end in (ties.amin() - 1, ties.amax() + 1))])
    values, inside = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
    ends = (1, 1, len(x), values.data_ptr(), inside.data_ptr())
    loaded.uniform_runs(x.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), 80.0, *ends)
    wanted = ((x / scale).round() + zero_point).clamp(0, 80).sub(zero_point).mul(scale)
    return torch.equal(values, wanted) and torch.equal(inside, (x - wanted).abs() <= scale / 2 * (1 + 1e-5))


def uniform(
    x: Tensor, scale: Tensor, zero_point: Tensor, top: int, channel_dim: int | None, mask: bool
) -> tuple[Tensor, Tensor | None] | None:
    """(clamp(round(x / s) + z, 0, top) - z)·s, and where |x - that| is at most s/2·(1 + 1e-5).

    Args:
        x: that `serve` takes.
        scale: s, float32: a scalar, or an entry for each index of channel_dim.
        zero_point: z, int32, of scale's shape.
        top: the last code.
        channel_dim: of x; None where s is a scalar.
        mask: whether the second is wanted.

    Returns:
        Values in the strides that torch's operators would give them, and the mask (bool, alike) or None. None for
        channels of an x that is not contiguous, and for parameters of other types.
    """
    loaded = library()
    assert loaded is not None
    if scale.dtype != torch.float32 or zero_point.dtype != torch.int32:
        return None
    if channel_dim is not None and not (x.is_contiguous() and scale.is_contiguous() and zero_point.is_contiguous()):
        return None
    values = torch.empty_like(x)  # without gaps in memory
    x = x if x.stride() == values.stride() else x.clone()
    inside = torch.empty_like(values, dtype=torch.bool) if mask else None
    given = (x.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), top)
    made = (values.data_ptr(), None if inside is None else inside.data_ptr())
    if channel_dim is None:
        loaded.uniform_runs(*given, 1, 1, x.numel(), *made)
        return values, inside
    dim = channel_dim % x.ndim
    outer, inner = x.shape[:dim].numel(), x.shape[dim + 1 :].numel()
    if inner == 1:
        loaded.uniform_columns(*given, outer, x.shape[dim], *made)
    else:
        loaded.uniform_runs(*given, outer, x.shape[dim], inner, *made)
    return values, inside


def twin(
    x: Tensor, steps: tuple[float, float], limit: float, zero_point: int, top: int, mask: bool
) -> tuple[Tensor, Tensor | None]:
    """`uniform` with two scales (PTQ4ViT's twin ranges): s = steps[0] for x below the limit, and steps[1] for others.

    Args:
        x: that `serve` takes.
        steps: Δ₁ and Δ₂, float32 values.
        limit: where the range of Δ₂ begins.
        zero_point: z of both.
        top: the last code.
        mask: whether the second is wanted.

    Returns:
        As `uniform`; never None in whole.
    """
    loaded = library()
    assert loaded is not None
    values = torch.empty_like(x)  # without gaps in memory
    x = x if x.stride() == values.stride() else x.clone()
    inside = torch.empty_like(values, dtype=torch.bool) if mask else None
    made = (values.data_ptr(), None if inside is None else inside.data_ptr())
    loaded.twin(x.data_ptr(), *steps, limit, zero_point, top, x.numel(), *made)
    return values, inside


def masked(gradient: Tensor, inside: Tensor) -> Tensor | None:
    """gradient * inside, a bool mask; None where they lie in memory in different ways that torch has to reconcile."""
    loaded = library()
    assert loaded is not None
    if gradient.stride() != inside.stride():
        if not gradient.is_contiguous():
            return None
        inside = inside.contiguous()
    out = torch.empty_like(gradient)
    loaded.masked(gradient.data_ptr(), inside.data_ptr(), gradient.numel(), out.data_ptr())
    return out


def look_up(x: Tensor, steps: Steps) -> tuple[Tensor, bool]:
    """The values of the steps for x, which is contiguous, and whether all x are at least `steps.least`."""
    loaded = library()
    assert loaded is not None
    values = torch.empty_like(x)
    given = (x.data_ptr(), steps.thresholds.data_ptr(), steps.values.data_ptr(), steps.shift, *steps.line)
    unknown = loaded.look_up(*given, steps.top, steps.least, len(steps.values), x.numel(), values.data_ptr())
    return values, not unknown


def log_gradient(gradient: Tensor, x: Tensor, values: Tensor, shift: float, low: float, high: float) -> Tensor:
    """gradient·(values + shift) / (x + shift) where low <= x + shift <= high and values + shift > 0, elsewhere 0.

    All are contiguous.
    """
    loaded = library()
    assert loaded is not None
    out = torch.empty_like(gradient)
    given = (gradient.data_ptr(), x.data_ptr(), values.data_ptr(), shift, low, high, x.numel())
    loaded.log_gradient(*given, out.data_ptr())
    return out
