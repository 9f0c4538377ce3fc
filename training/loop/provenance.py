"""What a run is made with: for whoever finds its `best.pt`, in `recipe.json`, and to refuse another run's snapshots."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import etenet
from etenet.files import replacing
from etenet.model.checkpoint import Checkpoint
from training.loop.features import digest
from training.loop.validation import Validation

if TYPE_CHECKING:
    from training.loop.stage import Run

# A run may be continued for more or fewer epochs, and with another split of the same effective batch.
MAY_CHANGE = {
    "epochs",
    "patience_epochs",
    "batch_clips",
    "accumulation_steps",
    "activation_checkpointing",
    "compiled",
}


def made_with(run: Run, start: Checkpoint) -> dict[str, str]:
    """What must be unchanged when a run is resumed, by name."""
    settings = {**_of_recipe(run), **asdict(run.stage)}
    return {
        **{name: repr(value) for name, value in settings.items() if name not in MAY_CHANGE},
        "batch_clips x accumulation_steps": str(run.stage.window_clips),
        "data set": run.dataset.digest(),
        "start": digest(start.model),
    }


def provenance(run: Run, *, data: str, epoch: int, validation: Validation) -> dict[str, Any]:
    """What `best.pt` says of itself. `data` is the digest of the data set."""
    return {
        "recipe": run.recipe_name,
        "stage": run.stage_number,
        "seed": run.recipe.seed,
        "data": data,
        "epoch": epoch,
        "scores": dict(validation.scores),
        "validation_loss": validation.loss,
        "version": etenet.__version__,
    }


def write_recipe(run: Run, *, data: str) -> None:
    """`recipe.json` in the stage's folder: every number of the run."""
    contents = {
        "recipe": run.recipe_name,
        "stage": run.stage_number,
        "version": etenet.__version__,
        "data": data,
        "settings": _of_recipe(run),
        "stage_settings": asdict(run.stage),
    }
    run.folder.mkdir(parents=True, exist_ok=True)
    with replacing(run.folder / "recipe.json") as file:
        file.write(json.dumps(contents, indent=2).encode() + b"\n")


def _of_recipe(run: Run) -> dict[str, Any]:
    return {name: value for name, value in asdict(run.recipe).items() if name not in ("stages", "stills")}
