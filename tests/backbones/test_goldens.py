"""Every family against its official code, through the door that users' checkpoints take."""

import copy
import zlib
from importlib import import_module

import numpy as np
import pytest
import timm
import torch
from torch import nn

import foveate
from foveate.backbones import biformer, litv2
from foveate.backbones.van import OverlapPatchEmbed, VanAttention, VanBlock, VanMlp

FAST = ["nat__nat_mini", "dinat__dinat_s_tiny", "dinat__dinat_isotropic_small", "van__van_b0"]
FAST += ["davit__official_tiny", "halonet__eca_halonext26ts"]
FAST += ["ecanet__official_eca_resnet18_k3577", "ecanet__official_eca_mobilenet_v2_ckpt"]
SLOW = ["nat__nat_small", "dinat__dinat_mini", "dinat__dinat_tiny", "van__van_b1", "van__van_b3", "halonet__halonet26t"]
FAST += ["biformer__biformer_tiny", "litv2__litv2_small"]
SLOW += ["biformer__biformer_stl", "biformer__biformer_stl_nchw"]
SLOW += [f"litv2__litv2_small_alpha{alpha}" for alpha in ("0.4", "0.5", "1.0")]
FAST += [f"agent__{kind}_tiny" for kind in ("agent_deit", "agent_pvt", "agent_swin", "agent_cswin")]
SLOW += ["agent__agent_deit_tiny_288", "agent__agent_deit_tiny_l4_a81", "agent__agent_pvt_tiny_mixed"]
SLOW += ["agent__agent_swin_tiny_m2", "agent__agent_cswin_tiny_stripe"]
every_golden = pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])


