"""What the heads of mmdet's detectors output, and the scores of labels drawn from it."""

from __future__ import annotations

import pytest
import tiny_detectors
import torch
from torch import Tensor, nn

from iasvit.models import adapter_for, segments
from iasvit.models.mmdet_heads import (
    LABEL_SETS,
    Component,
    divergence,
    find_regions,
    flat,
    label_scores,
    run_heads,
    run_heads_at,
)

SIZE = (64, 96)


@pytest.fixture(params=[False, True], ids=["mask", "cascade"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_detectors.detector(cascade=request.param).requires_grad_(False)


def outputs_of(model: nn.Module, images: Tensor) -> list[Component]:
    return run_heads(model, model.extract_feat(images), tuple(images.shape[2:]))


def mask_regions(model: nn.Module) -> list[Tensor]:
    """A list to which each call of a mask RoI extractor adds its regions."""
    seen: list[Tensor] = []
    extractor = model.roi_head.mask_roi_extractor
    for module in extractor if isinstance(extractor, nn.ModuleList) else [extractor]:
        module.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    return seen


@torch.no_grad()
def test_masks_are_those_of_the_detectors_own_predictions(model: nn.Module) -> None:
    (image,) = tiny_detectors.images(SIZE)
    regions = mask_regions(model)
    predicted = tiny_detectors.predict(model, image)
    assert len(predicted) > 1
    expected = list(regions)
    regions.clear()
    outputs_of(model, image)
    assert len(regions) == len(expected) > 0
    for found, wanted in zip(regions, expected, strict=True):
        assert torch.equal(found, wanted)


@torch.no_grad()
def test_every_layer_runs_even_without_detections_and_proposals(model: nn.Module) -> None:
    images = torch.cat(tiny_detectors.images(SIZE, SIZE))
    model.roi_head.test_cfg.score_thr = 2.0
    regions = mask_regions(model)
    components = outputs_of(model, images)
    assert len(regions[0]) == 2 * model.roi_head.test_cfg.max_per_img
    assert all(len(component.values) for component in components)
    model.rpn_head.test_cfg.min_bbox_size = 1e6
    regions.clear()
    outputs_of(model, images)
    assert torch.equal(regions[0][:, 0], torch.tensor([0.0, 1.0]))


@torch.no_grad()
def test_outputs_of_a_batch_are_those_of_its_images(model: nn.Module) -> None:
    images = torch.cat(tiny_detectors.images(SIZE, SIZE))
    together = outputs_of(model, images)
    alone = [outputs_of(model, image) for image in images.split(1)]
    for place, component in enumerate(together):
        assert int(component.image.max()) == 1
        for index in range(2):
            found = component.values[component.image == index]
            torch.testing.assert_close(found, alone[index][place].values, atol=5e-3, rtol=5e-3)
    answer = flat(together, 2)
    assert answer.shape[0] == 2
    assert answer.shape[1] >= flat(alone[0], 1).shape[1]


@torch.no_grad()
def test_heads_output_the_same_where_they_would_look_themselves(model: nn.Module) -> None:
    features = model.extract_feat(torch.cat(tiny_detectors.images(SIZE, SIZE)))
    wanted, regions = find_regions(model, features, SIZE)
    found = run_heads_at(model, features, regions)
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours.values, theirs.values)
        assert torch.equal(ours.image, theirs.image)
        assert torch.equal(ours.weight, theirs.weight)
    assert divergence(found, wanted) == 0


@torch.no_grad()
def test_the_likeliest_proposals_are_kept(model: nn.Module) -> None:
    features = model.extract_feat(torch.cat(tiny_detectors.images(SIZE, SIZE)))
    _, every = find_regions(model, features, SIZE)
    _, few = find_regions(model, features, SIZE, 3)
    for image in range(2):
        rows, kept = (regions.boxes[0][regions.boxes[0][:, 0] == image] for regions in (every, few))
        assert len(rows) > 3
        assert torch.equal(kept, rows[:3])


@pytest.mark.parametrize("kind", ["classes", "binary", "offsets"])
def test_the_divergence_is_that_of_the_predicted_distributions(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    full, ours, weight = (torch.randn(5, n, generator=generator, dtype=torch.float64) for n in (4, 4, 1))
    distribution = {
        "classes": lambda x: torch.distributions.Categorical(logits=x),
        "binary": lambda x: torch.distributions.Bernoulli(logits=x),
        "offsets": lambda x: torch.distributions.Laplace(x, torch.ones_like(x)),
    }[kind]
    kl = torch.distributions.kl_divergence(distribution(full), distribution(ours))
    expected = (weight.square() * kl.view(5, -1)).sum()
    image = torch.zeros(5, dtype=torch.int64)
    found = divergence([Component(ours, image, kind, 7 * weight)], [Component(full, image, kind, weight)])
    torch.testing.assert_close(found, expected)


# ---- scores ----------------------------------------------------------------------------------------------------------


def sampled(kind: str, values: Tensor, count: int = 4000) -> Tensor:
    component = Component(values, torch.zeros(len(values), dtype=torch.int64), kind, torch.ones(()))
    return torch.stack([component.score(torch.Generator().manual_seed(i)) for i in range(count)])


@pytest.mark.parametrize("kind", ["classes", "binary", "offsets"])
def test_squared_scores_average_to_the_fisher(kind: str) -> None:
    values = 1.5 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    scores = sampled(kind, values)
    p = {"classes": values.softmax(dim=1), "binary": values.sigmoid()}.get(kind)
    fisher = torch.ones_like(values) if p is None else p * (1 - p)
    torch.testing.assert_close(scores.mean(dim=0), torch.zeros_like(values), atol=0.08, rtol=0)
    torch.testing.assert_close(scores.square().mean(dim=0), fisher, atol=0.03, rtol=0)


def test_a_columns_gradient_is_the_score_of_its_labels(model: nn.Module) -> None:
    images = torch.cat(tiny_detectors.images(SIZE, SIZE))
    model.requires_grad_(True)
    components = outputs_of(model, images)
    table = label_scores(components, 2)
    assert torch.equal(table, torch.zeros(2, LABEL_SETS))
    values = [component.values for component in components]
    different = []
    for column in range(LABEL_SETS):
        gradients = torch.autograd.grad(table[1, column], values, retain_graph=True)
        for component, gradient in zip(components, gradients, strict=True):
            score = component.score(torch.Generator().manual_seed(column))
            score[component.image != 1] = 0
            torch.testing.assert_close(gradient, score)
            assert gradient.abs().max() > 0
        different.append(gradients[0])
    assert not torch.equal(different[0], different[1])


def test_each_kind_of_output_weighs_as_a_mean(model: nn.Module) -> None:
    components = outputs_of(model, torch.cat(tiny_detectors.images(SIZE, SIZE)))
    stages = [1.0, 0.5] if isinstance(model.roi_head.bbox_head, nn.ModuleList) else [1.0]
    weights = {"rpn": [1.0], "boxes": stages, "masks": stages}
    classes = components[2 : -len(stages) : 2]
    assert all(component.kind == "classes" for component in classes)
    for component, weight in zip(classes, weights["boxes"], strict=True):
        for image in range(2):
            total = component.weight.square()[component.image == image].sum()
            assert float(total) == pytest.approx(weight, rel=1e-5)
    for component, weight in zip(components[-len(stages) :], weights["masks"], strict=True):
        total = component.weight.square().expand_as(component.values)[component.image == 0].sum()
        assert float(total) == pytest.approx(2 * weight, rel=1e-5)  # the class found, and all others together
    assert float(components[0].weight.square() * components[0].values.shape[1]) == pytest.approx(1.0, rel=1e-5)


def test_the_likelihoods_gradient_reaches_every_layer(model: nn.Module) -> None:
    model.requires_grad_(True)
    x: Tensor | tuple[Tensor, ...] = tiny_detectors.images((96, 64))[0]
    for segment in segments(model)[:-1]:
        x = segment.run(x)
    adapter_for(model).log_likelihood(model, x, torch.Generator().manual_seed(0)).sum().backward()
    untouched = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert untouched == []
