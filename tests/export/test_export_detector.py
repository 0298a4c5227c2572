"""Backbone and neck of a detector on integers; the heads stay in PyTorch."""

from __future__ import annotations

import pytest

pytest.importorskip("onnxruntime", reason="the extra export is not installed")
pytest.importorskip("onnxscript", reason="the extra export is not installed")

import tiny_detectors
import torch
from graphs import skip_without_convolutions

import iasvit
from iasvit.export.compare import Comparison
from iasvit.export.runtime import exported_twin


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_backbone_and_neck(target: str) -> None:
    """Windows that are filled up, shifts, merging, and the FPN's convolutions, of an image that no window divides."""
    skip_without_convolutions()
    if target == "openvino":
        pytest.importorskip("openvino", reason="the extra openvino is not installed")
    size = (72, 88)
    images = torch.cat(tiny_detectors.images(size, size, size))
    model = iasvit.quantize(tiny_detectors.detector(depths=(2, 1, 1, 1)), images[:2], "W4A4", "repq_vit")
    comparison = Comparison(model, target, image_size=size)
    mine, theirs = comparison.run(images)
    assert len(mine) == len(theirs) == 5
    found = comparison.differences.values()
    assert sum(each.others for each in found) == 0
    ties = sum(each.ties for each in found)
    assert ties <= 10
    for a, b in zip(mine, theirs, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, atol=1e-4)
    assert {form for path, form in comparison.forms.items() if path.startswith("neck")} == {"int8"}
    twin = exported_twin(model, target)
    first, second = (tiny_detectors.predict(network, images[2:]) for network in (model, twin))
    assert len(first.scores) == len(second.scores)
    assert ties or torch.allclose(first.scores, second.scores, atol=1e-3)
