"""Adapter for mmdet's two-stage detectors with a Swin backbone: Mask R-CNN, Cascade Mask R-CNN and their like.

Imported when such a detector comes, for mmdet is optional.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from mmcv.cnn.bricks.transformer import FFN
from mmcv.cnn.bricks.wrappers import Conv2d, Linear
from mmdet.models.backbones.swin import ShiftWindowMSA, SwinBlock, SwinTransformer, WindowMSA
from mmdet.models.detectors import TwoStageDetector
from mmdet.models.layers import PatchEmbed, PatchMerging
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from iasvit.errors import IasvitError
from iasvit.models.attention import explicit_attention
from iasvit.models.base import Adapter, Inserter, NormLinearPair, Segment, class_name, relative_error
from iasvit.models.blocks import require
from iasvit.models.likelihood import label_gradient
from iasvit.models.mmdet_heads import (
    Component,
    check_heads,
    divergence,
    find_regions,
    fixed_answers,
    flat,
    label_scores,
    meta_of,
    roi_errors,
    run_heads,
    run_heads_at,
)
from iasvit.models.parts import MLP, Heads
from iasvit.nn import QuantMatMul

HEADS = ("neck", "rpn_head", "roi_head")
REGIONS = 64  # proposals of an image at which heads are compared
# The mask head's deconvolution and normalization stay in floating point.
_FLOAT = (nn.ConvTranspose2d, nn.LayerNorm, nn.GroupNorm, _BatchNorm)


class DetectorAdapter(Adapter):
    """Two-stage detectors of mmdet with its SwinTransformer, an RPNHead and a standard or cascaded RoI head.

    The blocks of the backbone are segments of their own. Neck and heads are the last segment, which is calibrated and
    not reconstructed. Activations between segments are maps (B, H, W, C), and behind the current one the outputs of
    the stages so far, which the neck reads.
    """

    model_class = TwoStageDetector

    def insert(self, model: TwoStageDetector, inserter: Inserter) -> None:
        """See `insert_quantizers`. The detector then answers a tensor of images alone, as `run_heads` does."""
        _check(model)
        _simplify(model)
        inserter.layer(model, "backbone.patch_embed.projection", None)
        for prefix, module in _links(model.backbone):
            if prefix.endswith("downsample"):
                inserter.layer(model, f"{prefix}.reduction", "norm" if module.norm is not None else "input")
            else:
                _insert_block(model, module, prefix, inserter)
        for name in _head_layers(model):
            inserter.layer(model, name, "input")
        model.__class__ = _answering(type(model))

    def pairs(self, model: TwoStageDetector) -> list[NormLinearPair]:
        """norm1→qkv and norm2→the first layer of the FFN of every block, and norm→reduction of every patch merging."""
        result = []
        for prefix, module in _links(model.backbone):
            if not prefix.endswith("downsample"):
                qkv, padding = module.attn.w_msa.qkv, getattr(module.attn, "padding", None)
                result.append(NormLinearPair(f"{prefix}.norm1", module.norm1, (qkv,), padding))
                result.append(NormLinearPair(f"{prefix}.norm2", module.norm2, (module.ffn.layers[0][0],)))
            elif module.norm is not None:
                result.append(NormLinearPair(f"{prefix}.norm", module.norm, (module.reduction,)))
        return result

    def heads(self, model: TwoStageDetector) -> list[Heads]:
        """The attention of every block of the backbone."""
        _check(model)
        attentions = [
            (f"{prefix}.attn.w_msa", module.attn.w_msa)
            for prefix, module in _links(model.backbone)
            if not prefix.endswith("downsample")
        ]
        return [Heads(name, part.qkv, part.proj, part.num_heads) for name, part in attentions]

    def mlps(self, model: TwoStageDetector) -> list[MLP]:
        """The FFN of every block of the backbone."""
        _check(model)
        return [
            MLP(f"{prefix}.ffn", prefix, block.ffn.layers[0][0], block.ffn.layers[1], (block.ffn.layers[0], "1"))
            for prefix, block in _links(model.backbone)
            if not prefix.endswith("downsample")
        ]

    def segments(self, model: TwoStageDetector) -> list[Segment]:
        """Patch embedding; each block and patch merging; neck and heads."""
        _check(model)
        backbone, embed = model.backbone, "backbone.patch_embed"
        heads = tuple((name, getattr(model, name)) for name in HEADS)
        return [
            Segment(embed, _embedding(backbone), ((embed, backbone.patch_embed),)),
            *(Segment(name, _run(backbone, name, module), ((name, module),)) for name, module in _links(backbone)),
            Segment("heads", lambda maps: flat(_heads(model, maps), len(maps[0])), heads, reconstruct=False),
        ]

    def run_whole(self, model: TwoStageDetector, images: Tensor) -> tuple[Tensor, ...]:
        """What heads make of the features that the neck outputs while the detector predicts: `fixed_answers`."""
        _check(model)
        seen: list[tuple[Tensor, ...]] = []
        handle = model.neck.register_forward_hook(lambda _module, _args, output: seen.append(output))
        size = tuple(images.shape[2:])
        try:
            model(images, [DetDataSample(metainfo=meta_of(size)) for _ in images], mode="predict")
        finally:
            handle.remove()
        if not seen:
            raise IasvitError(f"the {type(model).__name__} given predicts without its neck, which is not supported")
        return fixed_answers(model, seen[0], size)

    def run_chain(self, model: TwoStageDetector, images: Tensor) -> tuple[Tensor, ...]:
        """See `run_whole`; of the chain without its last segment."""
        maps: Any = images
        for segment in self.chain(model)[:-1]:
            maps = segment.run(maps)
        return fixed_answers(model, *_features(model, maps))

    def log_likelihood(self, model: TwoStageDetector, inputs: Maps, generator: torch.Generator) -> Tensor:
        """See `Adapter`: of labels for objectness, classes, boxes and masks alike; `mmdet_heads.label_scores`."""
        table = label_scores(_heads(model, inputs), len(inputs[0]))
        return (table * label_gradient(table, generator)).sum(dim=1)  # the table's columns are equal: one is drawn

    def answer_errors(
        self, model: TwoStageDetector, inputs: Maps, full_model: TwoStageDetector, full_inputs: Maps
    ) -> Tensor:
        """See `Adapter`: `relative_error` of what the neck puts out, and `mmdet_heads.divergence` of all heads.

        Heads are compared at the REGIONS likeliest proposals of an image, and at the masks of its detections, that the
        detector in full precision finds.
        """
        with torch.no_grad():
            full_features, size = _features(full_model, full_inputs)
            full, regions = find_regions(full_model, full_features, size, REGIONS)
        features, _ = _features(model, inputs)
        of_heads = divergence(run_heads_at(model, features, regions), full)
        return torch.stack([relative_error(features, full_features), of_heads])

    def region_errors(self, model: TwoStageDetector, inputs: Maps, full_inputs: Maps) -> Tensor:
        """See `Adapter`: `mmdet_heads.roi_errors` at the REGIONS likeliest proposals and the masks of detections."""
        with torch.no_grad():
            features, size = _features(model, full_inputs)
            full, regions = find_regions(model, features, size, REGIONS)
        return roi_errors(model, _features(model, inputs)[0], regions, full)

    def neck(self, model: TwoStageDetector) -> Segment:
        """See `Adapter`: the norms of the backbone's outputs, which stay as they are, and the neck."""
        _check(model)
        return Segment("neck", lambda maps: _features(model, maps)[0], (("neck", model.neck),))

    def describe(self, model: TwoStageDetector) -> dict[str, Any]:
        """The detector's configuration, where it has one: mmdet keeps it in its attribute `cfg`."""
        _check(model)
        config = getattr(model, "cfg", None)
        config = None if config is None else ConfigDict(config.get("model", config)).to_dict()
        acts = {class_name(getattr(*mlp.act)) for mlp in self.mlps(model)}
        if config is not None and acts != {"GELU"}:
            config["backbone"]["act_cfg"] = {"type": acts.pop()}
        unit = 8 * model.backbone.patch_embed.projection.stride[0]
        return {
            "class": type(model).__name__,
            "config": config,
            "in_chans": model.backbone.patch_embed.projection.in_channels,
            "img_size": [4 * unit, 5 * unit],  # any will do
        }

    def build(self, description: dict[str, Any]) -> TwoStageDetector:
        """A detector of random weights from what `describe` returned.

        Raises:
            IasvitError: the detector described had no configuration.
        """
        if description["config"] is None:
            raise IasvitError(
                "a detector is rebuilt from its attribute cfg, but this one had none when it was quantized"
            )
        from mmdet.registry import MODELS
        from mmdet.utils import register_all_modules

        register_all_modules(init_default_scope=True)
        config = ConfigDict(description["config"])
        config.backbone.pop("init_cfg", None)  # a download
        return MODELS.build(config)


