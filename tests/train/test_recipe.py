"""A recipe is read strictly: an error names the key, what was expected and what was found."""

import pytest

from foveate.train import TrainError, find_recipe, list_recipes, load_recipe, train
from foveate.train.recipe import recipe_data
from foveate.train.recipe_files import load_recipe_with_notes

UNKNOWN = [
    ("scheduel.epochs", 3, "unknown key scheduel; did you mean schedule?"),
    ("schedule.epoch", 3, "unknown key schedule.epoch; did you mean schedule.epochs"),
    ("augment.mix_up", 0.1, "unknown key augment.mix_up; did you mean augment.mixup"),
    ("lr", 0.1, r"^unknown key lr; did you mean optimizer.lr\?$"),
    ("epochs", 3, r"^unknown key epochs; did you mean schedule.epochs\?$"),
    ("workers", 3, r"^unknown key workers; did you mean data.workers\?$"),
    ("optimizer.epochs", 3, r"^unknown key optimizer.epochs; did you mean schedule.epochs\?$"),
    ("data.batch_size", 3, r"^unknown key data.batch_size; did you mean batch_size\?$"),
    ("interval", 3, r"^unknown key interval; did you mean checkpoint.interval or log.interval\?$"),
    ("rank", 3, r"^unknown key rank; did you mean model.lora.rank\?$"),
    ("checkpoint.interval.x", 1, "unknown key checkpoint.interval.x: checkpoint.interval holds a value, not a section"),
]
WRONG = [
    ("schedule.epochs", 2.5, "schedule.epochs: wanted an integer, got 2.5"),
    ("schedule.epochs", 0, "schedule.epochs: wanted a number >= 1, got 0"),
    ("batch_size", True, "batch_size: wanted an integer, got True"),
    ("optimizer.lr", "fast", "optimizer.lr: wanted a number, got 'fast'"),
    ("optimizer.lr", float("nan"), "optimizer.lr: wanted a number, got nan"),
    ("optimizer.betas", (0.9,), r"optimizer.betas: wanted 2 values \(a number\) or None, got \(0.9,\)"),
    ("precision", "fp8", "precision: wanted one of 'fp32', 'bf16', 'fp16', got 'fp8'"),
    ("schedule", 3, "schedule: wanted a section of keys, got 3"),
    ("data.mean", (0.5,), r"data.mean: wanted 3 value\(s\), one per channel"),
    ("schedule.min_lr", 1.0, "schedule.min_lr: wanted at most optimizer.lr 0.001, got 1"),
    ("schedule.warmup_epochs", 2, "schedule.warmup_epochs: wanted fewer than 2 epochs, got 2"),
    ("data.workers", 1000000, "data.workers: wanted a number >= 0 and <= 1024, got 1000000"),
    ("augment.randaugment", "rand-m9-foo", "timm cannot read 'rand-m9-foo': unknown section 'foo'"),
    ("schedule.kind", "step", 'missing key schedule.step_epochs: schedule.kind "step" wants it'),
    ("optimizer.lr_mult", {"fc": 0}, "optimizer.lr_mult: wanted numbers > 0 other than 1, got 0 for 'fc'"),
    ("optimizer.lr_mult", {"fc": "slow"}, "optimizer.lr_mult: wanted numbers > 0 other than 1, got 'slow' for 'fc'"),
]
WITHOUT_EFFECT = [
    ("augment.ratio", (0.5, 2.0), "augment.scale"),
    ("augment.erasing_mode", "const", "augment.erasing"),
    ("augment.mix_prob", 0.5, "augment.mixup or augment.cutmix"),
    ("augment.switch_prob", 0.5, "augment.mixup and augment.cutmix"),
    ("optimizer.clip_mode", "value", "optimizer.clip_grad"),
    ("schedule.warmup_lr", 1e-6, "schedule.warmup_epochs"),
    ("augment.mixup_off_epoch", 1, "augment.mixup or augment.cutmix"),
    ("ema_warmup", False, "ema"),
    ("loss.threshold", 0.2, 'loss.kind "bce"'),
    ("loss.multi_label", True, 'loss.kind "bce"'),
    ("schedule.step_rate", 0.1, 'schedule.kind "step"'),
]


@pytest.mark.parametrize(("key", "value", "message"), UNKNOWN)
def test_an_unknown_key_is_refused_with_its_path_and_the_closest_name(make_recipe, key, value, message):
    with pytest.raises(TrainError, match=message):
        load_recipe(make_recipe(checkpoint={"interval": 1}), {key: value})


def test_an_unknown_key_in_a_recipe_file_is_refused(tmp_path):
    file = tmp_path / "typo.py"
    file.write_text("model = dict(name='x')\noptimizer = dict(lr=1.0)\nschedule = {}\ndata = dict(roof='')\n")
    with pytest.raises(TrainError, match=r"unknown key data.roof; did you mean data.root"):
        load_recipe(file)


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_a_wrong_value_is_refused_with_what_was_expected(make_recipe, key, value, message):
    with pytest.raises(TrainError, match=message):
        load_recipe(make_recipe(), {key: value})


def test_a_rate_that_would_rise_to_the_floor_is_refused(make_recipe):
    recipe = make_recipe(optimizer={"lr_mult": {"fc*": 0.01}}, schedule={"min_lr": 1e-5})
    assert load_recipe(recipe).optimizer.lr_mult == {"fc*": 0.01}  # as high as the floor
    with pytest.raises(TrainError, match=r"'fc\*' decays from 1e-06, wanted at least schedule.min_lr 1e-05"):
        load_recipe(recipe, {"optimizer.lr_mult": {"fc*": 0.001}})


