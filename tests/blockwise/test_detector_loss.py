"""GLF-Q on detectors: its loss against a slow, plain version of the text, and what it learns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny_detectors
import torch
from torch import Tensor, nn

from baselines.glf_q import GLFQ
from iasvit.blockwise import DetectorSuffix, MeanSquare, Teacher
from iasvit.blockwise.heads import learn_neck
from iasvit.blockwise.initialise import initialise
from iasvit.blockwise.losses import Block
from iasvit.blockwise.parts import Learnt
from iasvit.calibration import calibration_store
from iasvit.models import adapter_for, prepare, relative_error, segments
from iasvit.models.mmdet_detector import REGIONS
from iasvit.models.mmdet_heads import find_regions
from iasvit.nn import quant_layers
from iasvit.progress import Progress
from iasvit.reconstruction import SegmentJob
from iasvit.spec import QuantSpec

CPU = torch.device("cpu")
COUNT = 4


def images(count: int = COUNT) -> Tensor:
    return torch.cat(tiny_detectors.images(*[(64, 64)] * count))


class Example:
    """A block of a tiny detector, with outputs beside the full-precision ones."""

    def __init__(self, cascade: bool = False, name: str = "backbone.stages.1.blocks.0") -> None:
        self.model = tiny_detectors.detector(cascade).requires_grad_(False)
        self.store = calibration_store(images(), CPU, None)
        self.teacher = Teacher(self.model, self.store, "test")
        self.chain = segments(self.model)
        self.index = next(i for i, segment in enumerate(self.chain) if segment.name == name)
        inputs: Any = self.store
        for segment in self.chain[: self.index]:
            inputs = inputs.map(segment.run, COUNT, segment.name)
        self.targets = inputs.map(self.chain[self.index].run, COUNT, name)
        self.job = SegmentJob(self.index, self.chain[self.index], inputs, inputs, self.targets, None)
        self.full, *self.others = self.targets.gather(range(COUNT))
        noise = torch.randn(self.full.shape, generator=torch.Generator().manual_seed(9))
        self.output = self.full + 0.1 * noise

    def begun(self, **weights: float) -> DetectorSuffix:
        """The loss, with the first two images for its units."""
        loss = DetectorSuffix(inner=MeanSquare(), **weights)
        loss.begin(Block(self.job, Learnt(), self.teacher, iterations=1, seed=0))
        loss.set_unit(self.output[:2], self.full[:2], torch.arange(2))
        return loss

    def value(self, loss: DetectorSuffix, output: Tensor | None = None) -> Tensor:
        """The loss of the last two images."""
        return loss((self.output if output is None else output)[2:], self.full[2:], torch.arange(2, COUNT))

    def behind(self, z: Tensor, which: slice) -> tuple[list[Tensor], list[Tensor]]:
        """What the stages and the neck put out behind outputs z of the block, in plain calls."""
        maps: Any = (z[which], *(other[which] for other in self.others))
        for segment in self.chain[self.index + 1 : -1]:
            maps = segment.run(maps)
        last, *kept = maps
        norms = [getattr(self.model.backbone, f"norm{i}") for i in range(4)]
        normed = [norm(y).permute(0, 3, 1, 2) for norm, y in zip(norms, (*kept, last), strict=True)]
        return [*kept, last], list(self.model.neck(normed))

    def parts(self, which: slice) -> list[float]:
        """Slow and plain: the errors of stages, boxes, masks and block."""
        (stages, maps), (full_stages, full_maps) = (self.behind(z, which) for z in (self.output, self.full))
        _, regions = find_regions(self.model, full_maps, (64, 64), REGIONS)
        roi = self.model.roi_head
        cascade = isinstance(roi.bbox_head, nn.ModuleList)
        boxes = masks = 0.0
        for stage, rois in enumerate(regions.boxes):
            head = roi.bbox_head[stage] if cascade else roi.bbox_head
            extractor = roi.bbox_roi_extractor[stage] if cascade else roi.bbox_roi_extractor
            outputs = [head(extractor(m[: extractor.num_inputs], rois)) for m in (maps, full_maps)]
            boxes += sum(relative(a, b) for a, b in zip(*outputs, strict=True))
        for stage in range(len(regions.boxes)):
            head = roi.mask_head[stage] if cascade else roi.mask_head
            extractor = roi.mask_roi_extractor[stage] if cascade else roi.mask_roi_extractor
            masks += relative(*(head(extractor(m[: extractor.num_inputs], regions.masks)) for m in (maps, full_maps)))
        own = float((self.output - self.full)[which].square().mean())
        return [sum(relative(a, b) for a, b in zip(stages, full_stages, strict=True)), boxes, masks, own]


def relative(x: Tensor, full: Tensor) -> float:
    return float(((x - full) ** 2).sum() / (full**2).sum())


@pytest.fixture(scope="module")
def example() -> Example:
    return Example()


@pytest.mark.parametrize("cascade", [False, True])
def test_each_term_is_over_its_value_on_the_first_batch_times_its_weight(cascade: bool, example: Example) -> None:
    used = Example(cascade=True) if cascade else example
    units, found = used.parts(slice(2)), used.parts(slice(2, COUNT))
    assert min(units) > 1e-6
    terms = [part / unit for part, unit in zip(found, units, strict=True)]
    assert max(abs(term - 1) for term in terms) > 1e-2  # else a wrong unit would not show
    names = ("stages", "boxes", "masks", "local")
    for name, term in zip(names, terms, strict=True):
        weights = {**dict.fromkeys(names, 0.0), name: 3.0}
        assert used.value(used.begun(**weights)).item() == pytest.approx(3 * term, rel=1e-3), name
    expected = 2 * terms[0] + 0.5 * terms[1] + 0.5 * terms[2] + 2 * terms[3]
    assert used.value(used.begun()).item() == pytest.approx(expected, rel=1e-3)


def test_the_methods_weights_are_those_of_the_text() -> None:
    loss = GLFQ().loss()
    assert isinstance(loss, DetectorSuffix)
    weights = loss.stages, loss.boxes, loss.masks, loss.local, loss.features, loss.logits
    assert weights == (2.0, 0.5, 0.5, 2.0, 1.0, 0.0)


@pytest.mark.parametrize("term", ["stages", "boxes", "masks", "local"])
def test_each_term_leads_the_blocks_output_to_the_full_precision_one(term: str, example: Example) -> None:
    weights = {**dict.fromkeys(("stages", "boxes", "masks", "local"), 0.0), term: 1.0}
    loss = example.begun(**weights)
    leaf = example.output.clone().requires_grad_()
    value = example.value(loss, leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert gradient[2:].abs().sum() > 0
    step = 1e-3 * gradient / gradient.norm()
    with torch.no_grad():
        assert example.value(loss, leaf - step) < value
        assert example.value(loss, example.full).item() == pytest.approx(0, abs=1e-9)


def test_a_detector_without_masks_has_no_error_of_them() -> None:
    example = Example()
    example.model.roi_head.mask_head = None
    loss = example.begun(stages=0.0, boxes=0.0, masks=1.0, local=0.0)
    assert example.value(loss) == 0
    assert example.value(example.begun()) > 0


def test_the_neck_learns_what_it_puts_out_in_full_precision_and_the_heads_stay() -> None:
    model, given = tiny_detectors.detector(), images(3)
    store = calibration_store(given, CPU, None)
    method, adapter = GLFQ(init_size=3), adapter_for(model)
    errors, states = [], []
    for iterations in (0, 40):
        quantized = prepare(model, QuantSpec.parse("W3A3"), method.weight_quantizer, method.activation_quantizer)
        initialise("observed", quantized, store, 3, None)
        settings = replace(method.settings(), iterations=iterations, batch_size=3, lr=1e-3, scale_lr=1e-3)
        learn_neck(quantized, Teacher(model, store, "glf_q"), store, settings, Progress(), 0)
        x: Any = given
        y: Any = given
        with torch.no_grad():
            for full, segment in zip(segments(model)[:-1], segments(quantized)[:-1], strict=True):
                x, y = segment.run(x), full.run(y)
            errors.append(relative_error(adapter.neck(quantized).run(x), adapter.neck(model).run(y)).item())
        states.append({name: value.clone() for name, value in quantized.state_dict().items()})
    assert errors[1] < 0.8 * errors[0]
    for name, before in states[0].items():
        if name.endswith(".weight") and name.startswith("neck."):
            assert not torch.equal(before, states[1][name]), name
        elif not name.startswith("neck."):
            assert torch.equal(before, states[1][name]), name


def test_the_method_learns_blocks_and_neck_and_calibrates_the_heads() -> None:
    model = tiny_detectors.detector().requires_grad_(False)
    options = {"batch_size": 2, "init_size": 3, "lr": 1e-2, "initialisation": "observed"}
    method = GLFQ(**options, rotation=False, relu=False)
    learnt, calibrated = (
        replace(method, iterations=n).quantize(model, images(3), QuantSpec.parse("W4A4"), Progress()) for n in (2, 0)
    )
    for (name, layer), (_, other) in zip(quant_layers(learnt), quant_layers(calibrated), strict=True):
        head = name.startswith(("rpn_head.", "roi_head."))
        assert torch.equal(layer.weight, other.weight) == head, name
