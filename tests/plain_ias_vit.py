"""I&S-ViT as its paper states it, slow and plain; of the package it shares only the seeds of the batches.

Stage 1 runs over all blocks, then every LayerNorm is reparameterized, then stage 3 runs over all blocks; the inputs of
a block are computed from the images anew each time. Sites have the paths of the package's quantizers, so that results
compare by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from timm.models.swin_transformer import SwinTransformer, window_partition, window_reverse
from torch import Tensor, nn
from torch.nn import functional as F

from iasvit.progress import fingerprint

ACTIVATION_PERCENTILES = (0.999, 0.9999, 0.99999)
WEIGHT_PERCENTILES = (0.97, 0.98, 0.99, 0.995, 0.9995, 0.9997, 0.9999, 0.99995, 0.99999)
SHIFTS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)
READERS = {".norm1": ".attn.qkv", ".norm2": ".mlp.fc1", "downsample.norm": "downsample.reduction"}


# ---- quantizers ----------------------------------------------------------------------------------------------------


def rounded(x: Tensor) -> Tensor:
    """x rounded, with the gradient of x."""
    return x.round().detach() + (x - x.detach())


@dataclass
class Uniform:
    """x̂ = (clamp(round(x / s) + z, 0, 2^b - 1) - z)·s; s and z broadcast against x."""

    bits: int
    scale: Tensor
    zero_point: Tensor

    def codes(self, x: Tensor) -> Tensor:
        codes, top = rounded(x / self.scale) + self.zero_point, 2**self.bits - 1
        outside = (codes < 0) | (codes > top)  # the ends are not: there torch's own clamp has no gradient from 2.15 on
        return torch.where(outside, codes.detach().clamp(0, top), codes)

    def __call__(self, x: Tensor) -> Tensor:
        return (self.codes(x) - self.zero_point) * self.scale


@dataclass
class ShiftUniformLog2:
    """SULQ: x̂ = 2^-round(ŷ) - η, where ŷ is y = -log2(x + η) quantized uniformly."""

    shift: Tensor
    uniform: Uniform

    def __call__(self, x: Tensor) -> Tensor:
        return torch.exp2(-rounded(self.uniform(-torch.log2(x + self.shift)))) - self.shift


Quantizer = Uniform | ShiftUniformLog2


def uniform_over(low: Tensor, high: Tensor, bits: int) -> Uniform:
    scale = (high - low) / (2**bits - 1)
    return Uniform(bits, scale, torch.round(-low / scale))


def least_error(x: Tensor, candidates: list[Quantizer]) -> Quantizer:
    return min(candidates, key=lambda quantizer: float((quantizer(x) - x).double().square().mean()))


def search_uniform(x: Tensor, bits: int, percentiles: tuple[float, ...]) -> Uniform:
    """One scale and zero-point for all of x."""
    candidates = []
    for p in percentiles:
        low, high = (torch.quantile(x.double().flatten(), q).float() for q in (1 - p, p))
        candidates.append(uniform_over(low, high, bits))
    return least_error(x, candidates)


def search_channels(x: Tensor, dim: int, bits: int, percentiles: tuple[float, ...]) -> Uniform:
    """A scale and zero-point for each index of dimension `dim`."""
    found = [search_uniform(channel, bits, percentiles) for channel in x.unbind(dim)]
    shape = [1] * x.ndim
    shape[dim] = -1
    scale, zero_point = (torch.stack([getattr(q, name) for q in found]) for name in ("scale", "zero_point"))
    return Uniform(bits, scale.view(shape), zero_point.view(shape))


def search_sulq(x: Tensor, bits: int) -> ShiftUniformLog2:
    candidates = []
    for shift in torch.tensor(SHIFTS):
        y = -torch.log2(x + shift)
        candidates.append(ShiftUniformLog2(shift, uniform_over(y.min(), y.max(), bits)))
    return least_error(x, candidates)


# ---- the network ---------------------------------------------------------------------------------------------------


@dataclass
class Network:
    """A timm ViT or Swin whose layers and products are computed here.

    Attributes:
        model: for what is not quantized: positions, masks, sizes.
        parameters: timm's name → weights, biases and LayerNorm parameters; what learning and reparameterization change.
        bits: of activations; None for full precision.
        after_norm: input quantizers that read a LayerNorm, and are per channel at first.
        activations: site → quantizer. One that is not there yet is initialised on the first x that reaches its site.
        weights: layer → quantizer of its weight; a layer that is not there has its weight in full precision.
    """

    model: nn.Module
    parameters: dict[str, Tensor]
    bits: int | None = None
    after_norm: frozenset[str] = frozenset()
    activations: dict[str, Quantizer] = field(default_factory=dict)
    weights: dict[str, Uniform] = field(default_factory=dict)

    def quantize(self, site: str, x: Tensor) -> Tensor:
        if self.bits is None:
            return x
        if site not in self.activations:
            self.activations[site] = self.initial(site, x.detach())
        return self.activations[site](x)

    def initial(self, site: str, x: Tensor) -> Quantizer:
        if site.endswith("matmul_av.left_quantizer"):
            return search_sulq(x, self.bits)
        if site in self.after_norm:
            return search_channels(x, x.ndim - 1, self.bits, ACTIVATION_PERCENTILES)
        return search_uniform(x, self.bits, ACTIVATION_PERCENTILES)

    def weight(self, layer: str) -> Tensor:
        weight = self.parameters[f"{layer}.weight"]
        return self.weights[layer](weight) if layer in self.weights else weight

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = (self.parameters[f"{name}.{part}"] for part in ("weight", "bias"))
        return F.layer_norm(x, weight.shape, weight, bias, self.model.get_submodule(name).eps)

    def linear(self, name: str, x: Tensor) -> Tensor:
        x = self.quantize(f"{name}.input_quantizer", x)
        return F.linear(x, self.weight(name), self.parameters.get(f"{name}.bias"))

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        return self.quantize(f"{name}.left_quantizer", left) @ self.quantize(f"{name}.right_quantizer", right)

    def attention(self, name: str, x: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        """Multi-head self-attention of x, B×N×C; bias is added to the logits, B×heads×N×N."""
        heads, (batch, tokens, _) = self.model.get_submodule(name).num_heads, x.shape
        qkv = self.linear(f"{name}.qkv", x).reshape(batch, tokens, 3, heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        logits = self.product(f"{name}.matmul_qk", q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
        x = self.product(f"{name}.matmul_av", (logits + bias).softmax(dim=-1), v)
        return self.linear(f"{name}.proj", x.transpose(1, 2).reshape(batch, tokens, -1))

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", x)))

    def vit_block(self, name: str, x: Tensor) -> Tensor:
        x = x + self.attention(f"{name}.attn", self.norm(f"{name}.norm1", x))
        return x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x))

    def swin_block(self, name: str, x: Tensor) -> Tensor:
        """Windows of x, B×H×W×C, which must divide H and W."""
        block, (_, height, width, _) = self.model.get_submodule(name), x.shape
        shift, dims = block.shift_size, (1, 2)
        shifted = self.norm(f"{name}.norm1", x).roll([-step for step in shift], dims)
        windows = window_partition(shifted, block.window_size).flatten(1, 2)
        bias = block.attn._get_rel_pos_bias()
        if block.attn_mask is not None:
            images = len(windows) // len(block.attn_mask)
            bias = bias + block.attn_mask[:, None].repeat(images, 1, 1, 1)
        attended = self.attention(f"{name}.attn", windows, bias).unflatten(1, block.window_size)
        x = x + window_reverse(attended, block.window_size, height, width).roll(shift, dims)
        return x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x))

    def patch_merging(self, name: str, x: Tensor) -> Tensor:
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.linear(f"{name}.reduction", self.norm(f"{name}.norm", torch.cat(corners, dim=-1)))

    def patch_embed(self, x: Tensor) -> Tensor:
        """The image is not quantized. ViT: B×N×C, Swin: B×H×W×C."""
        patch = self.model.patch_embed.patch_size
        x = F.conv2d(x, self.weight("patch_embed.proj"), self.parameters["patch_embed.proj.bias"], stride=patch)
        if isinstance(self.model, SwinTransformer):
            return self.norm("patch_embed.norm", x.permute(0, 2, 3, 1))
        return x.flatten(2).transpose(1, 2)

    def head(self, x: Tensor) -> Tensor:
        x = self.norm("norm", x)
        if isinstance(self.model, SwinTransformer):
            return self.linear("head.fc", x.mean(dim=(1, 2)))
        return self.linear("head", x[:, 0])

    def links(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        """(name, what it computes) of the blocks and layers that are reconstructed one by one, in order."""
        result: list[tuple[str, Callable[[Tensor], Tensor]]] = [("patch_embed", self.patch_embed)]
        if isinstance(self.model, SwinTransformer):
            for i, stage in enumerate(self.model.layers):
                if i > 0:
                    name = f"layers.{i}.downsample"
                    result.append((name, lambda x, name=name: self.patch_merging(name, x)))
                names = [f"layers.{i}.blocks.{j}" for j in range(len(stage.blocks))]
                result += [(name, lambda x, name=name: self.swin_block(name, x)) for name in names]
        else:
            result.append(("pos_embed", self.model._pos_embed))
            names = [f"blocks.{i}" for i in range(len(self.model.blocks))]
            result += [(name, lambda x, name=name: self.vit_block(name, x)) for name in names]
        return [*result, ("head", self.head)]

    def until(self, end: int, images: Tensor) -> Tensor:
        """What the first `end` links make of the images."""
        with torch.no_grad():
            for _, link in self.links()[:end]:
                images = link(images)
        return images

    def __call__(self, images: Tensor) -> Tensor:
        return self.until(len(self.links()), images)

    def layers(self, link: str) -> list[str]:
        """The Linear and Conv2d layers of a link."""
        modules = self.model.named_modules()
        names = [name for name, module in modules if isinstance(module, (nn.Linear, nn.Conv2d))]
        return [name for name in names if f"{name}.".startswith(f"{link}.")]


def norm_linear_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """(LayerNorm, Linear that alone reads it), by name."""
    names = [name for name, _ in model.named_modules()]
    return [(n, n.removesuffix(norm) + linear) for n in names for norm, linear in READERS.items() if n.endswith(norm)]


# ---- the method ----------------------------------------------------------------------------------------------------


@dataclass
class Options:
    """As IASViT's."""

    iterations: int
    batch_size: int
    lr: float
    seed: int = 0
    init_size: int = 64
    sos: bool = True


