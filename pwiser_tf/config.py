"""The options of a training run, each defined once: a field of `Settings`.

The flags of `pwiser train`, their help, what flags.json holds, what `pwiser tune` searches and
docs/reference/flags.md follow from these fields. A new option is one field here, and the code that
reads it. An option that only some models or losses read stands in the `options` of theirs
(`models.MODELS`, `tasks.LOSSES`): for others it is no part of a run, and refused where it is given.
"""

import dataclasses
import math
import pathlib
import typing
from collections.abc import Sequence

from absl import flags

from pwiser_tf.errors import DataError
from pwiser_tf.models import MODELS, ModelConfig
from pwiser_tf.models.base import CONVERSION_HEADS
from pwiser_tf.tasks import LOSSES, SCORE_SPACES, TASKS, LossConfig

# What keeps its place in a shuffled epoch: nothing, or the rows of a group beside each other.
SHUFFLES = ("rows", "groups")


def _option(
    default,
    help_text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] | None = None,
    search: tuple[float, float, bool] | None = None,
):
    """A field of Settings that is a flag.

    Args:
      default: the flag's; None where it follows from other options (`settings_from`).
      low, high: the least and the greatest value. choices: the values there are.
      search: what `pwiser tune` searches: least, greatest, and whether as a logarithm.
    """
    meta = {"help": help_text, "flag_default": default, "low": low, "high": high}
    return dataclasses.field(metadata={**meta, "choices": choices, "search": search})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of a run, with their values; `pwiser train --help` explains each."""

    data_dir: str = _option(None, "The folder that pwiser convert wrote.")
    model: str = _option("mmoe", "The architecture.", choices=tuple(MODELS))
    conversion_head: str = _option(
        None,
        "What the second tower learns: direct, P(click and conversion | exposure); product, "
        "P(conversion | click), learnt through ctcvr = ctr * cvr. Default: the architecture's "
        "own (product for esmm and escm2, otherwise direct).",
        choices=CONVERSION_HEADS,
    )
    embedding_dim: int = _option(128, "Size of an embedding.", low=1)
    bottom_units: tuple[int, ...] = _option((512, 256), "MLP sizes of a bottom or expert.", low=1)
    tower_units: tuple[int, ...] = _option((128, 64), "MLP sizes of a tower.", low=1)
    experts: int = _option(8, "Experts that a tower sees; of ple and stem half are shared.", low=1)
    critics: int = _option(5, "metaheac's critics.", low=1)
    dropout: float = _option(0.2, "Dropout rate.", low=0.0, high=0.99)
    weight_decay: float = _option(1e-6, "L2 on embeddings and dense kernels.", low=0.0)
    mixed_precision: bool = _option(
        False,
        "Train with bfloat16 matrix products: faster where the processor has them (AMX, "
        "AVX512-BF16, GPU). The exported model is float32 all the same.",
    )
    batch_size: int = _option(2048, "Rows a batch.", low=1)
    epochs: int = _option(50, "Epochs at most.", low=1)
    patience: int = _option(2, "Stop after so many epochs without a better validation.", low=0)
    learning_rate: float = _option(
        1e-3, "Adam's learning rate.", low=0.0, search=(1e-4, 1e-2, True)
    )
    ctr_weight: float = _option(0.5, "Share of the CTR task's loss.", low=0.0)
    ctcvr_weight: float = _option(0.5, "Share of the CTCVR task's loss.", low=0.0)
    auxiliary_weight: float = _option(
        None,
        "Weight of the term that an architecture adds to its tasks' losses, in units of their mean "
        "weight: aitm's calibrator (default 0.6, the paper's), escm2's risk of CVR (0.5).",
        low=0.0,
    )
    loss: str = _option(
        "pwiser",
        "How the tasks of --loss_tasks are learnt: bce, binary cross-entropy alone; pwiser, BCE + "
        "pwiser_weight * PWiseR; ranknet, combined_pair, jrc, listce, BCE + ranking_weight * that "
        "term; focal, in BCE's place.",
        choices=tuple(LOSSES),
    )
    loss_tasks: tuple[str, ...] = _option(
        TASKS, f"Tasks with --loss, out of {','.join(TASKS)}; others: bce.", choices=TASKS
    )
    conversion_weight: float = _option(
        1.0, "A row with a conversion counts so often in BCE.", low=0.0, search=(1.0, 30.0, True)
    )
    pwiser_weight: float = _option(
        0.1, "Lambda of BCE + lambda * PWiseR.", low=0.0, search=(3e-3, 3.0, True)
    )
    margin_click: float = _option(
        0.05, "PWiseR's margin of conversions over clicks.", low=0.0, search=(5e-3, 0.5, True)
    )
    margin_nonclick: float = _option(
        0.1, "PWiseR's margin of conversions over exposures.", low=0.0, search=(5e-3, 0.5, True)
    )
    score_space: str = _option(
        SCORE_SPACES[0], "What PWiseR's margins are measured in.", choices=SCORE_SPACES
    )
    ranking_weight: float = _option(
        0.1, "Lambda of ranknet, combined_pair, jrc and listce.", low=0.0, search=(3e-3, 3.0, True)
    )
    focal_gamma: float = _option(2.0, "Focal loss's exponent.", low=0.0, search=(0.0, 5.0, False))
    shuffle: str = _option(
        None,
        "rows: every row takes a random place; groups: whole groups do, so that a batch holds all "
        "rows of a search. Default: what --loss needs.",
        choices=SHUFFLES,
    )
    seed: int = _option(0, "Fixes initialisation, shuffling and dropout.", low=0, high=2**31 - 1)

    def __post_init__(self):
        """DataError for what no run can have: NaN passes a flag's bounds, flags.json was edited."""
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), typing.get_origin(field.type) or field.type
            if type(value) is not kind and (kind, type(value)) != (float, int):
                raise DataError(f"--{field.name}={value}: expected type {kind.__name__}")
            if kind is float and not math.isfinite(value):
                raise DataError(f"--{field.name}={value}: expected a finite number")
            choices = field.metadata["choices"]
            if choices and not set(value if kind is tuple else (value,)) <= set(choices):
                raise DataError(f"--{field.name}={value}: expected one of {list(choices)}")
        architecture = MODELS[self.model]
        if self.conversion_head not in architecture.conversion_heads:
            raise DataError(
                f"--conversion_head={self.conversion_head}: --model={self.model} is defined with "
                f"{' or '.join(architecture.conversion_heads)} alone"
            )
        if self.auxiliary_weight and architecture.auxiliary_weight is None:
            raise DataError(
                f"--auxiliary_weight={self.auxiliary_weight}: --model={self.model} has no term of "
                "its own beside the tasks' losses"
            )
        if LOSSES[self.loss].needs_groups and self.shuffle != "groups":
            raise DataError(
                f"--shuffle={self.shuffle}: --loss={self.loss} compares the rows of a group, which "
                "only --shuffle=groups keeps together"
            )

    def read(self) -> dict[str, object]:
        """The options that this run reads, by name: what tells it from other runs."""
        unread = unread_options(self.model, self.loss)
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in unread}

    def model_config(self) -> ModelConfig:
        """The sizes of the model."""
        names = [field.name for field in dataclasses.fields(ModelConfig)]
        return ModelConfig(**{name: getattr(self, name) for name in names})

    def losses(self) -> dict[str, LossConfig]:
        """How each task is learnt, by its name."""
        shared = {field.name for field in dataclasses.fields(LossConfig)} - {"weight", "loss"}
        options = {name: getattr(self, name) for name in shared}
        return {
            task: LossConfig(
                weight={"ctr": self.ctr_weight, "ctcvr": self.ctcvr_weight}[task],
                loss=self.loss if task in self.loss_tasks else "bce",
                **options,
            )
            for task in TASKS
        }


