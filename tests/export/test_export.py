"""Whole models as files: equal to PyTorch's integers, by any runtime that is installed; and what is refused."""

from __future__ import annotations

import copy
import importlib
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime", reason="the extra export is not installed")
pytest.importorskip("onnxscript", reason="the extra export is not installed")

import onnx

import iasvit
from iasvit import cli
from iasvit.errors import IasvitError
from iasvit.export import BACKENDS, ExportedModel, export_onnx, exported_twin
from iasvit.export import extras as extras_module
from iasvit.export.compare import Comparison
from iasvit.export.runtime import OPENVINO
from iasvit.export.show import summary
from iasvit.quantizers import UniformQuantizer

# One method a family, so that every kind of quantizer that a method of the suite gives is exported once.
QUANTIZED = {
    "vit": ("ptq4vit", "W4A4", {}),
    "deit": ("repq_vit", "W4A4", {}),
    "swin": ("ias_vit", "W3A3", {"iterations": 1, "batch_size": 4}),
}


@pytest.fixture(scope="module")
def quantized() -> dict[str, nn.Module]:
    """The tiny models, quantized."""
    images = tiny_models.images()
    changes: dict[str, dict] = {"vit": {"depth": 1}, "deit": {"depth": 1}, "swin": {"depths": (2, 1)}}
    return {
        family: iasvit.quantize(tiny_models.MODELS[family](**changes[family]), images, spec, method, **options)
        for family, (method, spec, options) in QUANTIZED.items()
    }


