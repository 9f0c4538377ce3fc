"""The walk-through of docs/training.md for one's own clips runs as it is written, on real clips."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from etenet import cli
from etenet.model.encoder import Encoder
from tests.conftest import REPOSITORY
from tests.test_readme import test_its_long_commands_know_the_options_they_name as options_exist
from training import evaluate, prepare, train

PAGE = (REPOSITORY / "docs" / "training.md").read_text()
COMMANDS = re.findall(r"^```sh own\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[0].splitlines()
LONG_COMMANDS = "".join(re.findall(r"^```sh long\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)).splitlines()
ENCODER, SIZE_PX = "squeezenet1_1", 60


def arguments_of(command: str, encoder_weights: Path) -> tuple[str, list[str]]:
    """The program of a command and its arguments, with what makes it small."""
    program, *words = shlex.split(command)
    if program == "make":
        return "etenet", ["package", words[-1].removeprefix("CHECKPOINT=")]
    if program.endswith("etenet"):
        return "etenet", words
    module, *arguments = words[1:]
    small = {
        "training.prepare": ["--encoder", ENCODER, "--resize-px", "63"],
        "training.train": ["--set", "epochs=1", "--set", "tokenizer=none", "--set", "mixed_precision=False"],
        "training.evaluate": ["--tokenizer", "none"],
    }[module]
    if arguments[1:3] == ["--stage", "1"]:
        small += [
            "--set",
            f"encoder={ENCODER}",
            "--set",
            f"crop_px={SIZE_PX}",
            "--encoder-weights",
            str(encoder_weights),
        ]
    return module, arguments + small


@pytest.mark.parametrize("command", [command for command in LONG_COMMANDS if " -m training." in command])
def test_its_other_commands_know_the_options_they_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    options_exist(command, capsys)


def write_captions(reference_data: Path, folder: Path) -> dict[str, str]:
    """clips/ and captions.csv as a user has them, and the group of each clip."""
    (folder / "clips").mkdir()
    groups = {}
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["video", "caption", "group"])
        for place, clip in json.loads((reference_data / "clips_captions.json").read_text()).items():
            path = Path(place)
            (folder / "clips" / path.name).symlink_to(reference_data / path)
            groups[path.name] = clip["captions"][0].split()[-1]  # clips with the same last word, as if of one film
            table.writerows([path.name, caption, groups[path.name]] for caption in clip["captions"])
    (folder / "clips" / "new.mp4").symlink_to(reference_data / "msrvtt" / "clips" / "video24.mp4")
    return groups


def test_own_clips_become_a_served_checkpoint(
    reference_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = write_captions(reference_data.resolve(), tmp_path)
    torch.manual_seed(0)
    weights = tmp_path / "encoder.pt"
    torch.save(Encoder(ENCODER).state_dict(), weights)
    monkeypatch.chdir(tmp_path)
    programs = {
        "training.prepare": prepare.main,
        "training.train": train.main,
        "training.evaluate": evaluate.main,
        "etenet": cli.main,
    }
    printed = []
    for command in COMMANDS:
        program, arguments = arguments_of(command, weights)
        assert programs[program](arguments) in (0, None), command
        printed.append(capsys.readouterr().out)
    lines = [json.loads(line) for line in Path("data/own/manifest.jsonl").read_text().splitlines()]
    assert len(lines) == len(groups) == 42
    assert {line["split"] for line in lines} == {"train", "validation", "test"}
    sides = {(groups[line["video"]], line["split"]) for line in lines}
    assert len(sides) == len(set(groups.values())), "no group is on two sides"
    metrics = json.loads(Path("runs/own/test/metrics.json").read_text())
    assert metrics["clips"] == sum(line["split"] == "test" for line in lines)
    assert json.loads(printed[-2])["caption"]
    assert list(tmp_path.rglob("*.mar"))
