"""Settings of all tests, and the small models that tests of the core share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import tiny_models
import torch
from hypothesis import settings
from torch import Tensor, nn

from iasvit.progress import Progress

os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
torch.set_num_threads(1)  # sums in one order: what is compared bit for bit must not depend on the machine's cores
settings.register_profile("iasvit", deadline=None, max_examples=50, derandomize=True)
settings.register_profile("deep", deadline=None, max_examples=3000)  # pytest --hypothesis-profile=deep
settings.load_profile("iasvit")
Progress.SAVE_EVERY = 0.0  # tests interrupt and resume work that takes less than a second


@pytest.fixture(scope="module", autouse=True)
def imported_so_far() -> None:
    """Keep the garbage collector away from the million objects of imported modules: tests take a quarter less."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Take back the threads that a command run by a test has set: the tests after it count on one."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def vit() -> nn.Module:
    """A ViT of 2 blocks on 32-pixel images."""
    return tiny_models.vit()


@pytest.fixture
def swin() -> nn.Module:
    """A Swin of 2 stages with a plain and a shifted block each."""
    return tiny_models.swin()


@pytest.fixture(params=sorted(tiny_models.MODELS))
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Each of the tiny models: ViT, distilled DeiT, Swin."""
    return tiny_models.MODELS[request.param]()


@pytest.fixture
def images() -> Tensor:
    """12 images, 12×3×32×32: not a multiple of the batch sizes used."""
    return tiny_models.images()
