"""The families. Importing this package registers all of their models with timm."""

import timm

from . import (
    agent_cswin,
    agent_deit,
    agent_pvt,
    agent_swin,
    biformer,
    dcal,
    dependencyvit,
    dinat,
    eca_net,
    ela_net,
    flowformer,
    fv_davit,
    fv_halonet,
    gqa_vit,
    litv2,
    mixer_vit,
    moh_transnext,
    narrowed,
    nat,
    nat_isotropic,
    ninformer,
    pooled,
    quantizable_vit,
    sparsifiner,
    ulsam_net,
    van,
)
from .pooled import pool_with as pool_with

OURS = (nat, dinat, nat_isotropic, van, fv_davit, fv_halonet, eca_net, ela_net, biformer, litv2)
FAMILIES = (
    *OURS,
    *(agent_deit, agent_pvt, agent_swin, agent_cswin, flowformer, moh_transnext, mixer_vit),
    *(quantizable_vit, sparsifiner, dependencyvit, gqa_vit, ulsam_net, ninformer),
)
BUILDERS = (narrowed, dcal, pooled)  # registered names that are no models of their own


def list_models(pattern: str | list[str] = "") -> list[str]:
    """Return the names of our models, those that match the wildcard(s) `pattern` if given."""
    ours = {name for family in FAMILIES for name in family.__all__}
    return [name for name in timm.list_models(pattern) if name in ours]
