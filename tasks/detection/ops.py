"""mmcv's compiled operators, without compiling them: NMS and RoIAlign come from torchvision.

mmcv.ops is Python over one extension module, mmcv._ext, which mmcv-lite does not have; to build it takes long, and
there are no wheels for current torch. Mask R-CNN and Cascade Mask R-CNN call three of its functions. `install` puts
a module in its place that routes these three to torchvision's compiled operators, so that mmcv.ops and mmdet work as
they stand; every other operator says, when it is called, that it needs a compiled mmcv. A compiled mmcv, where
installed, is used instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn

import torch
import torchvision  # noqa: F401 - registers torch.ops.torchvision
from torch import Tensor

from iasvit.errors import IasvitError

EXTENSION = "mmcv._ext"
INSTALL_COMMAND = "pip install -e '.[coco]'"


def install() -> None:
    """Make `mmcv.ops` importable; to be called before mmdet is imported. A second call does nothing.

    Raises:
        IasvitError: mmcv, mmengine or mmdet is not installed; the message says the command.
    """
    for package in ("mmcv", "mmengine", "mmdet"):
        if find_spec(package) is None:
            raise IasvitError(f"the COCO task needs {package}, which is not installed: {INSTALL_COMMAND}")
    if EXTENSION in sys.modules or find_spec(EXTENSION) is not None:
        return
    extension = _Extension(EXTENSION)
    extension.__spec__ = ModuleSpec(EXTENSION, loader=None)  # mmcv asks for its loader to know whether it is compiled
    sys.modules[EXTENSION] = extension


def is_routed() -> bool:
    """Whether mmcv's operators are torchvision's (mmcv-lite), and not those of a compiled mmcv."""
    return isinstance(sys.modules.get(EXTENSION), _Extension)


class _Extension(ModuleType):
    """Stands for mmcv._ext; an operator that torchvision does not have can be looked up, but not called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _ROUTED.get(name) or _unavailable(name)


def _unavailable(name: str) -> Callable[..., NoReturn]:
    def operator(*args: Any, **kwargs: Any) -> NoReturn:
        raise IasvitError(
            f"mmcv operator {name!r} needs a compiled mmcv: install mmcv 2.1 in place of mmcv-lite "
            "(mmcv-lite has NMS and RoIAlign only, through torchvision)"
        )

    return operator


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes kept, by falling score.

    Args:
        boxes: (N, 4), xyxy.
        scores: (N,).
        iou_threshold: a box that overlaps one of a higher score by more than this is dropped.
        offset: 0 or 1; a box is x2 - x1 + offset wide.
    """
    if offset:
        boxes = boxes + boxes.new_tensor([0.0, 0.0, offset, offset])
    return torch.ops.torchvision.nms(boxes, scores.to(boxes.dtype), iou_threshold)


def _roi_align_forward(
    features: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill output (K, C, h, w) with the features (B, C, H, W) that rois (K, 5: image, xyxy) cut out."""
    if pool_mode != 1:
        _unavailable("roi_align with pool_mode='max'")()
    rois = rois.to(features.dtype)
    pooled = (aligned_height, aligned_width)
    output.copy_(torch.ops.torchvision.roi_align(features, rois, spatial_scale, *pooled, sampling_ratio, aligned))


def _roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill grad_input (B, C, H, W), the gradient with respect to the features."""
    backward = torch.ops.torchvision._roi_align_backward
    rois = rois.to(grad_output.dtype)
    pooled = (aligned_height, aligned_width)
    shape = grad_input.shape
    grad_input.copy_(backward(grad_output, rois, spatial_scale, *pooled, *shape, sampling_ratio, aligned))


_ROUTED: dict[str, Callable[..., Any]] = {
    "nms": _nms,
    "roi_align_forward": _roi_align_forward,
    "roi_align_backward": _roi_align_backward,
}
