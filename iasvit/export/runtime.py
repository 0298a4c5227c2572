"""Run an exported file as if it were the model: the harness evaluates through it."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from iasvit.errors import IasvitError, reason, shown
from iasvit.export.extras import imported
from iasvit.export.onnx_file import export_onnx

BACKENDS = ("onnxruntime", "openvino")
OPENVINO: dict[str, str | int] = {
    "INFERENCE_PRECISION_HINT": "f32",  # where the CPU has bfloat16 too: codes would be others
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # else activations of float layers lose bits
}


def check_backend(backend: str) -> ModuleType:
    """The package of a backend.

    Raises:
        IasvitError: another name than those of BACKENDS, or the package or the extra `export` is not installed.
    """
    if backend not in BACKENDS:
        raise IasvitError(f"backend {shown(backend)} is not known; there are {', '.join(BACKENDS)}")
    imported("onnxscript", "export")
    return imported(backend, "export" if backend == "onnxruntime" else "openvino")


class ExportedModel(nn.Module):
    """images (B, C, H, W) → the file's outputs, computed by a runtime; one tensor where there is one.

    Args:
        path: of `export_onnx`.
        backend: "onnxruntime" or "openvino".
        threads: of the runtime; None for torch's number.

    Raises:
        IasvitError: another backend, its package is not installed, or it does not read the file.
    """

    def __init__(self, path: str | os.PathLike[str], backend: str = "onnxruntime", threads: int | None = None) -> None:
        super().__init__()
        package = check_backend(backend)
        if not Path(path).is_file():
            raise IasvitError(f"{path} does not exist; give a file that iasvit.export_onnx wrote")
        self.backend = backend
        open_ = _onnxruntime if backend == "onnxruntime" else _openvino
        try:
            self.session, self._run = open_(package, str(path), threads or threads_of())
        except Exception as error:
            raise IasvitError(f"{backend} cannot read {path} ({reason(error)[:200]})") from error

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outputs, on the CPU."""
        outputs = tuple(torch.from_numpy(output) for output in self._run(images.detach().cpu().numpy()))
        return outputs[0] if len(outputs) == 1 else outputs


def exported_twin(model: nn.Module, backend: str) -> nn.Module:
    """A quantized model that computes what it exports to, by a backend: called as the model is.

    Of a detector backbone and neck run there, and the heads in PyTorch.

    Raises:
        IasvitError: see `export_onnx` and `ExportedModel`.
    """
    if not hasattr(model, "extract_feat"):
        return _exported(model, backend, None)
    twin = copy.deepcopy(model)
    sessions: dict[tuple[int, int], ExportedModel] = {}

    def extract_feat(images: Tensor) -> tuple[Tensor, ...]:
        size = (images.shape[2], images.shape[3])  # a graph is of one size
        if size not in sessions:
            sessions[size] = _exported(model, backend, size)
        outputs: tuple[Tensor, ...] = sessions[size](images)
        return outputs

    vars(twin)["extract_feat"] = extract_feat  # in place of the class's
    return twin


def _exported(model: nn.Module, backend: str, size: tuple[int, int] | None) -> ExportedModel:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, path, target=backend, image_size=size)
        return ExportedModel(path, backend)


def _onnxruntime(package: Any, path: str, threads: int) -> tuple[Any, Any]:
    options = package.SessionOptions()
    options.intra_op_num_threads = threads
    session = package.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (name,) = (value.name for value in session.get_inputs())
    return session, lambda images: session.run(None, {name: images})


def _openvino(package: Any, path: str, threads: int) -> tuple[Any, Any]:
    settings = {**OPENVINO, "INFERENCE_NUM_THREADS": threads}
    core = package.Core()
    model = core.read_model(path)
    compiled: dict[tuple[int, ...], Any] = {}  # of each shape: where a batch is fixed OpenVINO fuses more

    def run(images: Any) -> Sequence[Any]:
        if images.shape not in compiled:
            fixed = model.clone()
            fixed.reshape(list(images.shape))
            compiled[images.shape] = core.compile_model(fixed, "CPU", settings)
        return [output.copy() for output in compiled[images.shape](images).values()]

    return model, run


def threads_of() -> int:
    """How many threads a runtime gets: torch's number."""
    return torch.get_num_threads()
