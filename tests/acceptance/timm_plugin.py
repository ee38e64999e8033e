"""A pytest plugin that shows timm's tests foveate's models, and nothing else.

timm's tests choose models with `list_models(filter, module, exclude_filters, ...)`, by timm's own family and module
names. Ours are in none of those lists, so the choice is made again here: module names are ignored, and the list of
names without a fixed feature map (`NON_STD_FILTERS`) stands for those of ours that declare no pool_size. Tests that
download published weights (`pretrained=True`) are shown no name, as in timm's own CI: they ask for hundreds of MB.
"""

import os
from collections.abc import Iterable
from fnmatch import fnmatch

import pytest
import timm
from timm.models import get_arch_name, get_pretrained_cfg

import foveate

PATTERNS = os.environ["FOVEATE_ACCEPTANCE_MODELS"].split()
A_NON_STANDARD_NAME = "vit_*"  # a member of timm's NON_STD_FILTERS
OURS = set(foveate.list_models())
_list_all = timm.list_models


def is_ours(name: str) -> bool:
    arch = get_arch_name(name)
    return arch in OURS and any(fnmatch(arch, pattern) for pattern in PATTERNS)


def is_non_standard(name: str) -> bool:
    return get_pretrained_cfg(name).pool_size is None


def list_models(
    filter: str | Iterable[str] = "",
    module: str | Iterable[str] = "",
    pretrained: bool = False,
    exclude_filters: str | Iterable[str] = "",
    name_matches_cfg: bool = False,
    include_tags: bool | None = None,
) -> list[str]:
    """Stand in for timm.list_models: the same arguments, our models."""
    if pretrained:
        return []
    non_standard_only, standard_only = (A_NON_STANDARD_NAME in names for names in (filter, exclude_filters))
    if non_standard_only:
        filter = ""
    found = _list_all(filter, "", False, exclude_filters, name_matches_cfg, include_tags)
    ours = [name for name in found if is_ours(name)]
    if non_standard_only or standard_only:
        ours = [name for name in ours if is_non_standard(name) == non_standard_only]
    return ours


def list_pretrained(filter: str | Iterable[str] = "", exclude_filters: str | Iterable[str] = "") -> list[str]:
    """Stand in for timm.list_pretrained."""
    return list_models(filter, pretrained=True, exclude_filters=exclude_filters, include_tags=True)


for namespace in (timm, timm.models):
    namespace.list_models, namespace.list_pretrained = list_models, list_pretrained


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that were handed one of our models; the others are about timm's own."""
    about_ours = [_is_about_ours(item) for item in items]
    config.hook.pytest_deselected(items=[item for item, ours in zip(items, about_ours, strict=True) if not ours])
    items[:] = [item for item, ours in zip(items, about_ours, strict=True) if ours]


def _is_about_ours(item: pytest.Item) -> bool:
    name = getattr(item, "callspec", None) and item.callspec.params.get("model_name")
    return isinstance(name, str) and timm.is_model(name) and is_ours(name)
