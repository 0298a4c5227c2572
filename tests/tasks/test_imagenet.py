"""The ImageNet task: class mapping, damaged images, metrics, weights, cells, and what the command says to bad input."""

from __future__ import annotations

import math
import urllib.error
from collections.abc import Callable
from functools import partial
from pathlib import Path

import commands
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from iasvit.benchmark.harness import Cell
from iasvit.benchmark.results import ResultStore
from iasvit.benchmark.task import DataSet
from iasvit.errors import IasvitError
from iasvit.progress import Progress
from iasvit.spec import QuantSpec
from tasks.classification import folders, metrics
from tasks.classification.data import (
    FolderImages,
    ImagenetteImages,
    Images,
    MiniImages,
    fetch_imagenette,
    imagenet_classes,
    normalise,
    spread,
)
from tasks.classification.metrics import Predictions, classification_scores
from tasks.classification.models import PAPER_BACKBONES, MiniModels, TimmModels
from tasks.classification.setup import MINI, PAPER, Setup, make_setup
from tasks.command import make_cells
from tasks.imagenet import ImageNetTask, app
from tasks.mini import scenes, zoo

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT.parent / "shared" / "imagenet-sample"
# Of the 1000 classes: the first, one in the middle, the last. Of a tree with these three alone, positions are 0, 1, 2.
WNIDS = {"n01440764": 0, "n03028079": 497, "n15075141": 999}
COLOURS = dict(zip(WNIDS, [(250, 10, 10), (10, 250, 10), (10, 10, 250)], strict=True))
CONFIG = {
    "input_size": (3, 16, 16),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 0.9,
    "crop_mode": "center",
}


def save_image(path: Path, colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 20), colour).save(path, "JPEG", quality=95)


def damage(path: Path) -> None:
    """Cut a JPEG off in the middle of its pixels."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """train/ with 4 images a class, val/ with 3; three classes, each of its own colour."""
    for split, count in (("train", 4), ("val", 3)):
        for wnid, colour in COLOURS.items():
            for i in range(count):
                save_image(tmp_path / "data" / split / wnid / f"{wnid}_{i}.JPEG", colour)
    return tmp_path / "data"


class ColourNetwork(nn.Module):
    """Names the class of WNIDS that has the image's colour."""

    num_classes = 1000

    def forward(self, images: Tensor) -> Tensor:
        logits = images.new_full((len(images), 1000), -9.0)
        logits[:, list(WNIDS.values())] = images.mean(dim=(2, 3))
        return logits