@pytest.mark.parametrize(("key", "value", "switch"), WITHOUT_EFFECT)
def test_a_key_without_effect_is_refused(make_recipe, key, value, switch):
    with pytest.raises(TrainError, match=f"{key}: has no effect without {switch}"):
        load_recipe(make_recipe(), {key: value})


def test_color_jitter_is_refused_where_timm_would_drop_it(make_recipe):
    with pytest.raises(TrainError, match=r"augment.color_jitter: timm skips it with augment.randaugment"):
        load_recipe(make_recipe(augment={"color_jitter": 0.4, "randaugment": "rand-m9"}))


def test_mixing_wants_an_even_batch(make_recipe):
    with pytest.raises(TrainError, match="batch_size: mixup and cutmix pair images, wanted an even number, got 3"):
        load_recipe(make_recipe(augment={"mixup": 0.2}, batch_size=3))


def test_a_missing_key_is_named(make_recipe):
    recipe = make_recipe()
    del recipe["optimizer"]["lr"]
    with pytest.raises(TrainError, match=r"missing key optimizer.lr: wanted a number"):
        load_recipe(recipe)


def test_keywords_beside_the_model_name_reach_the_model_as_tuples(make_recipe):
    recipe = load_recipe(make_recipe(model={"dims": [32, 64]}), {"model.dilations": ((1,), (2,))})
    assert recipe.model.keywords == {"dims": (32, 64), "dilations": ((1,), (2,))}


def test_plain_data_reads_back_to_the_same_recipe(make_recipe, everything):
    recipe = load_recipe(make_recipe(**everything, model={"drop_path_rate": 0.1, "layers": [1, 2]}))
    assert load_recipe(recipe_data(recipe)) == recipe


def test_a_recipe_is_found_by_bare_name_and_by_path(tmp_path):
    path = find_recipe("nat_micro_1xb64_mnist5k")
    assert find_recipe("nat_micro_1xb64_mnist5k.py") == path == find_recipe(path)
    with pytest.raises(TrainError, match=r"unknown recipe nat_micro; did you mean .*nat_micro_1xb64_mnist5k"):
        find_recipe("nat_micro")
    with pytest.raises(TrainError, match="is not a file"):
        find_recipe(tmp_path / "nowhere.py")
    assert "van_b0_8xb128_in1k" in list_recipes()


def test_a_recipe_file_that_does_not_run_is_refused_in_one_line(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("model = dict(\n")
    with pytest.raises(TrainError, match=r"broken.py cannot be read: ") as caught:
        load_recipe(file)
    assert "\n" not in str(caught.value)


LONG = {"epochs": 300, "warmup_epochs": 20, "warmup_lr": 1e-6, "cooldown_epochs": 10}


def test_fewer_epochs_alone_shorten_warm_up_and_cool_down_and_say_so(make_recipe):
    recipe, notes = load_recipe_with_notes(make_recipe(schedule=LONG), {"schedule.epochs": 2})
    schedule = recipe.schedule
    assert (schedule.epochs, schedule.warmup_epochs, schedule.total_epochs) == (2, 0.1333, 2)
    assert notes == ["schedule.epochs=2 shortens: schedule.warmup_epochs=0.1333, schedule.cooldown_epochs=0"]
    steps = {"epochs": 100, "kind": "step", "step_epochs": 30, "step_rate": 0.1}
    assert load_recipe(make_recipe(schedule=steps), {"schedule.epochs": 10}).schedule.step_epochs == 3
    assert load_recipe(make_recipe(schedule=steps), {"schedule.epochs": 1}).schedule.step_epochs == 1


@pytest.mark.parametrize(
    ("options", "warmup"),
    [
        ({"schedule.epochs": 600}, 20),  # longer: nothing is derived
        ({"schedule.epochs": 30, "schedule.warmup_epochs": 5}, 5),
        ({"schedule.epochs": 150}, 10),
        ({"schedule.warmup_epochs": 3}, 3),
    ],
)
def test_lengths_that_are_given_stay(make_recipe, options, warmup):
    assert load_recipe(make_recipe(schedule=LONG), options).schedule.warmup_epochs == warmup


@pytest.mark.parametrize("name", ["nat_mini_8xb128_in1k", "van_b0_8xb128_in1k", "eca_resnet50_8xb32_in1k"])
def test_every_recipe_takes_two_epochs_by_one_override(name):
    if name not in list_recipes():
        name = name.replace("8xb32", "4xb64")
    assert load_recipe(name, {"schedule.epochs": 2}).schedule.total_epochs == 2


def test_a_short_run_says_its_line_and_the_rate_is_warmed_up(make_recipe, tmp_path, capsys):
    recipe = make_recipe(schedule={"epochs": 40, "warmup_epochs": 20, "warmup_lr": 0.0})
    train(recipe, work_dir=tmp_path, cfg_options={"schedule.epochs": 2})
    assert capsys.readouterr().out.startswith("schedule.epochs=2 shortens: schedule.warmup_epochs=1.0\nmodel    ")


def test_a_warm_up_from_above_the_rate_is_refused(make_recipe):
    with pytest.raises(TrainError, match=r"schedule.warmup_lr: wanted at most optimizer.lr 0.001, got 0.5"):
        load_recipe(make_recipe(schedule={"warmup_epochs": 1, "warmup_lr": 0.5}))


def test_mixing_that_never_ends_and_a_teacher_of_labels_are_refused(make_recipe):
    with pytest.raises(TrainError, match=r"augment.mixup_off_epoch: has no effect in a run of 2 epochs, got 2"):
        load_recipe(make_recipe(augment={"mixup": 0.2, "mixup_off_epoch": 2}))
    teacher = {"teacher": "test_resnet", "pretrained": True}
    with pytest.raises(TrainError, match=r"distill: .* loss.multi_label does not have"):
        load_recipe(make_recipe(distill=teacher, loss={"kind": "bce", "multi_label": True}))