OPTIONS = {field.name: field for field in dataclasses.fields(Settings)}


def unread_options(model: str, loss: str) -> dict[str, str]:
    """The options that a run of that model and loss does not read, each with what it needs."""
    unread = {}
    for flag, chosen, registry in (("model", model, MODELS), ("loss", loss, LOSSES)):
        special = {name for entry in registry.values() for name in entry.options}
        for name in special - set(registry[chosen].options):
            users = [key for key, entry in registry.items() if name in entry.options]
            unread[name] = f"--{flag}={'|'.join(users)}"
    return unread


def settings_of(content: dict) -> Settings:
    """The settings that a flags.json holds; an option that it does not name has its default.

    Raises:
      DataError: values that no run can have. TypeError: names that are no options.
    """
    defaults = {name: field.metadata["flag_default"] for name, field in OPTIONS.items()}
    chosen = defaults | {
        name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
    }
    return Settings(**_resolved(chosen))


def _resolved(chosen: dict) -> dict:
    """Options with values for those that follow from others."""
    architecture = MODELS.get(chosen["model"])
    if architecture is None or chosen["loss"] not in LOSSES:
        # Settings says so.
        return chosen
    defaults = {
        "conversion_head": architecture.conversion_heads[0],
        "auxiliary_weight": architecture.auxiliary_weight or 0.0,
        "shuffle": "groups" if LOSSES[chosen["loss"]].needs_groups else "rows",
    }
    return chosen | {name: value for name, value in defaults.items() if chosen[name] is None}


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines a flag for each option."""
    for name, field in OPTIONS.items():
        meta = field.metadata
        default, help_text, choices = meta["flag_default"], meta["help"], meta["choices"]
        bounds = {"lower_bound": meta["low"], "upper_bound": meta["high"]}
        if field.type is bool:
            flags.DEFINE_bool(name, default, help_text, flag_values=values)
        elif field.type is int:
            flags.DEFINE_integer(name, default, help_text, flag_values=values, **bounds)
        elif field.type is float:
            flags.DEFINE_float(name, default, help_text, flag_values=values, **bounds)
        elif field.type is str and choices:
            flags.DEFINE_enum(name, default, choices, help_text, flag_values=values)
        elif field.type is str:
            flags.DEFINE_string(name, default, help_text, flag_values=values, required=True)
        else:
            _define_list(name, default, help_text, choices, values)


def define_run_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of a run that are no part of it: where it lives and what it leaves."""
    flags.DEFINE_string(
        "workdir", None, "The folder of this run.", flag_values=values, required=True
    )
    flags.DEFINE_string(
        "export_dir", None, "Where to export the model; default: no export.", flag_values=values
    )
    flags.DEFINE_string("model_name", "pwiser", "The exported model's name.", flag_values=values)
    flags.DEFINE_float(
        "checkpoint_seconds",
        60,
        "Save the state so often, besides after each epoch.",
        lower_bound=0.0,
        flag_values=values,
    )