@pytest.fixture
def official(det, golden, tmp_path):
    """A function from a golden's name to its JSON, its logits, our model with the official weights, the key map."""

    def load(name, gain="gain"):
        facts, logits = golden(name)
        weights = det.det_state_dict(facts["state_dict"], facts["mul"], facts.get(gain, facts.get("gain", 1.0)))
        torch.save(weights, tmp_path / "official.pth")
        overlay = {"file": str(tmp_path / "official.pth")}
        arguments = facts.get("arguments", {})  # of our model, where the recorded one was made with others
        model = timm.create_model(facts["variant"], pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()
        ours = import_module(type(model).__module__).checkpoint_filter_fn(weights, model)
        theirs = {id(value): key for key, value in weights.items()}
        return facts, logits, model, {key: theirs[id(value)] for key, value in ours.items()}

    return load


ROUNDINGS = 16  # measured: float32 moves a map at most 10 times as far as such a change of the weights


@every_golden
def test_logits_and_stages_equal_the_official_ones(name, det, official):
    """Compare in float32, with a fixed tolerance, or, where ReLUs near zero amplify float32 rounding, 16 times the
    effect that a change of every weight by at most float32's eps has in float64. No thread count, instruction set or
    torch release came near that; a wrong layer exceeds it by orders of magnitude."""
    facts, logits, model, _ = official(name)
    assert sum(p.numel() for p in model.parameters()) == facts["params"]
    tolerance = 1e-4 if name.startswith("litv2") else 5e-5  # of the standard deviation; sampling amplifies
    for given in facts["inputs"]:
        x = torch.from_numpy(det.det_input(given["shape"], given["seed"]))
        found = differences(outputs(model, x, given), recorded(given, logits))
        wrong = {key: by for key, by in found.items() if not by <= tolerance}
        if wrong:
            noise = rounding_noise(model, x, given)
            wrong = {key: (by, noise[key]) for key, by in wrong.items() if not by <= ROUNDINGS * noise[key]}
        assert wrong == {}, given["name"]


FUSED = ["van__van_b0", "davit__official_tiny", "nat__nat_mini", "ecanet__official_eca_mobilenet_v2_ckpt"]


@pytest.mark.parametrize(
    "name", [*FUSED, *(pytest.param(n, marks=pytest.mark.slow) for n in [*FAST, *SLOW] if n not in FUSED)]
)
def test_a_fused_model_gives_the_official_logits(name, det, official):
    facts, logits, model, _ = official(name)
    fused = foveate.fuse(model)
    for given in facts["inputs"] if name not in FUSED else facts["inputs"][:1]:
        x = torch.from_numpy(det.det_input(given["shape"], given["seed"]))
        with torch.no_grad():
            by = differences({"logits": fused(x)}, recorded(given, logits))["logits"]
        assert by <= 1e-4 or by <= ROUNDINGS * rounding_noise(model, x, given)["logits"], (given["name"], by)


def outputs(model, x, given):
    """The logits and the recorded stages' maps, in the recorded layout."""
    with torch.no_grad():
        found, maps = {"logits": model(x)}, model.forward_intermediates(x, intermediates_only=True)
    for i, ours in enumerate(maps):
        stage = given["stages"].get(f"stage{i}")
        if stage is not None:  # of the isotropic nets' layers, four are recorded
            found[f"stage{i}"] = ours if len(stage["shape"]) == 4 else ours.flatten(2).transpose(1, 2)
            assert list(found[f"stage{i}"].shape) == stage["shape"]
    return found


def recorded(given, logits):
    """(samples, standard deviation) of the logits and of every recorded stage."""
    out = logits[given["name"]]
    stages = {key: (np.array(stage["samples"]), stage["std"]) for key, stage in given["stages"].items()}
    return {"logits": (out, out.std())} | stages


def differences(found, expected):
    """The largest difference of each map's samples in standard deviations of the map."""
    pairs = ((key, sample(ours, expected[key][0].size), *expected[key]) for key, ours in found.items())
    return {key: np.abs(ours - theirs.ravel()).max() / std for key, ours, theirs, std in pairs}


def rounding_noise(model, x, given):
    """How far each map moves, in its standard deviations, when every weight moves by at most float32's eps."""
    net, generator = copy.deepcopy(model).double(), torch.Generator().manual_seed(0)
    before = outputs(net, x.double(), given)
    for parameter in net.parameters():
        noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
        parameter.data.mul_(1 + torch.finfo(torch.float32).eps * noise)
    after = outputs(net, x.double(), given)
    return {key: float((after[key] - out).abs().max() / out.std()) for key, out in before.items()}


@every_golden
def test_gradients_equal_the_official_ones(name, det, official):
    """Compare in float32 and, where ReLUs near zero make that too coarse on this machine, in float64: its result is the
    same on every machine, so that only the recorded run's own rounding is left."""
    facts, _, model, official_key = official(name, "grad_gain")
    if wrong_gradients(model, facts, official_key, det):
        assert wrong_gradients(model.double(), facts, official_key, det) == []


def sample(tensor, count):
    flat = tensor.contiguous().flatten().numpy()
    return flat[np.linspace(0, flat.size - 1, count).astype(int)]


def wrong_gradients(model, facts, official_key, det):
    """The official names of the parameters whose gradient is not the recorded one."""
    tolerance, wrong = facts.get("grad_tolerance", 1e-4), []
    first, dtype = facts["inputs"][0], next(model.parameters()).dtype
    model.zero_grad()
    out = model(torch.from_numpy(det.det_input(first["shape"], first["seed"])).to(dtype))
    (out * torch.from_numpy(det.det_input(out.shape, 7))).mean().backward()
    for key, parameter in model.named_parameters():
        name, grad = official_key[key], parameter.grad
        expected = facts["grads"][name]
        if expected["l2"] == 0:  # behind the last output that is read
            wrong += [(name, float(grad.norm()))] if grad.any() else []
            continue
        off = abs(grad.double().norm() - expected["l2"]) / expected["l2"]
        if "dot" in expected:
            probe = torch.from_numpy(det.det_input(grad.shape, zlib.crc32(f"grad:{name}".encode())))
            off = max(off, abs((grad * probe).sum() - expected["dot"]) / expected["l2"])
        else:
            off = max(off, np.abs(sample(grad, 4) - expected["samples"]).max() / float(grad.abs().max()))
        if not off <= tolerance:
            wrong.append((name, float(off)))
    return wrong


def van_key(key):
    return key.replace("dwconv.dwconv", "dwconv")


VAN_LAYERS = {
    "Attention": lambda c: VanAttention(c["d_model"]),
    "Mlp": lambda c: VanMlp(c["in_features"], c["hidden_features"], drop=0.0),
    "Block": lambda c: VanBlock(c["dim"], c["mlp_ratio"], layer_scale=1e-2, drop=0.0, drop_path=0.0),
    "OverlapPatchEmbed": lambda c: OverlapPatchEmbed(3, c["embed_dim"], c["patch_size"], c["stride"]),
}


def test_van_layers_equal_the_official_ones(det, golden, relative_error):
    cases, arrays = golden("module__van")
    tried = set()
    for name, case in cases.items():
        kind = case["ctor"]["cls"]
        if kind not in VAN_LAYERS:
            continue
        in_chans = case["input_shape"][1]
        layer = VAN_LAYERS[kind](case["ctor"])
        if kind == "OverlapPatchEmbed" and in_chans != 3:
            layer.proj = nn.Conv2d(in_chans, case["ctor"]["embed_dim"], 3, 2, 1)
        weights = det.det_state_dict(case["state_dict"])
        layer.load_state_dict({van_key(k): v for k, v in weights.items()})
        x = torch.from_numpy(det.det_input(case["input_shape"], case["input_seed"])).requires_grad_()
        out = layer.eval()(x)
        assert relative_error(out, arrays[f"{name}__out"]) < 1e-5, name
        (out * torch.from_numpy(det.det_input(out.shape, 7))).mean().backward()
        for key, parameter in layer.named_parameters():
            norm, _ = next(v for k, v in case["grads"].items() if van_key(k) == key)
            assert abs(parameter.grad.norm() - norm) <= 1e-4 * norm, (name, key)
        tried.add(kind)
    assert tried == set(VAN_LAYERS)


def disagreements(layer, name, case, arrays, our_key, det, relative_error, forward=None):
    """What of one recorded layer is not ours: its output, and every parameter's gradient by norm and dot product."""
    weights = det.det_state_dict(case["state_dict"])
    layer.load_state_dict({our_key(k): v for k, v in weights.items()})
    x = torch.from_numpy(det.det_input(case["input_shape"], case["input_seed"]))
    out = (forward or type(layer).__call__)(layer.eval(), x)
    wrong = [] if relative_error(out, arrays[f"{name}__out"]) < 2e-5 else ["output"]
    (out * torch.from_numpy(det.det_input(out.shape, 7))).mean().backward()
    parameters = dict(layer.named_parameters())
    for key, (norm, dot) in case["grads"].items():
        grad = parameters[our_key(key)].grad
        probe = torch.from_numpy(det.det_input(grad.shape, zlib.crc32(f"grad:{key}".encode())))
        if max(abs(grad.norm() - norm), abs((grad * probe).sum() - dot)) > 1e-4 * norm:
            wrong.append(key)
    return wrong


STL = {"swin_layout": True, "mlp_ratio": 4.0, "pos_conv": False}
BIFORMER_BLOCKS = {
    "block": {},
    "block_layer_scale": {"layer_scale": 1.0},
    "block_post_norm": {"pre_norm": False},
    "block_post_norm_layer_scale": {"pre_norm": False, "layer_scale": 1.0},
    "block_mlp_dwconv": {"mlp_conv": True},
    "block_no_pos": {"pos_conv": False},
    "block_full_attn": {"topks": (None,)},
    "block_conv_attn": {"topks": ("conv",)},
    "stl_block": STL,
    "stl_nchw_block": {"nchw": True, **STL},
}


@pytest.mark.parametrize("name", BIFORMER_BLOCKS)
def test_biformer_blocks_equal_the_official_ones(name, det, golden, relative_error):
    cases, arrays = golden("module__biformer")
    config = biformer.BiFormerConfig(**{"dims": (64,), "depths": (1,), "topks": (4,), **BIFORMER_BLOCKS[name]})
    block = biformer.BiFormerBlock(64, config.topks[0], config, drop=0.0, drop_path=0.0)
    prefix = "stages.0.blocks.0."

    def forward(block, x):  # the recorded STL block takes and gives (B, H, W, C), as ours does inside
        return block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if name == "stl_block" else block(x)

    def our_key(key):
        return biformer._our_key(prefix + key)[len(prefix) :]

    assert disagreements(block, name, cases[name], arrays, our_key, det, relative_error, forward) == []


BIFORMER_DENSE = {
    "attention_lepe": lambda: biformer.DenseLepeAttention(64, 8),
    "nchw_attention_lepe": lambda: biformer.DenseLepeAttentionNchw(64, 8),
    "attention_plain": lambda: biformer.DenseLepeAttention(64, 8, lepe_kernel=0),
}


@pytest.mark.parametrize("name", BIFORMER_DENSE)
def test_biformers_last_attentions_equal_the_official_ones(name, det, golden, relative_error):
    cases, arrays = golden("module__biformer")
    layer = BIFORMER_DENSE[name]()
    assert disagreements(layer, name, cases[name], arrays, lambda key: key, det, relative_error) == []


def test_every_recorded_layer_of_biformer_is_tried(golden):
    cases, _ = golden("module__biformer")
    routed = {name for name, case in cases.items() if case["ctor"]["cls"].startswith(("BiLevelRouting", "nchwBRA"))}
    assert routed | {*BIFORMER_BLOCKS, *BIFORMER_DENSE} == cases.keys()  # the routed layers have tests of their own


LITV2_LAYERS = {  # a layer, and the map that its tokens make
    "dtm_14": (lambda: litv2.DeformableMerging(32, 64), (14, 14)),
    "dwmlp": (lambda: litv2.DepthwiseMlp(32, 128, drop=0.0), (14, 14)),
    "dwmlp_dense_14x28": (lambda: litv2.DepthwiseMlp(32, 128, drop=0.0), (14, 28)),
    "block": (lambda: litv2.Litv2Block(96, 2, litv2.Litv2Config(head_dim=8), drop=0.0, drop_path=0.0), (14, 14)),
    "convffn_block": (lambda: litv2.Litv2Block(96, None, litv2.Litv2Config(), drop=0.0, drop_path=0.0), (14, 14)),
}


@pytest.mark.parametrize("name", LITV2_LAYERS)
def test_litv2_layers_equal_the_official_ones(name, det, golden, relative_error):
    cases, arrays = golden("module__litv2")
    make, size = LITV2_LAYERS[name]

    def our_key(key):
        return key.replace("dwconv.dwconv", "dwconv").replace("norm_layer", "norm")

    def forward(layer, tokens):
        return layer(tokens.unflatten(1, size)).flatten(1, 2)

    assert disagreements(make(), name, cases[name], arrays, our_key, det, relative_error, forward) == []


def test_litv2_merging_loses_odd_lines_and_patches_are_padded_as_in_the_dense_code(det, golden, relative_error):
    cases, arrays = golden("module__litv2")
    name, stem = "patch_embed_dense_30x33", litv2.PatchEmbed(3, 48)
    assert [] == disagreements(
        stem, name, cases[name], arrays, lambda k: k, det, relative_error, lambda stem, x: stem(x).permute(0, 3, 1, 2)
    )
    layer, x = odd_merging(cases, det)
    assert relative_error(layer(x), arrays["dtm_dense_13x15__out"]) < 2e-5


def odd_merging(cases, det):
    layer = litv2.DeformableMerging(32, 64).eval()
    weights = det.det_state_dict(cases["dtm_dense_13x15"]["state_dict"])
    layer.load_state_dict({k.replace("norm_layer", "norm"): v for k, v in weights.items()})
    return layer, torch.from_numpy(det.det_input([1, 195, 32], 3)).unflatten(1, (13, 15))


def test_the_gradient_of_odd_litv2_merging_equals_finite_differences(det, golden):
    """The gradients recorded for this case do not: of the odd strides that a batch of one gives there, PyTorch's
    BatchNorm makes a wrong backward pass on CPUs."""
    layer, x = odd_merging(golden("module__litv2")[0], det)
    layer, x = layer.double(), x.double()
    weight = torch.from_numpy(det.det_input([1, 6, 7, 64], 7)).double()

    def loss():
        return (layer(x) * weight).mean()

    loss().backward()
    step = 1e-6
    for name, parameter in layer.named_parameters():
        flat = parameter.data.view(-1)
        for i in np.linspace(0, flat.numel() - 1, 5).astype(int):
            kept, ends = flat[i].clone(), []
            with torch.no_grad():
                for sign in (1, -1):
                    flat[i] = kept + sign * step
                    ends.append(float(loss()))
                flat[i] = kept
            slope = (ends[0] - ends[1]) / (2 * step)
            assert abs(parameter.grad.view(-1)[i] - slope) <= 1e-7 * parameter.grad.abs().max(), name


def test_litv2_maps_of_any_size_equal_the_official_dense_backbone(det, golden):
    facts, arrays = golden("litv2_dense__litv2_small")
    weights = det.det_state_dict(facts["state_dict"], facts["mul"])
    norms = {key: weights.pop(key) for key in list(weights) if key.startswith("norm")}
    model = timm.create_model("litv2_small", num_classes=0).eval()
    last = {"norm.weight": norms["norm3.weight"], "norm.bias": norms["norm3.bias"]}
    model.load_state_dict({litv2._our_key(key): value for key, value in weights.items()} | last)
    for given in facts["inputs"]:
        x = torch.from_numpy(det.det_input(given["shape"], given["seed"]))
        with torch.no_grad():
            maps = model.forward_intermediates(x, intermediates_only=True)
        for i, ours in enumerate(maps):
            ours = ours.permute(0, 2, 3, 1)
            ours = nn.functional.layer_norm(ours, ours.shape[3:], norms[f"norm{i}.weight"], norms[f"norm{i}.bias"])
            ours, stage = ours.permute(0, 3, 1, 2), given["stages"][f"out{i}"]
            assert list(ours.shape) == stage["shape"]
            difference = np.abs(sample(ours, 1024) - arrays[f"{given['name']}/out{i}"]).max()
            assert difference <= 1e-4 * stage["std"], (given["name"], i)


NORMED = {"agent_swin_tiny": (96, 192, 384, 768), "agent_pvt_tiny": ()}  # widths of the norms of each output


@pytest.mark.parametrize("variant", NORMED)
def test_maps_of_any_size_and_other_agents_equal_the_official_dense_backbones(variant, det, golden):
    facts, arrays = golden(f"agent_dense__{variant}")
    weights = det.det_state_dict(facts["state_dict"], facts["mul"])
    family = import_module(f"foveate.backbones.{variant.rpartition('_')[0]}")
    model = timm.create_model(variant, num_classes=0, **facts["arguments"]).eval()
    norms = {key: weights.pop(key) for key in list(weights) if key.startswith("norm")}
    own = {key: value for key, value in model.state_dict().items() if key.startswith("norm.")}
    model.load_state_dict(family.checkpoint_filter_fn(weights | own, model))
    for given in facts["inputs"]:
        x = torch.from_numpy(det.det_input(given["shape"], given["seed"]))
        with torch.no_grad():
            maps = model.forward_intermediates(x, intermediates_only=True)
        for i, ours in enumerate(maps):
            if NORMED[variant]:
                ours = ours.permute(0, 2, 3, 1)
                weight, bias = norms[f"norm{i}.weight"], norms[f"norm{i}.bias"]
                ours = nn.functional.layer_norm(ours, ours.shape[3:], weight, bias).permute(0, 3, 1, 2)
            stage = given["stages"][f"out{i}"]
            assert list(ours.shape) == stage["shape"]
            difference = np.abs(sample(ours, 1024) - arrays[f"{given['name']}/out{i}"]).max()
            assert difference <= 5e-5 * stage["std"], (given["name"], i, difference / stage["std"])


def test_images_that_are_not_square_are_cut_into_squares_by_agent_swin(det, official):
    """The classification code at 224 x 448: an A block sees two squares; also in a model built for that size."""
    facts, logits, model, _ = official("agent__agent_swin_tiny")
    given = next(given for given in facts["inputs"] if given["name"] == "224x448")
    built = timm.create_model("agent_swin_tiny", img_size=(224, 448)).eval()
    built.load_state_dict(model.state_dict())
    x = torch.from_numpy(det.det_input(given["shape"], given["seed"]))
    with torch.no_grad():
        for net in (model, built):
            assert differences({"logits": net(x)}, recorded(given, logits))["logits"] <= 5e-5
        seen_whole = timm.create_model("agent_swin_tiny", downstream_agent_shapes=((3, 3), (4, 4), (7, 7), (7, 7)))
        seen_whole.eval().load_state_dict(model.state_dict())
        assert differences({"logits": seen_whole(x)}, recorded(given, logits))["logits"] > 1e-3
