"""What a run says of itself while it runs: on standard error, and for TensorBoard where that is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from etenet.errors import UsageError
from training import train
from training.loop import tensorboard
from training.loop.run_log import RunLog, locked
from training.loop.tensorboard import TensorBoard
from training.progress import Progress, counted, duration


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_off_a_terminal_a_line_comes_soon_and_then_every_30_s(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Progress("stage 2", 1000, "clip", done=100, clock=clock)
    for clock.now_s in range(1, 71):  # type: ignore[assignment]
        progress.update(4, f"step {clock.now_s}")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "training: stage 2: 120 of 1,000 clips, 4.0 a second, about 4 min left (step 5)",
        "training: stage 2: 240 of 1,000 clips, 4.0 a second, about 3 min left (step 35)",
        "training: stage 2: 360 of 1,000 clips, 4.0 a second, about 3 min left (step 65)",
    ]
    silent = Progress("stage 2", 1000, "clip", silent=True, clock=clock)
    clock.now_s = 1000.0
    silent.update(1)
    assert capsys.readouterr().err == ""


def test_what_a_loop_takes_is_counted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.progress.FIRST_LINE_S", 0.0)
    assert list(counted("abc", "letters", "letter")) == ["a", "b", "c"]
    assert capsys.readouterr().err.startswith("training: letters: 1 of 3 letters, ")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (99, "99 s"), (1000, "17 min"), (10_000, "2 h 47 min"), (7200, "2 h 00 min")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_has_ended(
    features_dataset: Path, tmp_path: Path
) -> None:
    command = [
        "real",
        "--stage",
        "1",
        "--data",
        str(features_dataset),
        "--out",
        str(tmp_path),
        "--set",
        "epochs=1",
        "--set",
        "projection=4",
    ]
    with locked(tmp_path / "stage1"), pytest.raises(UsageError, match=r"^another run is training in .*/stage1; wait"):
        train.main(command)
    assert train.main(command) == 0


def test_tensorboard_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"^--tensorboard needs the package tensorboard: pip install tensorboard, or"):
        TensorBoard(tmp_path, 0)


def test_tensorboard_gets_the_numbers_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the writer, because the package is not installed here."""
    written: list[tuple[str, float, int]] = []
    made: list[tuple[str, int]] = []

    def writer(folder: str, purge_step: int) -> SimpleNamespace:
        made.append((folder, purge_step))
        add: Callable[..., None] = lambda *values: written.append(values)  # noqa: E731
        return SimpleNamespace(add_scalar=add, close=lambda: None)

    stand_in: Any = ModuleType("torch.utils.tensorboard.writer")
    stand_in.SummaryWriter = writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", ModuleType("torch.utils.tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", stand_in)
    monkeypatch.setattr(tensorboard, "find_spec", lambda _: True)
    board = TensorBoard(tmp_path / "tensorboard", 7)
    assert made == [(str(tmp_path / "tensorboard"), 8)]
    log = RunLog(tmp_path, device=torch.device("cpu"), silent=False, log_bytes=0, board=board)
    log.step(clips=2, stage=1, epoch=2, step=8, loss=3.0, learning_rate=0.1, gradient_norm=2.0)
    log.epoch(
        waited_s=0.0,
        epochs=4,
        stage=1,
        epoch=2,
        step=8,
        train_loss=3.5,
        validation_loss=4.5,
        scores={"CIDEr": 0.5},
        best=True,
    )
    log.close()
    assert {("loss", 3.0, 8), ("learning_rate", 0.1, 8), ("gradient_norm", 2.0, 8)} <= set(written)
    assert {("train_loss", 3.5, 8), ("validation_loss", 4.5, 8), ("CIDEr", 0.5, 8)} <= set(written)
