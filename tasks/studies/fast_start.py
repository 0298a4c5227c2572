"""The fast recipe of I&S-ViT with a closed-form start of its stages, or with the weights of least held-out loss.

`python -m tasks.studies.fast_start backbone=deit_t bits=W3A3 seed=0 limit=2500 calib=256 it=40 lr=1e-3 bs=16
[ridge=1e-2] [gptq=1e-2] [hold=16 every=5] [compile=1] [autocast=1] [device=cuda]
[data=folder data_root=… data_name=… checkpoint=…]`
prints one line. A study: none of it helped (docs/real-vit.md), so that the method has no such options.

- ridge: before stage 1 each layer gets the ridge solution that makes up for the activations' error, λ being so much of
  the mean diagonal (`iasvit.closed_form.correct`).
- gptq: before stage 3 each layer's weight is rounded column by column, with this damping (`iasvit.closed_form.gptq`).
- hold: every hold-th image is held out; the block loss on those, each `every` steps, chooses the weights of each stage.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

import iasvit
from iasvit.closed_form import correct, gptq, set_weight
from iasvit.closed_form.moments import in_order, moments_of
from iasvit.models import prepare, segments
from iasvit.nn import quantizers_of
from iasvit.progress import Progress
from iasvit.reconstruction import SegmentJob, squared_error
from iasvit.sos import IASViT
from iasvit.steps import _Step
from tasks.imagenet import ImageNetTask


@dataclass
class Started(IASViT):
    """I&S-ViT with what the module says."""

    ridge: float = 0.0
    gptq: float = 0.0
    hold: int = 0
    every: int = 10
    name: ClassVar[str] = "started"

    def quantize(self, model: nn.Module, calibration: Any, spec: Any, progress: Progress) -> nn.Module:
        """See `IASViT`."""
        reference = prepare(model, spec, self.weight_quantizer, self.activation_quantizer)
        for weights in (True, False):
            for _, quantizer in quantizers_of(reference, weights=weights):
                quantizer.enabled = False
        self.chain, self.spent = segments(reference), 0.0
        return super().quantize(model, calibration, spec, progress)

    @torch.no_grad()
    def start(self, job: SegmentJob, stage: int) -> None:
        """Weights in closed form, one layer after the other."""
        full, layers = self.chain[job.index], job.segment.layers()
        inputs = job.inputs_fp if stage == 1 else job.inputs_q
        originals = dict(zip(layers, full.layers(), strict=True))
        for layer in layers:
            layer.weight_quantizer.enabled = False
        for layer in in_order(layers, job.segment.run, inputs.gather([0])):
            reference = (originals[layer], full, job.inputs_fp) if stage == 1 else None
            moments = moments_of(layer, job.segment, inputs, reference=reference, batch_size=32)
            if moments is not None and not moments.flat:
                if stage == 1:
                    ridge = self.ridge * moments.quantized.diagonal().mean().item()
                    weight, bias = correct(layer.weight.flatten(1), layer.bias, moments, ridge)
                    if bias is not None:
                        layer.bias.copy_(bias)
                else:
                    q = layer.weight_quantizer
                    grid = (q.scale, q.zero_point, q.n_bits)
                    weight = gptq(layer.weight.flatten(1), moments.quantized, *grid, damping=self.gptq)
                set_weight(layer, weight)
            layer.weight_quantizer.enabled = stage == 3

    def optimize_stage(self, job: SegmentJob, stage: int, iterations: int) -> None:
        """See `IASViT`."""
        can = len(job.targets) > 0 and bool(job.segment.quantizers(weights=False))
        if can and (self.ridge if stage == 1 else self.gptq):
            begun = time.perf_counter()
            self.start(job, stage)
            self.spent += time.perf_counter() - begun
        if not (can and self.hold):
            return super().optimize_stage(job, stage, iterations)
        count = len(job.inputs_fp)
        device = next(iter(job.segment.layers())).weight.device
        held = torch.arange(0, count, self.hold, device=device)
        kept = torch.tensor([i for i in range(count) if i % self.hold], device=device)
        inputs = job.inputs_fp if stage == 1 else job.inputs_q
        x, y = inputs.gather(held), job.targets.leading.gather(held)
        parameters = [p for layer in job.segment.layers() for p in (layer.weight, layer.bias) if p is not None]
        best: list[Any] = [float("inf"), None, 0]

        @torch.no_grad()
        def look() -> None:
            out = job.segment.run(x)
            loss = squared_error(out[0] if isinstance(out, tuple) else out, y).item()
            if loss < best[0]:
                best[:2] = [loss, [p.detach().clone() for p in parameters]]

        construct, call = _Step.__init__, _Step.__call__

        def on_the_kept(step: _Step, *args: Any) -> None:
            construct(step, *args[:2], len(kept), *args[3:])
            step.batches = kept[step.batches]

        def looking(step: _Step) -> None:
            call(step)
            best[2] += 1
            if best[2] % self.every == 0 or best[2] == iterations:
                look()

        look()
        _Step.__init__, _Step.__call__ = on_the_kept, looking
        try:
            super().optimize_stage(job, stage, iterations)
        finally:
            _Step.__init__, _Step.__call__ = construct, call
        with torch.no_grad():
            for parameter, weight in zip(parameters, best[1], strict=True):
                parameter.copy_(weight)


def main() -> None:
    """See the module."""
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    bits, seed, backbone = given.pop("bits", "W3A3"), int(given.pop("seed", 0)), given.pop("backbone")
    where = {name: given.pop(name) for name in ("data", "data_name", "device") if name in given}
    where |= {name: Path(given.pop(name)) for name in ("data_root", "checkpoint") if name in given}
    calib, limit = int(given.pop("calib", 256)), int(given.pop("limit", 0)) or None
    task, _ = ImageNetTask.grid(bits=[bits], seed=[seed], backbone=[backbone], limit=limit, **where)
    model, images = task.load_model(backbone), task.calibration(backbone, calib, seed)
    options: dict[str, Any] = {"iterations": int(given.pop("it", 40)), "lr": float(given.pop("lr", 1e-3))}
    options |= {"batch_size": int(given.pop("bs", 16)), "seed": seed}
    options |= {name: bool(int(given.pop(name))) for name in ("compile", "autocast") if name in given}
    method = Started(**options, **{n: int(v) if n in ("hold", "every") else float(v) for n, v in given.items()})
    clocks = time.perf_counter(), time.process_time()
    quantized = iasvit.quantize(model, images, bits, method)
    wall, cpu = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
    progress = Progress()
    score = task.score(task.predict(backbone, quantized, progress), task.predict(backbone, model, progress))
    line = f"top1 {score['top1']:.2f} agreement {score['agreement']:.2f} seconds {wall:.1f} of a CPU {cpu:.1f}"
    print(" ".join(sys.argv[1:]), line, f"start {method.spent:.1f}", flush=True)


if __name__ == "__main__":
    main()
