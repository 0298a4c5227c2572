"""Activations that are tuples, and of different sizes: stores, what they share, and passes over them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from iasvit.calibration import (
    ActivationStore,
    Collector,
    TupleStore,
    calibration_store,
    first_images,
    tensors,
)
from iasvit.calibration.fisher import captures
from iasvit.calibration.store import _FileBatch
from iasvit.errors import IasvitError
from iasvit.models import Segment
from iasvit.nn import QuantConv2d, QuantLinear
from iasvit.progress import Progress
from iasvit.quantizers import UniformQuantizer
from iasvit.reconstruction import SegmentJob, optimize, stream

SHAPES = [(2, 4, 6), (1, 4, 4), (3, 4, 6), (1, 2, 6)]  # batches of maps (B, H, W), of channels to be added


def maps(channels: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, channels, generator=generator) for shape in SHAPES]


def ragged(budget: int | None = None, folder: Path | None = None) -> ActivationStore:
    store = ActivationStore(budget, folder)
    for batch in maps():
        store.append(batch)
    return store


def split(x: Tensor) -> tuple[Tensor, ...]:
    """A segment that computes and keeps what it read."""
    return x * 2, x


def go_on(xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A segment that computes and hands on."""
    return (xs[0] + 1, *xs[1:])


# ---- store -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 600, 0])
def test_spilled_or_not_ragged_tuples_come_back_to_the_bit(budget: int | None, tmp_path: Path) -> None:
    store = ragged(budget, tmp_path).map(split, 2, "split").map(go_on, 2, "go on")
    assert isinstance(store, TupleStore)
    assert store.spilled == (budget is not None)
    images = [x[None] for batch in maps() for x in batch]
    assert len(store) == len(images)
    for index, x in enumerate(images):
        first, second = store.gather([index])
        assert torch.equal(first, 2 * x + 1)
        assert torch.equal(second, x)
    seen = [(first, second) for first, second in store.batches(2)]
    assert [len(first) for first, _ in seen] == [2, 1, 2, 1, 1]
    for (first, second), x in zip(seen, ragged().batches(2), strict=True):
        assert torch.equal(first, 2 * x + 1)
        assert torch.equal(second, x)
    assert sum(len(first) for first, _ in store.batches(2, limit=4)) == 4


