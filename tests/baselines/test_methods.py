"""What every baseline must do: codes that fit, files that load to the bit, the same result from the same seed."""

from __future__ import annotations

import copy
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from baselines_tiny import FAMILIES, METHODS, StopAfter, Stopped, tiny_images, tiny_model
from tiny_models import same_bits
from torch import Tensor, nn

import iasvit
from iasvit import methods
from iasvit.errors import IasvitError
from iasvit.methods import Method
from iasvit.nn import quantizers_of
from iasvit.progress import Progress
from iasvit.sos import IASViT

every_method = pytest.mark.parametrize("name", METHODS)
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The methods of this source tree, whatever is installed."""
    entries = {
        name: EntryPoint(name, f"{cls.__module__}:{cls.__name__}", methods.GROUP) for name, cls in METHODS.items()
    }
    monkeypatch.setattr(methods, "_entries", lambda: entries)


def quantize(model: nn.Module, images: Tensor, name: str, spec: str = "W4A4", **options: object) -> nn.Module:
    known = methods.method_options(name)
    small = {key: value for key, value in {"candidates": 10, "steps": 0}.items() if key in known}
    return iasvit.quantize(model, images, spec, name, **{**small, **options})


def equal(one: nn.Module, other: nn.Module) -> bool:
    return same_bits(one.state_dict(), other.state_dict())


@every_family
@every_method
def test_codes_fit_in_the_bits_of_the_spec(name: str, family: str) -> None:
    model = tiny_model(family)
    images = tiny_images(model, 4)
    head = "head" if family == "vit" else "head.fc"
    quantized = quantize(model, images, name, f"W3A4,{head}=W8A6")
    seen: set[str] = set()

    def check(path: str, quantizer: nn.Module, x: Tensor, n_bits: int) -> None:
        assert quantizer.n_bits == n_bits
        codes = quantizer.encode(x)
        assert codes.dtype == torch.uint8
        assert int(codes.max()) < 2**n_bits
        assert torch.equal(
            quantizer.decode(codes), quantizer.forward(x)
        )  # the forward is what an integer machine computes
        zero_point = getattr(quantizer, "zero_point", 0)
        assert isinstance(zero_point, int) or not zero_point.is_floating_point()
        seen.add(path)

    for path, quantizer in quantizers_of(quantized, weights=True):
        weight = quantized.get_submodule(path.removesuffix(".weight_quantizer")).weight
        check(path, quantizer, weight, 8 if path.startswith(head) else 3)
        assert torch.equal(quantizer(weight), weight)  # weights are values of codes
    for path, quantizer in quantizers_of(quantized, weights=False):
        if name == "rtn":
            assert not quantizer.enabled
            continue

        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor, path: str = path) -> None:
            check(path, module, args[0], 6 if path.startswith(head) else 4)
            assert torch.equal(output, module.decode(module.encode(args[0])))

        quantizer.register_forward_hook(hook)
    quantized(tiny_images(model, 3, seed=2) * 3)  # beyond what calibration saw
    blocks = {"vit": 2, "swin": 3}[family]
    merging = int(family == "swin")
    activations = 0 if name == "rtn" else 8 * blocks + merging + 1
    assert len(seen) == 1 + 4 * blocks + merging + 1 + activations


@every_family
@every_method
def test_saved_and_loaded_it_answers_as_before_to_the_bit(name: str, family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    quantized = quantize(model, tiny_images(model, 4), name)
    iasvit.save(quantized, tmp_path / "model.safetensors")
    loaded = iasvit.load(tmp_path / "model.safetensors")
    images = tiny_images(model, 3, seed=2)
    assert torch.equal(loaded(images), quantized(images))
    assert loaded.quantization.method == name


@every_family
@every_method
def test_the_model_given_is_left_alone_and_answers_alike(name: str, family: str) -> None:
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    images = tiny_images(model, 4)
    expected = model(images)
    quantized = quantize(model, images, name, "W8A8")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(model(images), expected)
    similarity = torch.nn.functional.cosine_similarity(quantized(images), expected, dim=1)
    assert similarity.min() > 0.97  # at 8 bits; log-sqrt2 has the largest error


@every_method
def test_the_same_seed_gives_the_same_model_from_a_tensor_or_from_batches(name: str) -> None:
    model = tiny_model("vit")
    images = tiny_images(model, 6)
    one = quantize(model, images, name, seed=3)
    assert equal(one, quantize(model, images, name, seed=3))
    assert equal(one, quantize(model, iter(images.split(4)), name, seed=3))


def test_another_seed_draws_other_labels_for_the_fisher() -> None:
    model = tiny_model("vit")
    images = tiny_images(model, 4)
    models = [quantize(model, images, "ptq4vit", candidates=100, seed=seed) for seed in range(4)]
    assert not all(equal(models[0], other) for other in models[1:])


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"rtn"}))
def test_only_the_first_images_are_used(name: str) -> None:
    model = tiny_model("vit")
    images = tiny_images(model, 6)
    method = methods.get_method(name)
    most = 128 if name in ("gptq", "gptaq") else 32
    assert (method.init_size, methods.images_used(method, 256), methods.images_used(method, 6)) == (most, most, 6)
    some = quantize(model, images, name, init_size=4)
    assert equal(some, quantize(model, images[:4], name))
    assert not equal(some, quantize(model, images, name))


def test_how_many_images_a_method_reads_is_what_it_says() -> None:
    assert methods.images_used(methods.get_method("rtn"), 256) == 0
    assert methods.images_used(IASViT(), 256) == 256


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"rtn"}))
def test_bad_options_and_images_are_one_clear_sentence(name: str) -> None:
    model = tiny_model("vit")
    images = tiny_images(model, 2)
    with pytest.raises(IasvitError, match="init_size is 0"):
        quantize(model, images, name, init_size=0)
    with pytest.raises(IasvitError, match=rf"method '{name}' has no option 'iterations'; it knows .*seed"):
        quantize(model, images, name, iterations=5)
    with pytest.raises(IasvitError, match="holds no image"):
        quantize(model, images[:0], name)
    with pytest.raises(IasvitError, match="NaN or Inf"):
        quantize(model, images * torch.inf, name)
    model.blocks[1].mlp.fc1.weight[0, 0] = torch.inf
    with pytest.raises(IasvitError, match=r"'blocks\.1.*NaN or Inf"):
        quantize(model, images, name)


@pytest.mark.parametrize("name", ["ptq4vit", "base_ptq"])
@pytest.mark.parametrize("options", [{"candidates": 0}, {"rounds": 0}, {"low": 0.0}, {"low": 2.0, "high": 1.0}])
def test_bad_search_options_are_named(name: str, options: dict[str, float]) -> None:
    with pytest.raises(IasvitError, match=next(iter(options))):
        METHODS[name](**options)


@pytest.mark.parametrize("name", ["ptq4vit", "base_ptq"])
def test_a_stopped_search_goes_on_after_the_last_segment(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iasvit.calibration import scale_search

    model = tiny_model("vit")
    images = tiny_images(model, 4)
    expected = quantize(model, images, name)
    with pytest.raises(Stopped):
        quantize(model, images, name, progress=StopAfter(tmp_path, 2))
    searched: list[str] = []
    original = scale_search.search_layer
    monkeypatch.setattr(scale_search, "search_layer", lambda c, *args: (searched.append(c.name), original(c, *args)))
    resumed = quantize(model, images, name, progress=Progress(checkpoint=tmp_path))
    assert equal(resumed, expected)
    assert all(
        quantizer.enabled for weights in (True, False) for _, quantizer in quantizers_of(resumed, weights=weights)
    )
    # Segments with layers: patch embedding, two blocks, head. Two were done, from the end the Fisher comes from.
    assert len(searched) == {"ptq4vit": 6 + 1, "base_ptq": 6 + 1}[name]
    assert ("head" in searched) == (name == "base_ptq")


@every_method
def test_it_is_a_method_with_a_seed(name: str) -> None:
    method = METHODS[name]()
    assert isinstance(method, Method)
    assert method.name == name
    assert "seed" in methods.method_options(name)
