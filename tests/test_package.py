"""The package as a new user gets it: one wheel, one command, lazily imported public names."""

import ast
import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

import pwiser_tf
from pwiser_tf.__main__ import COMMANDS

ROOT = pathlib.Path(__file__).parent.parent


def _python(*arguments, cwd=None):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd)


def test_importing_the_package_imports_nothing_slow():
    program = (
        "import sys, pwiser_tf; print(sorted({'tensorflow', 'numpy', 'matplotlib'} & set("
        "sys.modules)), callable(pwiser_tf.auc), 'tensorflow' in sys.modules)"
    )
    done = _python("-c", program)
    assert (done.stdout, done.returncode) == ("[] True False\n", 0), done.stderr


def test_the_public_names_are_there():
    assert set(pwiser_tf.__all__) <= set(dir(pwiser_tf))
    for name in pwiser_tf.__all__:
        assert getattr(pwiser_tf, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = pwiser_tf.nothing
    assert pwiser_tf.__version__ == importlib.metadata.version("pwiser-tf")


@pytest.mark.slow
def test_training_imports_no_plots_and_nothing_of_serving():
    program = (
        "import sys, pwiser_tf.train; print(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'matplotlib', 'tensorflow_serving', 'optuna'}))"
    )
    done = _python("-c", program)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_shows_its_own_help(name, command):
    done = command(name, "--help")
    flag = {"serve": "--model_base_path", "score": "--input", "sample": "--rows"}.get(name)
    others = {"convert": "--format", "study": "--seeds", "worlds": "--seeds", "inspect": "--rows"}
    flag = flag or others.get(name, "  --workdir: ")
    assert done.returncode in (0, 1)
    assert flag in done.stdout


def test_every_import_is_declared():
    """An installed package that is not declared would hide a missing dependency."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    used = ("plots", "tune", "study", "bench")
    listed = project["dependencies"] + [line for extra in used for line in extras[extra]]
    declared = {re.match(r"[\w-]+", line)[0].replace("-", "_").lower() for line in listed}
    declared |= {"google", "sklearn"} if "scikit_learn" in declared else {"google"}
    imported = set()
    for path in (ROOT / "pwiser_tf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    names = {
        "absl": "absl_py",
        "farmhash": "pyfarmhash",
        "tensorflow_serving": "tensorflow_serving_api",
    }
    missing = {
        name
        for name in imported - set(sys.stdlib_module_names) - {"pwiser_tf"}
        if names.get(name, name).lower() not in declared
    }
    assert not missing


def test_the_command_without_a_subcommand_and_with_a_wrong_one(command):
    done = command()
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    done = command("trian")
    assert done.returncode == 2
    assert done.stderr.startswith("error: found command 'trian', expected one of convert, inspect,")
    assert command("--version").stdout.startswith("pwiser-tf 0.")


@pytest.mark.slow
def test_the_wheel_holds_the_whole_package_and_nothing_else(tmp_path):
    # A copy, as building leaves folders behind.
    source = tmp_path / "source"
    shutil.copytree(ROOT / "pwiser_tf", source / "pwiser_tf")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = _python("-m", "pip", "wheel", "--no-deps", f"--wheel-dir={tmp_path}", str(source))
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = {name for name in content.namelist() if ".dist-info/" not in name}
    ours = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "pwiser_tf").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert names == ours
