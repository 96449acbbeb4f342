"""The config of a run: a tree of options, each defined once.

    config = Config.of(data_dir="data/us", model="ple", epochs=3)
    config.model.embedding_dim, config.loss.pwiser_weight, config.training.epochs

The flags of `pwiser train`, their help, the content of flags.json, the ranges of `pwiser tune` and
docs/reference/flags.md are generated from the fields of the tree. To add an option, add one field
and the code that reads it. An option that only some models or losses read is listed in the
`options` of their registry entries (`models.MODELS`, `tasks.LOSSES`). For other models and losses
it is not part of a run, and it is refused on the command line.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence

from absl import flags

from pwiser_tf.calibration import METHODS
from pwiser_tf.errors import DataError
from pwiser_tf.models import MODELS, ModelConfig
from pwiser_tf.options import check, flag_of, kind_of, option
from pwiser_tf.tasks import LOSSES, TASKS, LossConfig

# The version of flags.json. Version 1 had no version key; its other names are the same.
VERSION = 2

# What an epoch shuffles: single rows, or whole groups.
SHUFFLES = ("rows", "groups")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained: batches, epochs, optimizer, seed."""

    batch_size: int = option(2048, "Rows in a batch.", low=1)
    epochs: int = option(50, "The largest number of epochs.", low=1)
    patience: int = option(
        2, "Stop after this many epochs without a better validation result.", low=0
    )
    learning_rate: float = option(
        1e-3, "The learning rate of Adam.", low=0.0, search=(1e-4, 1e-2, True)
    )
    shuffle: str | None = option(
        None,
        "rows: shuffle single rows; groups: shuffle whole groups, so that the rows of a search are "
        "in one batch. Default: what --loss needs.",
        choices=SHUFFLES,
    )
    calibration: str = option(
        METHODS[0],
        "Platt scaling of the outputs after training, fitted on validation (two numbers a head). "
        "auto: if the loss is not cross-entropy alone (another --loss than bce, a "
        "--conversion_weight other than 1); platt: always; none: never.",
        choices=METHODS,
    )
    seed: int = option(
        0, "The seed of initialization, shuffling and dropout.", low=0, high=2**31 - 1
    )

    def __post_init__(self):
        check(self)


@dataclasses.dataclass(frozen=True)
class Config:
    """The options of a run; `pwiser train --help` explains them. `Config.of` makes a config."""

    data_dir: str = option("", "The folder that pwiser convert wrote.")
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)

    def __post_init__(self):
        if not self.data_dir or not isinstance(self.data_dir, str | os.PathLike):
            raise DataError(f"--data_dir={self.data_dir}: expected the folder of a data set")
        # Absolute, because a run may be resumed from another working directory.
        object.__setattr__(self, "data_dir", str(pathlib.Path(self.data_dir).resolve()))
        needs_groups = LOSSES[self.loss.name].needs_groups
        if self.training.shuffle is None:
            shuffle = "groups" if needs_groups else "rows"
            training = dataclasses.replace(self.training, shuffle=shuffle)
            object.__setattr__(self, "training", training)
        if needs_groups and self.training.shuffle != "groups":
            raise DataError(
                f"--shuffle={self.training.shuffle}: --loss={self.loss.name} compares the rows of "
                "a group, which only --shuffle=groups keeps together"
            )

    @classmethod
    def of(cls, **values) -> "Config":
        """Makes a config from options by the names of their flags; the others have defaults.

        Raises:
          DataError: an unknown name, or a value that is not allowed.
        """
        if unknown := set(values) - set(OPTIONS):
            names = ", ".join(sorted(unknown))
            raise DataError(f"unknown option {names}; docs/reference/flags.md lists all options")
        sections = {section: {} for section in _SECTIONS}
        for name, value in values.items():
            section, field = OPTIONS[name]
            sections[section][field.name] = tuple(value) if isinstance(value, list) else value
        made = {name: _SECTIONS[name](**given) for name, given in sections.items() if name}
        return cls(**sections[""], **made)

    @classmethod
    def from_json(cls, content: dict) -> "Config":
        """Reads the content of a flags.json. Raises DataError if it is not a config."""
        values = dict(content)
        version = values.pop("version", 1)
        if version not in (1, VERSION):
            raise DataError(f"found format version {version}, expected at most {VERSION}")
        return cls.of(**values)

    def values(self) -> dict[str, object]:
        """The value of every option, by the name of its flag."""
        return {
            name: getattr(getattr(self, section) if section else self, field.name)
            for name, (section, field) in OPTIONS.items()
        }

    def replace(self, **values) -> "Config":
        """A copy of the config with other values, given by the names of their flags."""
        return Config.of(**{**self.values(), **values})

    def read(self) -> dict[str, object]:
        """The options that this run reads, with their values: they identify the run."""
        unread = unread_options(self.model.name, self.loss.name)
        return {name: value for name, value in self.values().items() if name not in unread}


_SECTIONS = {"": Config, "model": ModelConfig, "loss": LossConfig, "training": TrainingConfig}
# Name of a flag: (its section of Config, "" for Config itself; its field).
OPTIONS = {
    flag_of(field): (section, field)
    for section, config in _SECTIONS.items()
    for field in dataclasses.fields(config)
    if "help" in field.metadata
}


