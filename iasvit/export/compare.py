"""Proof of equality: an exported graph's integers, quantizer by quantizer, beside the model's own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from iasvit.export.extras import imported
from iasvit.export.onnx_file import OPSETS, Features, exported_part, forms_of, graph_of
from iasvit.export.operands import Operand
from iasvit.export.runtime import threads_of
from iasvit.quantizers import Quantizer

NEAR = 1e-4  # of a step: how near to a tie a value lies whose code may differ first


@dataclass
class Difference:
    """Codes of one quantizer in both.

    Attributes:
        path: the quantizer's.
        codes: compared.
        ties: that differ, the model's value being near a tie.
        others: that differ and are no ties: a defect.
    """

    path: str
    codes: int = 0
    ties: int = 0
    others: int = 0


class Comparison:
    """A quantized model beside the graph that it exports to, run by ONNX Runtime.

    A code at a tie that falls to the other side changes what comes behind it, and says nothing of what computes it. So
    where a code differs, the model goes on with the file's: each quantizer is compared on inputs that differ by the
    rounding of float32 alone, in all layers of all images.

    Args:
        model: as of `export_onnx`; not changed.
        target, image_size: as of `export_onnx`.
        double: whether both compute in float64, and each goes on with its own codes. Then hardly any differ, and the
            target has no part in it.
    """

    def __init__(
        self,
        model: nn.Module,
        target: str = "onnxruntime",
        image_size: tuple[int, int] | None = None,
        double: bool = False,
    ) -> None:
        onnx, runtime = imported("onnx", "export"), imported("onnxruntime", "export")
        from iasvit.export.double import in_double

        target = "onnx" if double else target
        proto, done = graph_of(model, model.quantization, target, OPSETS[0], False, image_size, double)
        prefix = Features.PREFIX if isinstance(exported_part(model)[0], Features) else ""
        self.operands = {path.removeprefix(prefix): operand for path, operand in done.operands.items()}
        self.forms = forms_of(done)
        self.outputs = [value.name for value in proto.graph.output]
        names = dict.fromkeys(name for operand in self.operands.values() for name in _names(operand))
        proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
        self.names = [*self.outputs, *names]
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads_of()
        self.session = runtime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.model = in_double(model) if double else model
        self.double = double
        self.differences = {path: Difference(path) for path in self.operands}

    @torch.no_grad()
    def run(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Add the codes of these images to `differences`; the outputs of the model, given the file's codes wherever
        its own differ (but not in float64), and those of the graph."""
        images = images.double() if self.double else images
        results = dict(zip(self.names, self.session.run(self.names, {"images": images.numpy()}), strict=True))
        handles = [
            module.register_forward_hook(
                lambda module, args, out, path=path: self._compare(path, module, args[0], out, results)
            )
            for path, module in self.model.named_modules()
            if path in self.operands
        ]
        try:
            part, _ = exported_part(self.model)
            mine = part(images)
        finally:
            for handle in handles:
                handle.remove()
        theirs = [torch.from_numpy(results[name]) for name in self.outputs]
        return list(mine) if isinstance(mine, tuple) else [mine], theirs

    def _compare(
        self, path: str, quantizer: Quantizer, x: Tensor, values: Tensor, results: dict[str, np.ndarray]
    ) -> Tensor:
        """Count one quantizer's codes; its values, the file's where they differ."""
        theirs = _values(self.operands[path], results)
        mine = values.double().numpy()
        relative, absolute = (1e-9, 1e-15) if self.double else (1e-5, 1e-6)
        wrong = np.abs(theirs - mine) > relative * np.abs(mine) + absolute * np.abs(mine).max()
        found = self.differences[path]
        found.codes += wrong.size
        if not wrong.any():
            return values
        near = _near_a_tie(quantizer, x)
        found.ties += int((wrong & near).sum())
        found.others += int((wrong & ~near).sum())
        if self.double:
            return values
        return torch.where(torch.from_numpy(wrong), torch.from_numpy(theirs).to(values.dtype), values)


def _names(operand: Operand) -> list[str]:
    return [operand.values] if operand.values else [plane.values or plane.codes for plane in operand.planes]


def _values(operand: Operand, results: dict[str, np.ndarray]) -> np.ndarray:
    if operand.values:
        return results[operand.values].astype(np.float64)
    parts = [
        results[plane.values].astype(np.float64)
        if plane.values
        else plane.scale * (results[plane.codes].astype(np.float64) - plane.zero_point - plane.rest)
        for plane in operand.planes
    ]
    values: np.ndarray = np.sum(parts, axis=0) + operand.constant
    return values


def _near_a_tie(quantizer: Quantizer, x: Tensor) -> np.ndarray:
    """Where a code turns within NEAR of x, or, relative to it, of x as a share of the whole range."""
    margin = NEAR * torch.maximum(x.abs(), x.abs().mean())
    codes = [quantizer.encode(x + sign * margin) for sign in (-1, 1)]
    return (codes[0] != codes[1]).numpy()
