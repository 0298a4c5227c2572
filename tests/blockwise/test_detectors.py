"""The block methods on detectors, whose heads put out no table of logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_detectors
import torch
from torch import Tensor, nn

import iasvit
from iasvit.blockwise.heads import learn_heads
from iasvit.blockwise.initialise import fold, initialise, propagated
from iasvit.blockwise.teacher import Teacher
from iasvit.calibration import calibrate_weights, calibration_store
from iasvit.errors import IasvitError
from iasvit.models import adapter_for, prepare, segments
from iasvit.nn import quant_layers
from iasvit.progress import Progress
from iasvit.spec import QuantSpec
from iasvit.transforms import relu_mlps
from iasvit.unison import Unison

STEPS = {"iterations": 2, "batch_size": 2}
OBSERVED = {"initialisation": "observed"}  # the search takes most of the time, so one method shows it
METHODS: dict[str, dict[str, Any]] = {
    "adalog_retrained": OBSERVED,
    "aphq_vit": {"relu_iterations": 2, **OBSERVED},
    "brecq": OBSERVED,
    "fima_q": OBSERVED,
    "glf_q": {"rotation": False, "relu_iterations": 2, **OBSERVED},
    "ls_vit": OBSERVED,
    "qdrop": {},
    "unison": {"joint_iterations": 2, "joint_batch_size": 2, "init_size": 3},
}


def three_images() -> Tensor:
    return torch.cat(tiny_detectors.images((64, 64), (64, 64), (64, 64)))


def activations(model: nn.Module) -> set[type]:
    return {type(getattr(*mlp.act)) for mlp in adapter_for(model).mlps(model)}


@pytest.mark.parametrize("method", METHODS)
def test_every_block_method_quantizes_a_detector(method: str, tmp_path: Path) -> None:
    model, images = tiny_detectors.detector(), three_images()
    quantized = iasvit.quantize(model, images, "W4A4", method, **STEPS, **METHODS[method])
    moved = 0
    plain = iasvit.quantize(model, images, "W4A4", "minmax")
    for (name, layer), (_, other) in zip(quant_layers(quantized), quant_layers(plain), strict=True):
        rows = layer.weight.detach().flatten(1)
        assert max(len(row.unique()) for row in rows) <= 16, name
        moved += name.startswith("backbone.") and not torch.equal(layer.weight, other.weight)
    assert moved
    assert activations(quantized) == ({nn.ReLU} if "relu_iterations" in METHODS[method] else {nn.GELU})
    assert activations(model) == {nn.GELU}
    iasvit.save(quantized, tmp_path / "model.safetensors")
    loaded = iasvit.load(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), quantized(images))


@pytest.mark.parametrize("method", ["aphq_vit", "fima_q", "ls_vit"])
def test_what_weighs_positions_refuses_images_of_several_sizes_before_it_begins(method: str) -> None:
    ragged = tiny_detectors.images((64, 64), (64, 96))
    with pytest.raises(IasvitError, match=f"{method} weighs each position .* need one size"):
        iasvit.quantize(tiny_detectors.detector(), iter(ragged), "W4A4", method, **STEPS)


@pytest.mark.parametrize("method", ["glf_q", "unison"])
def test_what_compares_all_blocks_takes_images_of_several_sizes(method: str) -> None:
    ragged = tiny_detectors.images((64, 64), (64, 96), (64, 96))
    options = {**METHODS[method], "iterations": 2, "batch_size": 1}
    options.pop("joint_batch_size", None)
    quantized = iasvit.quantize(tiny_detectors.detector(), iter(ragged), "W4A4", method, **options)
    assert torch.isfinite(tiny_detectors.predict(quantized, ragged[0]).scores).all()


def test_logits_cannot_be_compared_where_there_are_none() -> None:
    options = {**STEPS, **METHODS["unison"], "block_loss": "suffix", "suffix_logits": 1.0}
    with pytest.raises(IasvitError, match="unison: the model puts out no table of logits"):
        iasvit.quantize(tiny_detectors.detector(), three_images(), "W4A4", "unison", **options)


def test_the_gradient_is_that_of_the_relative_error_of_what_the_neck_reads() -> None:
    model, images = tiny_detectors.detector().double(), three_images().double()
    store = calibration_store(images.float(), torch.device("cpu"), None)  # stores are of float32
    teacher = Teacher(model, store, "fima_q")
    teacher._has_logits = False
    chain = segments(model)
    index = next(i for i, segment in enumerate(chain) if segment.name == "backbone.stages.1.blocks.0")
    full: Any = images
    with torch.no_grad():
        for segment in chain[: index + 1]:
            full = segment.run(full)
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(full[0].shape, generator=generator, dtype=torch.float64)

    def error(z: Tensor) -> Tensor:
        """Slow and plain: each stage's map against the full-precision one."""
        moved, wanted = (z, *full[1:]), full
        for segment in chain[index + 1 : -1]:
            moved, wanted = segment.run(moved), segment.run(wanted)
        total = torch.zeros((), dtype=torch.float64)
        for a, b in zip(moved, wanted, strict=True):
            total = total + ((a - b) ** 2).sum() / (b**2).sum()
        return total

    z = full[0] + 0.1 * change
    found = teacher.divergence_gradient(index, (z, *full[1:]), full, range(3), 20.0)
    direction = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        slope = (error(z + 1e-5 * direction) - error(z - 1e-5 * direction)) / 2e-5
    assert torch.allclose((found * direction).sum() / 3, slope, rtol=1e-5)
    assert slope.abs() > 1e-9


