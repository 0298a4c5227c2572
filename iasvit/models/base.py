"""What adapters have in common: sites, pairs, segments, and what puts quantizers in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from iasvit.errors import IasvitError
from iasvit.models.chain import with_hooks
from iasvit.models.likelihood import label_gradient
from iasvit.nn import QuantConv2d, QuantLayer, QuantLinear, RMSNorm
from iasvit.quantizers import Quantizer
from iasvit.spec import FULL_PRECISION, QuantSpec

if TYPE_CHECKING:
    from iasvit.models.parts import MLP, Heads, ResidualStream

Activation = Tensor | tuple[Tensor, ...]


def relative_error(x: Activation, full: Activation) -> Tensor:
    """Squared error of each tensor of x over the mean square of the full-precision one, summed: a scalar."""
    ours, wanted = (y if isinstance(y, tuple) else (y,) for y in (x, full))
    wide = torch.promote_types(wanted[0].dtype, torch.float32)  # autocast computes in bfloat16
    pairs = [(a.to(wide), b.to(wide)) for a, b in zip(ours, wanted, strict=True)]
    tiny = torch.finfo(torch.float32).tiny
    return torch.stack([(a - b).square().mean() / b.square().mean().clamp_min(tiny) for a, b in pairs]).sum()


@dataclass(frozen=True)
class Site:
    """A place where a quantizer goes.

    Attributes:
        name: path of the layer or product in the model, "blocks.0.attn.qkv".
        role: what is quantized. Weights: "weight". Inputs of layers: "norm" (a LayerNorm's output, of a pair that
            reparameterization knows), "gelu" (post-GELU), "input" (any other). Inputs of products: "query", "key",
            "softmax", "value".
        n_bits: bits that the spec gives it.
        layer: the Linear or Conv2d; None for products.
        groups: row groups of the weight that are projections of their own: 3 where Q, K and V share one Linear.
    """

    name: str
    role: str
    n_bits: int
    layer: nn.Module | None = None
    groups: int = 1


@dataclass(frozen=True)
class NormLinearPair:
    """A LayerNorm and the Linears that alone read its output: what scale reparameterization works on.

    Attributes:
        name: path of the LayerNorm.
        norm: the LayerNorm, or the RMSNorm that a rotated model has in its place.
        linears: the Linears.
        padding: what the Linears read, beside the LayerNorm's output, where windows are filled up: a value for each
            channel, 0 before reparameterization. None where nothing is filled up.
    """

    name: str
    norm: nn.LayerNorm | RMSNorm
    linears: tuple[QuantLinear, ...]
    padding: Tensor | None = None


@dataclass(frozen=True)
class Segment:
    """One link of the chain that a model is: run(run(... images)) over all segments computes model(images).

    Attributes:
        name: path of the block or layer, or what the segment does.
        run: input activations → output activations, each with the batch first. Activations are a tensor, or where
            later segments read earlier outputs too, a tuple of tensors; a segment computes the first and hands on
            others, as the same objects.
        modules: name → the modules whose quantized layers belong to the segment; empty where there is nothing to
            quantize between two blocks.
        reconstruct: whether the segment's layers are learnt; else they are calibrated and rounded only.
    """

    name: str
    run: Callable[[Activation], Activation]
    modules: tuple[tuple[str, nn.Module], ...]
    reconstruct: bool = True

    def layers(self) -> list[QuantLayer]:
        """The quantized Linear and Conv2d layers of this segment."""
        return [
            layer
            for _, module in self.modules
            for layer in module.modules()
            if isinstance(layer, (QuantLinear, QuantConv2d))
        ]

    def quantizers(self, *, weights: bool) -> list[tuple[str, Quantizer]]:
        """(path in the model, quantizer) of the segment's weight quantizers, or of its activation quantizers."""
        return [
            (f"{prefix}.{name}".strip("."), module)
            for prefix, root in self.modules
            for name, module in root.named_modules()
            if isinstance(module, Quantizer) and (name.rpartition(".")[2] == "weight_quantizer") == weights
        ]


