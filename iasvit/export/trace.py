"""A quantized model as an ONNX graph in which each quantized layer and product is one node, still to be lowered."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence

import onnx
import torch
from torch import Tensor, nn

from iasvit.errors import IasvitError, reason
from iasvit.export.lower import DOMAIN
from iasvit.nn import QuantConv2d, QuantLinear, QuantMatMul

INPUT = "images"
BATCH = "batch"


def node_of(op: str, path: str, inputs: Sequence[Tensor], shape: Sequence[int | torch.SymInt]) -> Tensor:
    """In a trace one node of domain "iasvit" that says which module it stands for; elsewhere it cannot be computed."""
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{op}", inputs, {"path": path}, dtype=inputs[0].dtype, shape=shape, version=1
    )


class _Linear(nn.Module):
    def __init__(self, path: str, layer: QuantLinear) -> None:
        super().__init__()
        self.path, self.out_features = path, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        return node_of("Linear", self.path, (x,), (*x.shape[:-1], self.out_features))


class _Conv2d(nn.Module):
    def __init__(self, path: str, layer: QuantConv2d) -> None:
        super().__init__()
        self.path, self.out_channels = path, layer.out_channels
        padding = layer.padding if isinstance(layer.padding, tuple) else (0, 0)
        self.geometry = list(zip(layer.kernel_size, layer.stride, padding, layer.dilation, strict=True))
        self.kernel_size, self.stride = layer.kernel_size, layer.stride  # which a model's own code may read
        self.padding, self.dilation = layer.padding, layer.dilation

    def forward(self, x: Tensor) -> Tensor:
        sides = [
            (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for side, (kernel, stride, padding, dilation) in zip(x.shape[-2:], self.geometry, strict=True)
        ]
        return node_of("Conv2d", self.path, (x,), (*x.shape[:-3], self.out_channels, *sides))


class _Product(nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return node_of("Product", self.path, (left, right), (*left.shape[:-1], right.shape[-1]))


def traced_graph(model: nn.Module, images: Tensor, outputs: Sequence[str], opset: int) -> onnx.ModelProto:
    """Trace a quantized model, with a batch of any size.

    Args:
        model: on the CPU, in eval mode; not changed.
        images: two images or more of the size that the graph is to take.
        outputs: names of what the model outputs, in order.
        opset: version of ONNX's operators.

    Raises:
        IasvitError: the model cannot be traced, or needs an operator that this opset has not.
    """
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantMatMul):
            model.set_submodule(path, _Product(path))
        elif isinstance(module, QuantLinear):
            model.set_submodule(path, _Linear(path, module))
        elif isinstance(module, QuantConv2d):
            model.set_submodule(path, _Conv2d(path, module))
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                input_names=[INPUT],
                output_names=list(outputs),
                verbose=False,
                optimize=True,
            )
    except Exception as error:
        first: BaseException = error
        while first.__cause__ is not None:  # which says what is at fault
            first = first.__cause__
        raise IasvitError(
            f"the {type(model).__name__} given cannot be traced at opset {opset} ({reason(first)[:300]})"
        ) from error
    proto = program.model_proto
    found = next((entry.version for entry in proto.opset_import if entry.domain == ""), opset)
    if found != opset:
        raise IasvitError(f"opset {opset} was asked for, but the graph needs {found}; give opset={found}")
    _name_batch(proto)
    return proto


def _name_batch(proto: onnx.ModelProto) -> None:
    """Give the first dimension of inputs and outputs a name that says what it is."""
    first = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*proto.graph.input, *proto.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == first:
                dimension.dim_param = BATCH
    proto.graph.ClearField("value_info")  # of tensors that have gone, or in terms of the old name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter prints of itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
