"""`python -m training.curves RUN/stage1`: draw the `log.jsonl` of a run, finished or not, as `curves.png` beside it."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from etenet.errors import UsageError
from training import command

MEANS_PER_RUN = 50  # each point is the mean training loss of a fiftieth of the steps

Line = dict[str, Any]  # of a log: a step or an epoch


def write(run: Path) -> Path:
    """Draw the log of a run folder. Raises `UsageError` if the log is missing, damaged or empty."""
    path = run / "curves.png"
    draw(read(run / "log.jsonl")).savefig(path, dpi=120)
    return path


def read(log: Path) -> list[Line]:
    """The lines of a log, without an incomplete last one."""
    if not log.is_file():
        raise UsageError(f"{log} is missing; give a folder that training.train wrote to, such as RUN/stage1")
    try:
        lines = [json.loads(line) for line in log.read_text().rpartition("\n")[0].splitlines()]
    except ValueError as error:
        raise UsageError(f"{log} is damaged ({error}); give a folder that training.train wrote to") from error
    if not lines:
        raise UsageError(f"{log} is empty; draw the curves after the first step")
    return lines


def draw(lines: Sequence[Line]) -> Figure:
    """Losses (left) and validation scores (right) over epochs. A dashed line marks the epoch of the best checkpoint."""
    steps, epochs = ([line for line in lines if line["kind"] == kind] for kind in ("step", "epoch"))
    figure = Figure(figsize=(11, 4), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    _draw_losses(losses, steps, epochs)
    _draw_scores(scores, [line for line in epochs if line.get("scores")])
    for panel in (losses, scores):
        panel.set_xlabel("epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        for best in [line["epoch"] for line in epochs if line["best"]][-1:]:
            panel.axvline(best, color="grey", linestyle="--", linewidth=1, label=f"best: epoch {best}")
    losses.legend(frameon=False)
    return figure


def _draw_losses(panel: Axes, steps: Sequence[Line], epochs: Sequence[Line]) -> None:
    panel.set_title("loss")
    if steps:
        steps_per_epoch = max(Counter(line["epoch"] for line in steps).values())
        window = max(1, len(steps) // MEANS_PER_RUN)
        means = np.convolve([line["loss"] for line in steps], np.full(window, 1 / window), mode="valid")
        at = [line["step"] / steps_per_epoch for line in steps[window - 1 :]]
        panel.plot(at, means, linewidth=0.8, label="training")
    at = [line["epoch"] for line in epochs]
    panel.plot(at, [line["validation_loss"] for line in epochs], "o-", markersize=3, label="validation")


def _draw_scores(panel: Axes, epochs: Sequence[Line]) -> None:
    panel.set_title("validation scores" if epochs else "no validation scores yet")
    panel.set_ylabel("CIDEr")
    others = panel.twinx()
    others.set_ylabel("BLEU-4, METEOR, ROUGE-L")
    for i, (axes, name) in enumerate(((panel, "CIDEr"), (others, "BLEU-4"), (others, "METEOR"), (others, "ROUGE-L"))):
        scores = {line["epoch"]: line["scores"][name] for line in epochs if name in line["scores"]}
        axes.plot([*scores], [*scores.values()], "o-", color=f"C{i}", markersize=3, label=name)
    below = (0.5, -0.12)
    panel.legend(
        handles=[*panel.lines, *others.lines], loc="upper center", bbox_to_anchor=below, ncols=4, frameon=False
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.curves", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN/stage1", help="the folder with log.jsonl")
    print(write(parser.parse_args(arguments).run))


if __name__ == "__main__":
    command.run(main)
