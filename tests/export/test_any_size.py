"""One file for every height and width: right at every size that the model takes, or refused at export."""

import os

import pytest
import torch
from small_models import KINDS, alive, check_outputs, small
from torch import nn

from foveate.export import ExportError, export_onnx, export_program
from foveate.export.sizes import _broken, any_size_program, least_side

FREE = ("batch", "size")
# odd, rectangular, tiny: smaller than a kernel, a window, a region; multiples of all strides and of none
SIZES = [(8, 8), (9, 30), (16, 16), (17, 23), (32, 32), (33, 47), (35, 35), (40, 96), (48, 100), (64, 64), (65, 64)]
SIZES += [(97, 33), (130, 70)]
LEAST_SIDES = {"vitrpb_small": 16, "agent_pvt_tiny:mixed": 16}  # px; a patch, and a pooled cell of the last stage
OF_SOME_SIZES = ("mixer_vit_tiny:nprf",)  # whose table of positions has an end
MIXERS = {  # that have no family of their own, or other keywords
    "agent": {"agents": 4},
    "attention": {},
    "circle": {"radius": 2, "proportional": True},
    "flow": {},
    "gated": {"gate": "linear"},
    "nprf": {"features": 8, "relative": False},
    "reversed": {},
    "routing": {"clusters": 2, "variant": "lucidrains", "share_qk": True},
    "sparsified": {"img_size": 64, "keep": 0.5, "basis": 8},
}
FEW = [(8, 9), (33, 47), (64, 64), (97, 40)]


@pytest.fixture(autouse=True, scope="module")
def few_threads(one_thread):
    """Use one thread: the models are tiny."""


def net(name: str, **kwargs) -> nn.Module:
    return alive(small(name, **({} if "fl" in name else {"num_classes": 5}), **kwargs))


def images(batch: int, size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(sum(size)))


def check(model: nn.Module, run, sizes) -> None:
    check_outputs(model, run, (images(batch, size) for size in sizes for batch in (1, 3)), noise=4)


def onnx_session(path):
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def test_a_program_of_neighborhoods_holds_for_every_size(tmp_path):
    model = net("nat_mini", dims=(32,), depths=(1,))
    path = export_program(model, tmp_path / "net.pt2", example=images(2, (64, 64)), dynamic=FREE)
    check(model, torch.export.load(path).module(), FEW)


def test_an_onnx_file_holds_for_every_size(tmp_path):
    pytest.importorskip("onnxscript")
    model = net("van_b0")
    path = export_onnx(model, tmp_path / "net.onnx", example=images(2, (64, 64)), dynamic=FREE)
    check(model, onnx_session(path), FEW)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [name for name in KINDS if name not in OF_SOME_SIZES])
def test_onnx_files_of_all_families_hold_for_every_size(name, tmp_path):
    model = net(name)
    path = export_onnx(model, tmp_path / "net.onnx", example=images(2, (64, 64)), dynamic=FREE)
    check(model, onnx_session(path), [size for size in SIZES if min(size) >= LEAST_SIDES.get(name, 0)])


@pytest.mark.slow
def test_a_program_of_mixed_heads_holds_for_every_size(tmp_path):
    """Positions are made in the graph, and pooled cells overlap where sizes do not divide."""
    sizes = {"dims": (16, 32), "heads": (2, 4), "sr_ratios": (4, 2), "shared": (2, 1), "routed": (0, 2)}
    model = net("moh_transnext_small_75", **sizes)
    path = export_program(model, tmp_path / "net.pt2", example=images(2, (64, 64)), dynamic=FREE)
    check(model, torch.export.load(path).module(), [(8, 9), (33, 47), (64, 64)])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mixer", MIXERS)
def test_onnx_files_of_all_mixers_hold_for_every_size(mixer, tmp_path):
    model = net("mixer_vit_tiny", **{"mixer": mixer, "dims": (16,) * 2, "depths": (1,) * 2, **MIXERS[mixer]})
    path = export_onnx(model, tmp_path / "net.onnx", example=images(2, (64, 64)), dynamic=FREE)
    check(model, onnx_session(path), SIZES)


def test_every_mixer_is_among_the_cases():
    from foveate.attention_ops.mixers import MIXERS as KNOWN

    assert set(MIXERS) == set(KNOWN)


def test_a_table_of_positions_with_an_end_is_refused_with_the_models_words(tmp_path):
    model = net("mixer_vit_tiny:nprf", dims=(16,), depths=(1,))
    with pytest.raises(ExportError, match=r"does not take images of every size: Kernelized.* maps up to 32 x 32, got"):
        export_program(model, tmp_path / "net.pt2", example=images(2, (64, 64)), dynamic=FREE)
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_the_size_alone_may_be_free(tmp_path):
    import onnx

    path = export_onnx(net("eca_mobilenet_v2"), tmp_path / "net.onnx", example=images(1, (64, 64)), dynamic=("size",))
    sizes = [d.dim_param or d.dim_value for d in onnx.load(path).graph.input[0].type.tensor_type.shape.dim]
    assert sizes == [1, 3, "height", "width"]


def test_the_least_side_is_where_the_model_begins_to_take_images():
    x = torch.zeros(1, 3, 64, 64)
    assert (least_side(small("nat_mini"), x), least_side(small("vitrpb_small"), x)) == (8, 16)
    assert least_side(nn.Conv2d(3, 1, 5), x) == 5


class Fixed(nn.Module):
    """Takes maps of one size, as a ViT with learned positions does."""

    def forward(self, x):
        return x + torch.zeros(64, 64)


class Halves(nn.Module):
    """Takes every size; what it computes depends on the parity of the height."""

    def forward(self, x):
        return x.mean((2, 3)) if x.shape[2] % 2 else x.amax((2, 3))


class Squares(nn.Module):
    """Takes every size; treats squares in another way."""

    def forward(self, x):
        return x.mean((2, 3)) if x.shape[2] == x.shape[3] else x.amax((2, 3))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Fixed(), "does not take images of every size"),
        (Halves(), "could not export the model"),
        (Squares(), "could not export the model|cannot be exported for every size"),
    ],
    ids=["one size", "parity", "squares"],
)
def test_what_does_not_hold_for_every_size_is_refused(model, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        export_program(model, tmp_path / "net.pt2", example=torch.rand(2, 3, 64, 64), dynamic=FREE)
    assert os.listdir(tmp_path) == []


def test_an_assumption_about_both_sides_is_compared_with_many_sizes():
    tokens = "(L['x'].size()[2] // 8) * (L['x'].size()[3] // 8)"
    assert _broken([f"{tokens} >= 1"], 8) is None
    guard, size = _broken([f"{tokens} != 1"], 8)
    assert "!= 1" in guard and size == (8, 8)


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(ExportError, match="dynamic takes batch and size, got height"):
        export_onnx(net("eca_resnet18"), tmp_path / "net.onnx", dynamic=("height",))


def test_a_program_without_free_batch_keeps_the_examples(tmp_path):
    program = any_size_program(net("eca_resnet18"), images(2, (64, 64)), False)
    assert program.module()(images(2, (40, 56))).shape == (2, 5)