# ---- structure -------------------------------------------------------------------------------------------------------


def _check(model: TwoStageDetector) -> None:
    """Raise IasvitError where the backbone or a head is of a class that is not supported."""
    require(type(model.backbone) is SwinTransformer, "backbone", model.backbone, "mmdet's SwinTransformer")
    require(model.with_neck, "neck", getattr(model, "neck", None), "a neck such as FPN")
    embed = model.backbone.patch_embed
    require(type(embed) is PatchEmbed, "backbone.patch_embed", embed, PatchEmbed.__name__)
    for prefix, module in _links(model.backbone):
        expected = PatchMerging if prefix.endswith("downsample") else SwinBlock
        require(type(module) is expected, prefix, module, expected.__name__)
    check_heads(model)


def _links(backbone: SwinTransformer) -> list[tuple[str, nn.Module]]:
    """(path in the detector, module) of each block and each patch merging, in the order in which they run."""
    result = []
    for i, stage in enumerate(backbone.stages):
        result += [(f"backbone.stages.{i}.blocks.{j}", block) for j, block in enumerate(stage.blocks)]
        if stage.downsample is not None:
            result.append((f"backbone.stages.{i}.downsample", stage.downsample))
    return result


def _head_layers(model: TwoStageDetector) -> list[str]:
    """Paths of all Linear and Conv2d layers of neck and heads.

    Raises:
        IasvitError: a layer with parameters is of another kind, as a deformable convolution is.
    """
    result = []
    for root in HEADS:
        for name, module in getattr(model, root).named_modules(prefix=root):
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                result.append(name)
            elif next(module.parameters(recurse=False), None) is not None:
                require(isinstance(module, _FLOAT), name, module, "Linear, Conv2d, ConvTranspose2d or normalization")
    return result


