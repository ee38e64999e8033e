"""Every weight that is drawn, in a picture or a page, is that of the definition from the layer's queries and keys."""

import numpy as np
import pytest
import timm
import torch
from looking import PROJECT_TOLERANCE, Page, calls_of, on_whole_layer, weights_by_definition
from small_models import FIXED, KINDS, ONE_SIZE, alive, small
from timm.layers import CecaModule, EcaModule, EffectiveSEModule, SEModule
from timm.layers.squeeze_excite import SqueezeExciteCl
from torch import nn

import foveate  # noqa: F401  (registers the models)
from foveate._errors import RequestError
from foveate._timm import SqueezeExcite
from foveate.analysis import AttentionView, GateView, attention_maps, draw_views, layer_views, write_page
from foveate.analysis.gates import FIELD

X = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
PICTURE = torch.randint(0, 256, (32, 48, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
WITHOUT = ("van", "eca", "ela", "ulsam")
ATTENDING = [name for name in (*KINDS, *FIXED) if not name.startswith(WITHOUT)]
HEAVY = ("fv_halonet26t", "fv_sehalonet33ts", "fv_eca_halonext26ts", "fv_haloregnetz_b")
ALIKE = (  # their attention is that of another kind
    *("nat_mini:dropout", "dinat_mini", "biformer_stl", "biformer_stl_nchw", "agent_pvt_tiny", "agent_cswin_tiny"),
    *("fv_davit_base_fl", "dependencyvit_tiny:positions"),
)
SLOW = (*HEAVY, *ALIKE)
TIMM = {
    "vit_tiny_patch16_224": {"img_size": (48, 64), "depth": 2, "embed_dim": 24, "num_heads": 3},
    "deit_tiny_distilled_patch16_224": {"img_size": 48, "depth": 2, "embed_dim": 24, "num_heads": 3},
    "vit_small_patch16_dinov3": {"depth": 1, "embed_dim": 24, "num_heads": 3, "img_size": 48},
    "samvit_base_patch16_224": {
        **{"img_size": 96, "depth": 2, "embed_dim": 24, "num_heads": 3},
        **{"window_size": 4, "global_attn_indexes": (1,)},
    },
    "swin_tiny_patch4_window7_224": {"img_size": (56, 84), "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)},
}


@pytest.fixture(autouse=True, scope="module")
def few_threads(one_thread):
    """Use one thread: the models are tiny."""


def passed(module, model, x):
    """What goes into a module of a model, and what comes out, before anything changes it in place."""
    seen = []
    with module.register_forward_hook(lambda _, args, out: seen.append((args[0], out.clone()))), torch.no_grad():
        model(x)
    return seen[0]


def picture_of(image):
    return torch.zeros(*image.shape[-2:], 3, dtype=torch.uint8)


def check_drawn(model, image, tmp_path):
    """Weights of every view, of the arrays of a picture, and of a page, against the definition."""
    views = [v for v in layer_views(model, image) if isinstance(v, AttentionView) and v.op != FIELD]
    wanted = []
    for call, out in calls_of(model, image):
        wanted += weights_by_definition(call, out).items()
    assert [v.branch.partition(" (call")[0].partition("(call")[0] for v in views] == [branch for branch, _ in wanted]
    write_page(picture_of(image), views, tmp_path / "page.html", budget_bytes=10**9)
    page = Page(tmp_path / "page.html")
    for number, (view, (_, of_windows)) in enumerate(zip(views, wanted, strict=True)):
        expected = on_whole_layer(of_windows).float()
        found = view.weights()
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=PROJECT_TOLERANCE, msg=view.title)
        numbers, stored = page.weights(number)
        assert numbers == list(range(found.shape[1])) and "note" not in page.views[number]
        largest = expected.amax(-1, keepdim=True).clamp(min=1).numpy()  # reversed and flow attention: above 1
        assert (np.abs(stored - expected.numpy()) <= 1.5 * PROJECT_TOLERANCE * largest).all(), view.title
        check_picture(view, expected, picture_of(image))


def check_picture(view, expected, picture):
    """The array of every panel is the row of the query, on the layer's map."""
    at = (picture.shape[1] * 0.7, picture.shape[0] * 0.3)
    if view.queries.is_placed and view.queries.at(*at) is None:  # dropped: another one
        row, col = view.queries.places[len(view.queries.places) // 2].tolist()
        at = ((col + 0.5) * view.queries.cell[1], (row + 0.5) * view.queries.cell[0])
    figure = draw_views(picture, [view], at)
    panels = [axis for axis in figure.axes if axis.get_title().startswith(view.title)]
    assert len(panels) == view.heads
    query = view.query_at(*at)
    for head, axis in enumerate(panels):
        drawn = np.ma.filled(axis.images[-1].get_array(), 0.0)
        if view.keys.is_placed:
            of_map = np.zeros(view.keys.size)
            rows, cols = view.keys.places[view.keys.prefix :].unbind(1)
            of_map[rows, cols] = expected[head, query, view.keys.prefix :]
        else:
            of_map = expected[head, query : query + 1] if view.queries.is_placed else expected[head]
        np.testing.assert_allclose(drawn, of_map, rtol=0, atol=PROJECT_TOLERANCE, err_msg=view.title)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in ATTENDING])
def test_what_is_drawn_of_every_family_equals_its_definition(name, tmp_path):
    model = alive(small(name)) if name in KINDS else small(name).eval()
    check_drawn(model, X if name in KINDS else torch.randn(1, 3, *FIXED[name]["img_size"]), tmp_path)


@pytest.mark.parametrize("name", TIMM)
def test_what_is_drawn_of_timms_models_equals_softmax(name, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **TIMM[name]).eval()
    size = TIMM[name]["img_size"]
    image = torch.randn(1, 3, *((size, size) if isinstance(size, int) else size))
    check_drawn(model, image, tmp_path)
    views = layer_views(model, image)
    assert all(view.keys.is_placed and view.queries.is_placed for view in views)


def test_windows_of_a_padded_map_lie_where_the_model_cut_them():
    model = alive(small("fv_davit_tiny"))  # 8 x 12 tokens in windows of 3 x 3: padded to 9 x 12
    view = next(v for v in layer_views(model, X) if v.op == "window_attention")
    assert (view.keys.size, view.keys.cell) == ((9, 12), (4.0, 4.0))
    query = view.query_at(4.0 * 4 + 1, 4.0 * 7 + 1)  # token (7, 4)
    assert view.queries.places[query].tolist() == [7, 4]
    seen = view.keys.places[(view.weights([query])[0, 0] > 0).nonzero().flatten()]
    assert {tuple(place) for place in seen.tolist()} == {(r, c) for r in (6, 7, 8) for c in (3, 4, 5)}


def test_shifted_windows_see_their_neighbors_on_the_image():
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=16, depths=(2,), num_heads=(2,))
    _, shifted = layer_views(model.eval(), torch.randn(1, 3, 56, 56))
    for x, rows in ((50, range(10, 14)), (30, range(3, 10))):  # past the shift the rolled map ends
        query = shifted.query_at(x, x)
        seen = shifted.keys.places[(shifted.weights([query])[0, 0] > 1e-30).nonzero().flatten()]
        assert set(seen[:, 0].tolist()) == set(rows) == set(seen[:, 1].tolist())