class _OnAnotherDevice(Tensor):
    """As a CPU tensor beside those of a GPU: nothing can be joined with it until `to` has moved it."""

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.stack, torch.cat):
            raise RuntimeError("Expected all tensors to be on the same device")
        if func is Tensor.to:
            return args[0].as_subclass(Tensor)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_images_held_and_images_spilled_share_a_batch_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are read on the CPU, also where the other images are on a GPU."""
    read = _FileBatch.__getitem__
    monkeypatch.setattr(_FileBatch, "__getitem__", lambda self, row: read(self, row).as_subclass(_OnAnotherDevice))
    x = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
    store = ActivationStore(3 * 4 * 3 * 4, tmp_path)
    for batch in x.split(1):
        store.append(batch)
    assert store.spilled
    assert store.held
    assert not store.resident
    assert torch.equal(store.gather([4, 0, 5, 1]), x[[4, 0, 5, 1]])
    assert torch.equal(torch.cat(list(store.batches(4))), x)
    pair = store.map(split, 4, "split")
    assert torch.equal(torch.cat([first for first, _ in pair.batches(5)]), 2 * x)
    assert torch.equal(torch.cat([second for _, second in pair.batches(5)]), x)


def test_what_is_handed_on_is_shared_and_not_copied() -> None:
    source = ragged()
    first = source.map(split, 2, "split")
    second = first.map(go_on, 3, "go on")
    assert first.parts[1] is source
    assert second.parts[1] is source
    assert second.parts[0] is not first.parts[0]
    assert second.leading is second.parts[0]
    assert source.leading is source


def test_all_parts_together_keep_to_the_budget(tmp_path: Path) -> None:
    size = sum(batch.numel() for batch in maps()) * 4
    source = ragged(2 * size - 1, tmp_path)
    store = source.map(split, 1, "split").map(go_on, 1, "go on")
    assert not source.spilled
    assert store.memory_budget == 2 * size - 1
    assert sum(part.held for part in store.parts) <= store.memory_budget
    assert store.parts[0].spilled  # what is new finds the budget taken by what is kept
    roomy = ragged(2 * size, tmp_path).map(split, 1, "split")
    assert not roomy.spilled


def test_a_tuple_store_of_equal_sizes_is_resident() -> None:
    x = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
    store = ActivationStore()
    for batch in x.split(4):
        store.append(batch)
    pair = store.map(split, 4, "split")
    assert pair.resident
    assert pair.device == x.device
    assert torch.equal(pair.gather(torch.tensor([5, 1]))[0], 2 * x[[5, 1]])
    assert not ragged().map(split, 2, "split").resident


def test_a_map_of_tuples_back_to_a_tensor_is_a_plain_store() -> None:
    store = ragged().map(split, 2, "split").map(lambda xs: xs[0] - xs[1], 2, "difference")
    assert isinstance(store, ActivationStore)
    assert torch.equal(store.gather([2]), ragged().gather([2]))


@pytest.mark.parametrize("place", [0, 1])
def test_bad_values_in_any_new_part_are_found(place: int) -> None:
    def bad(x: Tensor) -> tuple[Tensor, Tensor]:
        result = [x + 1, x + 2]
        result[place] = result[place] * math.nan
        return result[0], result[1]

    with pytest.raises(IasvitError, match="layer 'bad' outputs NaN or Inf"):
        ragged().map(bad, 2, "bad")


def test_a_collector_of_nothing_is_an_empty_store() -> None:
    assert len(Collector(ragged()).store()) == 0


# ---- images ----------------------------------------------------------------------------------------------------------


def test_first_images_of_different_sizes_are_filled_up_with_zeros() -> None:
    images = [torch.full((1, 3, 4, 6), 1.0), torch.full((2, 3, 5, 2), 2.0), torch.full((1, 3, 9, 9), 3.0)]
    x = first_images(images, 3, torch.device("cpu"))
    assert tuple(x.shape) == (3, 3, 5, 6)
    assert torch.equal(x[0, :, :4, :], torch.full((3, 4, 6), 1.0))
    assert torch.equal(x[1:, :, :5, :2], torch.full((2, 3, 5, 2), 2.0))
    assert x.sum() == images[0].sum() + images[1].sum()
    same = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first_images(same.split(2), 3, torch.device("cpu")), same[:3])


# ---- reconstruction --------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Three layers of which the last reads the outputs of the first and of the second, on maps of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = quantized(nn.Linear(3, 5)), quantized(nn.Linear(5, 5))
        self.last = quantized(nn.Conv2d(10, 4, 3, padding=1))
        tiny_models.stir(self)

    def segments(self) -> list[Segment]:
        def first(images: Tensor) -> tuple[Tensor, ...]:
            return (self.first(images.permute(0, 2, 3, 1)),)

        def second(xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (self.second(xs[0]), *xs)

        def last(xs: tuple[Tensor, ...]) -> Tensor:
            return self.last(torch.cat(xs, dim=-1).permute(0, 3, 1, 2)).mean(dim=(2, 3))

        runs = {"first": first, "second": second, "last": last}
        return [Segment(name, run, ((name, getattr(self, name)),), name != "last") for name, run in runs.items()]


def quantized(layer: nn.Module) -> nn.Module:
    kind = {nn.Linear: QuantLinear, nn.Conv2d: QuantConv2d}[type(layer)]
    return kind.from_float(layer, UniformQuantizer(4, channel_dim=0), UniformQuantizer(4)).requires_grad_(False)


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> Chain:
    monkeypatch.setattr("iasvit.reconstruction.segments", lambda model: model.segments())
    monkeypatch.setattr("iasvit.calibration.fisher.adapter_for", lambda model: tiny_models.ChainAdapter())
    return tiny_models.switch(Chain(), False)


IMAGES = [
    torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate([(4, 6), (5, 3)])
]


def test_a_segment_that_is_not_reconstructed_has_no_targets_and_is_not_run_for_them(chain: Chain) -> None:
    jobs: list[SegmentJob] = []
    stream(chain, chain, IMAGES, jobs.append, Progress(), batch_size=1)
    assert [job.segment.name for job in jobs] == ["first", "second", "last"]
    assert [len(job.targets) for job in jobs] == [2, 2, 0]
    assert [len(tensors(job.inputs_q.gather([0]))) for job in jobs] == [1, 1, 2]
    parameters = [chain.last.weight]
    before = chain.last.weight.clone()
    job = jobs[-1]
    options = {"iterations": 3, "batch_size": 1, "lr": 0.1, "seed": 0}
    optimize(job.segment.run, parameters, job.inputs_q, job.targets, **options)
    assert torch.equal(chain.last.weight, before)


def test_of_a_tuple_the_first_tensor_is_reconstructed(chain: Chain) -> None:
    jobs: list[SegmentJob] = []
    stream(chain, chain, IMAGES, jobs.append, Progress(), batch_size=1)
    job = jobs[1]
    with torch.no_grad():
        chain.second.weight.mul_(1.5)

    def error() -> float:
        total = 0.0
        for image in (0, 1):
            (x,) = job.inputs_fp.gather([image])
            with torch.no_grad():
                total += float((chain.second(x) - job.targets.leading.gather([image])).square().sum())
        return total

    before = error()
    options = {"iterations": 300, "batch_size": 1, "lr": 1e-2, "seed": 0}
    optimize(job.segment.run, [chain.second.weight], job.inputs_fp, job.targets, **options)
    assert error() < 1e-2 * before


# ---- Fisher ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_fisher", [False, True])
def test_captures_of_ragged_images_are_the_rows_of_each(chain: Chain, with_fisher: bool) -> None:
    def capture(images: list[Tensor]) -> dict[str, list[Tensor]]:
        store = calibration_store(images, torch.device("cpu"))
        labels = torch.Generator().manual_seed(3) if with_fisher else None
        found = [c for segment in captures(chain, store, labels) for c in segment]
        return {c.name: [*c.inputs, c.output, *([c.fisher] if with_fisher else [])] for c in found}

    together = capture(IMAGES)
    assert set(together) == {"first", "second", "last"}
    parts = [capture(IMAGES[:1]), capture(IMAGES[1:])]
    for name, found in together.items():
        assert [x.ndim for x in found] == [2] * len(found)
        for place, x in enumerate(found[:2]):
            alone = [part[name][place] for part in parts]
            if name == "last" and place == 0:
                alone = [nn.functional.unfold(a, 3, padding=1).mT.flatten(0, 1) for a in alone]
            elif name == "last":
                alone = [a.flatten(2).mT.flatten(0, 1) for a in alone]
            alone = [a.flatten(0, -2) for a in alone]
            assert x.shape[1] == alone[0].shape[1]
            assert torch.equal(x, torch.cat(alone)), name
    if with_fisher:
        # One label was drawn for each image in turn; the first image's is the one it gets alone.
        rows = 4 * 6
        for name in ("first", "second"):
            torch.testing.assert_close(together[name][2][:rows], parts[0][name][2].flatten(0, -2))
        assert together["first"][2].min() >= 0
        assert together["first"][2].max() > 0


def test_gradients_reach_what_was_handed_on(chain: Chain) -> None:
    """The Fisher of a layer that is read by the next and again by the last is that of the whole computation."""
    (image,) = IMAGES[:1]
    store = calibration_store([image], torch.device("cpu"))
    found = {c.name: c for segment in captures(chain, store, torch.Generator().manual_seed(1)) for c in segment}
    outputs: list[Tensor] = []
    hook = chain.first.register_forward_hook(lambda _m, _a, output: outputs.append(output))
    x = image.clone().requires_grad_(True)
    y: Tensor | tuple[Tensor, ...] = x
    for segment in chain.segments():
        y = segment.run(y)
    hook.remove()
    log_p = y.log_softmax(dim=1)[0]
    candidates = [torch.autograd.grad(log_p[k], outputs[0], retain_graph=True)[0].square() for k in range(4)]
    assert any(torch.allclose(found["first"].fisher, wanted, rtol=1e-4, atol=1e-8) for wanted in candidates)
