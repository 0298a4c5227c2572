"""timm's AdamW and its cosine schedule, over a run from 0 to 1."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from tasks.studies.training.recipes import Recipe


def make_optimizer(model: nn.Module, recipe: Recipe, **options: Any) -> torch.optim.Optimizer:
    """AdamW; neither norms and biases decay, nor what the model spares (embeddings), nor position biases."""
    spared = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    spared |= {name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")}
    groups = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=spared)
    return create_optimizer_v2(groups, "adamw", lr=recipe.lr, weight_decay=recipe.weight_decay, **options)


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe) -> CosineLRScheduler:
    """Linear warm-up over the first `recipe.warmup` of the run, then cosine to 0.

    `step_update(progress)` sets the optimizer's learning rate; progress is the run's, from 0 to 1.
    """
    return CosineLRScheduler(
        optimizer,
        t_initial=1 - recipe.warmup,
        warmup_t=recipe.warmup,
        warmup_lr_init=1e-3 * recipe.lr / recipe.warmup,
        warmup_prefix=True,
        t_in_epochs=False,
    )