@pytest.fixture(scope="module")
def files(quantized: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ViT's file by target."""
    folder = tmp_path_factory.mktemp("onnx")
    made = {}
    for target in ("onnxruntime", "onnx", "openvino"):
        made[target] = folder / f"{target}.onnx"
        export_onnx(quantized["vit"], made[target], target=target)
    return made


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("family", QUANTIZED)
def test_codes_are_equal_but_for_ties(family: str, target: str, quantized: dict[str, nn.Module]) -> None:
    comparison = Comparison(quantized[family], target)
    images = tiny_models.images(24, seed=1)
    (mine,), (theirs,) = comparison.run(images)
    found = comparison.differences.values()
    assert len(found) == len([m for m in quantized[family].modules() if hasattr(m, "encode")]) - len(
        [name for name, _ in quantized[family].named_modules() if name.endswith("weight_quantizer")]
    )
    assert all(each.codes for each in found)
    assert sum(each.others for each in found) == 0
    assert sum(each.ties for each in found) <= 10
    assert torch.allclose(mine, theirs, atol=1e-4)


def test_a_graph_that_computes_something_else_is_found(quantized: dict[str, nn.Module]) -> None:
    """In the layer at fault alone: what comes behind it goes on with the file's codes."""
    model = copy.deepcopy(quantized["deit"])
    comparison = Comparison(model)
    model.blocks[0].mlp.fc1.input_quantizer.scale *= 1.03
    comparison.run(tiny_models.images(4, seed=1))
    wrong = [each.path for each in comparison.differences.values() if each.others]
    assert wrong == ["blocks.0.mlp.fc1.input_quantizer"]


@pytest.mark.parametrize("target", ["onnxruntime", "onnx", "openvino"])
def test_a_file_takes_any_batch(target: str, files: dict[str, Path], quantized: dict[str, nn.Module]) -> None:
    onnx.checker.check_model(str(files[target]))
    model = ExportedModel(files[target])
    for count in (1, 5):
        images = tiny_models.images(count, seed=2)
        with torch.no_grad():
            assert torch.allclose(model(images), quantized["vit"](images), atol=1e-4)


def test_what_the_targets_are_made_of(files: dict[str, Path]) -> None:
    operators = {
        target: Counter((node.domain, node.op_type) for node in onnx.load(path).graph.node)
        for target, path in files.items()
    }
    products = 6 + 2 + 1  # queries, keys and values are products of their own
    planes = products + 2  # PTQ4ViT's twin quantizers have two
    assert operators["onnxruntime"]["com.microsoft", "MatMulIntegerToFloat"] == planes
    assert operators["onnx"]["", "MatMulInteger"] == operators["openvino"]["", "MatMul"] == planes
    for target in ("onnx", "openvino"):
        assert {domain for domain, _ in operators[target]} == {""}
    assert not any(op == "MatMul" for _, op in operators["onnxruntime"])


def test_weights_are_bytes(files: dict[str, Path], quantized: dict[str, nn.Module]) -> None:
    tensors = onnx.load(files["onnxruntime"]).graph.initializer
    floats = sum(np.prod(t.dims) for t in tensors if t.data_type == onnx.TensorProto.FLOAT)
    weights = sum(p.numel() for name, p in quantized["vit"].named_parameters() if p.ndim > 1 and "pos" not in name)
    others = sum(p.numel() for p in quantized["vit"].parameters()) - weights
    assert floats < others + 3000  # biases, norms, embeddings; scales of channels
    assert sum(t.data_type == onnx.TensorProto.INT8 for t in tensors) >= 5


@pytest.mark.parametrize("family", [*QUANTIZED, "8 bits"])
def test_openvino_computes_the_same(family: str, quantized: dict[str, nn.Module], tmp_path: Path) -> None:
    """Most images have no code at a tie that falls to the other side; of those the outputs are equal."""
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    if family == "8 bits":  # weights and inputs that are not symmetric fill uint8 there
        model = iasvit.quantize(tiny_models.vit(depth=1), tiny_models.images(), "W8A8", "minmax")
    else:
        model = quantized[family]
    export_onnx(model, tmp_path / "model.onnx", target="openvino")
    images = tiny_models.images(8, seed=2)
    with torch.no_grad():
        mine = model(images)
        difference = (ExportedModel(tmp_path / "model.onnx", "openvino")(images) - mine).norm(dim=1) / mine.norm(dim=1)
    assert (difference < 1e-4).sum() >= 5, difference


@pytest.mark.parametrize("fixed", [False, True])
def test_openvino_runs_products_on_integers(
    fixed: bool, quantized: dict[str, nn.Module], files: dict[str, Path], tmp_path: Path
) -> None:
    """From its executed graph, whether it knows the batch or not; Swin's short rows are moved as floats."""
    openvino = pytest.importorskip("openvino", reason="the extra openvino is not installed")
    export_onnx(quantized["swin"], tmp_path / "swin.onnx", target="openvino")
    for path in (files["openvino"], tmp_path / "swin.onnx"):
        model = openvino.Core().read_model(path)
        if fixed:
            model.reshape([2, 3, *tiny_models.images(1).shape[2:]])
        executed = openvino.Core().compile_model(model, "CPU", OPENVINO).get_runtime_model().get_ops()
        facts = [{key: str(value.astype(str)) for key, value in op.get_rt_info().items()} for op in executed]
        products = [f["runtimePrecision"] for f in facts if f["layerType"] in ("FullyConnected", "MatMul")]
        assert len(products) >= 6
        assert set(products) <= {"i8", "u8"}, Counter(products)
    rearranged = Counter(f["runtimePrecision"] for f in facts if f["layerType"] == "Transpose" and f["execTimeMcs"])
    assert rearranged["f32"]


def test_per_channel_inputs_stay_float() -> None:
    images = tiny_models.images()
    model = iasvit.quantize(tiny_models.vit(depth=1), images, "W4A4", "minmax")
    layer = model.blocks[0].attn.qkv
    layer.input_quantizer = UniformQuantizer(4, channel_dim=-1)
    layer.input_quantizer.calibrate(model.blocks[0].norm1(torch.randn(50, 32)))
    comparison = Comparison(model)
    (mine,), (theirs,) = comparison.run(images)
    assert torch.allclose(mine, theirs, atol=1e-4)
    assert comparison.forms["blocks.0.attn.qkv"] == "float, its input has a scale for each channel"
    assert comparison.forms["blocks.0.mlp.fc1"] == "int8"


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_bad_input(tmp_path: Path, quantized: dict[str, nn.Module]) -> None:
    model, path = quantized["vit"], tmp_path / "model.onnx"
    path.write_bytes(b"mine")
    cases = [
        ((tiny_models.vit(), tmp_path / "a.onnx"), {}, "VisionTransformer given to export_onnx is not quantized"),
        ((model, tmp_path / "a.onnx"), {"target": "tensorrt"}, "target 'tensorrt' is not known; there are onnxruntime"),
        ((model, tmp_path / "a.onnx"), {"opset": 11}, "opset 11 is not supported; use 20 to 23"),
        ((model, path), {}, "exists already; choose another name, or replace it"),
        ((model, tmp_path), {}, "is a folder; name a file"),
        ((model, tmp_path / "none" / "a.onnx"), {}, "cannot be written: No such file or directory"),
    ]
    for args, options, sentence in cases:
        with pytest.raises(IasvitError, match=sentence):
            export_onnx(*args, **options)
    assert path.read_bytes() == b"mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"]


