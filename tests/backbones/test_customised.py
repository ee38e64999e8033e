"""What people do to timm models works on every model here too."""

from copy import deepcopy

import pytest
import timm
import torch
from small_models import KINDS, OF_TIMMS_CLASSES, SMALL, VITS, WITH_CLASS_TOKEN, alive, small
from torch import nn

every_small = pytest.mark.parametrize("name", SMALL)
X = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


every_small_with_batch_norms = pytest.mark.parametrize("name", [name for name in SMALL if batch_norms(small(name))])


@every_small_with_batch_norms
def test_a_batch_norm_without_running_statistics_uses_the_batch(name):
    model = alive(small(name, num_classes=5))
    expected = deepcopy(model)
    for norm in batch_norms(expected):
        norm.train()
    for norm in batch_norms(model):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    out, before = model(X), alive(small(name, num_classes=5))(X)
    torch.testing.assert_close(out, expected(X), rtol=1e-4, atol=1e-4)
    assert (out - before).abs().max() > 1e-3 * before.std()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(model(X), out, rtol=1e-4, atol=1e-4)


@every_small_with_batch_norms
def test_a_batch_norm_without_weight_and_bias_runs(name):
    model = alive(small(name, num_classes=5))
    for norm in batch_norms(model):
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)
    expected = model(X)
    for norm in batch_norms(model):
        norm.affine, norm.weight, norm.bias = False, None, None
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)


@every_small
def test_the_classifier_can_be_an_identity(name):
    model = alive(small(name))
    maps = model.forward_features(X)
    for head in ("head", "fc", "classifier"):
        if hasattr(model, head):
            setattr(model, head, nn.Identity())
    out = model(X)
    pooled = name in VITS or not hasattr(model, "head")
    torch.testing.assert_close(out, model.forward_head(maps, pre_logits=True) if pooled else maps)


@pytest.mark.parametrize("name", [name for name in SMALL if name not in (*VITS, *WITH_CLASS_TOKEN)])
def test_the_children_without_the_head_make_a_sequence(name):
    model = alive(small(name))
    expected = model.forward_features(X)
    if not hasattr(model, "head"):  # timm's ResNet and EfficientNet: pooling is a child of its own
        expected = model.global_pool(expected)
    out = nn.Sequential(*list(model.children())[:-1])(X)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def copy_weights(features, model):
    """Give a feature wrapper the weights of a model: their names differ in a prefix, and stages.0 may be stages_0."""
    weights = {key.replace(".", "_"): value for key, value in model.state_dict().items()}
    for key, tensor in features.state_dict().items():
        bare = key.removeprefix("model.").removeprefix("graph_module.").removeprefix("body.")
        tensor.copy_(weights[bare.replace(".", "_")])


OF_MAPS = [name for name in SMALL if name not in (*VITS, *WITH_CLASS_TOKEN)]
WRAPPERS = [(name, wrapper) for name in OF_MAPS for wrapper in ("list", "dict", "hook", "getter", "fx")]


@pytest.mark.parametrize("name", [name for name in SMALL if name in VITS])
@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "fx"])
def test_wrappers_that_would_take_tokens_for_maps_are_refused(name, feature_cls):
    with pytest.raises(ValueError, match=f"feature_cls of .* must be 'getter', got '{feature_cls}'"):
        small(name, features_only=True, feature_cls=feature_cls)


@pytest.mark.parametrize(("name", "feature_cls"), [*WRAPPERS, *((name, "getter") for name in VITS if name in SMALL)])
def test_every_feature_wrapper_of_timm_gives_the_same_maps(name, feature_cls):
    model = alive(small(name))
    expected = model.forward_intermediates(X, intermediates_only=True)
    features = small(name, features_only=True, out_indices=len(expected), feature_cls=feature_cls).eval()
    copy_weights(features, model)
    maps = features(X)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    assert len(maps) == len(expected)
    by_pixel = feature_cls != "getter" and getattr(model, "output_fmt", "NCHW") == "NHWC"
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours.permute(0, 3, 1, 2) if by_pixel else ours, theirs, rtol=1e-4, atol=1e-4)


