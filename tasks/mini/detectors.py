"""The mini detectors: mmdet's Mask R-CNN and Cascade Mask R-CNN on the mini Swin backbones, for 128×128 images.

Configurations are mmdet's own for COCO with everything a quarter as large: 2×2 patches, hence strides 2, 4, 8 and 16,
and few channels. Depths, windows, shifts, heads and the modules of neck and heads are the real ones'; no map but the
neck's is a multiple of the window, so that every stage pads, as on COCO. Checkpoints hold fp16 and are loaded as fp32.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from iasvit.errors import IasvitError
from tasks.detection.mmdet_setup import build_detector
from tasks.mini import zoo
from tasks.mini.detection import IMAGE_SIZE
from tasks.mini.scenes import CLASSES

if TYPE_CHECKING:
    from tasks.detection.data import DetectorConfig

DETECTORS = ("mask_rcnn", "cascade_mask_rcnn")
BACKBONES = ("swin_t", "swin_s")
MAX_BYTES = 6_000_000  # of one checkpoint

CHANNELS = 40  # of neck and heads; 256 in the real ones
HIDDEN = 160  # of the box heads' linears; 1024 in the real ones
STRIDES = (2, 4, 8, 16, 32)
# Boxes of up to twice this side, in pixels, are pooled from the finest map; 56 in the real ones, of objects to 800.
FINEST_SCALE = 16
CASCADE_IOUS = (0.5, 0.6, 0.7)
CASCADE_STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))


def names() -> list[str]:
    """All mini detectors: "mask_rcnn_swin_t" and so on."""
    return [f"{detector}_{backbone}" for detector in DETECTORS for backbone in BACKBONES]


def split_name(name: str) -> tuple[str, str]:
    """Detector and backbone of a mini detector's name.

    Raises:
        IasvitError: there is no such mini detector.
    """
    if name not in names():
        raise IasvitError(f"mini detector {name!r} does not exist; there are {', '.join(names())}")
    backbone = next(backbone for backbone in BACKBONES if name.endswith(f"_{backbone}"))
    return name.removesuffix(f"_{backbone}"), backbone


# ---- configurations --------------------------------------------------------------------------------------------------


def _assigner(positive: float, negative: float, least: float, low_quality: bool) -> dict[str, Any]:
    return {
        "type": "MaxIoUAssigner",
        "pos_iou_thr": positive,
        "neg_iou_thr": negative,
        "min_pos_iou": least,
        "match_low_quality": low_quality,
        "ignore_iof_thr": -1,
    }


def _sampler(num: int, positive: float, add_truth: bool) -> dict[str, Any]:
    return {
        "type": "RandomSampler",
        "num": num,
        "pos_fraction": positive,
        "neg_pos_ub": -1,
        "add_gt_as_proposals": add_truth,
    }


def _box_head(stds: tuple[float, ...], cascade: bool) -> dict[str, Any]:
    return {
        "type": "Shared2FCBBoxHead",
        "in_channels": CHANNELS,
        "fc_out_channels": HIDDEN,
        "roi_feat_size": 7,
        "num_classes": len(CLASSES),
        "bbox_coder": {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": list(stds)},
        "reg_class_agnostic": cascade,
        "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
        "loss_bbox": {"type": "SmoothL1Loss", "beta": 1.0, "loss_weight": 1.0}
        if cascade
        else {"type": "L1Loss", "loss_weight": 1.0},
    }


def _roi_extractor(size: int) -> dict[str, Any]:
    return {
        "type": "SingleRoIExtractor",
        "roi_layer": {"type": "RoIAlign", "output_size": size, "sampling_ratio": 0},
        "out_channels": CHANNELS,
        "featmap_strides": list(STRIDES[:4]),
        "finest_scale": FINEST_SCALE,
    }


def _rcnn_training(iou: float, low_quality: bool) -> dict[str, Any]:
    return {
        "assigner": _assigner(iou, iou, iou, low_quality),
        "sampler": _sampler(64, 0.25, add_truth=True),
        "mask_size": 28,
        "pos_weight": -1,
        "debug": False,
    }


def config(name: str) -> dict[str, Any]:
    """A mini detector's configuration, as mmdet's `MODELS.build` takes it.

    Raises:
        IasvitError: there is no such mini detector.
    """
    detector, backbone_name = split_name(name)
    cascade = detector == "cascade_mask_rcnn"
    backbone = zoo.MINI_BACKBONES[backbone_name]
    mean, std = backbone.normalisation
    stages = range(len(CASCADE_IOUS)) if cascade else range(1)
    box_heads = [_box_head(CASCADE_STDS[stage], cascade) for stage in stages]
    # Cascade's first stage takes no low-quality matches in mmdet's configuration, Mask R-CNN's only one does.
    rcnn_training = [_rcnn_training(CASCADE_IOUS[stage], low_quality=not cascade) for stage in stages]
    return {
        "type": "CascadeRCNN" if cascade else "MaskRCNN",
        "data_preprocessor": {
            "type": "DetDataPreprocessor",
            "mean": [255 * value for value in mean],
            "std": [255 * value for value in std],
            "bgr_to_rgb": True,
            "pad_mask": True,
            "pad_size_divisor": 32,
        },
        "backbone": {
            "type": "SwinTransformer",
            "pretrain_img_size": IMAGE_SIZE,
            "embed_dims": backbone.embed_dim,
            "patch_size": 2,
            "strides": (2, 2, 2, 2),
            "depths": backbone.depth,
            "num_heads": backbone.num_heads,
            "window_size": 7,
            "mlp_ratio": 4,
            "qkv_bias": True,
            "drop_path_rate": 0.0,
            "patch_norm": True,
            "out_indices": (0, 1, 2, 3),
        },
        "neck": {
            "type": "FPN",
            "in_channels": [backbone.embed_dim * 2**stage for stage in range(4)],
            "out_channels": CHANNELS,
            "num_outs": len(STRIDES),
        },
        "rpn_head": {
            "type": "RPNHead",
            "in_channels": CHANNELS,
            "feat_channels": CHANNELS,
            "anchor_generator": {
                "type": "AnchorGenerator",
                "scales": [8],
                "ratios": [0.5, 1.0, 2.0],
                "strides": list(STRIDES),
            },
            "bbox_coder": {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": [1.0] * 4},
            "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0},
            "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
        },
        "roi_head": {
            "type": "CascadeRoIHead" if cascade else "StandardRoIHead",
            "bbox_roi_extractor": _roi_extractor(7),
            "bbox_head": box_heads if cascade else box_heads[0],
            "mask_roi_extractor": _roi_extractor(14),
            "mask_head": {
                "type": "FCNMaskHead",
                "num_convs": 4,
                "in_channels": CHANNELS,
                "conv_out_channels": CHANNELS,
                "num_classes": len(CLASSES),
                "loss_mask": {"type": "CrossEntropyLoss", "use_mask": True, "loss_weight": 1.0},
            },
            **({"num_stages": len(CASCADE_IOUS), "stage_loss_weights": [1, 0.5, 0.25]} if cascade else {}),
        },
        "train_cfg": {
            "rpn": {
                "assigner": _assigner(0.7, 0.3, 0.3, low_quality=True),
                "sampler": _sampler(64, 0.5, add_truth=False),
                "allowed_border": -1 if not cascade else 0,
                "pos_weight": -1,
                "debug": False,
            },
            "rpn_proposal": {**_PROPOSALS, "nms_pre": 500, "max_per_img": 150},
            "rcnn": rcnn_training if cascade else rcnn_training[0],
        },
        "test_cfg": {
            "rpn": {**_PROPOSALS, "nms_pre": 300, "max_per_img": 100},
            "rcnn": {
                "score_thr": 0.05,
                "nms": {"type": "nms", "iou_threshold": 0.5},
                "max_per_img": 100,
                "mask_thr_binary": 0.5,
            },
        },
    }


_PROPOSALS: dict[str, Any] = {"nms": {"type": "nms", "iou_threshold": 0.7}, "min_bbox_size": 0}


def detector_config(name: str) -> DetectorConfig:
    """A mini detector's configuration with its test transforms and classes, as the COCO task takes them."""
    from tasks.detection.data import DetectorConfig, test_pipeline

    return DetectorConfig(config(name), test_pipeline(IMAGE_SIZE, IMAGE_SIZE), CLASSES)


