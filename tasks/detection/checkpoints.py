"""The published Swin detectors for COCO: their configurations, where their weights are, and key names of old files.

Short names are the papers' detectors, with the weights of the Swin authors (github.com/SwinTransformer); mmdet's own
go by mmdet's names. Configurations are built from those in the mmdet package.
"""

from __future__ import annotations

import re
import urllib.error
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iasvit.errors import IasvitError, reason
from tasks.checkpoints import fill, read_checkpoint
from tasks.detection.mmdet_setup import prepare

_AUTHORS = "https://github.com/SwinTransformer/storage/releases/download/v1.0.2/"
_MMDET = "https://download.openmmlab.com/mmdetection/v2.0/swin/"


@dataclass(frozen=True)
class Published:
    """Weights that can be had.

    Attributes:
        url: of the file.
        detector: the short name of its architecture.
    """

    url: str
    detector: str


PUBLISHED: dict[str, Published] = {
    # 3x schedule; box and mask mAP 46.0 / 41.6, 48.5 / 43.3, 50.4 / 43.7, 51.9 / 45.0 and 51.9 / 45.0.
    "mask_rcnn_swin_t": Published(_AUTHORS + "mask_rcnn_swin_tiny_patch4_window7.pth", "mask_rcnn_swin_t"),
    "mask_rcnn_swin_s": Published(_AUTHORS + "mask_rcnn_swin_small_patch4_window7.pth", "mask_rcnn_swin_s"),
    "cascade_mask_rcnn_swin_t": Published(
        _AUTHORS + "cascade_mask_rcnn_swin_tiny_patch4_window7.pth", "cascade_mask_rcnn_swin_t"
    ),
    "cascade_mask_rcnn_swin_s": Published(
        _AUTHORS + "cascade_mask_rcnn_swin_small_patch4_window7.pth", "cascade_mask_rcnn_swin_s"
    ),
    "cascade_mask_rcnn_swin_b": Published(
        _AUTHORS + "cascade_mask_rcnn_swin_base_patch4_window7.pth", "cascade_mask_rcnn_swin_b"
    ),
    # mmdet's: box and mask mAP 42.7 / 39.3, 46.0 / 41.6, 46.0 / 41.7 and 48.2 / 43.2.
    "mask-rcnn_swin-t-p4-w7_fpn_1x_coco": Published(
        _MMDET + "mask_rcnn_swin-t-p4-w7_fpn_1x_coco/mask_rcnn_swin-t-p4-w7_fpn_1x_coco_20210902_120937-9d6b7cfa.pth",
        "mask_rcnn_swin_t",
    ),
    "mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco": Published(
        _MMDET + "mask_rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco/"
        "mask_rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco_20210906_131725-bacf6f7b.pth",
        "mask_rcnn_swin_t",
    ),
    "mask-rcnn_swin-t-p4-w7_fpn_amp-ms-crop-3x_coco": Published(
        _MMDET + "mask_rcnn_swin-t-p4-w7_fpn_fp16_ms-crop-3x_coco/"
        "mask_rcnn_swin-t-p4-w7_fpn_fp16_ms-crop-3x_coco_20210908_165006-90a4008c.pth",
        "mask_rcnn_swin_t",
    ),
    "mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco": Published(
        _MMDET + "mask_rcnn_swin-s-p4-w7_fpn_fp16_ms-crop-3x_coco/"
        "mask_rcnn_swin-s-p4-w7_fpn_fp16_ms-crop-3x_coco_20210903_104808-b92c91f1.pth",
        "mask_rcnn_swin_s",
    ),
}

_BACKBONES: dict[str, dict[str, Any]] = {
    "swin_t": {"embed_dims": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.2},
    "swin_s": {"embed_dims": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.2},
    "swin_b": {"embed_dims": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.3},
}
_BASES = {"mask_rcnn": "mask-rcnn_r50_fpn.py", "cascade_mask_rcnn": "cascade-mask-rcnn_r50_fpn.py"}


