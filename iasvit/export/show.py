"""What is in an exported file, as text."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from iasvit.errors import IasvitError, reason
from iasvit.export.extras import imported
from iasvit.export.onnx_file import KEY


def summary(path: str | os.PathLike[str]) -> str:
    """How an exported model was made, its inputs and outputs, its operators, and the form of each layer.

    Raises:
        IasvitError: no such file, not a file of `export_onnx`, or the extra `export` is missing.
    """
    path = Path(path)
    onnx = imported("onnx", "export")
    if not path.is_file():
        raise IasvitError(f"{path} does not exist; give a file that iasvit export wrote")
    try:
        proto = onnx.load(path)
        facts = json.loads({entry.key: entry.value for entry in proto.metadata_props}[KEY])
        forms, bits = dict(facts["forms"]), dict(facts["bits"])
        heads = [
            ("method", facts["method"]),
            ("spec", facts["spec"]),
            ("options", ", ".join(f"{name}={value}" for name, value in facts["options"].items()) or "none"),
            ("target", facts["target"] + (", for VNNI alone" if facts["vnni"] else "")),
        ]
    except Exception as error:
        raise IasvitError(
            f"{path} is not an exported model ({reason(error)[:100]}); give a file of iasvit export"
        ) from error
    heads += [
        ("opset", ", ".join(f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in proto.opset_import)),
        ("input", ", ".join(map(_described, proto.graph.input))),
        ("output", ", ".join(map(_described, proto.graph.output))),
        ("size", f"{path.stat().st_size} bytes"),
        ("operators", ", ".join(f"{count} {op}" for op, count in _operators(proto))),
    ]
    rows = [("layer", "weights", "inputs", "runs as")]
    for name, form in forms.items():
        if name in bits:
            rows.append((name, *bits[name], form))
        else:  # a product: its operands have lines of their own
            sides = [bits.get(f"{name}.{side}_quantizer", ("-", "-"))[1] for side in ("left", "right")]
            rows.append((name, "-", "/".join(sides), form))
    width = max(len(row[0]) for row in rows)
    table = [f"{name:<{width}}  {weights:>7}  {inputs:>6}  {form}" for name, weights, inputs, form in rows]
    return "\n".join([*(f"{name + ':':<11}{value}" for name, value in heads), "", *table])


def _described(value: object) -> str:
    shape = [d.dim_param or str(d.dim_value) for d in value.type.tensor_type.shape.dim]  # type: ignore[attr-defined]
    return f"{value.name} ({', '.join(shape)})"  # type: ignore[attr-defined]


def _operators(proto: object) -> list[tuple[str, int]]:
    return Counter(node.op_type for node in proto.graph.node).most_common()  # type: ignore[attr-defined]