@pytest.mark.parametrize("query", [(0, 0), (5, 5), (13, 10), (15, 19)])
def test_windows_that_are_rolled_and_then_padded_see_what_the_block_reads(query):
    torch.manual_seed(0)
    sizes = {"img_size": (64, 80), "window_size": 7, "embed_dim": 16, "depths": (2,), "num_heads": (2,)}
    model = timm.create_model("swin_tiny_patch4_window7_224", **sizes).eval()  # 16 x 20 tokens, padded to 21 x 21
    image = torch.randn(1, 3, 64, 80)
    view, block = layer_views(model, image)[1], model.layers[0].blocks[1]
    before = passed(block, model, image)[0].requires_grad_()
    (grad,) = torch.autograd.grad(block(before)[0, query[0], query[1]].square().sum(), before)
    read = {tuple(place) for place in (grad[0].abs().sum(-1) > 1e-12).nonzero().tolist()}
    number = view.query_at(4 * query[1] + 1, 4 * query[0] + 1)
    assert view.queries.places[number].tolist() == list(query)
    seen = view.keys.places[(view.weights([number])[:, 0].sum(0) > 1e-20).nonzero().flatten()]
    assert {place for place in map(tuple, seen.tolist()) if place[0] < 16 and place[1] < 20} == read
    assert sorted(map(tuple, view.keys.places.tolist())) == [(r, c) for r in range(21) for c in range(21)]


