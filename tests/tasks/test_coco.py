"""The COCO task: detectors by name, scope, cells, and what the command says to bad input."""

from __future__ import annotations

import ast
import json
from functools import partial
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("mmdet", reason="the coco extra is not installed")

from iasvit.benchmark.results import ResultStore
from iasvit.errors import IasvitError
from iasvit.methods import list_methods
from iasvit.models import insert_quantizers
from iasvit.nn import quant_layers
from iasvit.progress import Progress
from iasvit.quantizers import UniformQuantizer
from tasks.coco import CocoTask, app
from tasks.command import make_cells
from tasks.detection import checkpoints, data, models, ops, runner
from tasks.detection.data import CocoImages, MiniCocoImages
from tasks.detection.models import ConfigDetector, MiniDetectors, PublishedDetectors, coco_classes
from tasks.detection.setup import PAPER, Backbone, Data, Scope, make_setup, model_names, scoped
from tasks.mini import detection, detectors, scenes, zoo

METRICS = [metric.name for metric in CocoTask.metrics]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mini COCO of 6 images: to draw all takes seconds."""
    monkeypatch.setattr(detection, "VAL_IMAGES", 6)


@pytest.fixture
def coco_root(tmp_path: Path) -> Path:
    """A folder in COCO's layout, of mini scenes."""
    root = tmp_path / "coco"
    detection.write(root, "val2017", "val", 3)
    detection.write(root, "train2017", "calibration", 2)
    return root


# ---- names, scope and cells ------------------------------------------------------------------------------------------


def test_models_are_detectors_on_backbones() -> None:
    names = model_names(None, [Backbone.swin_s, Backbone.swin_t, Backbone.swin_s], Data.mini)
    assert names == [f"{d}_{b}" for d in ("mask_rcnn", "cascade_mask_rcnn") for b in ("swin_s", "swin_t")]
    assert model_names(["mask_rcnn"], None, Data.coco) == ["mask_rcnn_swin_t"]
    full = "mask-rcnn_swin-t-p4-w7_fpn_1x_coco"
    assert model_names([full, "mask_rcnn"], None, Data.coco) == [full, "mask_rcnn_swin_t"]
    with pytest.raises(IasvitError, match="'faster_rcnn' does not exist; there are mask_rcnn"):
        model_names(["faster_rcnn"], None, Data.mini)
    with pytest.raises(IasvitError, match="does not exist"):
        model_names([full], None, Data.mini)
    with pytest.raises(IasvitError, match="--backbone does not go with"):
        model_names([full], [Backbone.swin_s], Data.coco)


def quantized_layers(bits: str, scope: Scope) -> dict[str, int]:
    """Layer of a mini detector → bits of its weights."""
    model = detectors.build("mask_rcnn_swin_t")

    def quantizer(site: Any) -> UniformQuantizer:
        return UniformQuantizer(site.n_bits)

    quantized = insert_quantizers(model, scoped(bits, scope), quantizer, quantizer)
    return {name: layer.weight_quantizer.n_bits for name, layer in quant_layers(quantized)}


def test_scope_says_what_is_quantized() -> None:
    everything, backbone = (quantized_layers("W4A4", scope) for scope in (Scope.detector, Scope.backbone))
    parts = {name.partition(".")[0] for name in everything}
    assert parts == {"backbone", "neck", "rpn_head", "roi_head"}
    assert {name.partition(".")[0] for name in backbone} == {"backbone"}
    assert backbone == {name: n for name, n in everything.items() if name.startswith("backbone.")}
    assert set(everything.values()) == {4}


def test_an_override_wins_over_the_scope() -> None:
    layers = quantized_layers("W4A4,rpn_head.rpn_conv=W8A8", Scope.backbone)
    assert {name: n for name, n in layers.items() if not name.startswith("backbone.")} == {"rpn_head.rpn_conv": 8}


def test_scopes_are_different_rows() -> None:
    assert str(scoped("W4A4", Scope.detector)) == "W4A4"
    assert str(scoped("W4A4", Scope.backbone)) == "W4A4,neck.*=W32A32,rpn_head.*=W32A32,roi_head.*=W32A32"


