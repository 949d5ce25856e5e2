"""The ordered tuple of all features: position is the order in every phase."""

from training.features.base import Feature
from training.features.c3o_credit import C3oCreditFeature
from training.features.curriculum import CurriculumFeature
from training.features.diff_mla import DiffMlaFeature
from training.features.ema import EmaFeature
from training.features.instant import InstantFeature
from training.features.reweighting import AdaptiveSourcesFeature

FEATURES: tuple[type[Feature], ...] = (
    InstantFeature,
    AdaptiveSourcesFeature,
    C3oCreditFeature,
    CurriculumFeature,
    DiffMlaFeature,
    EmaFeature,
)
