"""CLEAR's layers against the authors' outputs: discs, cells, proportional scale, rotary tables, text."""

import math

import pytest
import recorded
import torch

from foveate.attention_ops import CircleAttention, JointCircleAttention, circle_attention
from foveate.attention_ops.circle_layer import axial_rotary


def packed(weights: dict, names: tuple[str, str, str], ours: str) -> dict:
    return {
        f"{ours}.{part}": torch.cat([weights[f"{name}.{part}"] for name in names]) for part in ("weight", "bias")
    }  # fmt: skip


def renamed(weights: dict) -> dict:
    found = packed(weights, ("to_q", "to_k", "to_v"), "qkv")
    names = {"norm_q": "q_norm", "norm_k": "k_norm", "norm_added_q": "text_q_norm", "norm_added_k": "text_k_norm"}
    names |= {"to_out.0": "proj", "to_add_out": "text_proj"}
    for theirs, ours in names.items():
        found |= {f"{ours}.{p}": weights[f"{theirs}.{p}"] for p in ("weight", "bias") if f"{theirs}.{p}" in weights}
    if "add_q_proj.weight" in weights:
        found |= packed(weights, ("add_q_proj", "add_k_proj", "add_v_proj"), "text_qkv")
    if "processor.spatial_weight" in weights:
        found["cell_weight"] = weights["processor.spatial_weight"][0, 0, 0, :, 0, :, 0]
    return found


def by_their_names(net, case: dict) -> dict:
    """Our gradients as the authors' parameters."""
    ours = {name: p.grad for name, p in net.named_parameters()}
    found = {}
    for theirs in case["grads"]:
        name, _, part = theirs.rpartition(".")
        if name in ("to_q", "to_k", "to_v"):
            found[theirs] = ours[f"qkv.{part}"].chunk(3)[("to_q", "to_k", "to_v").index(name)]
        elif name.startswith("add_"):
            of_text = ("add_q_proj", "add_k_proj", "add_v_proj")
            found[theirs] = ours[f"text_qkv.{part}"].chunk(3)[of_text.index(name)]
        elif theirs == "processor.spatial_weight":
            found[theirs] = ours["cell_weight"][None, None, None, :, None, :, None]
    names = {"norm_q": "q_norm", "norm_k": "k_norm", "norm_added_q": "text_q_norm", "norm_added_k": "text_k_norm"}
    for theirs, mine in ({**names, "to_out.0": "proj", "to_add_out": "text_proj"}).items():
        found |= {f"{theirs}.{p}": ours[f"{mine}.{p}"] for p in ("weight", "bias") if f"{mine}.{p}" in ours}
    return found


def test_layers_equal_the_authors_with_every_gradient(det, golden):
    cases, arrays = golden("module__clear")
    for name, case in cases.items():
        ctor = case["ctor"]
        options = {
            "radius": ctor["window_size"], "down_factor": ctor["down_factor"], "qk_norm": ctor["qk_norm"] is not None,
            "proportional": ctor["proportional_attention"],
        }  # fmt: skip
        size, text = (ctor["height"], ctor["width"]), ctor["text_length"]
        joint = any(key.startswith("add_q_proj") for key, *_ in case["state_dict"])
        if joint:
            net = JointCircleAttention(ctor["dim"], ctor["heads"], **options)
        else:
            net = CircleAttention(
                ctor["dim"], ctor["heads"], map_size=size, prefix_tokens=text, proj=False, **options
            )  # fmt: skip
        recorded.load(net, case, det, renamed)
        rotary = None if ctor["rope_axes_dim"] is None else axial_rotary(size, tuple(ctor["rope_axes_dim"]), text)
        x = recorded.given(case, det)
        if joint:
            image, of_text = net(x[:, text:], x[:, :text], size, rotary)
            out = torch.cat([of_text, image], 1)
        else:
            out = net(x, size, rotary)
        assert recorded.off(out, arrays[f"{name}__out"]) < 2e-5, name
        assert math.isclose(net.scale(x.shape[1]), case["scale"], rel_tol=1e-6), name
        recorded.backward(out, det)
        assert recorded.wrong_gradients(by_their_names(net, case), case, det) == [], name


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_text_and_cells_change_what_every_query_gets(impl):
    q, k, v = torch.randn(3, 1, 4, 6, 2, 8, dtype=torch.float64).unbind(0)
    text = torch.randn(1, 3, 2, 8, dtype=torch.float64)
    plain = circle_attention(q, k, v, 2, impl=impl)
    for more in ({"text_k": text, "text_v": text}, {"cell_weight": torch.full((2, 3), 1 / 6, dtype=torch.float64)}):
        out = circle_attention(q, k, v, 2, **more, impl=impl)
        assert ((out - plain).abs().amax((-1, -2)) > 1e-6).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cell_weight": torch.zeros(3, 2)}, r"cells of 3 x 2 must divide the map \(4, 6\)"),
        ({"cell_weight": torch.zeros(4)}, r"cell_weight must be \(rows, columns\), got shape \(4,\)"),
        ({"text_k": torch.zeros(1, 3, 2, 8)}, "text_k and text_v must be given together"),
        (
            {"text_k": torch.zeros(1, 3, 2, 7), "text_v": torch.zeros(1, 3, 2, 8)},
            r"text_k must be \(1, 'T', 2, 8\) as q, got \(1, 3, 2, 7\)",
        ),
        (
            {"text_k": torch.zeros(1, 3, 2, 8), "text_v": torch.zeros(1, 2, 2, 8)},
            r"text_v must be \(1, 3, 2, 8\), got \(1, 2, 2, 8\)",
        ),
    ],
)
def test_bad_text_and_cells_are_refused_by_name(changes, words):
    zeros = torch.zeros(1, 4, 6, 2, 8)
    with pytest.raises(ValueError, match=f"circle_attention: {words}"):
        circle_attention(zeros, zeros, zeros, 2, **changes)
