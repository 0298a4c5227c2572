"""Adapters: they make a model quantizable and name its segments and LayerNorm→Linear pairs.

A method sees what an adapter returns (`Segment`, `NormLinearPair`, `Site`), never a class of timm or mmdet.
"""

from iasvit.models.base import Activation, Adapter, Inserter, NormLinearPair, Segment, Site, relative_error
from iasvit.models.check import check_chain, check_size, why_not_saved
from iasvit.models.parts import MLP, Heads, Reader, ResidualStream, Writer, use_rms_norms
from iasvit.models.plain import check_parameters, copy_of, plain, unwrap
from iasvit.models.registry import (
    INCOMPLETE,
    adapter_for,
    build,
    describe,
    find_pairs,
    insert_quantizers,
    is_detector,
    list_families,
    prepare,
    segments,
)

__all__ = [
    "INCOMPLETE",
    "MLP",
    "Activation",
    "Adapter",
    "Heads",
    "Inserter",
    "NormLinearPair",
    "Reader",
    "ResidualStream",
    "Segment",
    "Site",
    "Writer",
    "adapter_for",
    "build",
    "check_chain",
    "check_parameters",
    "check_size",
    "copy_of",
    "describe",
    "find_pairs",
    "insert_quantizers",
    "is_detector",
    "list_families",
    "plain",
    "prepare",
    "relative_error",
    "segments",
    "unwrap",
    "use_rms_norms",
    "why_not_saved",
]
