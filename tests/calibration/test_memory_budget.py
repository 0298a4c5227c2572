"""A memory budget: equal results to the bit, a peak below it, and a minimum that is said."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

import iasvit
from iasvit.benchmark.harness import Cell, make_jobs
from iasvit.calibration import budget
from iasvit.calibration.budget import PeakBytes
from iasvit.errors import IasvitError
from iasvit.methods import get_method
from iasvit.options import bytes_of, size_text

OPTIONS: dict[str, dict[str, Any]] = {
    "ias_vit": {"iterations": 2, "batch_size": 4, "lr": 1e-3, "init_size": 10},
    "repq_vit": {},
    "minmax": {},
    "ptq4vit": {"candidates": 6, "rounds": 2},
    "unison": {"iterations": 2, "batch_size": 4, "init_size": 10, "joint_iterations": 2, "joint_batch_size": 6},
    "fima_q": {"iterations": 2, "batch_size": 4, "init_size": 10, "initialisation": "observed"},
}


def least_of(model: nn.Module, images: Tensor | list[Tensor], method: str, **options: Any) -> str:
    with pytest.raises(IasvitError) as caught:
        iasvit.quantize(model, images, "W4A4", method, memory_budget="1 KiB", **options)
    message = str(caught.value)
    size = "×".join(map(str, images[0].shape[-2:]))
    pattern = (
        rf"memory_budget is 1024 B, but {method.partition('[')[0]} needs at least (\d+) MiB for this model on images "
        rf"of {size}; give \1MiB or more"
    )
    match = re.fullmatch(pattern, message)
    assert match, message
    return f"{match[1]}MiB"


@pytest.mark.parametrize(
    ("method", "family"), [*((name, "vit" if name == "fima_q" else "swin") for name in OPTIONS), ("ptq4vit", "vit")]
)
def test_results_are_equal_to_the_bit_whatever_the_budget(method: str, family: str) -> None:
    model, images, options = tiny_models.MODELS[family](), tiny_models.images(12), OPTIONS[method]
    free = iasvit.quantize(model, images, "W4A4", method, **options)
    least = least_of(model, images, method, **options)
    # At the minimum everything goes to files; with 2 MiB more some of it.
    for given in (least, bytes_of(least) + 2**21):
        bounded = iasvit.quantize(model, iter(images.split(5)), "W4A4", method, memory_budget=given, **options)
        assert tiny_models.same_bits(free.state_dict(), bounded.state_dict())
        assert bounded.quantization.options == free.quantization.options


DETECTORS = {"ias_vit": {"batch_size": 1}, "unison": {"batch_size": 1, "joint_batch_size": None, "init_size": 2}}


@pytest.mark.parametrize("method", ["ias_vit", "ptq4vit", "unison"])
def test_a_detector_on_images_of_several_sizes_too(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_detectors = pytest.importorskip("tiny_detectors")
    monkeypatch.setattr("iasvit.calibration.store.PASS_PIXELS", 2 * 64 * 64)  # so that images come in several passes
    model, images = tiny_detectors.detector(), tiny_detectors.images((64, 64), (64, 64), (64, 64), (64, 96))
    options = {**OPTIONS[method], **DETECTORS.get(method, {})}
    free = iasvit.quantize(model, images, "W4A4", method, **options)
    with pytest.raises(IasvitError, match=r"needs at least \d+ MiB") as caught:
        iasvit.quantize(model, images, "W4A4", method, memory_budget=1, **options)
    least = re.search(r"give (\d+MiB)", str(caught.value))[1]
    bounded = iasvit.quantize(model, images, "W4A4", method, memory_budget=least, **options)
    assert tiny_models.same_bits(free.state_dict(), bounded.state_dict())


PEAK = """
import gc, sys, torch, iasvit
from timm.models.vision_transformer import VisionTransformer
from iasvit.benchmark.provenance import PeakMemory
torch.manual_seed(0)
model = VisionTransformer(img_size=64, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=10).eval()
images = torch.randn(192, 3, 64, 64)
option = {} if sys.argv[1] == "none" else {"memory_budget": sys.argv[1]}
memory = PeakMemory(torch.device("cpu"))
before = int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 2**10
quantized = iasvit.quantize(model, images, "W4A4", "ptq4vit", candidates=2, rounds=1, init_size=192, **option)
print(memory.mib() - before, quantized.blocks[0].attn.matmul_av.left_quantizer.scale.item())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are reset through Linux's /proc")
def test_the_process_stays_within_the_budget() -> None:
    """Captured operands of 192 images take more than the budget where they are in memory."""
    peaks = {}
    for given in ("none", "600MiB"):
        done = subprocess.run([sys.executable, "-c", PEAK, given], capture_output=True, text=True, check=True)
        peaks[given] = float(done.stdout.split()[0])
    assert peaks["600MiB"] < 600 < peaks["none"]


def test_a_stage_of_all_blocks_at_once_counts() -> None:
    model, images, options = tiny_models.vit(), tiny_models.images(64), OPTIONS["unison"]
    blocks, joint = (
        bytes_of(least_of(model, images, "unison", **{**options, "joint_batch_size": 64, "joint_iterations": n}))
        for n in (0, 2)
    )
    assert blocks < joint


def test_a_minimum_grows_with_what_is_alive_at_once() -> None:
    model, images = tiny_models.vit(), tiny_models.images(64)
    small, large = (bytes_of(least_of(model, images, "ias_vit", batch_size=n, init_size=1)) for n in (1, 64))
    assert small < large


def test_peak_bytes_are_those_of_tensors_alive_together() -> None:
    given = torch.ones(1000)
    with PeakBytes() as memory:
        x = given + 1  # 4000 bytes
        y = x.view(10, 100).T  # a view is no memory
        del x, y
        z = given[:500] * 2  # 2000
        w = z + 1  # and 2000
        del z, w
    assert memory.peak == 4000


@pytest.mark.parametrize(
    ("size", "count"), [("8GiB", 2**33), ("1.5 gb", 1.5e9), ("500MiB", 500 * 2**20), (7, 7), ("7", 7), (" 1KiB ", 1024)]
)
def test_sizes(size: int | str, count: int) -> None:
    assert bytes_of(size) == count
    assert bytes_of(size_text(2**33)) == 2**33


@pytest.mark.parametrize("size", ["", "much", "0", 0, -1, "8 PiB", 2.5, True, "1e9", "9" * 40])
def test_what_is_no_size_is_refused(size: object) -> None:
    with pytest.raises(IasvitError, match="but a size such as 8GiB or 500MiB is expected"):
        get_method("ptq4vit", memory_budget=size)


def test_a_rows_identity_does_not_depend_on_the_budget() -> None:
    from harness_fakes import FakeTask

    def key(*options: tuple[str, Any]) -> object:
        return make_jobs(FakeTask(), [Cell("a", "ias_vit", "W4A4", 0, 4, (("iterations", 3), *options))])[0].key

    assert key(("memory_budget", "8GiB")) == key()


def test_the_shares_of_stores_are_what_the_minimum_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "BASE", 0)
    images = budget.calibration_store(torch.zeros(4, 3, 8, 8), torch.device("cpu"))
    share = budget.share_of(10 * 2**20, "it", lambda: nn.Linear(1, 1), images, lambda model, few: len(few))
    assert share == images.memory_budget == (10 * 2**20 - 2**20) // budget.STORES
    assert budget.share_of(None, "it", nn.Module, images, lambda model, few: 0) is None
