"""The pages: their links exist, and the commands of README.md and docs/start.md work.

The commands are those in ```sh blocks. The commands of a page run in order, as one script, in a
folder with the programs of this repository and on less data: `SMALLER` has the replacements.
Installations, and commands that run for minutes and have other tests, are left out: `LEFT_OUT`.
"""

import os
import pathlib
import re
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    ROOT / "serving" / "README.md",
    ROOT / "serving" / "deploy" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
SMALLER = {
    "make quickstart": "QUICKSTART_ROWS=10000 bash tools/quickstart.sh quickstart",
    "make_log.py log.csv": "make_log.py log.csv 4000",
    "--epochs=5": "--epochs=1",
}
LEFT_OUT = ("pip install", "make test", "make demo")


def _prose(page: pathlib.Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text("utf-8"), flags=re.M | re.S)


def _blocks(page: pathlib.Path, language: str) -> list[str]:
    text = page.read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def _anchors(page: pathlib.Path) -> set[str]:
    """The anchors of a page's headings, as forges make them."""
    headings = re.findall(r"^#+ (.*)$", _prose(page), flags=re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_images_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = page if not path else (page.parent / path).resolve()
        assert found.exists(), target
        if anchor:
            assert anchor in _anchors(found), target


def test_every_page_is_in_the_navigation():
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    named = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M))
    # The studies' full output is linked from a page.
    assert {page for page in pages if not page.startswith("study/")} == named


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _commands(page: pathlib.Path) -> list[str]:
    """The page's commands, a line each, made smaller; each server is waited for."""
    text = "\n".join(_blocks(page, "sh"))
    for name, smaller in SMALLER.items():
        assert name in text, f"{page.name} has no {name} any more"
        text = text.replace(name, smaller)
    # Other tests, and the other page, may serve at the same time.
    for port in ("8500", "8501"):
        text = text.replace(port, str(_free_port()))
    lines = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith(LEFT_OUT):
            continue
        lines.append(line)
        if line.endswith("&"):
            # A reader waits until the server prints that it serves.
            port = re.search(r"--port=(\d+)", line)[1]
            answers = f"(echo >/dev/tcp/localhost/{port}) 2>/dev/null"
            lines.append(f"until {answers}; do kill -0 $!; sleep 0.2; done")
    return lines


@pytest.mark.slow
def test_the_commands_of_the_readme_and_of_getting_started_work(tmp_path):
    for name in ("tools", "examples", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    # What both pages say is run once.
    commands = dict.fromkeys(_commands(ROOT / "README.md") + _commands(ROOT / "docs" / "start.md"))
    script = ["set -euo pipefail", "trap 'kill $(jobs -p) && wait' EXIT", *commands]
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    scores = (tmp_path / "scores.csv").read_text().splitlines()
    assert scores[0] == "session,item,ctr,cvr,ctcvr"
    assert len(scores) == len((tmp_path / "log.csv").read_text().splitlines())
    assert '"predictions"' in done.stdout  # curl's answer
    assert (tmp_path / "runs" / "compared" / "comparison.png").exists()
    assert (tmp_path / "models" / "log" / "1" / "saved_model.pb").exists()


def test_readmes_python_prints_what_it_says(capsys):
    (code,) = _blocks(ROOT / "README.md", "python")
    expected = re.findall(r"^print\(.*\)  # (.*)$", code, flags=re.M)
    assert expected
    exec(code, {})
    assert capsys.readouterr().out.splitlines() == expected
