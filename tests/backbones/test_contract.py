"""What timm's own tests do not ask of every model of ours (those run in tests/acceptance)."""

import json
from pathlib import Path

import pytest
import timm
import timm.optim
import torch
from small_models import FIXED, KINDS, OF_TIMMS_CLASSES, ONE_SIZE, SCALED, SMALL, VITS, small
from timm.models import model_entrypoint

import foveate
from foveate.backbones import BUILDERS, FAMILIES

MODELS = foveate.list_models()
GOLDENS = Path(__file__).parents[1] / "goldens"
every_model = pytest.mark.parametrize("name", MODELS)
every_small = pytest.mark.parametrize("name", SMALL)
STAGED = [name for name in SMALL if name not in (*OF_TIMMS_CLASSES, *VITS)]
every_small_staged = pytest.mark.parametrize("name", STAGED)


def module_of(name):
    """The module of the family that registers a model."""
    return model_entrypoint(name.partition(":")[0]).__module__


def test_every_model_that_our_modules_register_is_listed():
    registered = {name for name in timm.list_models() if module_of(name).startswith("foveate.backbones.")}
    builders = {name for builder in BUILDERS for name in builder.__all__}
    assert set(MODELS) == registered - builders and len(MODELS) == len(set(MODELS))
    assert foveate.list_models("van_*") == [f"van_b{i}" for i in range(7)]


def test_every_family_has_a_small_model():
    missing = {family.__name__ for family in FAMILIES} - {module_of(name) for name in (*KINDS, *ONE_SIZE, *FIXED)}
    assert missing == set(), f"add keywords of a small model of {missing} to tests/small_models.py"


def test_every_family_has_recorded_outputs():
    unpublished = {"foveate.backbones.ela_net"}  # layers only; timm's networks around them
    unpublished |= {"foveate.backbones.mixer_vit"}  # a net of our own around recorded layers
    records = [path for path in GOLDENS.glob("*__*.json") if not path.name.startswith("module__")]
    recorded = {json.loads(path.read_text()).get("variant") for path in records} - {None}
    missing = {family.__name__ for family in FAMILIES} - {module_of(name) for name in recorded} - unpublished
    assert missing == set(), f"record outputs of the official code of {missing} in tests/goldens"


@every_model
def test_pretrained_cfg_says_where_weights_come_from(name):
    model = timm.create_model(name, device="meta")
    cfg = model.pretrained_cfg
    assert cfg["tag"] == "untrained" or cfg["license"]
    assert cfg["paper_ids"].startswith("arXiv:") and cfg["origin_url"].startswith("https://")
    on_drives = any("drive" in note for note in cfg.get("notes") or ())  # no address that a program could download from
    assert cfg["tag"] == "untrained" or on_drives or cfg.get("url", "").startswith("https://") or cfg.get("hf_hub_id")
    assert not cfg.get("url") or cfg["url"].endswith((".pth", ".pth.tar"))


PUBLISHED_PARAMS = {
    "nat_tiny": 27_901_582,
    "nat_base": 89_769_652,
    "dinat_small": 50_719_681,
    "dinat_base": 89_769_652,
    "dinat_large": 200_943_514,
    "dinat_large_384": 200_943_514,
    "dinat_large_384_11x11": 201_144_250,
    "dinat_s_small": 49_606_258,
    "dinat_s_base": 87_768_224,
    "dinat_s_large": 196_532_476,
    "dinat_s_large_384": 196_532_476,
    "nat_isotropic_small": 21_999_736,
    "vitrpb_small": 22_080_376,
    "biformer_small": 25_536_232,
    "biformer_base": 56_804_968,
    "litv2_medium": 48_830_368,
    "litv2_base": 86_520_704,
    "flowformer_cv": 43_311_304,
    "moh_transnext_small_75": 49_910_548,
    "moh_transnext_small_80": 49_910_548,
    "moh_transnext_base_75": 90_020_632,
    "moh_transnext_base_50": 90_023_512,
    "agent_deit_small": 22_647_000,
    "agent_deit_base": 87_205_000,
    "agent_pvt_small": 20_635_000,
    "agent_swin_small": 49_667_000,
    "agent_swin_base": 88_095_000,
    "agent_cswin_small": 32_814_000,
    "quantizable_vit_tiny": 5_717_416,
    "quantizable_vit_base": 86_567_656,
    "sparsifiner_deit_small": 22_251_880,
    "dependencyvit_small": 22_916_200,
    "dependencyvit_lite_small": 22_916_200,
    "van_b2": 26_578_472,
    "van_b4": 60_283_176,
    "van_b5": 89_967_688,
    "van_b6": 199_829_416,
}


