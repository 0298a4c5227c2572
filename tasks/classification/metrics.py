"""Classification metrics: accuracy with its standard error, and how near a network stays to the full-precision one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from iasvit import distributed
from iasvit.benchmark.task import Metric
from iasvit.errors import IasvitError

CLASSIFICATION_METRICS = (
    Metric("top1", primary=True, standard_error="top1_se", minimum=0, maximum=100),
    Metric("top1_se"),
    Metric("top5", standard_error="top5_se", minimum=0, maximum=100),
    Metric("top5_se"),
    Metric("agreement", minimum=0, maximum=100),
    Metric("cosine", digits=4, minimum=-1, maximum=1),
    Metric("unreadable", digits=0, higher_is_better=False, counts=True),
)
# Those that need no labels.
UNLABELLED_METRICS = tuple(
    dataclasses.replace(metric, primary=metric.name == "agreement")
    for metric in CLASSIFICATION_METRICS
    if metric.name in ("agreement", "cosine", "unreadable")
)

HALF_ABOVE = 20_000  # images; beyond, logits are kept as float16: 1000 classes of 50 000 images are 100 MB then
_HALF_MAX = torch.finfo(torch.float16).max
_PIECE = 4096  # images


@dataclass(frozen=True)
class Predictions:
    """What a network outputs on a split, in host memory. n readable images, C classes.

    Each of several processes has its own share of the images.

    Attributes:
        logits: n×C, float32, or float16 for more than HALF_ABOVE images.
        top1: int64 n, the class with the largest logit, taken before any rounding to float16.
        rank: int64 n, how many classes stand before the label; 0 is a correct top-1.
        positions: int64 n, which images of the split these are.
        unreadable: images of the whole split that could not be read, and are in none of the above.
    """

    logits: Tensor
    top1: Tensor
    rank: Tensor
    positions: Tensor
    unreadable: int

    def __len__(self) -> int:
        return len(self.top1)

    @classmethod
    def collect(cls, batches: Iterable[tuple[Tensor, Tensor, Tensor]], total: int) -> Predictions:
        """Gather (logits B×C, labels B, positions B) batch by batch; `total` images were to be read, by all processes.

        Of classes with equal logits the one with the smaller index stands first, so that a network that outputs
        the same for every class gets no credit for it.

        Raises:
            IasvitError: NaN or Inf among the logits, or no image at all.
        """
        none = torch.zeros(0, dtype=torch.int64)
        parts = distributed.together(lambda: list(_ranked(batches, total > HALF_ABOVE)))
        parts = parts or [(torch.zeros(0, 1), none, none, none)]  # a share may be empty
        logits, top1, rank, positions = (torch.cat(part) for part in zip(*parts, strict=True))
        read = sum(distributed.gathered(lambda: len(top1)))
        if not read:
            raise IasvitError(f"none of the {total} images could be read")
        return cls(logits, top1, rank, positions, total - read)


def _ranked(
    batches: Iterable[tuple[Tensor, Tensor, Tensor]], half: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(logits, top1, rank, positions) of each batch, in host memory."""
    for logits, labels, positions in batches:
        logits, labels = logits.detach().float(), labels.to(logits.device)
        if not bool(logits.isfinite().all()):
            bad = int((~logits.isfinite()).any(dim=1).sum())
            raise IasvitError(f"the network outputs NaN or Inf for {bad} of {len(logits)} images of one batch")
        own = logits.gather(1, labels[:, None])
        smaller = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
        rank = ((logits > own) | ((logits == own) & smaller)).sum(dim=1)
        top1 = logits.argmax(dim=1)
        if half:
            logits = logits.clamp(-_HALF_MAX, _HALF_MAX).half()
        yield logits.cpu(), top1.cpu(), rank.cpu(), positions.cpu()


def standard_error(percent: float, n: int) -> float:
    """Standard error of a percentage of n independent trials, in percentage points: √(p(1 - p) / n)."""
    p = percent / 100
    return 100 * math.sqrt(max(p * (1 - p), 0.0) / n)


def classification_scores(predictions: Predictions, reference: Predictions) -> dict[str, float]:
    """CLASSIFICATION_METRICS of a network against the labels and against the full-precision network's predictions.

    top1, top5 and agreement (same top-1 class as the full-precision network) are percentages of the readable images,
    with binomial standard errors in percentage points; cosine is the mean over images of the cosine similarity of the
    two networks' logits; unreadable counts the images left out. All processes get the numbers of all their images, in
    the order of the split, the same to the bit as one process gets.

    Raises:
        IasvitError: the two were not made on the same images.
    """
    parts = distributed.gathered(lambda: _compared(predictions, reference))
    positions, ranks, same, cosines = (torch.cat(part) for part in zip(*parts, strict=True))
    order = positions.argsort()
    n = len(positions)
    top1, top5 = (100 * float((ranks < k).double().mean()) for k in (1, 5))
    cosine = sum(float(part.double().sum()) for part in cosines[order].split(_PIECE))
    return {
        "top1": top1,
        "top1_se": standard_error(top1, n),
        "top5": top5,
        "top5_se": standard_error(top5, n),
        "agreement": 100 * float(same.double().mean()),
        "cosine": cosine / n,
        "unreadable": predictions.unreadable,
    }


def _compared(predictions: Predictions, reference: Predictions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each image its position, the label's rank, whether the two top-1 classes are the same, and the cosine."""
    if not torch.equal(predictions.positions, reference.positions):
        raise IasvitError("images became readable or unreadable between the full-precision evaluation and this one")
    # In pieces: at float16 a split's logits are kept small, and one float32 copy of them would undo that.
    cosines = [
        F.cosine_similarity(ours.float(), theirs.float(), dim=1)
        for ours, theirs in zip(predictions.logits.split(_PIECE), reference.logits.split(_PIECE), strict=True)
    ]
    return predictions.positions, predictions.rank, predictions.top1 == reference.top1, torch.cat(cosines)
