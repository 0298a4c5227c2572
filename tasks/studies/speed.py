"""Seconds and memory of quantization at full size: `python -m tasks.studies.speed --backbone deit_small_patch16_224`.

Full-size timm models and mmdet detectors with random weights on random images: how long a method takes does not depend
on the values. Each phase is timed to its end on the device. Rows go to a CSV file, with the machine and the versions.

    python -m tasks.studies.speed --detector mask_rcnn_swin_t --calib-size 1 --iterations 1 --batch-size 1
    python -m tasks.studies.speed --backbone deit_small_patch16_224 --device cuda --autocast --compile --profile
"""

from __future__ import annotations

import contextlib
import csv
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from torch import Tensor, nn

import iasvit
from iasvit.benchmark.provenance import PeakMemory
from iasvit.cli import main
from iasvit.errors import IasvitError
from iasvit.methods import method_options
from iasvit.models import segments
from iasvit.progress import Progress
from iasvit.reconstruction import SegmentJob
from iasvit.sos import IASViT

app = typer.Typer(add_completion=False)
PHASES = {  # of Progress → what a row calls it
    "capture": "capture",
    "calibration": "calibration",
    "reparameterization": "reparameterization",
    "reconstruction, stage 1": "stage_1",
    "reconstruction, stage 2": "stage_2",
    "reconstruction, stage 3": "stage_3",
    "reconstruction": "passes",  # of activations from block to block, in full precision and quantized
}

DETECTOR_IMAGE = (3, 800, 1216)  # mmdet's test images of COCO, padded, are about so large


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        model: full size, random weights, eval(), on its device.
        images: calibration images as `iasvit.quantize` takes them.
        batch: images (B, 3, H, W) whose evaluation is timed.
        forward: evaluation of a model, quantized or not, on such a batch.
    """

    model: nn.Module
    images: Tensor | Sequence[Tensor]
    batch: Tensor
    forward: Callable[[nn.Module, Tensor], Any]


def classifier(name: str, calib_size: int, batch_size: int, device: torch.device) -> Subject:
    """A timm model on images of its own size."""
    model = timm.create_model(name).eval().to(device)
    images = torch.randn(calib_size, *model.pretrained_cfg["input_size"], device=device)
    return Subject(model, images, images[:batch_size], lambda network, batch: network(batch))


def detector_of_coco(name: str, calib_size: int, device: torch.device) -> Subject:
    """A detector of the COCO task, from its images to boxes and masks; one image a batch, as it is evaluated."""
    from tasks.detection.models import PublishedDetectors, predict_images

    model = PublishedDetectors(pretrained=False).load(name).to(device)
    images = [torch.randn(1, *DETECTOR_IMAGE, device=device) for _ in range(calib_size)]
    return Subject(model, images, images[0], predict_images)


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


@torch.inference_mode()
def images_per_second(model: nn.Module, subject: Subject, repeats: int) -> float:
    """Evaluations of one batch, after one to warm up."""
    subject.forward(model, subject.batch)
    synchronize(subject.batch.device)
    start = time.perf_counter()
    for _ in range(repeats):
        subject.forward(model, subject.batch)
    synchronize(subject.batch.device)
    return repeats * len(subject.batch) / (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    """Wait for what was launched on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@app.command()
