"""Official files load strictly, in any wrapper; other files are refused."""

from argparse import Namespace

import pytest
import timm
import torch

import foveate  # noqa: F401  (registers the models)

SMALL_NAT = {"dims": (32, 64), "depths": (1, 2), "kernel_size": 3}
SMALL_VAN = {"dims": (8, 16), "depths": (1, 1), "mlp_ratios": (2, 2)}
SMALL_BIFORMER = {"dims": (16, 32), "depths": (1, 1), "topks": (2, None), "head_dim": 8, "regions": 3}
SMALL_LITV2 = {"dims": (16, 32), "depths": (1, 1), "windows": (None, 2), "head_dim": 8}
SMALL_DAVIT = {"dims": (16, 32), "depths": (1, 1), "head_dim": 8, "window_size": 3}
SMALL_AGENT = {"dims": (16, 32), "depths": (1, 1), "heads": (2, 4), "agent_num": (4, 4), "img_size": 32}
SMALL_AGENT |= {"attn_type": "AB"}
SMALL_DEIT = {"dim": 16, "depth": 2, "heads": 2, "patch_size": 8, "agent_num": (4,) * 4, "img_size": 32}
SMALL_PVT = {**SMALL_AGENT, "mlp_ratios": (2, 2), "agent_sr_ratios": "21", "sr_ratios": "21"}
SMALL_HALONET = {"depths": (1, 1, 1, 1), "block_size": 4, "halo": 1}
SMALL_MOH = {"dims": (16, 32), "depths": (1, 1), "heads": (2, 4), "shared": (2, 1), "routed": (0, 2)}
SMALL_MOH |= {"mlp_ratios": (2, 2), "sr_ratios": (4, 1)}
SMALL_VIT = {"patch_size": 8, "img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
FAMILIES = {
    "nat_mini": (SMALL_NAT, "stages.1.downsample.reduction.weight", "levels.0.downsample.reduction.weight"),
    "van_b0": (SMALL_VAN, "stages.1.downsample.proj.weight", "patch_embed2.proj.weight"),
    "biformer_tiny": (SMALL_BIFORMER, "stages.1.blocks.0.mlp.fc2.weight", "stages.1.0.mlp.3.weight"),
    "biformer_stl_nchw": (SMALL_BIFORMER, "stages.0.blocks.0.attn.qkv.bias", "stages.0.blocks.0.attn.qkv_linear.bias"),
    "litv2_small": (SMALL_LITV2, "stages.1.downsample.norm.weight", "layers.0.downsample.norm_layer.weight"),
    "fv_davit_tiny": (SMALL_DAVIT, "stages.1.downsample.conv.weight", "patch_embeds.1.proj.weight"),
    "fv_halonet_h0": (SMALL_HALONET, "stages.1.0.self_attn.kv.weight", "stages.1.0.self_attn.kv.weight"),
    "agent_deit_tiny": (SMALL_DEIT, "blocks.1.attn.ac_bias", "blocks.1.attn.qkv.weight"),
    "agent_pvt_tiny": (SMALL_PVT, "stages.1.downsample.patch_embed.proj.weight", "patch_embed2.proj.weight"),
    "agent_swin_tiny": (SMALL_AGENT, "stages.0.blocks.0.attn.an_bias", "layers.0.downsample.reduction.weight"),
    "agent_cswin_tiny": (SMALL_AGENT | {"split_size": "22"}, "stages.1.downsample.conv.weight", "merge1.conv.weight"),
    "eca_resnet18": ({"depths": (1,) * 4}, "layer2.0.se.conv.weight", "layer2.0.bn1.weight"),
    "eca_mobilenet_v2": ({"depths": (1,) * 7}, "blocks.2.0.conv_dw.weight", "features.3.conv.1.0.weight"),
    "ela_resnet18_b": ({"depths": (1,) * 4}, "layer2.0.se.conv.weight", "layer2.0.se.conv.weight"),
    "moh_transnext_small_75": (SMALL_MOH, "stages.1.blocks.0.attn.wg.weight", "block2.0.attn.wg.weight"),
    "ela_mobilenet_v2_l": ({"depths": (1,) * 7}, "blocks.2.0.se.norm.weight", "blocks.2.0.se.norm.weight"),
    "quantizable_vit_tiny": ({**SMALL_VIT, "gate": "linear"}, "blocks.1.norm1.bias", "blocks.1.norm1.bias"),
    "sparsifiner_deit_tiny": (SMALL_VIT, "blocks.1.norm1.bias", "blocks.1.norm1.bias"),
    "dependencyvit_tiny": (SMALL_VIT, "blocks.1.norm1.bias", "blocks.1.norm1.bias"),
}
every_family = pytest.mark.parametrize("name", FAMILIES)

MOBILENET_BLOCK = {"conv_pw.": "0.0.", "bn1.": "0.1.", "conv_dw.": "1.0.", "bn2.": "1.1.", "conv_pwl.": "2."}
MOBILENET_BLOCK |= {"bn3.norm.": "3.", "bn3.eca.": "4."}
MOBILENET_FIRST = {"conv_dw.": "0.0.", "bn1.": "0.1.", "conv_pw.": "1.", "bn2.norm.": "2.", "bn2.eca.": "3."}


RENAMES = {  # ours to the authors', in order, once each: the filters' inverse, by hand
    "nat_mini": [
        ("stages.1.downsample.", "levels.0.downsample."),
        ("stages.", "levels."),
        ("stem.", "patch_embed."),
        ("head.fc.", "head."),
    ],
    "van_b0": [
        ("stages.1.downsample.", "patch_embed2."),
        ("stages.0.blocks.", "block1."),
        ("stages.1.blocks.", "block2."),
        ("stages.0.norm.", "norm1."),
        ("stages.1.norm.", "norm2."),
        (".dwconv.", ".dwconv.dwconv."),
        ("stem.", "patch_embed1."),
        ("head.fc.", "head."),
    ],
    "biformer_tiny": [
        ("stages.1.downsample.", "downsample_layers.1."),
        ("stem.", "downsample_layers.0."),
        ("stages.0.blocks.", "stages.0."),
        ("stages.1.blocks.", "stages.1."),
        ("stages.0.0.attn.qkv.", "stages.0.0.attn.qkv.qkv."),
        ("stages.0.0.attn.proj.", "stages.0.0.attn.wo."),
        (".mlp.fc1.", ".mlp.0."),
        (".mlp.fc2.", ".mlp.3."),
        ("head.fc.", "head."),
    ],
    "biformer_stl_nchw": [
        ("stages.1.downsample.", "downsample_layers.1."),
        ("stem.", "downsample_layers.0."),
        ("stages.0.blocks.0.attn.qkv.", "stages.0.blocks.0.attn.qkv_linear."),
        ("stages.0.blocks.0.attn.proj.", "stages.0.blocks.0.attn.output_linear."),
        (".mlp.fc1.", ".mlp.0."),
        (".mlp.fc2.", ".mlp.2."),
        ("head.fc.", "head."),
    ],
    "litv2_small": [
        ("stages.1.downsample.norm.", "layers.0.downsample.norm_layer."),
        ("stages.1.downsample.", "layers.0.downsample."),
        ("stages.", "layers."),
        (".dwconv.", ".dwconv.dwconv."),
        ("stem.", "patch_embed."),
        ("head.fc.", "head."),
    ],
    "fv_davit_tiny": [
        ("stem.conv.", "patch_embeds.0.proj."),
        ("stem.norm.", "patch_embeds.0.norm."),
        ("stages.1.downsample.conv.", "patch_embeds.1.proj."),
        ("stages.1.downsample.norm.", "patch_embeds.1.norm."),
        ("stages.0.blocks.", "main_blocks.0."),
        ("stages.1.blocks.", "main_blocks.1."),
        (".cpe1.", ".cpe.0."),
        (".cpe2.", ".cpe.1."),
        ("head.norm.", "norms."),
        ("head.fc.", "head."),
    ],
    "agent_deit_tiny": [("stem.", ""), ("head.fc.", "head.")],
    "agent_pvt_tiny": [
        ("stem.pos_embed", "pos_embed1"),
        ("stages.1.downsample.pos_embed", "pos_embed2"),
        ("stem.patch_embed.", "patch_embed1."),
        ("stages.1.downsample.patch_embed.", "patch_embed2."),
        ("stages.0.blocks.", "block1."),
        ("stages.1.blocks.", "block2."),
        ("head.fc.", "head."),
    ],
    "agent_swin_tiny": [
        ("stem.patch_embed.", "patch_embed."),
        ("stages.1.downsample.", "layers.0.downsample."),
        ("stages.", "layers."),
        ("head.fc.", "head."),
    ],
    "agent_cswin_tiny": [
        ("stem.conv.", "stage1_conv_embed.0."),
        ("stem.norm.", "stage1_conv_embed.2."),
        ("stages.1.downsample.", "merge1."),
        ("stages.0.blocks.", "stage1."),
        ("stages.1.blocks.", "stage2."),
        ("head.fc.", "head."),
    ],
    "fv_halonet_h0": [],
    "moh_transnext_small_75": [
        ("stages.1.downsample.", "patch_embed2."),
        ("stages.0.blocks.", "block1."),
        ("stages.1.blocks.", "block2."),
        ("stages.0.norm.", "norm1."),
        ("stages.1.norm.", "norm2."),
        (".dwconv.", ".dwconv.dwconv."),
        ("stem.", "patch_embed1."),
        ("head.fc.", "head."),
    ],
    "eca_resnet18": [(".se.", ".eca.")],
    "eca_mobilenet_v2": [
        *((f"blocks.0.0.{ours}", f"features.1.conv.{theirs}") for ours, theirs in MOBILENET_FIRST.items()),
        *(
            (f"blocks.{i}.0.{ours}", f"features.{i + 1}.conv.{theirs}")
            for i in range(1, 7)
            for ours, theirs in MOBILENET_BLOCK.items()
        ),
        ("conv_stem.", "features.0.0."),
        ("bn1.", "features.0.1."),
        ("conv_head.", "features.8.0."),
        ("bn2.", "features.8.1."),
        ("classifier.", "classifier.1."),
    ],
    "ela_resnet18_b": [],
    "ela_mobilenet_v2_l": [],
    "quantizable_vit_tiny": [],
    "sparsifiner_deit_tiny": [],
    "dependencyvit_tiny": [],
}


def to_official(name, state_dict):
    """Our keys as the authors wrote them."""
    out = {}
    for key, value in state_dict.items():
        for ours, theirs in RENAMES[name]:
            key = key.replace(ours, theirs, 1)
        out[key] = value
    return out


@pytest.fixture
def saved(tmp_path):
    """A function that writes an official-looking file of a random small net; returns the net and the path."""

    def make(name, wrap=lambda state: state, **changes):
        torch.manual_seed(0)
        model = timm.create_model(name, **{**FAMILIES[name][0], **changes})
        official = to_official(name, model.state_dict())
        assert FAMILIES[name][2] in official
        torch.save(wrap(official), tmp_path / "official.pth")
        return model.eval(), str(tmp_path / "official.pth")

    return make


def load(name, file, overlay=(), **kwargs):
    overlay = {"file": file, **dict(overlay)}
    arguments = {**FAMILIES[name][0], **kwargs}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()


WRAPS = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "arch": "x"},
    "model": lambda s: {"model": s, "optimizer": {"lr": 0.1}},
    "DataParallel": lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
}


