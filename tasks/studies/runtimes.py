"""Speed of exported files beside what a user would take instead: `python -m tasks.studies.runtimes`.

Full-size timm models with random weights: how long a product takes does not depend on the values. All variants of a
model are loaded into one process and run in turn, on one thread; a figure is the ratio of CPU seconds to ONNX Runtime's
float32 in the same turn, median over turns. So a machine on which others work, too, gives the same ratios. Rows go to a
CSV file, with the CPU and those of its flags that integers depend on.

    python -m tasks.studies.runtimes --backbone deit_small_patch16_224 --batch 1 --batch 8
"""

from __future__ import annotations

import collections
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import typer
from torch import nn

import iasvit
from iasvit.benchmark.provenance import PeakMemory
from iasvit.cli import main, make_app
from iasvit.export import ExportedModel
from iasvit.export.floats import write_float
from tasks.studies.exported import append

app = make_app()
BACKBONES = ("deit_small_patch16_224", "vit_base_patch16_224", "swin_tiny_patch4_window7_224")
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
QUICK = {"base_ptq": {"candidates": 5}}  # a search changes scales, and no time
Run = Callable[[np.ndarray], Any]


def cpu() -> tuple[str, str]:
    """Name of the processor, and which of FLAGS it has; "unknown" where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown", "unknown"
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    return facts.get("model name", "unknown"), " ".join(flag for flag in FLAGS if flag in flags)


def ours(quantized: nn.Module, images: torch.Tensor, backend: str, path: Path, vnni: bool) -> Run:
    """Our file of a quantized model; how far its outputs lie from PyTorch's is printed."""
    iasvit.export_onnx(quantized, path, target=backend, vnni=vnni)
    run = of_file(path, backend)
    with torch.inference_mode():
        mine, theirs = quantized(images), torch.from_numpy(run(images.numpy())[0])
    difference = ((theirs - mine).norm() / mine.norm()).item()
    print(f"{path.stem}: relative difference of the outputs {difference:.2g}", flush=True)
    return run


def of_file(path: Path, backend: str) -> Run:
    """A file, by a runtime on one thread."""
    return ExportedModel(path, backend, threads=1)._run


def dynamic(source: Path, path: Path) -> Run:
    """ONNX Runtime's dynamic quantization, as it is called by default."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(source), str(path), weight_type=QuantType.QInt8)
    return of_file(path, "onnxruntime")


def of_torch(model: nn.Module, dtype: torch.dtype) -> Run:
    """PyTorch as it is, or under autocast."""

    def run(images: np.ndarray) -> Any:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            return model(torch.from_numpy(images))

    return run


def variants(name: str, method: str, folder: Path) -> dict[str, Run]:
    """Variant → how it runs. One whose package is missing is left out, and named."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    size = model.pretrained_cfg["input_size"]
    images = torch.randn(4, *size)
    source = folder / "float.onnx"
    write_float(model, images[:1], source)

    def other(tool: str) -> Run:
        return iasvit.quantize(model, images, "W8A8", tool)._run

    makers: dict[str, Callable[[], Run]] = {
        "onnxruntime fp32": lambda: of_file(source, "onnxruntime"),
        "onnxruntime dynamic": lambda: dynamic(source, folder / "dynamic.onnx"),
        "onnxruntime static": lambda: other("onnxruntime_static"),
        "openvino fp32": lambda: of_file(source, "openvino"),
        "openvino nncf": lambda: other("nncf"),
        "torch fp32": lambda: of_torch(model, torch.float32),
        "torch bf16": lambda: of_torch(model, torch.bfloat16),
    }
    has_vnni = "vnni" in cpu()[1]
    for spec, by in (("W4A4", method), ("W4A4", "minmax"), ("W8A8", "minmax"), ("W8A8", "base_ptq")):
        quantized = iasvit.quantize(model, images, spec, by, **QUICK.get(by, {}))
        iasvit.save(quantized, folder / f"{spec}-{by}-packed.safetensors")
        for backend, vnni in (("onnxruntime", False), ("onnxruntime", True), ("openvino", False)):
            if vnni and (spec == "W4A4" or not has_vnni):  # the same file there, or one that this CPU saturates
                continue
            label = f"{spec} {by} {backend}" + vnni * " vnni"
            path = folder / f"{label.replace(' ', '-')}.onnx"
            makers[f"ours {label}"] = lambda q=quantized, b=backend, p=path, v=vnni: ours(q, images, b, p, v)
    made = {}
    for label, make in makers.items():
        try:
            made[label] = make()
        except iasvit.IasvitError as error:
            print(f"{label} is left out: {error}", file=sys.stderr)
    return made