class StubModels:
    """Models of the task that are no transformers."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def check(self, name: str) -> None: ...

    def load(self, name: str) -> nn.Module:
        return self.network.eval()

    def config(self, name: str) -> dict:
        return CONFIG

    def weights(self, name: str) -> str:
        return ""


def stub_task(images: Images, network: nn.Module | None = None) -> ImageNetTask:
    return ImageNetTask(Setup(DataSet("imagenet"), images, StubModels(network or ColourNetwork()), torch.device("cpu")))


def labels_of(images: FolderImages) -> list[int]:
    return [label for _, labels, _ in images.batches(CONFIG) for label in labels.tolist()]


# ---- class mapping -------------------------------------------------------------------------------------------------


def test_a_partial_imagenet_is_labelled_by_wordnet_id(tree: Path) -> None:
    images = FolderImages(tree)
    assert labels_of(images) == [0, 0, 0, 497, 497, 497, 999, 999, 999]
    task = stub_task(images)
    scores = task.score(*[task.predict("stub", ColourNetwork(), Progress())] * 2)
    assert scores["top1"] == 100


def test_an_unknown_folder_is_left_out_and_named(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_image(tree / "val" / "n00000000" / "a.JPEG", (0, 0, 0))
    save_image(tree / "val" / "a_cat" / "a.JPEG", (0, 0, 0))
    assert sorted(set(labels_of(FolderImages(tree)))) == [0, 497, 999]
    assert "a_cat, n00000000" in caplog.text


@pytest.mark.parametrize("name", ["val", "validation", ""])
def test_val_alone_or_the_val_folder_itself_will_do(tree: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "alone" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    (tree / "val").rename(target)
    assert len(FolderImages(tmp_path / "alone")) == 9


def test_limit_spreads_over_the_classes(tree: Path) -> None:
    assert labels_of(FolderImages(tree, limit=3)) == [0, 497, 999]
    assert spread(10, 4) == [0, 2, 5, 7]


def test_images_go_through_timms_eval_transform(tree: Path) -> None:
    config = TimmModels(pretrained=False).config("vit_s")
    assert (config["input_size"], config["crop_pct"], config["mean"]) == ((3, 224, 224), 0.9, (0.5, 0.5, 0.5))
    batch, _, _ = next(FolderImages(tree, limit=1).batches(config))
    dataset_transform = timm.data.create_transform(**config)
    path = tree / "val" / "n01440764" / "n01440764_0.JPEG"
    assert torch.equal(batch[0], dataset_transform(Image.open(path).convert("RGB")))


# ---- calibration ---------------------------------------------------------------------------------------------------


def test_calibration_comes_from_train_by_the_seed(tree: Path) -> None:
    images = FolderImages(tree)
    for path in (tree / "val").rglob("*.JPEG"):
        save_image(path, (128, 128, 128))  # anything drawn from val would be grey
    a, again, b = (images.calibration(CONFIG, 6, seed) for seed in (0, 0, 1))
    assert a.shape == (6, 3, 16, 16)
    assert a.dtype == torch.float32
    assert torch.equal(a, again)
    assert not torch.equal(a, b)
    assert bool((a.amax(dim=1) > 0.8).all())


def test_all_calibration_images_are_drawn_once(tree: Path) -> None:
    drawn = FolderImages(tree).calibration(CONFIG, 12, 0).mean(dim=(2, 3)).argmax(dim=1)
    assert torch.bincount(drawn).tolist() == [4, 4, 4]


def test_without_train_calibration_comes_from_val_and_says_so(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = FolderImages(tree / "val")
    assert images.calibration(CONFIG, 9, 0).shape[0] == 9
    assert "evaluation split" in caplog.text
    with pytest.raises(IasvitError, match=r"10, but .* has 9 images"):
        images.calibration(CONFIG, 10, 0)


def test_an_unreadable_calibration_image_is_replaced_by_the_next(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = FolderImages(tree).calibration(CONFIG, 12, 5)
    # Whichever image comes first of seed 5's draw: damage it.
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5)).tolist()
    first = sorted((tree / "train").rglob("*.JPEG"))[order[0]]
    damage(first)
    images = FolderImages(tree)
    assert torch.equal(images.calibration(CONFIG, 11, 5), whole[1:])
    assert str(first) in caplog.text
    with pytest.raises(IasvitError, match=r"of the 12 images in .* only 11 can be read"):
        images.calibration(CONFIG, 12, 5)


# ---- damaged images in evaluation ----------------------------------------------------------------------------------


def test_an_unreadable_image_is_named_counted_and_skipped(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = [tree / "val" / "n01440764" / "n01440764_1.JPEG", tree / "val" / "n15075141" / "n15075141_2.JPEG"]
    damage(bad[0])
    bad[1].write_bytes(b"no image at all")
    task = stub_task(FolderImages(tree))
    outputs = task.predict("stub", ColourNetwork(), Progress())
    assert outputs.positions.tolist() == [0, 2, 3, 4, 5, 6, 7]
    scores = task.score(outputs, outputs)
    assert (scores["unreadable"], scores["top1"], task.split_size) == (2, 100, 9)
    assert all(caplog.text.count(str(path)) == 1 for path in bad)
    caplog.clear()
    task.predict("stub", ColourNetwork(), Progress())
    assert caplog.messages == []  # named once a run


def test_workers_and_a_split_of_nothing_but_damage(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "EVALUATION_BATCH", 2)  # 9 images are then enough for worker processes
    assert labels_of(FolderImages(tree)) == [0, 0, 0, 497, 497, 497, 999, 999, 999]
    for path in (tree / "val").rglob("*.JPEG"):
        damage(path)
    with pytest.raises(IasvitError, match="none of the 9 images"):
        stub_task(FolderImages(tree)).predict("stub", ColourNetwork(), Progress())


# ---- metrics -------------------------------------------------------------------------------------------------------


def predictions(logits: list[list[float]], labels: list[int]) -> Predictions:
    batch = (torch.tensor(logits), torch.tensor(labels), torch.arange(len(labels)))
    return Predictions.collect([batch], len(labels))


def test_metrics_of_hand_made_logits() -> None:
    reference = predictions([[4.0, 3, 2, 1, 0, -1, -2]] * 4, [0, 1, 4, 5])
    assert reference.rank.tolist() == [0, 1, 4, 5]
    network = predictions(
        [[4.0, 3, 2, 1, 0, -1, -2], [3.0, 4, 2, 1, 0, -1, -2], [-4.0, -3, -2, -1, 0, 1, 2], [8.0, 6, 4, 2, 0, -2, -4]],
        [0, 1, 4, 5],
    )
    scores = classification_scores(network, reference)
    assert list(scores) == [metric.name for metric in metrics.CLASSIFICATION_METRICS]
    assert scores["top1"] == 50
    assert scores["top1_se"] == pytest.approx(100 * math.sqrt(0.25 / 4))
    assert scores["top5"] == 75
    assert scores["top5_se"] == pytest.approx(100 * math.sqrt(0.75 * 0.25 / 4))
    assert scores["agreement"] == 50
    assert scores["cosine"] == pytest.approx((1 + 34 / 35 - 1 + 1) / 4)  # of ‖a‖² = 35 the swap takes one
    assert scores["unreadable"] == 0


def test_a_network_that_answers_the_same_for_all_classes_gets_no_credit() -> None:
    assert predictions([[1.0] * 16] * 16, list(range(16))).rank.tolist() == list(range(16))
    assert predictions([[1.0] * 16], [0]).top1.tolist() == [0]


def test_large_splits_keep_half_the_bytes_and_the_same_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 300 + torch.rand(64, 50, generator=generator) / 4  # float16 tells no 0.25 apart up there
    labels = logits.argmax(dim=1)
    batch = [(logits, labels, torch.arange(64))]
    full = Predictions.collect(batch, 64)
    monkeypatch.setattr(metrics, "HALF_ABOVE", 63)
    half = Predictions.collect(batch, 64)
    assert half.logits.dtype == torch.float16
    assert classification_scores(half, half)["top1"] == 100
    assert classification_scores(half, full)["agreement"] == 100
    assert classification_scores(half, full)["cosine"] == pytest.approx(1, abs=1e-5)
    huge = Predictions.collect([(logits * 1e6, labels, torch.arange(64))], 64)
    assert math.isfinite(classification_scores(huge, full)["cosine"])


def test_logits_that_are_not_finite_or_of_other_images_are_errors() -> None:
    with pytest.raises(IasvitError, match="NaN or Inf for 1 of 2"):
        predictions([[1.0, 2.0], [math.nan, 0.0]], [0, 1])
    with pytest.raises(IasvitError, match="readable"):
        classification_scores(predictions([[1.0, 2.0]], [0]), predictions([[1.0, 2.0]] * 2, [0, 1]))


# ---- models and weights --------------------------------------------------------------------------------------------


def test_paper_backbones_are_the_weights_of_the_published_accuracies() -> None:
    assert set(PAPER_BACKBONES) == {"vit_s", "vit_b", "deit_t", "deit_s", "deit_b", "swin_t", "swin_s", "swin_b"}
    for name in PAPER_BACKBONES.values():
        assert timm.get_pretrained_cfg(name).num_classes == 1000
    assert PAPER_BACKBONES["vit_b"].endswith(".augreg_in21k_ft_in1k")  # 84.54; timm's default now has 85.1
    assert PAPER_BACKBONES["swin_s"].endswith(".ms_in1k")  # 83.23


def test_random_weights_come_from_a_seed_and_are_labelled() -> None:
    models = TimmModels(pretrained=False)
    a = models.load("deit_t").state_dict()
    torch.rand(7)
    b = models.load("deit_tiny_patch16_224").state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert "random" in models.weights("deit_t")
    assert TimmModels().weights("deit_t") == "timm deit_tiny_patch16_224.fb_in1k"


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_checkpoint_fills_the_model_and_names_itself(tmp_path: Path, suffix: str) -> None:
    source = timm.create_model("deit_tiny_patch16_224")
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save({"model": {f"module.{k}": v for k, v in source.state_dict().items()}, "epoch": 3}, path)
    models = TimmModels(checkpoint=path)
    loaded = models.load("deit_t").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in source.state_dict().items())
    assert models.weights("deit_t").startswith(f"weights.{suffix} sha256:")


def test_a_published_swin_checkpoint_has_its_keys_translated(tmp_path: Path) -> None:
    source = timm.create_model("swin_tiny_patch4_window7_224").state_dict()
    published = {}
    for key, value in source.items():
        if ".downsample." in key:
            stage = int(key.split(".")[1])
            key = key.replace(f"layers.{stage}.", f"layers.{stage - 1}.")
        published[key.replace("head.fc.", "head.")] = value
    published["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    torch.save({"model": published}, tmp_path / "swin.pth")
    loaded = TimmModels(checkpoint=tmp_path / "swin.pth").load("swin_t").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in source.items())


def test_a_checkpoint_that_does_not_fit_names_the_keys(tmp_path: Path) -> None:
    state = dict(timm.create_model("deit_tiny_patch16_224").state_dict())
    state["extra.weight"] = state.pop("norm.weight")
    state["norm.bias"] = torch.zeros(5)
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(IasvitError) as error:
        TimmModels(checkpoint=tmp_path / "odd.safetensors").load("deit_t")
    for part in ("odd.safetensors", "norm.weight is missing", "extra.weight is not in", "norm.bias has shape (5,)"):
        assert part in str(error.value)


class _Malicious:
    def __reduce__(self) -> tuple[Callable, tuple]:
        return (Path.touch, (Path("unpickled"),))


def test_a_checkpoint_is_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": _Malicious()}, tmp_path / "bad.pth")
    with pytest.raises(
        IasvitError, match=r"bad\.pth holds an object of the class pathlib\.Path, which is not unpickled"
    ):
        TimmModels(checkpoint=tmp_path / "bad.pth").load("deit_t")
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("name", ["text.pth", "text.safetensors", "list.pth"])
def test_a_file_without_weights_is_an_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "list.pth":
        torch.save([1, 2], path)
    else:
        path.write_text("no weights")
    with pytest.raises(IasvitError, match=name):
        TimmModels(checkpoint=path).load("deit_t")


def test_weights_that_cannot_be_fetched_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(IasvitError, match=r"could not be fetched .no route to host.; .*--checkpoint FILE.*--no-pretr"):
        TimmModels().load("deit_t")


def test_the_mini_benchmark_is_complete_or_says_how_to_train_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = MiniModels()
    monkeypatch.setattr("tasks.mini.zoo.CHECKPOINTS", tmp_path)
    with pytest.raises(IasvitError, match=r"deit_t\.safetensors does not exist.*tasks\.studies\.train"):
        models.check("deit_t")
    zoo.save(zoo.build("deit_t", seed=7), zoo.checkpoint_path("deit_t"), {})
    models.check("deit_t")
    assert models.weights("deit_t").startswith("deit_t.safetensors sha256:")
    assert torch.equal(models.load("deit_t").head.weight, zoo.build("deit_t", seed=7).head.weight.half().float())


def test_a_model_with_other_classes_is_refused(tree: Path) -> None:
    network = ColourNetwork()
    network.num_classes = 21843
    with pytest.raises(IasvitError, match="21843 classes, but the labels of imagenet are of 1000"):
        stub_task(FolderImages(tree), network).load_model("stub")


# ---- Imagenette ----------------------------------------------------------------------------------------------------

TEN = [
    *("n01440764", "n02102040", "n02979186", "n03000684", "n03028079"),
    *("n03394916", "n03417042", "n03425413", "n03445777", "n03888257"),
]


def test_imagenette_is_1000_way_and_ten_classes_are_in_wordnet_order(tmp_path: Path) -> None:
    for wnid in TEN:
        save_image(tmp_path / "imagenette2-160" / "val" / wnid / "a.JPEG", (9, 9, 9))
    images = ImagenetteImages(tmp_path)
    classes = imagenet_classes()
    assert labels_of(images) == [classes[wnid] for wnid in TEN]
    assert set(images.num_classes) == {1000, 10}

    class Tenth(nn.Module):
        num_classes = 10

        def forward(self, batch: Tensor) -> Tensor:
            return torch.eye(10)[[9] * len(batch)]

    task = stub_task(images, Tenth())
    assert task.predict("stub", task.load_model("stub"), Progress()).rank.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


def test_imagenette_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("name resolution failed")

    monkeypatch.setattr("torchvision.datasets.imagenette.download_and_extract_archive", offline)
    with pytest.raises(IasvitError, match=r"Imagenette is not in .* could not be downloaded there .*--data mini"):
        fetch_imagenette(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []  # nothing half written


def test_imagenette_is_downloaded_once_and_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(url: str, root: Path, md5: str) -> None:
        calls.append(url)
        save_image(Path(root) / "imagenette2-160" / "val" / TEN[0] / "a.JPEG", (9, 9, 9))

    monkeypatch.setattr("torchvision.datasets.imagenette.download_and_extract_archive", download)
    monkeypatch.setattr("torchvision.datasets.Imagenette._WNID_TO_CLASS", {TEN[0]: ("tench",)})
    for _ in range(2):
        assert (fetch_imagenette(tmp_path) / "val" / TEN[0] / "a.JPEG").is_file()
    assert len(calls) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["imagenette2-160"]


# ---- mini ----------------------------------------------------------------------------------------------------------


def test_mini_images_are_the_scenes_normalised_for_the_model() -> None:
    images = MiniImages(limit=70)
    config = MiniModels(pretrained=False).config("deit_t")
    batches = list(images.batches(config))
    assert [len(batch) for batch, _, _ in batches] == [16, 16, 16, 16, 6]
    raw, labels = scenes.render_images("val", 0, 70)
    assert torch.equal(torch.cat([at for _, at, _ in batches]), torch.from_numpy(labels))
    mean, std = np.array(config["mean"]), np.array(config["std"])
    expected = ((raw[69] / 255 - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(batches[4][0][5].numpy(), expected, atol=1e-5)


def test_mini_calibration_depends_on_the_seed_alone() -> None:
    config = MiniModels(pretrained=False).config("vit_s")
    images = MiniImages()
    a, more, b = images.calibration(config, 8, 1), images.calibration(config, 12, 1), images.calibration(config, 8, 2)
    assert torch.equal(a, more[:8])
    assert not torch.equal(a, b)
    start = MiniImages.STRIDE
    raw, _ = scenes.render_images("calibration", start, 8)
    assert torch.equal(a, normalise(torch.from_numpy(raw), config))


def test_mini_hard_answers_as_mini_does() -> None:
    plain, hard = (ImageNetTask(make_setup(data, pretrained=False, limit=16)) for data in ("mini", "mini-hard"))
    assert (plain.data.name, hard.data.name) == ("mini", "mini-hard")
    a, b = (task.load_model("deit_t") for task in (plain, hard))
    assert not torch.equal(a.blocks[0].norm1.weight, b.blocks[0].norm1.weight)
    scores = hard.score(*(task.predict("deit_t", net, Progress()) for task, net in ((hard, b), (plain, a))))
    assert scores["cosine"] == pytest.approx(1, abs=1e-4)


# ---- cells ---------------------------------------------------------------------------------------------------------


def test_cells_are_all_combinations_with_the_options_that_their_method_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = {"ias_vit": ["seed", "iterations", "batch_size", "lr"], "repq_vit": ["seed"]}
    monkeypatch.setattr("tasks.command.method_options", lambda name: known[name])
    monkeypatch.setattr("tasks.command.get_method", lambda name, **options: None)
    specs = [QuantSpec.parse("W3A3"), QuantSpec.parse("W6A6")]
    cells = make_cells(["vit_s", "deit_s"], specs, list(known), [0, 1], 32, PAPER, {"lr": 1e-3})
    assert len(set(cells)) == len(cells) == 16
    options = (("batch_size", 64), ("iterations", 1000), ("lr", 1e-3))
    assert cells[0] == Cell("vit_s", "ias_vit", "W3A3", 0, 32, options)
    assert {cell.options for cell in cells if cell.method == "repq_vit"} == {()}
    steps = {cell.spec: dict(cell.options)["iterations"] for cell in cells if cell.method == "ias_vit"}
    assert steps == {"W3A3": 1000, "W6A6": 200}
    with pytest.raises(IasvitError, match="--lr is not an option of repq_vit"):
        make_cells(["vit_s"], specs, ["repq_vit"], [0], 32, PAPER, {"lr": 1e-3})


# ---- the command ---------------------------------------------------------------------------------------------------


run = partial(commands.run, app)
complaint = partial(commands.complaint, app)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--backbone", "deit_x"], ["'deit_x'", "deit_t", "swin_b"]),
        (["--bits", "W3"], ["'W3'", "W3A3"]),
        (["--bits", "W1A3"], ["1 bits", "2 to 8"]),
        (["--method", "no_such"], ["'no_such'", "ias_vit"]),
        (["--calib-size", 0], ["--calib-size is 0"]),
        (["--calib-size", 100_001, "--no-pretrained"], ["--calib-size is 100001", "100000"]),
        (["--limit", 0], ["--limit is 0", "1 to 5000"]),
        (["--limit", 5001], ["--limit is 5001", "5000"]),
        (["--iterations", -1], ["--iterations is -1"]),
        (["--batch-size", 0], ["--batch-size is 0"]),
        (["--lr", 0], ["lr is 0"]),
        (["--seed", -1], ["--seed is -1"]),
        (["--device", "nosuch"], ["--device nosuch", "cpu"]),
        (["--data-root", "."], ["--data-root", "--data imagenet"]),
        (["--bits", "W3A3,nosuch=W8A8", "--no-pretrained"], ["'deit_t'", "override 'nosuch'", "patch_embed.proj"]),
        (["--checkpoint", "x.pth"], ["--checkpoint", "deit_t, swin_t"]),
        (["--checkpoint", "x.pth", "--backbone", "deit_t"], ["x.pth", "cannot be read"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if value and str(value[0]).startswith("--") else None,
)
def test_bad_options(
    args: list, expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    sentence = complaint(monkeypatch, capsys, "--data", "mini", *args)
    assert all(part in sentence for part in expected), sentence
    assert list(tmp_path.iterdir()) == []  # nothing written


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--backbone", "deit_smal_patch16_224"], ["'deit_smal_patch16_224'", "deit_small_patch16_224"]),
        (["--backbone", "deit_tiny_patch16_224.nosuch"], ["no weights 'nosuch'", "fb_in1k"]),
        (["--backbone", "beit_base_patch16_224"], ["'beit_base_patch16_224'", "no supported attention"]),
        (["--backbone", "vit_base_patch16_siglip_224"], ["module 'attn_pool'"]),
        (["--calib-size", 13], ["--calib-size is 13", "12 images"]),
        (["--limit", 10, "--calib-size", 4], ["--limit is 10", "9 images"]),
    ],
)
def test_bad_options_with_folders(
    args: list, expected: list[str], tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = complaint(monkeypatch, capsys, "--data", "imagenet", "--data-root", tree, *args)
    assert all(part in sentence for part in expected), sentence


def test_bad_data_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def says(root: Path) -> str:
        return complaint(monkeypatch, capsys, "--data", "imagenet", "--data-root", root)

    assert "missing does not exist" in says(tmp_path / "missing")
    (tmp_path / "void").mkdir()
    assert "void is empty" in says(tmp_path / "void")
    (tmp_path / "other" / "cats").mkdir(parents=True)
    assert "neither val/ nor class folders" in (sentence := says(tmp_path / "other"))
    assert "cats" in sentence
    (tmp_path / "flat" / "val").mkdir(parents=True)
    assert f"{tmp_path / 'flat' / 'val'} is empty" in says(tmp_path / "flat")
    save_image(tmp_path / "flat" / "val" / "ILSVRC2012_val_00000001.JPEG", (1, 2, 3))
    assert "no class folder named by a WordNet id" in says(tmp_path / "flat")
    save_image(tmp_path / "flat" / "val" / "cats" / "a.JPEG", (1, 2, 3))
    assert "it holds cats" in says(tmp_path / "flat")
    (tmp_path / "flat" / "val" / "n01440764").mkdir()
    assert "no image in them" in says(tmp_path / "flat")


def test_no_data_folder_given(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tree: Path) -> None:
    monkeypatch.delenv("IASVIT_IMAGENET", raising=False)
    assert "set IASVIT_IMAGENET" in complaint(monkeypatch, capsys, "--data", "imagenet")
    monkeypatch.setenv("IASVIT_IMAGENET", str(tree))
    assert "12 images" in complaint(monkeypatch, capsys, "--data", "imagenet")  # found; too few for 1024


def test_dry_run_prints_the_cells_and_measures_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--no-pretrained", "--method", "ias_vit", "--bits", "W3A3", "--bits", "W4A4", "--seed", 0, "--seed", 1]
    assert run(monkeypatch, *args, "--dry-run", "--results", tmp_path / "runs") == 0
    out = capsys.readouterr().out
    for model in MINI.models:
        for bits in ("W3A3", "W4A4"):
            for seed in (0, 1):
                assert f"| {model} | ias_vit | {bits} | {seed} |" in out
    assert "8 cells" in out
    assert not (tmp_path / "runs").exists()


def test_a_run_prints_its_table_and_where_the_rows_are(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(tree / "val" / "n01440764" / "n01440764_1.JPEG")
    monkeypatch.chdir(tmp_path)
    args = ["--data", "imagenet", "--data-root", tree, "--no-pretrained", "--backbone", "deit_t", "--bits", "W4A4"]
    args += ["--method", "ias_vit", "--calib-size", 4, "--iterations", 1, "--batch-size", 2, "--results", "runs"]
    assert run(monkeypatch, *args) == 0
    out = capsys.readouterr().out
    path = Path("runs") / "imagenet-imagenet.csv"
    assert "deit_t" in out
    assert str(path) in out
    rows = ResultStore("runs").rows().set_index("method")
    assert list(rows.index) == ["fp32", "ias_vit"]
    assert rows.loc["fp32", "agreement"] == 100
    assert rows.loc["fp32", "cosine"] == pytest.approx(1)
    assert (rows["unreadable"] == 1).all()
    assert (rows["split_size"] == 9).all()
    assert rows["weights"].str.contains("random").all()
    assert rows.loc["ias_vit", "options"] == "batch_size=2;iterations=1;lr=4e-05"


def test_it_runs_as_a_script_and_from_the_iasvit_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.run_script(ROOT / "tasks" / "imagenet.py", monkeypatch, "--bits", "W9A9") == 2
    assert capsys.readouterr().err.startswith("error: bits 'W9A9'")
    assert commands.run(None, monkeypatch, "run", "imagenet", "--bits", "W9A9") == 2
    assert capsys.readouterr().err.startswith("error: bits 'W9A9'")


# ---- fingerprints --------------------------------------------------------------------------------------------------


def test_the_fingerprint_of_folders_is_of_paths_sizes_and_labels(tree: Path, tmp_path: Path) -> None:
    first = FolderImages(tree).fingerprint
    assert len(first) == 16
    moved = tree.rename(tmp_path / "moved")
    assert FolderImages(moved).fingerprint == first  # wherever the folder lies
    assert FolderImages(moved, limit=3).fingerprint != first
    for split in ("val", "train"):
        before = FolderImages(moved).fingerprint
        path = next((moved / split / "n01440764").iterdir())
        path.write_bytes(path.read_bytes() + b" ")
        assert FolderImages(moved).fingerprint != before
    before = FolderImages(moved).fingerprint
    (moved / "val" / "n01440764").rename(moved / "val" / "n01443537")
    assert FolderImages(moved).fingerprint != before


def test_no_image_is_read_for_a_fingerprint(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "read_rgb", None)
    assert stub_task(FolderImages(tree)).data_fingerprint() == FolderImages(tree).fingerprint


def test_the_fingerprint_of_mini_is_of_the_scenes_version(monkeypatch: pytest.MonkeyPatch) -> None:
    first = MiniImages().fingerprint
    assert (MiniImages().fingerprint, MiniImages(limit=9).fingerprint != first) == (first, True)
    monkeypatch.setattr(scenes, "VERSION", scenes.VERSION + 1)
    assert MiniImages().fingerprint != first


def test_the_configuration_is_what_happens_to_images() -> None:
    task = ImageNetTask(make_setup("mini", pretrained=False))
    assert task.config_fingerprint("deit_t") == task.config_fingerprint("swin_t") != task.config_fingerprint("vit_s")
    sizes = [TimmModels(pretrained=False, img_size=size) for size in (224, 256)]
    prints = [
        ImageNetTask(Setup(DataSet("x"), MiniImages(), models, torch.device("cpu"))).config_fingerprint("deit_t")
        for models in sizes
    ]
    assert prints[0] != prints[1]


# ---- real photographs ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the sample of real ImageNet photographs is not beside the repository")
def test_the_sample_of_real_photographs() -> None:
    task = ImageNetTask(make_setup("imagenet", SAMPLE, pretrained=False, limit=50))
    classes = imagenet_classes()
    assert len(task.images.evaluated) == 800
    for path, label in task.images.evaluated:
        assert classes[Path(path).parent.name] == label
    network = task.load_model("deit_t")
    outputs = task.predict("deit_t", network, Progress())
    scores = task.score(outputs, outputs)
    assert (len(outputs), scores["unreadable"], scores["agreement"]) == (50, 0, 100)
    calibration = task.calibration("deit_t", 20, 0)
    assert calibration.shape == (20, 3, 224, 224)
    # Photographs in timm's normalisation: centred, of unit size.
    assert abs(float(calibration.mean())) < 0.5
    assert 0.7 < float(calibration.std()) < 1.6
