"""The loop of optimization steps: schedules on the device, one launch a step on a GPU, several processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from iasvit import distributed
from iasvit.replay import Replayed, side_stream


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate.

    Attributes:
        parameters: of one device.
        lr: Adam's, at first.
        cosine: whether it falls to 0 along a cosine; else it stays.
    """

    parameters: Sequence[nn.Parameter]
    lr: float
    cosine: bool = True

    def schedule(self, iterations: int) -> Tensor:
        """The learning rate of each step."""
        if not self.cosine:
            return torch.full((iterations,), self.lr)
        done = torch.arange(iterations, dtype=torch.float64) / iterations
        return (self.lr * (1 + torch.cos(math.pi * done)) / 2).float()


def minimise(
    loss: Callable[[Tensor, Tensor], Tensor],
    groups: Iterable[Group],
    *,
    images: int,
    iterations: int,
    batch_size: int,
    seed: int,
    graphs: bool = True,
    before: Callable[[int], None] | None = None,
    bar: tqdm | None = None,
) -> None:
    """Minimise a loss over parameters by Adam, no weight decay.

    Args:
        loss: (images of the batch, a vector of int64; the step's number, a float32 scalar; both on the parameters'
            device) → scalar. It may draw random numbers from torch's own generators, which are seeded for it.
        groups: what is learnt; the parameters require gradients only meanwhile.
        images: how many there are to draw from.
        iterations: steps, each on `batch_size` images drawn without replacement; each of several processes takes every
            world_size-th of them, and all take the step that the whole batch's gradient says.
        seed: of the batches and of what the loss draws.
        graphs: on CUDA, replay the third and later steps as a graph; the loss then does the same at each call.
        before: called with each step's number before it.
        bar: moved by one a step.
    """
    groups = [group for group in groups if group.parameters and group.lr > 0]
    if not groups or iterations < 1:
        return
    parameters = [parameter for group in groups for parameter in group.parameters]
    device = parameters[0].device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed((seed + 1_000_003 * distributed.rank()) % 2**63)
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            step = _Step(loss, groups, images, iterations, batch_size, seed, graphs)
            for iteration in range(iterations):
                if before is not None:
                    before(iteration)
                step()
                if bar is not None:
                    bar.update()
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None


class _Step:
    """One step of Adam without weight decay. On CUDA the third and later ones replay a graph of it.

    A graph repeats what it was captured from, so whatever changes from step to step is read from tables on the device
    by the step's number. Several processes add up their gradients between the two halves of a step, each of which has
    its graph.
    """

    EAGER: ClassVar[int] = 2  # steps before capture, which must find all lazily made state in place

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        groups: Sequence[Group],
        images: int,
        iterations: int,
        batch_size: int,
        seed: int,
        graphs: bool,
    ) -> None:
        self.loss = loss
        self.parameters = [parameter for group in groups for parameter in group.parameters]
        device = self.parameters[0].device
        on_gpu = device.type == "cuda"
        size = min(images, batch_size)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.stack([torch.randperm(images, generator=generator)[:size] for _ in range(iterations)])
        own = drawn[:, distributed.own()]
        self.batches = own.to(device)
        self.share = torch.full((), own.shape[1] / size, device=device)
        self.schedules = [group.schedule(iterations).to(device) for group in groups]
        self.lrs = [torch.zeros((), device=device) for _ in groups]
        self.number = torch.zeros(1, dtype=torch.int64, device=device)
        options: list[dict[str, Any]] = [
            {"params": list(group.parameters), "lr": lr} for group, lr in zip(groups, self.lrs, strict=True)
        ]
        self.optimizer = torch.optim.Adam(options, fused=on_gpu, capturable=on_gpu)
        self.summed = distributed.joined_gradients(self.parameters) if distributed.world_size() > 1 else None
        self.graphs: list[Replayed] = []
        if on_gpu and graphs:
            halves = 1 if self.summed is None else 2
            self.graphs = [Replayed(self.EAGER, side_stream(device)) for _ in range(halves)]

    def __call__(self) -> None:
        """Compute the gradients, add up those of all processes, and change the parameters."""
        if self.summed is None:
            self._run(0, self._whole)
        else:
            self._run(0, self._first)
            distributed.add_up(self.summed)
            self._run(1, self._update)
        # Neither a fused Adam nor a graph tells torch that parameters have changed, and layers keep quantized weights.
        for parameter in self.parameters:
            torch.autograd.graph.increment_version(parameter)

    def _run(self, half: int, function: Callable[[], None]) -> None:
        if self.graphs:
            # What a graph of gradients allocates itself goes before its capture; gradients that are added up must not.
            self.graphs[half](function, self._forget if self.summed is None else lambda: None)
        else:
            function()

    def _whole(self) -> None:
        self._first()
        self._update()

    def _first(self) -> None:
        self._forget()
        self._gradients()

    def _forget(self) -> None:
        if self.summed is None:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.summed.zero_()

    def _gradients(self) -> None:
        """Add this process's share of the gradients to the parameters' `grad`."""
        indices = self.batches.index_select(0, self.number)[0]
        if len(indices):  # there may be fewer images a batch than processes
            self.loss(indices, self.number[0].to(torch.float32)).backward(self.share)

    def _update(self) -> None:
        for lr, schedule in zip(self.lrs, self.schedules, strict=True):
            lr.copy_(schedule.index_select(0, self.number)[0])
        self.optimizer.step()
        self.number.add_(1)
