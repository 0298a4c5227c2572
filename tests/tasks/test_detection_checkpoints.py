"""Published detectors: full-size configurations, and weights under mmdet's and the Swin authors' key names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("mmdet", reason="the coco extra is not installed")

from iasvit.errors import IasvitError
from tasks.detection import checkpoints
from tasks.detection.checkpoints import PUBLISHED, convert_keys, download, load_checkpoint, model_config
from tasks.detection.mmdet_setup import build_detector, prepare

prepare()

SIZES = {"swin_t": (96, (2, 2, 6, 2)), "swin_s": (96, (2, 2, 18, 2)), "swin_b": (128, (2, 2, 18, 2))}
# Parameters of the published models as their authors state them.
MILLIONS = {
    "mask_rcnn_swin_t": 48,
    "mask_rcnn_swin_s": 69,
    "cascade_mask_rcnn_swin_t": 86,
    "cascade_mask_rcnn_swin_s": 107,
    "cascade_mask_rcnn_swin_b": 145,
}


# ---- the published files' keys and shapes, written down from the code that made them ---------------------------------


def pair(shapes: dict[str, tuple[int, ...]], name: str, *weight: int) -> None:
    shapes[f"{name}.weight"] = weight
    shapes[f"{name}.bias"] = weight[:1]


def authors_backbone(dim: int, depths: tuple[int, ...], window: int = 7) -> dict[str, tuple[int, ...]]:
    """Of mmdet/models/backbones/swin_transformer.py in SwinTransformer/Swin-Transformer-Object-Detection."""
    shapes: dict[str, tuple[int, ...]] = {}
    pair(shapes, "patch_embed.proj", dim, 3, 4, 4)
    pair(shapes, "patch_embed.norm", dim)
    for i, depth in enumerate(depths):
        c, heads = dim * 2**i, dim * 2**i // 32
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            pair(shapes, f"{block}.norm1", c)
            shapes[f"{block}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads)
            shapes[f"{block}.attn.relative_position_index"] = (window**2, window**2)
            pair(shapes, f"{block}.attn.qkv", 3 * c, c)
            pair(shapes, f"{block}.attn.proj", c, c)
            pair(shapes, f"{block}.norm2", c)
            pair(shapes, f"{block}.mlp.fc1", 4 * c, c)
            pair(shapes, f"{block}.mlp.fc2", c, 4 * c)
        if i < len(depths) - 1:
            shapes[f"layers.{i}.downsample.reduction.weight"] = (2 * c, 4 * c)
            pair(shapes, f"layers.{i}.downsample.norm", 4 * c)
        pair(shapes, f"norm{i}", c)
    return {f"backbone.{name}": shape for name, shape in shapes.items()}


def heads(dim: int, cascade: bool) -> dict[str, tuple[int, ...]]:
    """Neck, RPN and RoI heads, of 80 classes, in mmdet 2 and 3."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(4):
        pair(shapes, f"neck.lateral_convs.{i}.conv", 256, dim * 2**i, 1, 1)
        pair(shapes, f"neck.fpn_convs.{i}.conv", 256, 256, 3, 3)
    pair(shapes, "rpn_head.rpn_conv", 256, 256, 3, 3)
    pair(shapes, "rpn_head.rpn_cls", 3, 256, 1, 1)
    pair(shapes, "rpn_head.rpn_reg", 12, 256, 1, 1)
    for stage in (".0", ".1", ".2") if cascade else ("",):
        box, mask = f"roi_head.bbox_head{stage}", f"roi_head.mask_head{stage}"
        pair(shapes, f"{box}.fc_cls", 81, 1024)
        pair(shapes, f"{box}.fc_reg", 320, 1024)
        pair(shapes, f"{box}.shared_fcs.0", 1024, 256 * 49)
        if cascade:
            for i in range(4):
                shapes[f"{box}.shared_convs.{i}.conv.weight"] = (256, 256, 3, 3)
                pair(shapes, f"{box}.shared_convs.{i}.bn", 256)
                shapes[f"{box}.shared_convs.{i}.bn.running_mean"] = (256,)
                shapes[f"{box}.shared_convs.{i}.bn.running_var"] = (256,)
                shapes[f"{box}.shared_convs.{i}.bn.num_batches_tracked"] = ()
        else:
            pair(shapes, f"{box}.shared_fcs.1", 1024, 1024)
        for i in range(4):
            pair(shapes, f"{mask}.convs.{i}.conv", 256, 256, 3, 3)
        pair(shapes, f"{mask}.upsample", 256, 256, 2, 2)
        pair(shapes, f"{mask}.conv_logits", 80, 256, 1, 1)
    return shapes


