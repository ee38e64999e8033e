"""What attention does in a model: the probabilities of every layer, profiles and importance of its heads, pictures."""

from .cam import grad_cam
from .drawing import draw_profiles, draw_views, write_figure
from .importance import HeadEffect, head_effects
from .look import layer_views
from .maps import AttentionMap, attention_maps
from .page import write_page
from .profiles import HeadProfile, Profile, head_profiles, profile
from .rollout import attention_rollout
from .views import AttentionView, GateView, Grid

__all__ = [
    "AttentionMap",
    "AttentionView",
    "GateView",
    "Grid",
    "HeadEffect",
    "HeadProfile",
    "Profile",
    "attention_maps",
    "attention_rollout",
    "draw_profiles",
    "draw_views",
    "grad_cam",
    "head_effects",
    "head_profiles",
    "layer_views",
    "profile",
    "write_figure",
    "write_page",
]
