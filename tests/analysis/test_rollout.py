"""Rollout against the product of the layers' matrices, and the models that it refuses."""

import pytest
import timm
import torch
from looking import calls_of, weights_by_definition
from small_models import alive, small

from foveate._errors import RequestError
from foveate.analysis import attention_rollout, layer_views
from foveate.attention_ops.local_queries import rollout_row

X = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
ISOTROPIC = ("gqa_vit_tiny", "vitrpb_small", "mixer_vit_tiny", "mixer_vit_tiny:circle", "quantizable_vit_tiny")


@pytest.fixture(autouse=True, scope="module")
def few_threads(one_thread):
    """Use one thread: the models are tiny."""


def matrices(model, image) -> list[torch.Tensor]:
    """The mean over heads of every call's weights by definition, rows divided by their sums: (N, N)."""
    found = []
    for call, out in calls_of(model, image):
        (weights,) = weights_by_definition(call, out).values()
        mean = weights[0].mean(0)
        found.append(mean / mean.sum(-1, keepdim=True))
    return found


@pytest.mark.parametrize("name", ISOTROPIC)
def test_rollout_equals_the_product_of_all_layers(name):
    model = alive(small(name))
    layers = matrices(model, X)
    view = attention_rollout(layer_views(model, X))
    rolled, eye = torch.eye(len(layers[0]), dtype=torch.float64), torch.eye(len(layers[0]), dtype=torch.float64)
    for layer in layers:
        rolled = (layer + eye) / 2 @ rolled
    found = view.weights()
    torch.testing.assert_close(found[0].double(), rolled, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))
    row = rollout_row([layer[None, None] for layer in reversed(layers)], row=3)  # of dual cross-attention
    torch.testing.assert_close(found[0, 3].double(), row[0], rtol=0, atol=1e-5)
    assert view.keys.is_placed and (view.op, view.heads) == ("attention rollout", 1)


def test_rollout_of_timms_vit_has_the_class_token():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=3, embed_dim=24, num_heads=3).eval()
    image = torch.randn(1, 3, 48, 48)
    view = attention_rollout(layer_views(model, image))
    row = rollout_row([layer[None, None] for layer in reversed(matrices(model, image))])
    torch.testing.assert_close(view.weights([0])[0].double(), row, rtol=0, atol=1e-5)
    assert view.keys.prefix == 1 and view.keys.size == (3, 3)


def test_rows_of_one_layer_may_come_from_two_calls():
    """Sparsifiner: the class token attends by itself."""
    model = alive(small("sparsifiner_deit_tiny"))
    view = attention_rollout(layer_views(model, X))
    rolled, eye = torch.eye(25, dtype=torch.float64), torch.eye(25, dtype=torch.float64)
    calls = [weights_by_definition(call, out)[""][0].mean(0) for call, out in calls_of(model, X)]
    assert [len(rows) for rows in calls] == [24, 1, 24, 1]
    for of_map, of_class in zip(calls[::2], calls[1::2], strict=True):
        rolled = (torch.cat([of_class, of_map]) + eye) / 2 @ rolled
    torch.testing.assert_close(view.weights()[0].double(), rolled, rtol=0, atol=1e-5)


def test_calls_without_a_module_are_layers_of_their_own():
    model = timm.create_model("dcal", of="vit_tiny_patch16_224", img_size=48, depth=2, embed_dim=24, num_heads=3).eval()
    image = torch.randn(1, 3, 48, 48)
    views = layer_views(model, image)
    found = attention_rollout(views[:2]).weights([0])[0]
    torch.testing.assert_close(found, model.tokens(image)[1].detach(), rtol=0, atol=1e-5)  # what DCAL itself computes
    with pytest.raises(RequestError, match=r"queries of local\.attn have no place on the map of model"):
        attention_rollout(views)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nat_mini",
            "wanted one map of tokens in all layers, stages.1.blocks.0.attn and stages.0.blocks",
        ),
        ("moh_transnext_small_75", "wanted one map of tokens in all layers"),
        ("van_b0", "no layer of the model attends"),
    ],
)
def test_models_that_merge_tokens_or_do_not_attend_are_refused(name, message):
    with pytest.raises(RequestError, match=message):
        attention_rollout(layer_views(alive(small(name)), X))