def mmdet_name(key: str) -> str:
    """The key in mmdet's own files of what the authors call so."""
    old_and_new = [("backbone.layers.", "backbone.stages."), ("patch_embed.proj.", "patch_embed.projection.")]
    old_and_new += [(".attn.", ".attn.w_msa."), (".mlp.fc1.", ".ffn.layers.0.0."), (".mlp.fc2.", ".ffn.layers.1.")]
    for old, new in old_and_new:
        key = key.replace(old, new)
    return key


def synthetic(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A state dict of these keys and shapes; each tensor is different, and so are its columns."""
    state = {}
    for index, (name, shape) in enumerate(shapes.items()):
        if name.endswith("relative_position_index"):
            state[name] = relative_position_index(math.isqrt(shape[0]))
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(index)
        else:
            state[name] = (index + torch.arange(float(shape[-1]))).expand(shape).clone()
    return state


def relative_position_index(window: int) -> Tensor:
    """As the Swin authors' WindowAttention computes it."""
    grid = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
    relative = (grid[:, :, None] - grid[:, None, :]).permute(1, 2, 0) + window - 1
    return relative[..., 0] * (2 * window - 1) + relative[..., 1]


def unfilled(name: str) -> nn.Module:
    return build_detector(model_config(name), initialise=False)


# ---- full size -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MILLIONS)
def test_a_full_size_detector_takes_the_authors_file(name: str) -> None:
    cascade, (dim, depths) = name.startswith("cascade"), SIZES[name[-6:]]
    shapes = authors_backbone(dim, depths) | heads(dim, cascade)
    model = unfilled(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert round(parameters / 1e6) == MILLIONS[name]
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    state = convert_keys({key: torch.ones(()).expand(shape) for key, shape in shapes.items()})
    assert {key: tuple(value.shape) for key, value in state.items()} == own
    model.load_state_dict(state, strict=True)


@pytest.mark.parametrize("name", ["mask_rcnn_swin_t", "cascade_mask_rcnn_swin_t"])
@pytest.mark.parametrize("style", ["authors", "mmdet"])
def test_every_value_of_a_full_size_file_arrives(name: str, style: str, tmp_path: Path) -> None:
    dim, depths = SIZES["swin_t"]
    shapes = authors_backbone(dim, depths) | heads(dim, name.startswith("cascade"))
    if style == "mmdet":
        shapes = {mmdet_name(key): shape for key, shape in shapes.items()}
    state = synthetic(shapes)
    path = tmp_path / "weights.pth"
    meta = {"mmdet_version": "2.11.0", "CLASSES": ("person", "bicycle"), "epoch": 36, "config": "model = dict()"}
    torch.save({"meta": meta, "state_dict": state}, path)
    model = unfilled(name)
    indices = {key: value.clone() for key, value in model.state_dict().items() if key.endswith("position_index")}
    load_checkpoint(model, path)
    found = model.state_dict()
    for key, value in state.items():
        new = key if style == "mmdet" else mmdet_name(key)
        if style == "authors" and "downsample" in key:
            assert not torch.equal(found[new], value)
            assert torch.equal(found[new].sort(dim=-1).values, value)  # in another order
        else:
            assert torch.equal(found[new], value), key
    assert indices
    assert all(torch.equal(found[key], value) for key, value in indices.items())  # both number them alike


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_have_a_configuration_and_an_address(name: str) -> None:
    published = PUBLISHED[name]
    assert model_config(name) == model_config(published.detector)
    assert published.url.startswith("https://")
    backbone = {"_t": "swin-t|swin_tiny", "_s": "swin-s|swin_small", "_b": "swin-b|swin_base"}[published.detector[-2:]]
    assert any(part in published.url for part in backbone.split("|"))
    assert ("cascade" in published.url) == published.detector.startswith("cascade")


def test_mmdets_own_configurations_are_the_same() -> None:
    import mmdet
    from mmengine.config import Config

    folder = Path(mmdet.__file__).parent / ".mim" / "configs" / "swin"
    for name in PUBLISHED:
        if not name.startswith("mask-rcnn"):
            continue
        theirs = Config.fromfile(str(folder / f"{name}.py")).model.to_dict()
        expected = build_detector(theirs, initialise=False)
        assert str(unfilled(name)) == str(expected)
        mine = model_config(name)
        for part in ("rpn_head", "test_cfg", "data_preprocessor"):
            assert mine[part] == theirs[part]


def test_cascade_has_the_authors_box_heads() -> None:
    config = model_config("cascade_mask_rcnn_swin_b")
    box_heads = config["roi_head"]["bbox_head"]
    assert len(box_heads) == 3
    for head in box_heads:
        expected: dict[str, Any] = {"type": "ConvFCBBoxHead", "num_shared_convs": 4, "num_shared_fcs": 1}
        expected |= {"reg_class_agnostic": False, "reg_decoded_bbox": True, "num_classes": 80}
        assert {key: head[key] for key in expected} == expected
        assert head["loss_bbox"] == {"type": "GIoULoss", "loss_weight": 10.0}
    stds = [head["bbox_coder"]["target_stds"] for head in box_heads]
    assert stds == [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
    assert config["test_cfg"]["rcnn"]["score_thr"] == 0.05


# ---- conversion ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_converted_patch_merging_computes_what_the_authors_does(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    backbone = {"type": "SwinTransformer", "embed_dims": 32, "depths": (1, 1), "num_heads": (1, 2)}
    config = {**model_config("mask_rcnn_swin_t"), "backbone": {**backbone, "out_indices": (0, 1)}}
    config["neck"] = {**config["neck"], "in_channels": [32, 64], "num_outs": 5}
    model = build_detector(config, initialise=False)
    shapes = authors_backbone(32, (1, 1)) | heads(32, cascade=False)
    levels = ("neck.lateral_convs.2", "neck.lateral_convs.3", "neck.fpn_convs.2", "neck.fpn_convs.3")
    shapes = {key: shape for key, shape in shapes.items() if not key.startswith(levels)}
    state = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    for key in [key for key in state if key.endswith("relative_position_index")]:
        state[key] = relative_position_index(7)
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    load_checkpoint(model, path)
    x = torch.randn(2, 6, 8, 32, generator=generator)
    parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]  # the authors' order
    name = "backbone.layers.0.downsample"
    normed = F.layer_norm(torch.cat(parts, dim=-1), (128,), state[f"{name}.norm.weight"], state[f"{name}.norm.bias"])
    expected = F.linear(normed, state[f"{name}.reduction.weight"]).flatten(1, 2)
    found, size = model.backbone.stages[0].downsample(x.flatten(1, 2), (6, 8))
    assert size == (3, 4)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_keys_of_mmdet_are_left_as_they_are() -> None:
    state = {"backbone.stages.0.blocks.0.norm1.weight": torch.ones(3), "neck.x": torch.zeros(1)}
    assert convert_keys(state) is state


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_a_file_of_another_detector_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cascade.pth"
    torch.save(synthetic(authors_backbone(96, (2, 2, 6, 2)) | heads(96, cascade=True)), path)
    model = unfilled("mask_rcnn_swin_t")
    with pytest.raises(
        IasvitError, match=r"cascade\.pth does not fit the model: roi_head\.bbox_head\.fc_cls\.weight is"
    ):
        load_checkpoint(model, path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    model = nn.Linear(1, 1)
    path.write_bytes(b"no weights")
    with pytest.raises(IasvitError, match=r"weights\.pth is neither a safetensors file nor"):
        load_checkpoint(model, path)
    with pytest.raises(IasvitError, match=r"missing\.pth cannot be read"):
        load_checkpoint(model, tmp_path / "missing.pth")
    torch.save({"backbone.layers.0.downsample.reduction.weight": torch.zeros(2, 7)}, path)
    with pytest.raises(IasvitError, match=r"weights\.pth does not fit the model: its patch merging is damaged"):
        load_checkpoint(model, path)


@pytest.mark.parametrize("name", ["mask_rcnn_swin_l", "faster_rcnn_swin_t", "swin_t", ""])
def test_an_unknown_detector_is_refused(name: str) -> None:
    with pytest.raises(
        IasvitError, match=rf"detector '{name}' does not exist; there are mask_rcnn_swin_t, .*mask-rcnn"
    ):
        model_config(name)


def test_without_a_network_the_alternatives_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints.torch.hub, "get_dir", lambda: str(tmp_path))
    asked: list[tuple[str, str | None]] = []

    def refuse(url: str, path: str, digits: str | None) -> None:
        asked.append((url, digits))
        raise OSError("no route")

    monkeypatch.setattr(checkpoints.torch.hub, "download_url_to_file", refuse)
    with pytest.raises(IasvitError, match=r"mask_rcnn_swin_s could not be fetched .*no route.*--checkpoint FILE"):
        download("mask_rcnn_swin_s")
    with pytest.raises(IasvitError):
        download("mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco")
    assert [digits for _, digits in asked] == [None, "b92c91f1"]
    existing = tmp_path / "checkpoints" / "mask_rcnn_swin_small_patch4_window7.pth"
    existing.write_bytes(b"here")
    assert download("mask_rcnn_swin_s") == existing
