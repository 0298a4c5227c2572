"""The methods of block reconstruction from end to end on tiny models."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from baselines_tiny import FAMILIES, tiny_images, tiny_model
from tiny_models import same_bits
from torch import Tensor, nn

import iasvit
from baselines.adalog import AdaLog, AdaLogRetrained
from baselines.aphq_vit import APHQViT
from baselines.brecq import BRECQ
from baselines.fima_q import FIMAQ
from baselines.glf_q import GLFQ
from baselines.ls_vit import LSViT
from baselines.qdrop import QDrop
from iasvit import methods
from iasvit.admission import admission
from iasvit.blockwise import Loss, Teacher
from iasvit.blockwise.core import Settings
from iasvit.blockwise.joint import Augmentation
from iasvit.errors import IasvitError
from iasvit.nn import quant_layers, quantizers_of
from iasvit.progress import Progress
from iasvit.quantizers import AdaLogQuantizer, UniformQuantizer
from iasvit.unison import Unison

METHODS = {cls.name: cls for cls in (QDrop, BRECQ, FIMAQ, LSViT, APHQViT, GLFQ, AdaLogRetrained, Unison)}
SMALL = {
    "aphq_vit": {"relu": False},
    "glf_q": {"relu": False, "rotation": False},
    "unison": {"joint_iterations": 2, "joint_batch_size": 4},
}
every_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The methods of this source tree, whatever is installed."""
    entries = {
        name: EntryPoint(name, f"{cls.__module__}:{cls.__name__}", methods.GROUP) for name, cls in METHODS.items()
    }
    monkeypatch.setattr(methods, "_entries", lambda: entries)


def quantize(model: nn.Module, images: Tensor, name: str, spec: str = "W3A3", **options: object) -> nn.Module:
    small = {"iterations": 2, "batch_size": 4, "init_size": 4, "initialisation": "observed", "recipe": "fast"}
    return iasvit.quantize(model, images, spec, name, **{**small, **SMALL.get(name, {}), **options})


