"""ReLU in place of GELU, with each MLP reconstructed (APHQ-ViT, arXiv:2504.02508, section 3.3; GLF-Q)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iasvit.calibration import ActivationStore, Store, TupleStore, calibration_store
from iasvit.errors import IasvitError
from iasvit.methods import Calibration
from iasvit.models import MLP, Activation, Segment, adapter_for, segments
from iasvit.progress import Progress, fingerprint
from iasvit.steps import Group, minimise
from iasvit.transforms.record import Step, changeable, recorded

CLAMP_IMAGES = 64  # that the bound of the clamped term is taken from


def relu_mlps(
    model: nn.Module,
    images: Calibration | ActivationStore,
    *,
    iterations: int = 20000,
    lr: float = 4e-5,
    batch_size: int = 32,
    seed: int = 0,
    clamp_percentile: float = 0.99,
    weights: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
    memory_budget: int | None = None,
) -> nn.Module:
    """Return a copy with ReLU in place of GELU, whose MLPs have learnt to give the outputs that they gave before.

    With h = ReLU(fc1(x)) and t what the MLP outputs in the given model for the same x, fc1 and fc2 minimise

        mean(w·(fc2(h) - t)²) + 2·mean(w·(fc2(min(h, u)) - t)²),

    u being a percentile of the positive inputs of the given fc2 (on at most 64 images): Adam, cosine to 0. x is the
    given model's, so that the MLPs do not depend on each other. The network is another function afterwards: its own
    full-precision value is to be measured on what is returned, and a quantized copy keeps it as
    `transforms_of(copy).network`.

    Args:
        model: a timm ViT, DeiT or Swin in full precision, each MLP with a GELU; left as it is.
        images: calibration images, as for `iasvit.quantize`, or a store of them.
        iterations: steps of an MLP; 0 only exchanges the activation.
        lr: Adam's initial learning rate.
        batch_size: images a step, drawn without replacement.
        seed: of the batches.
        clamp_percentile: above 0 and up to 1; APHQ-ViT takes 0.99 at 3 bits and 0.98 at 4.
        weights: name of an MLP's block → w, which broadcasts to the MLP's output: APHQ-ViT's perturbation Hessian. An
            MLP that is not in it has w = 1.
        progress: where to report to; None for silence.
        memory_budget: bytes for each store of activations, where no store is given; None for what is free.

    Raises:
        IasvitError: an option is out of its range, an MLP has no GELU, `weights` names no block, or NaN or Inf appear;
            the message names the block.
    """
    if not 0 < clamp_percentile <= 1:
        raise IasvitError(f"clamp_percentile is {clamp_percentile}, but a number above 0 and up to 1 is expected")
    if iterations < 0 or batch_size < 1 or not lr > 0:
        raise IasvitError("relu_mlps needs iterations of 0 or more, a batch_size of 1 or more and an lr above 0")
    result = changeable(model)
    mlps = {mlp.segment: mlp for mlp in adapter_for(result).mlps(result)}
    for mlp in mlps.values():
        act = getattr(*mlp.act)
        if not isinstance(act, nn.GELU):
            raise IasvitError(f"module '{mlp.name}.act' is a {type(act).__name__}, but relu_mlps replaces GELU")
    weights = weights or {}
    if unknown := sorted(set(weights) - set(mlps)):
        raise IasvitError(f"weights are given for {unknown[0]!r}, but the blocks are {', '.join(mlps)}")
    device = next(result.parameters()).device
    store: Store = images if isinstance(images, ActivationStore) else calibration_store(images, device, memory_budget)
    progress = progress or Progress()
    original = changeable(model)
    originals = {mlp.segment: mlp for mlp in adapter_for(original).mlps(original)}
    chain = segments(original)
    last = max(index for index, segment in enumerate(chain) if segment.name in mlps)
    with progress.phase("MLP reconstruction", iterations * len(mlps)) as bar:
        for index, segment in enumerate(chain[: last + 1]):
            if segment.name not in mlps:
                store = store.map(segment.run, batch_size, segment.name)
                continue
            learner = _Learner(segment, originals[segment.name], mlps[segment.name])
            both = store.map(learner.run, batch_size, segment.name)
            assert isinstance(both, TupleStore)
            store, inputs = both.parts
            bound = learner.bound(inputs, clamp_percentile, batch_size)
            weight = weights.get(segment.name, torch.ones(())).to(device)
            minimise(
                partial(learner.loss, inputs, bound, weight),
                [Group(learner.parameters, lr)],
                images=len(inputs),
                iterations=iterations,
                batch_size=batch_size,
                seed=int(fingerprint(seed, index, "relu"), 16) % 2**62,
                graphs=inputs.resident,
                bar=bar,
            )
            learner.finish()
    options = {"iterations": iterations, "lr": lr, "batch_size": batch_size, "seed": seed}
    options |= {"clamp_percentile": clamp_percentile, "weighted": bool(weights)}
    return recorded(result, Step("relu_mlps", options, exact=False))


class _Learner:
    """An MLP that learns to do with ReLU what it does with GELU.

    Args:
        segment: the given model's, which holds the MLP with GELU.
        given: that MLP.
        mlp: the result's; its weights are still the given ones.
    """

    def __init__(self, segment: Segment, given: MLP, mlp: MLP) -> None:
        self.segment, self.given, self.mlp = segment, given, mlp
        self.act = getattr(*given.act)
        owner, attribute = mlp.act
        setattr(owner, attribute, nn.ReLU())
        self.parameters = [p for layer in (mlp.fc1, mlp.fc2) for p in layer.parameters()]
        self.required = [p.requires_grad for p in self.parameters]

    def run(self, x: Activation) -> Activation:
        """The given segment's output and its MLP's input."""
        seen: list[Tensor] = []
        handle = self.given.fc1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            output = self.segment.run(x)
            assert isinstance(output, Tensor)
            return output, seen[0]
        finally:
            handle.remove()

    @torch.no_grad()
    def bound(self, inputs: ActivationStore, percentile: float, batch_size: int) -> Tensor:
        """The percentile of the positive inputs of the given fc2: a scalar."""
        found = [self.act(self.given.fc1(x)) for x in inputs.batches(batch_size, CLAMP_IMAGES)]
        positive = torch.cat([hidden[hidden > 0] for hidden in found])
        if not len(positive):
            return torch.full((), math.inf, device=inputs.device)
        return positive.kthvalue(max(1, math.ceil(percentile * len(positive)))).values

    def loss(self, inputs: ActivationStore, bound: Tensor, weight: Tensor, images: Tensor, step: Tensor) -> Tensor:
        """That of these images, (B,) int64, whose MLP inputs (B, ..., C) are in the store."""
        x = inputs.gather(images)
        with torch.no_grad():
            target = self.given.fc2(self.act(self.given.fc1(x)))
        hidden = F.relu(self.mlp.fc1(x))
        error = self.mlp.fc2(hidden) - target
        clamped = self.mlp.fc2(torch.minimum(hidden, bound)) - target
        return (weight * error.square()).mean() + 2 * (weight * clamped.square()).mean()

    def finish(self) -> None:
        """Give the parameters back as they were, but for what they have learnt."""
        for parameter, required in zip(self.parameters, self.required, strict=True):
            parameter.requires_grad_(required)
        if not all(torch.isfinite(parameter).all() for parameter in self.parameters):
            raise IasvitError(f"the reconstruction of {self.mlp.name!r} reached NaN or Inf; give a lower lr")
