"""Search of scales by a layer's output: many candidates at once, within a memory budget, and none longer than needed.

The scales of a layer's two operands (weight and input, or the two activations of a product) are chosen in turn, each as
the candidate under which the layer's output errs least while the other operand keeps its scale (PTQ4ViT,
arXiv:2111.12293, algorithm 1). The error is a sum over rows of the output of terms that are not negative, so that a
candidate whose error on some rows is already above the least total found cannot win and is dropped: what is chosen is
what the search over all rows would choose. Rows that weigh most come first, so that most candidates end early.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iasvit import distributed
from iasvit.calibration.fisher import Capture, Product, captures, patches
from iasvit.calibration.spill import Table, mapped, pieces, reordered
from iasvit.calibration.store import ActivationStore
from iasvit.errors import IasvitError
from iasvit.nn import QuantConv2d, QuantMatMul, quant_layers, quantizers_of
from iasvit.progress import Progress
from iasvit.quantizers import SymmetricQuantizer
from iasvit.quantizers.twin import TwinQuantizer

ScaleQuantizer = SymmetricQuantizer | TwinQuantizer  # they have candidate_scales, quantize_with and set_scales

# Bytes that one evaluation touches: on a CPU it should stay in the cache, an accelerator wants to be filled.
CPU_BUDGET, ACCELERATOR_BUDGET = 2**22, 2**30
PIECES = 16  # at least, of a layer's rows: candidates are dropped between one piece and the next


class HessianGuided:
    """Σ (ΔO)² ⊙ (∂L/∂O)² (PTQ4ViT, eq. 10)."""

    def target(self, output: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """What `errors` compares with, made once: the output without the bias, of output's shape (..., N)."""
        return output if bias is None else output - bias

    def errors(self, outputs: Tensor, target: Tensor, fisher: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """The error of each candidate: candidates × groups, the N outputs being cut into groups of equal size.

        Args:
            outputs: candidates × fisher's shape, without the bias; overwritten.
            target: what `target` returned, of the same rows.
            fisher: (∂L/∂O)², (..., N).
            bias: N entries, or None.
            groups: how many.
        """
        errors = outputs.sub_(target).square_()
        if groups == 1:
            return (errors.flatten(1) @ fisher.flatten())[:, None]
        return errors.mul_(fisher).sum(dim=1).unflatten(1, (groups, -1)).sum(dim=2)


class CosineDistance:
    """Σ 1 - cos(Ô, O) over rows, cos taken over the N outputs, or over those of each group; the cosine with 0 is 0."""

    def target(self, output: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """Unit vectors of the output, (..., groups, N / groups)."""
        return F.normalize(output.unflatten(-1, (groups, -1)), dim=-1)

    def errors(
        self, outputs: Tensor, target: Tensor, fisher: Tensor | None, bias: Tensor | None, groups: int
    ) -> Tensor:
        """See `HessianGuided.errors`; there is no Fisher."""
        if bias is not None:
            outputs.add_(bias)
        outputs = outputs.unflatten(-1, (groups, -1))
        norms = torch.linalg.vector_norm(outputs, dim=-1, keepdim=True)
        # Half the squared distance of unit vectors is 1 - cos, and keeps its digits where cos is nearly 1.
        outputs.div_(norms.clamp_min(1e-12)).sub_(target)
        distances = torch.linalg.vector_norm(outputs, dim=-1).square_().div_(2).masked_fill_(norms[..., 0] == 0, 1.0)
        return distances.reshape(len(outputs), -1, groups).sum(dim=1)


Metric = HessianGuided | CosineDistance


def search_scales(
    model: nn.Module,
    images: ActivationStore,
    *,
    factors: Tensor,
    rounds: int,
    metric: Metric,
    labels: torch.Generator | None,
    progress: Progress,
    memory_budget: int | None = None,
) -> None:
    """Choose the scales of all quantizers of a model, enable them, and set weights to the values of their codes.

    Args:
        model: full precision, with SymmetricQuantizers and TwinQuantizers inserted; changed in place.
        images: calibration images.
        factors: candidates as multiples of the max-abs scale, ascending.
        rounds: how often the two operands are searched in turn.
        metric: HessianGuided, which needs labels, or CosineDistance.
        labels: draws the labels of the Fisher; None where the metric needs none.
        progress: of the phases "capture" (data through the model) and "calibration" (the search). A run with the same
            checkpoint goes on after the last segment done.
        memory_budget: bytes of a segment's captures; more goes to files. None for no limit.

    Raises:
        IasvitError: NaN or Inf in a layer's input; no class logits for a Fisher.
    """
    done = -1
    restored = progress.restore()
    if restored is not None:
        done, state = restored
        model.load_state_dict(state)
    total = sum(isinstance(module, Product) for module in model.modules())
    chain = enumerate(captures(model, images, labels, memory_budget=memory_budget))
    with progress.phase("calibration", total) as bar:
        while True:
            with progress.phase("capture"):
                index, segment = next(chain, (0, None))
            if segment is None:
                break
            bar.update(len(segment))
            if index > done and segment:
                quantizers = [nn.ModuleList(capture.layer.children()) for capture in segment]
                costs = [_cost(capture) for capture in segment]
                distributed.divided(quantizers, partial(_search, segment, factors, rounds, metric), costs)
                progress.save(index, model.state_dict())
    for weights in (True, False):
        for _, quantizer in quantizers_of(model, weights=weights):
            quantizer.enabled = True
    for _, layer in quant_layers(model):
        layer.round_weight()


def _search(segment: list[Capture], factors: Tensor, rounds: int, metric: Metric, numbers: list[int]) -> None:
    """Search these layers of a segment, whose captures go as it is done."""
    mine = [segment[number] for number in numbers]
    segment.clear()
    while mine:
        search_layer(mine.pop(0), factors, rounds, metric)


def _cost(capture: Capture) -> int:
    """Multiplications of the layer on all images; a search takes some multiple of them."""
    layer = capture.layer
    each = capture.inputs[0].shape[-1] if isinstance(layer, QuantMatMul) else layer.weight[0].numel()
    return prod(capture.output.shape) * each


@torch.no_grad()
def search_layer(
    capture: Capture, factors: Tensor, rounds: int, metric: Metric, memory_budget: int | None = None
) -> None:
    """Choose the scales of one layer's quantizers: the weight's and the input's in turn, or the left's and the right's.

    A search depends on the other operand's scale alone. So when one chooses the scale that the other operand's last
    search saw, the rounds that are left would change nothing, and are not run.

    Args:
        capture: of the layer.
        factors, rounds, metric: see `search_scales`.
        memory_budget: bytes that one evaluation may take; None for CPU_BUDGET or ACCELERATOR_BUDGET.
    """
    layer = capture.layer
    if isinstance(layer, QuantMatMul):
        sides = {"left": layer.left_quantizer, "right": layer.right_quantizer}
    else:
        sides = {"right": layer.weight_quantizer, "left": layer.input_quantizer}
    search = _LayerSearch(_Operands.of(capture), sides, factors, metric, memory_budget)
    turns = list(search.candidates) * rounds
    for number, side in enumerate(turns):
        if not search.run(side) and number > 0:
            break
    for side, scales in search.scales.items():
        sides[side].set_scales(scales, search.ends(side))


@dataclass(frozen=True)
class _Operands:
    """A layer as the product left · rightᵀ + bias.

    What is of the calibration images may be in files.

    Attributes:
        left: rows × K of a Linear or Conv2d (its patches), or batch × M × K of a product of activations.
        right: the weight, N × K, or batch × N × K.
        output: in full precision: left's shape with N in place of K.
        fisher: of output's shape, or None.
        bias: N entries, or None.
    """

    left: Table
    right: Table
    output: Table
    fisher: Table | None
    bias: Tensor | None

    @classmethod
    def of(cls, capture: Capture) -> _Operands:
        """The operands of a layer, rows or batch entries of the largest Fisher first."""
        layer, output, fisher = capture.layer, capture.output, capture.fisher
        if fisher is not None:
            # Where no gradient arrives at all, every error counts the same. The unit of the weights plays no part.
            mean = torch.stack([fisher[piece].sum(dtype=torch.float64) for piece in pieces(fisher)]).sum()
            mean = mean / prod(fisher.shape)
            fisher = mapped(fisher, lambda x: (x / mean).float() if mean > 0 else torch.ones_like(x))
        if isinstance(layer, QuantMatMul):
            left, right, bias = capture.inputs[0], mapped(capture.inputs[1], lambda x: x.mT), None
            left, right, output, fisher = (_flat(x, -3) for x in (left, right, output, fisher))
        else:
            (left,), right, bias = capture.inputs, layer.weight.flatten(1), layer.bias
            if isinstance(layer, QuantConv2d):
                if layer.groups != 1 or layer.padding_mode != "zeros":
                    raise IasvitError(f"layer {capture.name!r} is a grouped or specially padded convolution")
                if left.ndim == 4:
                    left = patches(layer, left)
                    output, fisher = (None if x is None else x.flatten(2).mT for x in (output, fisher))
            left, output, fisher = (_flat(x, -2) for x in (left, output, fisher))
        if fisher is not None:
            sums = torch.cat([fisher[piece].flatten(1).sum(dim=1) for piece in pieces(fisher)])
            order = sums.argsort(descending=True, stable=True)
            left, output, fisher = (reordered(x, order) for x in (left, output, fisher))
            right = reordered(right, order) if left.ndim == 3 else right
        return cls(left, right, output, fisher, bias)

    @property
    def has_weight(self) -> bool:
        """Whether right is a weight, the same for all rows."""
        return self.left.ndim == 2


def _ends(x: Table) -> Tensor:
    """The least and the largest value."""
    pairs = torch.stack([torch.stack(x[piece].aminmax()) for piece in pieces(x)])
    return torch.stack([pairs[:, 0].amin(), pairs[:, 1].amax()])


def _flat(x: Table | None, end: int) -> Table | None:
    """Dimensions 0 to `end` as one; what is in a file is so already."""
    return x.flatten(0, end) if isinstance(x, Tensor) else x


class _LayerSearch:
    """The state of one layer's search: the scales of its two sides, "left" and "right", and the operands under them."""

    def __init__(
        self,
        operands: _Operands,
        quantizers: dict[str, ScaleQuantizer | None],
        factors: Tensor,
        metric: Metric,
        memory_budget: int | None,
    ) -> None:
        self.operands, self.quantizers, self.metric = operands, quantizers, metric
        budget = memory_budget or (CPU_BUDGET if operands.left.is_cpu else ACCELERATOR_BUDGET)
        entries = max(1, budget // 16)  # an evaluation holds about four tensors of 4-byte entries
        (*_, m, k), n = operands.left.shape, operands.right.shape[-2]
        row = max(k, n) if operands.has_weight else max(m * k, m * n, n * k)
        rows = len(operands.left)
        size = max(1, min(entries // row, math.ceil(rows / PIECES)))
        self.pieces = [slice(start, start + size) for start in range(0, rows, size)]
        self.slice_size = max(1, entries // max(size * row, n * k))
        self.candidates: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        self.quantized = {"left": operands.left, "right": operands.right}
        for side, quantizer in quantizers.items():
            if quantizer is not None:
                self.candidates[side] = quantizer.candidate_scales(self.ends(side), factors)
                self._set(side, quantizer.candidate_scales(self.ends(side), torch.ones(1))[0])
        groups = {candidates.shape[1] for candidates in self.candidates.values()}
        self.targets = {
            g: mapped(operands.output, partial(metric.target, bias=operands.bias, groups=g)) for g in groups
        }

    def given(self, side: str) -> Table:
        """The operand in full precision."""
        return getattr(self.operands, side)

    def ends(self, side: str) -> Tensor:
        """What has the operand's least and largest value: itself, or of one in a file these two."""
        given = self.given(side)
        return given if isinstance(given, Tensor) else _ends(given)

    def _set(self, side: str, scales: Tensor) -> None:
        self.scales[side] = scales
        quantizer = self.quantizers[side]
        self.quantized[side] = mapped(self.given(side), lambda x: quantizer.quantize_with(x, scales[None])[0])

    def run(self, side: str) -> bool:
        """Choose the scales of one side, of equals the first; whether they changed."""
        candidates = self.candidates[side]
        first = self._errors(side, self.pieces[0], candidates)
        totals = torch.full_like(first, torch.inf)
        least = totals.amin(dim=0)
        promising = (first / first.amin(dim=0).clamp_min(1e-300)).amin(dim=1).argsort(stable=True)
        for chosen in promising.split(self.slice_size):
            partial, weights = first[chosen], None
            if side == "right" and self.operands.has_weight:
                weights = self.quantizers[side].quantize_with(self.operands.right, candidates[chosen])
            for piece in self.pieces[1:]:
                keep = (partial <= least).any(dim=1)
                if not keep.all():
                    chosen, partial = chosen[keep], partial[keep]
                    weights = None if weights is None else weights[keep]
                if not len(chosen):
                    break
                partial = partial + self._errors(side, piece, candidates[chosen], weights)
            totals[chosen] = partial
            least = totals.amin(dim=0)
        best = candidates.gather(0, totals.argmin(dim=0)[None])[0]
        changed = not torch.equal(best, self.scales[side])
        if changed:
            self._set(side, best)
        return changed

    def _errors(self, side: str, piece: slice, scales: Tensor, weights: Tensor | None = None) -> Tensor:
        """Errors on a piece's rows under each of the scales of one side: candidates × groups, float64.

        `weights` are the weight quantized with the scales already, where that side is a weight.
        """
        if weights is None and len(scales) > self.slice_size:
            return torch.cat([self._errors(side, piece, part) for part in scales.split(self.slice_size)])
        operands, quantizer = self.operands, self.quantizers[side]
        if side == "left":
            left = quantizer.quantize_with(operands.left[piece], scales)
            right = self.quantized["right"] if operands.has_weight else self.quantized["right"][piece]
        else:
            left = self.quantized["left"][piece]
            if operands.has_weight:
                right = quantizer.quantize_with(operands.right, scales) if weights is None else weights
                left = left.expand(len(scales), *left.shape)
            else:
                right = quantizer.quantize_with(operands.right[piece], scales)
        fisher = None if operands.fisher is None else operands.fisher[piece]
        groups = scales.shape[1]
        errors = self.metric.errors(left @ right.mT, self.targets[groups][piece], fisher, operands.bias, groups)
        return errors.double()