def unread_options(model: str, loss: str) -> dict[str, str]:
    """The options that a run with this model and loss does not read, and the flags that do."""
    unread = {}
    for flag, chosen, registry in (("model", model, MODELS), ("loss", loss, LOSSES)):
        special = {name for entry in registry.values() for name in entry.options}
        for name in special - set(registry[chosen].options):
            users = [key for key, entry in registry.items() if name in entry.options]
            unread[name] = f"--{flag}={'|'.join(users)}"
    return unread


def changed_options(old: dict, new: dict) -> dict[str, tuple]:
    """What differs between two `Config.read`, the older one from JSON: {name: (old, new)}.

    An option that is missing in the older one had its default: it did not exist then.
    """
    defaults = {name: field.default for name, (_, field) in OPTIONS.items()}
    old, new = (json.loads(json.dumps(values)) for values in (defaults | old, new))
    return {name: (old.get(name), new[name]) for name in new if old.get(name) != new[name]}


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines a flag for each option."""
    for name, (_, field) in OPTIONS.items():
        kind, meta = kind_of(field), field.metadata
        shared = {"name": name, "default": field.default, "help": meta["help"]}
        shared["flag_values"] = values
        if kind is bool:
            flags.DEFINE_bool(**shared)
        elif kind is int:
            flags.DEFINE_integer(**shared, lower_bound=meta["low"], upper_bound=meta["high"])
        elif kind is float:
            flags.DEFINE_float(**shared, lower_bound=meta["low"], upper_bound=meta["high"])
        elif kind is str and meta["choices"]:
            flags.DEFINE_enum(**shared, enum_values=list(meta["choices"]))
        elif kind is str:
            flags.DEFINE_string(**{**shared, "default": None}, required=True)
        else:
            flags.DEFINE_list(**{**shared, "default": list(map(str, field.default))})
            if meta["choices"] or meta["low"]:
                valid, message = _list_validator(meta["choices"])
                flags.register_validator(name, valid, message=message, flag_values=values)


def _list_validator(choices):
    if choices:
        return (
            lambda chosen: set(chosen) <= set(choices),
            f"expected names out of {','.join(choices)}",
        )
    return (
        lambda sizes: bool(sizes) and all(size.isdecimal() and int(size) > 0 for size in sizes),
        "expected positive integers, separated by commas",
    )


def define_run_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags that are not part of a run's config: its folder and its export."""
    flags.DEFINE_string(
        "workdir", None, "The folder of this run.", flag_values=values, required=True
    )
    flags.DEFINE_string(
        "export_dir", None, "Where to export the model; default: no export.", flag_values=values
    )
    flags.DEFINE_string("model_name", "pwiser", "The exported model's name.", flag_values=values)
    flags.DEFINE_string(
        "score",
        None,
        "With --export_dir: an additional output of the exported model; see pwiser export.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "checkpoint_seconds",
        60,
        "Save a checkpoint after this many seconds, and after each epoch.",
        lower_bound=0.0,
        flag_values=values,
    )


def config_from_flags(values: flags.FlagValues, given: Sequence[str] = ()) -> Config:
    """The config that the flags of `define_flags` describe.

    Args:
      given: the arguments on the command line. An option there that the run does not read is
        refused. In a flagfile it is ignored, because one file may serve several models and losses.

    Raises:
      DataError: flags that contradict each other.
    """
    chosen = {name: values[name].value for name in OPTIONS}
    chosen["click_noise_fields"] = tuple(chosen["click_noise_fields"])
    chosen["loss_tasks"] = tuple(task for task in TASKS if task in chosen["loss_tasks"])
    for name in ("bottom_units", "tower_units"):
        chosen[name] = tuple(int(size) for size in chosen[name])
    config = Config.of(**chosen)
    names = {argument.lstrip("-").partition("=")[0] for argument in given if argument[:1] == "-"}
    for name, needed in unread_options(config.model.name, config.loss.name).items():
        if name in names:
            raise DataError(
                f"--{name} is only read with {needed}; this run has --model={config.model.name} "
                f"--loss={config.loss.name}"
            )
    return config


def config_from_arguments(arguments: Sequence[str]) -> Config:
    """The config that arguments of `pwiser train` describe, such as "--epochs=3".

    Raises:
      DataError: arguments that `pwiser train` refuses.
    """
    values = flags.FlagValues()
    define_flags(values)
    define_run_flags(values)
    try:
        values(["train", "--workdir=unused", *arguments])
    except flags.Error as error:
        raise DataError(str(error)) from None
    return config_from_flags(values)


def reference() -> str:
    """The content of docs/reference/flags.md: every option of a run."""
    users: dict[str, list[str]] = {}
    for registry in (MODELS, LOSSES):
        for key, entry in registry.items():
            for name in entry.options:
                users.setdefault(name, []).append(key)
    lines = [
        "# Options of a run",
        "",
        "Flags of `pwiser train` and `pwiser tune`. Generated by `python -m pwiser_tf.config`.",
    ]
    for section in _SECTIONS:
        title = (section or "data").capitalize()
        lines += [
            "",
            f"## {title}",
            "| flag | default | meaning | read by |",
            "|---|---|---|---|",
        ]
        for name, (of_section, field) in OPTIONS.items():
            if of_section != section:
                continue
            default, text = field.default, field.metadata["help"]
            shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
            shown = "" if default in (None, "") else f"`{shown}`"
            if field.metadata["choices"]:
                text += f" One of {', '.join(f'`{key}`' for key in field.metadata['choices'])}."
            text = text.replace("|", "\\|")
            read_by = ", ".join(users.get(name, ["all"]))
            lines.append(f"| `--{name}` | {shown} | {text} | {read_by} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