@every_family
@pytest.mark.parametrize("wrap", WRAPS)
def test_every_wrapper_loads(name, wrap, saved):
    model, file = saved(name, WRAPS[wrap])
    x = torch.randn(2, 3, 32, 40)
    assert torch.equal(load(name, file)(x), model(x))


@pytest.mark.parametrize("options", [{}, {"num_classes": 5}, {"features_only": True}], ids=str)
def test_of_an_official_biformer_file_the_weights_of_the_published_accuracy_are_taken(saved, options):
    def training_file(state):
        average = {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}
        return {"model": state, "model_ema": average, "args": Namespace(lr=0.1), "max_accuracy": 81.4}

    model, file = saved("biformer_tiny", training_file)
    loaded = load("biformer_tiny", file, **options)
    loaded = getattr(loaded, "model", loaded)  # features_only wraps
    key = "stages.0.blocks.0.attn.qkv.weight"
    assert torch.equal(loaded.state_dict()[key], model.state_dict()[key])
    assert "state_dict" not in loaded.pretrained_cfg and loaded.pretrained_cfg["file"] == file


@every_family
def test_another_class_count_keeps_the_backbone(name, saved):
    model, file = saved(name)
    other = load(name, file, num_classes=5)
    key = FAMILIES[name][1]
    assert torch.equal(other.state_dict()[key], model.state_dict()[key])
    assert other(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    assert load(name, file, num_classes=0)(torch.randn(1, 3, 32, 32)).shape == (1, other.num_features)


@every_family
def test_input_channels_adapt_as_in_timm(name, saved):
    model, file = saved(name)
    grey = load(name, file, in_chans=1)
    x = torch.randn(1, 1, 32, 32)
    torch.testing.assert_close(grey(x), model(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


@every_family
def test_features_load_the_same_weights(name, saved):
    model, file = saved(name)
    x = torch.randn(1, 3, 32, 48)
    ours = load(name, file, features_only=True)(x)
    for ours_map, expected in zip(ours, model.forward_intermediates(x, intermediates_only=True), strict=True):
        assert torch.equal(ours_map, expected)


@every_family
@pytest.mark.parametrize("classes", [1000, 7])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s, key: {k: v for k, v in s.items() if k != key}, "it misses "),
        (lambda s, key: {**s, "levels.0.strange": s[key]}, "it has an unknown "),
        (lambda s, key: {**s, key: s[key][:1]}, "it has .*, not "),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_another_models_weights_are_refused_whatever_the_class_count(name, classes, spoil, words, saved):
    _, file = saved(name, lambda s: spoil(s, FAMILIES[name][2]))
    with pytest.raises(ValueError, match=f"not a checkpoint of this model: .*{words}"):
        load(name, file, num_classes=classes)


def test_a_checkpoint_of_another_family_is_refused(saved):
    _, file = saved("van_b0")
    with pytest.raises(ValueError, match="Nat: not a checkpoint of this model"):
        load("nat_mini", file)


def test_a_truncated_file_is_refused(saved, tmp_path):
    _, file = saved("nat_mini")
    whole = (tmp_path / "official.pth").read_bytes()
    (tmp_path / "official.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RuntimeError, match="failed"):
        load("nat_mini", file)


def test_a_file_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    torch.save({"state_dict": {}, "extra": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(RuntimeError, match="weights_only"):
        load("nat_mini", str(tmp_path / "evil.pth"))


def test_another_kernel_size_takes_the_bias_resized(saved):
    model, file = saved("nat_mini")
    wide = load("nat_mini", file, kernel_size=5)
    table = model.state_dict()["stages.0.blocks.0.attn.rpb"]
    resized = wide.state_dict()["stages.0.blocks.0.attn.rpb"]
    assert resized.shape == (1, 9, 9)
    torch.testing.assert_close(resized[:, 4, 4], table[:, 2, 2])  # the centre stays the centre


def test_a_22k_checkpoint_loads_as_a_backbone_without_its_classifier(tmp_path):
    small = {"dims": (32, 64), "depths": (1, 2), "dilations": ((1,), (1, 2)), "kernel_size": 3}
    body = timm.create_model("dinat_large", num_classes=11, **small)
    torch.save(to_official("nat_mini", body.state_dict()), tmp_path / "22k.pth")
    overlay = {"file": str(tmp_path / "22k.pth")}
    model = timm.create_model("dinat_large.in22k", pretrained=True, pretrained_cfg_overlay=overlay, **small)
    assert model.num_classes == 0
    assert torch.equal(model.norm.weight, body.norm.weight)


def to_florence(state_dict):
    """Our keys as Florence-2 has them: an image tower beside a language model, without norm and classifier."""
    renames = [
        ("stem.conv.", "convs.0.proj."),
        ("stem.norm.", "convs.0.norm."),
        ("stages.1.downsample.conv.", "convs.1.proj."),
        ("stages.1.downsample.norm.", "convs.1.norm."),
        ("stages.0.blocks.", "blocks.0."),
        ("stages.1.blocks.", "blocks.1."),
        (".cpe1.proj.", ".conv1.fn.dw."),
        (".cpe2.proj.", ".conv2.fn.dw."),
        (".spatial_block.norm1.", ".spatial_block.window_attn.norm."),
        (".spatial_block.attn.", ".spatial_block.window_attn.fn."),
        (".channel_block.norm1.", ".channel_block.channel_attn.norm."),
        (".channel_block.attn.", ".channel_block.channel_attn.fn."),
        (".norm2.", ".ffn.norm."),
        (".mlp.", ".ffn.fn.net."),
    ]
    out = {"language_model.final_logits_bias": torch.zeros(1, 3), "image_projection": torch.zeros(2, 2)}
    for key, value in state_dict.items():
        for ours, theirs in renames:
            key = key.replace(ours, theirs, 1)
        if not key.startswith("head."):
            out[f"vision_tower.{key}"] = value
    return out


@pytest.fixture
def florence(tmp_path):
    """A small image tower of Florence-2 with random weights, and a function that loads a file of the given weights."""
    torch.manual_seed(0)
    tower = timm.create_model("fv_davit_base_fl", **SMALL_DAVIT).eval()

    def load(state_dict, **kwargs):
        torch.save(state_dict, tmp_path / "florence.pth")
        overlay = {"file": str(tmp_path / "florence.pth")}
        arguments = {"pretrained": True, "pretrained_cfg_overlay": overlay, **SMALL_DAVIT, **kwargs}
        return timm.create_model("fv_davit_base_fl", **arguments).eval()

    return tower, load


def test_the_image_tower_of_florence_loads_out_of_the_whole_model(florence):
    tower, load = florence
    state_dict, x = to_florence(tower.state_dict()), torch.randn(2, 3, 64, 96)
    assert "vision_tower.blocks.1.0.channel_block.channel_attn.fn.qkv.weight" in state_dict
    assert torch.equal(load(state_dict).forward_features(x), tower.forward_features(x))
    ready = load(state_dict, num_classes=5)
    assert torch.equal(ready.forward_features(x), tower.forward_features(x)) and ready(x).shape == (2, 5)


def test_another_florence_tower_is_refused(florence):
    tower, load = florence
    key = "vision_tower.blocks.1.0.channel_block.channel_attn.fn.qkv.weight"
    whole = to_florence(tower.state_dict())
    for spoilt, words in [
        ({k: v for k, v in whole.items() if k != key}, "it misses stages.1.blocks.0.channel_block.attn.qkv.weight"),
        ({**whole, key: whole[key][:1]}, "it has stages.1.blocks.0.channel_block.attn.qkv.weight"),
        ({**whole, "vision_tower.strange": whole[key]}, "it has an unknown strange"),
    ]:
        with pytest.raises(ValueError, match=words):
            load(spoilt)


def test_florences_channel_attention_takes_the_slots_at_their_word_and_scales_by_tokens(florence):
    block = florence[0].stages[0].blocks[0].channel_block
    x = torch.randn(2, 5, 7, 16, dtype=torch.float64)
    attention = block.attn.double()
    q, k, v = attention.qkv(x).flatten(1, 2).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 4, 1)  # (B, heads, d, N)
    weights = (q @ k.mT / 35**0.5).softmax(-1)
    expected = (weights @ v).flatten(1, 2).mT.unflatten(1, (5, 7))
    torch.testing.assert_close(attention(x), attention.proj(expected))


AGENTS = [name for name in FAMILIES if name.startswith("agent")]


@pytest.mark.parametrize("name", AGENTS)
def test_an_official_agent_file_loads_into_a_model_for_another_image_size(name, saved):
    """Masks and indices, which depend on the size, are dropped; what is for the same size stays to the bit."""

    def with_buffers(state):
        more = {"layers.1.blocks.0.attn_mask": torch.zeros(4, 9, 9)}
        return state | more | {"layers.1.blocks.0.attn.relative_position_index": torch.zeros(9, 9, dtype=torch.int64)}

    model, file = saved(name, with_buffers)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(load(name, file)(x), model(x))
    larger = load(name, file, img_size=48)
    assert larger(torch.randn(1, 3, 48, 48)).shape == (1, 1000)
    own, before = larger.state_dict(), model.state_dict()
    resized = {key for key, value in own.items() if value.shape != before[key].shape}
    assert resized and all(key.endswith(("_bias", "pos_embed", "bias_table")) for key in resized)
    for key in own.keys() - resized:
        assert torch.equal(own[key], before[key]), key
    key = next(key for key in resized if key.endswith("ah_bias"))
    line = torch.nn.functional.interpolate(before[key][0, :, :, :, 0], size=own[key].shape[3], mode="linear")
    torch.testing.assert_close(own[key][0, :, :, :, 0], line)


def test_the_tag_of_agent_weights_sets_the_image_size_unless_the_caller_does():
    def side(name, **kwargs):
        return timm.create_model(name, device="meta", **kwargs).stem.map_size

    assert side("agent_deit_small") == (14, 14) and side("agent_deit_small.in1k_448") == (28, 28)
    assert side("agent_deit_small.in1k_448", img_size=224) == (14, 14)
    assert side("agent_pvt_medium.in1k_256") == (64, 64) and side("agent_pvt_medium", img_size=(96, 160)) == (24, 40)
    swin = timm.create_model("agent_swin_base.in1k_384", device="meta")
    assert swin.stages[0].blocks[0].attn.side == 96 and swin.stages[3].blocks[0].attn.window == 12
    cswin = timm.create_model("agent_cswin_base.in1k_384", device="meta")
    assert cswin.stages[2].blocks[0].stripe == 12 and cswin.stages[0].blocks[0].attns[0].ah_bias.shape[3] == 96
