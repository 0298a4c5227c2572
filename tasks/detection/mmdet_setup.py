"""mmdet as the COCO task uses it: operators routed, modules registered, detectors built from configurations."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tasks.detection.ops import install


def prepare() -> None:
    """Make mmdet's modules, transforms and metrics known to mmengine's registries. A second call does nothing.

    Raises:
        IasvitError: the coco extra is not installed.
    """
    install()
    from mmdet.utils import register_all_modules
    from mmengine.registry import DefaultScope

    current = DefaultScope.get_current_instance()
    if current is None or current.scope_name != "mmdet":
        register_all_modules(init_default_scope=True)


@contextmanager
def quiet_mmengine() -> Iterator[None]:
    """Let mmengine's logger say nothing below an error; it would print a line for each parameter initialised."""
    from mmengine.logging import MMLogger

    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def build_detector(config: dict[str, Any], seed: int = 0, initialise: bool = True) -> nn.Module:
    """A detector (fp32, eval(), on the CPU) from its mmdet configuration, whatever weights that one names left out.

    Args:
        config: the configuration's `model`.
        seed: of the initial weights; the global random state is left as it was.
        initialise: draw mmdet's initial weights; else they are torch's own, for a model that is filled next.

    Raises:
        IasvitError: the coco extra is not installed.
    """
    prepare()
    from mmdet.registry import MODELS
    from mmengine.config import ConfigDict

    config = ConfigDict(config)
    if "backbone" in config:
        config.backbone.pop("init_cfg", None)  # a download
    with torch.random.fork_rng(devices=[]), quiet_mmengine():
        torch.manual_seed(seed)
        model: nn.Module = MODELS.build(config)
        if initialise:
            model.init_weights()
    return model.eval()