@pytest.mark.parametrize("name", PUBLISHED_PARAMS)
def test_parameter_counts_are_the_official_ones(name):
    model = timm.create_model(name, device="meta")
    found, published = sum(p.numel() for p in model.parameters()), PUBLISHED_PARAMS[name]
    assert found == published or (published % 1000 == 0 and round(found / 1000) == published // 1000)


@pytest.mark.parametrize(
    ("name", "dilations"),
    [
        ("nat_tiny", [[1] * 3, [1] * 4, [1] * 18, [1] * 5]),
        ("dinat_tiny", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]),
        ("dinat_large_384", [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]),
        ("dinat_large_384_11x11", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]),
        ("dinat_s_large_384", [[1, 13], [1, 6], [1, 3] * 9, [1, 1]]),
        ("dinat_isotropic_base", [[1], [2]] * 6),
    ],
)
def test_dilations_are_the_official_ones(name, dilations):
    model = timm.create_model(name, device="meta")
    ours = [[block.attn.dilation for block in stage.blocks] for stage in model.stages]
    assert ours == [[[d, d] for d in stage] for stage in dilations]


@every_small
@pytest.mark.parametrize("size", [(32, 32), (45, 71), (16, 100)])
def test_any_image_size_runs(name, size):
    least = 16 if name == "vitrpb_small" else 8
    out = small(name, num_classes=3).eval()(torch.randn(1, 3, *(max(s, least) for s in size)))
    assert out.shape == (1, 3) and out.isfinite().all()


@every_small_staged
def test_an_image_below_the_stride_is_refused(name):
    model = small(name)
    for shape in [(1, 3, 7, 64), (1, 3, 64, 7), (3, 64, 64)]:
        with pytest.raises(ValueError, match=r"the image must be \(B, C, H, W\) with sides of at least \d+ px, got \["):
            model(torch.zeros(shape))


