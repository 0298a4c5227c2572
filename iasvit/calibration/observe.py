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
def calibrate_inputs(quantizers: Sequence[tuple[str, Quantizer]], run: Callable[[], object]) -> None:
    """Calibrate activation quantizers on what reaches them while `run()` runs the model, or a part of it.

    They are off meanwhile, so that each sees full-precision values; inputs of several batches are pooled. Afterwards
    they are enabled. Processes share the quantizers, while each runs all batches.

    Args:
        quantizers: (path in the model, quantizer).
        run: runs calibration batches through whatever holds the quantizers.

    Raises:
        IasvitError: a quantizer saw NaN, Inf or nothing; the message names its layer.
    """

    def calibrate(numbers: list[int]) -> None:
        mine = [quantizers[number] for number in numbers]
        seen: dict[int, list[Tensor]] = {id(quantizer): [] for _, quantizer in mine}

        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[id(module)].append(args[0])

        with _watching([quantizer for _, quantizer in mine], record), enabled(quantizers, False):
            run()
        for name, quantizer in mine:
            _calibrate_on(name, quantizer, seen.pop(id(quantizer)))

    distributed.divided([quantizer for _, quantizer in quantizers], calibrate)


def _calibrate_on(name: str, quantizer: Quantizer, inputs: Sequence[Tensor]) -> None:
    """Calibrate a quantizer on what reached it, pooled, and enable it."""
    if not inputs:
        raise IasvitError(f"layer {name!r} was not reached by the calibration images; is it part of the forward?")
    channel_dim = getattr(quantizer, "channel_dim", None)
    if len(inputs) > 1:  # images may differ in size, so only channels, which are last, are kept apart
        inputs = [torch.cat([x.reshape(-1) if channel_dim is None else x.flatten(0, -2) for x in inputs])]
    try:
        quantizer.calibrate(inputs[0])
    except IasvitError as error:
        raise IasvitError(f"layer {name!r}: {error}") from error
    quantizer.enabled = True


@torch.no_grad()
def calibrate_in_sequence(quantizers: Sequence[tuple[str, Quantizer]], run: Callable[[], T]) -> T:
    """Calibrate activation quantizers in the order in which `run()` reaches them, each on what those before it left.

    One forward pass does it. Where a quantizer is reached several times, by batches of several sizes or by a head that
    several feature maps share, all that reaches it counts, and that takes a pass for each quantizer.

    Args:
        quantizers: (path in the model, quantizer); enabled afterwards.
        run: runs the calibration batches through whatever holds the quantizers.

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

    with _watching(names, calibrate):
        outputs = run()
    if all(reached[quantizer] == 1 for quantizer in names):
        return outputs
    for quantizer in names:
        quantizer.enabled = False
    for quantizer in [*reached, *(q for q in names if q not in reached)]:
        _calibrate_on(names[quantizer], quantizer, _inputs_of(quantizer, run))
    return run()


def _inputs_of(quantizer: Quantizer, run: Callable[[], object]) -> list[Tensor]:
    """What reaches a quantizer while `run()` runs, call by call."""
    inputs: list[Tensor] = []
    with _watching([quantizer], lambda _, args: inputs.append(args[0])):
        run()
    return inputs


@torch.no_grad()
def calibrate_in_stream(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Calibrate all activation quantizers of a model by one forward pass, each on what those before it left.

    Weights are as they are: in full precision where their quantizers are off, else quantized. One quantizer waits for
    the other, so that of several processes the first does it.

    Args:
        model: quantizable; segment by segment it runs on the batches.
        batches: images, B×3×H×W each; of batches of one size there should be one.

    Raises:
        IasvitError: as `calibrate_in_sequence`.
    """

    def calibrate() -> None:
        activations: Sequence[Activation] = batches
        for segment in segments(model):
            quantizers = segment.quantizers(weights=False)
            activations = calibrate_in_sequence(quantizers, partial(_run_all, segment.run, activations))

    distributed.done_by_first([quantizer for _, quantizer in quantizers_of(model, weights=False)], calibrate)


def _run_all(run: Callable[[Activation], Activation], batches: Sequence[Activation]) -> list[Activation]:
    return [run(batch) for batch in batches]


@contextmanager
def _watching(modules: Iterable[nn.Module], hook: Callable[[Any, tuple[Tensor, ...]], None]) -> Iterator[None]:
    """Call hook(module, args) before each forward of these modules for a while."""
    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
