"""Models of the ImageNet task by name: timm's, with pretrained, local or random weights, and the mini zoo's."""

from __future__ import annotations

import difflib
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from iasvit.errors import IasvitError
from tasks.checkpoints import describe_file, describe_weights, fill, head_size, image_size, read_checkpoint
from tasks.classification.data import DataConfig

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
        """What timm's `resolve_data_config` gives for the model."""

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
            raise IasvitError(f"timm has no pretrained weights for {name!r}; give --checkpoint FILE or --no-pretrained")
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
                    size = image_size(self._shapes, timm.create_model(full, pretrained=False), own)
            self._sizes[name] = None if size == own else size
        return self._sizes[name]

    def _create(self, name: str, pretrained: bool = False) -> nn.Module:
        """timm's model, of the checkpoint's classes and the size of `_size`."""
        full, size = PAPER_BACKBONES.get(name, name), self._size(name)
        options = {} if size is None else {"img_size": size}
        if self._checkpoint is not None:
            options["num_classes"] = head_size(self._shapes, _pretrained_cfg(full).get("classifier") or "")
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
            return f"{describe_weights(self._checkpoint)}{at}"
        if not self._pretrained:
            return f"random, seed {RANDOM_SEED}{at}"
        full = PAPER_BACKBONES.get(name, name)
        return f"timm {_pretrained_cfg(full)['architecture']}.{_pretrained_cfg(full)['tag']}{at}"


class MiniModels:
    """The mini zoo's models.

    Args:
        pretrained: the zoo's checkpoints; else random weights of RANDOM_SEED.
        checkpoint: weights from this file instead.
        hard: with a real ViT's channel spread (mini-hard).
    """

    def __init__(self, pretrained: bool = True, checkpoint: Path | None = None, hard: bool = False) -> None:
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
        if self._checkpoint is not None:
            model = zoo.build(name)
            fill(model, read_checkpoint(self._checkpoint), self._checkpoint)
        else:
            model = zoo.load(name) if self._pretrained else zoo.build(name, seed=RANDOM_SEED)
        return hard.harden(model, seed=0) if self._hard else model

    def config(self, name: str) -> DataConfig:
        """See `Models`."""
        return resolve_data_config(pretrained_cfg=self.architecture(name).pretrained_cfg)

    def weights(self, name: str) -> str:
        """See `Models`."""
        from tasks.mini import zoo

        if self._checkpoint is None and not self._pretrained:
            return f"random, seed {RANDOM_SEED}"
        return describe_weights(self._checkpoint or zoo.checkpoint_path(name))


@cache
def _pretrained_cfg(full: str) -> dict:
    cfg = timm.get_pretrained_cfg(full)
    return {} if cfg is None else cfg.to_dict()