# ---- models ----------------------------------------------------------------------------------------------------------


def build(name: str, seed: int = 0) -> nn.Module:
    """An untrained mini detector (fp32, eval()).

    Args:
        name: one of `names()`.
        seed: of the initialisation; the global random state is left as it was.

    Raises:
        IasvitError: no such mini detector, or the coco extra is not installed.
    """
    return build_detector(config(name), seed)


def start_from_zoo(model: nn.Module, name: str, folder: Path | None = None) -> None:
    """Give a mini detector's backbone the weights of the mini classification backbone of its kind.

    Args:
        model: of `build(name)`; changed in place. Its output norms keep their initial weights.
        name: the mini detector's.
        folder: of the zoo's checkpoints; the repository's own unless given.

    Raises:
        IasvitError: the zoo has no checkpoint of that backbone.
    """
    from mmdet.models.backbones.swin import swin_converter

    state: dict[str, Tensor] = {}
    for key, value in zoo.load(split_name(name)[1], folder=folder).state_dict().items():
        part, number, *rest = key.split(".")
        if part == "norm":
            continue
        if part == "layers" and rest[0] == "downsample":  # timm counts a merging with the stage after it
            number = str(int(number) - 1)
        state[".".join((part, number, *rest))] = value
    converted = {key.removeprefix("backbone."): value for key, value in swin_converter(state).items()}
    own = model.backbone.state_dict()
    for key, value in converted.items():
        if key.endswith("relative_position_bias_table") and value.shape != own[key].shape:
            converted[key] = _resize_table(value, own[key].shape[0])
    missing, unexpected = model.backbone.load_state_dict(converted, strict=False)
    left = [key for key in missing if not key.startswith("norm") and not key.endswith("relative_position_index")]
    if left or unexpected:
        raise IasvitError(f"the zoo's weights do not fit the backbone of {name}: {', '.join([*left, *unexpected])}")


