"""Every method's numbers on a mini backbone, pinned: what it computes changes only where somebody means it to."""

from __future__ import annotations

import json
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

import iasvit
from baselines.rtn import RTN
from iasvit.benchmark.versions import method_version
from tasks.classification.data import MiniImages
from tasks.mini import zoo


class Numbers(NamedTuple):
    """What is pinned, of 96 validation images.

    The blocks' errors are of all tokens, relative to the full-precision variance. A bit moved by float order is one of
    many there, so these two are sharp. Ten blocks later it has moved everything: top-1 and the logits' error are blunt.
    """

    block_0: float  # mean squared error after the first block
    block_1: float  # the same after the second
    logits: float  # mean squared error of the logits
    top1: float  # percent


LEARNING = {"iterations": 5, "batch_size": 8, "lr": 1e-3}
SEARCHING = {"candidates": 10, "rounds": 1}
OPTIONS: dict[str, dict[str, Any]] = {"ias_vit": LEARNING, "base_ptq": SEARCHING, "ptq4vit": SEARCHING}

# Largest changes that float order may make: relative for errors, percentage points for top-1.
TOLERANCE = Numbers(0.005, 0.015, 0.25, 12.0)

# (method, bits) → the method's version, and the numbers of that version.
PINNED: dict[tuple[str, str], tuple[int, Numbers]] = {
    ("ias_vit", "W3A3"): (2, Numbers(0.069564, 0.077081, 3.2273, 16.667)),
    ("ias_vit", "W4A4"): (2, Numbers(0.019266, 0.019616, 1.3539, 61.458)),
    ("ias_vit[-sulq]", "W4A4"): (2, Numbers(0.018873, 0.017635, 1.2143, 64.583)),
    ("ias_vit[-sos]", "W4A4"): (2, Numbers(0.021041, 0.021608, 1.6241, 61.458)),
    ("repq_vit", "W4A4"): (2, Numbers(0.036977, 0.030747, 1.3174, 64.583)),
    ("ptq4vit", "W4A4"): (1, Numbers(0.070382, 0.047673, 2.3302, 45.833)),
    ("base_ptq", "W6A6"): (1, Numbers(0.097933, 0.072445, 1.1145, 67.708)),
    ("minmax", "W6A6"): (1, Numbers(0.11109, 0.080478, 1.0816, 68.75)),
    ("rtn", "W4A4"): (1, Numbers(0.0073854, 0.0063247, 0.21268, 83.333)),
}


@pytest.fixture(autouse=True)
def calm_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam with a large eps: a key's bias has no gradient but float order, of which Adam would make steps of ±lr."""
    monkeypatch.setattr(torch.optim, "Adam", partial(torch.optim.Adam, eps=0.1))


class Outputs(NamedTuple):
    """Of all images: tokens after the first two blocks N×T×C, logits N×K, labels N."""

    block_0: Tensor
    block_1: Tensor
    logits: Tensor
    labels: Tensor


@cache
def full_precision() -> tuple[nn.Module, Tensor, Outputs]:
    """The backbone, 16 calibration images, and what the backbone outputs."""
    model = zoo.load("deit_t").requires_grad_(False)
    calibration = MiniImages().calibration(resolve_data_config(model=model), 16, seed=0)
    return model, calibration, outputs_of(model)


@cache
def validation() -> list[tuple[Tensor, Tensor]]:
    """Images and labels in batches; to draw them takes longer than the models."""
    config = resolve_data_config(model=zoo.build("deit_t"))
    return [(images, labels) for images, labels, _ in MiniImages(limit=96).batches(config)]


@torch.inference_mode()
def outputs_of(model: nn.Module) -> Outputs:
    seen: dict[nn.Module, list[Tensor]] = {block: [] for block in model.blocks[:2]}
    hooks = [block.register_forward_hook(lambda block, _, output: seen[block].append(output)) for block in seen]
    batches = [(model(images), labels) for images, labels in validation()]
    for hook in hooks:
        hook.remove()
    logits, labels = zip(*batches, strict=True)
    return Outputs(*(torch.cat(parts) for parts in (*seen.values(), logits, labels)))


def measure(method: str, spec: str) -> Numbers:
    """The method's numbers as they are now, to five digits."""
    model, calibration, full = full_precision()
    quantized = iasvit.quantize(model, calibration, spec, method, **OPTIONS.get(method.partition("[")[0], {}))
    outputs = outputs_of(quantized)
    errors = [(ours - theirs).double().square().mean() for ours, theirs in zip(outputs[:3], full[:3], strict=True)]
    top1 = 100 * (outputs.logits.argmax(dim=1) == outputs.labels).double().mean()
    numbers = (errors[0] / full.block_0.var(), errors[1] / full.block_1.var(), errors[2], top1)
    return Numbers(*(float(f"{float(number):.5g}") for number in numbers))


def test_every_method_is_pinned() -> None:
    assert set(iasvit.list_methods()) <= {method for method, _ in PINNED}


def complaint(method: str, spec: str, new: Numbers) -> str:
    """What is wrong with a method's pinned line, and what to do; "" where version and numbers are the pinned ones."""
    (pinned, old), present = PINNED[method, spec], method_version(method)
    *errors, top1 = zip(old, new, TOLERANCE, strict=True)
    kept = all(abs(b - a) <= tolerance * a for a, b, tolerance in errors) and abs(top1[1] - top1[0]) <= top1[2]
    if kept and pinned == present:
        return ""
    if pinned == present:
        what = f"numbers of {method} changed, but its version is still {present}: {tuple(old)} → {tuple(new)}"
        todo = f"undo the change, or raise the class's version to {present + 1} with a line in its changelog, and"
    else:
        what, todo = (
            f"{method} is at version {present}, but pinned are numbers of version {pinned}",
            "to pin the new ones,",
        )
    version = present + 1 if pinned == present else present
    line = f"    ({json.dumps(method)}, {json.dumps(spec)}): ({version}, Numbers{tuple(new)}),"
    return f"{what};\n{todo} put this line into PINNED:\n{line}"


@pytest.mark.parametrize(("method", "spec"), PINNED)
def test_a_methods_numbers_and_version_are_the_pinned_ones(method: str, spec: str) -> None:
    new = measure(method, spec)
    print(method, spec, method_version(method), tuple(new))  # pytest -rP shows all lines
    if fault := complaint(method, spec, new):
        pytest.fail(fault)


def test_numbers_and_version_move_together(monkeypatch: pytest.MonkeyPatch) -> None:
    version, numbers = PINNED["rtn", "W4A4"]
    moved = numbers._replace(logits=2 * numbers.logits)
    assert complaint("rtn", "W4A4", numbers) == ""
    assert f'("rtn", "W4A4"): ({version + 1}, Numbers{tuple(moved)})' in complaint("rtn", "W4A4", moved)
    monkeypatch.setattr(RTN, "version", version + 1, raising=False)
    for new in (numbers, moved):
        assert f'("rtn", "W4A4"): ({version + 1}, Numbers{tuple(new)})' in complaint("rtn", "W4A4", new)
