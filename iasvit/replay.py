"""CUDA graphs: one launch takes the place of hundreds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from iasvit import distributed


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
