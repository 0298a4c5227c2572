"""NMS and RoIAlign of mmcv through torchvision: against plain implementations, and what else mmcv would need."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor

pytest.importorskip("mmdet", reason="the coco extra is not installed")

from iasvit.errors import IasvitError
from tasks.detection import ops

ops.install()
if not ops.is_routed():
    pytest.skip("a compiled mmcv is installed and used", allow_module_level=True)

from mmcv.ops import RoIAlign, batched_nms, nms, roi_align, soft_nms  # noqa: E402


def boxes_and_scores(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corners = 25 * torch.rand(count, 2, generator=generator)
    sizes = 4 + 30 * torch.rand(count, 2, generator=generator)
    return torch.cat([corners, corners + sizes], dim=1), torch.rand(count, generator=generator)


# ---- NMS -------------------------------------------------------------------------------------------------------------


def overlap(a: Tensor, b: Tensor, offset: int) -> float:
    """Intersection over union of two boxes whose sides are x2 - x1 + offset."""
    low, high = torch.maximum(a[:2], b[:2]), torch.minimum(a[2:], b[2:])
    common = (high - low + offset).clamp_min(0).prod()
    areas = [(box[2:] - box[:2] + offset).prod() for box in (a, b)]
    return float(common / (areas[0] + areas[1] - common))


def plain_nms(boxes: Tensor, scores: Tensor, threshold: float, offset: int = 0) -> list[int]:
    kept: list[int] = []
    for index in scores.argsort(descending=True).tolist():
        if all(overlap(boxes[index], boxes[other], offset) <= threshold for other in kept):
            kept.append(index)
    return kept


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("offset", [0, 1])
def test_nms_keeps_what_the_definition_keeps(threshold: float, offset: int) -> None:
    boxes, scores = boxes_and_scores(60)
    expected = plain_nms(boxes, scores, threshold, offset)
    assert 1 < len(expected) < 60
    kept, indices = nms(boxes, scores, threshold, offset=offset)
    assert indices.tolist() == expected
    assert torch.equal(kept, torch.cat([boxes, scores[:, None]], dim=1)[expected])


def test_the_offset_of_one_pixel_decides() -> None:
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.2]])  # 0.2 without the offset, 0.6 with it
    scores = torch.tensor([0.9, 0.8])
    assert nms(boxes, scores, 0.4, offset=0)[1].tolist() == [0, 1]
    assert nms(boxes, scores, 0.4, offset=1)[1].tolist() == [0]


def test_nms_limits_by_score_and_count() -> None:
    boxes, scores = boxes_and_scores(40, seed=1)
    expected = [i for i in plain_nms(boxes, scores, 0.5) if scores[i] > 0.3]
    assert nms(boxes, scores, 0.5, score_threshold=0.3)[1].tolist() == expected
    assert nms(boxes, scores, 0.5, score_threshold=0.3, max_num=3)[1].tolist() == expected[:3]
    empty, indices = nms(boxes[:0], scores[:0], 0.5)
    assert (tuple(empty.shape), indices.numel()) == ((0, 5), 0)


def test_batched_nms_keeps_classes_apart() -> None:
    boxes, scores = boxes_and_scores(50, seed=2)
    classes = torch.arange(50) % 3
    expected = []
    for number in range(3):
        members = (classes == number).nonzero()[:, 0]
        expected += members[plain_nms(boxes[members], scores[members], 0.2)].tolist()
    kept, indices = batched_nms(boxes, scores, classes, {"type": "nms", "iou_threshold": 0.2})
    assert sorted(indices.tolist()) == sorted(expected)
    assert torch.equal(kept[:, 4], scores[indices])
    assert torch.equal(scores[indices], scores[indices].sort(descending=True).values)


# ---- RoIAlign --------------------------------------------------------------------------------------------------------


def bilinear(feature: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The value of a map C×H×W at a point; 0 more than a pixel outside, the border's value up to there."""
    height, width = feature.shape[1:]
    if y < -1 or y > height or x < -1 or x > width:
        return feature.new_zeros(feature.shape[0])
    y, x = float(y.clamp(0, height - 1)), float(x.clamp(0, width - 1))
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    v, u = y - top, x - left
    upper = (1 - u) * feature[:, top, left] + u * feature[:, top, right]
    lower = (1 - u) * feature[:, bottom, left] + u * feature[:, bottom, right]
    return (1 - v) * upper + v * lower


