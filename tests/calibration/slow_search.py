"""PTQ4ViT's and Base PTQ's search of scales as the paper states it: plain loops, nothing shared with the fast one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iasvit.models import insert_quantizers
from iasvit.nn import QuantConv2d, QuantLinear, QuantMatMul
from iasvit.quantizers import Quantizer
from iasvit.spec import QuantSpec


@dataclass
class Seen:
    """What a layer reads and outputs in full precision, and the gradient of the log-likelihood at its output."""

    layer: nn.Module
    inputs: tuple[Tensor, ...]
    output: Tensor
    gradient: Tensor | None = None
    scales: dict[str, list[Tensor]] = field(default_factory=dict)


def observe(model: nn.Module, method: object, spec: str, images: Tensor, seed: int) -> dict[str, Seen]:
    """Every layer and product of a model, by one forward and one backward through all of it."""
    network = insert_quantizers(model, QuantSpec.parse(spec), method.weight_quantizer, method.activation_quantizer)
    seen: dict[str, Seen] = {}
    for name, module in network.named_modules():
        if isinstance(module, Quantizer):
            module.enabled = False
        if isinstance(module, (QuantLinear, QuantConv2d, QuantMatMul)):

            def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                output.retain_grad()
                seen[name] = Seen(module, args, output)

            module.register_forward_hook(record)
    logits = network(images.clone().requires_grad_(True))
    p = logits.detach().double().softmax(dim=1)
    labels = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    log_likelihood = -F.cross_entropy(logits, labels, reduction="sum")
    log_likelihood.backward()
    for it in seen.values():
        it.gradient, it.output = it.output.grad, it.output.detach()
        it.inputs = tuple(x.detach() for x in it.inputs)
    return seen


def symmetric(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    return torch.clamp(torch.round(x / scale), -half, half - 1) * scale


def twin_softmax(x: Tensor, fine: Tensor, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    coarse = 1 / half
    in_fine = torch.clamp(torch.round(x / fine), 0, half - 1) * fine
    in_coarse = torch.clamp(torch.round(x / coarse), 0, half - 1) * coarse
    return torch.where(x < half * fine, in_fine, in_coarse)


def twin_gelu(x: Tensor, coarse: Tensor, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    fine = coarse * 2.0 ** -math.floor(math.log2(float(coarse) * half / 0.16997124))
    negative = torch.clamp(torch.round(x / fine), -half, 0) * fine
    positive = torch.clamp(torch.round(x / coarse), 0, half - 1) * coarse
    return torch.where(x < 0, negative, positive)


KINDS = {"symmetric": symmetric, "twin_softmax": twin_softmax, "twin_gelu": twin_gelu}


def candidates(kind: str, x: Tensor, bits: int, factors: Tensor) -> list[Tensor]:
    half = 2 ** (bits - 1)
    if kind == "twin_softmax":
        return [torch.tensor(2.0**-m / half) for m in range(20)]
    largest = x.max() if kind == "twin_gelu" else x.abs().max()
    return [factor * (largest / (half - 0.5)) for factor in factors]


def forward(layer: nn.Module, left: Tensor, right: Tensor) -> Tensor:
    if isinstance(layer, QuantMatMul):
        return left @ right
    if isinstance(layer, QuantConv2d):
        return F.conv2d(left, right, layer.bias, layer.stride, layer.padding, layer.dilation)
    return F.linear(left, right, layer.bias)


def distance(it: Seen, output: Tensor, group: slice, metric: str) -> float:
    channels = 1 if isinstance(it.layer, QuantConv2d) else -1
    got, expected = (x.double().movedim(channels, -1)[..., group] for x in (output, it.output))
    if metric == "cosine":
        return float((1 - F.cosine_similarity(got, expected, dim=-1)).sum().detach())
    gradient = it.gradient.double().movedim(channels, -1)[..., group]
    return float((((got - expected) ** 2 * gradient**2).sum()).detach())


def search(it: Seen, factors: Tensor, rounds: int, metric: str) -> None:
    """Fills it.scales: operand → its scale, one for each group."""
    layer = it.layer
    if isinstance(layer, QuantMatMul):
        operands = {"left_quantizer": it.inputs[0], "right_quantizer": it.inputs[1]}
    else:
        operands = {"weight_quantizer": layer.weight, "input_quantizer": it.inputs[0]}
    quantizers = {name: getattr(layer, name) for name in operands}
    tried: dict[str, list[list[Tensor]]] = {}  # operand → group → candidates
    for name, x in operands.items():
        quantizer = quantizers[name]
        groups = getattr(quantizer, "groups", 1)
        if quantizer is None:
            it.scales[name] = []
            continue
        parts = x.chunk(groups) if groups > 1 else [x]
        tried[name] = [candidates(quantizer.kind, part, quantizer.n_bits, factors) for part in parts]
        ones = torch.ones(1)
        it.scales[name] = [candidates(quantizer.kind, part, quantizer.n_bits, ones)[0] for part in parts]

    def quantized(name: str, scales: list[Tensor]) -> Tensor:
        quantizer, x = quantizers[name], operands[name]
        if quantizer is None:
            return x
        parts = x.chunk(len(scales)) if len(scales) > 1 else [x]
        return torch.cat([KINDS[quantizer.kind](p, s, quantizer.n_bits) for p, s in zip(parts, scales, strict=True)])

    def output(scales: dict[str, list[Tensor]]) -> Tensor:
        by_name = {name: quantized(name, scales[name]) for name in operands}
        if isinstance(layer, QuantMatMul):
            return forward(layer, by_name["left_quantizer"], by_name["right_quantizer"])
        return forward(layer, by_name["input_quantizer"], by_name["weight_quantizer"])

    for _ in range(rounds):
        for name, of_groups in tried.items():
            count, total = len(of_groups), it.output.shape[1 if isinstance(layer, QuantConv2d) else -1]
            # Groups of rows of a weight make groups of outputs, which do not touch each other: one forward for all.
            errors = []
            for number in range(len(of_groups[0])):
                trial = {**it.scales, name: [of_group[number] for of_group in of_groups]}
                result = output(trial)
                width = total // count
                slices = [slice(g * width, (g + 1) * width) for g in range(count)]
                errors.append([distance(it, result, group, metric) for group in slices])
            best = [min(range(len(errors)), key=lambda n, g=g: errors[n][g]) for g in range(count)]
            it.scales[name] = [of_groups[g][best[g]] for g in range(count)]


def codes(it: Seen, name: str) -> Tensor:
    """Values of the operand's codes under the scales found."""
    x = it.layer.weight if name == "weight_quantizer" else it.inputs[int(name == "right_quantizer")]
    quantizer = getattr(it.layer, name)
    scales = it.scales[name]
    parts = x.chunk(len(scales)) if len(scales) > 1 else [x]
    return torch.cat([KINDS[quantizer.kind](p, s, quantizer.n_bits) for p, s in zip(parts, scales, strict=True)])
