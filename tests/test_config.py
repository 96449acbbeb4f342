"""The config tree, its flags and flags.json."""

import pathlib

import pytest
from absl import flags

from pwiser_tf import config, runs
from pwiser_tf.config import OPTIONS, Config
from pwiser_tf.errors import DataError
from pwiser_tf.models import MODELS
from pwiser_tf.tasks import LOSSES


def _settings(*arguments, given=None):
    values = flags.FlagValues()
    config.define_flags(values)
    values(["train", "--data_dir=/d", *arguments])
    return config.config_from_flags(values, arguments if given is None else given)


def test_every_option_is_a_flag_and_the_flags_give_the_settings():
    values = flags.FlagValues()
    config.define_flags(values)
    assert set(OPTIONS) <= set(values)
    found = _settings("--model=ple", "--experts=4", "--bottom_units=8,4", "--loss_tasks=ctcvr")
    assert (found.model.name, found.model.experts, found.model.bottom_units) == ("ple", 4, (8, 4))
    assert found.loss.loss_tasks == ("ctcvr",)
    # Defaults that depend on the model and the loss.
    assert _settings("--model=esmm").model.conversion_head == "product"
    assert _settings("--model=aitm").model.auxiliary_weight == 0.6
    assert _settings("--loss=jrc").training.shuffle == "groups"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model=shared_bottom", "--experts=2"],
            "--experts is only read with --model=omoe|mmoe|ple",
        ),
        (["--loss=bce", "--focal_gamma=1"], "--focal_gamma is only read with --loss=focal;"),
        (
            ["--loss=bce", "--loss_tasks=ctr"],
            "--loss_tasks is only read with --loss=pwiser|ranknet",
        ),
        (["--model=mmoe", "--critics=2"], "--critics is only read with --model=metaheac;"),
        (
            ["--loss=ranknet", "--margin_click=0.2"],
            "--margin_click is only read with --loss=pwiser",
        ),
    ],
)
def test_an_option_that_is_not_read_is_refused_on_the_command_line(arguments, message):
    with pytest.raises(DataError) as caught:
        _settings(*arguments)
    assert str(caught.value).startswith(message)
    # A flagfile may serve several models and losses.
    _settings(*arguments, given=())


def test_options_that_are_not_read_are_not_part_of_a_run(settings):
    bce = settings.replace(loss="bce")
    assert bce.read() == bce.replace(pwiser_weight=9.0, focal_gamma=1.0).read()
    assert bce.read() != bce.replace(learning_rate=0.5).read()
    assert not {"pwiser_weight", "focal_gamma", "experts", "critics"} & set(bce.read())
    for model, entry in MODELS.items():
        for loss in LOSSES:
            unread = config.unread_options(model, loss)
            assert not set(unread) & {*entry.options, *LOSSES[loss].options}


def test_a_run_without_newer_options_still_loads(settings, dataset, tmp_path):
    content = settings.values()
    for name in ("mixed_precision", "critics", "score_space", "auxiliary_weight"):
        del content[name]
    runs.write_json(tmp_path / "flags.json", content)
    for path in ("schema.json", "vocabularies"):
        (tmp_path / path).symlink_to(dataset / path)
    found, _ = runs.load(tmp_path)
    assert (found.model.mixed_precision, found.model.critics) == (False, 5)
    assert found.loss.score_space == "probability"
    assert found.read() == settings.read()


def test_the_flags_page_is_up_to_date():
    page = pathlib.Path(__file__).parent.parent / "docs" / "reference" / "flags.md"
    assert page.read_text(encoding="utf-8") == config.reference(), (
        "run: python -m pwiser_tf.config > docs/reference/flags.md"
    )


def test_options_have_help_and_good_defaults():
    for name, (_, field) in OPTIONS.items():
        assert field.metadata["help"].endswith("."), name
    assert Config.of(data_dir="/d").model.name == "mmoe"


def test_flags_json_of_a_newer_program_is_refused(settings, dataset, tmp_path):
    runs.write_json(tmp_path / "flags.json", {"version": 99, **settings.read()})
    with pytest.raises(DataError, match="found format version 99, expected at most 2"):
        runs.load(tmp_path)


def test_the_tree_and_the_flags_are_two_views_of_one_config():
    found = Config.of(data_dir="/d", model="esmm", loss="jrc", batch_size=64, tower_units=[8, 4])
    assert (found.model.name, found.model.conversion_head) == ("esmm", "product")
    assert (found.loss.name, found.training.shuffle) == ("jrc", "groups")
    assert found.model.tower_units == (8, 4)
    assert Config.of(**found.values()) == found
    assert found.replace(batch_size=32).training.batch_size == 32
    with pytest.raises(DataError, match="unknown option batchsize"):
        Config.of(data_dir="/d", batchsize=64)
    with pytest.raises(DataError, match=r"--dropout=1\.5: expected at most"):
        found.replace(dropout=1.5)
    with pytest.raises(DataError, match="only --shuffle=groups"):
        found.replace(shuffle="rows")


def test_changed_options_of_a_run_from_json():
    old = {"epochs": 3, "loss_tasks": ["ctr"], "learning_rate": 0.1}
    new = {"epochs": 3, "loss_tasks": ("ctr",), "learning_rate": 0.2, "tower_units": (128, 64)}
    assert config.changed_options(old, new) == {"learning_rate": (0.1, 0.2)}