def start_from_detector(model: nn.Module, name: str, path: Path) -> None:
    """Give a mini detector the weights of a trained one, as far as they fit: backbone, neck, RPN and most of the heads.

    Args:
        model: changed in place.
        name: of the trained one, with the same backbone.
        path: its checkpoint.

    Raises:
        IasvitError: there is no such file, or it is of another model.
    """
    trained = zoo.load_weights(build(name), path).state_dict()
    own = model.state_dict()
    for key, value in own.items():
        # Each of Cascade's stages has its heads, which start from the single ones, and single ones from the first.
        single = re.sub(r"^(roi_head\.(bbox|mask)_head)\.\d+\.", r"\1.", key)
        first = re.sub(r"^(roi_head\.(bbox|mask)_head)\.", r"\1.0.", single)
        source = next((trained[name] for name in (key, single, first) if name in trained), None)
        if source is not None and source.shape == value.shape:  # its box regressors are one for all classes
            own[key] = source
    model.load_state_dict(own)


def _resize_table(table: Tensor, rows: int) -> Tensor:
    """A relative-position bias table ((2w - 1)²×heads) for another window, as Swin's authors do."""
    before, after = round(len(table) ** 0.5), round(rows**0.5)
    square = table.T.reshape(1, -1, before, before)
    return nn.functional.interpolate(square, size=(after, after), mode="bicubic").reshape(-1, rows).T.contiguous()


def checkpoint_path(name: str, folder: Path | None = None) -> Path:
    """Where the checkpoint of that mini detector lies, there or not."""
    return zoo.checkpoint_path(name, folder)


def trained_path(name: str, folder: Path | None = None) -> Path:
    """The checkpoint of that mini detector.

    Raises:
        IasvitError: no such mini detector, or no checkpoint of it.
    """
    split_name(name)
    path = checkpoint_path(name, folder)
    if not path.is_file():
        raise IasvitError(
            f"mini detector {name!r} has no checkpoint {path}; `python -m tasks.studies.train_detectors --detector "
            f"{name}` makes it"
        )
    return path


def load(name: str, folder: Path | None = None) -> nn.Module:
    """A trained mini detector (fp32, eval(), on the CPU).

    Args:
        name: one of `names()`.
        folder: of the checkpoints; the repository's own unless given.

    Raises:
        IasvitError: no such mini detector, no checkpoint of it, or one that does not fit.
    """
    return zoo.load_weights(build(name), trained_path(name, folder))
