"""The mini backbones: timm's own classes with the paper backbones' depth, heads and window shifts, and fewer channels.

Images are 56×56, so that a plain ViT with 4×4 patches sees the 197 tokens that the real one sees, and a Swin with 2×2
patches has maps of 28, 14, 7 and 4 and windows of 49 tokens. Checkpoints hold fp16 and are loaded as fp32: what is
evaluated is what is stored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from iasvit.errors import IasvitError
from iasvit.files import replacing

IMAGE_SIZE = 56
NUM_CLASSES = 16  # len(scenes.CLASSES); stated here so that a model builds without the renderer
MAX_BYTES = 3_000_000  # of one checkpoint
CHECKPOINTS = Path(__file__).parent / "checkpoints"

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # timm's ViT weights
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # timm's DeiT and Swin weights


@dataclass(frozen=True)
class Backbone:
    """One mini backbone: `counterpart` is the timm model whose depth, heads and shifts it keeps."""

    counterpart: str
    embed_dim: int
    depth: int | tuple[int, ...]
    num_heads: int | tuple[int, ...]
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]


# Swin's widths are what 3 MB allow; stage 3 of 6 blocks or of 18 holds most of the weights.
MINI_BACKBONES: dict[str, Backbone] = {
    "vit_s": Backbone("vit_small_patch16_224", 72, 12, 6, HALF),
    "vit_b": Backbone("vit_base_patch16_224", 96, 12, 12, HALF),
    "deit_t": Backbone("deit_tiny_patch16_224", 48, 12, 3, IMAGENET),
    "deit_s": Backbone("deit_small_patch16_224", 72, 12, 6, IMAGENET),
    "deit_b": Backbone("deit_base_patch16_224", 96, 12, 12, IMAGENET),
    "swin_t": Backbone("swin_tiny_patch4_window7_224", 21, (2, 2, 6, 2), (3, 6, 12, 24), IMAGENET),
    "swin_s": Backbone("swin_small_patch4_window7_224", 15, (2, 2, 18, 2), (3, 6, 12, 24), IMAGENET),
    "swin_b": Backbone("swin_base_patch4_window7_224", 16, (2, 2, 18, 2), (4, 8, 16, 32), IMAGENET),
}


def _backbone(name: str) -> Backbone:
    if name not in MINI_BACKBONES:
        raise IasvitError(f"mini backbone {name!r} does not exist; there are {', '.join(MINI_BACKBONES)}")
    return MINI_BACKBONES[name]


def build(name: str, seed: int = 0) -> nn.Module:
    """An untrained mini backbone (fp32, eval()), with `pretrained_cfg` set for timm's `resolve_data_config`.

    Args:
        name: a key of MINI_BACKBONES.
        seed: of timm's weight initialisation; the global random state is left as it was.

    Raises:
        IasvitError: no such backbone.
    """
    backbone = _backbone(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(backbone.depth, int):
            model: nn.Module = VisionTransformer(
                img_size=IMAGE_SIZE,
                patch_size=4,
                embed_dim=backbone.embed_dim,
                depth=backbone.depth,
                num_heads=backbone.num_heads,
                num_classes=NUM_CLASSES,
            )
        else:
            model = SwinTransformer(
                img_size=IMAGE_SIZE,
                patch_size=2,
                embed_dim=backbone.embed_dim,
                depths=backbone.depth,
                num_heads=backbone.num_heads,
                num_classes=NUM_CLASSES,
                drop_path_rate=0.0,
            )
            # On a 7×7 map timm would drop the shift of a 7×7 window. The real backbones shift in stages 1 to 3 (their
            # third map is 14×14), so stage 3 keeps shift and mask here; stage 4 has one unshifted window, as theirs.
            model.layers[2].set_input_size(model.layers[2].input_resolution, window_size=(7, 7), always_partition=True)
            for block in model.layers[3].blocks:  # before version 1.0.30 timm took this padded map for 3×3
                block.set_input_size((4, 4), window_size=(4, 4))
    mean, std = backbone.normalisation
    model.pretrained_cfg = model.default_cfg = {
        "architecture": backbone.counterpart,
        "tag": "mini",
        "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
        "fixed_input_size": True,
        "num_classes": NUM_CLASSES,
        "mean": mean,
        "std": std,
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head" if isinstance(backbone.depth, int) else "head.fc",
    }
    return model.eval()


def as_stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state that a checkpoint of this model holds: fp16, contiguous, on the CPU."""
    return {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in model.state_dict().items()}


def save(model: nn.Module, path: Path, metadata: dict[str, Any]) -> None:
    """Write the model's weights as fp16 safetensors, beside `path` first and then in its place.

    `metadata` is stored as one JSON text: several entries would come in an order that changes from run to run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(as_stored(model), temporary, {"training": json.dumps(metadata, sort_keys=True)})


def checkpoint_path(name: str, folder: Path | None = None) -> Path:
    """Where the checkpoint of that backbone or detector lies, there or not."""
    return (folder or CHECKPOINTS) / f"{name}.safetensors"


def read_metadata(name: str, folder: Path | None = None) -> dict[str, Any]:
    """What the training script wrote into a backbone's or detector's checkpoint: accuracy, steps, seed, recipe.

    Raises:
        IasvitError: there is no checkpoint of that name, or it is none.
    """
    return json.loads(_read(checkpoint_path(name, folder))[1].get("training", "{}"))


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if not path.is_file():
        found = ", ".join(sorted(file.stem for file in path.parent.glob("*.safetensors"))) or "none"
        raise IasvitError(
            f"checkpoint {path} does not exist; checkpoints there: {found}; "
            f"`python -m tasks.studies.train --backbone {path.stem}` makes it"
        )
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return state, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise IasvitError(f"checkpoint {path} is not a readable safetensors file: {error}") from None


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Fill the model with a checkpoint's weights, as fp32; returns it.

    Raises:
        IasvitError: no such file, no safetensors file, or keys or shapes that do not fit (named).
    """
    stored, _ = _read(path)
    wanted = model.state_dict()
    faults = [f"{key} is missing" for key in wanted if key not in stored]
    faults += [f"{key} is not in the model" for key in stored if key not in wanted]
    faults += [
        f"{key} has shape {tuple(stored[key].shape)} for {tuple(wanted[key].shape)}"
        for key in wanted
        if key in stored and stored[key].shape != wanted[key].shape
    ]
    if faults:
        more = f" and {len(faults) - 6} more" if len(faults) > 6 else ""
        raise IasvitError(f"checkpoint {path} does not fit the model: {'; '.join(faults[:6])}{more}")
    model.load_state_dict({key: value.float() for key, value in stored.items()})
    return model


def load(name: str, folder: Path | None = None) -> nn.Module:
    """A trained mini backbone (fp32, eval(), on the CPU).

    Args:
        name: a key of MINI_BACKBONES.
        folder: of the checkpoints; the repository's own unless given.

    Raises:
        IasvitError: no such backbone, no checkpoint of it, or one that does not fit.
    """
    return load_weights(build(name), checkpoint_path(name, folder))
