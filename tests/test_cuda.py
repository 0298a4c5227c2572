"""What only a GPU does: steps replayed as a graph, and a run that goes on from a checkpoint."""

from __future__ import annotations

import csv
import dataclasses
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from baselines.glf_q import GLFQ
from iasvit import sos, steps
from iasvit.progress import Progress
from iasvit.reconstruction import SegmentJob
from iasvit.sos import IASViT
from iasvit.spec import QuantSpec
from tasks.mini import zoo
from tasks.studies import train
from tasks.studies.training.backbone_data import Batches
from tasks.studies.training.backbone_step import Stepper
from tasks.studies.training.recipes import BackboneRecipe, Recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
OPTIONS = {"iterations": 6, "batch_size": 5, "lr": 1e-3}


def quantize(checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
    model, images = tiny_models.vit().cuda(), tiny_models.images().cuda()
    return IASViT(**OPTIONS).quantize(model, images, QuantSpec(4, 4), Progress(checkpoint=checkpoint)).state_dict()


def test_replayed_steps_learn_what_eager_steps_do(monkeypatch: pytest.MonkeyPatch) -> None:
    replayed = quantize()
    monkeypatch.setattr(steps._Step, "EAGER", 1000)
    eager = quantize()
    for name, value in eager.items():
        torch.testing.assert_close(replayed[name], value, msg=name)


def test_replayed_steps_of_block_methods_learn_what_eager_steps_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """GLF-Q learns the weights that quantizers read as they are, behind the frozen rest of the network."""
    method = GLFQ(iterations=6, batch_size=5, lr=1e-3, relu=False, rotation=False, init_size=5)

    def quantized() -> dict[str, torch.Tensor]:
        model, images = tiny_models.vit().cuda(), tiny_models.images().cuda()
        return method.quantize(model, images, QuantSpec(4, 4), Progress()).state_dict()

    replayed = quantized()
    monkeypatch.setattr(steps._Step, "EAGER", 1000)
    for name, value in quantized().items():
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


# ---- training studies ------------------------------------------------------------------------------------------------


def backbone_steps(compile: bool, graph: bool, steps: int = 9) -> tuple[list[float], Stepper]:
    """Losses of so many steps on one batch, and the stepper after them; images are not augmented."""
    recipe = BackboneRecipe(lr=3e-4, batch_size=8, shift=0, flip=False, jitter=0.0, warmup=0.5)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, 3, zoo.IMAGE_SIZE, zoo.IMAGE_SIZE), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, zoo.NUM_CLASSES, (8,), generator=generator).cuda()
    model = zoo.build("deit_t").cuda().train()
    stepper = Stepper(
        model, Batches(pixels.cuda(), recipe, (0.5,) * 3, (0.5,) * 3), labels, "deit_t", compile=compile, graph=graph
    )
    losses = []
    for step in range(steps):
        stepper(torch.arange(8), step / steps)
        losses.append(float(stepper.loss))
    return losses, stepper


def test_a_backbones_captured_steps_learn_what_plain_ones_do() -> None:
    plain, stepper = backbone_steps(compile=False, graph=False)
    assert stepper.cuda_graph is None
    assert plain[-1] < plain[0] - 0.1
    captured, stepper = backbone_steps(compile=False, graph=True)
    assert stepper.cuda_graph is not None
    assert captured == pytest.approx(plain, rel=0.01)
    before = {name: value.clone() for name, value in stepper.model.state_dict().items()}
    stepper(torch.arange(8), 1.0)  # a replay reads the learning rate of its step, which at the end is 0
    assert tiny_models.same_bits(stepper.model.state_dict(), before)
    stepper(torch.arange(8), 0.5)
    assert not tiny_models.same_bits(stepper.model.state_dict(), before)


@pytest.mark.slow
def test_a_backbones_compiled_and_captured_steps_learn_what_plain_ones_do() -> None:
    plain, _ = backbone_steps(compile=False, graph=False)
    compiled, stepper = backbone_steps(compile=True, graph=True)
    assert stepper.cuda_graph is not None
    assert any(module._compiled_call_impl is not None for module in stepper.model.modules())  # no fallback
    assert compiled == pytest.approx(plain, rel=0.02)


def test_a_backbones_run_is_interrupted_and_started_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--backbone", "deit_t", "--device", "cuda", "--no-compile", "--steps", "16", "--train-images", "40"]
    options += ["--val-images", "12", "--batch-size", "16", "--workers", "1", "--evaluations", "2"]
    options += ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    accuracy, measured = train.accuracy, []

    def interrupted(*arguments: Any) -> float:
        if measured:
            raise KeyboardInterrupt
        measured.append(accuracy(*arguments))
        return measured[-1]

    with monkeypatch.context() as patch:
        patch.setattr(train, "accuracy", interrupted)
        assert train.main(options) == 130
    path = zoo.checkpoint_path("deit_t", tmp_path / "out")
    assert zoo.read_metadata("deit_t", path.parent)["step"] == 8
    assert train.main([*options, "--init", str(path)]) == 0
    with (path.parent / train.LOG_NAME).open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["start"], row["final"]) for row in rows] == [
        ("8", "random", "0"),
        ("8", "deit_t", "0"),
        ("16", "deit_t", "1"),
    ]
    assert {row["device"] for row in rows} == {torch.cuda.get_device_name()}
    assert all(math.isfinite(float(row["train_loss"])) for row in rows)


def test_a_detectors_run_is_interrupted_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mmdet", reason="the coco extra is not installed")
    from tasks.mini import detectors
    from tasks.studies import train_detectors
    from tasks.studies.training.detector_trainer import Run, Trainer, start_model

    monkeypatch.setattr(train_detectors, "measure", lambda *_: {"bbox_mAP": 1.0, "segm_mAP": 2.0})
    whole = Run("mask_rcnn_swin_t", Recipe(batch_size=2), 0, "cuda", tmp_path / "whole", steps=4)
    cut = dataclasses.replace(whole, out=tmp_path / "cut")
    train_detectors.run_all(whole)
    advance, losses = Trainer.advance, []

    def interrupted(self: Trainer, *arguments: Any) -> torch.Tensor:
        if self.step == 1:
            signal.raise_signal(signal.SIGINT)
        losses.append(advance(self, *arguments))
        return losses[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", interrupted)
        train_detectors.run_all(cut)
    assert len(losses) == 2  # the step in which the signal came is finished
    saved, resumed = torch.load(cut.state_path, weights_only=True), Trainer(cut, 0)
    assert (resumed.step, resumed.device.type) == (2, "cuda")
    assert tiny_models.same_bits(resumed.model.state_dict(), saved["model"])
    moments = resumed.optimizer.state_dict()["state"]
    assert len(moments) == len(resumed.parameters)
    for number, values in saved["optimizer"]["state"].items():
        assert tiny_models.same_bits(moments[number], values)
    train_detectors.run_all(cut)
    assert not cut.state_path.exists()
    rows = [line.split(",") for line in (cut.out / train_detectors.LOG_NAME).read_text().splitlines()[1:]]
    assert [(row[2], row[-1]) for row in rows] == [("2", "0"), ("4", "1")]
    first, second = (detectors.load(whole.detector, run.out).state_dict() for run in (whole, cut))
    start, key = start_model(whole)[0].state_dict(), "backbone.stages.0.blocks.0.ffn.layers.0.0.weight"
    assert not torch.equal(first[key], start[key].half().float())
    for name, value in first.items():  # the GPU adds in no fixed order
        torch.testing.assert_close(second[name], value, rtol=0.05, atol=0.01, msg=name)
