"""Observation: quantizers set from what passes through the layers that hold them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from iasvit import distributed
from iasvit.calibration.spill import TensorList
from iasvit.errors import IasvitError
from iasvit.models import Activation, segments
from iasvit.nn import QuantLayer, quantizers_of
from iasvit.quantizers import Quantizer

T = TypeVar("T")


@contextmanager
def enabled(quantizers: Iterable[tuple[str, Quantizer]], value: bool) -> Iterator[None]:
    """Switch these quantizers on or off for a while."""
    before = [(quantizer, quantizer.enabled) for _, quantizer in quantizers]
    try:
        for quantizer, _ in before:
            quantizer.enabled = value
        yield
    finally:
        for quantizer, state in before:
            quantizer.enabled = state


def calibrate_weights(layers: Iterable[tuple[str, QuantLayer]]) -> None:
    """Calibrate and enable the weight quantizers of these (path in the model, layer); processes share the layers.

    Raises:
        IasvitError: a weight holds NaN or Inf; the message names its layer.
    """
    named = list(layers)

    def calibrate(numbers: list[int]) -> None:
        for name, layer in (named[number] for number in numbers):
            try:
                layer.calibrate_weight()
            except IasvitError as error:
                raise IasvitError(f"weight of layer {name!r}: {error}") from error

    costs = [layer.weight.numel() for _, layer in named]
    distributed.divided([layer.weight_quantizer for _, layer in named], calibrate, costs)


@torch.no_grad()
def calibrate_inputs(
    quantizers: Sequence[tuple[str, Quantizer]], run: Callable[[], T], memory_budget: int | None = None
) -> T:
    """Calibrate activation quantizers on what reaches them while `run()` runs the model, or a part of it.

    They are off meanwhile, so that each sees full-precision values; inputs of several batches are pooled. Afterwards
    they are enabled. Processes share the quantizers, while each runs all batches.

    Args:
        quantizers: (path in the model, quantizer).
        run: runs calibration batches through whatever holds the quantizers.
        memory_budget: bytes of inputs to hold; more goes to files. None for no limit.

    Returns:
        What `run()` returns.

    Raises:
        IasvitError: a quantizer saw NaN, Inf or nothing; the message names its layer.
    """
    outputs: list[T] = []

    def calibrate(numbers: list[int]) -> None:
        mine = [quantizers[number] for number in numbers]
        each = None if memory_budget is None else memory_budget // max(1, len(mine))
        seen = {id(quantizer): TensorList(each) for _, quantizer in mine}

        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[id(module)].append(args[0])

        with watching([quantizer for _, quantizer in mine], record), enabled(quantizers, False):
            outputs.append(run())
        for name, quantizer in mine:
            _calibrate_on(name, quantizer, seen.pop(id(quantizer)))

    distributed.divided([quantizer for _, quantizer in quantizers], calibrate)
    return outputs[0]


def _calibrate_on(name: str, quantizer: Quantizer, inputs: Sequence[Tensor]) -> None:
    """Calibrate a quantizer on what reached it, pooled, and enable it."""
    if not inputs:
        raise IasvitError(f"layer {name!r} was not reached by the calibration images; is it part of the forward?")
    try:
        quantizer.calibrate(inputs[0] if len(inputs) == 1 else inputs)
    except IasvitError as error:
        raise IasvitError(f"layer {name!r}: {error}") from error
    quantizer.enabled = True


@torch.no_grad()
def calibrate_in_sequence(
    quantizers: Sequence[tuple[str, Quantizer]], run: Callable[[], T], memory_budget: int | None = None
) -> T:
    """Calibrate activation quantizers in the order in which `run()` reaches them, each on the output of those before
    it.

    One forward pass does it. Where a quantizer is reached several times, by batches of several sizes or by a head that
    several feature maps share, all that reaches it counts, and that takes a pass for each quantizer.

    Args:
        quantizers: (path in the model, quantizer); enabled afterwards.
        run: runs the calibration batches through whatever holds the quantizers.
        memory_budget: bytes of a quantizer's inputs to hold; more goes to files. None for no limit.

    Returns:
        What `run()` returns with all quantizers calibrated and enabled.

    Raises:
        IasvitError: a quantizer saw NaN, Inf or nothing; the message names its layer.
    """
    names = {quantizer: name for name, quantizer in quantizers}
    reached: Counter[Quantizer] = Counter()

    def calibrate(quantizer: Quantizer, args: tuple[Tensor, ...]) -> None:
        reached[quantizer] += 1
        if reached[quantizer] == 1:
            _calibrate_on(names[quantizer], quantizer, args[:1])

    with watching(names, calibrate):
        outputs = run()
    if all(reached[quantizer] == 1 for quantizer in names):
        return outputs
    del outputs
    for quantizer in names:
        quantizer.enabled = False
    for quantizer in [*reached, *(q for q in names if q not in reached)]:
        _calibrate_on(names[quantizer], quantizer, _inputs_of(quantizer, run, memory_budget))
    return run()


def _inputs_of(quantizer: Quantizer, run: Callable[[], object], memory_budget: int | None) -> TensorList:
    """What reaches a quantizer while `run()` runs, call by call."""
    inputs = TensorList(memory_budget)
    with watching([quantizer], lambda _, args: inputs.append(args[0])):
        run()
    return inputs


@torch.no_grad()
def calibrate_in_stream(model: nn.Module, batches: Sequence[Tensor], memory_budget: int | None = None) -> None:
    """Calibrate all activation quantizers of a model in one forward pass, each on the output of those before it.

    Weights are as they are: in full precision where their quantizers are off, else quantized. Each quantizer waits for
    the one before, so with several processes the first one does it.

    Args:
        model: quantizable; segment by segment it runs on the batches.
        batches: images, B×3×H×W each; with several, a segment takes a pass for each of its quantizers.
        memory_budget: bytes of activations at a place to hold; more goes to files. None for no limit.

    Raises:
        IasvitError: as `calibrate_in_sequence`.
    """

    def calibrate() -> None:
        activations: Sequence[Activation] = batches
        for segment in segments(model):
            quantizers = segment.quantizers(weights=False)
            run = partial(run_all, segment.run, activations, memory_budget)
            activations = calibrate_in_sequence(quantizers, run, memory_budget)

    distributed.done_by_first([quantizer for _, quantizer in quantizers_of(model, weights=False)], calibrate)


def run_all(
    run: Callable[[Activation], Activation], batches: Sequence[Activation], memory_budget: int | None = None
) -> Sequence[Activation]:
    """run(batch) of each batch; beyond the budget, in files."""
    outputs = _Activations(memory_budget)
    for batch in batches:
        outputs.append(run(batch))
    return outputs


class _Activations(Sequence[Activation]):
    """Activations, tensors or tuples of them, in files beyond so many bytes."""

    def __init__(self, memory_budget: int | None) -> None:
        self._tensors = TensorList(memory_budget)
        self._places: list[tuple[int, int] | int] = []

    def __len__(self) -> int:
        return len(self._places)

    def append(self, activation: Activation) -> None:
        start = len(self._tensors)
        for tensor in activation if isinstance(activation, tuple) else (activation,):
            self._tensors.append(tensor)
        self._places.append((start, len(self._tensors)) if isinstance(activation, tuple) else start)

    def __getitem__(self, index: int) -> Activation:  # type: ignore[override]
        place = self._places[index]
        return tuple(self._tensors[i] for i in range(*place)) if isinstance(place, tuple) else self._tensors[place]


@contextmanager
def watching(modules: Iterable[nn.Module], hook: Callable[[Any, tuple[Tensor, ...]], None]) -> Iterator[None]:
    """Call hook(module, args) before each forward of these modules for a while."""
    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
