"""Calibration: data through the model once, a store of activations, and quantizers set from what passes.

`fisher` captures every layer's inputs, outputs and squared gradients; `scale_search` chooses scales by them.
"""

from iasvit.calibration.budget import forward_need, images_share, learning_need, nbytes, network_need, share_of
from iasvit.calibration.observe import (
    calibrate_in_sequence,
    calibrate_in_stream,
    calibrate_inputs,
    calibrate_weights,
    enabled,
    run_all,
)
from iasvit.calibration.store import (
    ActivationStore,
    Collector,
    Store,
    TupleStore,
    calibration_store,
    default_memory_budget,
    first_images,
    looked_at,
    tensors,
)

__all__ = [
    "ActivationStore",
    "Collector",
    "Store",
    "TupleStore",
    "calibrate_in_sequence",
    "calibrate_in_stream",
    "calibrate_inputs",
    "calibrate_weights",
    "calibration_store",
    "default_memory_budget",
    "enabled",
    "first_images",
    "forward_need",
    "images_share",
    "learning_need",
    "looked_at",
    "nbytes",
    "network_need",
    "run_all",
    "share_of",
    "tensors",
]