@every_small
def test_unknown_keywords_are_a_type_error(name):
    with pytest.raises(TypeError, match="kernal_size"):
        small(name, kernal_size=3)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("nat_mini", {"depths": (1, 2, 3)}, "depths must have one entry per stage, 2"),
        ("nat_mini", {"dims": (30, 64)}, r"dims must be multiples of head_dim 32, got \[30\]"),
        ("nat_mini", {"dilations": ((1,),)}, "dilations must have one tuple per stage, 2"),
        ("nat_mini", {"downsample": "pool"}, "downsample must be .* got 'pool'"),
        ("biformer_tiny", {"topks": (1,)}, "topks must have one entry per stage, 2"),
        ("biformer_tiny", {"head_dim": 5}, "dims must be multiples of head_dim 5, got 16"),
        ("biformer_tiny", {"dense_heads": 5}, "dims must be multiples of dense_heads 5, got 32"),
        ("biformer_tiny", {"routing": "best"}, "routing must be one of .*, got 'best'"),
        ("biformer_tiny", {"qk_dims": (8,)}, "qk_dims must have one entry per stage, 2"),
        ("biformer_tiny", {"kv_sizes": (2, 2)}, "kv_sizes and kv_strides need kv_pool"),
        ("biformer_tiny", {"kv_pool": "avg"}, "kv_pool 'avg' needs one of kv_sizes and kv_strides"),
        ("biformer_stl_nchw", {"routing": "soft"}, "nchw knows neither routing"),
        ("biformer_tiny", {"nchw": True}, "nchw goes with swin_layout and pre_norm"),
        ("litv2_small", {"windows": (2,)}, "windows must have one entry per stage, 2"),
        ("litv2_small", {"head_dim": 5}, r"dims must be multiples of head_dim 5, got \[32\]"),
        ("litv2_small", {"alpha": 1.5}, "alpha must be 0 to 1, got 1.5"),
        ("litv2_small", {"alpha": "most"}, "alpha must be 0 to 1, got 'most'"),
        ("litv2_small", {"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ("biformer_tiny", {"head_dim": 0}, "dims must be multiples of head_dim 0, got 16"),
        ("biformer_tiny", {"topks": (2, "all")}, "topks must be numbers, None, 'plain' or 'conv', got 'all'"),
        (
            "biformer_stl_nchw",
            {"mlp_conv": True},
            "nchw goes with .*, without pos_conv, mlp_conv",
        ),
        ("fv_davit_tiny", {"depths": (1,)}, "depths must have one entry per stage, 2"),
        ("fv_davit_tiny", {"head_dim": 5}, r"dims must be multiples of head_dim 5, got \[16, 32\]"),
        ("fv_halonet_h0", {"heads": (4,)}, r"heads must have one entry per stage, 4, got \(4,\)"),
        ("eca_mobilenet_v2", {"depths": (1,)}, "depths must have one entry per stage, 7"),
        ("ela_resnet18_b", {"ela_variant": "x"}, "ela_variant must be one of"),
        ("quantizable_vit_tiny", {"gate": "all heads"}, "gate must be None or one of linear, mlp, .*, got 'all heads'"),
        ("quantizable_vit_tiny", {"softmax_clip": (0.1, 1)}, r"clip must be \(gamma, zeta\) with gamma <= 0"),
        ("quantizable_vit_tiny", {"clip_alpha": 2}, "softmax_clip and clip_alpha are given"),
        ("quantizable_vit_tiny", {"softmax_clip": "hard"}, "softmax_clip must be 'vanilla' or .* got 'hard'"),
        ("quantizable_vit_tiny", {"gate_init": 1.0}, "gate_init must be above 0 and below 1, got 1.0"),
        ("quantizable_vit_tiny", {"gate": None, "gate_finetune": True}, "gate_finetune needs a gate"),
        ("quantizable_vit_tiny", {"num_heads": 5}, "embed_dim must be a multiple of num_heads 5, got 32"),
        ("sparsifiner_deit_tiny", {"keep": 0.0}, "keep must be above 0 and at most 1, got 0.0"),
        ("sparsifiner_deit_tiny", {"token_rate": 1.5}, "token_rate must be .*, got 1.5"),
        ("dependencyvit_tiny", {"cpe_depth": 3}, "cpe_depth must be 0 to depth 2, got 3"),
        ("dependencyvit_tiny", {"cpe_depth": 2, "pruning_blocks": (1,)}, "cpe_depth must be at most 1 where block 1"),
        ("van_b0", {"mlp_ratios": (2,)}, "mlp_ratios must have one entry per stage, 2"),
        ("moh_transnext_small_75", {"routed": (0,)}, "routed must have one entry per stage, 2"),
        ("moh_transnext_small_75", {"routed": (0, 4)}, "wanted shared heads, and 1 to 3 routed of the others, got 1"),
        ("moh_transnext_small_75", {"heads": (3, 4)}, "heads must divide dim 16, got 3"),
        ("mixer_vit_tiny", {"mixer": "flwo"}, r"mixer must be one of .*, got 'flwo'; did you mean flow\?"),
        ("mixer_vit_tiny", {"heads": 3}, "dims must be one multiple of heads 3"),
        ("flowformer_cv", {"img_size": 44}, r"img_size must be multiples of 8 px, got \(44, 44\)"),
        ("flowformer_cv", {"heads": 3}, r"dims must be multiples of heads 3, got \[16, 32\]"),
        ("agent_pvt_tiny", {"agent_num": (9, 12)}, "agent_num must be square numbers .* got 12"),
        ("agent_pvt_tiny", {"agent_num": "9-16-49"}, "agent_num must have one number per stage, 2, got"),
        ("agent_pvt_tiny", {"heads": (2, 3)}, "heads must divide dims, got 3 heads for 32 channels"),
        ("agent_pvt_tiny", {"attn_type": "AC"}, "attn_type must be a letter A, B or M per stage, 2, .* got 'AC'"),
        ("agent_pvt_tiny", {"attn_type": "AM"}, "and behind them a number if one is M, got 'AM'"),
        ("agent_pvt_tiny", {"agent_sr_ratios": "01"}, r"agent_sr_ratios must be at least 1, got \(0, 1\)"),
        ("agent_pvt_tiny", {"img_size": 4}, "img_size must leave a map in every stage, got 4, maps"),
        ("agent_swin_tiny", {"attn_type": "AB2"}, "attn_type must be .* got 'AB2'"),
        ("agent_swin_tiny", {"downstream_agent_shapes": ((3, 3),)}, "downstream_agent_shapes must have .* stage, 2"),
        ("agent_swin_tiny", {"img_size": (48, 0)}, r"img_size must be pixels, .* got \(48, 0\)"),
        ("agent_cswin_tiny:stripes", {"heads": (1, 4)}, "heads must be even where a block has two branches, got 1"),
        ("agent_cswin_tiny", {"split_size": "20"}, "split_size must be at least 1"),
        ("agent_deit_tiny", {"agent_layer": 4}, "agent_layer must be 0 to depth 3, got 4"),
        ("agent_deit_tiny", {"heads": 3}, "heads must divide dim 16, got 3"),
        ("agent_deit_tiny", {"agent_num": (4, 9)}, "agent_num must have one number per stage, 4"),
        ("agent_deit_tiny", {"img_size": 7}, "img_size must have a patch of 8 pixels, got 7"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(name, changes, words):
    with pytest.raises(ValueError, match=words):
        small(name, **changes)


@every_small
def test_every_drop_rate_has_an_effect_in_training(name):
    x = torch.randn(16, 3, 32, 32)  # with 4 images, two draws of drop path agree in one of hundreds of runs
    for rate in ("drop_rate", "drop_path_rate", *(() if name in OF_TIMMS_CLASSES else ("proj_drop_rate",))):
        # branches that start near zero would hide what happens inside them
        alive = {"layer_scale": 1.0} if name in SCALED else {"zero_init_last": False} if name == "fv_halonet_h0" else {}
        model = small(name, **{rate: 0.5}, **alive)
        assert not torch.equal(model.train()(x), model(x)), rate
        assert torch.equal(model.eval()(x), model(x)), rate


@every_small
def test_a_training_step_lowers_the_loss_in_float32_and_bf16(name):
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    for dtype in (torch.float32, torch.bfloat16):
        model = small(name, num_classes=4).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        losses = []
        for _ in range(8):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                loss = torch.nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


DEFORMABLE = ("litv2_small",)  # torchvision's deform_conv2d knows neither torch.func nor second derivatives


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", [name for name in SMALL if name not in DEFORMABLE])
def test_gradients_of_each_image_and_a_jvp_are_those_of_plain_autograd(name):
    """torch.func on whole models: vmap of grad over images, forward-mode AD, and a second derivative."""
    model, x = small(name, num_classes=3).eval().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    weights = {key: p.detach() for key, p in model.named_parameters()}

    def loss(weights, image):
        return torch.func.functional_call(model, weights, (image[None],)).square().sum()

    per_image = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for i, image in enumerate(x):
        plain = torch.autograd.grad(model(image[None]).square().sum(), list(model.parameters()))
        torch.testing.assert_close([per_image[key][i] for key in weights], list(plain))
    _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    image = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(image).sum(), image, create_graph=True)
    torch.testing.assert_close(first.sum(), tangent.sum())
    assert torch.autograd.grad(first.square().sum(), image)[0].isfinite().all()


@pytest.mark.parametrize("name", DEFORMABLE)
def test_deformable_convolutions_refuse_torch_func(name):
    model = small(name).eval()
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: model(x).sum())(torch.randn(1, 3, 32, 32))


@every_small
def test_training_is_deterministic_with_a_seed(name):
    def step():
        torch.manual_seed(3)
        model = small(name, num_classes=4, drop_path_rate=0.3).train()
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        return [p.grad for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))