class Adapter(ABC):
    """What makes one family of models quantizable. Registered in a package's metadata, under a name that begins with
    the package that the models' class comes from:

        [project.entry-points."iasvit.models"]
        "my_package.my_family" = "my_module:MyAdapter"

    Attributes:
        model_class: the class of the family's models.
    """

    model_class: type[nn.Module]

    @abstractmethod
    def insert(self, model: nn.Module, inserter: Inserter) -> None:
        """Replace layers and products by quantized ones, in place."""

    @abstractmethod
    def segments(self, model: nn.Module) -> list[Segment]:
        """The segments of a float or quantizable model; hooks of the model itself apart, they compute model(images)."""

    def chain(self, model: nn.Module) -> list[Segment]:
        """The chain that computes model(images): `segments`, with the model's hooks at its ends."""
        return with_hooks(model, self.segments(model))

    def run_whole(self, model: nn.Module, images: Tensor) -> Activation:
        """The outputs of the model, called as its user calls it; `run_chain` must give the same."""
        return model(images)

    def run_chain(self, model: nn.Module, images: Tensor) -> Activation:
        """The outputs of the chain of segments for images (B, C, H, W)."""
        x: Activation = images
        for segment in self.chain(model):
            x = segment.run(x)
        return x

    def data(self, model: nn.Module) -> dict[str, Any]:
        """What is known of the images that the model takes, in the terms of timm's `resolve_data_config`."""
        return {}

    def pairs(self, model: nn.Module) -> list[NormLinearPair]:
        """LayerNorm→Linear pairs of a quantizable model; none unless the family says which."""
        return []

    def residual_stream(self, model: nn.Module) -> ResidualStream:
        """What writes and reads the residual stream of a model in full precision, for transforms of it.

        Raises:
            IasvitError: the model has no one stream that may be rotated.
        """
        raise IasvitError(f"a {class_name(model)} has no residual stream of one width that can be rotated")

    def heads(self, model: nn.Module) -> list[Heads]:
        """The attentions of a model in full precision whose heads may be rotated; IasvitError where none is known."""
        raise IasvitError(f"the attention heads of a {class_name(model)} cannot be rotated")

    def mlps(self, model: nn.Module) -> list[MLP]:
        """The MLPs of a model in full precision; IasvitError where none is known."""
        raise IasvitError(f"the MLPs of a {class_name(model)} cannot be transformed")

    def log_likelihood(self, model: nn.Module, inputs: Activation, generator: torch.Generator) -> Tensor:
        """A value an image whose gradient is that of log p(labels), of labels drawn from the model's predictions.

        For Fisher-weighted searches. By default the last segment outputs logits, and one label is drawn an image.

        Args:
            model: float or quantizable.
            inputs: of the last segment, B images.
            generator: a CPU generator; the same state gives the same labels.

        Returns:
            B entries; only their gradient is meant.

        Raises:
            IasvitError: the last segment outputs no table of logits, or NaN or Inf.
        """
        logits = self.chain(model)[-1].run(inputs)
        return (logits * label_gradient(logits, generator)).sum(dim=1)

    def answer_errors(
        self, model: nn.Module, inputs: Activation, full_model: nn.Module, full_inputs: Activation
    ) -> Tensor:
        """How far the answers of a last segment that is no table of logits lie from those in full precision.

        Args:
            model: quantizable.
            inputs: of its last segment, B images.
            full_model, full_inputs: the same in full precision.

        Returns:
            One entry, ≥ 0, for each kind of error.

        Raises:
            IasvitError: no such measure is known for the family.
        """
        raise IasvitError(f"the answers of a {class_name(model)} cannot be compared")

    def region_errors(self, model: nn.Module, inputs: Activation, full_inputs: Activation) -> Tensor:
        """How far what a detector's heads put out at its regions moves with the inputs of its last segment.

        Args:
            model: a detector in full precision.
            inputs: of its last segment, B images.
            full_inputs: the same in full precision. Regions are found on these, and get no gradient.

        Returns:
            float32 (2,), each ≥ 0: the error of the box heads and that of the mask heads, 0 where there are none.

        Raises:
            IasvitError: no such measure is known for the family.
        """
        raise IasvitError(f"the heads of a {class_name(model)} cannot be compared")

    def neck(self, model: nn.Module) -> Segment:
        """The first part of a detector's last segment: from its inputs to the maps that all heads read.

        Raises:
            IasvitError: the family has no such part.
        """
        raise IasvitError(f"no neck of a {class_name(model)} is known")

    @abstractmethod
    def describe(self, model: nn.Module) -> dict[str, Any]:
        """JSON types from which `build` makes an equal model of random weights."""

    @abstractmethod
    def build(self, description: dict[str, Any]) -> nn.Module:
        """See `describe`."""


def class_name(module: object) -> str:
    """A class's name for messages; with its module's where it is called as one of torch.nn's and is another."""
    cls = type(module)
    alike = getattr(nn, cls.__name__, cls) is not cls
    return f"{cls.__module__}.{cls.__qualname__}" if alike else cls.__name__


QuantizerFactory = Callable[[Site], Quantizer]


class Inserter:
    """Puts quantizers into a model in place: `weight` and `activation` say which quantizer a site gets."""

    def __init__(self, spec: QuantSpec, weight: QuantizerFactory, activation: QuantizerFactory) -> None:
        self.spec = spec
        self.weight = weight
        self.activation = activation
        self.names: list[str] = []
        self.left: set[str] = set()  # layers that the spec leaves in full precision

    def layer(self, root: nn.Module, name: str, role: str | None, groups: int = 1) -> None:
        """Replace the Linear or Conv2d at path `name` by its quantized form; role None leaves its input alone."""
        self.names.append(name)
        w_bits, a_bits = self.spec.for_layer(name)
        if w_bits == FULL_PRECISION:
            self.left.add(name)
            return
        parent_name, _, attribute = name.rpartition(".")
        parent = root.get_submodule(parent_name)
        module = getattr(parent, attribute)
        kinds = {nn.Linear: QuantLinear, nn.Conv2d: QuantConv2d}
        if type(module) not in kinds:
            raise IasvitError(f"module {name!r} is a {class_name(module)}; a plain Linear or Conv2d can be quantized")
        weight_quantizer = self.weight(Site(name, "weight", w_bits, module, groups))
        input_quantizer = None if role is None else self.activation(Site(name, role, a_bits, module))
        setattr(parent, attribute, kinds[type(module)].from_float(module, weight_quantizer, input_quantizer))

    def product(self, name: str, left_role: str, right_role: str) -> tuple[Quantizer, Quantizer]:
        """The two quantizers of the matrix product at path `name`."""
        self.names.append(name)
        _, a_bits = self.spec.for_layer(name)
        if a_bits == FULL_PRECISION:
            raise IasvitError(f"product {name!r} cannot stay in full precision; W32A32 is for Linear and Conv2d layers")
        return self.activation(Site(name, left_role, a_bits)), self.activation(Site(name, right_role, a_bits))
