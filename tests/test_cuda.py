"""What only a GPU does: steps replayed as a graph, and a run that goes on from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch

from iasvit import reconstruction, sos
from iasvit.progress import Progress
from iasvit.reconstruction import SegmentJob
from iasvit.sos import IASViT
from iasvit.spec import QuantSpec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
OPTIONS = {"iterations": 6, "batch_size": 5, "lr": 1e-3}


def quantize(checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
    model, images = tiny_models.vit().cuda(), tiny_models.images().cuda()
    return IASViT(**OPTIONS).quantize(model, images, QuantSpec(4, 4), Progress(checkpoint=checkpoint)).state_dict()


def test_replayed_steps_learn_what_eager_steps_do(monkeypatch: pytest.MonkeyPatch) -> None:
    replayed = quantize()
    monkeypatch.setattr(reconstruction._Step, "EAGER", 1000)
    eager = quantize()
    for name, value in eager.items():
        torch.testing.assert_close(replayed[name], value, msg=name)


def test_a_run_resumes_on_the_gpu_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = quantize()
    stage = sos.IASViT.optimize_stage

    def interrupted(self: IASViT, job: SegmentJob, number: int, iterations: int) -> None:
        if job.segment.name == "blocks.1" and number == 3:
            raise KeyboardInterrupt
        stage(self, job, number, iterations)

    with monkeypatch.context() as patch:
        patch.setattr(sos.IASViT, "optimize_stage", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(tmp_path)
    assert tiny_models.same_bits(quantize(tmp_path), expected)
