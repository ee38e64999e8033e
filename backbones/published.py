"""Published top-1 of our models' official weights and of models of timm that they are compared with, on ImageNet-1k.

The one place of these figures: `foveate list`, `foveate bench`, docs/models.md, the README and the headers of recipes
show them or are tested against them. None of them was measured with this package.
"""

from dataclasses import dataclass

from timm.models import PretrainedCfg, get_pretrained_cfg

AGENT = "arXiv:2312.08874, official repository"
DINAT = "arXiv:2209.15001, official repository"
HALO = "timm's results"
SWIN = "arXiv:2103.14030, official repository"

# Source, px, top-1 in %; names as timm has them, with the tag of the weights unless no weights can be downloaded.
_TABLES: tuple[tuple[str, int, dict[str, float]], ...] = (
    ("arXiv:2202.09741", 224, {"van_b0.in1k": 75.4, "van_b1.in1k": 81.1, "van_b2.in1k": 82.8, "van_b3.in1k": 83.9}),
    ("OpenMMLab's evaluation of the authors' weights", 224, {"van_b4": 84.1}),
    (
        "arXiv:2204.07143, official repository",
        224,
        {"nat_mini.in1k": 81.8, "nat_tiny.in1k": 83.2, "nat_small.in1k": 83.7, "nat_base.in1k": 84.3},
    ),
    (
        DINAT,
        224,
        {
            **{"dinat_mini.in1k": 81.8, "dinat_tiny.in1k": 82.7, "dinat_small.in1k": 83.8, "dinat_base.in1k": 84.4},
            **{"dinat_large.in22k_ft_in1k": 86.6, "dinat_s_large.in22k_ft_in1k": 86.5},
            **{"dinat_s_tiny.in1k": 81.8, "dinat_s_small.in1k": 83.5, "dinat_s_base.in1k": 83.8},
            **{"nat_isotropic_small.in1k": 80.0, "nat_isotropic_base.in1k": 81.6},
            **{"dinat_isotropic_small.in1k": 80.8, "dinat_isotropic_base.in1k": 82.1},
            **{"vitrpb_small.in1k": 81.2, "vitrpb_base.in1k": 82.5},
        },
    ),
    (
        DINAT,
        384,
        {
            "dinat_large_384.in22k_ft_in1k": 87.4,
            "dinat_large_384_11x11.in22k_ft_in1k": 87.5,
            "dinat_s_large_384.in22k_ft_in1k": 87.4,
        },
    ),
    (
        "arXiv:2303.08810, official repository",
        224,
        {
            **{"biformer_tiny": 81.4, "biformer_small": 83.8, "biformer_base": 84.3},
            **{"biformer_stl": 82.7, "biformer_stl_nchw": 82.7},
        },
    ),
    ("arXiv:2205.13213", 224, {"litv2_small.in1k": 82.0, "litv2_medium.in1k": 83.3, "litv2_base.in1k": 83.6}),
    ("arXiv:2205.13213", 384, {"litv2_base.in1k_384": 84.7}),
    (
        "arXiv:2204.03645, official repository",
        224,
        {"fv_davit_tiny.msft_in1k": 82.8, "fv_davit_small.msft_in1k": 84.2, "fv_davit_base.msft_in1k": 84.6},
    ),
    (
        HALO,
        256,
        {
            **{"fv_halonet26t.a1h_in1k": 79.134, "fv_halonet50ts.a1h_in1k": 81.640},
            **{"fv_sehalonet33ts.ra2_in1k": 80.976, "fv_eca_halonext26ts.c1_in1k": 79.518},
        },
    ),
    (HALO, 224, {"fv_haloregnetz_b.ra3_in1k": 81.058}),
    (
        "arXiv:1910.03151, official repository",
        224,
        {
            **{"eca_resnet18.in1k": 70.92, "eca_resnet34.in1k": 74.21, "eca_resnet50.in1k": 77.42},
            **{"eca_resnet101.in1k": 78.65, "eca_resnet152.in1k": 78.92, "eca_mobilenet_v2.in1k": 72.56},
        },
    ),
    (
        AGENT,
        224,
        {
            **{"agent_deit_tiny.in1k": 74.9, "agent_deit_small.in1k": 80.5, "agent_deit_base.in1k": 82.0},
            **{"agent_pvt_tiny.in1k": 78.4, "agent_pvt_small.in1k": 82.2, "agent_pvt_medium.in1k": 83.4},
            **{"agent_pvt_large.in1k": 83.7, "agent_swin_tiny.in1k": 82.6, "agent_swin_small.in1k": 83.7},
            **{"agent_swin_base.in1k": 84.0, "agent_cswin_tiny.in1k": 83.1, "agent_cswin_small.in1k": 83.9},
            "agent_cswin_base.in1k": 84.7,
        },
    ),
    (AGENT, 256, {"agent_pvt_medium.in1k_256": 83.8}),
    (AGENT, 288, {"agent_swin_small.in1k_288": 84.1}),
    (AGENT, 384, {"agent_swin_base.in1k_384": 84.9, "agent_cswin_base.in1k_384": 85.8}),
    (AGENT, 448, {"agent_deit_small.in1k_448": 83.1}),
    ("arXiv:2202.06258", 224, {"flowformer_cv": 80.6}),
    (
        "arXiv:2410.11842",
        224,
        {
            **{"moh_transnext_small_75": 84.6, "moh_transnext_small_80": 84.7},
            **{"moh_transnext_base_50": 84.7, "moh_transnext_base_75": 84.9},
        },
    ),
    ("arXiv:2006.15102", 224, {"ulsam_mobilenetv1": 70.6, "ulsam_mobilenetv2": 71.5}),
    # models of timm
    ("arXiv:2110.00476", 224, {"resnet50.a1_in1k": 80.4}),
    (HALO, 224, {"resnet50.tv_in1k": 76.13, "resnet50.a1h_in1k": 80.676, "resnet50.tv2_in1k": 80.85}),
    (
        "arXiv:2012.12877, timm's results",
        224,
        {
            "deit_tiny_patch16_224.fb_in1k": 72.172,
            "deit_small_patch16_224.fb_in1k": 79.844,
            "deit_base_patch16_224.fb_in1k": 81.992,
        },
    ),
    (
        SWIN,
        224,
        {
            "swin_tiny_patch4_window7_224.ms_in1k": 81.2,
            "swin_small_patch4_window7_224.ms_in1k": 83.2,
            "swin_base_patch4_window7_224.ms_in1k": 83.5,
        },
    ),
    ("arXiv:2201.03545", 224, {"convnext_tiny.fb_in1k": 82.1}),
    (
        "arXiv:2204.03645, official repository",
        224,
        {"davit_tiny.msft_in1k": 82.8, "davit_small.msft_in1k": 84.2, "davit_base.msft_in1k": 84.6},
    ),
    (HALO, 256, {"halonet26t.a1h_in1k": 79.134, "halonet50ts.a1h_in1k": 81.640, "sehalonet33ts.ra2_in1k": 80.976}),
)

