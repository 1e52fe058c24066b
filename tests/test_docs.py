"""What the documents promise exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

import fuser
import fuser.cli
from fuser import zoo

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text) + re.findall(r'src="([^"]+)"', text)
    files = re.findall(
        r"`((?:\.ci|benchmarks|codegen|docs|examples|fuser|kernels|runtime|search|templates|tests)/[\w./-]*\w)`", text
    )
    missing = [link for link in links if not (document.parent / link).exists()]
    missing += [name for name in files if "NAME" not in name and not (ROOT / name).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_names_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"\bfuser\.([a-zA-Z_]\w*)\(", text):
        assert name in fuser.__all__, name
    for name in re.findall(r"\bmasks\.([a-zA-Z_]\w*)\(", text):
        assert hasattr(fuser.masks, name), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_options_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    root = typer.main.get_command(fuser.cli.app)
    commands = {**root.commands, "cache": root.commands["cache"]}
    for name, rest in re.findall(r"`fuserc (\w+)([^`]*)`", text):
        assert name in commands, name
        options = {option for parameter in commands[name].params for option in parameter.opts}
        for sub in getattr(commands[name], "commands", {}).values():
            options |= {option for parameter in sub.params for option in parameter.opts}
        for option in re.findall(r"--[\w-]+", rest):
            assert option in options, f"{name} {option}"


def test_the_readme_lists_every_configuration() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in zoo.CONFIGURATIONS)


def test_make_targets_of_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        for line in re.findall(r"(?:`|\$ )make ([a-z ]+)", document.read_text(encoding="utf-8")):
            assert set(line.split()) <= targets, line
