"""Seconds and memory of quantization at full size: `python -m tasks.benchmark --backbone deit_small_patch16_224`.

Full-size timm models with random weights on random images: how long a method takes does not depend on the values. Each
phase is timed to its end on the device. Rows go to a CSV file, with the machine and the versions.
"""

from __future__ import annotations

import contextlib
import csv
import platform
import time
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from torch import nn

import iasvit
from iasvit.cli import main
from iasvit.methods import method_options
from iasvit.progress import Progress
from iasvit.provenance import PeakMemory

app = typer.Typer(add_completion=False)
PHASES = ("capture", "calibration", "reparameterization", "reconstruction")


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


@torch.inference_mode()
def images_per_second(model: nn.Module, images: torch.Tensor, repeats: int) -> float:
    """Forward passes of one batch: images (B, 3, H, W), after a warm-up pass."""
    model(images)
    synchronize(images.device)
    start = time.perf_counter()
    for _ in range(repeats):
        model(images)
    synchronize(images.device)
    return repeats * len(images) / (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    """Wait for what was launched on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@app.command()
def benchmark(
    backbone: Annotated[list[str], typer.Option(help="timm model, repeatable")],
    method: Annotated[list[str], typer.Option(help="repeatable")] = ["ias_vit"],  # noqa: B006
    bits: str = "W3A3",
    calib_size: int = 1024,
    iterations: int = 1000,
    batch_size: int = 64,
    device: str = "cpu",
    tf32: Annotated[bool, typer.Option(help="let matrix products round their inputs to TF32")] = False,
    repeats: Annotated[int, typer.Option(help="forward passes to time")] = 10,
    out: Annotated[Path, typer.Option(help="CSV file to append to")] = Path("results/benchmarks/quantize.csv"),
) -> None:
    """Time calibration, reconstruction and evaluation of full-size models."""
    where = torch.device(device)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    for name in backbone:
        torch.manual_seed(0)
        model = timm.create_model(name).eval().to(where)
        size = model.pretrained_cfg["input_size"]
        images = torch.randn(calib_size, *size, device=where)
        full = images_per_second(model, images[:batch_size], repeats)
        for method_name in method:
            known = set(method_options(method_name))
            options = {"iterations": iterations, "batch_size": batch_size}
            options = {key: value for key, value in options.items() if key in known}
            memory = PeakMemory(where)
            progress = Progress(f"{name} {method_name}", quiet=False)
            start = time.perf_counter()
            quantized = iasvit.quantize(model, images, bits, method_name, progress=progress, **options)
            synchronize(where)
            seconds = time.perf_counter() - start
            peak = memory.mib()
            row = {
                "backbone": name,
                "method": method_name,
                "bits": bits,
                "calib_size": calib_size,
                **{key: options.get(key, "") for key in ("iterations", "batch_size")},
                "tf32": tf32,
                **{f"{phase}_seconds": round(progress.seconds.get(phase, 0.0), 2) for phase in PHASES},
                "total_seconds": round(seconds, 2),
                "peak_memory_MiB": round(peak, 1),
                "fp32_images_per_second": round(full, 1),
                "quantized_images_per_second": round(images_per_second(quantized, images[:batch_size], repeats), 1),
                "device": device_name(where),
                "versions": f"python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}",
            }
            append(out, row)
            print({key: value for key, value in row.items() if value != ""}, flush=True)


def append(path: Path, row: dict[str, object]) -> None:
    """Add a row to a CSV file, with a header where it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file, contextlib.closing(file):
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main(app)