@every_small
def test_hub_round_trip_keeps_overrides_and_outputs(name, tmp_path):
    model = small(name, num_classes=6).eval()
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 40, 56)
    assert torch.equal(again(x), model(x))


def test_rpb_is_kept_from_weight_decay_and_layers_get_their_own_rate():
    model = small("nat_mini")
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    group = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    named = dict(model.named_parameters())
    assert group[id(named["stages.0.blocks.0.attn.rpb"])]["weight_decay"] == 0
    assert group[id(named["stages.0.blocks.0.attn.qkv.weight"])]["weight_decay"] == 0.05
    scales = [group[id(named[k])]["lr_scale"] for k in ("stem.proj.0.weight", "stages.1.blocks.1.norm1.weight")]
    assert scales[0] < scales[1]


def test_van_runs_channels_last_on_a_cpu_by_itself():
    seen = []
    model = small("van_b0")
    model.stages[0].blocks[0].mlp.fc1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.randn(2, 3, 64, 64))
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and not seen[0].is_contiguous()


def test_the_dense_baseline_sees_all_keys_up_to_its_size():
    model = small("vitrpb_small").eval()
    attention = model.stages[0].blocks[0].attn
    for size in [(4, 4), (3, 2)]:
        x = torch.randn(1, *size, 32, requires_grad=True)
        attention(x)[0, 0, 0].sum().backward()
        assert (x.grad.abs().sum(-1) > 0).all()


