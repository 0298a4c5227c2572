"""Admission rules are computed: a quantizer that cheats is found out."""

from __future__ import annotations

from pathlib import Path

import pytest
from baselines_tiny import METHODS, tiny_images, tiny_model
from torch import Tensor, nn

import iasvit
from iasvit.admission import admission
from iasvit.methods import describe_method
from iasvit.nn import quantizers_of
from iasvit.quantizers import UniformQuantizer
from iasvit.summary import summary
from iasvit.transforms import relu_mlps, rotate_residual


class OneCodeMore(UniformQuantizer):
    """Clamps to [0, 2^b]."""

    kind = "one_code_more"

    def _evaluate(self, x: Tensor) -> Tensor:
        scale, zero_point = self._shaped(x.ndim)
        return ((x / scale).round() + zero_point).clamp(0, 2**self.n_bits).sub(zero_point) * scale


class Dynamic(UniformQuantizer):
    """Takes the range of what is given."""

    kind = "dynamic"

    def _evaluate(self, x: Tensor) -> Tensor:
        scale = (x.amax() - x.amin()) / (2**self.n_bits - 1)
        return ((x - x.amin()) / scale).round() * scale + x.amin()


class PerToken(UniformQuantizer):
    """Has a scale for each token, (N, 1)."""

    kind = "per_token"

    def _evaluate(self, x: Tensor) -> Tensor:
        return self._fake_quantize(x)


def quantized(spec: str = "W3A3", method: str = "minmax") -> nn.Module:
    model = tiny_model("vit")
    return iasvit.quantize(model, tiny_images(model, 4), spec, METHODS[method]())


def with_class(cls: type[UniformQuantizer]) -> nn.Module:
    model = quantized()
    quantizer = model.blocks[1].mlp.fc2.input_quantizer
    quantizer.__class__ = cls
    return model


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("method", ["minmax", "repq_vit", "ptq4vit", "gptq", "erq"])
def test_the_suites_methods_keep_the_common_rule(method: str, family: str) -> None:
    model = tiny_model(family)
    options = {"candidates": 10} if method == "ptq4vit" else {}
    found = admission(iasvit.quantize(model, tiny_images(model, 4), "W3A4", METHODS[method](**options)))
    assert (found.n_bits, found.codes) == (4, 16)
    assert found.integer_zero_points
    assert found.static
    assert (found.granularity, found.weight_granularity, found.floats) == ("tensor", "row", ("image",))
    assert found.violations == []


def test_one_code_too_many_is_counted() -> None:
    found = admission(with_class(OneCodeMore))
    assert (found.n_bits, found.codes) == (3, 9)
    assert found.violations == ["9 values at 3 bits"]


def test_dynamic_ranges_are_found_out() -> None:
    found = admission(with_class(Dynamic))
    assert not found.static
    assert "dynamic parameters" in found.violations


def test_fractional_zero_points_finer_ranges_and_floats_are_named() -> None:
    model = quantized()
    quantizer = model.blocks[0].attn.proj.input_quantizer
    quantizer.zero_point = quantizer.zero_point + 0.5
    fine = model.blocks[0].mlp.fc1.input_quantizer
    fine.channel_dim = -1
    fine.set_parameters(fine.scale.expand(24), fine.zero_point.float().expand(24))
    model.blocks[1].attn.qkv.input_quantizer.enabled = False
    found = admission(model)
    assert found.violations == [
        "9 values at 3 bits",  # a fraction shifts the steps between the two ends, which stay
        "fractional zero-points",
        "activations per channel",
        "1 activations in float",
    ]
    model = with_class(PerToken)
    quantizer = model.blocks[1].mlp.fc2.input_quantizer
    quantizer.scale = quantizer.scale.repeat(17, 1)
    assert admission(model).granularity == "token"


def test_weights_only_and_layers_left_in_float_are_counted() -> None:
    assert admission(quantized(method="rtn")).floats == ("image", "17 activations")
    assert admission(quantized("W3A3,head=W32A32")).floats == ("image", "1 weights", "1 activations")


def test_a_changed_network_says_so_and_its_file_too(tmp_path: Path) -> None:
    model = tiny_model("vit")
    images = tiny_images(model, 4)
    changed = rotate_residual(relu_mlps(model, images, iterations=1))
    result = iasvit.quantize(changed, images, "W4A4", METHODS["gptq"]())
    text = str(admission(result))
    assert text.endswith("network changed by relu_mlps (rotate_residual exact)")
    result.quantization = result.quantization.__class__(**{**vars(result.quantization), "method": "minmax"})
    iasvit.save(result, tmp_path / "model.safetensors")
    assert f"rules:       {text}" in summary(tmp_path / "model.safetensors")
    assert str(admission(iasvit.load(tmp_path / "model.safetensors"))) == text


def test_probing_changes_nothing() -> None:
    model = quantized()
    before = {name: (q.enabled, q.scale.clone()) for name, q in quantizers_of(model, weights=False)}
    admission(model)
    for name, quantizer in quantizers_of(model, weights=False):
        assert (quantizer.enabled, quantizer.scale) == before[name]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is(name: str) -> None:
    found = describe_method(METHODS[name]())
    assert found.name == name
    assert found.summary
    assert "\n" not in found.summary
    assert found.calib_used == (0 if name == "rtn" else 128 if name in ("gptq", "gptaq") else 32)
    assert bool(found.reference) == (name not in ("rtn", "minmax"))
    assert f"{name}: " in str(found)
