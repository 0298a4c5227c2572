"""The scenes that mini detectors learn from: drawn when a step needs them, and never again."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from tasks.mini.detection import IMAGE_SIZE, PackedScenes, pack

STRIDE = 1_000_000_000  # training scenes between one seed's and the next's


def scenes_of_step(seed: int, step: int, batch_size: int, rank: int = 0, processes: int = 1) -> PackedScenes:
    """The scenes that one process sees in one step: no other step, process or seed sees them.

    Args:
        seed: of the run.
        step: number, from 0.
        batch_size: of all processes together, a multiple of their number.
        rank: of the process.
        processes: how many there are.
    """
    own = batch_size // processes
    # Scenes without objects are left out, so that each process has the double of its share to draw from.
    return pack("train", seed * STRIDE + 2 * own * (step * processes + rank), own)


class Prefetch:
    """The batches of the steps to come, each drawn while the step before it runs."""

    def __init__(self, draw: Callable[[int], PackedScenes], first: int) -> None:
        self._draw = draw
        self._pool = ThreadPoolExecutor(1)
        self._next = self._pool.submit(draw, first)

    def take(self, step: int) -> PackedScenes:
        """The batch of the next step, which is of this number."""
        batch, self._next = self._next.result(), self._pool.submit(self._draw, step + 1)
        return batch

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def to_batch(scenes: PackedScenes, flip: bool, generator: np.random.Generator) -> dict[str, list]:
    """Scenes as a detector's data preprocessor takes them in training: BGR images and samples with their objects."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    inputs, samples = [], []
    shape = (IMAGE_SIZE, IMAGE_SIZE)
    for row in range(len(scenes)):
        image = scenes.images[row]
        classes, boxes, masks = scenes.objects(row)
        if flip:
            turns, mirror = int(generator.integers(4)), bool(generator.integers(2))
            image, boxes, masks = turned(image, boxes, masks, turns, mirror)
        sample = DetDataSample(
            metainfo={"img_id": row, "img_shape": shape, "ori_shape": shape, "scale_factor": (1.0, 1.0)}
        )
        sample.gt_instances = InstanceData(
            labels=torch.from_numpy(classes),
            bboxes=torch.from_numpy(np.ascontiguousarray(boxes)),
            masks=BitmapMasks(np.ascontiguousarray(masks, dtype=np.uint8), *shape),
        )
        inputs.append(torch.from_numpy(np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1))))
        samples.append(sample)
    return {"inputs": inputs, "data_samples": samples}


def turned(
    image: np.ndarray, boxes: np.ndarray, masks: np.ndarray, turns: int, mirror: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A square image (H×H×3), its boxes (k×4) and masks (k×H×H) after quarter turns to the left and a mirroring."""
    size = len(image)
    x0, y0, x1, y1 = boxes.T
    for _ in range(turns):
        image, masks = np.rot90(image), np.rot90(masks, axes=(1, 2))
        x0, y0, x1, y1 = y0, size - x1, y1, size - x0
    if mirror:
        image, masks = image[:, ::-1], masks[:, :, ::-1]
        x0, x1 = size - x1, size - x0
    return image, np.stack([x0, y0, x1, y1], axis=1).astype(np.float32), masks