def benchmark(
    backbone: Annotated[list[str] | None, typer.Option(help="Repeatable. timm's name of a model.")] = None,
    detector: Annotated[
        list[str] | None, typer.Option(help="Repeatable. A detector, such as mask_rcnn_swin_s.")
    ] = None,
    method: Annotated[list[str], typer.Option(help="Repeatable.")] = ["ias_vit"],  # noqa: B006
    bits: str = "W3A3",
    calib_size: int = 1024,
    iterations: int = 1000,
    batch_size: int = 64,
    device: str = "cpu",
    tf32: Annotated[bool, typer.Option(help="Let matrix products round their inputs to TF32.")] = False,
    autocast: Annotated[bool, typer.Option(help="Multiply in bfloat16 while learning.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Learn with compiled steps.")] = False,
    profile: Annotated[
        bool, typer.Option(help="Also profile stage 3 of a block, into profile.csv beside --out.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Number of forward passes to time.")] = 10,
    out: Annotated[Path, typer.Option(help="CSV file to append to.")] = Path("results/benchmarks/quantize.csv"),
) -> None:
    """Time calibration, reconstruction and evaluation of full-size models."""
    on = torch.device(device)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    if not backbone and not detector:
        raise IasvitError("nothing to measure; name a timm model by --backbone, or a detector by --detector")
    for name in [*(backbone or []), *(detector or [])]:
        torch.manual_seed(0)
        if name in (backbone or []):
            subject = classifier(name, calib_size, batch_size, on)
        else:
            subject = detector_of_coco(name, calib_size, on)
        full = images_per_second(subject.model, subject, repeats)
        for method_name in method:
            known = set(method_options(method_name))
            options = {"iterations": iterations, "batch_size": batch_size, "autocast": autocast, "compile": compiled}
            options = {key: value for key, value in options.items() if key in known}
            memory = PeakMemory(on)
            progress = Progress(f"{name} {method_name}", quiet=False)
            start = time.perf_counter()
            quantized = iasvit.quantize(subject.model, subject.images, bits, method_name, progress=progress, **options)
            synchronize(on)
            seconds = time.perf_counter() - start
            peak = memory.mib()
            row = {
                "model": name,
                "image": "x".join(str(side) for side in subject.batch.shape[1:]),
                "method": method_name,
                "bits": bits,
                "calib_size": calib_size,
                **{key: options.get(key, "") for key in ("iterations", "batch_size", "autocast", "compile")},
                "tf32": tf32,
                **{f"{name}_seconds": round(progress.seconds.get(phase, 0.0), 2) for phase, name in PHASES.items()},
                "total_seconds": round(seconds, 2),
                "peak_memory_MiB": round(peak, 1),
                "fp32_images_per_second": round(full, 3),
                "quantized_images_per_second": round(images_per_second(quantized, subject, repeats), 3),
                "device": device_name(on),
                "versions": f"python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}",
            }
            append(out, row)
            print({key: value for key, value in row.items() if value != ""}, flush=True)
            if profile and "iterations" in options:
                del quantized
                for kernel in profile_step(subject, bits, options):
                    append(out.with_name("profile.csv"), {"model": name, **options, **kernel, "device": row["device"]})


@dataclass
class _Profiled(IASViT):
    """I&S-ViT that learns one block only, in stage 3, and counts what its kernels take there.

    Attributes:
        block: its number among the segments.
        kernels: rows of `profile_step`.
    """

    block: int = 0
    kernels: list[dict[str, Any]] = field(default_factory=list)

    def optimize_stage(self, job: SegmentJob, stage: int, iterations: int) -> None:
        """See `IASViT`."""
        if stage != 3 or job.index != self.block:
            return
        super().optimize_stage(job, stage, iterations)  # whatever is made at first is made now
        activities = [torch.profiler.ProfilerActivity.CPU]
        on_gpu = job.inputs_q.device.type == "cuda"
        if on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profiler:
            super().optimize_stage(job, stage, iterations)
            synchronize(job.inputs_q.device)
        for event in profiler.key_averages():
            micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            if micros > 0:
                each = {"calls": round(event.count / iterations, 2), "microseconds": round(micros / iterations, 2)}
                self.kernels.append({"block": job.segment.name, "kernel": " ".join(event.key.split())[:120], **each})
        self.kernels.sort(key=lambda row: -row["microseconds"])
        total = {name: round(sum(row[name] for row in self.kernels), 2) for name in ("calls", "microseconds")}
        self.kernels[20:] = [{"block": job.segment.name, "kernel": "all, these and others", **total}]


def profile_step(subject: Subject, bits: str, options: dict[str, Any], steps: int = 50) -> list[dict[str, Any]]:
    """What one step of reconstruction spends its time on: the kernels of a middle block's stage 3, by time.

    Returns:
        Rows of block, kernel (of an accelerator; else torch's operators), calls a step, microseconds a step.
    """
    block = len(segments(subject.model)) // 2
    count = 2 * options["batch_size"]
    method = _Profiled(**{**options, "iterations": steps}, block=block)
    iasvit.quantize(subject.model, subject.images[:count], bits, method)
    return method.kernels


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