def test_positions_of_rolled_and_padded_windows_are_those_of_the_view():
    sizes = {"img_size": (64, 80), "window_size": 7, "embed_dim": 16, "depths": (2,), "num_heads": (2,)}
    model, image = timm.create_model("swin_tiny_patch4_window7_224", **sizes).eval(), torch.randn(1, 3, 64, 80)
    shifted = attention_maps(model, image)[1]
    assert torch.equal(shifted.positions().flatten(0, 1), layer_views(model, image)[1].keys.places.double())


@pytest.mark.parametrize(
    ("name", "image", "wanted"),
    [
        ("nat_mini", (32, 48), {(8, 12), (4, 6)}),
        ("litv2_small:mixed", (32, 48), {(8, 12), (4, 6), (2, 3)}),
        ("agent_pvt_tiny:mixed", (32, 48), {(8, 12), (4, 6), (2, 3), (2, 2), (3, 3)}),
        ("fv_halonet_h0", (64, 96), {(16, 24), (8, 12), (4, 6), (2, 3)}),
        ("sparsifiner_deit_tiny", (32, 48), {(4, 6), (0, 0)}),
        ("gqa_vit_tiny", (30, 50), {(4, 7)}),
        ("dependencyvit_tiny", (32, 48), {(4, 6)}),
        ("mixer_vit_tiny:routing", (33, 50), {(5, 7)}),
        ("agent_cswin_tiny:stripes", (32, 48), {(8, 12), (4, 6), (4, 3), (2, 4), (2, 2), (3, 6), (8, 2)}),
    ],
)
def test_queries_and_keys_have_their_place(name, image, wanted):
    views = layer_views(alive(small(name)), torch.randn(1, 3, *image))
    found = {grid.size for v in views if isinstance(v, AttentionView) for grid in (v.queries, v.keys)}
    assert found <= wanted | {(0, 0)} or name.startswith("agent_cswin"), found
    assert any(size != (0, 0) for size in found) and all(
        v.keys.is_placed for v in views if isinstance(v, AttentionView) and v.op != "channel_attention"
    )


def test_tokens_are_as_large_as_the_model_makes_them():
    view = layer_views(alive(small("gqa_vit_tiny")), torch.randn(1, 3, 30, 50))[0]  # padded to 32 x 56
    assert view.keys.size == (4, 7) and view.keys.cell == (8.0, 8.0)
    assert view.query_at(49, 29) == 1 + 3 * 7 + 6 and view.queries.prefix == 1


def test_a_pooled_key_covers_its_tokens():
    views = layer_views(alive(small("litv2_small:mixed")), X)
    low = next(v for v in views if v.branch == "low" and v.keys.size != v.queries.size)
    assert low.keys.cell == (2 * low.queries.cell[0], 2 * low.queries.cell[1])


@pytest.mark.parametrize("name", ["sparsifiner_deit_tiny", "dependencyvit_tiny"])
def test_tokens_that_are_left_lie_where_they_lay_before(name, tmp_path):
    change = {"token_rate": 0.5} if name.startswith("sparsifiner") else {"cpe_depth": 0}
    model = alive(small(name, pruning_blocks=(0, 1), depth=3, **change))
    views = [view for view in layer_views(model, X) if isinstance(view, AttentionView)]
    prefix = int(name.startswith("sparsifiner"))
    states, (x, size) = [], model.embed(X)
    state = model.start(x)
    for block in model.blocks:  # the numbers of the tokens that go into each block
        states.append(state[-1][0])
        state = model.step(block, state, size)
    assert len({len(numbers) for numbers in states}) == 3
    for block, numbers in enumerate(states):
        for view in (v for v in views if v.layer == f"blocks.{block}.attn"):
            rows, cols = view.keys.places[prefix:].unbind(1)
            assert view.keys.size == (4, 6) and (rows * 6 + cols).tolist() == numbers.tolist()
    check_drawn(model, X, tmp_path)


def test_tokens_that_a_model_reorders_have_no_place():
    model = timm.create_model("hiera_tiny_224", embed_dim=16, num_heads=1, stages=(1, 1, 1, 1), num_classes=3)
    assert not any(view.keys.is_placed for view in layer_views(model.eval(), torch.randn(1, 3, 224, 224)))


