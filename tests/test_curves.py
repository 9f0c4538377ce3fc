"""The curves are those of the log, whether its run is finished, running, or was killed in the middle of a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from etenet.errors import UsageError
from training import curves

STEPS_PER_EPOCH, EPOCHS, BEST = 40, 5, 4


def log_lines(*, scored: bool = True) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for epoch in range(1, EPOCHS + 1):
        for step in range((epoch - 1) * STEPS_PER_EPOCH + 1, epoch * STEPS_PER_EPOCH + 1):
            lines.append({"kind": "step", "stage": 1, "epoch": epoch, "step": step, "loss": 200 / step + step % 4})
        scores = {"CIDEr": epoch / 10, "BLEU-4": 0.3, "METEOR": 0.2, "ROUGE-L": 0.5}
        lines.append({"kind": "epoch", "stage": 1, "epoch": epoch, "train_loss": 2.0, "validation_loss": 9.0 - epoch})
        lines[-1] |= {"best": epoch in (1, BEST)} | ({"scores": scores} if scored else {})
    return lines


def write_log(folder: Path, lines: list[dict[str, Any]], torn: str = "") -> Path:
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return path


def drawn(figure: Figure, title: str) -> dict[str, tuple[list[float], list[float]]]:
    """label -> (x, y) of the lines in the panel of that title and in the panel that overlays it."""
    (panel,) = [axes for axes in figure.axes if axes.get_title() == title]
    same_place = [axes for axes in figure.axes if axes.bbox.bounds == panel.bbox.bounds]
    return {
        str(line.get_label()): (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist())
        for axes in same_place
        for line in axes.lines
    }


def test_the_picture_is_not_blank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path, log_lines())
    curves.main([str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "curves.png")
    picture = Image.open(tmp_path / "curves.png").convert("RGB")
    assert 800 <= picture.width <= 2000
    assert 300 <= picture.height <= 1000
    assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 50


def test_the_losses_are_those_of_the_log() -> None:
    lines = drawn(curves.draw(log_lines()), "loss")
    assert lines["validation"] == ([1, 2, 3, 4, 5], [8, 7, 6, 5, 4])
    at, means = lines["training"]
    losses = [line["loss"] for line in log_lines() if line["kind"] == "step"]
    window = len(losses) // curves.MEANS_PER_RUN
    assert means == pytest.approx([np.mean(losses[i : i + window]) for i in range(len(losses) - window + 1)])
    assert (at[0], at[-1]) == (window / STEPS_PER_EPOCH, EPOCHS)


def test_the_scores_are_those_of_the_log_and_the_last_best_is_marked() -> None:
    figure = curves.draw(log_lines())
    scores = drawn(figure, "validation scores")
    assert scores["CIDEr"] == ([1, 2, 3, 4, 5], [0.1, 0.2, 0.3, 0.4, 0.5])
    assert scores["ROUGE-L"][1] == [0.5] * EPOCHS
    for title in ("loss", "validation scores"):
        assert drawn(figure, title)[f"best: epoch {BEST}"][0] == [BEST, BEST]


@pytest.mark.parametrize("count", [1, 7, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1, STEPS_PER_EPOCH + 9])
def test_a_run_that_is_still_going_is_drawn_without_its_torn_line(tmp_path: Path, count: int) -> None:
    log = write_log(tmp_path, log_lines()[:count], torn='{"kind": "st')
    assert curves.read(log) == log_lines()[:count]
    curves.write(tmp_path)
    assert (tmp_path / "curves.png").is_file()


def test_a_run_without_scores_is_drawn() -> None:
    figure = curves.draw(log_lines(scored=False))
    assert drawn(figure, "no validation scores yet")["CIDEr"] == ([], [])


@pytest.mark.parametrize("contents", [None, "", '{"kind": "st', "not json\n"])
def test_a_log_with_nothing_to_draw_is_named(tmp_path: Path, contents: str | None) -> None:
    if contents is not None:
        (tmp_path / "log.jsonl").write_text(contents)
    with pytest.raises(UsageError, match=r"log\.jsonl"):
        curves.write(tmp_path)
    assert not (tmp_path / "curves.png").exists()