def _simplify(model: TwoStageDetector) -> None:
    """Take out of a detector what computes the same in another way, in place.

    Activations in place would overwrite what is observed, checkpointing would run layers twice, and mmcv's Conv2d and
    Linear differ from torch's only in what they do for an empty batch in old versions of torch.
    """
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
        if getattr(module, "with_cp", False):
            module.with_cp = False
        if type(module) in (Conv2d, Linear):
            module.__class__ = nn.Conv2d if type(module) is Conv2d else nn.Linear


def _insert_block(model: TwoStageDetector, block: SwinBlock, prefix: str, inserter: Inserter) -> None:
    require(type(block.attn) is ShiftWindowMSA, f"{prefix}.attn", block.attn, ShiftWindowMSA.__name__)
    require(type(block.ffn) is FFN, f"{prefix}.ffn", block.ffn, FFN.__name__)
    path, attention = f"{prefix}.attn.w_msa", block.attn.w_msa
    require(type(attention) is WindowMSA, path, attention, WindowMSA.__name__)
    layers = block.ffn.layers
    require(len(layers) == 3, f"{prefix}.ffn", block.ffn, "FFN of two layers")
    for name in ("norm1", "norm2"):
        norm = getattr(block, name)
        affine = isinstance(norm, nn.LayerNorm) and norm.elementwise_affine and norm.bias is not None
        require(affine, f"{prefix}.{name}", norm, "LayerNorm with weight and bias")
    product_qk = inserter.product(f"{path}.matmul_qk", "query", "key")
    product_av = inserter.product(f"{path}.matmul_av", "softmax", "value")
    absent = () if block.attn.shift_size > 0 else ("mask",)  # windows that are not shifted have no mask
    block.attn.w_msa = explicit_attention(attention, path, QuantMatMul(*product_qk), QuantMatMul(*product_av), absent)
    block.attn.__class__ = _FilledWindows
    block.attn.register_buffer("padding", torch.zeros_like(block.norm1.bias))
    inserter.layer(model, f"{path}.qkv", "norm", groups=3)
    inserter.layer(model, f"{path}.proj", "input")
    inserter.layer(model, f"{prefix}.ffn.layers.0.0", "norm")
    inserter.layer(model, f"{prefix}.ffn.layers.1", "gelu" if isinstance(layers[0][1], nn.GELU) else "input")