def plain_roi_align(features: Tensor, rois: Tensor, size: int, scale: float, ratio: int, aligned: bool) -> Tensor:
    """The mean of bilinear samples in each of size×size bins, differentiable in the features."""
    result = []
    for roi in rois:
        feature = features[int(roi[0])]
        x1, y1, x2, y2 = roi[1:] * scale - (0.5 if aligned else 0.0)
        width, height = (x2 - x1, y2 - y1) if aligned else ((x2 - x1).clamp_min(1), (y2 - y1).clamp_min(1))
        rows = ratio if ratio > 0 else max(1, math.ceil(height / size))
        columns = ratio if ratio > 0 else max(1, math.ceil(width / size))
        for i in range(size):
            for j in range(size):
                samples = [
                    bilinear(
                        feature,
                        y1 + (i + (a + 0.5) / rows) * height / size,
                        x1 + (j + (b + 0.5) / columns) * width / size,
                    )
                    for a in range(rows)
                    for b in range(columns)
                ]
                result.append(torch.stack(samples).mean(dim=0))
    return torch.stack(result).view(len(rois), size, size, -1).permute(0, 3, 1, 2)


ROIS = torch.tensor(
    [
        [0, 3.0, 2.0, 21.0, 30.0],
        [1, -6.0, -6.0, 10.0, 9.0],  # over the border
        [1, 20.0, 11.0, 44.0, 47.0],
        [0, 7.2, 7.9, 9.0, 8.1],  # smaller than a bin
    ]
)


@pytest.mark.parametrize(("ratio", "aligned"), [(0, True), (2, True), (0, False), (2, False)])
def test_roi_align_and_its_gradient_are_the_definitions(ratio: int, aligned: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 10, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    rois = ROIS.double()
    expected = plain_roi_align(features, rois, 3, 0.25, ratio, aligned)
    layer = RoIAlign(3, spatial_scale=0.25, sampling_ratio=ratio, aligned=aligned)
    output = layer(features, rois)
    torch.testing.assert_close(output, expected, atol=1e-9, rtol=1e-9)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), features)
    (gradient,) = torch.autograd.grad((output * weights).sum(), features)
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(gradient, wanted, atol=1e-9, rtol=1e-9)


def test_roi_align_of_no_roi() -> None:
    features = torch.randn(1, 3, 8, 8, requires_grad=True)
    output = roi_align(features, torch.zeros(0, 5), 7, 0.5, 0, "avg", True)
    assert tuple(output.shape) == (0, 3, 7, 7)
    output.sum().backward()
    assert torch.equal(features.grad, torch.zeros_like(features))


# ---- what is not there -----------------------------------------------------------------------------------------------


def test_other_operators_say_what_they_need() -> None:
    boxes, scores = boxes_and_scores(4)
    with pytest.raises(IasvitError, match="mmcv operator 'softnms' needs a compiled mmcv"):
        soft_nms(boxes, scores)
    with pytest.raises(IasvitError, match=r"roi_align with pool_mode='max'.* needs a compiled mmcv"):
        roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), 2, 1.0, 0, "max", True)


def test_a_compiled_mmcv_is_used_where_there_is_one() -> None:
    code = """
        import importlib.machinery, sys, types
        class Compiled(importlib.machinery.PathFinder):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                if name == "mmcv._ext":
                    return importlib.machinery.ModuleSpec(name, cls)
            @staticmethod
            def create_module(spec): return types.ModuleType(spec.name)
            @staticmethod
            def exec_module(module): module.nms = "compiled"
        sys.meta_path.insert(0, Compiled)
        from tasks.detection import ops
        ops.install()
        import mmcv._ext
        print(mmcv._ext.nms, ops.is_routed())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "compiled False", done.stderr


@pytest.mark.parametrize("missing", ["mmcv", "mmdet"])
def test_without_the_extra_the_command_to_install_it_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(IasvitError, match=rf"needs {missing}, which is not installed: pip install -e '\.\[coco\]'"):
        ops.install()
