"""Weights in a file: read without unpickling code, described, and fitted into a model."""

from __future__ import annotations

import hashlib
import logging
import math
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from iasvit.errors import IasvitError, reason
from tasks.unpickling import load_tensors

logger = logging.getLogger(__name__)

# Where files keep their weights: averages over training first, as timm takes them.
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema", "teacher")
PLAIN = ("state_dict", "model", "model_state_dict", "net", "network", "module", "params", "student")
_DEPTH = 4  # of dictionaries in dictionaries: a file's may hold themselves
_WRAPPERS = ("module.", "model.", "net.", "network.")  # start all keys where a model was wrapped


@cache
def describe_file(path: Path) -> str:
    """A checkpoint's file name and twelve digits of its SHA-256.

    Raises:
        IasvitError: it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise IasvitError(f"checkpoint {path} cannot be read: it is not a file")
    try:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except (OSError, ValueError) as error:  # a ValueError for a name that no file can have
        raise IasvitError(f"checkpoint {path} cannot be read: {reason(error)}") from None
    return f"{path.name} sha256:{digest.hexdigest()[:12]}"


@cache
def describe_weights(path: Path) -> str:
    """`describe_file`, and behind it the key of averaged (EMA) weights where these are taken.

    Raises:
        IasvitError: see `read_checkpoint`.
    """
    _, keys = _find(path)
    return " ".join((describe_file(path), *(key for key in keys if key in AVERAGED)))


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The weights in a file, without unpickling code: safetensors, or torch.save's.

    A training checkpoint may hold them under one of the keys PLAIN or AVERAGED, also one in another. Averaged (EMA)
    weights are taken before plain ones, as timm does, and a warning says so. Wrappers' prefixes on keys are taken off:
    DistributedDataParallel's, torch.compile's, and Lightning's "model." where all keys have it.

    Raises:
        IasvitError: no such file, or it holds no weights that can be read this way.
    """
    state, keys = _find(path)
    if averaged := [key for key in keys if key in AVERAGED]:
        _warn_once(f"checkpoint {path}: its averaged (EMA) weights, {averaged[0]!r}, are taken")
    for name, value in state.items():
        if fault := _fault(value):
            raise IasvitError(f"checkpoint {path}: its tensor {name!r} {fault}; dense tensors are expected")
    return _unwrapped(state, path)


@cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def _find(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The dictionary of tensors in a file, and the keys that lead to it."""
    describe_file(path)
    content = _load(path)
    if found := _search(content, ()):
        return found
    raise IasvitError(
        f"checkpoint {path} holds no dictionary that has tensors only, neither at its top nor under a key such as "
        f"'state_dict', 'model' or 'model_ema'; {_content(content)}"
    )


def _content(content: Any) -> str:
    """What is there instead of a dictionary of tensors."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}"
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        if any(isinstance(value, Tensor) for value in part.values()):
            for name, value in part.items():
                if not isinstance(name, str):
                    return f"among its tensors is the key {name!r:.40}, which is no text"
                if not isinstance(value, Tensor):
                    return f"among its tensors {ascii(name)[:60]} is a {type(value).__name__}"
    return f"its keys are {', '.join(ascii(name)[:40] for name in list(content)[:4])}" if content else "it is empty"


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise IasvitError(f"checkpoint {path} is empty; was its download cut off?")
    if head.startswith(b"version https://git-lfs"):
        raise IasvitError(f"checkpoint {path} is a Git LFS pointer and not the file; git lfs pull fetches that")
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise IasvitError(f"checkpoint {path} is a web page, not weights; was it downloaded from the right address?")
    header = int.from_bytes(head[:8], "little")
    named = path.suffix.lower() == ".safetensors" and not head.startswith(b"PK")
    if named or (head[8:9] == b"{" and header <= path.stat().st_size):
        try:
            return load_file(path)
        except Exception as error:  # damaged bytes raise whatever their reader stumbles over
            raise IasvitError(f"checkpoint {path} is not a complete safetensors file ({reason(error)[:200]})") from None
    return load_tensors(path)


def _search(content: Any, above: tuple[str, ...]) -> tuple[dict[str, Tensor], tuple[str, ...]] | None:
    """The first dictionary of tensors alone, by the order of the keys that may hold one, and the keys above it."""
    if not isinstance(content, dict) or not content or len(above) > _DEPTH:
        return None
    if all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        return dict(content), above
    keys = [*AVERAGED, *PLAIN]
    if "ema_state_dict" in content and _is_of_mmengine(content):
        # mmengine's EMA hook swaps the two as it saves: under "state_dict" is the average.
        keys.remove("ema_state_dict")
    found = (_search(content.get(key), (*above, key)) for key in keys)
    return next((one for one in found if one is not None), None)


def _is_of_mmengine(content: dict[Any, Any]) -> bool:
    meta = content.get("meta")
    return "message_hub" in content or (isinstance(meta, dict) and "mmengine_version" in meta)


def _fault(value: Tensor) -> str | None:
    """Why a tensor cannot be a weight; None where it can."""
    if value.is_meta:
        return "has no values (it is on the meta device)"
    if value.layout is not torch.strided or value.is_nested:
        return "is sparse or nested"
    if value.is_quantized:
        return "is of a quantized type of torch's"
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        return f"repeats its values to the shape {tuple(value.shape)}"  # kilobytes in the file, any size in memory
    return None


def _unwrapped(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights under their names in the model itself."""
    if set(state) - {"n_averaged"} and all(name.startswith("module.") or name == "n_averaged" for name in state):
        state = {name: value for name, value in state.items() if name != "n_averaged"}  # a count of AveragedModel's
    names = [name.replace("_orig_mod.", "").removeprefix("module.") for name in state]
    while prefix := next((p for p in _WRAPPERS if all(name.startswith(p) for name in names)), None):
        names = [name.removeprefix(prefix) for name in names]
    result = dict(zip(names, state.values(), strict=True))
    if len(result) < len(state):
        twice = next(name for name in names if names.count(name) > 1)
        raise IasvitError(f"checkpoint {path} has several tensors for {twice!r}, under prefixes of wrappers")
    return result


def head_size(state: dict[str, Tensor], classifier: str | Sequence[str]) -> int | None:
    """Classes of a checkpoint's classifier; None, timm's default, where it has none of the expected name or names."""
    names = [classifier] if isinstance(classifier, str) else list(classifier)
    # Swin's published files call "head" what timm calls "head.fc".
    names += [name.removesuffix(".fc") for name in names]
    weights = (state.get(f"{name}.weight") for name in names)
    return next((len(weight) for weight in weights if weight is not None and weight.ndim), None)


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
        IasvitError: keys, shapes or types do not fit, or values are not finite; the message names them.
    """
    wanted = model.state_dict()
    if resample or state.keys() != wanted.keys():
        translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        try:
            translated = translate(state, model) if translate else state
        except Exception:  # whatever timm's translation stumbles over; the faults are named below
            translated = state
        state = translated if wanted.keys() <= translated.keys() else state
    faults = [f"{key} is missing" for key in wanted if key not in state]
    faults += [f"{key} is not in the model" for key in state if key not in wanted]
    faults += [
        f"{key} has shape {tuple(state[key].shape)} for {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    faults += [
        f"{key} {fault}" for key, value in wanted.items() if key in state and (fault := _unfit(state[key], value.dtype))
    ]
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise IasvitError(f"checkpoint {path} does not fit the model: {'; '.join(faults[:4])}{more}")
    model.load_state_dict(state)


def _unfit(value: Tensor, dtype: torch.dtype) -> str | None:
    """Why values do not fit into a model's: not floating-point ones, or not finite; None where they do."""
    if not dtype.is_floating_point:
        return None
    if not value.is_floating_point():
        return f"is of type {str(value.dtype).removeprefix('torch.')}, but floating-point values are expected"
    return None if bool(value.to(dtype).isfinite().all()) else "has values that are NaN or infinite"
