"""Adapters: they make a model quantizable and name its segments and LayerNorm→Linear pairs.

A method sees what an adapter returns (`Segment`, `NormLinearPair`, `Site`), never a class of timm or mmdet.
"""

from iasvit.models.base import Activation, Adapter, Inserter, NormLinearPair, Segment, Site
from iasvit.models.registry import (
    adapter_for,
    build,
    describe,
    find_pairs,
    insert_quantizers,
    list_families,
    prepare,
    segments,
)

__all__ = [
    "Activation",
    "Adapter",
    "Inserter",
    "NormLinearPair",
    "Segment",
    "Site",
    "adapter_for",
    "build",
    "describe",
    "find_pairs",
    "insert_quantizers",
    "list_families",
    "prepare",
    "segments",
]
