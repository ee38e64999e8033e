"""Pictures by their structure: panels, titles, labels, and the arrays in them."""

import numpy as np
import pytest
import torch
from small_models import alive, small

from foveate._errors import RequestError
from foveate.analysis import (
    GateView,
    draw_profiles,
    draw_views,
    head_effects,
    head_profiles,
    layer_views,
    write_figure,
)

X = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
PICTURE = torch.randint(0, 256, (32, 48, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(autouse=True, scope="module")
def few_threads(one_thread):
    """Use one thread: the models are tiny."""


@pytest.fixture(scope="module")
def views():
    return layer_views(alive(small("nat_mini")), X)


def panels(figure):
    return [axis for axis in figure.axes if axis.get_title()]


def bars(figure):
    return [axis for axis in figure.axes if not axis.get_title()]


def test_a_layer_has_a_panel_for_the_image_and_one_for_every_head(views):
    figure = draw_views(PICTURE, [views[1]], (20, 10))
    first, *heads = panels(figure)
    assert first.get_title() == "query at x 20, y 10"
    np.testing.assert_array_equal(first.images[0].get_array(), PICTURE.numpy())
    assert [axis.get_title() for axis in heads] == [
        f"stages.1.blocks.0.attn\nneighborhood_attention, head {i}" for i in (0, 1)
    ]
    for axis in (first, *heads):
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("x, px", "y, px")
        assert (axis.lines[0].get_xdata()[0], axis.lines[0].get_ydata()[0]) == (20, 10)
        assert (axis.get_xlim(), axis.get_ylim()) == ((0, 48), (32, 0))
    assert [bar.get_ylabel() for bar in bars(figure)] == ["probability"] * 2
    for i, axis in enumerate(heads):
        drawn, (image, overlay) = views[1].weights([views[1].query_at(20, 10)])[i, 0], axis.images
        of_map = views[1].keys.on_map(drawn)
        np.testing.assert_allclose(np.ma.filled(overlay.get_array(), 0), of_map, atol=1e-7)
        assert overlay.get_array().mask.sum() == of_map.numel() - 9  # 3 x 3 keys are seen
        assert overlay.get_extent() == [0, 48, 32, 0] == image.get_extent()
        assert overlay.get_clim() == (0, pytest.approx(float(drawn.max())))


def test_several_layers_have_a_panel_each_with_the_mean_or_the_head(views):
    figure = draw_views(PICTURE, views)
    assert len(panels(figure)) == 1 + len(views)
    for axis, view in zip(panels(figure)[1:], views, strict=True):
        mean = view.keys.on_map(view.weights([view.query_at(24, 16)]).mean(0)[0])
        np.testing.assert_allclose(np.ma.filled(axis.images[-1].get_array(), 0), mean, atol=1e-7)
        assert axis.get_title().endswith("mean over heads" if view.heads > 1 else "head 0")
    of_head = draw_views(PICTURE, views, head=1)
    assert len(panels(of_head)) == 1 + sum(view.heads > 1 for view in views)
    assert all("head 1" in axis.get_title() for axis in panels(of_head)[1:])


def test_class_tokens_are_a_number_in_the_title():
    view = layer_views(alive(small("gqa_vit_tiny")), X)[0]
    figure = draw_views(PICTURE, [view], (1, 1), head=0)
    weight = view.weights([view.query_at(1, 1)])[0, 0, 0]
    assert panels(figure)[1].get_title().endswith(f"1 tokens before the map: {weight:.3f}")


def test_channels_are_drawn_as_a_matrix():
    view = next(v for v in layer_views(alive(small("fv_davit_tiny")), X) if v.op == "channel_attention")
    axis = panels(draw_views(PICTURE, [view]))[1]
    np.testing.assert_allclose(axis.images[0].get_array(), view.weights()[0], atol=1e-7)
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("key channel", "query channel")


def test_gates_are_bars_matrices_or_maps():
    gates = [v for name in ("eca_resnet18", "ela_resnet18_b", "ulsam_mobilenetv2") for v in layer_views(
        alive(small(name)), X) if isinstance(v, GateView)]  # fmt: skip
    by_op = {view.op: view for view in gates}
    bar = panels(draw_views(PICTURE, [by_op["channel gate"]]))[1]
    heights = [patch.get_height() for patch in bar.patches]
    np.testing.assert_allclose(heights, by_op["channel gate"].values[0, 0], atol=1e-6)
    assert bar.get_xlabel() == "channel" and bar.get_ylabel() == "gate"
    strip = panels(draw_views(PICTURE, [by_op["strip gate"]]))[1]
    np.testing.assert_allclose(strip.images[0].get_array(), by_op["strip gate"].values[0], atol=1e-6)
    assert (strip.get_xlabel(), strip.get_ylabel()) == ("column", "channel")
    figure = draw_views(PICTURE, [by_op["subspace gate"]])
    assert [a.get_title().split(", ")[-1] for a in panels(figure)[1:]] == [f"group {i}" for i in range(4)]
    assert panels(figure)[1].get_xlabel() == "x, px"


def test_a_query_that_was_dropped_is_told_in_the_title():
    model = alive(small("dependencyvit_tiny", pruning_blocks=(0,), cpe_depth=0))
    last = next(v for v in layer_views(model, X) if v.layer == "blocks.1.attn" and not v.branch)
    left = {tuple(place) for place in last.queries.places.tolist()}
    row, col = next((r, c) for r in range(4) for c in range(6) if (r, c) not in left)
    figure = draw_views(PICTURE, [last], (8 * col + 1, 8 * row + 1), head=0)
    assert panels(figure)[1].get_title().endswith("the query was dropped before") and not bars(figure)


def test_padding_that_is_attended_lies_outside_of_the_image():
    view = next(v for v in layer_views(alive(small("fv_davit_tiny")), X) if v.op == "window_attention")
    axis = panels(draw_views(PICTURE, [view], head=0))[1]
    assert axis.get_ylim() == (36, 0) and axis.images[0].get_extent() == [0, 48, 32, 0]


def test_a_picture_is_written_whole(views, tmp_path):
    figure = draw_views(PICTURE, views[:1])
    write_figure(figure, tmp_path / "look.png")
    assert (tmp_path / "look.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(FileNotFoundError):
        write_figure(figure, tmp_path / "gone" / "look.png")


def test_what_cannot_be_drawn_is_refused(views, monkeypatch):
    with pytest.raises(RequestError, match=r"0 <= x < 48 and 0 <= y < 32, got 3,32"):
        draw_views(PICTURE, views, (3, 32))
    with pytest.raises(RequestError, match="wanted a head from 0 to 1, got 7"):
        draw_views(PICTURE, views, head=7)
    with pytest.raises(RequestError, match="got no view"):
        draw_views(PICTURE, [])
    with pytest.raises(RequestError, match="at most 144 panels"):
        draw_views(PICTURE, views * 50)
    monkeypatch.setattr("foveate.analysis.drawing.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r'need matplotlib: pip install "foveate\[look\]"'):
        draw_views(PICTURE, views)


def test_profiles_are_plotted_by_layer():
    model = alive(small("moh_transnext_small_75:aggregated", num_classes=5))
    profiles = head_profiles(model, X)
    effects = head_effects(model, [(X, torch.tensor([1]))])
    figure = draw_profiles(profiles, effects)
    distance, entropy, importance = figure.axes
    labels = ["mean distance, tokens", "entropy, nats", "importance, nats"]
    assert [axis.get_ylabel() for axis in figure.axes] == labels
    points = entropy.collections[0].get_offsets()
    expected = [(i, value) for i, one in enumerate(profiles) for value in one.profile.entropy[0].tolist()]
    np.testing.assert_allclose(points, expected)
    np.testing.assert_allclose(
        entropy.lines[0].get_ydata(), [one.profile.entropy.mean() for one in profiles], rtol=1e-9
    )
    names = [f"{one.layer} {one.branch}".strip() for one in profiles]
    assert [t.get_text() for t in distance.get_xticklabels()] == names
    np.testing.assert_allclose(importance.collections[0].get_offsets()[:, 1], [e.divergence for e in effects])
    assert len(draw_profiles(profiles).axes) == 2
    with pytest.raises(RequestError, match="got no profile"):
        draw_profiles([])
