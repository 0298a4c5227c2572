"""Attention with explicit, quantizable products, without a copy of anybody's forward.

timm's attention either calls the fused scaled_dot_product_attention or, with `fused_attn` off, computes
softmax(Q·Kᵀ)·V by two matrix products. The unfused forward is traced as it stands in the timm that is installed, and
the two products of its graph become QuantMatMul modules; nothing else changes.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from iasvit.errors import IasvitError
from iasvit.models.pieces import nest
from iasvit.nn import QuantMatMul

_PRODUCTS = (operator.matmul, torch.matmul, "matmul", "bmm", torch.bmm)
MATMUL_NAMES = ("matmul_qk", "matmul_av")


class _Leaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def explicit_attention(
    attention: nn.Module, name: str, matmul_qk: QuantMatMul, matmul_av: QuantMatMul, absent: tuple[str, ...] = ()
) -> fx.GraphModule:
    """`attention` with its products Q·Kᵀ and A·V computed by the given modules.

    Args:
        attention: a module whose forward computes two matrix products; its parameters are shared with the result.
        name: its path in the model, for messages.
        matmul_qk: product of Q (scaled or not, as timm has it) and Kᵀ.
        matmul_av: product of the softmax and V.
        absent: arguments of the forward that are None whenever this module is called; code that depends on them being
            None or not cannot be traced otherwise.

    Returns:
        A module with the same arguments, submodule names and output as `attention`.

    Raises:
        IasvitError: the forward cannot be traced or does not compute exactly two products.
    """
    if hasattr(attention, "fused_attn"):
        attention.fused_attn = False
    try:
        graph = _Leaves().trace(attention, concrete_args=dict.fromkeys(absent) or None)
    except Exception as error:
        raise IasvitError(
            f"attention module {name!r} ({type(attention).__name__}) cannot be made explicit: {error}"
        ) from error
    _restore_argument_names(graph, absent)
    products = [node for node in graph.nodes if node.target in _PRODUCTS]
    if len(products) != 2:
        raise IasvitError(
            f"attention module {name!r} ({type(attention).__name__}) computes {len(products)} matrix products, "
            "but softmax attention computes 2"
        )
    result = fx.GraphModule(attention, graph, type(attention).__name__)
    for node, product_name, product in zip(products, MATMUL_NAMES, (matmul_qk, matmul_av), strict=True):
        result.add_module(product_name, product)
        node.op, node.target = "call_module", product_name
    graph = result.graph
    between = nest(graph, *(n for n in graph.nodes if n.op == "call_module" and n.target in MATMUL_NAMES))
    if between is not None:
        result.add_module("between", fx.GraphModule({}, between, "Between"))
    result.recompile()
    return result.train(attention.training)


def _restore_argument_names(graph: fx.Graph, absent: tuple[str, ...]) -> None:
    """Tracing renames an argument that is fixed to `name_1` and asserts its value; callers pass it by its name."""
    for node in list(graph.nodes):
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "_assert_is_none":
            graph.erase_node(node)
    for node in graph.nodes:
        original: Any = node.target.rpartition("_")[0] if node.op == "placeholder" else None
        if original in absent:
            node.target, node.args = original, (None,)
