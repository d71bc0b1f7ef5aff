"""The README: short, its commands and paths real."""

from __future__ import annotations

import re
import subprocess

from commands import PAGES, ROOT, commands

README = PAGES["README.md"]
OWN_DATA = PAGES["docs/start/your-own-data.md"]


def test_it_is_short() -> None:
    assert len(README.split()) <= 900


def test_make_targets_exist() -> None:
    targets = {c.split()[-1] for text in PAGES.values() for c in commands(text) if c.startswith("make ")}
    targets |= {name for text in PAGES.values() for name in re.findall(r"`make ([a-z-]+)[` ]", text)}
    assert {"quickstart", "test", "venv", "parity"} <= targets
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_install_commands_are_those_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "-m venv $(VENV)" in makefile and "python3.11" in makefile
    for page in ("README.md", "docs/start/install.md"):
        [torch] = [c.split()[-1] for c in commands(PAGES[page]) if "pip install torch" in c]
        assert f"TORCH ?= {torch}" in makefile
        assert [c for c in commands(PAGES[page]) if c.endswith("pip install -e .")]


def test_links_and_files_exist() -> None:
    for page in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGES[page]):
            assert (ROOT / target).is_file(), target
    first = re.findall(r"^\d\. `(\S+\.py)`", README, re.MULTILINE)
    assert len(first) == 8 and all((ROOT / "megatron_anymal" / name).is_file() for name in first)


def test_own_data_is_that_of_the_page() -> None:
    """The six commands are run by test_your_own_data.py, under the name that the page gives to its rehearsal."""
    section = README.partition("## Your own data")[2].partition("\n## ")[0]
    six = commands(section)
    assert len(six) == 6
    assert {c.replace("runs/pretrain_1b_image", "runs/rehearsal") for c in six} <= set(commands(OWN_DATA))
