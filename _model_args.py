"""Which arguments a model's name may be given by text or by a file."""

from collections.abc import Mapping
from typing import Any

from ._errors import RequestError

# Arguments of timm's factory that read other files, load less strictly, or return something else than a classifier.
FACTORY_ARGS = frozenset(
    "name model_name checkpoint checkpoint_path cache_dir pretrained pretrained_cfg pretrained_cfg_overlay "
    "pretrained_strict pretrained_filter_fn pretrained_model_args model_cfg feature_cfg kwargs_filter scriptable "
    "exportable no_jit".split()
)
FEATURE_ARGS = frozenset(("features_only", "out_indices", "feature_cls"))


def check_model_args(arguments: Mapping[str, Any], where: str) -> None:
    """Refuse arguments of timm's factory, which are not the model's own.

    Raises:
        RequestError: one of them is given; the message begins with `where`.
    """
    if taken := sorted(FACTORY_ARGS & set(arguments)):
        raise RequestError(f"{where}: {taken[0]} is an argument of timm's loader, not of a model")
