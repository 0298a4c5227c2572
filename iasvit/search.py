"""Search of scales by a layer's output: many candidates at once, within a memory budget, and none longer than needed.

The scales of a layer's two operands (weight and input, or the two activations of a product) are chosen in turn, each as
the candidate under which the layer's output errs least while the other operand keeps its scale (PTQ4ViT,
arXiv:2111.12293, algorithm 1). The error is a sum over rows of the output of terms that are not negative, so a candidate
whose error on some rows is already above the least total found cannot win and is dropped: what is chosen is what the
search over all rows would choose. Rows that weigh most come first, so that most candidates end early.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iasvit.calibration import calibration_store
from iasvit.errors import IasvitError
from iasvit.fisher import Capture, Product, captures
from iasvit.methods import Calibration
from iasvit.nn import QuantConv2d, QuantMatMul, quantizers_of
from iasvit.progress import Progress
from iasvit.quantizers import SymmetricQuantizer
from iasvit.quantizers.twin import TwinQuantizer

ScaleQuantizer = SymmetricQuantizer | TwinQuantizer  # they have candidate_scales, quantize_with and set_scales

# Bytes that one evaluation touches: on a CPU it should stay in the cache, an accelerator wants to be filled.
CPU_BUDGET, ACCELERATOR_BUDGET = 2**22, 2**30
PIECES = 16  # at least, of a layer's rows: candidates are dropped between one piece and the next


@dataclass(frozen=True)
class Operands:
    """A layer as the product left · rightᵀ, or some of its rows.

    Attributes:
        left: rows × K of a Linear or Conv2d (its patches), or batch × M × K of a product of activations.
        right: the weight, N × K, or batch × N × K.
        target: the full-precision product, without the bias: left's shape with N in place of K.
        fisher: of target's shape, or None.
        bias: N entries, or None.
    """

    left: Tensor
    right: Tensor
    target: Tensor
    fisher: Tensor | None
    bias: Tensor | None

    @property
    def has_weight(self) -> bool:
        """Whether right is a weight, the same for all rows."""
        return self.left.ndim == 2

    def rows(self, index: Tensor | slice) -> Operands:
        """These rows, or these entries of the batch."""
        right = self.right if self.has_weight else self.right[index]
        fisher = None if self.fisher is None else self.fisher[index]
        return Operands(self.left[index], right, self.target[index], fisher, self.bias)


Metric = Callable[[Tensor, Operands, int], Tensor]


def hessian_guided(outputs: Tensor, operands: Operands, groups: int) -> Tensor:
    """Σ (ΔO)² ⊙ (∂L/∂O)² (PTQ4ViT, eq. 10), for each candidate and each group of outputs.

    Args:
        outputs: candidates × target's shape, without the bias; overwritten.
        operands: with a Fisher.
        groups: groups of equal size into which the N outputs are cut.
    """
    errors = outputs.sub_(operands.target).square_()
    if groups == 1:
        return (errors.flatten(1) @ operands.fisher.flatten())[:, None]
    return errors.mul_(operands.fisher).sum(dim=1).unflatten(1, (groups, -1)).sum(dim=2)


def cosine_distance(outputs: Tensor, operands: Operands, groups: int) -> Tensor:
    """Σ 1 - cos(Ô, O) over rows, cos taken over the N outputs, or over those of each group; see `hessian_guided`."""
    bias = 0 if operands.bias is None else operands.bias
    outputs, target = (x.add(bias).unflatten(-1, (groups, -1)) for x in (outputs, operands.target))
    distances = (1 - F.cosine_similarity(outputs, target[None], dim=-1)).clamp_min_(0)
    return distances.reshape(len(outputs), -1, groups).sum(dim=1)


def search_scales(
    model: nn.Module,
    calibration: Calibration,
    *,
    factors: Tensor,
    rounds: int,
    metric: Metric,
    labels: torch.Generator | None,
    init_size: int,
    progress: Progress,
) -> None:
    """Choose the scales of all quantizers of a model, enable them, and set weights to the values of their codes.

    Args:
        model: full precision, with SymmetricQuantizers and TwinQuantizers inserted; changed in place.
        calibration: images N×3×H×W or batches of them; the first `init_size` are used.
        factors: candidates as multiples of the max-abs scale, ascending.
        rounds: how often the two operands are searched in turn.
        metric: `hessian_guided` or `cosine_distance`.
        labels: draws the labels of the Fisher; None where the metric needs none.
        init_size: images.
        progress: of the phases "capture" and "search". A run with the same journal goes on after the last segment done.

    Raises:
        IasvitError: NaN or Inf in a layer's input; no class logits for a Fisher.
    """
    device = next(model.parameters()).device
    images = calibration_store(calibration, device, limit=init_size)
    done = -1
    restored = progress.restore()
    if restored is not None:
        done, state = restored
        model.load_state_dict(state)
    layers = [module for module in model.modules() if isinstance(module, Product)]
    chain = enumerate(captures(model, images, labels))
    with progress.phase("search", len(layers)) as bar:
        while True:
            with progress.phase("capture"):
                index, segment = next(chain, (0, None))
            if segment is None:
                break
            bar.update(len(segment))
            if index > done and segment:
                while segment:
                    search_layer(segment.pop(0), factors, rounds, metric)
                progress.save(index, model.state_dict())
    for weights in (True, False):
        for _, quantizer in quantizers_of(model, weights=weights):
            quantizer.enabled = True
    for layer in layers:
        if not isinstance(layer, QuantMatMul):
            layer.round_weight()


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
    search = _LayerSearch(_operands(capture), sides, factors, metric, memory_budget)
    for turn in range(rounds):
        for position, side in enumerate(search.candidates):
            changed = search.run(side)
            if not changed and (turn or position):
                break
        else:
            continue
        break
    for side, scales in search.scales.items():
        sides[side].set_scales(scales, search.given(side))


def _operands(capture: Capture) -> Operands:
    layer, output, fisher = capture.layer, capture.output, capture.fisher
    if fisher is not None:
        # Where no gradient arrives at all, every error counts the same. The unit of the weights plays no part.
        mean = fisher.mean(dtype=torch.float64)
        fisher = (fisher / mean).float() if mean > 0 else torch.ones_like(fisher)
    if isinstance(layer, QuantMatMul):
        left, right = capture.inputs
        tensors = (left, right.mT, output, fisher)
        return Operands(*(None if x is None else x.flatten(0, -3) for x in tensors), None)
    (left,), weight, bias = capture.inputs, layer.weight.flatten(1), layer.bias
    if isinstance(layer, QuantConv2d):
        if layer.groups != 1 or layer.padding_mode != "zeros":
            raise IasvitError(f"layer {capture.name!r} is a grouped or specially padded convolution, not supported here")
        left = F.unfold(left, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
        output, fisher = (None if x is None else x.flatten(2).mT for x in (output, fisher))
    left, output = left.flatten(0, -2), output.flatten(0, -2)
    fisher = None if fisher is None else fisher.flatten(0, -2)
    return Operands(left, weight, output if bias is None else output - bias, fisher, bias)


class _LayerSearch:
    """The state of one layer's search: the scales of its two sides, "left" and "right", and the operands under them."""

    def __init__(
        self,
        operands: Operands,
        quantizers: dict[str, ScaleQuantizer | None],
        factors: Tensor,
        metric: Metric,
        memory_budget: int | None,
    ) -> None:
        if operands.fisher is not None:
            operands = operands.rows(operands.fisher.flatten(1).sum(dim=1).argsort(descending=True))
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
                self.candidates[side] = quantizer.candidate_scales(self.given(side), factors)
                self._set(side, quantizer.candidate_scales(self.given(side), torch.ones(1))[0])

    def given(self, side: str) -> Tensor:
        """The operand in full precision."""
        return getattr(self.operands, side)

    def _set(self, side: str, scales: Tensor) -> None:
        self.scales[side] = scales
        self.quantized[side] = self.quantizers[side].quantize_with(self.given(side), scales[None])[0]

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
        """Errors of the rows of a piece under each of the scales: candidates × groups, float64."""
        if weights is None and len(scales) > self.slice_size:
            return torch.cat([self._errors(side, piece, part) for part in scales.split(self.slice_size)])
        operands, quantizer = self.operands.rows(piece), self.quantizers[side]
        left = self.quantized["left"][piece]
        right = self.quantized["right"] if operands.has_weight else self.quantized["right"][piece]
        if side == "left":
            left = quantizer.quantize_with(operands.left, scales)
        elif weights is None:
            right = quantizer.quantize_with(operands.right, scales)
        else:
            right = weights
        if side == "right" and operands.has_weight:
            outputs = torch.bmm(left.expand(len(scales), *left.shape), right.mT)
        else:
            outputs = left @ right.mT
        return self.metric(outputs, operands, scales.shape[1]).double()
