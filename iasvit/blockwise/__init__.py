"""Block reconstruction from parts: one core for the methods since BRECQ, each of which is a choice of these.

`parts` stand in a quantizer's place while a block is learnt (AdaRound, learnt scales, QDrop), `losses` say what its
outputs are compared by, `initialise` sets the quantizers before, `core` learns one block, `method`
a network.
"""

from iasvit.blockwise.core import Settings, reconstruct
from iasvit.blockwise.detector_loss import DetectorSuffix
from iasvit.blockwise.initialise import INITIALISATIONS, per_token
from iasvit.blockwise.losses import (
    Divergence,
    Fisher,
    FrozenSuffix,
    LeastSquaresHessian,
    Loss,
    LowRankFisher,
    MeanSquare,
    PerturbationHessian,
    mlp_weights,
)
from iasvit.blockwise.method import ROUNDING_RECIPES, BlockRecipe, BlockReconstruction
from iasvit.blockwise.parts import AdaRound, Dropped, LearntScale, learning
from iasvit.blockwise.teacher import Teacher

__all__ = [
    "INITIALISATIONS",
    "ROUNDING_RECIPES",
    "AdaRound",
    "BlockRecipe",
    "BlockReconstruction",
    "DetectorSuffix",
    "Divergence",
    "Dropped",
    "Fisher",
    "FrozenSuffix",
    "LearntScale",
    "LeastSquaresHessian",
    "Loss",
    "LowRankFisher",
    "MeanSquare",
    "PerturbationHessian",
    "Settings",
    "Teacher",
    "learning",
    "mlp_weights",
    "per_token",
    "reconstruct",
]
