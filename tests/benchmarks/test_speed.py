"""Speed, with pytest-benchmark: `tox -e bench`. Elsewhere each body runs once, untimed, as a test that it works."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny_models
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import iasvit
from iasvit.quantizers import Log2Quantizer, Quantizer, SULQuantizer, TwinSoftmaxQuantizer, UniformQuantizer
from tasks.mini import scenes, zoo

QUANTIZERS: dict[str, Callable[[], Quantizer]] = {
    "uniform per tensor": lambda: UniformQuantizer(3),
    "uniform per channel": lambda: UniformQuantizer(3, channel_dim=-1),
    "log2": lambda: Log2Quantizer(3),
    "log-sqrt2": lambda: Log2Quantizer(3, steps_per_octave=2),
    "SULQ": lambda: SULQuantizer(3),
    "twin softmax": lambda: TwinSoftmaxQuantizer(3),
}


def attention(tokens: int = 197) -> torch.Tensor:
    """Post-softmax values 4×3×tokens×tokens."""
    return torch.randn(4, 3, tokens, tokens, generator=torch.Generator().manual_seed(0)).mul(3).softmax(dim=-1)


@pytest.mark.benchmark(group="calibrate, 4×3×197×197")
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_calibrate(benchmark: BenchmarkFixture, kind: str) -> None:
    x = attention()

    def calibrate() -> Quantizer:
        quantizer = QUANTIZERS[kind]()
        quantizer.calibrate(x)
        return quantizer

    assert (benchmark(calibrate)(x) - x).square().mean() < x.square().mean()


@pytest.mark.benchmark(group="fake quantization, 4×3×197×197")
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_forward(benchmark: BenchmarkFixture, kind: str) -> None:
    x = attention()
    quantizer = QUANTIZERS[kind]()
    quantizer.calibrate(x)
    with torch.inference_mode():
        assert torch.equal(benchmark(quantizer, x), quantizer.decode(quantizer.encode(x)))


@pytest.mark.benchmark(group="quantize a tiny model, 12 images, W3A3")
@pytest.mark.parametrize("backbone", tiny_models.MODELS)
@pytest.mark.parametrize("method", iasvit.list_methods())
def test_quantize(benchmark: BenchmarkFixture, method: str, backbone: str) -> None:
    model, images = tiny_models.MODELS[backbone](), tiny_models.images(12)
    options = {"iterations": 5, "batch_size": 4} if method == "ias_vit" else {}
    quantized = benchmark.pedantic(
        iasvit.quantize, args=(model, images, "W3A3", method), kwargs=options, rounds=2, warmup_rounds=1
    )
    assert torch.isfinite(quantized(images)).all()


@pytest.mark.benchmark(group="evaluate a mini backbone, 16 images, W3A3")
@pytest.mark.parametrize("method", ["fp32", "minmax", "ptq4vit", "repq_vit", "ias_vit"])
def test_evaluate(benchmark: BenchmarkFixture, method: str) -> None:
    if method not in ("fp32", "repq_vit") and not benchmark.enabled:
        pytest.skip("one method shows that it works where nothing is measured")
    model = zoo.build("deit_t").eval()
    images = torch.randn(16, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    if method != "fp32":
        options = {"iterations": 0} if method == "ias_vit" else {}
        model = iasvit.quantize(model, images[:4], "W3A3", method, **options)
    with torch.inference_mode():
        assert benchmark(model, images).shape == (16, zoo.NUM_CLASSES)


@pytest.mark.benchmark(group="render 100 scenes")
def test_render(benchmark: BenchmarkFixture) -> None:
    images, labels = benchmark(scenes.render_images, "val", 0, 100, zoo.IMAGE_SIZE)
    assert len(images) == len(labels) == 100


@pytest.mark.benchmark(group="save and load, tiny ViT, W3A3")
def test_save_and_load(benchmark: BenchmarkFixture, tmp_path: object) -> None:
    images = tiny_models.images(4)
    quantized = iasvit.quantize(tiny_models.vit(), images, "W3A3", "minmax")
    path = f"{tmp_path}/model.safetensors"

    def there_and_back() -> torch.nn.Module:
        iasvit.save(quantized, path)
        return iasvit.load(path)

    assert torch.equal(benchmark(there_and_back)(images), quantized(images))
