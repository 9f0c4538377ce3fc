"""`python -m benchmarks.two_stages`: what stage 2 gains over the best of stage 1, on the demo world's test split.

The paper claims a gain of 3.1 CIDEr points on MSVD. Each seed trains both stages from the same encoder, which has
learnt another task. A run that was killed continues when the same command is given again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.rig import command
from benchmarks.rig.scores import demo_scores
from etenet.model import checkpoint as checkpoints
from etenet.scoring.scores import Scorer
from training.data.datasets import Dataset
from training.loop.memory import keep_freed_memory
from training.loop.processes import init_processes
from training.loop.stage import Run, train_stage
from training.loop.start import first_checkpoint
from training.recipes import Recipe, demo


def short(recipe: Recipe, seed: int, epochs: int | None) -> Recipe:
    second = recipe.stages[2]
    second = replace(second, epochs=epochs or second.epochs)
    return replace(recipe, seed=seed, stages={**recipe.stages, 2: second})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_stages", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="made by training.prepare demo")
    parser.add_argument("--encoder-weights", type=Path, required=True, metavar="F.pt", help="by training.stills")
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="seed S trains in DIR/seedS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stage-2-epochs", type=int, metavar="N", help="default: the recipe's")
    options, results = command.start(parser, arguments)
    keep_freed_memory()
    dataset = Dataset.load(options.data)
    scorer = Scorer({clip.video: clip.captions for clip in dataset.clips["test"]})
    scores: dict[int, dict[int, dict[str, float]]] = {}
    for seed in options.seeds:
        recipe, folder = short(demo(), seed, options.stage_2_epochs), options.runs / f"seed{seed}"
        for stage in (1, 2):
            start = (
                first_checkpoint(recipe, dataset, options.encoder_weights)
                if stage == 1
                else checkpoints.load(folder / "stage1" / "best.pt")
            )
            with init_processes() as processes:
                run = Run(
                    recipe=recipe,
                    stage_number=stage,
                    dataset=dataset,
                    folder=folder / f"stage{stage}",
                    processes=processes,
                    resume=True,
                )
                best = train_stage(run, start)
            figures = scores.setdefault(seed, {})[stage] = demo_scores(best, dataset, scorer)
            print(f"seed {seed} stage {stage}:", "  ".join(f"{n} {v:.1f}" for n, v in figures.items()), flush=True)
    gains = [stages[2]["CIDEr"] - stages[1]["CIDEr"] for stages in scores.values()]
    results.conclude(
        "two_stages",
        {
            "test_clips": len(dataset.clips["test"]),
            "epochs": {number: stage.epochs for number, stage in recipe.stages.items()},
            "scores_by_seed_and_stage": scores,
            "cider_gain_mean": statistics.mean(gains),
            "cider_gain_spread": max(gains) - min(gains),
        },
    )


if __name__ == "__main__":
    command.run("two_stages", main)
