"""The full-precision model behind a block: its frozen rest, its answers, gradients of a task's loss at the block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iasvit.calibration import ActivationStore, tensors
from iasvit.errors import IasvitError
from iasvit.models import Activation, Segment, adapter_for, relative_error, segments

Run = Callable[[Activation], Activation]
Caller = Callable[[Run, Activation], Activation]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of a model gets a gradient for a while."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _call(run: Run, x: Activation) -> Activation:
    return run(x)


@cache
def _compiled_call() -> Callable[..., Activation]:
    compiled = torch.compile(_call, dynamic=False)

    def call(*arguments: Any) -> Activation:
        # Past the limit on kinds of segments torch falls back to eager mode.
        with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):
            return compiled(*arguments)

    return call


def caller(compile: bool) -> Caller:
    """What runs a segment: as it is, or fused by torch.compile."""
    return _compiled_call() if compile else _call


def answers_of(last: Segment, x: Activation) -> tuple[Tensor, Tensor]:
    """What a model's last segment makes of its inputs, B images, and what the Linears in it read: (B, ...) both.

    Features are the logits themselves where there is no Linear, and joined where there are several.
    """
    seen: list[Tensor] = []
    linears = [m for _, root in last.modules for m in root.modules() if isinstance(m, nn.Linear)]
    handles = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for m in linears]
    try:
        logits = last.run(x)
    finally:
        for handle in handles:
            handle.remove()
    assert isinstance(logits, Tensor)
    return logits, torch.cat(seen, dim=1) if seen else logits


class Teacher:
    """The full-precision model, of which a block's outputs are read on.

    Args:
        model: in full precision, eval mode.
        images: all calibration images.
        of: who asks, for messages: "fima_q".
        compile: run blocks fused by torch.compile.
    """

    def __init__(self, model: nn.Module, images: ActivationStore, of: str, compile: bool = False) -> None:
        self.adapter, self.model = adapter_for(model), model
        self.chain: list[Segment] = segments(model)
        self.images, self.of = images, of
        self.call = caller(compile)
        self._answers: tuple[Tensor, Tensor] | None = None
        self._has_logits: bool | None = None

    def answers(self) -> tuple[Tensor, Tensor]:
        """Logits (N, classes) and features (N, width) of all images: what the last Linear puts out, and reads.

        Raises:
            IasvitError: the model puts out no table of logits.
        """
        if self._answers is None:
            found: list[tuple[Tensor, Tensor]] = []
            with torch.no_grad():
                for batch in self.images.batches(self.images.passes(64)):
                    x: Activation = batch
                    for segment in self.chain[:-1]:
                        x = segment.run(x)
                    found.append(self.last(x))
            logits, features = (torch.cat(parts) for parts in zip(*found, strict=True))
            if not torch.isfinite(logits).all():
                raise IasvitError(
                    f"layer {self.chain[-1].name!r} puts out NaN or Inf for the calibration images; check the model"
                )
            self._answers = logits, features
        return self._answers

    @property
    def has_logits(self) -> bool:
        """Whether the model puts out a table of logits; found out on the first image."""
        if self._answers is None and self._has_logits is None:
            x: Activation = self.images.gather([0])
            with torch.no_grad():
                for segment in self.chain:
                    x = segment.run(x)
            self._has_logits = self.chain[-1].reconstruct and isinstance(x, Tensor) and x.ndim == 2
        return self._answers is not None or bool(self._has_logits)

    def last(self, x: Activation) -> tuple[Tensor, Tensor]:
        """Logits and features of the last segment's inputs x, B images."""
        if not self.has_logits:
            raise IasvitError(
                f"{self.of} reads the model's logits (images, classes), but {type(self.model).__name__} puts out "
                "something else; take a method that compares blocks alone, such as qdrop"
            )
        return answers_of(self.chain[-1], x)

    def behind(self, index: int, x: Activation) -> tuple[Tensor, Tensor]:
        """Logits and features of x, B images, activations that leave segment `index`."""
        return self.last(self._to_last(index, x))

    def error_behind(self, index: int, x: Activation, full: Activation) -> Tensor:
        """How far x, activations that leave segment `index`, moves what the last segment reads: a scalar.

        That is `relative_error`, for models without logits: a detector's last segment, neck and heads, reads what the
        backbone's stages put out.

        Args:
            index: of the segment.
            x: its outputs for some images.
            full: its outputs for them in full precision.
        """
        with torch.no_grad():
            wanted = self._to_last(index, full)
        return relative_error(self._to_last(index, x), wanted)

    def detector_errors(self, index: int, x: Activation, full: Activation) -> Tensor:
        """How far x, activations that leave segment `index`, moves a detector's stages, boxes and masks.

        Args:
            index: of the segment.
            x: its outputs for some images.
            full: its outputs for them in full precision.

        Returns:
            float32 (3,), each ≥ 0: `error_behind`, and both of `Adapter.region_errors`. Heads compute in float32.

        Raises:
            IasvitError: the model's family knows no such errors.
        """
        with torch.no_grad():
            wanted = self._to_last(index, full)
        ours = self._to_last(index, x)
        stages = relative_error(ours, wanted)
        with torch.autocast(stages.device.type, enabled=False):
            ours, wanted = (tuple(y.float() for y in tensors(z)) for z in (ours, wanted))
            return torch.cat([stages[None], self.adapter.region_errors(self.model, ours, wanted)])

    def _to_last(self, index: int, x: Activation) -> Activation:
        for segment in self.chain[index + 1 : -1]:
            x = self.call(segment.run, x)
        return x

    def divergence_gradient(
        self, index: int, x: Activation, full: Activation, images: range, temperature: float
    ) -> Tensor:
        """∂ KL(softmax(full precision / T) ‖ softmax(logits of x / T)) / ∂x, an image's KL for each image.

        At a high T the divergence is a squared error of logits. A model without logits has that of `error_behind` for
        it, whatever T.

        Args:
            index: of the segment that x leaves.
            x: activations of these images; of a tuple the first is meant.
            full: the same in full precision.
            images: which they are.
            temperature: T.
        """
        first, *others = tensors(x)
        leaf = first.detach().requires_grad_(True)
        moved: Activation = (leaf, *others) if isinstance(x, tuple) else leaf
        with torch.enable_grad():
            if not self.has_logits:
                return torch.autograd.grad(len(images) * self.error_behind(index, moved, full), leaf)[0]
            target = (self.answers()[0][images.start : images.stop] / temperature).log_softmax(dim=1)
            logits, _ = self.behind(index, moved)
            loss = F.kl_div((logits / temperature).log_softmax(dim=1), target, reduction="sum", log_target=True)
            return torch.autograd.grad(loss, leaf)[0]

    def likelihood_gradient(self, index: int, x: Activation, generator: torch.Generator) -> Tensor:
        """∂ log p(y) / ∂x for labels y that the model itself draws; see `Adapter.log_likelihood`."""
        first, *others = tensors(x)
        leaf = first.detach().requires_grad_(True)
        with torch.enable_grad():
            inputs = self._to_last(index, (leaf, *others) if isinstance(x, tuple) else leaf)
            value = self.adapter.log_likelihood(self.model, inputs, generator).sum()
            return torch.autograd.grad(value, leaf)[0]