def test_a_missing_extra_is_named(
    tmp_path: Path, quantized: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(package: str) -> None:
        raise ImportError(f"No module named {package!r}")

    monkeypatch.setattr(extras_module, "import_module", missing)
    with pytest.raises(IasvitError, match=r"onnx is needed and cannot be imported .*pip install 'iasvit\[export\]'"):
        export_onnx(quantized["vit"], tmp_path / "a.onnx")
    monkeypatch.setattr(extras_module, "import_module", lambda p: missing(p) if p == "openvino" else importlib)
    with pytest.raises(IasvitError, match=r"openvino is needed .*'iasvit\[openvino\]'"):
        ExportedModel(tmp_path / "a.onnx", "openvino")


def test_backends_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(IasvitError, match="backend 'tensorrt' is not known; there are onnxruntime, openvino"):
        ExportedModel(tmp_path / "a.onnx", "tensorrt")
    with pytest.raises(IasvitError, match=r"does not exist; give a file that iasvit\.export_onnx wrote"):
        ExportedModel(tmp_path / "a.onnx")
    (tmp_path / "a.onnx").write_bytes(b"nothing")
    with pytest.raises(IasvitError, match="onnxruntime cannot read"):
        ExportedModel(tmp_path / "a.onnx")
    assert BACKENDS == ("onnxruntime", "openvino")


# ---- what README says ------------------------------------------------------------------------------------------------


def test_ten_lines_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "export_onnx" in b]
    assert len(block.strip().splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("timm.create_model", lambda name, pretrained: tiny_models.vit(depth=1))
    names: dict = {}
    exec(block.replace("224, 224", "32, 32"), names)
    with torch.no_grad():
        assert np.allclose(names["logits"], names["quantized"](names["images"][:1]).numpy(), atol=1e-4)


# ---- commands --------------------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr("sys.argv", ["iasvit", *map(str, args)])
    with pytest.raises(SystemExit) as status:
        cli.main()
    return int(status.value.code or 0)


def test_the_commands(
    tmp_path: Path,
    quantized: dict[str, nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved, out = tmp_path / "deit.safetensors", tmp_path / "deit.onnx"
    iasvit.save(quantized["deit"], saved)
    assert run(monkeypatch, "export", saved, out) == 0
    printed = capsys.readouterr().out
    assert f"{out}: 8 of 9 layers and products on integers" in printed
    assert "in float: patch_embed.proj (its input is not quantized)" in printed
    assert run(monkeypatch, "export", saved, out) == 2
    assert "--force" in capsys.readouterr().err
    assert run(monkeypatch, "show", out) == 0
    shown = capsys.readouterr().out
    for text in ("method:    repq_vit", "spec:      W4A4", "images (batch, 3, 32, 32)", "logits (batch, 10)"):
        assert text in shown
    assert any(line.split() == ["blocks.0.attn.matmul_av", "-", "4/4", "int8"] for line in shown.splitlines())
    (tmp_path / "other.onnx").write_bytes(b"nothing")
    assert run(monkeypatch, "show", tmp_path / "other.onnx") == 2
    assert "is not an exported model" in capsys.readouterr().err
    with pytest.raises(IasvitError, match="does not exist"):
        summary(tmp_path / "none.onnx")


def test_a_twin_is_called_as_the_model_is(quantized: dict[str, nn.Module]) -> None:
    images: Tensor = tiny_models.images(3, seed=5)
    with torch.no_grad():
        assert torch.allclose(
            exported_twin(quantized["vit"], "onnxruntime")(images), quantized["vit"](images), atol=1e-4
        )


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("adalog", {}),
        ("glf_q", {"iterations": 2, "batch_size": 4, "init_size": 4, "recipe": "fast", "relu_iterations": 2}),
    ],
)
def test_methods_of_later_papers(method: str, options: dict) -> None:
    """Norms without a mean, rotations, ReLU for GELU, and AdaLog on both sides of an MLP."""
    model = iasvit.quantize(tiny_models.vit(depth=1), tiny_models.images(), "W3A3", method, **options)
    comparison = Comparison(model)
    (mine,), (theirs,) = comparison.run(tiny_models.images(12, seed=1))
    assert sum(each.others for each in comparison.differences.values()) == 0
    assert torch.allclose(mine, theirs, atol=1e-4)
    floats = {path for path, form in comparison.forms.items() if form != "int8"}
    assert floats == {"patch_embed.proj"}