def learn(network: Network, index: int, stage: int, inputs: Tensor, targets: Tensor, steps: int, o: Options) -> None:
    """Reconstruct one link: Adam on its weights and biases, cosine to 0, squared error summed over each sample."""
    name, link = network.links()[index]
    names = [f"{layer}.{part}" for layer in network.layers(name) for part in ("weight", "bias")]
    learnt = [network.parameters[name].requires_grad_() for name in names if name in network.parameters]
    optimizer = torch.optim.Adam(learnt, lr=o.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    generator = torch.Generator().manual_seed(int(fingerprint(o.seed, index, stage), 16) % 2**63)
    for _ in range(steps):
        batch = torch.randperm(len(inputs), generator=generator)[: o.batch_size]
        loss = (link(inputs[batch]) - targets[batch]).square().sum() / len(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for parameter in learnt:
        parameter.requires_grad_(False)


def reparameterize(network: Network, norm: str, linear: str) -> None:
    """One scale and zero-point for all channels of a LayerNorm's output, one channel after another."""
    p, quantizer = network.parameters, network.activations[f"{linear}.input_quantizer"]
    s, z = quantizer.scale.flatten(), quantizer.zero_point.flatten()
    mean_s, mean_z = s.mean(), torch.round(z.mean())
    weight, bias = p[f"{linear}.weight"], p.get(f"{linear}.bias", torch.zeros(len(p[f"{linear}.weight"])))
    for j in range(len(s)):
        r, d = s[j] / mean_s, s[j] * (z[j] - mean_z)
        p[f"{norm}.weight"][j] = p[f"{norm}.weight"][j] / r
        p[f"{norm}.bias"][j] = (p[f"{norm}.bias"][j] + d) / r
        bias = bias - weight[:, j] * d
        weight[:, j] = weight[:, j] * r
    p[f"{linear}.bias"] = bias
    network.activations[f"{linear}.input_quantizer"] = Uniform(quantizer.bits, mean_s, mean_z)


def ias_vit(model: nn.Module, images: Tensor, w_bits: int, a_bits: int, o: Options) -> Network:
    """The quantized network; the model is left as it is."""
    full = Network(model, dict(model.state_dict()))
    pairs = norm_linear_pairs(model)
    readers = frozenset(f"{linear}.input_quantizer" for _, linear in pairs if o.sos)
    copies = {name: tensor.detach().clone() for name, tensor in full.parameters.items()}
    quantized = Network(model, copies, a_bits, readers)
    quantized(images[: o.init_size])  # initialises the activation quantizers
    indices = [index for index, (name, _) in enumerate(full.links()) if full.layers(name)]
    if o.sos:
        for index in indices[1:]:  # the patch embedding reads no quantized activation: it is exact in this stage
            learn(quantized, index, 1, full.until(index, images), full.until(index + 1, images), o.iterations, o)
        for norm, linear in pairs:
            reparameterize(quantized, norm, linear)
    steps = o.iterations if o.sos else 2 * o.iterations
    for index in indices:
        for layer in quantized.layers(full.links()[index][0]):
            weight = quantized.parameters[f"{layer}.weight"]
            quantized.weights[layer] = search_channels(weight, 0, w_bits, WEIGHT_PERCENTILES)
        learn(quantized, index, 3, quantized.until(index, images), full.until(index + 1, images), steps, o)
    return quantized
