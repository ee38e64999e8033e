"""Sparsifiner's training phases, by the key distill.phase of a recipe."""

import pytest
import timm
import torch

from foveate.train import TrainError, load_recipe, read_scalars, train
from foveate.train.checkpoints import net_weights, read_checkpoint
from foveate.train.images import seed_everything
from foveate.train.model import Classifier, build_net
from foveate.train.phases import start_phase
from foveate.train.recipe import recipe_data
from foveate.train.teacher import Teacher

SIZES = {"img_size": 28, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
DATA = {"img_size": 28, "crop_pct": 1.0}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A ViT as a recipe would train it, with weights that are not near zero."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    recipe = load_recipe(
        {
            "model": {"name": "vit_tiny_patch16_224", "num_classes": 3, **SIZES},
            "data": {"img_size": 28},
            "optimizer": {"lr": 1e-3},
            "schedule": {"epochs": 1},
        }
    )
    torch.manual_seed(5)
    net = build_net(recipe)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    weights = {f"net.{key}": value for key, value in net.state_dict().items()}
    torch.save({"meta": {"epoch": 1, "recipe": recipe_data(recipe)}, "state_dict": weights}, path)
    return {"teacher": "vit_tiny_patch16_224", "checkpoint": str(path)}


@pytest.fixture
def run(make_recipe, tmp_path):
    """Return a function that trains one epoch of a tiny Sparsifiner, and returns result and last record."""

    def go(name, **changes):
        model = {"name": "sparsifiner_deit_tiny", **SIZES, **changes.pop("model", {})}
        recipe = make_recipe(model=model, data=DATA, **{"schedule": {"epochs": 1}, **changes})
        result = train(recipe, work_dir=tmp_path / name)
        return result, read_scalars(result.log)[-1]

    return go


def moved(result, recipe) -> set[str]:
    """Names of the weights that a run has changed."""
    seed_everything(0)
    start = build_net(load_recipe(recipe)).state_dict()
    trained = net_weights(read_checkpoint(result.last_checkpoint))
    return {name for name, value in trained.items() if not torch.equal(value, start[name])}


def test_each_phase_trains_its_part_by_a_loss_of_its_own(run, teacher, make_recipe):
    losses = [run("none", distill=teacher)[1]["train_loss"]]
    recipe = make_recipe(model={"name": "sparsifiner_deit_tiny", **SIZES}, data=DATA)
    for phase in (1, 2):
        result, line = run(str(phase), distill=teacher | {"phase": phase})
        losses.append(line["train_loss"])
        names = moved(result, recipe)
        assert names and all((".mask_predictor." in name) == (phase == 1) for name in names)
        assert "val_top1" in line
    assert len(set(losses)) == 3


def test_the_predictors_learn_the_teachers_matrices(run, teacher):
    changes = {"distill": teacher | {"phase": 1}, "optimizer": {"lr": 0.03, "weight_decay": 0.0}}
    result, line = run("longer", schedule={"epochs": 6}, **changes)
    assert line["train_loss"] < 0.9 * read_scalars(result.log)[0]["train_loss"]


@pytest.mark.parametrize("changes", [
    {"augment": {"mixup": 0.5, "smoothing": 0.1}}, {"ema": 0.5}, {"precision": "bf16"}, {"accumulate": 2},
    {"model": {"token_rate": 0.7, "pruning_blocks": (0,)}}, {"engine": {"channels_last": True}},
    {"loss": {"kind": "bce"}}, {"engine": {"grad_checkpointing": True}},
], ids=str)  # fmt: skip
def test_phase_2_works_with_other_keys(run, teacher, changes):
    assert run("other", distill=teacher | {"phase": 2}, **changes)[1]["train_loss"] > 0


def test_what_was_frozen_stays_frozen(run, teacher, make_recipe):
    result, _ = run("frozen", model={"freeze": ("patch_embed.*",)}, distill=teacher | {"phase": 2})
    names = moved(result, make_recipe(model={"name": "sparsifiner_deit_tiny", **SIZES}, data=DATA))
    assert names and not any(name.startswith(("patch_embed.",)) or ".mask_predictor." in name for name in names)