def test_relu_mlps_of_a_detector_learn_what_gelu_gave() -> None:
    model, images = tiny_detectors.detector(), three_images()
    errors = []
    for iterations in (0, 60):
        changed = relu_mlps(model, images, iterations=iterations, lr=1e-3, batch_size=3)
        with torch.no_grad():
            maps = zip(changed.backbone(images), model.backbone(images), strict=True)
            errors.append(sum((a - b).square().sum() for a, b in maps))
    assert 0 < errors[1] < errors[0]


def test_ranges_of_neck_and_heads_are_searched_and_those_of_blocks_are_not() -> None:
    model, images = tiny_detectors.detector(), three_images()
    store = calibration_store(images, torch.device("cpu"), None)
    method = Unison()
    plain, searched = (
        prepare(model, QuantSpec.parse("W3A3"), method.weight_quantizer, method.activation_quantizer) for _ in range(2)
    )
    propagated(plain, store, 3, None)
    fold(plain)
    calibrate_weights(quant_layers(plain))
    initialise("propagated", searched, store, 3, None)
    inputs = inputs_of(model, images)
    errors: dict[bool, float] = {False: 0.0, True: 0.0}
    for (name, a), (_, b) in zip(quant_layers(plain), quant_layers(searched), strict=True):
        same = torch.equal(a.weight_quantizer.scale, b.weight_quantizer.scale)
        if name.startswith("backbone."):
            assert same, name
            continue
        with torch.no_grad():
            for x in inputs[name]:
                expected = model.get_submodule(name)(x)
                for is_searched, layer in ((False, a), (True, b)):
                    errors[is_searched] += ((layer(x) - expected).square().mean() / expected.square().mean()).item()
    assert 0 < errors[True] < 0.8 * errors[False]


def test_neck_and_heads_learn_to_predict_what_they_predict_in_full_precision() -> None:
    model, images = tiny_detectors.detector(), three_images()
    store = calibration_store(images, torch.device("cpu"), None)
    method = Unison(iterations=0, joint_iterations=0, init_size=3)
    errors, weights = [], []
    for iterations in (0, 40):
        quantized = prepare(model, QuantSpec.parse("W3A3"), method.weight_quantizer, method.activation_quantizer)
        initialise("propagated", quantized, store, 3, None)
        settings = replace(method.settings(), iterations=iterations, batch_size=3, lr=1e-3, scale_lr=1e-3)
        learn_heads(quantized, Teacher(model, store, "unison"), store, settings, Progress(), 0)
        x: Any = images
        y: Any = images
        with torch.no_grad():
            for full, segment in zip(segments(model)[:-1], segments(quantized)[:-1], strict=True):
                x, y = segment.run(x), full.run(y)
            errors.append(adapter_for(model).answer_errors(quantized, x, model, y))
        weights.append({name: layer.weight.detach().clone() for name, layer in quant_layers(quantized)})
    assert (errors[1] < 0.8 * errors[0]).all()
    for name, before in weights[0].items():
        assert torch.equal(before, weights[1][name]) == name.startswith("backbone."), name


def inputs_of(model: nn.Module, images: Tensor) -> dict[str, list[Tensor]]:
    """What each Linear and Conv2d of neck and heads reads while the model predicts."""
    found: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: found.setdefault(name, []).append(args[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith("backbone.")
    ]
    for image in images.split(1):
        tiny_detectors.predict(model, image)
    for handle in handles:
        handle.remove()
    return found