class _FilledWindows(ShiftWindowMSA):
    """mmdet's window attention with `padding` (C,), not 0, where it fills up windows at the right and the bottom.

    What it fills up stands beside the outputs of a LayerNorm, and reparameterization changes both.
    """

    def forward(self, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Attention of query (B, H·W, C), hw_shape being (H, W)."""
        height, width = hw_shape
        bottom, right = -height % self.window_size, -width % self.window_size
        if not bottom and not right:
            return super().forward(query, hw_shape)
        filled = self.padding.expand(query.shape[0], height + bottom, width + right, -1).clone()
        filled[:, :height, :width] = query.unflatten(1, (height, width))
        output = super().forward(filled.flatten(1, 2), filled.shape[1:3]).view_as(filled)
        return output[:, :height, :width].flatten(1, 2)

    def window_reverse(self, windows: Tensor, height: int, width: int) -> Tensor:
        """Windows (…, side, side, C) as maps (B, H, W, C); mmdet counts B in floats, which no export can follow."""
        side = self.window_size
        grid = windows.unflatten(0, (-1, height // side, width // side))
        return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)


# ---- segments --------------------------------------------------------------------------------------------------------

Maps = tuple[Tensor, ...]  # the current map, and those that the neck will read; each (B, H, W, C)


def _embedding(backbone: SwinTransformer) -> Callable[[Tensor], Maps]:
    def run(images: Tensor) -> Maps:
        x, size = backbone.patch_embed(images)
        if backbone.use_abs_pos_embed:
            x = x + backbone.absolute_pos_embed
        return (backbone.drop_after_pos(x).unflatten(1, size),)

    return run


def _run(backbone: SwinTransformer, name: str, module: nn.Module) -> Callable[[Maps], Maps]:
    """Run a block; or a patch merging, behind which what it read is kept, where the neck reads this stage."""
    stage = int(name.split(".")[2])

    def run_block(maps: Maps) -> Maps:
        x, *kept = maps
        size = x.shape[1:3]
        return (module(x.flatten(1, 2), size).unflatten(1, size), *kept)

    def run_merging(maps: Maps) -> Maps:
        x, *kept = maps
        merged, size = module(x.flatten(1, 2), x.shape[1:3])
        return (merged.unflatten(1, size), *kept, *((x,) if stage in backbone.out_indices else ()))

    return run_merging if isinstance(module, PatchMerging) else run_block


def _heads(model: TwoStageDetector, maps: Maps) -> list[Component]:
    """What neck and heads make of what the backbone's last segment hands on."""
    return run_heads(model, *_features(model, maps))


def _features(model: TwoStageDetector, maps: Maps) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """What the neck makes of what the backbone's last segment hands on, and height and width of the images."""
    backbone = model.backbone
    x, *kept = maps
    if len(backbone.stages) - 1 in backbone.out_indices:
        kept.append(x)
    outputs = []
    for stage, y in zip(sorted(backbone.out_indices), kept, strict=True):
        outputs.append(getattr(backbone, f"norm{stage}")(y).permute(0, 3, 1, 2).contiguous())
    stride = backbone.patch_embed.projection.stride[0]
    for stage in range(min(backbone.out_indices)):
        stride *= backbone.stages[stage].downsample.sampler.stride[0]
    size = (stride * outputs[0].shape[2], stride * outputs[0].shape[3])
    return model.neck(tuple(outputs)), size


# ---- what a quantizable detector answers -----------------------------------------------------------------------------


class _Answers:
    """Mixed into the class of a quantizable detector, so that a method can call it with images alone."""

    def _forward(self, batch_inputs: Tensor, batch_data_samples: list | None = None) -> Any:
        if batch_data_samples is not None:
            return super()._forward(batch_inputs, batch_data_samples)
        features = self.extract_feat(batch_inputs)
        return flat(run_heads(self, features, tuple(batch_inputs.shape[2:])), len(batch_inputs))


@cache
def _answering(cls: type[TwoStageDetector]) -> type[TwoStageDetector]:
    return cls if issubclass(cls, _Answers) else type(cls.__name__, (_Answers, cls), {"__module__": cls.__module__})
