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


def test_readme_is_one_page():
    text = (ROOT / "README.md").read_bytes()
    assert len(text) <= 10_000
    assert len(text.splitlines()) <= 130


@pytest.fixture
def folder(tmp_path):
    """A folder in which the commands find this repository's programs."""
    for name in ("tools", "examples", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _script(page: pathlib.Path) -> str:
    """The page's commands, made smaller, as a script that ends its servers."""
    text = "\n".join(_blocks(page, "sh"))
    for name, smaller in SMALLER.items():
        assert name in text, f"{page.name} has no {name} any more"
        text = text.replace(name, smaller)
    # Other tests may serve at the same time.
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
            lines.append(f"until (echo >/dev/tcp/localhost/{port}) 2>/dev/null; do")
            lines.append("  kill -0 $!; sleep 0.2; done")
    return "\n".join(["set -euo pipefail", "trap 'kill $(jobs -p) && wait' EXIT", *lines])


def _run_page(page: pathlib.Path, folder: pathlib.Path) -> str:
    """Runs the page's commands in the folder; returns what they print."""
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-c", _script(page)],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_readmes_commands_score_the_log(folder):
    _run_page(ROOT / "README.md", folder)
    log = (folder / "log.csv").read_text().splitlines()
    scores = (folder / "scores.csv").read_text().splitlines()
    assert scores[0] == "session,item,ctr,cvr,ctcvr"
    assert len(scores) == len(log)


def test_starts_commands_compare_export_and_score(folder):
    printed = _run_page(ROOT / "docs" / "start.md", folder)
    assert '"predictions"' in printed  # curl's answer
    assert (folder / "runs" / "compared" / "comparison.png").exists()
    assert (folder / "models" / "log" / "1" / "saved_model.pb").exists()


def test_readmes_python_prints_what_it_says():
    (code,) = _blocks(ROOT / "README.md", "python")
    expected = re.findall(r"^print\(.*\)  # (.*)$", code, flags=re.M)
    assert expected
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines() == expected, result.stderr
