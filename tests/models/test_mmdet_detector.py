"""The adapter of mmdet's detectors: Swin with and without padding, neck and heads, and what methods do with them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_detectors
import tiny_models
import torch
from mmdet.models.detectors import MaskRCNN
from mmdet.models.roi_heads import StandardRoIHead
from torch import Tensor, nn

import iasvit
from iasvit.calibration import ActivationStore, calibrate_inputs
from iasvit.calibration import store as store_module
from iasvit.errors import IasvitError
from iasvit.models import Site, build, describe, find_pairs, insert_quantizers, segments
from iasvit.nn import quant_layers, quantizers_of
from iasvit.quantizers import Quantizer, UniformQuantizer
from iasvit.reparam import reparameterize
from iasvit.spec import QuantSpec

# Windows of 4: the first size needs no padding at any stage, the second at all but the first, the third is not even
# divided by the patches.
SIZES = {"no padding": (128, 128), "padding": (96, 160), "odd": (90, 75)}
VARIANTS = {
    "plain": {},
    "no qkv bias": {"qkv_bias": False},
    "no patch norm": {"patch_norm": False},
    "windows of 5": {"window_size": 5},
    "checkpointing": {"with_cp": True},
}
FAST = {"ias_vit": {"iterations": 2, "batch_size": 1}, "base_ptq": {"candidates": 5}, "ptq4vit": {"candidates": 5}}
ALL_METHODS = ("ias_vit", "base_ptq", "ptq4vit", "repq_vit", "minmax", "rtn")


@pytest.fixture(params=[False, True], ids=["mask", "cascade"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_detectors.detector(cascade=request.param)


def off(model: nn.Module) -> nn.Module:
    """A quantizable copy whose quantizers are all off."""
    return tiny_models.switch(tiny_models.quantizable(copy.deepcopy(model)), False)


def links(model: nn.Module, image: Tensor) -> tuple[Tensor, ...]:
    """The maps that the last segment gets."""
    x = image
    for segment in segments(model)[:-1]:
        x = segment.run(x)
    return x


# ---- forward ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_features_before_quantization_are_mmdets(changes: dict[str, object], size: tuple[int, int]) -> None:
    model = tiny_detectors.detector(**changes)
    (image,) = tiny_detectors.images(size)
    expected = model.backbone(image)
    for network, tolerance in ((model, 0.0), (off(model), 1e-5)):
        for found, wanted in zip(network.backbone(image), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)
        x, *kept = links(network, image)
        for stage, (found, wanted) in enumerate(zip([*kept, x], expected, strict=True)):
            normed = getattr(network.backbone, f"norm{stage}")(found).permute(0, 3, 1, 2)
            torch.testing.assert_close(normed, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_predictions_before_quantization_are_mmdets(model: nn.Module, size: tuple[int, int]) -> None:
    (image,) = tiny_detectors.images(size)
    expected, found = tiny_detectors.predict(model, image), tiny_detectors.predict(off(model), image)
    assert len(expected) > 0
    assert torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.bboxes, expected.bboxes, atol=1e-3, rtol=1e-5)
    assert torch.equal(found.masks, expected.masks)


@torch.no_grad()
def test_shifted_windows_and_padding_are_in_what_is_compared() -> None:
    model = tiny_detectors.detector()
    (image,) = tiny_detectors.images(SIZES["padding"])
    shifts = [block.attn.shift_size for stage in model.backbone.stages for block in stage.blocks]
    assert shifts == [0, 2, 0, 2, 0, 0]
    expected = off(model).backbone(image)
    model.backbone.stages[0].blocks[1].attn.shift_size = 0
    assert (off(model).backbone(image)[0] - expected[0]).abs().max() > 1e-3


@torch.no_grad()
def test_stages_that_the_neck_does_not_read_are_not_kept() -> None:
    model = tiny_detectors.detector()
    (image,) = tiny_detectors.images((64, 64))
    maps = [(1, 16, 16, 8), (1, 8, 8, 16), (1, 4, 4, 32), (1, 2, 2, 64)]
    assert [tuple(x.shape) for x in links(model, image)] == [maps[3], *maps[:3]]
    model.backbone.out_indices = (1, 3)
    assert [tuple(x.shape) for x in links(model, image)] == [maps[3], maps[1]]


# ---- structure -------------------------------------------------------------------------------------------------------


def test_every_layer_is_quantized_and_has_its_role() -> None:
    roles: dict[str, list[str]] = {}

    def note(site: Site) -> Quantizer:
        roles.setdefault(site.name, []).append(site.role)
        return UniformQuantizer(site.n_bits)

    model = tiny_detectors.detector(depths=(1, 1, 1, 1))
    insert_quantizers(model, QuantSpec(3, 3), note, note)
    block = {
        "attn.w_msa.matmul_qk": ["query", "key"],
        "attn.w_msa.matmul_av": ["softmax", "value"],
        "attn.w_msa.qkv": ["weight", "norm"],
        "attn.w_msa.proj": ["weight", "input"],
        "ffn.layers.0.0": ["weight", "norm"],
        "ffn.layers.1": ["weight", "gelu"],
    }
    stages = {f"stages.{i}.blocks.0.{name}": found for i in range(4) for name, found in block.items()}
    stages |= {f"stages.{i}.downsample.reduction": ["weight", "norm"] for i in range(3)}
    heads = [f"neck.{kind}.{i}.conv" for kind in ("lateral_convs", "fpn_convs") for i in range(4)]
    heads += ["rpn_head.rpn_conv", "rpn_head.rpn_cls", "rpn_head.rpn_reg", "roi_head.mask_head.convs.0.conv"]
    heads += [f"roi_head.bbox_head.{name}" for name in ("fc_cls", "fc_reg", "shared_fcs.0", "shared_fcs.1")]
    heads += ["roi_head.mask_head.conv_logits"]
    assert roles == {
        "backbone.patch_embed.projection": ["weight"],
        **{f"backbone.{name}": found for name, found in stages.items()},
        **{name: ["weight", "input"] for name in heads},
    }
    # The only other layer with a weight matrix is the mask head's deconvolution, which stays in floating point.
    assert type(model.roi_head.mask_head.upsample).__mro__[1] is nn.ConvTranspose2d


def test_pairs_and_segments(model: nn.Module) -> None:
    quantized = tiny_models.quantizable(model)
    blocks = [(i, j) for i, depth in enumerate((2, 2, 1, 1)) for j in range(depth)]
    names = [f"backbone.stages.{i}.blocks.{j}" for i, j in blocks]
    for i in (2, 1, 0):
        names.insert(2 * (i + 1) - (i == 2), f"backbone.stages.{i}.downsample")
    chain = segments(quantized)
    assert [segment.name for segment in chain] == ["backbone.patch_embed", *names, "heads"]
    assert [segment.reconstruct for segment in chain] == [True] * (len(chain) - 1) + [False]
    named = [name for s in chain for weights in (True, False) for name, _ in s.quantizers(weights=weights)]
    assert sorted(named) == sorted(name for name, m in quantized.named_modules() if isinstance(m, Quantizer))
    expected = []
    for name in names:
        expected += [f"{name}.norm"] if name.endswith("downsample") else [f"{name}.norm1", f"{name}.norm2"]
    assert [pair.name for pair in find_pairs(quantized)] == expected


@torch.no_grad()
@pytest.mark.parametrize("size", [SIZES["no padding"], SIZES["padding"]])
def test_reparameterization_is_exact(size: tuple[int, int]) -> None:
    model = tiny_detectors.detector().double()
    image = tiny_detectors.images(size)[0].double()
    expected = model.backbone(image)
    quantized = off(model)
    pairs = find_pairs(quantized)
    quantizers = {f"{pair.name}": pair.linears[0].input_quantizer for pair in pairs}
    calibrate_inputs(list(quantizers.items()), lambda: quantized.backbone(image))
    for quantizer in quantizers.values():
        quantizer.enabled = False
    before = {pair.name: _codes(quantized, pair.linears[0], image) for pair in pairs}
    for pair in pairs:
        reparameterize(pair)
        assert quantizers[pair.name].scale.ndim == 0
    for found, wanted in zip(quantized.backbone(image), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for pair in pairs:
        codes = _codes(quantized, pair.linears[0], image)
        assert len(codes.unique()) > 4
        # An entry within a rounding error of the border between two codes may fall to the other side of it.
        assert (codes != before[pair.name]).float().mean() < 1e-4


def _codes(model: nn.Module, linear: nn.Module, image: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.backbone(image)
    hook.remove()
    return linear.input_quantizer.encode(seen[0])


def test_scope_is_said_by_the_spec() -> None:
    model = tiny_detectors.detector()
    spec = "W4A4,neck.*=W32A32,rpn_head.*=W32A32,roi_head.*=W32A32"
    quantized = iasvit.quantize(model, torch.cat(tiny_detectors.images((64, 64), (64, 64))), spec, "repq_vit")
    assert {name.partition(".")[0] for name, _ in quant_layers(quantized)} == {"backbone"}
    before, after = model.state_dict(), quantized.state_dict()
    heads = [name for name in before if not name.startswith("backbone.")]
    assert heads
    assert all(torch.equal(before[name], after[name]) for name in heads)
    assert len(tiny_detectors.predict(quantized, *tiny_detectors.images((64, 64)))) > 0


def _deformable(model: nn.Module) -> None:
    class Deformable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 2))

    model.neck.fpn_convs[1].conv = Deformable()


def _other_roi_head(model: nn.Module) -> None:
    class OtherRoIHead(StandardRoIHead):
        pass

    model.roi_head.__class__ = OtherRoIHead


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: setattr(m, "backbone", nn.Identity()), "'backbone' is a Identity"),
        (lambda m: setattr(m, "rpn_head", None), "'rpn_head' is a NoneType"),
        (_other_roi_head, "'roi_head' is a OtherRoIHead"),
        (_deformable, r"'neck\.fpn_convs\.1\.conv' is a Deformable"),
        (
            lambda m: m.set_submodule("backbone.stages.0.blocks.1.norm2", nn.RMSNorm(8)),
            r"'backbone\.stages\.0\.blocks\.1\.norm2' is a RMSNorm",
        ),
        (
            lambda m: m.set_submodule("backbone.stages.1.blocks.0.attn.w_msa", nn.Identity()),
            r"'backbone\.stages\.1\.blocks\.0\.attn\.w_msa' is a Identity",
        ),
        (
            lambda m: m.set_submodule("backbone.stages.2.blocks.0.ffn", nn.Identity()),
            r"'backbone\.stages\.2\.blocks\.0\.ffn' is a Identity",
        ),
    ],
)
def test_unsupported_modules_are_named(change: object, named: str) -> None:
    model = tiny_detectors.detector()
    change(model)
    with pytest.raises(IasvitError, match=f"module {named}"):
        tiny_models.quantizable(model)


def test_mmdet_models_without_an_adapter_are_refused() -> None:
    with pytest.raises(IasvitError, match=r"model SwinTransformer has no supported attention.*mmdet.two_stage"):
        segments(tiny_detectors.detector().backbone)


def test_importing_iasvit_does_not_import_mmdet() -> None:
    code = (
        "import sys, iasvit, iasvit.api, iasvit.models, timm; "
        "iasvit.models.segments(timm.create_model('vit_tiny_patch16_224')); "
        "print(any(m.partition('.')[0] in ('mmdet', 'mmcv', 'mmengine') for m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "False", done.stderr


# ---- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("cascade", [False, True], ids=["mask", "cascade"])
def test_every_method_quantizes_a_detector_on_images_of_different_sizes(method: str, cascade: bool) -> None:
    model = tiny_detectors.detector(cascade)
    before = tiny_models.bits_of(model)
    ragged = tiny_detectors.images((64, 64), (64, 96), (64, 96), (96, 64))
    quantized = iasvit.quantize(model, iter(ragged), "W4A4", method, **FAST.get(method, {}))
    assert tiny_models.same_bits(tiny_models.bits_of(model), before)
    for name, layer in quant_layers(quantized):
        rows = layer.weight.detach().flatten(1)
        assert max(len(row.unique()) for row in rows) <= 16, name
    for name, quantizer in quantizers_of(quantized, weights=False):
        assert quantizer.enabled == (method != "rtn"), name
        if quantizer.enabled:
            scale = getattr(quantizer, "scale", None)
            assert scale is None or scale.numel() == 1, name  # per tensor, after reparameterization too
    found = tiny_detectors.predict(quantized, ragged[0])
    assert torch.isfinite(found.scores).all()
    assert torch.isfinite(found.bboxes).all()


def test_neck_and_heads_are_calibrated_and_not_learnt() -> None:
    model = tiny_detectors.detector()
    images = torch.cat(tiny_detectors.images((64, 64), (64, 64), (64, 64)))
    quantized = iasvit.quantize(model, images, "W4A4", "ias_vit", iterations=3, batch_size=2, lr=1e-2)
    same: dict[bool, list[bool]] = {True: [], False: []}
    pairs = {id(linear) for pair in find_pairs(quantized) for linear in pair.linears}
    for name, layer in quant_layers(quantized):
        if id(layer) in pairs:  # reparameterized
            continue
        rounding = UniformQuantizer(4, channel_dim=0, percentiles=layer.weight_quantizer.percentiles)
        weight = model.get_submodule(name).weight.detach()
        rounding.calibrate(weight)
        rounded = rounding.decode(rounding.encode(weight))
        same[name.startswith("backbone.")].append(torch.equal(layer.weight, rounded))
    assert all(same[False])
    assert not any(same[True])


def test_spilled_activations_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    ragged = tiny_detectors.images((64, 64), (64, 96), (64, 64))
    spills: list[int] = []
    spilled = ActivationStore._spilled
    results = []
    for budget in (2**40, 20_000, 0):
        monkeypatch.setattr(store_module, "default_memory_budget", lambda device=None, budget=budget: budget)
        spills.append(0)

        def count(store: ActivationStore, batch: Tensor) -> Tensor:
            spills[-1] += 1
            return spilled(store, batch)

        monkeypatch.setattr(ActivationStore, "_spilled", count)
        model = tiny_detectors.detector()
        done = [
            iasvit.quantize(model, ragged, "W4A4", method, **options)
            for method, options in (("ias_vit", {"iterations": 2, "batch_size": 1}), ("ptq4vit", {"candidates": 5}))
        ]
        results.append([tiny_models.bits_of(quantized) for quantized in done])
    assert 0 == spills[0] < spills[1] < spills[2]
    for other in results[1:]:
        assert all(tiny_models.same_bits(a, b) for a, b in zip(results[0], other, strict=True))


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_saved_detector_answers_as_before(tmp_path: Path, model: nn.Module) -> None:
    images = torch.cat(tiny_detectors.images((64, 64), (64, 64)))
    quantized = iasvit.quantize(model, images, "W3A4", "repq_vit")
    iasvit.save(quantized, tmp_path / "model.safetensors")
    loaded = iasvit.load(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), quantized(images))
    for image in images.split(1):
        expected, found = tiny_detectors.predict(quantized, image), tiny_detectors.predict(loaded, image)
        assert torch.equal(found.bboxes, expected.bboxes)
        assert torch.equal(found.masks, expected.masks)


@torch.no_grad()
def test_a_description_rebuilds_the_detector(model: nn.Module) -> None:
    rebuilt = build(json.loads(json.dumps(describe(model))))
    rebuilt.load_state_dict(model.state_dict())
    (image,) = tiny_detectors.images((64, 96))
    assert torch.equal(tiny_detectors.predict(rebuilt, image).bboxes, tiny_detectors.predict(model, image).bboxes)


def test_a_detector_without_a_configuration_is_quantized_but_not_saved(tmp_path: Path) -> None:
    model = tiny_detectors.detector()
    del model.cfg
    quantized = iasvit.quantize(model, torch.cat(tiny_detectors.images((64, 64))), "W4A4", "minmax")
    with pytest.raises(IasvitError, match="attribute cfg"):
        iasvit.save(quantized, tmp_path / "model.safetensors")


# ---- detectors as users bring them -----------------------------------------------------------------------------------


def minmax(model: nn.Module, image: Tensor) -> nn.Module:
    return iasvit.quantize(model, image, "W4A4", "minmax")


def uneven(x: Tensor) -> Tensor:
    return x * torch.linspace(0.5, 1.5, x.shape[-1])


class OwnBackbone(MaskRCNN):
    """Looks at images through a lens of its own."""

    def extract_feat(self, batch_inputs: Tensor) -> tuple[Tensor, ...]:
        return super().extract_feat(uneven(batch_inputs))


def of_class(cls: type[nn.Module]) -> nn.Module:
    model = tiny_detectors.detector()
    model.__class__ = cls
    return model


def test_a_detector_that_computes_something_else_is_refused_by_name() -> None:
    (image,) = tiny_detectors.images((64, 64))
    with pytest.raises(IasvitError, match=r"OwnBackbone .* from module 'backbone\.patch_embed\.adap_padding' on"):
        minmax(of_class(OwnBackbone), image)
    for path, named in [
        ("backbone", "backbone"),
        ("roi_head.bbox_head.shared_fcs.0", r"roi_head\.bbox_head\.shared_fcs\.0"),
    ]:
        model = tiny_detectors.detector()
        change = (lambda out: tuple(map(uneven, out))) if path == "backbone" else uneven
        model.get_submodule(path).register_forward_hook(lambda _m, _args, out, change=change: change(out))
        with pytest.raises(IasvitError, match=f"from module '{named}' on, because of"):
            minmax(model, image)
    model = tiny_detectors.detector()
    del model.neck
    with pytest.raises(IasvitError, match="'neck' is a NoneType, which is not supported"):
        minmax(model, image)


def test_a_detector_that_normalises_its_input_in_a_hook() -> None:
    (image,) = tiny_detectors.images((64, 64))
    expected = minmax(tiny_detectors.detector(), uneven(image))
    model = tiny_detectors.detector()
    model.register_forward_pre_hook(lambda _m, args: (uneven(args[0]), *args[1:]))
    quantized = minmax(model, image)
    assert tiny_models.same_bits(quantized.state_dict(), expected.state_dict())


def test_shared_parameters_of_a_detector_become_its_layers_own(caplog: pytest.LogCaptureFixture) -> None:
    (image,) = tiny_detectors.images((64, 64))
    model, plain = tiny_detectors.detector(), tiny_detectors.detector()
    blocks = model.backbone.stages[0].blocks
    blocks[1].attn.w_msa.qkv.weight = blocks[0].attn.w_msa.qkv.weight
    plain.load_state_dict(model.state_dict())
    quantized = iasvit.quantize(model, image, "W4A4", "repq_vit")
    assert "stages.0.blocks.1.attn.w_msa.qkv.weight shared values" in caplog.text
    expected = iasvit.quantize(plain, image, "W4A4", "repq_vit")
    assert tiny_models.same_bits(quantized.state_dict(), expected.state_dict())


def test_images_that_a_detector_cannot_take_are_refused() -> None:
    with pytest.raises(IasvitError, match="MaskRCNN given cannot run on calibration images of 64×64×3"):
        minmax(tiny_detectors.detector(), torch.zeros(1, 64, 64, 3))
    assert minmax(tiny_detectors.detector(), tiny_detectors.images((64, 64))).quantization.data == {}
