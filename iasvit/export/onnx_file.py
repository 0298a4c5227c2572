"""export_onnx: the call, what it checks, and what the file says of itself."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from iasvit.artifact import Quantization
from iasvit.errors import IasvitError, StorageError, reason
from iasvit.export.extras import imported
from iasvit.files import replacing
from iasvit.summary import layer_bits

if TYPE_CHECKING:
    import onnx

    from iasvit.export.lower import Lowering

TARGETS = ("onnxruntime", "onnx", "openvino")
OPSETS = range(20, 24)
KEY = "iasvit"  # of the file's metadata


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    target: str = "onnxruntime",
    opset: int = 20,
    vnni: bool = False,
    force: bool = False,
    image_size: tuple[int, int] | None = None,
) -> dict[str, str]:
    """Write a quantized model as an ONNX graph whose products are of integers: uint8 × int8 in int32.

    The input is "images" (batch, channels, height, width), float32, normalised as the model takes them; the batch is of
    any size. The output of a classifier is "logits" (batch, classes); of a detector, of which backbone and neck are
    exported, "features_0" and so on, (batch, channels, height, width) each. LayerNorm, softmax, GELU and residual
    additions stay in float32. Codes equal the model's own, except where a value falls within float32's rounding of a
    tie.

    Args:
        model: what `iasvit.quantize` or `iasvit.load` returned.
        path: where to write; the file is written beside and renamed.
        target: "onnxruntime" has products that scale in one operator of ONNX Runtime's own; "onnx" has standard
            operators alone; "openvino" dequantizes before each product, which OpenVINO and others then fuse.
        opset: version of ONNX's operators, 20 to 23.
        vnni: whether the file is meant for CPUs with VNNI alone: 8-bit weights beside 8-bit activations are int8 then,
            which is faster there and saturates elsewhere. Without, every CPU gives the exact result.
        force: whether a file that is there is replaced.
        image_size: height and width of images; None for the model's own. A detector takes multiples of 32.

    Returns:
        Layer or product → "int8", or "float" and why, in the order of computation.

    Raises:
        IasvitError: a model that is not quantized, another target or opset, a file that is there, a layer that has no
            form, or the extra `export` is missing.
        StorageError: the file cannot be written there.
    """
    path = Path(path)
    quantization = getattr(model, "quantization", None)
    if not isinstance(quantization, Quantization):
        raise IasvitError(
            f"the {type(model).__name__} given to export_onnx is not quantized; export what quantize or load returned"
        )
    if target not in TARGETS:
        raise IasvitError(f"target {target!r} is not known; there are {', '.join(TARGETS)}")
    if opset not in OPSETS:
        raise IasvitError(f"opset {opset} is not supported; use {OPSETS[0]} to {OPSETS[-1]}")
    if path.is_dir():
        raise IasvitError(f"{path} is a folder; name a file such as {path / 'model.onnx'}")
    if path.exists() and not force:
        raise IasvitError(f"{path} exists already; choose another name, or replace it with force=True or --force")
    library = imported("onnx", "export")
    imported("onnxscript", "export")
    if not hasattr(torch.onnx, "ops"):
        raise IasvitError(f"torch {torch.__version__} cannot export integers; 2.8 or newer is needed")
    try:
        with replacing(path) as temporary:
            proto, done = graph_of(model, quantization, target, opset, vnni, image_size)
            library.save(proto, temporary)
            library.checker.check_model(str(temporary))
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {reason(error)}") from error
    return forms_of(done)


def graph_of(
    model: nn.Module,
    quantization: Quantization,
    target: str,
    opset: int,
    vnni: bool,
    image_size: tuple[int, int] | None,
    double: bool = False,
) -> tuple[onnx.ModelProto, Lowering]:
    """The graph, and what was done to each layer.

    Args:
        model: quantized.
        quantization: the model's.
        target, opset, vnni, image_size: as of `export_onnx`.
        double: whether floats are float64, for a proof: see `iasvit.export.double`. The target is "onnx" then.
    """
    from iasvit.export.double import in_double, plain, restore_numbers
    from iasvit.export.lower import DOMAIN, lower
    from iasvit.export.trace import traced_graph

    copied = copy.deepcopy(model).cpu().eval()
    exported, outputs = exported_part(in_double(copied) if double else copied)
    description = quantization.architecture
    height, width = image_size or description["img_size"]
    images = torch.zeros(2, description["in_chans"], height, width, dtype=torch.float64 if double else torch.float32)
    proto = traced_graph(exported, images, outputs, opset)
    if double:
        restore_numbers(proto, exported)
    done = lower(proto, exported, target, vnni, double)
    if double:
        plain(proto)
    for index in reversed(range(len(proto.opset_import))):
        if proto.opset_import[index].domain == DOMAIN:
            del proto.opset_import[index]
    if target == "onnxruntime":
        proto.opset_import.add(domain="com.microsoft", version=1)
    bits = {name: (weights, inputs) for name, weights, inputs in layer_bits(model)}
    facts = {
        "method": quantization.method,
        "spec": quantization.spec,
        "options": quantization.options,
        "data": quantization.data,
        "target": target,
        "vnni": vnni,
        "forms": forms_of(done),
        "bits": bits,
    }
    entry = proto.metadata_props.add()
    entry.key, entry.value = KEY, json.dumps(facts)
    proto.producer_name = "iasvit"
    return proto, done


def forms_of(done: Lowering) -> dict[str, str]:
    """See `export_onnx`: what it returns."""
    return {
        path.removeprefix(Features.PREFIX): f"{form}, {done.why[path]}" if path in done.why else form
        for path, form in done.forms.items()
    }


class Features(nn.Module):
    """Backbone and neck of a detector: images → the neck's maps."""

    PREFIX = "detector."  # of paths

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.detector = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.detector.extract_feat(images))


def exported_part(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """What of a model is exported, and the names of its outputs."""
    if not hasattr(model, "extract_feat"):
        return model, ["logits"]
    count = model.neck.num_outs if hasattr(model.neck, "num_outs") else 4
    return Features(model).eval(), [f"features_{index}" for index in range(count)]
