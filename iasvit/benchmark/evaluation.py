"""Measure the file of a saved model on a task."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import torch

from iasvit.artifact import Quantization, load
from iasvit.benchmark.harness import device_of
from iasvit.benchmark.task import Metric, Task
from iasvit.errors import IasvitError
from iasvit.models import describe
from iasvit.progress import Progress


@dataclass(frozen=True)
class Evaluation:
    """What a saved model scores.

    Attributes:
        quantization: how the model was made.
        scores: metric → value, of the task's `scored`.
        full_precision: the same of the model in full precision.
    """

    quantization: Quantization
    scores: dict[str, float]
    full_precision: dict[str, float]

    def table(self, metrics: tuple[Metric, ...]) -> str:
        """These metrics in Markdown."""
        lines = ["| metric | quantized | full precision |", "|---|--:|--:|"]
        for metric in metrics:
            values = (f"{scores[metric.name]:.{metric.digits}f}" for scores in (self.scores, self.full_precision))
            lines.append(f"| {metric.name} | {' | '.join(values)} |")
        return "\n".join(lines)


@torch.no_grad()
def evaluate_file(task: Task, path: str | os.PathLike[str], model: str, progress: Progress | None = None) -> Evaluation:
    """Evaluate a saved model and the full-precision one that it comes from on the task's whole split.

    Args:
        task: where data and full-precision model come from.
        path: of `iasvit.save`, or of `run_cells(save=...)`.
        model: the full-precision model's name in the task.
        progress: where to report to; None for silence.

    Raises:
        IasvitError: no such file or model, or the file has another architecture than the model.
    """
    progress = progress or Progress()
    quantized = load(path)
    network = task.load_model(model)
    if json.loads(json.dumps(describe(network))) != quantized.quantization.architecture:
        raise IasvitError(f"{path} has another architecture than {model}; name the model that it was made from")
    quantized.to(device_of(network))
    reference = task.predict(model, network, progress)
    outputs = task.predict(model, quantized, progress)
    return Evaluation(quantized.quantization, task.score(outputs, reference), task.score(reference, reference))
