"""Mini detectors: the real ones' layout in small, weights from the zoo, and training that resumes to the bit."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("mmdet", reason="the coco extra is not installed")

from iasvit.errors import IasvitError
from tasks.detection.checkpoints import model_config
from tasks.mini import detectors, zoo
from tasks.mini.detection import IMAGE_SIZE, pack
from tasks.mini.scenes import CLASSES
from tasks.studies import train_detectors
from tasks.studies.training import detector_trainer
from tasks.studies.training.detector_data import scenes_of_step, to_batch, turned
from tasks.studies.training.detector_trainer import Run, Trainer
from tasks.studies.training.optimization import make_optimizer
from tasks.studies.training.recipes import Recipe


def structure(config: object) -> object:
    """A configuration without its sizes, training and losses."""
    sizes = {"num_classes", "in_channels", "out_channels", "feat_channels", "fc_out_channels", "conv_out_channels"}
    sizes |= {"embed_dims", "patch_size", "strides", "featmap_strides", "finest_scale", "pretrain_img_size"}
    if isinstance(config, dict):
        skip = sizes | {"drop_path_rate", "train_cfg", "loss_bbox", "max_per_img", "nms_pre"}
        return {key: structure(value) for key, value in config.items() if key not in skip}
    return [structure(value) for value in config] if isinstance(config, (list, tuple)) else config


@pytest.mark.parametrize("name", ["mask_rcnn_swin_t", "mask_rcnn_swin_s"])
def test_mini_mask_rcnn_has_the_real_ones_layout(name: str) -> None:
    mini, real = structure(detectors.config(name)), structure(model_config(name))
    assert set(mini) == set(real)
    for part in ("backbone", "neck", "rpn_head", "roi_head", "test_cfg"):
        assert mini[part] == real[part], part
    for key, value in model_config(name)["data_preprocessor"].items():
        own = detectors.config(name)["data_preprocessor"][key]
        assert own == (pytest.approx(value) if isinstance(value, list) else value), key


@pytest.mark.parametrize("backbone", detectors.BACKBONES)
def test_mini_cascade_has_three_stages_on_the_same_backbone(backbone: str) -> None:
    mini, mask = detectors.config(f"cascade_mask_rcnn_{backbone}"), detectors.config(f"mask_rcnn_{backbone}")
    assert mini["type"] == "CascadeRCNN"
    assert (mini["backbone"], mini["neck"]) == (mask["backbone"], mask["neck"])
    real = model_config(f"cascade_mask_rcnn_{backbone}")
    stages = [stage["assigner"]["pos_iou_thr"] for stage in mini["train_cfg"]["rcnn"]]
    assert stages == [stage["assigner"]["pos_iou_thr"] for stage in real["train_cfg"]["rcnn"]] == [0.5, 0.6, 0.7]
    stds = [head["bbox_coder"]["target_stds"] for head in mini["roi_head"]["bbox_head"]]
    assert stds == [list(head["bbox_coder"]["target_stds"]) for head in real["roi_head"]["bbox_head"]]


@pytest.mark.parametrize("name", detectors.names())
def test_a_checkpoint_is_small_and_comes_back(name: str, tmp_path: Path) -> None:
    model = detectors.build(name, seed=3)
    zoo.save(model, detectors.checkpoint_path(name, tmp_path), {})
    assert detectors.checkpoint_path(name, tmp_path).stat().st_size <= detectors.MAX_BYTES
    loaded = detectors.load(name, tmp_path)
    assert not loaded.training
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value.half().to(value.dtype)), key


def test_every_stage_pads_its_maps() -> None:
    """128×128 images at strides 2, 4, 8, 16: no map is a multiple of the window of 7."""
    assert all((IMAGE_SIZE // stride) % 7 for stride in detectors.STRIDES[:4])


def test_seeds_and_the_global_generator() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (detectors.build("mask_rcnn_swin_t", seed).state_dict() for seed in (0, 0, 1))
    key = "rpn_head.rpn_conv.weight"
    assert torch.equal(first[key], again[key])
    assert not torch.equal(first[key], other[key])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_names() -> None:
    assert detectors.split_name("cascade_mask_rcnn_swin_s") == ("cascade_mask_rcnn", "swin_s")
    with pytest.raises(IasvitError, match=r"'mask_rcnn_swin_b' does not exist; there are mask_rcnn_swin_t"):
        detectors.build("mask_rcnn_swin_b")


def test_no_checkpoint_says_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(IasvitError, match=r"train_detectors --detector mask_rcnn_swin_t"):
        detectors.load("mask_rcnn_swin_t", tmp_path)


# ---- weights to start from -------------------------------------------------------------------------------------------


def test_a_backbone_from_the_zoo_computes_what_the_zoos_does(tmp_path: Path) -> None:
    """timm's and mmdet's Swin name parts otherwise, and put the norm of patch merging in another order."""
    generator = torch.Generator().manual_seed(0)
    classifier = zoo.build("swin_t", seed=1)
    for parameter in classifier.parameters():
        parameter.data = (parameter + 0.1 * torch.randn(parameter.shape, generator=generator)).half().float()
    zoo.save(classifier, zoo.checkpoint_path("swin_t", tmp_path), {})
    detector = detectors.build("mask_rcnn_swin_t", seed=2)
    detectors.start_from_zoo(detector, "mask_rcnn_swin_t", tmp_path)
    images = torch.randn(2, 3, zoo.IMAGE_SIZE, zoo.IMAGE_SIZE, generator=generator)
    with torch.no_grad():
        maps = detector.backbone(images)
        x = classifier.patch_embed(images)
        # The last stage's windows are cut to 4×4 in the classifier, so that only the first three can be compared.
        for layer, found in zip(classifier.layers[:3], maps, strict=False):
            x = layer(x)
            expected = F.layer_norm(x, x.shape[-1:]).permute(0, 3, 1, 2)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    table = detector.backbone.stages[3].blocks[1].attn.w_msa.relative_position_bias_table
    stored = classifier.layers[3].blocks[1].attn.relative_position_bias_table
    # The middle of the table, offset 0, stays in the middle.
    torch.testing.assert_close(table[len(table) // 2], stored[len(stored) // 2], rtol=1e-3, atol=1e-3)


def test_the_zoo_without_that_backbone(tmp_path: Path) -> None:
    with pytest.raises(IasvitError, match=r"swin_s\.safetensors does not exist"):
        detectors.start_from_zoo(detectors.build("mask_rcnn_swin_s"), "mask_rcnn_swin_s", tmp_path)


def test_cascade_starts_from_mask_rcnn(tmp_path: Path) -> None:
    trained = detectors.build("mask_rcnn_swin_t", seed=5)
    path = detectors.checkpoint_path("mask_rcnn_swin_t", tmp_path)
    zoo.save(trained, path, {})
    cascade = detectors.build("cascade_mask_rcnn_swin_t", seed=6)
    detectors.start_from_detector(cascade, "mask_rcnn_swin_t", path)
    state, source = cascade.state_dict(), zoo.as_stored(trained)
    for key in source:
        if key.startswith(("backbone.", "neck.", "rpn_head.", "roi_head.mask_head")):
            for stage in range(3 if "mask_head" in key else 1):
                target = key.replace("mask_head.", f"mask_head.{stage}.")
                assert torch.equal(state[target], source[key].to(state[target].dtype)), target
    for stage in range(3):
        key = "shared_fcs.0.weight"
        assert torch.equal(state[f"roi_head.bbox_head.{stage}.{key}"], source[f"roi_head.bbox_head.{key}"].float())


# ---- training --------------------------------------------------------------------------------------------------------


def small_run(out: Path, **changes: object) -> Run:
    run = Run("mask_rcnn_swin_t", Recipe(batch_size=2), 0, "cpu", out, steps=4, val_images=2)
    return dataclasses.replace(run, **changes)


def test_mask_rcnn_starts_from_the_first_stage_of_a_cascade(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = detectors.build("cascade_mask_rcnn_swin_t", seed=5)
    path = detectors.checkpoint_path("cascade_mask_rcnn_swin_t", tmp_path)
    zoo.save(trained, path, {})
    model, start = detector_trainer.start_model(small_run(tmp_path, init=path))
    assert start == "cascade_mask_rcnn_swin_t"
    state, source = model.state_dict(), zoo.as_stored(trained)
    for key in ("roi_head.bbox_head.{}shared_fcs.0.weight", "roi_head.mask_head.{}convs.0.conv.weight"):
        assert torch.equal(state[key.format("")], source[key.format("0.")].float())
    for key, value in source.items():
        if key.startswith(("backbone.", "neck.", "rpn_head.")):
            assert torch.equal(state[key], value.to(state[key].dtype)), key
    options = ["--steps", "1", "--out", str(tmp_path / "out"), "--init"]
    other = ["--detector", "mask_rcnn_swin_s", *options, str(path)]
    missing = ["--detector", "mask_rcnn_swin_t", *options, str(tmp_path / "mask_rcnn_swin_t.safetensors")]
    backbone = ["--detector", "mask_rcnn_swin_t", *options, str(tmp_path / "swin_t.safetensors")]
    for arguments, message in (
        (other, "another backbone than mask_rcnn_swin_s"),
        (missing, "mask_rcnn_swin_t.safetensors"),
        (backbone, "swin_t"),
    ):
        assert train_detectors.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_turned_objects_are_the_objects_of_the_turned_image() -> None:
    scenes = pack("train", 0, 3)
    for row in range(3):
        _, boxes, masks = scenes.objects(row)
        for turns in range(4):
            for mirror in (False, True):
                image, moved, moved_masks = turned(scenes.images[row], boxes, masks, turns, mirror)
                expected = np.rot90(scenes.images[row], turns)
                assert np.array_equal(image, expected[:, ::-1] if mirror else expected)
                for mask, box in zip(moved_masks, moved, strict=True):
                    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                    assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_batches_hold_the_scenes_in_blue_green_red() -> None:
    scenes = pack("train", 0, 2)
    batch = to_batch(scenes, flip=False, generator=np.random.default_rng(0))
    for row, (image, sample) in enumerate(zip(batch["inputs"], batch["data_samples"], strict=True)):
        classes, boxes, masks = scenes.objects(row)
        assert np.array_equal(image.numpy()[::-1].transpose(1, 2, 0), scenes.images[row])
        truth = sample.gt_instances
        assert np.array_equal(truth.labels.numpy(), classes)
        assert np.array_equal(truth.bboxes.numpy(), boxes)
        assert np.array_equal(truth.masks.masks, masks)


def test_no_two_steps_processes_or_seeds_share_scenes() -> None:
    seen = set()
    for seed in (0, 1):
        for step in range(3):
            for rank in range(2):
                images = scenes_of_step(seed, step, 4, rank, processes=2).images
                assert len(images) == 2
                seen |= {image.tobytes() for image in images}
    assert len(seen) == 2 * 3 * 2 * 2


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_detectors, "measure", lambda *args: {"bbox_mAP": 1.0, "segm_mAP": 2.0})
    whole, cut = small_run(tmp_path / "whole"), small_run(tmp_path / "cut", stop_after=0.0)
    train_detectors.run_all(whole)
    advance = Trainer.advance

    def interrupted(*arguments: object) -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        return advance(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", interrupted)
        train_detectors.run_all(dataclasses.replace(cut, stop_after=None))  # Ctrl-C: the step is finished
    for _ in range(3):
        assert not zoo.checkpoint_path(whole.detector, tmp_path / "cut").is_file() or cut.state_path.is_file()
        train_detectors.run_all(cut)  # one step each
    assert not cut.state_path.exists()
    first, second = (detectors.load(whole.detector, run.out).state_dict() for run in (whole, cut))
    assert all(torch.equal(first[key], second[key]) for key in first)
    start, _ = detector_trainer.start_model(whole)
    assert not torch.equal(first["neck.lateral_convs.0.conv.weight"], start.neck.lateral_convs[0].conv.weight.half())
    log = (tmp_path / "cut" / train_detectors.LOG_NAME).read_text().splitlines()
    assert [line.split(",")[2] for line in log[1:]] == ["1", "2", "3", "4"]
    assert [line.split(",")[-1] for line in log[1:]] == ["0", "0", "0", "1"]


def test_two_processes_average_their_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over processes is what one process computes from the mean of their losses."""
    run = small_run(tmp_path, processes=2)
    gradients = []
    for rank in range(2):
        trainer = Trainer(run, rank)
        monkeypatch.setattr(detector_trainer, "average_gradients", lambda parameters, processes: None)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, limit: torch.tensor(1.0))
        trainer.advance(trainer.scenes(0), 0.5)
        gradients.append([p.grad.clone() for p in trainer.parameters])
    monkeypatch.undo()
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients[0]]
    for parameter, gradient in zip(parameters, gradients[0], strict=True):
        parameter.grad = gradient.clone()
    other = torch.cat([gradient.flatten() for gradient in gradients[1]])
    monkeypatch.setattr(detector_trainer.dist, "all_reduce", lambda flat: flat.add_(other))
    detector_trainer.average_gradients(parameters, 2)
    for parameter, first, second in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(parameter.grad, (first + second) / 2)
    assert any(not torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def test_mmengine_takes_no_process_of_many_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logger looks for the GPU number LOCAL_RANK, and there are fewer GPUs than processes."""
    seen: list[str] = []

    class Stopped(Exception):
        pass

    def trainer(run: Run, rank: int) -> None:
        seen.append(os.environ["LOCAL_RANK"])
        raise Stopped

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(train_detectors, "Trainer", trainer)
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(train_detectors.dist, name, lambda *args: None)
    monkeypatch.setattr(train_detectors.dist, "get_rank", lambda: 3)
    with pytest.raises(Stopped):
        train_detectors.train(small_run(tmp_path, processes=4))
    assert seen == ["0"]


def test_another_runs_state_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_detectors, "measure", lambda *args: {"bbox_mAP": 1.0, "segm_mAP": 2.0})
    train_detectors.run_all(small_run(tmp_path, stop_after=0.0))
    with pytest.raises(IasvitError, match=r"other options \(seed, steps\)"):
        train_detectors.run_all(small_run(tmp_path, steps=9, seed=1))
    path = small_run(tmp_path).state_path
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(IasvitError, match=r"state\.pt cannot be read .* delete it"):
        train_detectors.run_all(small_run(tmp_path))


def test_weight_decay_spares_norms_biases_and_positions() -> None:
    model = detectors.build("mask_rcnn_swin_t")
    optimizer = make_optimizer(model, Recipe(weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1 and "position_bias" not in name), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "2", "--processes", "3"], "--batch-size 16 is not a multiple of --processes 3"),
        (["--steps", "2", "--device", "cuda:99"], "no usable CUDA device"),
    ],
)
def test_bad_options(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = ["--detector", "mask_rcnn_swin_t", "--out", str(tmp_path), *arguments]
    assert train_detectors.main(options) == 2
    assert message in capsys.readouterr().err


def test_measured_values_are_cocos(tmp_path: Path) -> None:
    scores = train_detectors.measure(detectors.build("mask_rcnn_swin_t"), "mask_rcnn_swin_t", 2)
    assert 0 <= scores["bbox_mAP"] < 5
    assert len(CLASSES) == 16


@pytest.mark.slow
@pytest.mark.parametrize("name", detectors.names())
def test_a_committed_detector_finds_what_it_is_said_to(name: str) -> None:
    path = detectors.trained_path(name)
    assert path.stat().st_size <= detectors.MAX_BYTES
    stated = zoo.read_metadata(name)
    assert stated["bbox_mAP"] > 40
    assert stated["segm_mAP"] > 40
    measured = train_detectors.measure(detectors.load(name), name, val_images=40)
    for kind in ("bbox_mAP", "segm_mAP"):
        assert abs(measured[kind] - stated[kind]) < 8  # 40 of the 500 images
