"""What tests/test_distributed.py runs in one process and in two, of the COCO task."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from iasvit.cli import main
from tasks.coco import app
from tasks.detection.mmdet_setup import prepare
from tasks.mini import detection

torch.set_num_threads(1)
detection.VAL_IMAGES = 3  # to draw all takes seconds
prepare()


def measure(folder: Path) -> None:
    """A mini detector in full precision and with weights of 6 bits."""
    options = ["--detector", "mask_rcnn", "--bits", "W6A6", "--method", "rtn", "--calib-size", "1"]
    sys.argv = ["coco.py", *options, "--results", "runs"]
    main(app)
