"""One training step of a mini backbone, plain or as a CUDA graph."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.studies.training.backbone_data import Batches
from tasks.studies.training.optimization import make_optimizer, make_schedule

logger = logging.getLogger(__name__)


def compile_blocks(model: nn.Module) -> None:
    """Compile block by block: equal blocks share one compilation, so 24 of them take seconds, not minutes."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64  # Swin: two kinds of block in each of four stages
    torch._dynamo.config.automatic_dynamic_shapes = False
    for module in model.modules():
        if type(module).__name__ in ("Block", "SwinTransformerBlock"):
            module.compile(dynamic=False)


class Stepper:
    """One training step: batch, loss, gradient, AdamW. On CUDA captured as one graph, which costs one launch.

    Capture or compilation that fails falls back to plain steps and says so.

    Args:
        model: in training mode, on the device of the batches.
        batches: augmented images by number.
        labels: int64, one an image.
        name: of the model, for messages.
        compile: CUDA: compile the blocks.
        graph: CUDA: capture the step.
    """

    WARMUP = 5  # plain steps before capture: compilation and the optimizer's state happen there

    def __init__(
        self, model: nn.Module, batches: Batches, labels: Tensor, name: str, *, compile: bool = True, graph: bool = True
    ) -> None:
        self.model, self.batches, self.labels, self.name = model, batches, labels, name
        self.recipe, self.cuda = batches.recipe, labels.is_cuda
        self.compile, self.graph = compile and self.cuda, graph and self.cuda
        recipe = self.recipe
        self.index = torch.zeros(recipe.batch_size, dtype=torch.int64, device=labels.device)
        self.loss = torch.zeros((), device=labels.device)  # of the last step
        kind = {"fused": True, "capturable": True} if self.cuda else {}
        self.optimizer = make_optimizer(model, recipe, betas=(0.9, recipe.beta2), **kind)
        self.schedule = make_schedule(self.optimizer, recipe)
        # A learning rate in a tensor is read by the captured graph at each replay.
        self.lr = torch.zeros((), device=labels.device)
        self.parameters = list(model.parameters())
        self.cuda_graph: torch.cuda.CUDAGraph | None = None
        self.count = 0
        if self.compile:
            compile_blocks(model)

    def _step(self) -> None:
        images, labels = self.batches(self.index), self.labels[self.index]
        # The cache of cast weights would outlive a captured step, hence cache_enabled=False.
        half = torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if self.cuda else nullcontext()
        with half:
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            torch.cuda.synchronize()
            self.optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph):
                self._step()
            self.cuda_graph = graph
        except RuntimeError as error:
            logger.warning(
                "%s: CUDA graph capture failed, continuing without: %s", self.name, str(error).splitlines()[0]
            )

    def __call__(self, index: Tensor, progress: float) -> None:
        """Train on the images of these numbers (int64 batch_size, CPU); the run is at `progress`, from 0 to 1."""
        self.index.copy_(index, non_blocking=True)
        self.schedule.step_update(progress)
        if self.cuda:
            self.lr.fill_(self.optimizer.param_groups[0]["lr"])
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr
        if self.graph and self.count == self.WARMUP:
            self._capture()
        if self.cuda_graph is not None:
            self.cuda_graph.replay()
        elif self.cuda and self.count < self.WARMUP:
            stream = torch.cuda.Stream()  # capture wants what it replays to have run on a side stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._warm()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            self._step()
        self.count += 1

    def _warm(self) -> None:
        try:
            self._step()
        except Exception as error:
            if not self.compile or self.count > 0:
                raise
            logger.warning("%s: torch.compile failed, continuing without: %s", self.name, str(error).splitlines()[0])
            for module in self.model.modules():
                module._compiled_call_impl = None  # what Module.compile sets
            self._step()