def test_the_tag_of_litv2_weights_sets_alpha_unless_the_caller_does():
    def low_heads(name, **kwargs):
        return timm.create_model(name, device="meta", **kwargs).stages[2].blocks[0].attn.low_heads

    tags = ("in1k", "alpha00_in1k", "alpha04_in1k", "alpha07_in1k", "alpha10_in1k")
    assert [low_heads(f"litv2_small.{tag}") for tag in tags] == [10, 0, 4, 8, 12]
    assert low_heads("litv2_small.alpha04_in1k", alpha=1.0) == 12 and low_heads("litv2_small", alpha=0.5) == 6


def test_the_tag_survives_the_hub(tmp_path):
    model = timm.create_model("litv2_small.alpha04_in1k", **SMALL["litv2_small"]).eval()
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 40, 56)
    assert torch.equal(again(x), model(x))


UNPUBLISHED = [
    {"topks": ("conv", "plain"), "mlp_conv": True, "pre_norm": False},
    {"topks": ("conv", "plain"), "pos_conv": False, "layer_scale": 0.1},
    {"topks": (2, 3), "routing": "learned", "qk_dims": (8, None), "kv_pool": "avg", "kv_sizes": (2, 1)},
    {"topks": (2, 3), "routing": "differentiable", "kv_pool": "max", "kv_strides": (2, 1)},
    {"topks": (2, 3), "routing": "soft"},
]


@pytest.mark.parametrize("changes", UNPUBLISHED)
def test_the_unpublished_forms_of_biformer_learn_and_script(changes):
    model = small("biformer_tiny", **changes)
    x = torch.randn(2, 3, 48, 64)
    out = model(x)
    torch.testing.assert_close(torch.jit.script(model)(x), out)
    out.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_options_of_biformers_attention_reach_it():
    model = small("biformer_tiny", **UNPUBLISHED[2])
    first, second = (stage.blocks[0].attn for stage in model.stages)
    assert (first.router.differentiable, first.router.emb.in_features, second.router.emb.in_features) == (True, 8, 32)
    assert (first.kv_pool.average, first.kv_pool.size, second.kv_pool.size) == (True, 2, 1)
    first, second = (stage.blocks[0].attn for stage in small("biformer_tiny", **UNPUBLISHED[3]).stages)
    assert (first.kv_pool.average, first.kv_pool.stride, second.kv_pool) == (False, 2, None)
    assert first.router.differentiable and first.router.emb is None
    assert not small("biformer_tiny", **UNPUBLISHED[4]).stages[0].blocks[0].attn.router.differentiable
