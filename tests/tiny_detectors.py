"""Tiny mmdet detectors with uneven weights and a Swin backbone of windows of 4, and images for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import stir
from torch import Tensor, nn

pytest.importorskip("mmdet", reason="the coco extra is not installed")

from tasks.detection.ops import install

install()

CLASSES = 3
CHANNELS = 8


def _box_head(cascade: bool, **changes: Any) -> dict[str, Any]:
    return {
        "type": "Shared2FCBBoxHead",
        "in_channels": CHANNELS,
        "fc_out_channels": 12,
        "roi_feat_size": 3,
        "num_classes": CLASSES,
        "reg_class_agnostic": cascade,
        "bbox_coder": {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": [0.1, 0.1, 0.2, 0.2]},
        "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": False},
        "loss_bbox": {"type": "L1Loss"},
        **changes,
    }


def _extractor(size: int) -> dict[str, Any]:
    layer = {"type": "RoIAlign", "output_size": size, "sampling_ratio": 0}
    strides = [4, 8, 16, 32]
    return {"type": "SingleRoIExtractor", "roi_layer": layer, "out_channels": CHANNELS, "featmap_strides": strides}


def config(cascade: bool = False, box_head: dict[str, Any] | None = None, **backbone: Any) -> dict[str, Any]:
    """A detector's configuration; `box_head` and `backbone` change what is said of these."""
    nms = {"type": "nms", "iou_threshold": 0.7}
    head = _box_head(cascade, **(box_head or {}))
    return {
        "type": "CascadeRCNN" if cascade else "MaskRCNN",
        "backbone": {
            "type": "SwinTransformer",
            "embed_dims": 8,
            "depths": (2, 2, 1, 1),
            "num_heads": (1, 2, 2, 4),
            "window_size": 4,
            "mlp_ratio": 2,
            "drop_path_rate": 0.1,
            **backbone,
        },
        "neck": {"type": "FPN", "in_channels": [8, 16, 32, 64], "out_channels": CHANNELS, "num_outs": 5},
        "rpn_head": {
            "type": "RPNHead",
            "in_channels": CHANNELS,
            "feat_channels": CHANNELS,
            "anchor_generator": {
                "type": "AnchorGenerator",
                "scales": [4],
                "ratios": [0.5, 1.0],
                "strides": [4, 8, 16, 32, 64],
            },
            "bbox_coder": {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": [1.0] * 4},
            "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True},
            "loss_bbox": {"type": "L1Loss"},
        },
        "roi_head": {
            "type": "CascadeRoIHead" if cascade else "StandardRoIHead",
            "bbox_roi_extractor": _extractor(3),
            "bbox_head": [head, dict(head)] if cascade else head,
            "mask_roi_extractor": _extractor(4),
            "mask_head": {
                "type": "FCNMaskHead",
                "num_convs": 1,
                "in_channels": CHANNELS,
                "conv_out_channels": CHANNELS,
                "num_classes": CLASSES,
            },
            **({"num_stages": 2, "stage_loss_weights": [1, 0.5]} if cascade else {}),
        },
        "train_cfg": {"rpn": None, "rcnn": None} if not cascade else None,
        "test_cfg": {
            "rpn": {"nms_pre": 50, "max_per_img": 12, "nms": nms, "min_bbox_size": 0},
            "rcnn": {"score_thr": 0.05, "nms": {**nms, "iou_threshold": 0.5}, "max_per_img": 6, "mask_thr_binary": 0.5},
        },
    }


def detector(cascade: bool = False, seed: int = 0, **changes: Any) -> nn.Module:
    """A detector whose parameters differ from channel to channel; eval mode."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules(init_default_scope=True)
    settings = Config({"model": config(cascade, **changes)})
    model = stir(MODELS.build(settings.model), seed)
    model.cfg = settings
    return model


def images(*sizes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """One image 1×3×H×W of each size, of mean 0 and with smooth structure."""
    generator = torch.Generator().manual_seed(2000 + seed)
    result = []
    for size in sizes:
        coarse = torch.randn(1, 3, 6, 6, generator=generator)
        fine = torch.randn(1, 3, *size, generator=generator)
        result.append(nn.functional.interpolate(coarse, size=size, mode="bilinear") + 0.3 * fine)
    return result


def predict(model: nn.Module, image: Tensor) -> Any:
    """The detections of one image, as mmdet gives them."""
    from mmdet.structures import DetDataSample

    size = tuple(image.shape[2:])
    shapes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), size)
    sample = DetDataSample(metainfo={**shapes, "scale_factor": (1.0, 1.0)})
    with torch.no_grad():
        return model(image, [sample], mode="predict")[0].pred_instances