def test_maps_cut_into_squares_and_rolled_lie_on_the_image():
    model = alive(small("agent_swin_tiny", img_size=64, window_size=8, attn_type="AA"))  # 16 x 16 tokens, squares of 8
    whole = next(v for v in layer_views(model, torch.randn(1, 3, 64, 64)) if v.layer == "stages.0.blocks.0.attn")
    assert whole.queries.size == (16, 16)
    query = whole.query_at(4 * 9, 4 * 3)
    seen = whole.keys.places[(whole.weights([query])[0, 0] > 0).nonzero().flatten()]
    assert (int(seen[:, 0].min()), int(seen[:, 0].max()), int(seen[:, 1].min()), int(seen[:, 1].max())) == (0, 7, 8, 15)


# Gates


def test_mixtures_of_heads_show_their_gates():
    model = alive(small("moh_transnext_small_75:aggregated"))
    calls = [call for call, _ in calls_of(model, X)]
    gates = [v for v in layer_views(model, X) if isinstance(v, GateView)]
    assert [v.branch for v in gates] == ["gates"] * len(calls)
    for view, call in zip(gates, calls, strict=True):
        torch.testing.assert_close(view.values, call.arguments["gates"][0].permute(2, 0, 1))
        assert view.axes == ("y", "x") and view.names[0] == "head 0"


def test_messages_and_gates_of_tokens_are_shown_where_the_tokens_lie():
    model = alive(small("dependencyvit_tiny"))
    (call, _), *_ = calls_of(model, X)
    view = next(v for v in layer_views(model, X) if v.branch == "messages")
    torch.testing.assert_close(view.values.flatten(1), call.arguments["weight"][0].T)
    assert view.values.shape[1:] == (4, 6)
    gate = next(v for v in layer_views(alive(small("quantizable_vit_tiny")), X) if isinstance(v, GateView))
    assert gate.values.shape == (2, 4, 6)


@pytest.mark.parametrize("name", ["eca_resnet18", "eca_mobilenet_v2", "fv_sehalonet33ts"])
def test_channel_gates_are_what_the_channels_are_multiplied_with(name):
    model = alive(small(name))
    x = torch.randn(1, 3, 64, 64)
    views = [v for v in layer_views(model, x) if v.op == "channel gate"]
    modules = dict(model.named_modules())
    for view in views:
        seen = []
        with modules[view.layer].register_forward_hook(
            lambda _, args, out, seen=seen: seen.append((args[0], out.clone()))
        ):
            with torch.no_grad():
                model(x)
        before, after = seen[0]
        assert view.values.shape == (1, 1, before.shape[1]) and view.axes == ("", "channel")
        torch.testing.assert_close(before * view.values[0, 0][:, None, None], after, rtol=1e-4, atol=1e-5)
    assert views


