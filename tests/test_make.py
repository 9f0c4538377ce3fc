"""What `make` installs, and what it says of that."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def needed(requirements: list[str]) -> dict[str, Distribution]:
    """The packages that requirements bring, as they are installed here."""
    found: dict[str, Distribution] = {}
    todo = [Requirement(each) for each in requirements]
    while todo:
        requirement = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        package = distribution(requirement.name)
        wanted = [Requirement(each) for each in package.requires or ()]
        of_extras = [
            each
            for each in wanted
            if each.marker and any(each.marker.evaluate({"extra": extra}) for extra in requirement.extras)
        ]
        for each in of_extras:
            each.marker = None
        if package.name not in found:
            found[package.name] = package
            todo += wanted
        todo += [each for each in of_extras if distribution(each.name).name not in found]
    return found


def said(folder: Path, *arguments: str, path: str = "/usr/bin:/bin") -> str:
    """What `make` would run in a new clone."""
    return subprocess.run(
        ["make", "-n", *arguments, f"VENV={folder}"],
        cwd=REPOSITORY,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_serve_installs_what_serving_needs_and_says_how_much_that_is(tmp_path: Path) -> None:
    serving = needed(PROJECT["dependencies"])
    shown = said(tmp_path, "serve")
    assert "--editable .\n" in shown
    assert "[dev]" not in shown
    assert "download.pytorch.org" not in shown
    found = re.search(r"(\d+) packages, (\d+) GB", shown)
    assert found
    assert int(found[1]) == len(serving) + 1  # and etenet
    installed_bytes = sum(file.size or 0 for package in serving.values() for file in package.files or ())
    assert int(found[2]) == pytest.approx(installed_bytes / 1e9, abs=0.6)


def test_test_installs_everything_at_once_before_it_runs(tmp_path: Path) -> None:
    shown = said(tmp_path, "test")
    assert shown.count(" --editable ") == 1
    assert shown.index("--editable '.[dev]'\n") < shown.index("-m pytest")


def test_uv_installs_where_it_is_there(tmp_path: Path) -> None:
    assert f"{tmp_path}/bin/pip install" in said(tmp_path, "serve", "UV=")
    (tmp_path / "uv").touch(0o755)
    shown = said(tmp_path, "serve", path=f"{tmp_path}:/usr/bin:/bin")
    assert f"uv pip install --python {tmp_path}/bin/python --constraint constraints.txt --editable ." in shown
    assert "/pip install" not in shown


def test_torch_for_a_cpu_comes_first_and_alone_from_the_index_that_the_readme_names(tmp_path: Path) -> None:
    first, second = [line for line in said(tmp_path, "serve", "TORCH=cpu").splitlines() if " install " in line]
    assert first.endswith("--constraint constraints.txt --no-deps torch torchvision")
    assert second.endswith("--constraint constraints.txt --editable .")
    variable = re.search(r"PIP_INDEX_URL=\S+", (REPOSITORY / "README.md").read_text())
    assert variable
    assert first.startswith(variable[0])
    assert f"'{PROJECT['dependencies'][0]}' torchvision" in (REPOSITORY / "README.md").read_text()
