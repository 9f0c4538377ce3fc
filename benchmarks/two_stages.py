"""`python -m benchmarks.two_stages RECIPE`: what stage 2 gains, beside its controls, on the test split.

After stage 1 the same schedule is run three times: with the encoder frozen, with the paper's encoder rate, and as the
recipe says. So a gain that comes from training for longer is not taken for one of the encoder. Scores are those of the
best checkpoint on validation, which may be the start; so validation's CIDEr is given for every epoch, too. A run that
was killed continues when the same command is given again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.rig import command
from benchmarks.rig.scores import split_scores
from etenet.model import checkpoint as checkpoints
from etenet.scoring.scores import Scorer
from training import curves
from training.data.mixture import data_source, load_all
from training.loop.memory import keep_freed_memory
from training.loop.processes import init_processes
from training.loop.stage import Run, train_stage
from training.loop.start import first_checkpoint
from training.recipes import RECIPES, overridden
from training.run_settings import Stage

PAPER_ENCODER_RATE = 1e-9
CONTROL = "encoder frozen"


def arms(first: Stage, second: Stage) -> dict[str, Stage]:
    """What may follow stage 1: name -> stage, all with the schedule of stage 2."""
    return {
        CONTROL: replace(
            second,
            encoder_learning_rate=0.0,
            mirrored_share=0.0,
            smallest_crop=first.smallest_crop,
            views=first.views,
        ),
        "encoder at 1e-9": replace(second, encoder_learning_rate=PAPER_ENCODER_RATE),
        "stage 2": second,
    }


def gains(cider: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """arm -> its CIDEr above the control's of the same seed: mean over the seeds, and largest less least.

    `cider` is that of every arm, for each seed.
    """
    of_arms: dict[str, dict[str, float]] = {}
    for arm in cider[0]:
        if arm != CONTROL:
            over = [of_seed[arm] - of_seed[CONTROL] for of_seed in cider]
            of_arms[arm] = {"mean": statistics.mean(over), "spread": max(over) - min(over)}
    return of_arms


def validation_cider(stage: Path) -> list[float]:
    """In points, after each epoch of a stage. The first is that of its start, if it has one."""
    return [100 * line["scores"]["CIDEr"] for line in curves.read(stage / "log.jsonl") if line["kind"] == "epoch"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_stages", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=("demo", "real"))
    parser.add_argument("--data", type=data_source, action="append", required=True, metavar="DIR[=WEIGHT]")
    parser.add_argument("--encoder-weights", type=Path, metavar="F.pt", help="by training.stills; default: ImageNet's")
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="seed S trains in DIR/seedS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--device", metavar="NAME", help="default: a GPU if there is one")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change stage 2 of the recipe"
    )
    options, results = command.start(parser, arguments)
    keep_freed_memory()
    dataset = load_all(options.data)
    scorer = Scorer({clip.video: clip.captions for clip in dataset.need("test")}, tokenizer="none")
    scores: dict[int, dict[str, dict[str, float]]] = {}
    validation: dict[int, dict[str, list[float]]] = {}
    for seed in options.seeds:
        recipe = replace(overridden(RECIPES[options.recipe](), 2, options.set), seed=seed)
        first, folder = recipe.stages[1], options.runs / f"seed{seed}"
        for name, stage in {"stage 1": first, **arms(first, recipe.stages[2])}.items():
            number = 1 if name == "stage 1" else 2
            with init_processes(options.device) as processes:
                run = Run(
                    recipe=replace(recipe, stages={number: stage}),
                    recipe_name=options.recipe,
                    stage_number=number,
                    dataset=dataset,
                    folder=folder / name.replace(" ", ""),
                    processes=processes,
                    resume=True,
                )
                start = (
                    first_checkpoint(recipe, dataset, options.encoder_weights)
                    if number == 1
                    else checkpoints.load(folder / "stage1" / "best.pt")
                )
                best = train_stage(run, start)
            figures = scores.setdefault(seed, {})[name] = split_scores(best, dataset, scorer)
            validation.setdefault(seed, {})[name] = validation_cider(run.folder)
            print(f"seed {seed}, {name}:", "  ".join(f"{n} {v:.1f}" for n, v in figures.items()), flush=True)
    results.conclude(
        f"two_stages_{options.recipe}",
        {
            "test_clips": len(dataset.need("test")),
            "epochs": {number: stage.epochs for number, stage in recipe.stages.items()},
            "scores_by_seed": scores,
            "cider_over_the_control": gains([{n: of["CIDEr"] for n, of in arms.items()} for arms in scores.values()]),
            "validation_cider_by_seed": validation,
            "last_validation_cider_over_the_control": gains(
                [{n: epochs[-1] for n, epochs in arms.items()} for arms in validation.values()]
            ),
        },
    )


if __name__ == "__main__":
    command.run("two_stages", main)
