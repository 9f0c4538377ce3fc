"""The README tells the truth: its commands run, its answer is the real one, its lists are those of the code."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from etenet.errors import CaptionError
from etenet.video.ffmpeg import CONTAINERS, DECODERS
from etenet.video.limits import DecodeLimits
from tests.conftest import REPOSITORY, Server

README = (REPOSITORY / "README.md").read_text()
BIN = f"{Path(sys.executable).parent}/"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands(kind: str) -> list[str]:
    return [line for block in blocks(kind) for line in block.splitlines()]


@pytest.fixture
def newcomer(tmp_path: Path) -> Path:
    """A folder that looks like the repository and may be written to."""
    (tmp_path / "model_store").mkdir()
    (tmp_path / "model_store" / "demo.pt").symlink_to(REPOSITORY / "model_store" / "demo.pt")
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    return tmp_path


def test_the_first_screen_has_both_commands_a_request_and_its_answer() -> None:
    first = "\n".join(README.splitlines()[:25])
    for expected in ("make serve", "make test", "curl -T examples/", '"caption":', '"timing_ms":'):
        assert expected in first


def test_its_request_gets_its_answer(server: Server, newcomer: Path) -> None:
    (request,) = [command for command in commands("sh") if command.startswith("curl")]
    command = shlex.split(request.replace("localhost:8080", server.inference))
    said = subprocess.run([*command, "--silent"], cwd=newcomer, capture_output=True, check=True).stdout
    (shown,) = blocks("json")
    answer, expected = json.loads(said), json.loads(shown)
    assert answer.pop("timing_ms").keys() == expected.pop("timing_ms").keys()
    for sentence in (*answer["captions"], *expected["captions"]):
        sentence["log_prob"] = pytest.approx(sentence["log_prob"], abs=5e-3)
        sentence["words"] = [(word["word"], pytest.approx(word["prob"], abs=5e-3)) for word in sentence["words"]]
    assert answer == expected


@pytest.mark.parametrize("command", [command for command in commands("sh") if not command.startswith("curl")])
def test_its_commands_run(server: Server, newcomer: Path, command: str) -> None:
    words = shlex.split(command.replace(".venv/bin/", BIN).replace("http://localhost:8080", server.inference))
    assert subprocess.run(words, cwd=newcomer, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("command", commands("sh long"))
def test_its_long_commands_know_the_options_they_name(command: str) -> None:
    program, *options = shlex.split(command.replace(".venv/bin/", BIN))
    at = options.index(next(word for word in options if word.startswith("training."))) + 1
    subcommand = [word for word in options[at : at + 1] if not word.startswith("--")]
    shown = subprocess.run(
        [program, *options[:at], *subcommand, "--help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert not [option for option in options if option.startswith("--") and option not in shown]


@pytest.mark.parametrize("word", sorted(set(re.findall(r"make (serve|test|check|demo-model|clean)\b", README))))
def test_its_make_targets_exist(word: str) -> None:
    assert subprocess.run(["make", "-n", word], cwd=REPOSITORY, capture_output=True, check=False).returncode == 0


def test_its_python_runs(newcomer: Path) -> None:
    (code,) = blocks("python")
    assert subprocess.run([sys.executable, "-c", code], cwd=newcomer, capture_output=True, check=True).stdout.strip()


def test_its_tree_names_every_file() -> None:
    tree = README[README.index("## The parts") :]
    for folder in ("src/etenet", "handler", "training"):
        for path in (REPOSITORY / folder).iterdir():
            if path.suffix in {".py", ".yaml", ".xml", ".mp4"} and not path.stem.startswith("__"):
                assert path.name in tree, path


def test_its_lists_are_those_of_the_code() -> None:
    assert f"| containers | {', '.join(CONTAINERS)} |".replace("mpeg,", "mpeg (program stream),") in README
    assert f"| codecs | {', '.join(DECODERS)} |" in README


def test_its_errors_are_those_of_the_code() -> None:
    table = README[README.index("| status | code |") :].split("\n\n")[0]
    named = dict.fromkeys(re.findall(r"`(\w+)`", table))
    assert set(named) == {kind.code for kind in CaptionError.__subclasses__()}


def test_the_security_page_names_the_lists_and_limits_in_force() -> None:
    page = (REPOSITORY / "SECURITY.md").read_text()
    assert f"| containers | {', '.join(CONTAINERS)} |" in page
    assert f"| decoders | {', '.join(DECODERS)} |" in page
    limits = DecodeLimits()
    shown = {
        "max_body_bytes": f"{limits.max_body_bytes // 2**20} MiB",
        "max_pixels": f"{limits.max_pixels:,}",
        "max_packets": f"{limits.max_packets:,}",
        "max_segments": f"{limits.max_segments}",
        "max_memory_bytes": f"{limits.max_memory_bytes // 2**30} GiB",
        "decode_deadline_s": f"{limits.decode_deadline_s:g} s",
    }
    assert shown.keys() == {field.name for field in fields(DecodeLimits)}
    for name, value in shown.items():
        assert f"| {value} | `{name}` |" in page
    settings = yaml.safe_load((REPOSITORY / "handler" / "model-config.yaml").read_text())["etenet"]
    assert DecodeLimits(**settings) == limits