def model_config(name: str) -> dict[str, Any]:
    """The `model` part of a full-size detector's configuration, for COCO's 80 classes.

    Mask R-CNN is mmdet's. The box heads of Cascade Mask R-CNN are the Swin authors': four convolutions with batch
    norm and one linear layer, a box for each class, trained by GIoU.

    Args:
        name: "mask_rcnn" or "cascade_mask_rcnn", with "_swin_t", "_swin_s" or "_swin_b"; or a name of PUBLISHED.

    Raises:
        IasvitError: there is no such detector, or the coco extra is not installed.
    """
    name = PUBLISHED[name].detector if name in PUBLISHED else name
    match = re.fullmatch(r"(\w+)_(swin_[tsb])", name)
    if match is None or match[1] not in _BASES:
        known = [f"{detector}_{backbone}" for detector in _BASES for backbone in _BACKBONES]
        known += [other for other in PUBLISHED if other not in known]
        raise IasvitError(f"detector {name!r} does not exist; there are {', '.join(known)}")
    prepare()
    import mmdet
    from mmengine.config import Config

    base = Path(mmdet.__file__).parent / ".mim" / "configs" / "_base_" / "models" / _BASES[match[1]]
    config: dict[str, Any] = Config.fromfile(str(base)).model.to_dict()
    backbone = _BACKBONES[match[2]]
    config["backbone"] = {
        "type": "SwinTransformer",
        "patch_size": 4,
        "window_size": 7,
        "mlp_ratio": 4,
        "qkv_bias": True,
        "patch_norm": True,
        "out_indices": (0, 1, 2, 3),
        **backbone,
    }
    config["neck"]["in_channels"] = [backbone["embed_dims"] * 2**stage for stage in range(4)]
    if match[1] == "cascade_mask_rcnn":
        for head in config["roi_head"]["bbox_head"]:
            head.update(
                type="ConvFCBBoxHead",
                num_shared_convs=4,
                num_shared_fcs=1,
                conv_out_channels=256,
                reg_class_agnostic=False,
                reg_decoded_bbox=True,
                norm_cfg={"type": "SyncBN", "requires_grad": True},
                loss_bbox={"type": "GIoULoss", "loss_weight": 10.0},
            )
    return config


def convert_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a detector with the Swin authors' key names under mmdet's; others are returned as they are.

    The two call the backbone's parts differently, and patch merging reads its four neighbours in another order. Neck
    and heads are called alike.
    """
    if not any(key.startswith("backbone.layers.") for key in state):
        return state
    prepare()
    from mmdet.models.backbones.swin import swin_converter

    prefix = "backbone."
    backbone = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {**swin_converter(backbone), **{key: value for key, value in state.items() if not key.startswith(prefix)}}


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Put the weights in a file into a detector, in place: mmdet's key names, or those of the Swin authors.

    Every key must be there, and no other.

    Raises:
        IasvitError: the file cannot be read, or is of another detector; the message names what does not fit.
    """
    state = read_checkpoint(path)
    try:
        state = convert_keys(state)
    except Exception as error:  # mmdet's converter: a patch merging of a shape that cannot be reordered
        raise IasvitError(
            f"checkpoint {path} does not fit the model: its patch merging is damaged ({reason(error)})"
        ) from None
    fill(model, state, path)


def download(name: str) -> Path:
    """The file of published weights, fetched into torch.hub's folder unless it lies there.

    Args:
        name: one of PUBLISHED.

    Raises:
        IasvitError: it could not be fetched.
    """
    url = PUBLISHED[name].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.is_file():
        return path
    digits = re.search(r"-([0-9a-f]{8})\.pth$", url)  # of the file's SHA-256
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digits[1] if digits else None)
    except (OSError, urllib.error.URLError, RuntimeError) as error:
        raise IasvitError(
            f"the weights of {name} could not be fetched from {url} ({reason(error)}); with no network, give them as "
            f"--checkpoint FILE, or take random ones with --no-pretrained"
        ) from None
    return path