def test_cells_have_the_options_that_their_method_takes() -> None:
    specs = [scoped("W4A4", Scope.detector), scoped("W6A6", Scope.detector)]
    cells = make_cells(["mask_rcnn_swin_t"], specs, ["ias_vit", "repq_vit", "rtn"], [0], 256, PAPER, {})
    options = {(cell.method, cell.spec): dict(cell.options) for cell in cells}
    assert options["ias_vit", "W4A4"] == {"iterations": 1000, "batch_size": 1, "lr": 4e-5, "init_size": 4}
    assert options["ias_vit", "W6A6"]["iterations"] == 200
    assert options["repq_vit", "W4A4"] == {"init_size": 4}
    assert options["rtn", "W4A4"] == {}


def test_no_code_of_the_task_knows_a_method_by_name() -> None:
    for path in (ROOT / "tasks").glob("coco*.py"):
        tree = ast.parse(path.read_text())
        texts = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not {text for text in texts if text in list_methods()}, path
        assert not names & set(list_methods()), path
        assert "baselines" not in path.read_text(), path


# ---- detectors -------------------------------------------------------------------------------------------------------


def test_mini_detectors_load_their_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "CHECKPOINTS", tmp_path)
    name = "cascade_mask_rcnn_swin_t"
    with pytest.raises(IasvitError, match="no checkpoint"):
        MiniDetectors().check(name)
    trained = detectors.build(name, seed=7)
    zoo.save(trained, detectors.checkpoint_path(name, tmp_path), {})
    loaded = MiniDetectors().load(name)
    state = loaded.state_dict()
    assert all(torch.equal(state[key], value.half().to(value.dtype)) for key, value in trained.state_dict().items())
    assert MiniDetectors().weights(name).startswith(f"{name}.safetensors sha256:")
    assert loaded.cfg.model["type"] == "CascadeRCNN"
    with pytest.raises(IasvitError, match="'mask_rcnn_swin_b' does not exist in the mini benchmark"):
        MiniDetectors().check("mask_rcnn_swin_b")


