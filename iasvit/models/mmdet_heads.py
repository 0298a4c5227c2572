"""What the heads of mmdet's two-stage detectors output for features, with proposals of their own, and scores of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mmdet.models.dense_heads import RPNHead
from mmdet.models.detectors import TwoStageDetector
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import ConvFCBBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.structures.bbox import bbox2roi, get_box_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from iasvit.models.base import relative_error
from iasvit.models.blocks import require

LABEL_SETS = 4  # columns of `label_scores`


@dataclass(frozen=True)
class Component:
    """Some outputs of a detector's heads, and how likely labels are under them.

    Attributes:
        values: raw outputs, one row (of any shape) for an anchor, a region or a mask.
        image: of each row, the image in the batch.
        kind: "classes", a softmax over a row; "binary", a sigmoid of each value; "offsets", a Laplace distribution
            around each value, as the L1 loss has it.
        weight: of each value's log-likelihood, broadcast to `values`.
    """

    values: Tensor
    image: Tensor
    kind: str
    weight: Tensor

    def score(self, generator: torch.Generator) -> Tensor:
        """∂ log p(label) / ∂values for labels drawn from the distribution that the values give, weighted."""
        values = self.values.detach()
        if self.kind == "classes":
            p = values.softmax(dim=1)
            labels = torch.multinomial(p, 1, generator=generator)
            return self.weight * (-p).scatter_add_(1, labels, torch.ones_like(p[:, :1]))
        uniform = torch.rand(values.shape, generator=generator, device=values.device, dtype=values.dtype)
        if self.kind == "binary":
            p = values.sigmoid()
            return self.weight * ((uniform < p).to(values.dtype) - p)
        return self.weight * ((uniform < 0.5).to(values.dtype) * 2 - 1)


def check_heads(detector: TwoStageDetector) -> None:
    """Raise IasvitError where a head is of a class that `run_heads` does not know."""
    rpn, roi = getattr(detector, "rpn_head", None), getattr(detector, "roi_head", None)
    require(type(rpn) is RPNHead and rpn.use_sigmoid_cls, "rpn_head", rpn, "RPNHead with sigmoid")
    known = type(roi) in (StandardRoIHead, CascadeRoIHead) and not roi.with_shared_head
    require(known, "roi_head", roi, "StandardRoIHead or CascadeRoIHead, without a shared head")
    for head in _heads(roi.bbox_head):
        known = isinstance(head, ConvFCBBoxHead) and head.with_cls and head.with_reg and not head.custom_activation
        require(known, "roi_head.bbox_head", head, "ConvFCBBoxHead with classes and boxes")
    for head in _heads(roi.mask_head) if roi.with_mask else ():
        require(type(head) is FCNMaskHead, "roi_head.mask_head", head, FCNMaskHead.__name__)


@dataclass(frozen=True)
class Regions:
    """Where a detector's heads look: rows (image in the batch, x0, y0, x1, y1) in pixels.

    Attributes:
        boxes: for each box stage, (R, 5).
        masks: (M, 5).
        labels: the class found in each of `masks`, int64 (M,).
    """

    boxes: tuple[Tensor, ...]
    masks: Tensor
    labels: Tensor


def run_heads(detector: TwoStageDetector, features: Sequence[Tensor], size: tuple[int, int]) -> list[Component]:
    """Run RPN and RoI heads as for a prediction, and return what they output.

    Regions and masks are those of the detector's own predictions. So that every layer runs, an image without proposals
    gets its whole area for one, and of an image without detections the masks of its first proposals are predicted.

    Args:
        detector: in eval mode.
        features: of the neck, each (B, C, H, W).
        size: height and width of the images in pixels.

    Returns:
        Outputs with their gradients: the RPN's, each box stage's, each mask stage's.
    """
    return find_regions(detector, features, size)[0]


def find_regions(
    detector: TwoStageDetector, features: Sequence[Tensor], size: tuple[int, int], most: int | None = None
) -> tuple[list[Component], Regions]:
    """See `run_heads`; also the regions. `most`: proposals of an image that are kept, the likeliest; None for all."""
    count = len(features[0])
    metas = [meta_of(size) for _ in range(count)]
    scores, offsets = detector.rpn_head(features)
    components = _rpn_components(detector.rpn_head, scores, offsets)
    with torch.no_grad():
        found = detector.rpn_head.predict_by_feat(
            [x.detach() for x in scores], [x.detach() for x in offsets], batch_img_metas=metas, rescale=False
        )
        whole = features[0].new_tensor([[0.0, 0.0, size[1], size[0]]])
        boxes = [get_box_tensor(instances.bboxes)[:most] if len(instances) else whole for instances in found]

    roi_head = detector.roi_head
    box_heads, counts = _heads(roi_head.bbox_head), [len(x) for x in boxes]
    rois = bbox2roi(boxes)
    classes, stages = [], [rois]
    for stage, head in enumerate(box_heads):
        out = _stage(roi_head, roi_head._bbox_forward, stage, features, rois)
        classes.append(out["cls_score"])
        components += _box_components(head, out["cls_score"], out["bbox_pred"], rois, _stage_weight(roi_head, stage))
        if stage + 1 < len(box_heads):
            rois = _refined(head, rois, out["cls_score"], out["bbox_pred"], counts, metas)
            stages.append(rois)
    if not roi_head.with_mask:
        return components, Regions(tuple(stages), rois[:0], rois.new_zeros(0, dtype=torch.int64))

    with torch.no_grad():
        mean = torch.stack(classes).mean(dim=0)
        detections = box_heads[-1].predict_by_feat(
            rois=rois.split(counts),
            cls_scores=mean.split(counts),
            bbox_preds=out["bbox_pred"].split(counts),
            batch_img_metas=metas,
            rcnn_test_cfg=roi_head.test_cfg,
            rescale=False,
        )
        likely = mean[:, : box_heads[-1].num_classes].argmax(dim=1)
        found = [
            (get_box_tensor(instances.bboxes), instances.labels)
            if len(instances)
            else (part[:, 1:][: roi_head.test_cfg.max_per_img], labels[: roi_head.test_cfg.max_per_img])
            for instances, part, labels in zip(detections, rois.split(counts), likely.split(counts), strict=True)
        ]
        regions = Regions(
            tuple(stages), bbox2roi([where for where, _ in found]), torch.cat([labels for _, labels in found])
        )
    return components + _mask_components(roi_head, features, regions), regions


def run_heads_at(detector: TwoStageDetector, features: Sequence[Tensor], regions: Regions) -> list[Component]:
    """See `run_heads`; at given regions, whatever the detector itself would look at."""
    components = _rpn_components(detector.rpn_head, *detector.rpn_head(features))
    boxes, masks = _roi_components(detector.roi_head, features, regions)
    return components + boxes + masks


def roi_errors(
    detector: TwoStageDetector, features: Sequence[Tensor], regions: Regions, full: Sequence[Component]
) -> Tensor:
    """Error of what a detector's RoI heads put out: that of classes and boxes, and that of masks.

    Each output's squared error over its mean square in full precision, summed over a cascade's stages.

    Args:
        detector: whose heads run.
        features: of the neck, each (B, C, H, W).
        regions: where the heads look.
        full: what `find_regions` returned beside them.

    Returns:
        float32 (2,); 0 for the masks of a detector without them.
    """
    boxes, masks = _roi_components(detector.roi_head, features, regions)
    of_rois = full[len(full) - len(boxes) - len(masks) :]  # the RPN's come first
    pairs = (boxes, of_rois[: len(boxes)]), (masks, of_rois[len(boxes) :])
    zero = features[0].new_zeros(())
    return torch.stack(
        [
            relative_error(tuple(c.values for c in ours), tuple(c.values for c in wanted)) if ours else zero
            for ours, wanted in pairs
        ]
    )


def divergence(components: Sequence[Component], full: Sequence[Component]) -> Tensor:
    """KL divergence of the labels that a detector's heads predict from those in full precision: a scalar, ≥ 0.

    Both are of the same regions. Each kind of output counts as in a detector's loss (`Component.weight`, of `full`).
    """
    total = full[0].values.new_zeros(())
    for ours, wanted in zip(components, full, strict=True):
        total = total + (wanted.weight.square() * _divergence(wanted.kind, ours.values, wanted.values)).sum()
    return total


def _divergence(kind: str, x: Tensor, full: Tensor) -> Tensor:
    if kind == "classes":
        return F.kl_div(x.log_softmax(1), full.log_softmax(1), reduction="none", log_target=True).sum(1, keepdim=True)
    if kind == "binary":
        p = full.sigmoid()
        return p * (F.logsigmoid(full) - F.logsigmoid(x)) + (1 - p) * (F.logsigmoid(-full) - F.logsigmoid(-x))
    distance = (x - full).abs()  # of two Laplace distributions of scale 1
    return distance + torch.expm1(-distance)


def fixed_answers(detector: TwoStageDetector, features: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, ...]:
    """The neck's features and what the heads output for them, of one region an image: its whole area.

    No region is chosen by what is computed, so that rounding changes each output by as little as it should.
    """
    scores, offsets = detector.rpn_head(features)
    roi_head = detector.roi_head
    rois = bbox2roi([features[0].new_tensor([[0.0, 0.0, size[1], size[0]]]) for _ in range(len(features[0]))])
    outputs = [*features, *scores, *offsets]
    for stage, _ in enumerate(_heads(roi_head.bbox_head)):
        out = _stage(roi_head, roi_head._bbox_forward, stage, features, rois)
        outputs += [out["cls_score"], out["bbox_pred"]]
    for stage, _ in enumerate(_heads(roi_head.mask_head) if roi_head.with_mask else ()):
        outputs.append(_stage(roi_head, roi_head._mask_forward, stage, features, rois)["mask_preds"])
    return tuple(outputs)


def flat(components: Sequence[Component], count: int) -> Tensor:
    """All outputs of `count` images in one tensor, count×K; images with fewer regions are filled up with zeros."""
    parts = []
    for component in components:
        rows = [component.values[component.image == image].flatten() for image in range(count)]
        parts.append(nn.utils.rnn.pad_sequence(rows, batch_first=True))
    return torch.cat(parts, dim=1)


def label_scores(components: Sequence[Component], count: int) -> Tensor:
    """A table, images×LABEL_SETS, of zeros whose gradients are scores: ∂ log p(labels) of labels drawn.

    Each column belongs to labels of its own, drawn from what the heads predict: objectness of every anchor, a class
    for every region, a bit for every mask pixel, an offset of every box. `DetectorAdapter.log_likelihood` draws one,
    and the squared gradients are then an estimate of the Fisher, up to a factor. Each kind of output counts as in a
    detector's loss, which is a mean over anchors, regions or pixels.
    """
    columns = []
    for column in range(LABEL_SETS):
        total = components[0].values.new_zeros(count)
        for component in components:
            values = component.values
            generator = torch.Generator(values.device).manual_seed(column)
            change = component.score(generator) * (values - values.detach())  # 0, with the score for its gradient
            total = total.index_add(0, component.image, change.flatten(1).sum(dim=1))
        columns.append(total)
    return torch.stack(columns, dim=1)


# ---- parts of run_heads ----------------------------------------------------------------------------------------------


def _heads(module: nn.Module) -> list[nn.Module]:
    """The heads of all stages; a StandardRoIHead has one."""
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def _stage(roi_head: nn.Module, forward: object, stage: int, features: Sequence[Tensor], rois: Tensor) -> dict:
    return forward(stage, features, rois) if isinstance(roi_head, CascadeRoIHead) else forward(features, rois)


def _roi_components(
    roi_head: nn.Module, features: Sequence[Tensor], regions: Regions
) -> tuple[list[Component], list[Component]]:
    """What all box stages put out at these regions, and all mask stages."""
    boxes: list[Component] = []
    for stage, (head, rois) in enumerate(zip(_heads(roi_head.bbox_head), regions.boxes, strict=True)):
        out = _stage(roi_head, roi_head._bbox_forward, stage, features, rois)
        boxes += _box_components(head, out["cls_score"], out["bbox_pred"], rois, _stage_weight(roi_head, stage))
    return boxes, _mask_components(roi_head, features, regions) if roi_head.with_mask else []


def _mask_components(roi_head: nn.Module, features: Sequence[Tensor], regions: Regions) -> list[Component]:
    components = []
    for stage, _ in enumerate(_heads(roi_head.mask_head)):
        masks = _stage(roi_head, roi_head._mask_forward, stage, features, regions.masks)["mask_preds"]
        weight = _stage_weight(roi_head, stage)
        components.append(_mask_component(masks, regions.labels, regions.masks, weight))
    return components


def _stage_weight(roi_head: nn.Module, stage: int) -> float:
    return roi_head.stage_loss_weights[stage] if isinstance(roi_head, CascadeRoIHead) else 1.0


def meta_of(size: tuple[int, int]) -> dict[str, tuple[float, ...]]:
    shapes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), tuple(size))
    return {**shapes, "scale_factor": (1.0, 1.0)}


@torch.no_grad()
def _refined(
    head: nn.Module, rois: Tensor, scores: Tensor, offsets: Tensor, counts: list[int], metas: list[dict]
) -> Tensor:
    """The regions that a stage of a cascade hands to the next."""
    labels = scores[:, : head.num_classes].argmax(dim=1)
    parts = zip(rois[:, 1:].split(counts), labels.split(counts), offsets.split(counts), metas, strict=True)
    boxes = [get_box_tensor(head.regress_by_class(*part)) for part in parts]
    return torch.cat([rois[:, :1], torch.cat(boxes)], dim=1)


def _share(image: Tensor, loss_weight: float, per_row: int = 1) -> Tensor:
    """For each row √(loss weight / values of its image): squared scores then sum to those of a mean."""
    count = torch.bincount(image)[image] * per_row
    return (loss_weight / count).sqrt()


def _rpn_components(rpn: RPNHead, scores: Sequence[Tensor], offsets: Sequence[Tensor]) -> list[Component]:
    objectness = torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in scores], dim=1)  # images × anchors
    boxes = torch.cat([x.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)) for x in offsets], dim=1)
    image = torch.arange(len(objectness), device=objectness.device)
    share = objectness.new_tensor(1 / objectness.shape[1]).sqrt()
    # An anchor's box counts where it is an object.
    box_weight = share * objectness.detach().sigmoid().sqrt()[..., None]
    return [Component(objectness, image, "binary", share), Component(boxes, image, "offsets", box_weight)]


def _box_components(
    head: nn.Module, scores: Tensor, offsets: Tensor, rois: Tensor, loss_weight: float
) -> list[Component]:
    image = rois[:, 0].long()
    share = _share(image, loss_weight)[:, None]
    if head.loss_cls.use_sigmoid:
        kind, p = "binary", scores.detach().sigmoid()
    else:
        kind, p = "classes", scores.detach().softmax(dim=1)
    p = p[:, : head.num_classes]
    # A region's box of a class counts where it is an object of this class.
    likely = p.sum(dim=1, keepdim=True) if head.reg_class_agnostic else p.repeat_interleave(4, dim=1)
    return [Component(scores, image, kind, share), Component(offsets, image, "offsets", share * likely.sqrt())]


def _mask_component(masks: Tensor, labels: Tensor, rois: Tensor, loss_weight: float) -> Component:
    """Masks (M, classes or 1, h, w). That of the class found counts, and those of all others together as much."""
    image, classes = rois[:, 0].long(), masks.shape[1]
    share = _share(image, loss_weight, masks.shape[2] * masks.shape[3])
    counts = masks.new_full((len(masks), classes), 1 / classes)
    if classes > 1:
        counts.scatter_add_(1, labels[:, None], torch.ones_like(counts[:, :1]))
    return Component(masks, image, "binary", (share[:, None] * counts.sqrt())[..., None, None])
