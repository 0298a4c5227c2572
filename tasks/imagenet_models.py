"""Models of the ImageNet task by name: timm's, with pretrained, local or random weights, and the mini zoo's."""

from __future__ import annotations

import difflib
import hashlib
import math
import pickle
import sys
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.models import clean_state_dict
from torch import Tensor, nn

from iasvit.errors import IasvitError
from tasks.imagenet_data import DataConfig

# The paper's backbones, with the weights whose full-precision accuracy the papers state: RepQ-ViT takes timm 0.4.12's
# defaults, from which current timm's differ for ViT-B (augreg2) and Swin-S (ImageNet-22k). Swin-B's are fine-tuned
# from ImageNet-22k, as its published 85.27 tells; DeiT's, Swin-T's and Swin-S's are trained on ImageNet-1k alone.
PAPER_BACKBONES = {
    "vit_s": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_b": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "deit_t": "deit_tiny_patch16_224.fb_in1k",
    "deit_s": "deit_small_patch16_224.fb_in1k",
    "deit_b": "deit_base_patch16_224.fb_in1k",
    "swin_t": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_s": "swin_small_patch4_window7_224.ms_in1k",
    "swin_b": "swin_base_patch4_window7_224.ms_in22k_ft_in1k",
}
RANDOM_SEED = 0  # of --no-pretrained's weights


class Models(Protocol):
    """Full-precision models by name."""

    def check(self, name: str) -> None:
        """Raise IasvitError where there is no model of that name (the message says what exists), or no weights file."""

    def architecture(self, name: str) -> nn.Module:
        """The model without weights, on the meta device: instant and of no size."""

    def load(self, name: str) -> nn.Module:
        """The model, eval(), on the CPU."""

    def config(self, name: str) -> DataConfig:
        """What timm's `resolve_data_config` says of it."""

    def weights(self, name: str) -> str:
        """Which weights `load` gives it, in words that change when they do."""


class TimmModels:
    """timm's models, under the paper's short names or timm's own.

    Args:
        pretrained: timm's weights, fetched as timm does; else random ones of RANDOM_SEED.
        checkpoint: weights from this file instead.
        img_size: pixels a side that the model is made for; None for those of the checkpoint's position embedding where
            that is of a square grid, else for timm's own. With another size than the weights are of, timm resamples
            the position embedding.
    """

    def __init__(self, pretrained: bool = True, checkpoint: Path | None = None, img_size: int | None = None) -> None:
        self._pretrained = pretrained
        self._checkpoint = checkpoint
        self._img_size = img_size
        self._sizes: dict[str, int | None] = {}  # of `_size`

    def check(self, name: str) -> None:
        """See `Models`."""
        full = PAPER_BACKBONES.get(name, name)
        architecture, _, tag = full.partition(".")
        if not timm.is_model(architecture):
            names = [*PAPER_BACKBONES, *timm.list_models()]
            close = difflib.get_close_matches(name, names, n=4, cutoff=0.6)
            hint = f"; close to it: {', '.join(close)}" if close else ""
            raise IasvitError(
                f"backbone {name!r} does not exist; there are {', '.join(PAPER_BACKBONES)} and the names that "
                f"timm.list_models() gives{hint}"
            )
        tags = sorted(m.partition(".")[2] for m in timm.list_pretrained(f"{architecture}.*"))
        if tag and tag not in tags:
            raise IasvitError(
                f"backbone {name!r}: timm's {architecture} has no weights {tag!r}; it has {', '.join(tags)}"
            )
        if self._checkpoint is not None:
            describe_file(self._checkpoint)
        elif self._pretrained and not tags:
            raise IasvitError(f"timm has no pretrained weights of {name!r}; give --checkpoint FILE or --no-pretrained")
        self._check_size(name)

    def _check_size(self, name: str) -> None:
        """Raise IasvitError where the model cannot be of the size given."""
        if (size := self._size(name)) is None:
            return
        try:
            model = self.architecture(name)
        except TypeError:
            raise IasvitError(f"--img-size is {size}, but backbone {name!r} is not made for one image size") from None
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1,))[0]
        if size % patch:
            raise IasvitError(f"--img-size is {size}, but backbone {name!r} has patches of {patch} pixels")

    @cached_property
    def _shapes(self) -> dict[str, Tensor]:
        """The checkpoint's weights, on the meta device."""
        return {key: value.to("meta") for key, value in read_checkpoint(self._checkpoint).items()}

    def _size(self, name: str) -> int | None:
        """Pixels a side, where they are not timm's own for this model."""
        if name not in self._sizes:
            full = PAPER_BACKBONES.get(name, name)
            own = resolve_data_config(pretrained_cfg=_pretrained_cfg(full))["input_size"][-1]
            size = self._img_size
            if size is None and self._checkpoint is not None:
                with torch.device("meta"):
                    size = _size_of(self._shapes, timm.create_model(full, pretrained=False), own)
            self._sizes[name] = None if size == own else size
        return self._sizes[name]

    def _create(self, name: str, pretrained: bool = False) -> nn.Module:
        """timm's model, of the checkpoint's classes and the size of `_size`."""
        full, size = PAPER_BACKBONES.get(name, name), self._size(name)
        options = {} if size is None else {"img_size": size}
        if self._checkpoint is not None:
            options["num_classes"] = _head_size(self._shapes, full)
        return timm.create_model(full, pretrained=pretrained, **options)

    def architecture(self, name: str) -> nn.Module:
        """See `Models`."""
        with torch.device("meta"):
            return self._create(name)

    def load(self, name: str) -> nn.Module:
        """See `Models`.

        Raises:
            IasvitError: no such model, weights that cannot be fetched, or a checkpoint that does not fit.
        """
        self.check(name)
        full = PAPER_BACKBONES.get(name, name)
        if self._checkpoint is not None:
            model = self._create(name)
            fill(model, read_checkpoint(self._checkpoint), self._checkpoint, resample=self._img_size is not None)
        elif self._pretrained:
            try:
                model = self._create(name, pretrained=True)
            except Exception as error:  # the hub's client raises what its layers raise: OSError, httpx's, its own
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise IasvitError(
                    f"the pretrained weights of {full} could not be fetched ({reason}); with no network, give them as "
                    f"--checkpoint FILE, or take random ones with --no-pretrained"
                ) from None
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(RANDOM_SEED)
                model = self._create(name)
        return model.eval()

    def config(self, name: str) -> DataConfig:
        """See `Models`."""
        cfg, size = _pretrained_cfg(PAPER_BACKBONES.get(name, name)), self._size(name)
        return resolve_data_config({} if size is None else {"img_size": size}, pretrained_cfg=cfg)

    def weights(self, name: str) -> str:
        """See `Models`."""
        size = self._size(name)
        at = "" if size is None else f", {size} pixels"
        if self._checkpoint is not None:
            return f"{describe_file(self._checkpoint)}{at}"
        if not self._pretrained:
            return f"random, seed {RANDOM_SEED}{at}"
        full = PAPER_BACKBONES.get(name, name)
        return f"timm {_pretrained_cfg(full)['architecture']}.{_pretrained_cfg(full)['tag']}{at}"