def test_random_weights_are_always_the_same() -> None:
    first, second = (MiniDetectors(pretrained=False).load("mask_rcnn_swin_t").state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert "random" in MiniDetectors(pretrained=False).weights("mask_rcnn_swin_t")


def test_a_checkpoint_of_another_detector_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    zoo.save(detectors.build("mask_rcnn_swin_s"), path, {})
    with pytest.raises(IasvitError, match=r"other\.safetensors does not fit the model: .*backbone") as error:
        MiniDetectors(checkpoint=path).load("mask_rcnn_swin_t")
    assert "\n" not in str(error.value)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(IasvitError, match="is missing"):
        MiniDetectors(checkpoint=path).load("mask_rcnn_swin_t")


def test_a_checkpoint_is_tried_before_anything_runs_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(IasvitError, match=r"other\.safetensors does not .*; weights of mask_rcnn_swin_t are expected"):
        MiniDetectors(checkpoint=path).check("mask_rcnn_swin_t")
    path = tmp_path / "text.pth"
    path.write_text("no weights")
    with pytest.raises(IasvitError, match=r"of tensors alone \([^.]*\); weights of") as error:
        MiniDetectors(checkpoint=path).check("mask_rcnn_swin_t")
    assert "weights_only" not in str(error.value)  # torch's advice to unpickle code
    tried: list[Path] = []
    monkeypatch.setattr(models, "load_checkpoint", lambda model, path: tried.append(path))
    mini = MiniDetectors(checkpoint=path)
    for _ in range(3):
        mini.check("mask_rcnn_swin_t")
    assert tried == [path]


def test_published_detectors_are_offered_where_there_are_weights() -> None:
    published = PublishedDetectors()
    published.check("cascade_mask_rcnn_swin_b")
    assert published.weights("mask_rcnn_swin_s") == "mask_rcnn_swin_small_patch4_window7.pth"
    assert published.config("mask_rcnn_swin_s").classes == coco_classes()
    with pytest.raises(IasvitError, match="no weights are published for mask_rcnn_swin_b"):
        published.check("mask_rcnn_swin_b")
    PublishedDetectors(pretrained=False).check("mask_rcnn_swin_b")


CONFIG = """
classes = ('a', 'b')
model = dict(
    type='MaskRCNN',
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[0, 0, 0], std=[1, 1, 1], pad_size_divisor=32),
    backbone=dict(type='{backbone}'),
    roi_head=dict(bbox_head=dict(num_classes={count})))
{more}
"""


def write_config(folder: Path, backbone: str = "SwinTransformer", count: int = 2, more: str = "") -> Path:
    path = folder / "mine.py"
    path.write_text(CONFIG.format(backbone=backbone, count=count, more=more))
    return path


def test_a_configuration_file_is_read(tmp_path: Path) -> None:
    detector = ConfigDetector(write_config(tmp_path), ("x", "y"), pretrained=False)
    config = detector.config("mine")
    assert config.classes == ("x", "y")
    assert config.pipeline[1]["scale"] == (1333, 800)
    more = "metainfo = dict(classes=classes)\n"
    more += "test_dataloader = dict(dataset=dict(metainfo=metainfo, pipeline=[dict(type='LoadImageFromFile')]))"
    config = ConfigDetector(write_config(tmp_path, "mmdet.SwinTransformer", more=more), (), False).config("mine")
    assert config.classes == ("a", "b")
    assert config.pipeline == [{"type": "LoadImageFromFile"}]


def test_mmdets_own_configuration_builds(tmp_path: Path) -> None:
    import mmdet

    path = Path(mmdet.__file__).parent / ".mim/configs/swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"
    detector = ConfigDetector(path, coco_classes(), pretrained=False)
    built = detector.architecture(path.stem)
    published = PublishedDetectors(pretrained=False).architecture("mask_rcnn_swin_t")
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (built, published)]
    assert shapes[0] == shapes[1]
    assert detector.config(path.stem).pipeline[0]["type"] == "LoadImageFromFile"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "ResNet"}, "has the backbone ResNet, but a Swin backbone is expected"),
        ({"count": 3}, "heads for 3 classes, but 2"),
        ({"more": "model = 3"}, "has no model"),
        ({"more": "1 / 0"}, "cannot be read: division by zero"),
        ({"more": "model.pop('data_preprocessor')"}, "no data_preprocessor"),
        (
            {"more": "test_dataloader = dict(dataset=dict(pipeline=[dict(type='Nope')]))"},
            "no LoadImageFromFile, but Nope",
        ),
        (
            {
                "more": "x = [dict(type='LoadImageFromFile'), dict(type='Nope')]\n"
                "test_dataloader = dict(dataset=dict(pipeline=x))"
            },
            "test pipeline that cannot be used: Nope is not in",
        ),
    ],
)
def test_configurations_that_cannot_be_used(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(IasvitError, match=message) as error:
        ConfigDetector(write_config(tmp_path, **options), ("x", "y"))
    assert "mine.py" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ("model['type'] = 'Nope'", "Nope is not in the .* registry"),
        ("", "missing 3 required positional arguments"),
    ],
)
def test_a_configuration_that_builds_no_detector_is_named(tmp_path: Path, more: str, reason: str) -> None:
    detector = ConfigDetector(write_config(tmp_path, more=more), ("x", "y"), pretrained=False)
    with pytest.raises(IasvitError, match=rf"configuration .*mine\.py builds no detector: .*{reason}") as error:
        detector.architecture("mine")
    assert "\n" not in str(error.value)


def test_a_configuration_needs_weights(tmp_path: Path) -> None:
    with pytest.raises(IasvitError, match="needs weights: give --checkpoint FILE"):
        ConfigDetector(write_config(tmp_path), ("x", "y")).check("mine")


# ---- the task --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_images")
def test_the_task_evaluates_what_it_loads() -> None:
    task = CocoTask(make_setup(Data.mini, pretrained=False, limit=2))
    assert task.split_size == 2
    network = task.load_model("mask_rcnn_swin_t")
    assert not network.training
    images = task.calibration("mask_rcnn_swin_t", 2, seed=0)
    assert images.shape == (2, 3, 128, 128)
    assert len(task.forward(network, images)) == 2
    outputs = task.predict("mask_rcnn_swin_t", network, Progress())
    assert set(task.score(outputs, outputs)) == set(METRICS)
    assert [metric.name for metric in task.scored if metric.primary] == ["bbox_mAP", "segm_mAP"]


