"""Captures: a layer's inputs and outputs, and squared gradients of the log-likelihood of labels drawn by the model."""

from __future__ import annotations

import copy

import pytest
import slow_search
import tiny_models
import torch
from baselines_tiny import FAMILIES, METHODS, tiny_images, tiny_model
from torch import Tensor, nn

from iasvit.calibration import ActivationStore, calibration_store, fisher
from iasvit.calibration.fisher import captures
from iasvit.errors import IasvitError
from iasvit.models import Segment, insert_quantizers
from iasvit.models.likelihood import label_gradient
from iasvit.nn import QuantLinear, quantizers_of
from iasvit.quantizers import SymmetricQuantizer
from iasvit.spec import QuantSpec


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def store(images: Tensor) -> ActivationStore:
    return calibration_store(images, images.device)


def quantizable(family: str) -> nn.Module:
    method = METHODS["ptq4vit"]()
    model = insert_quantizers(
        tiny_model(family), QuantSpec.parse("W3A3"), method.weight_quantizer, method.activation_quantizer
    )
    return model.requires_grad_(False)


class Toy(nn.Module):
    """logits = W₂·tanh(W₁·x + c₁) + c₂."""

    def __init__(self) -> None:
        super().__init__()
        generator = draws(0)
        for name, (inputs, outputs) in {"first": (5, 4), "second": (4, 3)}.items():
            linear = nn.Linear(inputs, outputs)
            linear.weight.data = torch.randn(outputs, inputs, generator=generator)
            linear.bias.data = torch.randn(outputs, generator=generator)
            setattr(self, name, QuantLinear.from_float(linear, SymmetricQuantizer(3), SymmetricQuantizer(3)))
        self.requires_grad_(False)

    def segments(self) -> list[Segment]:
        return [
            Segment("first", lambda x: torch.tanh(self.first(x.flatten(1))), (("first", self.first),)),
            Segment("nothing", lambda x: x, ()),
            Segment("second", self.second, (("second", self.second),)),
        ]


def test_squared_gradients_of_a_model_differentiated_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy()
    monkeypatch.setattr(fisher, "adapter_for", lambda model: tiny_models.ChainAdapter())
    x = torch.randn(7, 5, 1, 1, generator=draws(1))
    w1, c1, w2, c2 = (p.double() for p in (toy.first.weight, toy.first.bias, toy.second.weight, toy.second.bias))
    hidden = x.flatten(1).double() @ w1.T + c1
    logits = torch.tanh(hidden) @ w2.T + c2
    p = logits.softmax(dim=1)
    labels = torch.multinomial(p, 1, generator=draws(4))
    at_logits = nn.functional.one_hot(labels[:, 0], 3) - p
    at_hidden = (at_logits @ w2) * (1 - torch.tanh(hidden) ** 2)
    found = {layer.name: layer for segment in captures(toy, store(x), draws(4), batch_size=3) for layer in segment}
    torch.testing.assert_close(found["second"].fisher, at_logits.square().float())
    torch.testing.assert_close(found["first"].fisher, at_hidden.square().float(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found["second"].inputs[0], torch.tanh(hidden).float())
    torch.testing.assert_close(found["first"].output, hidden.float())
    assert torch.equal(found["first"].inputs[0], x.flatten(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_captures_equal_one_backward_through_the_whole_model(family: str) -> None:
    model = quantizable(family)
    images = tiny_images(model, 5)
    expected = slow_search.observe(tiny_model(family), METHODS["ptq4vit"](), "W3A3", images, seed=9)
    found = {
        layer.name: layer for segment in captures(model, store(images), draws(9), batch_size=2) for layer in segment
    }
    assert sorted(found) == sorted(expected)
    for name, layer in found.items():
        assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(layer.inputs, expected[name].inputs, strict=True))
        torch.testing.assert_close(layer.output, expected[name].output, atol=1e-4, rtol=1e-4)
        gradients = expected[name].gradient
        assert gradients.abs().max() > 0
        torch.testing.assert_close(
            layer.fisher, gradients.square(), rtol=2e-2, atol=float(gradients.abs().max()) ** 2 / 1e4
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_without_labels_captures_come_in_the_order_of_the_forward(family: str) -> None:
    model = quantizable(family)
    images = store(tiny_images(model, 3))
    forward = [layer for segment in captures(model, images, None) for layer in segment]
    backward = [segment for segment in captures(model, images, draws(0)) if segment]
    reordered = [layer for segment in reversed(backward) for layer in segment]
    assert [layer.name for layer in forward] == [layer.name for layer in reordered]
    for one, other in zip(forward, reordered, strict=True):
        assert one.fisher is None
        assert torch.equal(one.output, other.output)
        assert all(torch.equal(x, y) for x, y in zip(one.inputs, other.inputs, strict=True))


def test_quantizers_are_off_meanwhile_and_as_before_afterwards() -> None:
    model = quantizable("vit")
    quantizers = [q for weights in (True, False) for _, q in quantizers_of(model, weights=weights)]
    quantizers[0].enabled = False
    with torch.enable_grad():
        for segment in captures(model, store(tiny_images(model, 2)), draws(0)):
            assert torch.is_grad_enabled()  # what a generator does inside is not done to its caller
            assert not any(quantizer.enabled for quantizer in quantizers)
            assert all(not layer.output.requires_grad for layer in segment)
    assert [quantizer.enabled for quantizer in quantizers] == [False] + [True] * (len(quantizers) - 1)


def test_labels_are_drawn_from_the_predictions_by_the_seed() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0]]).repeat(20_000, 1)
    gradient = label_gradient(logits, draws(3))
    assert torch.equal(gradient, label_gradient(logits, draws(3)))
    assert not torch.equal(gradient, label_gradient(logits, draws(4)))
    p = logits[0].softmax(0)
    drawn = gradient + p
    assert torch.allclose(drawn.sum(dim=1), torch.ones(()), atol=1e-6)
    torch.testing.assert_close(drawn.mean(dim=0), p, atol=0.01, rtol=0)  # 3 standard errors
    # The mean gradient vanishes at the model's own predictions, its square, the Fisher, does not: p·(1 - p).
    torch.testing.assert_close(gradient.square().mean(dim=0), p * (1 - p), atol=0.01, rtol=0)


def test_bad_input_is_named() -> None:
    with pytest.raises(IasvitError, match=r"outputs \(2, 3, 4\)"):
        label_gradient(torch.zeros(2, 3, 4), draws(0))
    model = quantizable("vit")
    model.blocks[1].mlp.fc1.bias[0] = torch.nan
    for labels in (None, draws(0)):
        with pytest.raises(IasvitError, match=r"blocks\.1"):
            list(captures(copy.deepcopy(model), store(tiny_images(model, 2)), labels))
