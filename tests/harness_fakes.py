"""A tiny task and methods for the tests of harness and command line."""

from __future__ import annotations

import copy
import os
import signal
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from iasvit import methods
from iasvit.benchmark import versions
from iasvit.benchmark.task import EMBEDDED, DataSet, Metric, Task
from iasvit.errors import IasvitError
from iasvit.progress import Progress
from iasvit.spec import QuantSpec

Progress.SAVE_EVERY = 0.0  # in processes that tests start, too


class FakeTask(Task):
    """A ViT of one tiny block on random images; counts what it is asked for."""

    name = "fake"
    metrics = (
        Metric("top1", primary=True, standard_error="top1_se"),
        Metric("top1_se"),
        Metric("agreement"),
    )
    data_sets: ClassVar[dict[str, DataSet]] = {"mini": DataSet("mini", EMBEDDED, "drawn images")}

    def __init__(self, weights: str = "", data: str = "d1", config: str = "") -> None:
        self.loaded: list[str] = []
        self.predicted: list[str] = []
        self.weights_name = weights
        self.fingerprints = data, config
        self.data = self.data_sets["mini"]
        self.split_size = 20

    def weights(self, model: str) -> str:
        return self.weights_name

    def data_fingerprint(self) -> str:
        return self.fingerprints[0]

    def config_fingerprint(self, model: str) -> str:
        return self.fingerprints[1]

    def load_model(self, model: str) -> nn.Module:
        if model == "missing":
            raise IasvitError("model 'missing' has no checkpoint")
        self.loaded.append(model)
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            shape = {"img_size": 8, "patch_size": 8, "embed_dim": 4, "depth": 1, "num_heads": 1, "num_classes": 3}
            network = VisionTransformer(**shape, class_token=False, global_pool="avg")
            nn.init.normal_(network.head.weight)
        return network.eval()

    def calibration(self, model: str, n: int, seed: int) -> Tensor:
        return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))

    def predict(self, model: str, network: nn.Module, progress: Progress) -> Tensor:
        self.predicted.append(model)
        return network(torch.randn(self.split_size, 3, 8, 8, generator=torch.Generator().manual_seed(99)))

    def score(self, outputs: Tensor, reference: Tensor) -> dict[str, float]:
        agreement = (outputs.argmax(1) == reference.argmax(1)).float().mean().item() * 100
        return {"top1": agreement * 0.8, "top1_se": 1.5, "agreement": agreement}


@dataclass
class Noise:
    """Adds noise to the weights, the more the fewer bits; in steps that it can resume from."""

    seed: int = 0
    iterations: int | None = 3
    batch_size: int = 2

    name: ClassVar[str] = "noise"
    steps: ClassVar[list[int]] = []

    def quantize(self, model: nn.Module, calibration: Tensor, spec: QuantSpec, progress: Progress) -> nn.Module:
        quantized = copy.deepcopy(model)
        done = -1
        if (record := progress.restore()) is not None:
            done, state = record
            quantized.load_state_dict(state)
        with progress.phase("reconstruction", self.iterations or 0), torch.no_grad():
            for step in range(done + 1, self.iterations or 0):
                type(self).steps.append(step)
                generator = torch.Generator().manual_seed(1000 * self.seed + step)
                quantized.head.weight += torch.randn(3, 4, generator=generator) * 4 / 2**spec.w_bits
                progress.save(step, quantized.state_dict())
                self.after(step)
        return quantized

    def after(self, step: int) -> None:
        """Called when a step is saved."""


@dataclass
class Killed(Noise):
    """Kills its own process with IASVIT_TEST_SIGNAL after its second step, once: the file that it makes says so."""

    name: ClassVar[str] = "killed"

    def after(self, step: int) -> None:
        with open("steps.txt", "a") as file:
            file.write(f"{step}\n")
        if step == 1 and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), int(os.environ.get("IASVIT_TEST_SIGNAL", signal.SIGKILL)))


@dataclass
class Broken:
    """Fails as `how` says."""

    seed: int = 0
    how: str = "defect"

    name: ClassVar[str] = "broken"

    def quantize(self, model: nn.Module, calibration: Tensor, spec: QuantSpec, progress: Progress) -> nn.Module:
        model.head.weight.data.zero_()  # a method that also spoils the model given must not spoil other cells
        if self.how == "nan":
            raise IasvitError("layer 'fc' outputs NaN")
        if self.how == "interrupt":
            raise KeyboardInterrupt
        if self.how == "full":
            raise OSError(28, "No space left on device")
        raise RuntimeError("two\nlines")


ENTRIES = {
    name: EntryPoint(name, f"harness_fakes:{cls.__name__}", methods.GROUP)
    for name, cls in {"noise": Noise, "killed": Killed, "broken": Broken}.items()
}
ENTRIES["rtn"] = EntryPoint("rtn", "baselines.rtn:RTN", methods.GROUP)  # a real one, whose models can be saved


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the fake methods and rtn, and no other."""
    versions.forget()
    monkeypatch.setattr(methods, "_entries", lambda: ENTRIES)
