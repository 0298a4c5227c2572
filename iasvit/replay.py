"""Steps of Adam; on CUDA they are captured in a graph, one launch of which takes the place of hundreds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from iasvit import distributed
from iasvit.distributed import SummedGradients


class Replayed:
    """The graph of a function that does the same at each call.

    Args:
        eager: first calls, which run the function as it is and leave all lazily made state in place.
        stream: of these calls and of the capture.
    """

    def __init__(self, eager: int, stream: torch.cuda.Stream) -> None:
        self.eager, self.stream = eager, stream
        self.graph = torch.cuda.CUDAGraph()
        self.count = 0

    def __call__(self, function: Callable[[], None], prepare: Callable[[], None]) -> None:
        """Run the function; before its capture, `prepare` frees what the graph is to allocate itself."""
        if self.count < self.eager:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                function()
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            if self.count == self.eager:
                prepare()
                # A thread of NCCL, where there are several processes, makes calls of its own meanwhile.
                errors = "global" if distributed.world_size() == 1 else "thread_local"
                with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode=errors):
                    function()
            self.graph.replay()
        self.count += 1


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that steps are captured on: one for all, as each that runs a product keeps its workspaces, 64 MiB."""
    return torch.cuda.Stream(device)


class LearningStep(ABC):
    """One step of Adam without weight decay. On CUDA the third and later ones replay a graph of it.

    Several processes add up their gradients between the two halves of a step, each of which has its graph. A graph
    repeats what it was captured from, so whatever changes from step to step is read from tensors.

    Args:
        groups: parameters of one device, and each group's learning rate, a scalar tensor of that device.
        graphs: whether a step may be a graph where the device has any.
    """

    EAGER: ClassVar[int] = 2  # steps before capture, which must find all lazily made state in place

    def __init__(self, groups: Sequence[tuple[Sequence[nn.Parameter], Tensor]], graphs: bool) -> None:
        parameters = [parameter for group, _ in groups for parameter in group]
        device = parameters[0].device
        on_gpu = device.type == "cuda"
        options: list[dict[str, Any]] = [{"params": list(group), "lr": lr} for group, lr in groups]
        self.parameters = parameters
        self.optimizer = torch.optim.Adam(options, fused=on_gpu, capturable=on_gpu)
        self.summed = SummedGradients(parameters) if distributed.world_size() > 1 else None
        self.graphs: list[Replayed] = []
        if on_gpu and graphs:
            self.graphs = [Replayed(self.EAGER, side_stream(device)) for _ in range(2 if self.summed else 1)]

    def step(self) -> None:
        """Compute the gradients, add up those of all processes, and change the parameters."""
        if self.summed is None:
            self._run(0, self._gradients_and_update)
        else:
            self._run(0, self._gradients_from_none)
            distributed.add_up(self.summed.values)
            self._run(1, self._update)
        # Neither a fused Adam nor a graph tells torch that parameters have changed, and layers keep quantized weights.
        for parameter in self.parameters:
            torch.autograd.graph.increment_version(parameter)

    @abstractmethod
    def _gradients(self) -> None:
        """Add this process's share of the gradients to the parameters' `grad`."""

    def _update(self) -> None:
        self.optimizer.step()

    def _run(self, half: int, function: Callable[[], None]) -> None:
        if self.graphs:
            self.graphs[half](function, self._forget)
        else:
            function()

    def _gradients_and_update(self) -> None:
        self._gradients_from_none()
        self._update()

    def _gradients_from_none(self) -> None:
        self._forget()
        self._gradients()

    def _forget(self) -> None:
        if self.summed:
            self.summed.values.zero_()
        else:
            self.optimizer.zero_grad(set_to_none=True)
