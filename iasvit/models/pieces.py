"""Attention in pieces of the batch, on a CPU where no gradient is wanted.

The maps of a batch do not fit the cache: scores, softmax, quantizer and the second product would each wait for memory,
and maps of megabytes are given back to the system after each block and zeroed anew for the next. What the traced graph
computes between its two products becomes a graph of its own, which runs for a few images at a time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

PIECE = 2**19  # values of an attention map, of a thread


def nest(graph: fx.Graph, first: fx.Node, second: fx.Node) -> fx.Graph | None:
    """Move all from the first product to the second into a graph of its own, which `attend` calls in the given one.

    Args:
        graph: of an attention's forward, whose first argument has the batch first; changed in place.
        first, second: its products, calls of modules.

    Returns:
        The inner graph, which is to be the submodule "between"; None, and the graph as it was, where what is between
        depends on the size of the batch or is needed elsewhere.
    """
    nodes = list(graph.nodes)
    inside = {first: None}
    for node in nodes[nodes.index(first) : nodes.index(second) + 1]:
        if any(source in inside for source in node.all_input_nodes):
            inside[node] = None
    leaks = any(user not in inside for node in inside if node is not second for user in node.users)
    operands = (*first.args, second.args[1])
    others = dict.fromkeys(n for node in inside for n in node.all_input_nodes if n not in inside and n not in operands)
    if leaks or second not in inside or not others.keys().isdisjoint(_of_batch(nodes)):
        return None

    inner, copies = fx.Graph(), {}
    with graph.inserting_before(second):
        modules = {node: graph.create_node("get_attr", node.target) for node in inside if node.op == "call_module"}
        arguments = (*modules.values(), *operands, *others)
        given = [node for node in nodes if node.op == "placeholder"][1:]
        call = graph.call_function(
            attend, (graph.create_node("get_attr", "between"), tuple(given), len(modules), *arguments)
        )
    for node in arguments:
        copies[node] = inner.placeholder(node.name)
    for node in inside:
        if node in modules:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), copies.__getitem__)
            copies[node] = inner.call_function(_call, (copies[modules[node]], *args), kwargs)
        else:
            copies[node] = inner.node_copy(node, copies.__getitem__)
    inner.output(copies[second])
    second.replace_all_uses_with(call)
    for node in reversed(inside):
        graph.erase_node(node)
    return inner


def _of_batch(nodes: list[fx.Node]) -> set[fx.Node]:
    """What depends on the first argument, but for its shape from the second dimension on."""
    result = {nodes[0]}
    for node in nodes:
        if any(source in result for source in node.all_input_nodes) and not _is_later_size(node):
            result.add(node)
    return result


def _is_later_size(node: fx.Node) -> bool:
    return node.target is operator.getitem and _is_shape(node.args[0]) and node.args[1] != 0


def _is_shape(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is getattr and node.args[1] == "shape"


def _call(module: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return module(*args, **kwargs)


@fx.wrap
def attend(between: nn.Module, given: tuple[Any, ...], count: int, *arguments: Any) -> Tensor:
    """Run `between`, in pieces where that changes nothing but the time it takes.

    Args:
        between: what `nest` returned, as a module.
        given: the attention's other arguments; a tensor among them is a mask for so many entries of the batch in turn.
        count: of the modules that begin the arguments, the first and the last of them QuantMatMuls.
        arguments: the modules; query, key (transposed) and value, with the batch first; whatever else is needed.
    """
    if torch.compiler.is_compiling():  # for an export, too, whose batch has no size
        return between(*arguments)
    modules, (query, key, value), others = arguments[:count], arguments[count : count + 3], arguments[count + 3 :]
    first, *middle, second = modules
    unit = max((len(mask) for mask in given if isinstance(mask, Tensor)), default=1)
    size = query.numel() // query.shape[-1] * key.shape[-1]
    rows = max(1, PIECE * torch.get_num_threads() * len(query) // (size * unit)) * unit
    learnt = torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in arguments)
    whole = not query.is_cpu or learnt or rows >= len(query) or torch.is_autocast_enabled("cpu")
    if whole or any(map(_watched, modules)):
        return between(*arguments)
    query, key, value = first.left_quantizer(query), first.right_quantizer(key), second.right_quantizer(value)
    outputs = query.new_empty(*query.shape[:-1], value.shape[-1])
    into = iter(outputs.split(rows))

    def product(left: Tensor, right: Tensor) -> Tensor:
        return torch.matmul(second.left_quantizer(left), right, out=next(into))

    for operands in zip(*(operand.split(rows) for operand in (query, key, value)), strict=True):
        between(torch.matmul, *middle, product, *operands, *others)
    return outputs


def _watched(module: nn.Module) -> bool:
    """Whether somebody looks at what passes through, and is to see the whole of it."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