@pytest.mark.parametrize("kind", [SEModule, EffectiveSEModule, SqueezeExcite, SqueezeExciteCl, EcaModule, CecaModule])
def test_gates_of_timms_layers_are_what_the_channels_are_multiplied_with(kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind(16)).eval()
    last = kind is SqueezeExciteCl
    x = torch.randn(1, 8, 12, 16) if last else torch.randn(1, 16, 8, 12)
    (view,) = layer_views(model, x)
    gate = view.values[0, 0] if last else view.values[0, 0][:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(x * gate, model(x))


def test_gates_of_timms_mobile_networks_are_found():
    model = timm.create_model("mobilenetv3_small_050", num_classes=3).eval()
    assert {view.op for view in layer_views(model, X)} == {"channel gate"}


def test_gates_of_rows_and_columns_are_what_the_map_is_multiplied_with():
    model = alive(small("ela_resnet18_b"))
    x = torch.randn(1, 3, 64, 96)
    rows, cols = [v for v in layer_views(model, x) if v.op == "strip gate"][:2]
    assert (rows.branch, cols.branch, rows.axes, cols.axes) == (
        "rows", "columns", ("channel", "row"), ("channel", "column"),
    )  # fmt: skip
    seen = []
    with model.get_submodule(rows.layer).register_forward_hook(
        lambda _, args, out: seen.append((args[0], out.clone()))
    ):
        with torch.no_grad():
            model(x)
    before, after = seen[0]
    torch.testing.assert_close(before * (rows.values[..., None] * cols.values[:, :, None]), after, rtol=1e-4, atol=1e-5)


def test_subspace_maps_are_distributions_on_the_image():
    model = alive(small("ulsam_mobilenetv1"))
    views = layer_views(model, torch.randn(1, 3, 64, 96))
    assert {v.op for v in views} == {"subspace gate"}
    for view in views:
        torch.testing.assert_close(view.values.sum((1, 2)), torch.ones(view.heads))
        assert view.axes == ("y", "x") and view.cell[0] == view.cell[1]


def test_the_field_of_a_large_kernel_is_its_gradient():
    model = alive(small("van_b0"))
    x = torch.randn(1, 3, 32, 48)
    view = next(v for v in layer_views(model, x) if v.op == FIELD)
    layer = model.get_submodule(view.layer)
    before, _ = passed(layer, model, x)
    jacobian = torch.func.jacrev(lambda t: layer(t).sum(1).flatten())(before)[:, 0]  # (queries, C, H, W)
    torch.testing.assert_close(view.weights()[0], jacobian.norm(dim=1).flatten(1), rtol=1e-4, atol=1e-6)
    query = view.query_at(24, 16)
    row = view.keys.on_map(view.weights([query]))[0, 0]
    assert (row > 0).sum() > 60 and row.argmax() == query  # 21 x 21 tokens and beyond, cut at the border


def test_ninformers_gates_depend_on_all_tokens():
    torch.manual_seed(0)
    name = "ninformer"
    model = timm.create_model(name, img_size=(16, 24), **ONE_SIZE[name]).eval()
    x = torch.randn(1, 3, 16, 24)
    gate, field = layer_views(model, x)[:2]
    assert isinstance(gate, GateView) and gate.values.shape == (1, 4, 6) and field.op == FIELD
    block = model.stages[0].blocks[0]
    tokens, out = passed(block.mixer, model, x)
    torch.testing.assert_close(gate.values.flatten(), out[0].abs().mean(1))
    jacobian = torch.func.jacrev(lambda t: block.mixer(t).sum(2).flatten())(tokens)[:, 0]  # (queries, N, C)
    torch.testing.assert_close(field.weights()[0], jacobian.norm(dim=2), rtol=1e-4, atol=1e-6)
    assert (field.weights() > 0).all()


def test_attention_pooling_shows_the_weights_of_the_tokens():
    model = timm.create_model("pooled", of="nat_mini", pool="lama", heads=2, **KINDS["nat_mini"])
    view = layer_views(alive(model), X)[-1]
    assert view.op == "attention pooling" and view.values.shape == (2, 4, 6)
    torch.testing.assert_close(view.values.sum((1, 2)), torch.ones(2))


# Calls of one module, refusals


def test_calls_outside_of_their_modules_are_told_apart():
    model = timm.create_model("dcal", of="vit_tiny_patch16_224", img_size=48, depth=2, embed_dim=24, num_heads=3)
    titles = [view.title for view in layer_views(model.eval(), torch.randn(1, 3, 48, 48))]
    assert titles == ["model", "model (call 2)", "local.attn"]


def test_a_model_without_attention_and_gates_is_refused():
    with pytest.raises(RequestError, match="saw neither attention nor gates in any layer of ResNet"):
        layer_views(timm.create_model("test_resnet"), X)
    model = alive(small("nat_mini"))
    with pytest.raises(RequestError, match="saw neither attention nor gates in layers stem of Nat"):
        layer_views(model, X, layers=["stem", "stages.0.blocks.0.attn"])
    with pytest.raises(RequestError, match=r"wanted one image \(1, C, H, W\), got \(2, 3, 32, 48\)"):
        layer_views(model, X.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="has queries 0 to 95, got"):
        layer_views(model, X)[0].weights([96])


@pytest.mark.parametrize("name", ["nat_mini", "van_b0"])
def test_models_of_low_precision_give_weights_in_float32(name):
    view = layer_views(alive(small(name)).bfloat16(), X.bfloat16())[0]
    assert view.weights([5]).dtype == torch.float32 and view.weights([5]).isfinite().all()


def test_weights_that_are_not_finite_are_refused():
    model = alive(small("nat_mini"))
    with torch.no_grad():
        model.stages[0].blocks[0].attn.qkv.weight.fill_(torch.nan)
    with pytest.raises(RequestError, match=r"stages\.0\.blocks\.0\.attn has weights that are not finite"):
        layer_views(model, X)[0].weights()


def test_looking_leaves_no_hooks_and_no_mode():
    model = alive(small("van_b0")).train()
    layer_views(model, X)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and model.training