def seconds(runs: dict[str, Run], images: np.ndarray, turns: int) -> dict[str, list[float]]:
    """CPU seconds of each variant in each turn, after one to warm up."""
    for run in runs.values():
        run(images)
    taken: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(turns):
        for label, run in runs.items():
            start = time.process_time()
            run(images)
            taken[label].append(time.process_time() - start)
    return taken


def profile(path: Path, images: np.ndarray) -> dict[str, float]:
    """Operator → its share of ONNX Runtime's time in a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = 1, True
    options.profile_file_prefix = str(path.with_suffix(""))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for _ in range(5):
        session.run(None, {"images": images})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    total: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            total[event["args"]["op_name"]] += event["dur"]
    return {op: round(100 * share / sum(total.values()), 1) for op, share in total.most_common(10)}


def peak_memory(path: Path, backend: str, size: tuple[int, ...]) -> float:
    """MiB that a process of its own gains from before the file is loaded to after one image."""
    command = [sys.executable, "-m", "tasks.studies.runtimes", "--measure", str(path), "--on", backend]
    shape = [value for side in size for value in ("--side", str(side))]
    return float(subprocess.run([*command, *shape], check=True, capture_output=True, text=True).stdout.split()[-1])


def _measure(path: Path, backend: str, size: list[int]) -> float:
    torch.set_num_threads(1)
    __import__(backend)
    memory = PeakMemory(torch.device("cpu"))
    before = memory.mib()
    of_file(path, backend)(np.zeros((1, *size), np.float32))
    return round(memory.mib() - before, 1)


@app.command()
def runtimes(
    backbone: Annotated[list[str] | None, typer.Option(help="Repeatable. timm's name of a model.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Repeatable. Images per batch. [default: 1 and 8]")] = None,
    method: Annotated[str, typer.Option(help="Method to compare beside minmax.")] = "repq_vit",
    turns: Annotated[int, typer.Option(help="Runs per variant.")] = 15,
    out: Annotated[Path, typer.Option(help="CSV file to append to.")] = Path("results/exported/speed.csv"),
    measure: Annotated[Path | None, typer.Option(hidden=True)] = None,
    on: Annotated[str, typer.Option(hidden=True)] = "onnxruntime",
    side: Annotated[list[int] | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure ratios to ONNX Runtime's float32."""
    torch.set_num_threads(1)
    if measure is not None:
        print(_measure(measure, on, side or [3, 224, 224]))
        return
    processor, flags = cpu()
    for name in backbone or BACKBONES:
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            runs = variants(name, method, folder)
            for count in batch or (1, 8):
                images = torch.randn(count, 3, 224, 224).numpy()
                taken = seconds(runs, images, turns)
                base = taken["onnxruntime fp32"]
                for label, each in taken.items():
                    ratios = [b / a for a, b in zip(each, base, strict=True)]
                    row = {
                        "model": name,
                        "batch": count,
                        "variant": label,
                        "ms_per_image": round(1000 * statistics.median(each) / count, 1),
                        "ratio": round(statistics.median(ratios), 2),
                        "quartiles": " ".join(f"{q:.2f}" for q in statistics.quantiles(ratios, n=4)[::2]),
                        "cpu": processor,
                        "flags": flags,
                    }
                    print(row, flush=True)
                    append(out, row)
            for path in sorted(each for each in folder.iterdir() if each.suffix in (".onnx", ".safetensors")):
                backend = "openvino" if "openvino" in path.name else "onnxruntime"
                runs_there = path.suffix == ".onnx"
                profiled = runs_there and backend == "onnxruntime"
                row = {
                    "model": name,
                    "file": path.stem,
                    "bytes": path.stat().st_size,
                    "peak_mib": peak_memory(path, backend, (3, 224, 224)) if runs_there else "",
                    "profile": json.dumps(profile(path, images[:1])) if profiled else "",
                }
                print(row, flush=True)
                append(out.with_name("files.csv"), row)


if __name__ == "__main__":
    main(app)
