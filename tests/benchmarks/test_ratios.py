"""How many times as long as the plain version: both are timed in turn, in the same run, and the ratio is printed.

`tox -e bench -- -k ratios -s`; `IASVIT_BENCH_FULL=1` measures full-size DeiT-S and takes minutes, also on a GPU where
there is one; `IASVIT_BENCH_IMAGES` is how many images are evaluated at once. Without `--benchmark-enable` each body
runs once, at its smallest.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

import iasvit
from iasvit.quantizers import (
    AdaLogQuantizer,
    Log2Quantizer,
    Quantizer,
    SULQuantizer,
    TwinGELUQuantizer,
    UniformQuantizer,
    kernels,
)
from iasvit.reconstruction import SegmentJob
from iasvit.sos import IASViT
from tasks.mini import zoo

FULL = bool(os.environ.get("IASVIT_BENCH_FULL"))
DEVICE = torch.device("cuda" if FULL and torch.cuda.is_available() else "cpu")
LOG_DOMAIN: dict[str, Callable[[], Quantizer]] = {
    "log2": lambda: Log2Quantizer(3),
    "log-sqrt2": lambda: Log2Quantizer(3, steps_per_octave=2),
    "AdaLog": lambda: AdaLogQuantizer(3),
    "SULQ": lambda: SULQuantizer(3),
    "twin GELU": lambda: TwinGELUQuantizer(3),
}


def backbone() -> tuple[nn.Module, torch.Tensor]:
    """A float model and a batch: DeiT-S at 224 pixels with random weights, or the mini deit_t with its own."""
    model, size, count = (timm.create_model("deit_small_patch16_224"), 224, 8) if FULL else (zoo.load("deit_t"), 56, 16)
    count = int(os.environ.get("IASVIT_BENCH_IMAGES", count))
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return model.eval().to(DEVICE), images.to(DEVICE)


def seconds(work: Callable[[], Any]) -> float:
    """Seconds of one call, to its end on the device; of one thread on a CPU those that it had the core to itself."""
    clock = time.process_time if DEVICE.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def paired(benchmark: BenchmarkFixture, work: Callable[[], Any], plain: Callable[[], Any], rounds: int = 5) -> float:
    """Least seconds of `work` over those of `plain`, timed in turn; printed, and kept in the benchmark's JSON."""
    seconds(work), seconds(plain)
    pairs = [(seconds(work), seconds(plain)) for _ in range(rounds if benchmark.enabled else 1)]
    ratio = min(pair[0] for pair in pairs) / min(pair[1] for pair in pairs)
    benchmark.extra_info |= {"seconds_over_plain": round(ratio, 3), "device": str(DEVICE)}
    benchmark.pedantic(work, rounds=1)
    print(f"{benchmark.name}: {ratio:.2f} times the plain version's seconds, {1 / ratio:.2f} times its speed")
    return ratio


@pytest.mark.benchmark(group="evaluation against full precision")
@pytest.mark.parametrize("bits", ["W3A3", "W4A4", "W6A6", "W8A8"])
@pytest.mark.parametrize("method", ["minmax", "rtn", "base_ptq", "ptq4vit", "repq_vit", "gptq", "adalog", "ias_vit"])
def test_evaluation(benchmark: BenchmarkFixture, method: str, bits: str) -> None:
    if (method, bits) != ("ias_vit", "W3A3") and not benchmark.enabled:
        pytest.skip("one method shows that it works where nothing is measured")
    model, images = backbone()
    options = {"iterations": 0} if method == "ias_vit" else {}
    quantized = iasvit.quantize(model, images[:4], bits, method, **options)
    with torch.inference_mode():
        paired(benchmark, lambda: quantized(images), lambda: model(images))
        assert torch.isfinite(quantized(images)).all()


@pytest.mark.benchmark(group="look-up against the formula, 4×3×197×197")
@pytest.mark.parametrize("kind", LOG_DOMAIN)
def test_look_up(benchmark: BenchmarkFixture, kind: str) -> None:
    x = torch.randn(4, 3, 197, 197, generator=torch.Generator().manual_seed(0)).mul(3).softmax(dim=-1)
    quantizer = LOG_DOMAIN[kind]()
    quantizer.calibrate(x)
    with torch.inference_mode():
        paired(benchmark, lambda: quantizer(x), lambda: quantizer.decode(quantizer.encode(x)))
        assert torch.equal(quantizer(x), quantizer.decode(quantizer.encode(x)))


@pytest.mark.benchmark(group="one pass against torch's operators, forward and backward, 4×3×197×197")
@pytest.mark.parametrize("kind", ["uniform", "SULQ"])
def test_one_pass(benchmark: BenchmarkFixture, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 3, 197, 197, generator=torch.Generator().manual_seed(0)).mul(3).softmax(dim=-1)
    quantizer = UniformQuantizer(3) if kind == "uniform" else LOG_DOMAIN[kind]()
    quantizer.calibrate(x)
    gradient = torch.ones_like(x)

    def there_and_back() -> torch.Tensor:
        return torch.autograd.grad(quantizer(x), x, gradient)[0]

    def plain() -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "serve", lambda x: False)
            return there_and_back()

    x.requires_grad_(True)
    paired(benchmark, there_and_back, plain)
    assert torch.equal(there_and_back(), plain())


@dataclass
class _Timed(IASViT):
    """I&S-ViT that learns one block alone, in one stage, and times a step of it beside one without quantizers."""

    stage: int = 1
    block: int = 5
    timed: Callable[[Callable[[], Any], Callable[[], Any]], float] | None = None
    ratio: float = 0.0

    def optimize_stage(self, job: SegmentJob, stage: int, iterations: int) -> None:
        """See `IASViT`."""
        if (stage, job.index) != (self.stage, self.block):
            return
        layers, learn = (
            job.segment.quantizers(weights=False) + job.segment.quantizers(weights=True),
            super().optimize_stage,
        )
        enabled = [quantizer for _, quantizer in layers if quantizer.enabled]

        def plain() -> None:
            for quantizer in enabled:
                quantizer.enabled = False
            learn(job, stage, iterations)
            for quantizer in enabled:
                quantizer.enabled = True

        assert self.timed is not None
        self.ratio = self.timed(lambda: learn(job, stage, iterations), plain)


@pytest.mark.benchmark(group="a step of learning against the float block's")
@pytest.mark.parametrize("how", ["eager", "compile", "autocast and compile"])
@pytest.mark.parametrize("stage", [1, 3])
def test_step(benchmark: BenchmarkFixture, stage: int, how: str) -> None:
    if how != "eager" and not benchmark.enabled:
        pytest.skip("compiling takes longer than it is worth where nothing is measured")
    model, images = backbone()
    images = images.repeat(8, 1, 1, 1)[: 128 if DEVICE.type == "cuda" else 8]
    count = 100 if DEVICE.type == "cuda" else 10
    options = {"iterations": count if benchmark.enabled else 1, "batch_size": len(images) // 2}
    options |= {"compile": "compile" in how, "autocast": "autocast" in how}
    method = _Timed(**options, stage=stage, timed=lambda work, plain: paired(benchmark, work, plain, rounds=9))
    iasvit.quantize(model, images, "W3A3", method)
    assert method.ratio > 0
