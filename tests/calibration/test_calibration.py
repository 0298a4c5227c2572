"""The activation store, and quantizers set from what passes."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from iasvit.calibration import (
    ActivationStore,
    calibrate_inputs,
    calibration_store,
    default_memory_budget,
    enabled,
)
from iasvit.errors import IasvitError
from iasvit.models import segments
from iasvit.quantizers import Quantizer, SULQuantizer, UniformQuantizer

BATCH = 4 * 5 * 3 * 4  # bytes of 4 images of 5×3 float32


def activations(count: int = 12) -> Tensor:
    return torch.randn(count, 5, 3, generator=torch.Generator().manual_seed(0))


def filled(x: Tensor, size: int = 4, **options: object) -> ActivationStore:
    store = ActivationStore(**options)
    for batch in x.split(size):
        store.append(batch)
    return store


# ---- store ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 0, BATCH, 2 * BATCH + 1])
def test_spilled_or_not_a_store_gives_back_what_it_took(budget: int | None, tmp_path: Path) -> None:
    x = activations()
    store = filled(x, memory_budget=budget, folder=tmp_path)
    assert store.spilled == (budget is not None)
    assert len(store) == 12
    assert store.device == x.device
    assert len(list(tmp_path.rglob("*.bin"))) == {None: 0, 0: 3, BATCH: 2, 2 * BATCH + 1: 1}[budget]
    for indices in ([0], [11, 0, 5, 5], range(12), torch.tensor([3, 1])):
        assert torch.equal(store.gather(indices), x[[int(i) for i in indices]])
    assert torch.equal(torch.cat(list(store.batches(5))), x)
    assert store.gather([0]).dtype == x.dtype


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 7), st.one_of(st.none(), st.integers(0, 20)))
def test_batches_are_all_images_in_order_in_pieces_of_at_most_the_size(
    counts: list[int], size: int, limit: int | None
) -> None:
    x = torch.arange(sum(counts) * 2.0).view(-1, 2)
    store = ActivationStore()
    for batch in x.split(counts):
        store.append(batch)
    pieces = list(store.batches(size, limit))
    expected = x if limit is None else x[:limit]
    assert torch.equal(torch.cat([*pieces, x[:0]]), expected)
    assert all(len(piece) == size for piece in pieces[:-1])


@pytest.mark.parametrize("budget", [None, 0])
def test_images_of_different_sizes_stay_apart(budget: int | None, tmp_path: Path) -> None:
    store = ActivationStore(budget, tmp_path)
    shapes = [(2, 4, 3), (1, 6, 3), (3, 6, 3), (1, 4, 3)]
    batches = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    for batch in batches:
        store.append(batch)
    assert [tuple(piece.shape) for piece in store.batches(3)] == [(2, 4, 3), (3, 6, 3), (1, 6, 3), (1, 4, 3)]
    assert torch.equal(store.gather([4, 2]), torch.stack([batches[2][1], batches[1][0]]))
    assert torch.equal(store.gather([6]), batches[3])
    with pytest.raises(IasvitError, match="different sizes cannot share a batch; use a batch size of 1"):
        store.gather([0, 2])
    doubled = store.map(lambda x: 2 * x, 3, "layer")
    assert torch.equal(doubled.gather([4, 2]), 2 * store.gather([4, 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_spilling_keeps_dtype_and_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    x = (100 * activations()).to(dtype)
    store = filled(x, memory_budget=0, folder=tmp_path)
    assert torch.equal(store.gather(range(12)), x)


def test_spilled_files_vanish_with_the_store(tmp_path: Path) -> None:
    store = filled(activations(), memory_budget=0, folder=tmp_path)
    assert os.listdir(tmp_path)
    del store
    assert not os.listdir(tmp_path)


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process() -> None:
    # A limit on the size of files stands for the full disk; writing to a map of a file that did not get its space
    # would end the process by a signal.
    code = """
        import resource, torch
        from iasvit.calibration import ActivationStore
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            ActivationStore(memory_budget=0).append(torch.ones(1000, 1000))
        except OSError as error:
            print("errno", error.errno)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["errno", str(errno.EFBIG)], done.stderr


def test_a_store_does_not_keep_the_graph() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    store = ActivationStore()
    store.append(2 * x)
    assert not store.gather([0]).requires_grad
    assert not store.map(lambda y: y * x.sum(), 1, "layer").gather([0]).requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_map_names_the_layer_that_puts_out_bad_values(bad: float) -> None:
    store = filled(activations())
    calls: list[int] = []

    def run(x: Tensor) -> Tensor:
        calls.append(len(x))
        return torch.where(torch.tensor(len(calls) == 2), x.new_tensor(bad), x)

    with pytest.raises(IasvitError, match=r"layer 'blocks\.3' outputs NaN or Inf"):
        store.map(run, 5, "blocks.3")
    assert calls == [5, 5]


def test_the_default_budget_is_part_of_the_memory() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**20 < default_memory_budget() <= total // 8


def test_the_budget_can_be_set_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IASVIT_STORE_MIB", "3")
    assert default_memory_budget() == ActivationStore().memory_budget == 3 * 2**20
    monkeypatch.setenv("IASVIT_STORE_MIB", "3.5 GB")
    with pytest.raises(IasvitError, match=r"^IASVIT_STORE_MIB is '3.5 GB', but must be a whole number of MiB$"):
        default_memory_budget()


