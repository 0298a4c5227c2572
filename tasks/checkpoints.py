"""Weights in a file: read without unpickling code, described, and fitted into a model."""

from __future__ import annotations

import hashlib
import math
import pickle
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor, nn

from iasvit.errors import IasvitError


@cache
def describe_file(path: Path) -> str:
    """A checkpoint's file name and twelve digits of its SHA-256.

    Raises:
        IasvitError: it cannot be read.
    """
    try:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise IasvitError(f"checkpoint {path} cannot be read: {error.strerror or error}") from None
    return f"{path.name} sha256:{digest.hexdigest()[:12]}"


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The weights in a file, without unpickling code: safetensors, or torch.save's of tensors.

    A training checkpoint may hold them as "model" or "state_dict"; wrappers' prefixes on keys are taken off.

    Raises:
        IasvitError: no such file, or it holds no weights that can be read this way.
    """
    describe_file(path)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0].strip() if str(error).strip() else type(error).__name__
        reason = reason.partition(". ")[0]  # torch goes on to recommend unpickling code
        raise IasvitError(
            f"checkpoint {path} is neither a safetensors file nor a torch.save file of tensors alone ({reason})"
        ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        raise IasvitError(f"checkpoint {path} holds no dictionary of tensors, alone or as 'model' or 'state_dict'")
    return clean_state_dict(state)


def head_size(state: dict[str, Tensor], classifier: str | Sequence[str]) -> int | None:
    """Classes of a checkpoint's classifier; None, timm's default, where it has none of the expected name or names."""
    names = [classifier] if isinstance(classifier, str) else list(classifier)
    # Swin's published files call "head" what timm calls "head.fc".
    names += [name.removesuffix(".fc") for name in names]
    return next((len(state[f"{name}.weight"]) for name in names if f"{name}.weight" in state), None)


def image_size(state: dict[str, Tensor], model: nn.Module, own: int) -> int | None:
    """Pixels a side that a checkpoint's position embedding is for; None without one of a square grid.

    Args:
        state: of the checkpoint.
        model: as timm makes it for images of `own` pixels.
        own: pixels a side.
    """
    theirs, ours = state.get("pos_embed"), getattr(model, "pos_embed", None)
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    if theirs is None or theirs.ndim != 3 or ours is None or not patches:
        return None
    tokens = theirs.shape[1] - (ours.shape[1] - patches)  # without those of class and distillation
    side = math.isqrt(max(tokens, 0))
    return side * own // math.isqrt(patches) if side and side * side == tokens else None


def fill(model: nn.Module, state: dict[str, Tensor], path: Path, resample: bool = False) -> None:
    """Put a checkpoint's weights into a model, in place; an architecture's original key names are translated by timm.

    Args:
        model: as the checkpoint's.
        state: of `read_checkpoint`.
        path: for messages.
        resample: let timm resample a position embedding of another size.

    Raises:
        IasvitError: keys or shapes do not fit; the message names them.
    """
    wanted = model.state_dict()
    if resample or state.keys() != wanted.keys():
        translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        try:
            translated = translate(state, model) if translate else state
        except (KeyError, RuntimeError, AttributeError, ValueError, TypeError):
            translated = state
        state = translated if wanted.keys() <= translated.keys() else state
    faults = [f"{key} is missing" for key in wanted if key not in state]
    faults += [f"{key} is not in the model" for key in state if key not in wanted]
    faults += [
        f"{key} has shape {tuple(state[key].shape)} for {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise IasvitError(f"checkpoint {path} does not fit the model: {'; '.join(faults[:4])}{more}")
    model.load_state_dict(state)