def test_the_teacher_sees_images_by_its_own_mean_and_deviation(teacher, make_recipe):
    changes = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    recipes = [
        load_recipe(
            make_recipe(
                model={"name": "sparsifiner_deit_tiny", **SIZES}, data=DATA | more, distill=teacher | {"phase": 1}
            )
        )
        for more in ({}, changes)
    ]
    x = torch.rand(2, 3, 28, 28)
    teachers = [Teacher(recipe, recipe.distill, torch.device("cpu")) for recipe in recipes]
    torch.testing.assert_close(teachers[0].normalized(x), x)
    pixels = x * teachers[1].std + teachers[1].mean
    torch.testing.assert_close(teachers[1].normalized(x), (pixels - teachers[0].mean) / teachers[0].std)
    torch.manual_seed(0)
    net = build_net(recipes[0])
    start_phase(net, recipes[0])
    losses = [Classifier(r, net, t)(x, torch.tensor([0, 1]), "loss")["loss"] for r, t in zip(recipes, teachers)]  # noqa: B905
    assert not torch.allclose(*losses)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": {"weight": 0.7}}, "distill.weight: has no effect with distill.phase, got 0.7"),
        ({"distill": {"temperature": 2.0}}, "distill.temperature: has no effect with distill.phase, got 2.0"),
        ({"distill": {"phase": 3}}, "distill.phase: wanted one of 1, 2 or None, got 3"),
        ({"engine": {"compile": "inductor"}}, "distill.phase 1: does not work with engine.compile"),
        ({"engine": {"parallel": "fsdp"}}, "distill.phase 1: does not work with engine.parallel fsdp"),
        ({"engine": {"grad_checkpointing": True}}, "distill.phase 1: does not work with engine.grad_checkpointing"),
        ({"loss": {"load_balance": 0.1}}, "distill.phase 1: does not work with loss.load_balance"),
        ({"loss": {"kind": "bce"}}, 'distill.phase 1: does not work with loss.kind "bce"'),
        ({"model": {"freeze": ("*",)}}, "model.freeze: nothing is left to train"),
        ({"model": {"freeze": ("*.mask_predictor.*",)}}, "distill.phase 1: model.freeze leaves nothing to train"),
        ({"model": {"num_heads": 4}}, "distill.teacher: vit_tiny_patch16_224 cannot teach: reconstruction_loss"),
        ({"model": {"depth": 1}}, "distill.teacher: vit_tiny_patch16_224 cannot teach: reconstruction_loss"),
        (
            {"model": {"embed_dim": 32}, "distill": {"phase": 2}},
            "distill.teacher: vit_tiny_patch16_224 cannot teach: distillation_loss: .* and .*32",
        ),
    ],
    ids=lambda part: str(part)[:60],
)
def test_what_does_not_fit_a_phase_is_refused_before_anything_is_written(run, teacher, tmp_path, changes, message):
    distill = teacher | {"phase": 1} | changes.get("distill", {})
    with pytest.raises(TrainError, match=message) as error:
        run("refused", **{**changes, "distill": distill})
    assert "\n" not in str(error.value) and not (tmp_path / "refused").exists()


def test_another_model_and_a_teacher_without_attention_are_refused(make_recipe, teacher, tmp_path):
    recipe = make_recipe(data=DATA, distill=teacher | {"phase": 1})
    with pytest.raises(TrainError, match=r"distill.phase: wants a model sparsifiner_deit_\*, got test_resnet"):
        train(recipe, work_dir=tmp_path / "refused")
    net = timm.create_model("test_resnet", num_classes=3)
    torch.save(net.state_dict(), tmp_path / "resnet.pth")
    other = {"teacher": "test_resnet", "checkpoint": str(tmp_path / "resnet.pth"), "phase": 1}
    recipe = make_recipe(model={"name": "sparsifiner_deit_tiny", **SIZES}, data=DATA, distill=other)
    with pytest.raises(TrainError, match="test_resnet cannot teach: attention_matrices: ResNet has no blocks"):
        train(recipe, work_dir=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
