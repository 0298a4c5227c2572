"""How the mini models are trained: AdamW, linear warm-up, cosine to 0; no decay on norms, biases and embeddings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """What both kinds of recipe have; the values are a detector's."""

    lr: float = 1e-3
    weight_decay: float = 0.05
    batch_size: int = 16  # of all processes together
    warmup: float = 0.03  # fraction of the run
    clip: float = 5.0  # gradient norm
    flip: bool = True  # mirrored images and, for detectors, turned ones: no class becomes another by that


@dataclass(frozen=True)
class BackboneRecipe(Recipe):
    """How one backbone is trained.

    Real backbones' post-LayerNorm channels differ in range by factors of 2 to 12; a high learning rate kept up for
    long, and LayerNorm weights free of decay, is what grows such channels here.
    """

    lr: float = 1.5e-3
    batch_size: int = 256
    warmup: float = 0.05
    label_smoothing: float = 0.05
    clip: float = 1.0
    beta2: float = 0.99
    shift: int = 4  # random translation, pixels either way, edges reflected
    jitter: float = 0.2  # brightness, contrast and colour gains, relative
    seed: int = 0  # added to --seed, so that vit_s and deit_s part ways


BACKBONE_RECIPES: dict[str, BackboneRecipe] = {
    # The ViT recipe is AugReg's in small: less augmentation, more decay, plain labels.
    "vit_s": BackboneRecipe(lr=1.0e-3, weight_decay=0.2, label_smoothing=0.0, shift=2, jitter=0.1, seed=100),
    "vit_b": BackboneRecipe(lr=8e-4, weight_decay=0.2, label_smoothing=0.0, shift=2, jitter=0.1, seed=100),
    "deit_t": BackboneRecipe(lr=1.5e-3),
    "deit_s": BackboneRecipe(lr=1.2e-3),
    "deit_b": BackboneRecipe(lr=1.0e-3),
    "swin_t": BackboneRecipe(lr=1.2e-3),
    "swin_s": BackboneRecipe(lr=1.0e-3),
    "swin_b": BackboneRecipe(lr=1.0e-3),
}