@pytest.mark.parametrize("family", FAMILIES)
@every_method
def test_codes_fit_files_load_and_a_seed_gives_one_model(name: str, family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = tiny_images(model, 6)
    quantized = quantize(model, images, name)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    for path, layer in quant_layers(quantized):
        assert not layer.weight.requires_grad, path
        assert layer.weight_quantizer.encode(layer.weight).max() < 8
        assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight)
    seen = set()

    def check(quantizer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        codes = quantizer.encode(args[0])
        assert codes.max() < 8
        assert torch.equal(output, quantizer.decode(codes))
        seen.add(quantizer)

    quantizers = [quantizer for _, quantizer in quantizers_of(quantized, weights=False)]
    for quantizer in quantizers:
        quantizer.register_forward_hook(check)
        if isinstance(quantizer, UniformQuantizer):
            assert quantizer.scale.ndim == 0
            assert quantizer.zero_point.dtype == torch.int32
    test = tiny_images(model, 3, seed=2)
    expected = quantized(test)
    assert seen == set(quantizers)

    iasvit.save(quantized, tmp_path / "model.safetensors")
    assert torch.equal(iasvit.load(tmp_path / "model.safetensors")(test), expected)
    if family == "vit":
        assert same_bits(quantized.state_dict(), quantize(model, images, name).state_dict())
        assert not same_bits(quantized.state_dict(), quantize(model, images, name, seed=1).state_dict())


@every_method
def test_learning_lowers_the_error(name: str) -> None:
    model = tiny_model("vit")
    images = tiny_images(model, 16)
    full = model(images)
    options = {"lr": 3e-3 if name in ("glf_q", "unison") else 0.1, "scale_lr": 1e-2, "joint_lr": 1e-3}
    known = methods.method_options(name)

    def error(**run: object) -> float:
        quantized = quantize(model, images, name, **{key: value for key, value in run.items() if key in known})
        return (quantized(images) - full).square().mean().item()

    before = error(iterations=0, joint_iterations=0)
    after = error(iterations=25, joint_iterations=10, batch_size=8, joint_batch_size=8, **options)
    assert after < 0.95 * before


def test_adalog_is_retrained_from_where_it_is_calibrated() -> None:
    model = tiny_model("vit")
    images = tiny_images(model, 6)
    calibrated = AdaLog(init_size=4, rounds=1, steps=1)
    expected = iasvit.quantize(model, images, "W3A3", calibrated).state_dict()
    begun = quantize(model, images, "adalog_retrained", iterations=0, rounds=1, steps=1).state_dict()
    assert same_bits(begun, expected)
    learnt = quantize(model, images, "adalog_retrained", rounds=1, steps=1, lr=0.1, scale_lr=1e-2).state_dict()
    logarithmic = [name for name in learnt if name.endswith(".exponent")]
    assert logarithmic
    assert all(torch.equal(learnt[name], expected[name]) for name in logarithmic)
    assert not torch.equal(learnt["blocks.0.attn.proj.weight"], expected["blocks.0.attn.proj.weight"])


def test_fima_q_has_a_variant_of_a_scale_for_each_token(tmp_path: Path) -> None:
    model = tiny_model("vit")
    images = tiny_images(model, 6)
    options = {"per_token": True, "scale_lr": 1e-2, "init_size": 6}
    begun = quantize(model, images, "fima_q", iterations=0, **options)
    same = quantize(model, images, "fima_q", iterations=0, init_size=6)
    assert torch.equal(begun(images), same(images))  # as long as all positions have the same scale
    quantized = quantize(model, images, "fima_q", **options)
    attention = quantized.blocks[0].attn
    tokens = attention.qkv.input_quantizer.scale
    assert len(tokens) == model.pos_embed.shape[1]
    assert tokens.unique().numel() > 1
    assert quantized.head.input_quantizer.scale.ndim == 0
    assert admission(quantized).violations == ["activations per token"]
    assert not admission(same).violations
    iasvit.save(quantized, tmp_path / "model.safetensors")
    assert torch.equal(iasvit.load(tmp_path / "model.safetensors")(images), quantized(images))
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    with pytest.raises(IasvitError, match="exported are those of the last dimension"):
        iasvit.export_onnx(quantized, tmp_path / "model.onnx")


@pytest.mark.parametrize("initialisation", ["propagated", "observed", "searched"])
def test_every_initialisation_is_per_tensor_and_different(initialisation: str) -> None:
    model = tiny_model("vit")
    images = tiny_images(model, 6)
    quantized = quantize(model, images, "qdrop", iterations=0, initialisation=initialisation)
    assert all(q.scale.ndim == 0 for _, q in quantizers_of(quantized, weights=False))
    other = quantize(model, images, "qdrop", iterations=0, initialisation="observed")
    assert same_bits(quantized.state_dict(), other.state_dict()) == (initialisation == "observed")


@pytest.mark.parametrize(
    "options",
    [
        {"rounding": "adaround", "drop": 0.5},
        {"block_loss": "suffix", "suffix_logits": 1.0},
        {"block_loss": "fisher", "norm_lr": 1e-3},
        {"block_loss": "low_rank", "biases": False, "weight_scale_lr": 0},
        {"smooth_iterations": 2, "softmax": "adalog"},
        {"mix": 0.5, "crop": 0.5, "joint_features": 0},
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_unisons_options_combine(options: dict[str, object], family: str) -> None:
    model = tiny_model(family)
    quantized = quantize(model, tiny_images(model, 5), "unison", **options)
    assert torch.isfinite(quantized(tiny_images(model, 2, seed=3))).all()


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("vit")
    images = tiny_images(model, 6)
    expected = quantize(model, images, "qdrop")
    method = methods.get_method(
        "qdrop", iterations=2, batch_size=4, init_size=4, initialisation="observed", recipe="fast"
    )
    begin, begun = Loss.begin, []

    def stopping(self: Loss, block: object) -> None:
        begun.append(block.job.index)
        if len(begun) == 2:
            raise KeyboardInterrupt
        begin(self, block)

    monkeypatch.setattr(Loss, "begin", stopping)
    with pytest.raises(KeyboardInterrupt):
        iasvit.quantize(model, images, "W3A3", method, progress=Progress(checkpoint=tmp_path))
    resumed = iasvit.quantize(model, images, "W3A3", method, progress=Progress(checkpoint=tmp_path))
    assert begun[0] not in begun[1:]
    assert same_bits(resumed.state_dict(), expected.state_dict())


@pytest.mark.parametrize("name", ["aphq_vit", "fima_q", "glf_q", "ls_vit"])
def test_a_model_that_answers_each_token_is_quantized_by_what_its_head_reads(name: str) -> None:
    model = tiny_model("vit")
    model.global_pool = ""
    images = tiny_images(model, 2)
    quantized = quantize(model, images, name)
    with torch.no_grad():
        assert quantized(images).shape == model(images).shape
    assert not same_bits(quantized.state_dict(), quantize(model, images, name, iterations=0).state_dict())


def test_what_cannot_be_rotated_is_one_sentence() -> None:
    model = tiny_model("swin")
    with pytest.raises(IasvitError, match=r"nothing can be rotated here .* give rotation=false"):
        quantize(model, tiny_images(model, 2), "glf_q", rotation=True)


def test_unisons_rates_of_the_last_stages_fall_with_the_bits() -> None:
    method = Unison()
    at_three, at_six = method.joint_settings(3), method.joint_settings(6)
    assert at_six.lr == at_three.lr / 8
    assert at_six.weight_scale_lr == at_six.scale_lr == at_three.scale_lr / 8
    assert method.joint_settings(2) == at_three
    assert method.joint_settings(3, detector=True).iterations == 0
    of_heads = method.head_settings(3), method.head_settings(6)
    assert of_heads[0] == method.settings()
    for rate in ("lr", "bias_lr", "scale_lr", "weight_scale_lr"):
        assert 0 < getattr(of_heads[1], rate) == getattr(of_heads[0], rate) / 8


@pytest.mark.parametrize("spec", ["W3A3,head=W8A8", "W6A6"])
def test_unisons_joint_rates_go_by_the_bits_of_most_quantizers(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny_model("vit"), []
    settings = Unison.joint_settings

    def recorded(self: Unison, n_bits: int = 3, detector: bool = False) -> Settings:
        seen.append(n_bits)
        return settings(self, n_bits, detector)

    monkeypatch.setattr(Unison, "joint_settings", recorded)
    quantize(model, tiny_images(model, 5), "unison", spec)
    assert seen[-1] == int(spec[1])


def test_unisons_bases_are_chosen_by_what_products_put_out() -> None:
    model = tiny_model("vit")
    images = tiny_images(model, 5)
    chosen = quantize(model, images, "unison", "W4A4", iterations=0, joint_iterations=0, gelu="adalog")
    by_values = quantize(
        model, images, "unison", "W4A4", iterations=0, joint_iterations=0, gelu="adalog", bases="values"
    )
    found = [
        [q for _, q in quantizers_of(m, weights=False) if isinstance(q, AdaLogQuantizer)] for m in (chosen, by_values)
    ]
    assert len(found[0]) == 2 * len(model.blocks)  # after softmax and after GELU
    assert len(found[1]) == len(found[0])
    assert any(a.exponent != b.exponent for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["glf_q", "aphq_vit", "unison"])
def test_the_network_is_transformed_before_and_its_file_loads(name: str, tmp_path: Path) -> None:
    model = tiny_model("vit")
    images = tiny_images(model, 6)
    options = {"relu": True, "relu_iterations": 2} | ({} if name == "aphq_vit" else {"rotation": True})
    quantized = quantize(model, images, name, **options)
    steps = [step["name"] for step in quantized.quantization.transforms]
    rotations = [] if name == "aphq_vit" else ["rotate_residual", "rotate_heads"]
    assert steps == [*rotations, "relu_mlps"]
    iasvit.save(quantized, tmp_path / "model.safetensors")
    assert torch.equal(iasvit.load(tmp_path / "model.safetensors")(images), quantized(images))


def test_images_are_changed_alike_by_a_seed_and_stay_images() -> None:
    x = tiny_images(tiny_model("vit"), 6)
    assert torch.equal(Augmentation()(x), x)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        changed = Augmentation(crop=0.5, flip=True, mix=0.5)(x)
        torch.manual_seed(0)
        assert torch.equal(Augmentation(crop=0.5, flip=True, mix=0.5)(x), changed)
    assert changed.shape == x.shape
    assert changed.abs().max() <= x.abs().max() + 1e-5
    with torch.random.fork_rng():
        torch.manual_seed(1)
        flipped = Augmentation(flip=True)(x)
    kept = [torch.allclose(a, b, atol=1e-4) for a, b in zip(flipped, x, strict=True)]
    mirrored = [torch.allclose(a, b.flip(-1), atol=1e-4) for a, b in zip(flipped, x, strict=True)]
    assert all(a != b for a, b in zip(kept, mirrored, strict=True))
    assert any(mirrored)


def test_the_teacher_answers_as_the_model_does() -> None:
    from iasvit.calibration import calibration_store

    model = tiny_model("vit")
    images = tiny_images(model, 5)
    teacher = Teacher(model, calibration_store(images, torch.device("cpu")), "test")
    logits, features = teacher.answers()
    assert torch.allclose(logits, model(images), atol=1e-6)
    assert torch.allclose(model.head(features), logits, atol=1e-6)
