"""Every code block of the README and of docs/ runs, and what they say of the code is true.

Blocks in HTML comments run, too: readers do not see them.
"""

import re
import subprocess
from pathlib import Path

import pytest

import hullgeo

pytestmark = pytest.mark.slow  # minutes of compiling

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Code blocks with the number of the line before their first."""
    text = page.read_text()
    return [
        (text[: match.start(2)].count("\n"), match[2])
        for match in FENCE.finditer(text)
        if match[1] == language
    ]


@each_page
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    namespace: dict = {"__name__": "docs"}
    for line, block in blocks(page, "python"):
        code = compile("\n" * line + block, str(page), "exec", dont_inherit=True)
        exec(code, namespace)


@each_page
def test_every_block_names_its_language(page):
    assert {match[1] for match in FENCE.finditer(page.read_text())} <= {"python", "bash", "text"}


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_readme_begins_with_the_two_commands():
    (_, main_job), (_, tests) = blocks(ROOT / "README.md", "bash")[:2]
    assert "-m experiments.digits" in main_job.splitlines()[-1]
    assert '-m pytest -n 2 -m "not slow"' in tests.splitlines()[-1]
    for commands in [main_job, tests]:
        assert commands.startswith("python3 -m venv .venv\n")
        done = subprocess.run(["bash", "-n"], input=commands, text=True, check=False)
        assert done.returncode == 0


def test_readme_lists_every_status():
    text = (ROOT / "README.md").read_text()
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*) \|$", text, flags=re.MULTILINE))
    assert rows == {status.name: status.message for status in hullgeo.Status}


@each_page
def test_functions_named_in_the_text_exist(page):
    text = FENCE.sub("", page.read_text())
    for name in re.findall(r"`hullgeo\.(\w+)", text):
        assert hasattr(hullgeo, name), name
