"""The ordered tuple of all features: position is the order in every phase."""

from training.features.asym_verify import AsymVerifyFeature
from training.features.base import Feature
from training.features.c3o_credit import C3oCreditFeature
from training.features.causal_replay import CausalReplayFeature
from training.features.curriculum import CurriculumFeature
from training.features.diff_mla import DiffMlaFeature
from training.features.ema import EmaFeature
from training.features.fractal_nas import FractalNasFeature
from training.features.hydra_v21 import HydraFeature
from training.features.instant import InstantFeature
from training.features.reweighting import AdaptiveSourcesFeature
from training.features.rl_auto_mix import RlAutoMixFeature
from training.features.self_evolve import SelfEvolveFeature
from training.features.self_improver import SelfImproverFeature
from training.features.sigma_rl import SigmaRLFeature
from training.features.uroboros import UroborosFeature
from training.features.verifier import VerifierFeature
from training.features.verifier_cascade import VerifierCascadeFeature

FEATURES: tuple[type[Feature], ...] = (
    InstantFeature,
    AdaptiveSourcesFeature,
    C3oCreditFeature,  # looks at the language model's step, so before RL takes one
    SigmaRLFeature,
    VerifierFeature,
    VerifierCascadeFeature,
    AsymVerifyFeature,
    RlAutoMixFeature,
    HydraFeature,
    SelfImproverFeature,
    UroborosFeature,
    SelfEvolveFeature,  # changes at boundaries, which the two before make
    CurriculumFeature,
    CausalReplayFeature,  # into rows as the curriculum leaves them; sees what RL made of the step
    DiffMlaFeature,
    FractalNasFeature,
    EmaFeature,  # averages the weights as the step leaves them
)
