"""The built wheel in a folder without a repository: what somebody has after `pip install etenet`."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from benchmarks import wheels


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheels.build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment with the wheel, which sees the libraries of this one, not its etenet."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (libraries,) = folder.glob("lib/python*/site-packages")
    (libraries / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    into = ["--python", str(folder / "bin" / "python")]
    install = [sys.executable, "-m", "pip", *into, "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    subprocess.run([*install, "--no-deps", "--ignore-installed", str(wheel)], check=True)
    return folder / "bin"


def test_the_wheel_captions_in_an_empty_folder(programs: Path, tmp_path: Path) -> None:
    clip, known = wheels.known_answer()
    assert wheels.caption(programs / "etenet", tmp_path, str(clip)) == {clip.name: known}
    assert not list(tmp_path.iterdir())


def test_the_wheel_serves_in_an_empty_folder_and_its_log_of_json_holds_nothing_else(
    programs: Path, tmp_path: Path
) -> None:
    (empty := tmp_path / "empty").mkdir()
    (clip, known), log = wheels.known_answer(), tmp_path / "log"
    variables = {"ETENET_REQUEST_LOG": "json", "JAVA_TOOL_OPTIONS": "-Dread.by=java"}
    assert wheels.serve_and_caption(programs / "etenet", empty, clip, log, **variables) == known
    assert not list(empty.iterdir())
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert all(line["time"] for line in lines)
    assert any("Picked up JAVA_TOOL_OPTIONS" in line.get("message", "") for line in lines)  # Java's own
    assert any(line.get("status") == 200 for line in lines)  # a request's
    assert lines[-1]["message"] == "etenet serve: stopped"


def test_the_wheel_brings_the_commands_of_training(programs: Path, tmp_path: Path) -> None:
    shown = subprocess.run(
        [programs / "etenet", "train", "curves", "--help"],
        cwd=tmp_path,
        env=wheels.environment_without_repository(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "RUN/stage1" in shown


def test_the_wheel_is_small_enough_for_a_registry_and_says_its_terms(wheel: Path) -> None:
    assert wheel.stat().st_size < 100 * 10**6
    with zipfile.ZipFile(wheel) as files:
        (metadata,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        about = files.read(metadata).decode()
    assert "License-Expression: Apache-2.0 AND LicenseRef-Research-Only\n" in about
    assert "License-File: model_store/MODEL_CARD.md\n" in about


def test_every_library_has_both_bounds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        (metadata,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        lines = files.read(metadata).decode().splitlines()
    needed = [line for line in lines if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert needed
    assert not [line for line in needed if not (">=" in line and "<" in line)]
