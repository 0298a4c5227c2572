"""The loss surface: its middle is the loss of the weights as they are, and the weights stay."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
import torch

from iasvit.errors import IasvitError
from tasks.studies.surface import VARIANTS, prepare, surface


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_middle_is_the_present_loss_and_the_weights_stay(family: str, variant: str) -> None:
    model, images = tiny_models.MODELS[family](), tiny_models.images(4)
    block, inputs, target = prepare(model, "W3A3", 1, images, variant)
    layers = block.layers()
    assert all(layer.weight_quantizer.enabled == (variant != "stage 1") for layer in layers)
    before = [layer.weight.clone() for layer in layers]
    rows = surface(block, inputs, target, np.array([-0.1, 0.0, 0.1]), seed=0)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))
    losses = {(row["alpha"], row["beta"]): row["loss"] for row in rows}
    assert len(losses) == 9
    with torch.no_grad():
        assert losses[0.0, 0.0] == (block.run(inputs) - target).square().mean().item()
    assert len(set(losses.values())) == 9
    assert rows == surface(block, inputs, target, np.array([-0.1, 0.0, 0.1]), seed=0)


def test_a_block_that_does_not_exist_is_named() -> None:
    with pytest.raises(IasvitError, match="--block is 2, but the backbone has blocks 0 to 1"):
        prepare(tiny_models.vit(), "W3A3", 2, tiny_models.images(2), "direct")
