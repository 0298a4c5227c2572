"""The frame of methods that quantize weights in closed form: quantizers first, then layer by layer in forward order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from iasvit.calibration import (
    ActivationStore,
    Store,
    calibrate_in_stream,
    calibration_store,
    enabled,
    forward_need,
    images_share,
    run_all,
    share_of,
)
from iasvit.closed_form.moments import Moments, in_order, moments_of
from iasvit.errors import IasvitError
from iasvit.methods import Calibration
from iasvit.models import Segment, Site, find_pairs, prepare, segments
from iasvit.nn import QuantLayer, quant_layers, quantizers_of
from iasvit.options import MemoryBudget, OneOf, Range, check_fields
from iasvit.progress import Progress
from iasvit.quantizers import SOFTMAX_QUANTIZERS, WEIGHT_PERCENTILES, Quantizer, UniformQuantizer
from iasvit.reconstruction import SegmentJob, stream
from iasvit.reparam import reparameterize
from iasvit.spec import QuantSpec

INIT_SIZE = 64  # images that activation quantizers choose their ranges on
BATCH = 32
SQUARES = 8  # float64 matrices of a layer's inputs that are alive at once


@dataclass(frozen=True)
class LayerJob:
    """What quantization of one layer works with.

    Attributes:
        name: path of the layer.
        layer: of the quantized model; all before it are quantized, its own weight not yet.
        reference: the same layer in full precision, reparameterized alike.
        segment, inputs: of the quantized model.
        full, inputs_fp: of the network in full precision.
    """

    name: str
    layer: QuantLayer
    reference: QuantLayer
    segment: Segment
    inputs: Store
    full: Segment
    inputs_fp: Store

    def moments(self, *, mixed: bool, propagated: bool) -> Moments | None:
        """Moments of the layer's inputs; None for a layer that is no matrix product.

        Args:
            mixed: with those of quantized times full-precision inputs.
            propagated: x̂ is what quantized layers before have made of the images; else the full-precision input, which
                the layer's own quantizer alone has changed.

        Raises:
            IasvitError: NaN or Inf; the message names the layer.
        """
        reference = (self.reference, self.full, self.inputs_fp) if mixed else None
        found = _own(self, propagated, reference)
        if found is not None and not found.is_finite:
            raise IasvitError(f"layer {self.name!r} has inputs whose second moments are NaN or Inf; check the images")
        return found


def _own(job: LayerJob, propagated: bool, reference: tuple[QuantLayer, Segment, Store] | None) -> Moments | None:
    if propagated:
        return moments_of(job.layer, job.segment, job.inputs, reference=reference, batch_size=BATCH)
    # The layer in full precision, its quantizer on: it sees what no quantizer before it has changed.
    quantizer = job.reference.input_quantizer
    with enabled([] if quantizer is None else [("", quantizer)], True):
        return moments_of(job.reference, job.full, job.inputs_fp, reference=reference, batch_size=BATCH)


@dataclass
class ClosedForm(ABC):
    """A method that has static quantizers for activations and computes weights from them in closed form.

    1. Activation quantizers choose their ranges by one pass of the quantized network on the first 64 images, weights in
       full precision: each sees what those before it have made of the activations (as `iasvit.sos`).
    2. Every LayerNorm→Linear pair is reparameterized to one scale and integer zero-point per tensor; exact, as weights
       are still in full precision.
    3. Layer by layer, in the order of the forward, `fit` quantizes the weight. A layer that is no matrix product, or
       that a part calls several times, is rounded to nearest; so are the heads of detectors.

    Options:
        seed: every method has one; nothing is drawn here.
        init_size: calibration images used.
        softmax: the post-softmax quantizer, a name in `SOFTMAX_QUANTIZERS`.
        memory_budget: see `iasvit.options.MemoryBudget`.
    """

    seed: int = 0
    init_size: Annotated[int, Range(1)] = 128
    softmax: Annotated[str, OneOf(SOFTMAX_QUANTIZERS)] = "log2_searched"
    memory_budget: MemoryBudget = None

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def fit(self, job: LayerJob) -> None:
        """Set the layer's weight, and bias, to what its codes are to stand for; `layer.calibrate_weight` is to do."""

    def images_used(self, calib_size: int) -> int:
        """See `iasvit.methods.Method`; the first `init_size`."""
        return min(self.init_size, calib_size)

    def forwards(self, calib_size: int, detector: bool) -> float:
        """See `iasvit.methods.Method`; passes for each layer, and the solution, measured."""
        return 15 * self.images_used(calib_size) + 200

    @torch.no_grad()
    def quantize(self, model: nn.Module, calibration: Calibration, spec: QuantSpec, progress: Progress) -> nn.Module:
        """See `iasvit.methods.Method`."""
        device = next(model.parameters()).device
        images = calibration_store(calibration, device, images_share(self.memory_budget), self.init_size)

        def quantizable() -> nn.Module:
            return prepare(model, spec, self.weight_quantizer, self.activation_quantizer)

        def need(copy: nn.Module, few: Tensor) -> int:
            columns = max((layer.weight[0].numel() for _, layer in quant_layers(copy)), default=0)
            count = min(len(images), images.passes(INIT_SIZE))
            # The network in full precision stands beside the quantized one.
            copies = sum(p.numel() * p.element_size() for p in copy.parameters())
            return forward_need(copy, few, count) + SQUARES * 8 * columns**2 + copies

        share = share_of(self.memory_budget, self.name, quantizable, images, need)
        quantized = quantizable()
        with progress.phase("calibration"), enabled(list(quantizers_of(quantized, weights=True)), False):
            batches = images.batches(images.passes(INIT_SIZE), limit=INIT_SIZE)
            calibrate_in_stream(quantized, run_all(lambda batch: batch, batches, share), share)
        with progress.phase("reparameterization"):
            for pair in find_pairs(quantized):
                reparameterize(pair)
        self._quantize_weights(quantizable(), quantized, images, progress)
        return quantized

    def _quantize_weights(
        self, reference: nn.Module, quantized: nn.Module, images: ActivationStore, progress: Progress
    ) -> None:
        """Stage 3; `reference` becomes the reparameterized network in full precision."""
        reference.load_state_dict(quantized.state_dict())
        for weights in (True, False):
            for _, quantizer in quantizers_of(reference, weights=weights):
                quantizer.enabled = False
        for _, quantizer in quantizers_of(quantized, weights=True):
            quantizer.enabled = False
        names = {layer: name for name, layer in quant_layers(quantized)}
        originals = dict(quant_layers(reference))
        chain = segments(reference)

        def fit(job: SegmentJob) -> None:
            layers = job.segment.layers()
            ordered = in_order(layers, job.segment.run, job.inputs_q.gather([0])) if job.segment.reconstruct else []
            for layer in (*ordered, *(layer for layer in layers if layer not in ordered)):
                name = names[layer]
                try:
                    if layer in ordered:
                        full = chain[job.index]
                        self.fit(LayerJob(name, layer, originals[name], job.segment, job.inputs_q, full, job.inputs_fp))
                    if not layer.weight_quantizer.calibrated:
                        layer.calibrate_weight()
                except IasvitError as error:
                    raise IasvitError(f"layer {name!r}: {str(error).removeprefix(f'layer {name!r} ')}") from error
                layer.weight_quantizer.enabled = True
                layer.round_weight()
                job.bar.update()

        stream(reference, quantized, images, fit, progress, batch_size=BATCH, steps=len(names))

    def weight_quantizer(self, site: Site) -> Quantizer:
        """Uniform, one scale and zero-point per output channel."""
        return UniformQuantizer(site.n_bits, channel_dim=0, percentiles=WEIGHT_PERCENTILES)

    def activation_quantizer(self, site: Site) -> Quantizer:
        """`softmax` after softmax, per channel after LayerNorm (until step 2), per tensor elsewhere."""
        if site.role == "softmax":
            return SOFTMAX_QUANTIZERS[self.softmax](site.n_bits)
        return UniformQuantizer(site.n_bits, channel_dim=-1 if site.role == "norm" else None)


def set_weight(layer: QuantLayer, values: Tensor) -> None:
    """Set a layer's weight to values given as a matrix (rows, C)."""
    layer.weight.copy_(values.view_as(layer.weight))