# ---- calibration images --------------------------------------------------------------------------------------------


def test_a_tensor_and_batches_of_it_are_the_same() -> None:
    x = tiny_models.images(70, size=8)

    def stream() -> Iterator[Tensor]:
        yield from x.split(9)

    for calibration in (x, list(x.split(32)), stream(), x.double().split(7)):
        store = calibration_store(calibration, torch.device("cpu"))
        assert store.gather(range(70)).dtype == torch.float32
        assert torch.equal(store.gather(range(70)), x)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (torch.empty(0, 3, 8, 8), "holds no image"),
        ([], "holds no image"),
        (iter(()), "holds no image"),
        (torch.rand(3, 8, 8), "not made of float tensors"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "not made of float tensors"),
        ([(torch.rand(1, 3, 8, 8), torch.zeros(1))], "not made of float tensors"),
        (["cat.png"], "not made of float tensors"),
        (None, "calibration is a NoneType"),
        (7, "calibration is a int"),
        (torch.rand(2, 3, 8, 8) / 0, "NaN or Inf"),
        ([torch.rand(1, 3, 8, 8), torch.full((1, 3, 8, 8), math.nan)], "NaN or Inf"),
    ],
)
def test_bad_calibration_images_are_refused(calibration: object, message: str) -> None:
    with pytest.raises(IasvitError, match=message):
        calibration_store(calibration, torch.device("cpu"))


# ---- quantizers from what passes -----------------------------------------------------------------------------------


class Twice(nn.Module):
    """Uses its first quantizer twice a pass, and its second on what the first outputs."""

    def __init__(self, channel_dim: int | None = None) -> None:
        super().__init__()
        self.first = UniformQuantizer(3, channel_dim)
        self.second = UniformQuantizer(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) + self.first(10 * x))

    def named_quantizers(self) -> list[tuple[str, Quantizer]]:
        return [("first", self.first), ("second", self.second)]


@pytest.mark.parametrize("channel_dim", [None, -1])
def test_all_that_reaches_a_quantizer_is_pooled_and_nothing_is_quantized_meanwhile(channel_dim: int | None) -> None:
    module, x = Twice(channel_dim), activations()

    def run() -> None:
        for batch in x.split(5):
            module(batch)

    calibrate_inputs(module.named_quantizers(), run)
    expected = UniformQuantizer(3, channel_dim)
    expected.calibrate(torch.cat([y for batch in x.split(5) for y in (batch, 10 * batch)]))
    assert torch.equal(module.first.scale, expected.scale)
    assert torch.equal(module.first.zero_point, expected.zero_point)
    expected = UniformQuantizer(3)
    expected.calibrate(torch.cat([batch + 10 * batch for batch in x.split(5)]))
    assert torch.equal(module.second.scale, expected.scale)
    assert module.first.enabled
    assert module.second.enabled
    assert not module.first._forward_pre_hooks


def test_images_of_different_sizes_are_pooled() -> None:
    module = Twice(channel_dim=-1)
    small, large = torch.randn(1, 4, 3), torch.randn(1, 9, 3)
    calibrate_inputs(module.named_quantizers(), lambda: (module(small), module(large)))
    expected = UniformQuantizer(3, channel_dim=-1)
    expected.calibrate(torch.cat([small, 10 * small, large, 10 * large], dim=1))
    assert torch.equal(module.first.scale, expected.scale)


def test_calibration_of_a_block_sees_full_precision(vit: nn.Module, images: Tensor) -> None:
    full, model = segments(vit), segments(tiny_models.quantizable(tiny_models.vit()))
    x = full[1].run(full[0].run(images)).detach()
    probabilities: list[Tensor] = []
    attention = model[2].modules[0][1].attn.matmul_av.left_quantizer
    model[2].modules[0][1].attn.matmul_av.left_quantizer.register_forward_pre_hook(
        lambda _, args: probabilities.append(args[0])
    )
    for layer in model[2].layers():
        layer.weight_quantizer.enabled = False
    calibrate_inputs(model[2].quantizers(weights=False), lambda: model[2].run(x))
    block = vit.blocks[0]
    q, k, _ = block.attn.qkv(block.norm1(x)).view(12, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(probabilities[0], (q @ k.transpose(-2, -1) / 4).softmax(-1))
    expected = SULQuantizer(3)
    expected.calibrate(probabilities[0])
    assert torch.equal(attention.scale, expected.scale)


def test_bad_values_and_layers_that_nothing_reaches_are_named() -> None:
    module = Twice()
    with pytest.raises(IasvitError, match="layer 'first': NaN or Inf was given"):
        calibrate_inputs(module.named_quantizers(), lambda: module(torch.tensor([1.0, math.nan])))
    with pytest.raises(IasvitError, match="layer 'second' was not reached"):
        calibrate_inputs(module.named_quantizers(), lambda: module.first(torch.rand(4)))
    assert not module.first._forward_pre_hooks


def test_switching_is_undone_also_after_an_error() -> None:
    module = Twice()
    module.second.enabled = False

    def use() -> None:
        with enabled(module.named_quantizers(), False):
            assert not module.first.enabled
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert (module.first.enabled, module.second.enabled) == (True, False)