FILE_ONLY = ("agent_", "biformer_", "eca_", "flowformer_", "moh_")  # official weights without a link to the file
OTHERS_LOAD = {  # families without official weights, and weights of timm that load
    "gqa_vit_": "vit_*_patch16_224",
    "quantizable_vit_": "vit_*_patch16_224",
    "sparsifiner_deit_": "deit_*_patch16_224",
}


@dataclass(frozen=True)
class Published:
    """Top-1 of one set of weights, as published."""

    weights: str  # name and tag
    top1: float  # %
    px: int  # height and width at which it was measured
    source: str


TOP1: dict[str, Published] = {
    name: Published(name, top1, px, source) for source, px, table in _TABLES for name, top1 in table.items()
}


def published_top1(name: str, px: int) -> Published | None:
    """Return the published accuracy of a model at an image size, or None.

    Args:
        name: a timm name. Without a tag, the default weights count first, then any other weights of the model.
        px: height and width of the images.
    """
    model, _, tag = name.partition(".")
    if not tag and (cfg := get_pretrained_cfg(model)) is not None and cfg.tag:
        name = full_name(cfg)
    keys = [name] if tag else [name, model, *(key for key in TOP1 if key.partition(".")[0] == model)]
    return next((TOP1[key] for key in keys if key in TOP1 and TOP1[key].px == px), None)


def full_name(cfg: PretrainedCfg) -> str:
    """Return the name of weights as this module lists them: without the tag where timm has no weights but a model."""
    return f"{cfg.architecture}" if cfg.tag in (None, "", "untrained") else f"{cfg.architecture}.{cfg.tag}"
