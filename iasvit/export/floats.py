"""What other tools quantize instead: a full-precision classifier as an ONNX file, and their file as a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from iasvit.errors import IasvitError
from iasvit.export.extras import imported
from iasvit.export.onnx_file import OPSETS
from iasvit.export.runtime import ExportedModel
from iasvit.methods import Calibration
from iasvit.spec import QuantSpec


def require_bits(spec: QuantSpec, allowed: tuple[str, ...], name: str) -> None:
    """Raise IasvitError where a tool does not have these bits."""
    if str(spec) not in allowed:
        raise IasvitError(f"method {name!r} quantizes to {' or '.join(allowed)}, but {spec} is asked for")


def first_batches(calibration: Calibration, count: int) -> Iterator[Tensor]:
    """The first `count` calibration images, 1×3×H×W each, on the CPU."""
    parts = calibration.split(1) if isinstance(calibration, Tensor) else calibration
    left = count
    for part in parts:
        for image in part[:left].split(1):
            yield image.detach().cpu().float()
        left -= len(part)
        if left <= 0:
            return


def write_float(model: nn.Module, image: Tensor, path: Path) -> None:
    """A full-precision classifier as an ONNX file, with a batch of any size.

    Raises:
        IasvitError: the model is a detector, cannot be traced, or the extra `export` is missing.
    """
    onnx = imported("onnx", "runtimes")
    imported("onnxscript", "runtimes")
    from iasvit.export.trace import traced_graph

    if hasattr(model, "extract_feat"):
        raise IasvitError(f"the {type(model).__name__} given is a detector; this method takes classifiers")
    proto = traced_graph(model.cpu().eval(), torch.cat([image, image]), ["logits"], OPSETS[0])
    onnx.save(proto, path)


def model_of_file(path: Path, backend: str) -> ExportedModel:
    """Another tool's file as a model; its bytes are kept as a buffer, so that its size is known."""
    model = ExportedModel(path, backend)
    content = path.read_bytes()
    weights = path.with_suffix(".bin")
    if path.suffix == ".xml" and weights.is_file():
        content += weights.read_bytes()
    model.register_buffer("file", torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy()))
    return model
