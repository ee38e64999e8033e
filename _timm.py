"""The private names of timm that this package needs, in one place: what a new timm release can move."""

from timm.models._efficientnet_builder import decode_arch_def
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._input import update_model_args

__all__ = ["FeatureGetterNet", "decode_arch_def", "feature_take_indices", "update_model_args"]
