"""What attention does in a model: the probabilities of every layer, profiles and importance of its heads."""

from .importance import HeadEffect, head_effects
from .maps import AttentionMap, attention_maps
from .profiles import HeadProfile, Profile, head_profiles, profile

__all__ = [
    "AttentionMap",
    "HeadEffect",
    "HeadProfile",
    "Profile",
    "attention_maps",
    "head_effects",
    "head_profiles",
    "profile",
]
