"""What every quantizer does: calibrate, forward, encode, decode."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from iasvit.errors import IasvitError
from iasvit.quantizers import kernels
from iasvit.quantizers.evaluation import LEAST, PIECE, Steps, look_up, pieces, step_function
from iasvit.quantizers.pool import Pool

CONFIG_KEY = "config"
LARGEST = 2.0**30  # of a quantizer's parameters


class Quantizer(nn.Module):
    """Maps a tensor to integer codes of `n_bits` bits and back.

    A code is an integer in [0, 2^n_bits - 1], held as uint8. `forward` is fake quantization: exactly
    `decode(encode(x))`, with a straight-through gradient (STE) to x; quantizer parameters get no gradient. With
    `enabled` False, `forward` returns x as it is: full precision. Under torch.compile, which is for learning, a value
    next to a rounding tie may get the other code.

    Subclasses name in `parameters_` the buffers that `calibrate` fills, in `integers` those that are int32, in
    `positive` those that are above 0, and in `config` what else rebuilds them. One whose parameters are scalars, and
    whose codes never turn back from one float to the next, may say in `log_domain` that its thresholds are roughly
    evenly spaced along log2(x + `_log_shift`): an evaluation on a CPU then looks values up in a table.

    Args:
        n_bits: bits of a code, 2 to 8.
    """

    kind: ClassVar[str]
    parameters_: ClassVar[tuple[str, ...]]
    integers: ClassVar[tuple[str, ...]] = ("zero_point", "exponent")
    positive: ClassVar[tuple[str, ...]] = ("scale", "exponent")
    log_domain: ClassVar[bool] = False

    def __init__(self, n_bits: int) -> None:
        super().__init__()
        if not 2 <= n_bits <= 8:
            raise IasvitError(f"n_bits is {n_bits}, but quantizers have 2 to 8 bits")
        self.n_bits = n_bits
        self.enabled = True
        self._table: tuple[object, tuple[Steps | None, tuple[float, float, float] | None]] | None = None
        for name in self.parameters_:
            self.register_buffer(name, torch.empty(0))

    @property
    def n_levels(self) -> int:
        """Number of codes, 2^n_bits."""
        return 2**self.n_bits

    @property
    def elementwise(self) -> bool:
        """Whether a code depends on its value alone, not on where in the tensor it stands."""
        return getattr(self, "channel_dim", None) is None

    @property
    def calibrated(self) -> bool:
        """Whether `calibrate` has run, or a state with its results was loaded."""
        buffers: dict[str, Any] = self._buffers  # attributes of a module take ten times as long
        return all([buffers[name].numel() for name in self.parameters_])

    def calibrate(self, x: Tensor | Sequence[Tensor]) -> None:
        """Choose the quantizer's parameters for values such as x's, or such as those of several tensors together.

        Raises:
            IasvitError: x is empty, holds NaN or Inf, or values outside the quantizer's domain.
        """
        parts = [x] if isinstance(x, Tensor) else x
        if not any(part.numel() for part in parts):
            raise IasvitError("an empty tensor was given for calibration; at least one image is needed")
        pool = Pool(parts, getattr(self, "channel_dim", None))
        if not pool.is_finite():
            raise IasvitError("NaN or Inf was given for calibration; the model or the images hold bad values")
        self._calibrate(pool)

    def encode(self, x: Tensor) -> Tensor:
        """Integer codes of x: uint8, x's shape."""
        return self._codes(x).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """The values that codes stand for, of codes' shape: float32, or float64 where the parameters are."""
        double = any(buffer.dtype == torch.float64 for buffer in self.buffers())
        return self._values(codes.to(torch.float64 if double else torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized x: decode(encode(x)), bit for bit, with the gradient of `_ste`; float32 for half precision."""
        if not self.enabled:
            return x
        if not self.calibrated:
            raise IasvitError("a quantizer was used before it was calibrated; run the method's calibration first")
        if torch.jit.is_tracing():
            raise IasvitError(
                "a quantized model cannot be traced by TorchScript or torch's exporter that rests on it; use "
                "iasvit.export_onnx, or torch.export"
            )
        x = x.float() if x.dtype.itemsize < 4 else x
        if x.is_cpu and not (torch.is_grad_enabled() and x.requires_grad) and not torch.compiler.is_compiling():
            return self._evaluate(x.detach())
        if torch.compiler.is_compiling():  # an expression that fuses with its surroundings: x - x is 0, its gradient 1
            values = self._fake_quantize(x.detach())
            return values + (x - x.detach()) * self._ste(x.detach(), values)
        return _FakeQuantize.apply(x, self)

    def problem(self) -> str:
        """What is wrong with the parameters, "" where nothing is: "a scale of -1.0". Files are checked by it.

        Those named in `integers` are int32, the others float32. Each is finite, those in `positive` are above 0, and
        each is a scalar but where the quantizer has one for each channel. One that is not enabled may have none.
        """
        for name in self.parameters_:
            value: Tensor = getattr(self, name)
            if not self.enabled and not value.numel():  # left in full precision: never calibrated
                continue
            dtype = torch.int32 if name in self.integers else torch.float32
            if value.dtype != dtype:
                return f"a {name} of {value.dtype}, not {dtype}"
            if value.ndim > (not self.elementwise) or not value.numel():
                return f"a {name} of shape {tuple(value.shape)}"
            least = torch.finfo(torch.float32).tiny if name in self.positive else -LARGEST
            if len(wrong := value[~((value >= least) & (value <= LARGEST))].reshape(-1)):
                return f"a {name} of {wrong[0].item()}"
        return ""

    def config(self) -> dict[str, Any]:
        """Arguments that build an equal quantizer, and whether it is enabled; JSON types only."""
        return {"kind": self.kind, "n_bits": self.n_bits, "enabled": self.enabled}

    def configure(self, config: dict[str, Any]) -> None:
        """Take over what `config` returned."""
        self.n_bits, self.enabled = config["n_bits"], config["enabled"]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        """Move to a device, or another dtype: half precision is refused, for codes of it would be others."""
        dtype = fn(torch.empty(0, dtype=torch.float32, device="cpu")).dtype
        if dtype.itemsize < 4:
            raise IasvitError(
                f"a quantized model stays in float32, but {dtype} is asked for; use torch.autocast instead"
            )
        return super()._apply(fn, recurse)

    # What a subclass writes. Codes are floats holding integers here: no gradient, no dtype changes in a hot path.
    def _calibrate(self, pool: Pool) -> None:
        raise NotImplementedError

    def _codes(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _values(self, codes: Tensor) -> Tensor:
        raise NotImplementedError

    def _fake_quantize(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """_values(_codes(x)) to the bit; a subclass saves passes over the data. Written to out where that is given."""
        values = self._values(self._codes(x))
        return values if out is None else out.copy_(values)

    def _evaluate(self, x: Tensor) -> Tensor:
        """_fake_quantize of x on a CPU without a gradient, to the bit; a subclass saves more passes over the data."""
        if self.elementwise and x.ndim > 1 and x.stride(-2) == 1 != x.stride(-1):  # transposed: as it lies in memory
            return self._evaluate(x.mT).mT
        return self._evaluate_in_order(x)

    def _evaluate_in_order(self, x: Tensor) -> Tensor:
        steps = self._step_function(x)[0]
        return _FakeQuantize.apply(x, self) if steps is None else look_up(x, steps, self._fake_quantize)

    def _step_function(self, x: Tensor) -> tuple[Steps | None, tuple[float, float, float] | None]:
        """See `step_function` and `_log_bounds`; computed again where the parameters have changed.

        None where it does not take x, or is no faster than the formula.
        """
        many = torch.get_num_threads() > kernels.THREADS  # share the formula, and do not share a look-up
        if not self.log_domain or x.dtype != torch.float32 or x.numel() < LEAST or many:
            return None, None
        buffers: dict[str, Any] = self._buffers
        key = self.config(), [buffers[name].item() for name in self.parameters_]
        if self._table is None or self._table[0] != key:
            self._table = key, (step_function(self._codes, self._values, self._log_shift()), self._log_bounds())
        return self._table[1]

    def _log_shift(self) -> float:
        """η of a quantizer in the log domain, whose thresholds are roughly evenly spaced along log2(x + η)."""
        return 0.0

    def _fused(self, x: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None] | None:
        """_fake_quantize of x, and _ste where that is wanted, to the bit, for an x that `kernels.serve` takes.

        Strides are those of _fake_quantize. No _ste where `_log_bounds` say it, and None at all where there is no
        faster way than _fake_quantize.
        """
        steps, bounds = self._step_function(x)
        if steps is None or not x.is_contiguous():
            return None
        values = look_up(x, steps, self._fake_quantize)
        return values, self._ste(x, values) if gradient and bounds is None else None

    def _log_bounds(self) -> tuple[float, float, float] | None:
        """(η, low, high) where _ste is (x̂ + η) / (x + η) for low <= x + η <= high and x̂ + η > 0, and 0 elsewhere."""
        return None

    def _ste(self, x: Tensor, values: Tensor) -> Tensor:
        """d values / d x with rounding taken as the identity, or a bool mask where that is 0 or 1; x's shape."""
        raise NotImplementedError

    # A state dict carries the config, so that it alone restores a quantizer whose granularity has changed since.
    def get_extra_state(self) -> Tensor:
        return torch.tensor(list(json.dumps(self.config()).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self.configure(json.loads(bytes(state.tolist())))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in self.parameters_:
            if prefix + name in state_dict:
                device = getattr(self, name).device
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.config().items() if key != "kind")


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: Quantizer) -> Tensor:
        needs_grad = ctx.needs_input_grad[0]
        large = x.is_cpu and x.numel() > 2 * PIECE and quantizer.elementwise
        x = x.contiguous() if large else x
        if kernels.serve(x) and (fused := quantizer._fused(x, needs_grad)) is not None:
            values, ste = fused
            if needs_grad and ste is None:  # a pass that writes it and one that reads it again are saved
                assert quantizer._table is not None
                ctx.quantizer, ctx.bounds = quantizer, quantizer._table[1][1]
                ctx.save_for_backward(x, values)
            elif needs_grad:
                ctx.save_for_backward(ste)
            return values
        if not large:
            values = quantizer._fake_quantize(x)
            if needs_grad:
                ctx.save_for_backward(quantizer._ste(x, values))
            return values
        values, ste = torch.empty_like(x), torch.empty_like(x) if needs_grad else x
        for source, target, gradient in pieces(x, values, ste):
            quantizer._fake_quantize(source, out=target)
            if needs_grad:
                gradient.copy_(quantizer._ste(source, target))
        if needs_grad:
            ctx.save_for_backward(ste)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if len(ctx.saved_tensors) == 2:
            x, values = ctx.saved_tensors
            if grad.is_contiguous():
                return kernels.log_gradient(grad, x, values, *ctx.bounds), None
            return grad * ctx.quantizer._ste(x, values), None
        (ste,) = ctx.saved_tensors
        product = kernels.masked(grad, ste) if ste.dtype == torch.bool and kernels.serve(grad) else None
        return grad * ste if product is None else product, None
