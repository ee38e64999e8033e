"""An exported file is compared with its model, and a wrong one is refused."""

import copy
import dataclasses
import math

import pytest
import torch

from foveate.export import DisagreementError, ExportError, export_program, save_hub, verify
from foveate.export.agreement import compare_outputs


def change_one_layer(net) -> None:
    """By 1 % of one layer's weights: nothing a person would see."""
    with torch.no_grad():
        net.conv1[0].weight *= 1.01


def test_the_same_model_agrees(net, exported, images):
    agreement = verify(net, exported, images)
    assert agreement.largest_relative <= agreement.tolerance == 1e-4
    assert (agreement.top1, agreement.images, agreement.batch_sizes) == (1.0, 4, (1, 3))


def test_other_weights_are_refused(net, exported, images):
    change_one_layer(net)
    with pytest.raises(DisagreementError, match=rf"{exported.name} differs from the model by .* 0\.0001 is allowed"):
        verify(net, exported, images)


def test_the_tolerance_draws_the_line(net, exported, images):
    change_one_layer(net)
    agreement = verify(net, exported, images, tolerance=1.0)
    assert 1e-4 < agreement.largest_relative < 1.0


def test_the_difference_is_relative_to_the_spread_of_the_models_output(net, exported, images):
    with torch.no_grad():
        net.fc.bias += 0.5
    spread = net(images[:4]).std().item()
    agreement = verify(net, exported, images, tolerance=1e6)
    assert agreement.largest_absolute == pytest.approx(0.5, rel=1e-3)
    assert agreement.largest_relative == pytest.approx(0.5 / spread, rel=1e-3)


def test_top1_counts_images_with_the_same_class(net, exported, images):
    with torch.no_grad():
        was = net(images[:4]).argmax(1)
        other = (was.mode().values + 1) % 7
        net.fc.bias[other] += 100  # from now on the model always says this
    agreement = verify(net, exported, images, tolerance=1e6)
    assert agreement.top1 == (was == other).float().mean() < 1


def test_a_file_that_returns_not_a_number_is_refused(net, tmp_path, images):
    sound = copy.deepcopy(net)
    net.fc.bias.data[0] = torch.nan
    with pytest.raises(DisagreementError, match="differs from the model by nan"):
        verify(sound, export_program(net, tmp_path / "net.pt2", img_size=images.shape[2:]), images)


def test_not_a_number_in_any_of_several_outputs_is_refused():
    sound = torch.arange(12.0).view(4, 3)
    broken = torch.full_like(sound, torch.nan)
    for outputs in ([sound, broken], [broken, sound]):
        assert math.isnan(compare_outputs([sound, sound], outputs, (1, 3), 1e-4).largest_relative)


def test_a_model_that_returns_not_a_number_cannot_be_judged(net, exported, images):
    net.fc.bias.data[0] = torch.nan
    with pytest.raises(ExportError, match="constant or NaN"):
        verify(net, exported, images)


def test_float_noise_on_large_outputs_is_no_difference(net, tmp_path, images):
    net.fc.weight.data *= 1e6
    folder = save_hub(net, tmp_path / "hub")
    net.fc.weight.data *= 1 + 1e-6
    agreement = verify(net, folder, images)
    assert agreement.largest_absolute > agreement.tolerance > agreement.largest_relative


def test_an_output_that_is_one_constant_cannot_be_judged(net, exported, images):
    torch.nn.init.zeros_(net.fc.weight)
    torch.nn.init.zeros_(net.fc.bias)
    with pytest.raises(ExportError, match="constant or NaN"):
        verify(net, exported, images)


def test_too_few_images_are_refused(net, exported, images):
    with pytest.raises(ExportError, match=r"batches of \(1, 3\) need 4 images, got 3"):
        verify(net, exported, images[:3])


def test_another_shape_is_refused(net, exported, images):
    net.reset_classifier(5)
    with pytest.raises(DisagreementError, match=r"returns \[\(4, 7\)\], the model \[\(4, 5\)\]"):
        verify(net, exported, images)


def test_an_unknown_kind_of_file_is_refused(net, tmp_path, images):
    with pytest.raises(ExportError, match=r"wanted a file that ends in \.onnx, \.pt2"):
        verify(net, tmp_path / "net.engine", images)


def test_agreement_is_frozen(net, exported, images):
    with pytest.raises(dataclasses.FrozenInstanceError):
        verify(net, exported, images).top1 = 1.0