@every_small
def test_a_first_convolution_for_another_number_of_channels_decides(name):
    model = alive(small(name, num_classes=5))
    path, first = next((path, m) for path, m in model.named_modules() if isinstance(m, nn.Conv2d))
    gray = nn.Conv2d(1, first.out_channels, first.kernel_size, first.stride, first.padding, bias=first.bias is not None)
    gray.weight.data, gray.bias = first.weight.data.sum(1, keepdim=True), first.bias
    expected = model(X[:, :1].expand(-1, 3, -1, -1))
    model.set_submodule(path, gray)
    torch.testing.assert_close(model(X[:, :1]), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match=r"expected input.* to have 1 channels, but got 3 channels"):
        model(X)


INSIDE_BLOCKS = ("mlp", "conv2", "conv_pwl", "self_attn")


@every_small
def test_features_with_gradient_checkpointing_run_blocks_again_for_the_same_gradients(name):
    grads, calls = [], []
    for enable in (False, True):
        model, runs = small(name, features_only=True).train(), []
        model.set_grad_checkpointing(enable)
        for path, module in model.named_modules():
            if path.split(".")[-1] in INSIDE_BLOCKS:
                module.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        sum(x.square().mean() for x in model(X)).backward()
        grads.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
        calls.append(len(runs))
    assert calls[1] == 2 * calls[0] > 0
    assert grads[0].keys() == grads[1].keys()
    for key in grads[0]:
        torch.testing.assert_close(grads[0][key], grads[1][key], rtol=1e-4, atol=1e-5, msg=key)


@every_small
@pytest.mark.parametrize("shape", [(2, 3, 0, 0), (2, 3, 64, 0), (2, 3, 0, 64), (3, 64, 64), (1, 2, 3, 64, 64)], ids=str)
def test_images_without_pixels_or_of_other_axes_are_refused(name, shape):
    model = small(name)
    for call in (model, model.forward_features, model.forward_intermediates):
        for mode in (torch.enable_grad, torch.no_grad):
            with mode(), pytest.raises(ValueError, match=r"must be \(B, C, H, W\) with sides of at least \d+ px, got "):
                call(torch.zeros(shape))


@pytest.mark.parametrize("name", KINDS)
def test_an_empty_batch_gives_no_logits(name):
    model = small(name, num_classes=5).eval()
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            assert model(torch.zeros(0, 3, 64, 64)).shape == (0, 5)


@every_small
def test_feature_indices_out_of_range_are_refused(name):
    model = small(name)
    maps = len(model.feature_info)
    words = f"must be the number of last feature maps, 1 to {maps}, or a sequence of maps from {-maps} to {maps - 1}"
    for indices in (maps + 1, 0, -1, (maps,), (0, -maps - 1), (), [0.5]):
        with pytest.raises(ValueError, match=f"indices {words}, got "):
            model.forward_intermediates(X, indices=indices)
        with pytest.raises(ValueError, match=f"indices {words}, got "):
            model.prune_intermediate_layers(indices)
    for feature_cls in ("getter",) if name in VITS else ("getter", "list"):
        with pytest.raises(ValueError, match=f"out_indices {words}, got "):
            small(name, features_only=True, out_indices=(maps,), feature_cls=feature_cls)
    assert len(small(name, features_only=True, out_indices=(0, -1))(X)) == 2
    assert len(small(name, features_only=True, out_indices=maps)(X)) == maps


def test_a_narrowed_model_of_timms_gives_features_with_gradient_checkpointing():
    model = timm.create_model("narrowed", of="test_vit", widths={}, features_only=True)
    model.set_grad_checkpointing()
    assert model.model.grad_checkpointing
    with pytest.raises(ValueError, match="out_indices must be"):
        timm.create_model("narrowed", of="test_vit", widths={}, features_only=True, out_indices=(99,))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in SMALL if name in OF_TIMMS_CLASSES])
def test_models_of_timms_classes_script_and_refuse_images_without_pixels(name):
    model = alive(small(name, num_classes=5))
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(X), model(X))
    with pytest.raises(Exception, match=r"must be \(B, C, H, W\) with sides of at least 1 px, got "):
        scripted(torch.zeros(1, 3, 0, 8))


@pytest.mark.parametrize("name", ["van_b0", *(name for name in SMALL if name in OF_TIMMS_CLASSES)])
def test_convolutional_models_are_traced_by_torch_fx(name):
    model = alive(small(name, num_classes=5))
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(X), model(X))
    called = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    layers = {path for path, m in model.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)}
    assert layers <= called
