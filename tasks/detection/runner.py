"""Evaluation by mmengine's runner. Imports mmengine and mmcv, so that it is itself imported where it is needed."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import BaseDataset
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from iasvit import distributed
from iasvit.benchmark.harness import device_of
from iasvit.errors import IasvitError, reason
from iasvit.progress import Progress
from iasvit.scratch import scratch
from tasks.detection.mmdet_setup import prepare

if TYPE_CHECKING:
    from mmdet.evaluation import CocoMetric

_numbers = itertools.count()  # mmengine's logs and hubs live as long as the process, and are told apart by name
_NO_HOOKS = ("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint")


class ReadableImage(LoadImageFromFile):
    """mmcv's loader, except that it names an image that it cannot read, and can ignore an EXIF orientation.

    Of an image's entry it reads "as_stored", whether the orientation is ignored, and "width" and "height", which the
    image must have; each may be left out.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """See mmcv.

        Raises:
            IasvitError: the file is missing, no image, or one of another size.
        """
        loader = copy.copy(self)
        if results.get("as_stored") and self.color_type in ("color", "grayscale"):
            loader.color_type = f"{self.color_type}_ignore_orientation"
        given = results.get("height"), results.get("width")
        try:
            results = LoadImageFromFile.transform(loader, results)
        except Exception as error:  # whatever the decoder of the day raises
            raise IasvitError(f"image {results['img_path']} cannot be read: {reason(error)}") from None
        found = results["img"].shape[:2]
        if None not in given and given != found:
            raise IasvitError(
                f"image {results['img_path']} is read as {found[1]}×{found[0]} pixels, but the annotations give "
                f"{given[1]}×{given[0]}"
            )
        return results


class EvaluatedImages(BaseDataset):
    """Images as mmengine's runner takes them.

    Args:
        images: of each "img_id", "img_path", "width", "height" and "as_stored" (see `ReadableImage`).
        classes: names of the model's classes.
        pipeline: transforms.
    """

    def __init__(self, images: list[dict[str, Any]], classes: Sequence[str], pipeline: list[dict[str, Any]]) -> None:
        self._images = images
        metainfo = {"classes": tuple(classes)}
        super().__init__(metainfo=metainfo, pipeline=pipeline, test_mode=True, serialize_data=False)

    def load_data_list(self) -> list[dict[str, Any]]:
        """See mmengine."""
        return self._images


class _Evaluation(Runner):
    """mmengine's runner, for a model that stays on its device: mmengine's own would move it to the first GPU."""

    def wrap_model(self, model_wrapper_cfg: Any, model: nn.Module) -> nn.Module:
        return model

    def _log_env(self, env_cfg: Any) -> None:
        """Rows of results say where they come from; to ask the compiler and driver takes seconds."""

    def set_randomness(self, *args: Any, **kwargs: Any) -> None:
        """Evaluation draws nothing, and must not seed others' generators."""
        self._seed, self._deterministic = 0, False


class _Bar(Hook):
    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.bar.update(len(outputs))


def evaluate(
    network: nn.Module, dataset: BaseDataset, metric: CocoMetric, progress: Progress, workers: int = 0
) -> dict[str, float]:
    """COCO's box and mask AP of a detector, in percent: "bbox_mAP", "bbox_mAP_50" … "segm_mAP_l".

    A part of which the data has no object is NaN; a detector that finds nothing has 0. Processes share the images by
    mmengine's sampler, which gives some of them twice where they cannot be shared evenly; its metric drops those.

    Args:
        network: mmdet's detector or a quantized one, on its device.
        dataset: images, one a batch.
        metric: of the same images; used once.
        progress: shows a bar in the phase "evaluation".
        workers: processes that read images; 0 for none.

    Raises:
        IasvitError: an image cannot be read.
    """
    prepare()
    metric.collect_device = "gpu"  # by messages, and not by files in the current folder; on a CPU too
    device = device_of(network)
    loader = {
        "batch_size": 1,
        "num_workers": workers,
        "persistent_workers": False,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "dataset": dataset,
    }
    with (
        scratch("evaluation-") as folder,
        progress.phase("evaluation", len(dataset) // distributed.world_size()) as bar,
        contextlib.redirect_stdout(io.StringIO()),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        runner = _Evaluation(
            model=network,
            work_dir=str(folder),
            test_dataloader=loader,
            test_evaluator=Evaluator([metric]),
            test_cfg={},
            default_hooks=dict.fromkeys(_NO_HOOKS),
            custom_hooks=[_Bar(bar)],
            log_level="ERROR",
            default_scope="mmdet",
            experiment_name=f"iasvit-{next(_numbers)}-{folder.name}",
        )
        try:
            measured = runner.test()
        except IasvitError as error:
            # A worker process's error comes with its traceback before the message.
            raise IasvitError(str(error).rpartition("IasvitError: ")[2].strip()) from None
    return percentages(measured, metric)


METRICS = tuple(f"{kind}_mAP{part}" for kind in ("bbox", "segm") for part in ("", "_50", "_75", "_s", "_m", "_l"))


def percentages(measured: dict[str, float], metric: CocoMetric) -> dict[str, float]:
    """METRICS in percent from what mmdet's metric gives: fractions, -1 where the data has no such object."""
    if not measured:  # what the metric gives where no object was found at all
        sizes = _sizes_annotated(metric)
        measured = {f"coco/{name}": 0.0 if sizes[name.rpartition("_")[2]] else -1.0 for name in METRICS}
    values = {name: measured[f"coco/{name}"] for name in METRICS}
    # mmdet rounds to a thousandth; 100 times that is not always a tenth in binary.
    return {name: round(100 * value, 1) if value >= 0 else float("nan") for name, value in values.items()}


def _sizes_annotated(metric: CocoMetric) -> dict[str, bool]:
    """For the last part of a metric's name, whether an object of that size is annotated in the metric's images."""
    coco = metric._coco_api
    areas = np.array([a["area"] for a in coco.load_anns(coco.get_ann_ids(img_ids=metric.img_ids)) if not a["iscrowd"]])
    edges = {"s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
    present = {part: bool(((areas >= low) & (areas <= high)).any()) for part, (low, high) in edges.items()}
    return {**present, "mAP": True, "50": True, "75": True}