def test_a_model_of_other_classes_than_the_data_is_refused(coco_root: Path) -> None:
    task = CocoTask(make_setup(Data.coco, coco_root, pretrained=False))
    with pytest.raises(IasvitError, match="no category 'person'"):
        task.load_model("mask_rcnn_swin_t")


# ---- the command -----------------------------------------------------------------------------------------------------


run = partial(commands.run, app)
complaint = partial(commands.complaint, app)


@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--detector", "faster_rcnn"], ["'faster_rcnn'", "cascade_mask_rcnn"]),
        (["--backbone", "swin_b"], ["'mask_rcnn_swin_b'", "mask_rcnn_swin_s", "--data coco"]),
        (["--bits", "W4"], ["'W4'", "W3A3"]),
        (["--bits", "W4A4,nosuch=W8A8"], ["'mask_rcnn_swin_t'", "override 'nosuch'"]),
        (["--method", "no_such"], ["'no_such'", "ias_vit"]),
        (["--limit", 7], ["--limit is 7", "1 to 6"]),
        (["--limit", 0], ["--limit is 0"]),
        (["--calib-size", 0], ["--calib-size is 0"]),
        (["--calib-size", 50_001], ["--calib-size is 50001", "50000"]),
        (["--init-size", 0], ["--init-size is 0"]),
        (["--iterations", -1], ["--iterations is -1"]),
        (["--batch-size", 0], ["--batch-size is 0"]),
        (["--seed", -1], ["--seed is -1"]),
        (["--lr", 0], ["lr is 0"]),
        (["--device", "nosuch"], ["--device nosuch", "cpu"]),
        (["--data-root", "."], ["--data-root", "--data coco"]),
        (["--checkpoint", "x.pth"], ["--checkpoint", "mask_rcnn_swin_t, cascade_mask_rcnn_swin_t"]),
        (["--checkpoint", "x.pth", "--detector", "mask_rcnn"], ["x.pth", "cannot be read"]),
        (["--config", "x.py"], ["x.py does not exist"]),
        (["--config", "x.py", "--backbone", "swin_t"], ["--config", "--backbone"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if value and str(value[0]).startswith("--") else None,
)
def test_bad_options(
    args: list, expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    sentence = complaint(monkeypatch, capsys, "--data", "mini", "--no-pretrained", *args)
    assert all(part in sentence for part in expected), sentence
    assert list(tmp_path.iterdir()) == []  # nothing written


def test_bad_data_folders(
    coco_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(*args: object) -> str:
        return complaint(monkeypatch, capsys, "--data", "coco", "--detector", "mask_rcnn", "--no-pretrained", *args)

    monkeypatch.delenv("IASVIT_COCO", raising=False)
    assert "set IASVIT_COCO" in says()
    assert "missing does not exist" in says("--data-root", tmp_path / "missing")
    monkeypatch.setenv("IASVIT_COCO", str(coco_root))
    assert "no category 'person'" in says()  # found; of other categories


def test_without_the_extra_the_command_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    sentence = complaint(monkeypatch, capsys)
    assert "is not installed: pip install" in sentence
    assert "coco" in sentence


@pytest.mark.usefixtures("few_images")
def test_dry_run_prints_the_cells_and_measures_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--no-pretrained", "--method", "ias_vit", "--bits", "W3A3", "--scope", "backbone", "--dry-run"]
    assert run(monkeypatch, *args, "--results", tmp_path / "runs") == 0
    out = capsys.readouterr().out
    for model in ("mask_rcnn_swin_t", "cascade_mask_rcnn_swin_t"):
        assert f"| {model} | ias_vit | W3A3,neck.*=W32A32" in out
    assert "rough, from one timed forward" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("few_images")
def test_a_run_prints_its_table_and_where_the_rows_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["--no-pretrained", "--detector", "mask_rcnn", "--method", "ias_vit", "--bits", "W6A6", "--results", "runs"]
    args += ["--calib-size", 2, "--init-size", 1, "--iterations", 1, "--batch-size", 1, "--limit", 2]
    assert run(monkeypatch, *args) == 0
    out = capsys.readouterr().out
    assert "bbox_mAP, 2 images" in out
    assert "segm_mAP, 2 images" in out
    assert str(Path("runs") / "coco-mini.csv") in out
    rows = ResultStore("runs").rows().set_index("method")
    assert list(rows.index) == ["fp32", "ias_vit"]
    assert set(METRICS) <= set(rows.columns)
    assert rows.loc["ias_vit", "options"] == "batch_size=1;init_size=1;iterations=1;lr=0.001"
    assert rows.loc["ias_vit", "fp_segm_mAP"] == rows.loc["fp32", "segm_mAP"]
    assert (rows["split_size"] == 2).all()
    assert rows["weights"].str.contains("random").all()
    assert run(monkeypatch, *args) == 0
    assert "stored already" in capsys.readouterr().err


def test_help_names_the_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run_script(ROOT / "tasks" / "coco.py", monkeypatch, "--help") == 0
    script = capsys.readouterr().out
    assert commands.run(None, monkeypatch, "run", "coco", "--help") == 0
    for out in (script, capsys.readouterr().out):
        for option in (
            "--backbone",
            "--detector",
            "--scope",
            "--config",
            "--checkpoint",
            "--bits",
            "--limit",
            "--save",
        ):
            assert option in out


# ---- fingerprints ----------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_annotations_and_files(coco_root: Path, tmp_path: Path) -> None:
    first = CocoImages(coco_root).fingerprint
    assert len(first) == 16
    root = coco_root.rename(tmp_path / "moved")
    assert CocoImages(root).fingerprint == first  # wherever the folder lies
    assert CocoImages(root, limit=2).fingerprint != first
    for part in ("val2017", "train2017"):
        before = CocoImages(root).fingerprint
        path = next((root / part).iterdir())
        path.write_bytes(path.read_bytes() + b" ")
        assert CocoImages(root).fingerprint != before
    path = root / "annotations" / "instances_val2017.json"
    content, before = json.loads(path.read_text()), CocoImages(root).fingerprint
    content["annotations"][0]["bbox"][0] += 1
    path.write_text(json.dumps(content))
    assert CocoImages(root).fingerprint != before


@pytest.mark.usefixtures("few_images")
def test_the_fingerprint_of_mini_is_of_the_scenes_version(monkeypatch: pytest.MonkeyPatch) -> None:
    first = MiniCocoImages().fingerprint
    assert MiniCocoImages().fingerprint == first != MiniCocoImages(3).fingerprint
    monkeypatch.setattr(scenes, "VERSION", scenes.VERSION + 1)
    assert MiniCocoImages().fingerprint != first


def test_a_threshold_is_part_of_the_configuration_and_a_path_is_not(tmp_path: Path) -> None:
    def of(more: str = "", folder: str = "") -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        path = write_config(tmp_path / folder, more=more)
        return ConfigDetector(path, ("x", "y"), pretrained=False).config("mine").fingerprint

    assert of() == of(folder="elsewhere")
    assert of("model['test_cfg'] = dict(rcnn=dict(score_thr=0.1))") != of(
        "model['test_cfg'] = dict(rcnn=dict(score_thr=0.2))"
    )
    weights = "model['backbone']['init_cfg'] = dict(type='Pretrained', checkpoint='somewhere.pth')"
    assert of(weights) == of()
    assert of("model['backbone'].update(depths=(1, 2), embed_dims=3)") == of(
        "model['backbone'].update(embed_dims=3, depths=[1, 2])"
    )
    with pytest.raises(IasvitError, match=r"mine\.py has a value that cannot identify a result: a complex"):
        of("model['odd'] = 1j")


def test_modules_import_without_mmdet() -> None:
    """All but the one that is imported where it is needed."""
    assert set(runner.METRICS) == set(METRICS)
    for module in (data, models, checkpoints):
        assert not hasattr(module, "mmdet")