def _define_list(name, default, help_text, choices, values) -> None:
    flags.DEFINE_list(name, list(map(str, default)), help_text, flag_values=values)
    if choices:
        flags.register_validator(
            name,
            lambda chosen: set(chosen) <= set(choices),
            message=f"expected names out of {','.join(choices)}",
            flag_values=values,
        )
    else:
        flags.register_validator(
            name,
            lambda sizes: bool(sizes) and all(size.isdecimal() and int(size) > 0 for size in sizes),
            message="expected positive integers, separated by commas",
            flag_values=values,
        )


def settings_from(values: flags.FlagValues, given: Sequence[str] = ()) -> Settings:
    """The run that the flags of `define_flags` describe; a flag left open gets its value here.

    Args:
      given: the arguments of the command itself. An option among them that the run does not read
        is refused; in a flagfile, which may serve several models and losses, it is not.

    Raises:
      DataError: flags that do not go together.
    """
    chosen = _resolved({name: values[name].value for name in OPTIONS})
    chosen["data_dir"] = str(pathlib.Path(chosen["data_dir"]).resolve())
    chosen["loss_tasks"] = tuple(task for task in TASKS if task in chosen["loss_tasks"])
    for name in ("bottom_units", "tower_units"):
        chosen[name] = tuple(int(size) for size in chosen[name])
    settings = Settings(**chosen)
    names = {argument.lstrip("-").partition("=")[0] for argument in given if argument[:1] == "-"}
    for name, needed in unread_options(settings.model, settings.loss).items():
        if name in names:
            raise DataError(
                f"--{name} is read with {needed} alone; this run has --model={settings.model} "
                f"--loss={settings.loss}"
            )
    return settings


def reference() -> str:
    """The page docs/reference/flags.md: every option of a run."""
    lines = [
        "# Options of a run",
        "",
        "Flags of `pwiser train`, and of `pwiser tune`. Made by `python -m pwiser_tf.config`.",
        "",
        "| flag | default | meaning | read with |",
        "|---|---|---|---|",
    ]
    users: dict[str, list[str]] = {}
    for registry in (MODELS, LOSSES):
        for key, entry in registry.items():
            for name in entry.options:
                users.setdefault(name, []).append(key)
    for name, field in OPTIONS.items():
        meta = field.metadata
        default = meta["flag_default"]
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        shown = "" if default is None else f"`{shown}`"
        text = meta["help"]
        if meta["choices"]:
            text += f" One of {', '.join(f'`{choice}`' for choice in meta['choices'])}."
        text = text.replace("|", "\\|")
        lines.append(f"| `--{name}` | {shown} | {text} | {', '.join(users.get(name, ['all']))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
