"""What users quantize by instead, as methods: each where its package is installed, and one sentence where it is not."""

from __future__ import annotations

import pytest
import tiny_models
import torch

import iasvit
from iasvit.errors import IasvitError
from iasvit.export import extras

PACKAGES = {"onnxruntime_static": "onnxruntime", "nncf": "nncf", "quanto": "optimum.quanto"}


@pytest.mark.parametrize("method", PACKAGES)
def test_eight_bits_answer_as_full_precision_does(method: str) -> None:
    pytest.importorskip(PACKAGES[method], reason="the extra runtimes is not installed")
    images, model = tiny_models.images(), tiny_models.vit(depth=1)
    quantized = iasvit.quantize(model, images, "W8A8", method, init_size=4)
    with torch.no_grad():
        cosine = torch.nn.functional.cosine_similarity(quantized(images), model(images))
    assert cosine.min() > 0.9
    assert quantized.quantization.method == method


@pytest.mark.parametrize("method", PACKAGES)
def test_what_a_tool_cannot_do_is_said(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> None:
        raise ImportError(f"No module named {package!r}")

    images, model = tiny_models.images(), tiny_models.vit(depth=1)
    assert method not in iasvit.list_methods()
    with pytest.raises(IasvitError, match=f"method '{method}' quantizes to W8A8.*, but W3A3 is asked for"):
        iasvit.quantize(model, images, "W3A3", method)
    monkeypatch.setattr(extras, "import_module", missing)
    with pytest.raises(IasvitError, match=r"pip install 'iasvit\[runtimes\]'"):
        iasvit.quantize(model, images, "W8A8", method)


def test_packed_weights_of_quanto_are_evaluated_as_all_are() -> None:
    pytest.importorskip("optimum.quanto", reason="the extra runtimes is not installed")
    images, model = tiny_models.images(), tiny_models.vit(depth=1)
    quantized = iasvit.quantize(model, images, "W4A8", "quanto", init_size=4)
    with torch.inference_mode():
        assert quantized(images).shape == model(images).shape
