"""`--data folder`: classes, splits, names, images without labels, image sizes, and what bad folders are told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import commands
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from iasvit.benchmark.results import ResultStore, read_rows
from iasvit.leaderboard.aggregate import measured_documents
from tasks.classification.folders import AnyFolderImages, class_order, folder_dataset, split
from tasks.classification.models import TimmModels
from tasks.classification.setup import make_setup, reserved_names
from tasks.imagenet import ImageNetTask, app

SAMPLE = Path(__file__).parents[3] / "shared" / "imagenet-sample"
MODEL = "test_vit"  # timm's own for tests: 160 pixels, patches of 16
run = partial(commands.run, app)
complaint = partial(commands.complaint, app)
Fill = Callable[..., Path]


@pytest.fixture
def fill(tmp_path: Path) -> Fill:
    """fill(folder, count, ...) writes so many images, each of its own colour, into tmp_path/data/folder."""

    def write(folder: str, count: int, suffix: str = "png", shade: int = 0) -> Path:
        (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (20 * i, shade, 99)).save(tmp_path / "data" / folder / f"{i}.{suffix}")
        return tmp_path / "data"

    return write


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """MODEL with 3 classes, for 64 pixels."""
    torch.manual_seed(0)
    path = tmp_path / "three.safetensors"
    save_file(timm.create_model(MODEL, num_classes=3, img_size=64).state_dict(), path)
    return path


def names(samples: list[tuple[str, int]], root: Path) -> list[tuple[str, int]]:
    return [(Path(path).relative_to(root).as_posix(), label) for path, label in samples]


# ---- classes and splits --------------------------------------------------------------------------------------------


def test_class_order_is_numeric_where_all_names_are_whole_numbers() -> None:
    assert class_order({"10", "2", "1"}) == ["1", "2", "10"]
    assert class_order({"10", "2", "x"}) == ["10", "2", "x"]
    assert class_order({"b", "B", "a"}) == ["B", "a", "b"]  # as torchvision's ImageFolder
    assert class_order({"1", "²"}) == ["1", "²"]


@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("training", "validation")])
def test_val_is_evaluated_and_train_of_any_names_calibrated_on(fill: Fill, train: str, val: str) -> None:
    for name in ("2", "10"):
        root = fill(f"{val}/{name}", 2)
    fill(f"{train}/whatever/deep", 2)
    fill(train, 3)
    images = AnyFolderImages(root)
    evaluated = [("2/0.png", 0), ("2/1.png", 0), ("10/0.png", 1), ("10/1.png", 1)]
    assert names(images.evaluated, root / val) == evaluated
    assert images.num_classes == {2: None}
    expected = ["0.png", "1.png", "2.png", "whatever/deep/0.png", "whatever/deep/1.png"]
    assert [name for name, _ in names(images.calibration_samples, root / train)] == expected


@pytest.mark.parametrize("inside", ["", "val/", "train/"])
def test_class_folders_alone_are_split(fill: Fill, inside: str) -> None:
    for name, count in (("a", 10), ("b", 2), ("c", 1)):
        root = fill(inside + name, count)
    images, again = AnyFolderImages(root), AnyFolderImages(root)
    calibration, evaluated = images.calibration_samples, images.evaluated
    assert (calibration, evaluated) == (again.calibration_samples, again.evaluated)
    assert not set(calibration) & set(evaluated)
    assert len(set(calibration) | set(evaluated)) == 13
    assert [sum(label == i for _, label in calibration) for i in range(3)] == [2, 1, 0]
    assert [label for _, label in evaluated] == [0] * 8 + [1] + [2]


def test_images_are_in_the_order_of_labels(fill: Fill) -> None:
    fill("a", 2)
    images = AnyFolderImages(fill("B", 2))  # before "a" among classes, after it in natural order
    assert images.num_classes == {2: None}
    assert [Path(path).parent.name for path, _ in images.evaluated] == ["B", "a"]


def test_the_split_does_not_move_with_other_classes_or_the_global_seed() -> None:
    samples = [(f"a/{i}", 0) for i in range(50)]
    first = split(samples)
    torch.manual_seed(5)
    torch.rand(3)
    again = split([*samples, ("b/0", 1), ("b/1", 1)])
    assert [s for s in again[0] if s[1] == 0] == first[0]
    assert len(first[0]) == 10
    assert first[0] != samples[:10]  # drawn, not the first


def test_what_lies_beside_is_counted(fill: Fill, caplog: pytest.LogCaptureFixture) -> None:
    root = fill("val/a", 1)
    fill("val/b", 1)
    fill("val", 2)
    (root / "val" / "a" / "notes.txt").touch()
    (root / "test").mkdir()
    (root / "val" / ".cache").mkdir()
    images = AnyFolderImages(root)
    assert len(images) == 2
    assert caplog.messages == [
        f"{root}: left out what is neither train/ nor val/: test",
        f"{root / 'val'}: left out files that lie in no class folder (2): 0.png, 1.png",
        f"{root / 'val'}: left out files that are no images by their extension (1): notes.txt",
    ]


def test_imagenet_takes_all_formats_too(fill: Fill) -> None:
    for suffix in ("webp", "bmp", "tiff", "gif", "png"):
        root = fill("val/n01440764", 1, suffix)
    assert ImageNetTask(make_setup("imagenet", root, pretrained=False)).split_size == 5


# ---- names ---------------------------------------------------------------------------------------------------------


def test_the_data_set_is_named_by_the_folder_or_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "My Photos (2024)").mkdir()
    monkeypatch.chdir(tmp_path / "My Photos (2024)")
    assert folder_dataset(Path("."), None, True, reserved_names()) == "my-photos-2024"
    assert folder_dataset(Path("."), "cifar10-224", True, reserved_names()) == "cifar10-224"
    assert folder_dataset(Path("."), "cifar10-224", False, reserved_names()) == "cifar10-224-unlabelled"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, f"'{name}', since mini") for name in ("mini", "mini-hard", "imagenette", "imagenet", "published")),
        ("x-unlabelled", "end in -unlabelled are taken"),
        ("a/b", "--data-name a-b"),
        ("CIFAR", "--data-name cifar"),
        ("", "--data-name my-images"),
    ],
)
def test_names_that_a_folder_cannot_have(
    fill: Fill, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, expected: str
) -> None:
    root = fill("a", 2)
    sentence = complaint(monkeypatch, capsys, "--data", "folder", "--data-root", root, f"--data-name={name}")
    assert expected in sentence, sentence
    if name in reserved_names():  # the folder's own name is no better
        root = root.rename(root.with_name(name))
        assert expected in complaint(monkeypatch, capsys, "--data", "folder", "--data-root", root)


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_bad_folders(fill: Fill, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def says(*args: object) -> str:
        return complaint(monkeypatch, capsys, "--data", "folder", "--no-pretrained", *args)

    assert "give --data-root FOLDER" in says()
    root = fill("", 0)
    assert f"{root} is empty" in says("--data-root", root)
    assert f"{root} is empty" in says("--data-root", root, "--no-labels")
    assert "nowhere does not exist" in says("--data-root", root / "nowhere")
    fill("a", 2)
    assert "0.png is a file" in says("--data-root", root / "a" / "0.png")
    assert "holds no class folder" in (sentence := says("--data-root", root / "a"))
    assert "--no-labels" in sentence
    assert "holds one class folder, a/" in says("--data-root", root)
    for name in "cdefg":
        (root / name).mkdir()
    (root / "c" / "text.txt").touch()
    assert "class folders without an image: c, d, e and 2 more" in says("--data-root", root)
    assert "c holds no image (.jpg" in says("--data-root", root / "c", "--no-labels")


def test_bad_options(
    fill: Fill, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root = fill("a", 10)
    fill("b", 10)
    base = ["--data", "folder", "--data-root", root, "--backbone", MODEL, "--results", tmp_path / "runs"]

    def says(*args: object) -> str:
        return complaint(monkeypatch, capsys, *base, *args)

    sentence = says("--checkpoint", checkpoint, "--calib-size", 4)
    assert "'test_vit' has 3 classes, but the labels of data are of 2" in sentence
    assert "--no-labels" in sentence
    fill("c", 10)
    assert "--calib-size is 7, but the calibration share of" in (
        sentence := says("--checkpoint", checkpoint, "--calib-size", 7)
    )
    assert "6 images" in sentence
    assert "--img-size is 0" in says("--img-size", 0)
    assert "--img-size is 65, but backbone 'test_vit' has patches of 16" in says("--no-pretrained", "--img-size", 65)
    arguments = ["--no-pretrained", "--backbone", "resnet18", "--img-size", 64]
    assert "'resnet18' is not made for one image size" in complaint(monkeypatch, capsys, *base[:4], *arguments)
    unlabelled = ["--no-labels", "--no-pretrained", "--backbone", "vit_small_patch14_dinov2", "--calib-size", 1]
    assert "has no classifier" in complaint(monkeypatch, capsys, *base[:4], *unlabelled)
    for data in ("mini", "imagenette", "imagenet"):
        assert f"--data-name does not go with --data {data}" in complaint(
            monkeypatch, capsys, "--data", data, "--data-name", "x"
        )
        assert f"--no-labels does not go with --data {data}" in complaint(
            monkeypatch, capsys, "--data", data, "--no-labels"
        )
    assert "--img-size does not go with --data mini" in complaint(monkeypatch, capsys, "--img-size", 64)
    assert not (tmp_path / "runs").exists()


# ---- image sizes ---------------------------------------------------------------------------------------------------


def test_the_image_size_is_the_checkpoints_or_the_one_given(checkpoint: Path) -> None:
    plain, inferred, given = (
        TimmModels(pretrained=False),
        TimmModels(checkpoint=checkpoint),
        TimmModels(checkpoint=checkpoint, img_size=96),
    )
    for models, size in ((plain, 160), (inferred, 64), (given, 96)):
        models.check(MODEL)
        network = models.load(MODEL)
        assert network.patch_embed.img_size == models.architecture(MODEL).patch_embed.img_size == (size, size)
        assert models.config(MODEL)["input_size"] == (3, size, size)
        assert network(torch.zeros(1, 3, size, size)).shape == (1, 1000 if models is plain else 3)
        assert models.weights(MODEL).endswith(f", {size} pixels") == (models is not plain)
    stored = inferred.load(MODEL).pos_embed
    assert torch.equal(given.load(MODEL).pos_embed[:, 0], stored[:, 0])  # the class token's; the others are resampled
    same = TimmModels(pretrained=False, img_size=160)
    assert same.weights(MODEL) == plain.weights(MODEL)


def test_a_position_embedding_of_no_square_is_not_inferred_from(tmp_path: Path) -> None:
    state = dict(timm.create_model(MODEL).state_dict())
    state["pos_embed"] = torch.zeros(1, 1 + 7, 64)
    save_file(state, tmp_path / "odd.safetensors")
    assert TimmModels(checkpoint=tmp_path / "odd.safetensors").config(MODEL)["input_size"] == (3, 160, 160)


# ---- runs ----------------------------------------------------------------------------------------------------------


def test_runs_with_and_without_labels_are_told_apart(
    fill: Fill, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, name in enumerate("abc"):
        root = fill(name, 5, shade=100 * i)
    (root / "b" / "0.png").write_bytes(b"damaged")
    monkeypatch.chdir(tmp_path)
    args = ["--data", "folder", "--data-root", root, "--backbone", MODEL, "--checkpoint", checkpoint, "--method", "rtn"]
    args += ["--calib-size", 2, "--bits", "W4A4", "--device", "cpu", "--results", "runs"]
    assert run(monkeypatch, *args) == 0
    captured = capsys.readouterr()
    assert "imagenet on data, W4A4: top1, 12 images" in captured.out
    assert captured.err.count("b/0.png cannot be read") == 1
    assert run(monkeypatch, *args, "--no-labels") == 0
    out = capsys.readouterr().out
    assert "imagenet on data-unlabelled, W4A4: agreement, 12 images" in out
    assert "| fp32              | 100.00" in out
    assert "top1" not in out
    labelled, _ = read_rows(Path("runs/imagenet-data.csv"))
    unlabelled, _ = read_rows(Path("runs/imagenet-data-unlabelled.csv"))
    assert [row["dataset"] for row in labelled + unlabelled] == ["data"] * 2 + ["data-unlabelled"] * 2
    assert {row["unreadable"] for row in labelled} == {1}
    assert labelled[1]["fp_top1"] is not None
    assert all(row["weights"].endswith(", 64 pixels") for row in labelled)
    assert "top1" not in unlabelled[1]
    assert unlabelled[1]["fp_agreement"] == 100
    documents = {document.name: document for document in measured_documents(labelled + unlabelled)}
    assert list(documents) == ["imagenet-data-w4a4", "imagenet-data-unlabelled-w4a4"]
    assert "measured on real data" in documents["imagenet-data-w4a4"].title
    assert "top1" not in documents["imagenet-data-unlabelled-w4a4"].sections
    assert "agreement, 12 images" not in documents["imagenet-data-w4a4"].sections
    assert ResultStore("runs").rows()["top1"].isna().sum() == 2


def test_without_labels_any_tree_and_any_number_of_classes_will_do(fill: Fill) -> None:
    root = fill("", 7)
    fill("deep/deeper", 3)
    task = ImageNetTask(make_setup("folder", root, pretrained=False, labels=False))
    assert (task.split_size, len(task.images.calibration_samples)) == (8, 2)
    assert [metric.name for metric in task.scored if metric.primary] == ["agreement"]
    task.check_classes(MODEL, task.load_model(MODEL))
    fill("train", 4)
    fill("val", 2)
    task = ImageNetTask(make_setup("folder", root, pretrained=False, labels=False))
    assert (task.split_size, len(task.images.calibration_samples)) == (2, 4)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the sample of real ImageNet photographs is not beside the repository")
def test_the_sample_as_a_folder() -> None:
    task = ImageNetTask(make_setup("folder", SAMPLE, pretrained=False, limit=10))
    assert (task.data.name, task.images.num_classes) == ("imagenet-sample", {800: None})
    assert len(task.images.calibration_samples) == 200
    assert task.images.evaluated[-1][1] == 799