class MiniModels:
    """The mini zoo's models.

    Args:
        hard: with a real ViT's channel spread (mini-hard).
        pretrained: the zoo's checkpoints; else random weights of RANDOM_SEED.
        checkpoint: weights from this file instead.
    """

    def __init__(self, hard: bool = False, pretrained: bool = True, checkpoint: Path | None = None) -> None:
        self._hard = hard
        self._pretrained = pretrained
        self._checkpoint = checkpoint

    def check(self, name: str) -> None:
        """See `Models`."""
        from tasks.mini import zoo

        if name not in zoo.MINI_BACKBONES:
            raise IasvitError(
                f"backbone {name!r} does not exist in the mini benchmark; there are {', '.join(zoo.MINI_BACKBONES)}; "
                f"timm's own models go with --data imagenette or imagenet"
            )
        if self._checkpoint is not None:
            describe_file(self._checkpoint)
        elif self._pretrained:
            zoo.read_metadata(name)

    def architecture(self, name: str) -> nn.Module:
        """See `Models`."""
        from tasks.mini import zoo

        with torch.device("meta"):
            return zoo.build(name)

    def load(self, name: str) -> nn.Module:
        """See `Models`.

        Raises:
            IasvitError: no such model, no checkpoint of it, or one that does not fit.
        """
        from tasks.mini import hard, zoo

        self.check(name)
        if self._checkpoint is None and self._pretrained:
            return zoo.load(name, hard=self._hard)
        model = zoo.build(name, seed=RANDOM_SEED)
        if self._checkpoint is not None:
            fill(model, read_checkpoint(self._checkpoint), self._checkpoint)
        return hard.harden(model, seed=0) if self._hard else model

    def config(self, name: str) -> DataConfig:
        """See `Models`."""
        from tasks.mini import zoo

        return resolve_data_config(pretrained_cfg=zoo.build(name).pretrained_cfg)

    def weights(self, name: str) -> str:
        """See `Models`."""
        from tasks.mini import zoo

        if self._checkpoint is None and not self._pretrained:
            return f"random, seed {RANDOM_SEED}"
        return describe_file(self._checkpoint or zoo.checkpoint_path(name))


@cache
def _pretrained_cfg(full: str) -> dict:
    cfg = timm.get_pretrained_cfg(full)
    return {} if cfg is None else cfg.to_dict()


# ---- checkpoints -----------------------------------------------------------------------------------------------------


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


def _head_size(state: dict[str, Tensor], full: str) -> int | None:
    """Classes of a checkpoint's classifier; None, timm's default, where it has none of the expected name."""
    classifier = _pretrained_cfg(full).get("classifier") or ""
    names = [classifier] if isinstance(classifier, str) else list(classifier)
    # Swin's published files call "head" what timm calls "head.fc".
    names += [name.removesuffix(".fc") for name in names]
    return next((len(state[f"{name}.weight"]) for name in names if f"{name}.weight" in state), None)


def _size_of(state: dict[str, Tensor], model: nn.Module, own: int) -> int | None:
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
