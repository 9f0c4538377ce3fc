"""One stage of training, from its first step or its newest snapshot to its best checkpoint.

A stage's folder holds `best.pt` (highest validation CIDEr), `snapshots/` (to resume from), `log.jsonl`, `speed.jsonl`
and, at the end, `curves.png`. The weights after a step are a function of recipe, data set and start alone: the order
of the data and the random numbers of a step follow from the seed and the number of the step.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from etenet.errors import UsageError
from etenet.model import checkpoint as checkpoints
from etenet.model.checkpoint import Checkpoint
from etenet.model.encoder import Encoder
from etenet.scoring.scores import Scorer
from training import curves
from training.data.datasets import Dataset, DatasetClip
from training.loop import snapshots
from training.loop.features import cached_features, digest
from training.loop.loading import Loader
from training.loop.memory import checkpoint_activations
from training.loop.order import TrainingExample, epoch_windows, examples_per_epoch
from training.loop.processes import Processes
from training.loop.run_log import RunLog
from training.loop.step import Load, Trainee, accumulate, micro_batches
from training.loop.validation import Validation, validate
from training.recipes import Recipe, Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """How far a run has come: `window` optimizer steps into `epoch` (from 0), `step` steps in all."""

    epoch: int = 0
    window: int = 0
    step: int = 0
    epoch_loss: float = 0.0  # summed over the epoch's sentences so far
    epoch_sentences: int = 0
    best: tuple[float, float] = (-math.inf, -math.inf)
    epochs_since_best: int = 0
    log_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """All that a stage needs. Within an epoch, a snapshot is saved every `save_every_s` seconds."""

    recipe: Recipe
    stage_number: int
    dataset: Dataset
    folder: Path
    processes: Processes
    resume: bool = False
    save_every_s: float = 300.0

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[self.stage_number]


class Interrupted(Exception):
    """SIGTERM came; the run is saved and can be resumed."""


def train_stage(run: Run, start: Checkpoint) -> Path:
    """Train `start` and return the path of the best checkpoint; raises `Interrupted`."""
    return _Training(run, start).finish()


class _Training:
    def __init__(self, run: Run, start: Checkpoint) -> None:
        self.run, self.stage, self.checkpoint = run, run.stage, start
        self.best, self.snapshots = run.folder / "best.pt", run.folder / "snapshots"
        self.made_with = _made_with(run, start)
        model = start.model.to(run.processes.device).to(memory_format=torch.channels_last)
        model.decoder.requires_grad_(True)
        if isinstance(model.encoder, Encoder):
            model.encoder.requires_grad_(self.stage.encoder_learning_rate > 0)
            if self.stage.activation_checkpointing and self.stage.encoder_learning_rate:
                checkpoint_activations(model.encoder.network)
        elif self.stage.encoder_learning_rate:
            raise UsageError("the data set holds features, so there is no encoder: set encoder_learning_rate to 0")
        self.learned = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.trainee = Trainee(model, start.preprocessing, self.stage)
        self.optimizer = torch.optim.Adam(_parameter_groups(model, self.stage))
        self.position = self._restored()
        self.shared = run.processes.ddp(self.trainee)
        self.loader = Loader(
            run.dataset, start.vocabulary, start.max_words, run.processes.device, self._known_features()
        )
        self.scorer = Scorer(
            {clip.video: clip.captions for clip in self._validation},
            tokenizer=self.stage.tokenizer,
            meteor=self.stage.meteor,
        )
        examples = examples_per_epoch(self._clips, self.stage)
        self.steps = self.stage.epochs * math.ceil(examples / self.stage.window_clips)
        self.log = RunLog(
            run.folder,
            title=f"stage {run.stage_number}",
            clips=self.stage.epochs * examples,
            device=run.processes.device,
            silent=not run.processes.first,
        )
        self.log.continue_from(
            self.position.log_bytes, self.position.epoch * examples + self.position.window * self.stage.window_clips
        )
        self.saved_at = time.monotonic()

    @property
    def _clips(self) -> Sequence[DatasetClip]:
        return self.run.dataset.clips["train"]

    @property
    def _validation(self) -> Sequence[DatasetClip]:
        return self.run.dataset.clips["validation"]

    def finish(self) -> Path:
        stage = self.stage
        while self.position.epoch < stage.epochs and self.position.epochs_since_best < stage.patience_epochs:
            self._epoch()
        self.log.close()
        if self.run.processes.first:
            curves.write(self.run.folder)
        return self.best

    def _epoch(self) -> None:
        run, stage = self.run, self.stage
        epoch = epoch_windows(
            self._clips, stage, seed=run.recipe.seed, stage_number=run.stage_number, epoch=self.position.epoch
        )
        windows = list(epoch)[self.position.window :]
        batches = (batch for window in windows for batch in micro_batches(window, stage.batch_clips, run.processes))
        self.trainee.train()
        with self.loader.ahead(batches) as load:
            for window in windows:
                self._step(window, load)
                if run.processes.should_stop():
                    self._save()
                    raise Interrupted(f"stopped after step {self.position.step}; continue with --resume")
                if time.monotonic() - self.saved_at >= run.save_every_s:
                    self._save()
        self._end_epoch(run.processes.broadcast(self._validate() if run.processes.first else None))

    def _step(self, window: Sequence[TrainingExample], load: Load) -> None:
        processes, position = self.run.processes, self.position
        seeds = [self.run.recipe.seed, self.run.stage_number, position.step, processes.rank]
        torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))
        share = _learning_rate_share(position.step, self.steps, self.stage)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        self.optimizer.zero_grad()
        loss = accumulate(self.shared, window, load, micro_batch=self.stage.batch_clips, processes=processes)
        nn.utils.clip_grad_value_(self.learned.values(), self.stage.gradient_clip_value)
        self.optimizer.step()
        sentences = len(window) * self.stage.captions_per_clip
        self.position = replace(
            position,
            window=position.window + 1,
            step=position.step + 1,
            epoch_loss=position.epoch_loss + loss,
            epoch_sentences=position.epoch_sentences + sentences,
        )
        self.log.step(
            clips=len(window),
            stage=self.run.stage_number,
            epoch=position.epoch + 1,
            step=position.step + 1,
            loss=loss / sentences,
            learning_rate=self.optimizer.param_groups[0]["lr"],
        )

    def _end_epoch(self, validation: Validation | None) -> None:
        assert validation is not None
        position, better = self.position, validation.rank > self.position.best
        if better and self.run.processes.first:
            checkpoints.save(self.checkpoint, self.best)
        self.log.epoch(
            waited_s=self.loader.waited_s,
            stage=self.run.stage_number,
            epoch=position.epoch + 1,
            step=position.step,
            train_loss=position.epoch_loss / position.epoch_sentences,
            validation_loss=validation.loss,
            scores=validation.scores,
            best=better,
        )
        self.position = Position(
            epoch=position.epoch + 1,
            step=position.step,
            best=validation.rank if better else position.best,
            epochs_since_best=0 if better else position.epochs_since_best + 1,
        )
        self._save()

    def _validate(self) -> Validation:
        return validate(
            self.trainee,
            self.checkpoint,
            self._validation,
            self.loader.inputs,
            self.scorer,
            batch_clips=min(self.stage.batch_clips, 32),
        )

    def _known_features(self) -> Any:
        if self.run.dataset.features is not None or self.stage.encoder_learning_rate:
            return self.run.dataset.features
        features = cached_features(
            self.trainee,
            self.run.dataset,
            self.run.folder / "features.npy",
            batch_clips=min(self.stage.batch_clips, 32),
            processes=self.run.processes,
        )
        if features is None:
            raise Interrupted("stopped while computing features; start again to compute them")
        return features

    def _save(self) -> None:
        self.saved_at = time.monotonic()
        if not self.run.processes.first:
            return
        contents = {
            "made_with": self.made_with,
            "learned": {name: weight.detach() for name, weight in self.learned.items()},
            "optimizer": self.optimizer.state_dict(),
            "progress": {**asdict(self.position), "log_bytes": self.log.flushed_bytes()},
        }
        snapshots.save(contents, self.snapshots, self.position.step)

    def _restored(self) -> Position:
        """Load the newest snapshot that is whole, if there is one."""
        if not self.run.resume:
            if any(self.snapshots.glob("*.pt")):
                raise UsageError(f"{self.run.folder} holds a run; continue with --resume, or choose another --out")
            return Position()
        snapshot = snapshots.load_newest(self.snapshots)
        if snapshot is None:
            return Position()
        if changed := [key for key, value in self.made_with.items() if snapshot["made_with"].get(key) != value]:
            names = ", ".join(changed)
            raise UsageError(f"{self.run.folder} was trained with a different {names}; choose another --out")
        with torch.no_grad():
            for name, weight in self.learned.items():
                weight.copy_(snapshot["learned"][name])
        self.optimizer.load_state_dict(snapshot["optimizer"])
        position = Position(**snapshot["progress"])
        if self.run.processes.first:
            print(f"resuming after step {position.step}", file=sys.stderr, flush=True)
        return position


def _made_with(run: Run, start: Checkpoint) -> dict[str, str]:
    """What must be unchanged when a run is resumed, by name."""
    recipe = {name: value for name, value in asdict(run.recipe).items() if name not in ("stages", "stills")}
    settings = {**recipe, **asdict(run.stage)}
    return {
        **{name: repr(value) for name, value in settings.items()},
        "data set": run.dataset.digest(),
        "start": digest(start.model),
    }


def _parameter_groups(model: nn.Module, stage: Stage) -> list[dict[str, Any]]:
    groups = [("decoder", stage.decoder_learning_rate, stage.decoder_weight_decay)]
    if stage.encoder_learning_rate:
        groups.append(("encoder", stage.encoder_learning_rate, stage.encoder_weight_decay))
    return [
        {
            "params": [weight for weight in model.get_submodule(part).parameters() if weight.requires_grad],
            "lr": rate,
            "peak": rate,
            "weight_decay": decay,
        }
        for part, rate, decay in groups
    ]


def _learning_rate_share(step: int, steps: int, stage: Stage) -> float:
    half_cosine = (1 + math.cos(math.pi * min(1.0, step / steps))) / 2
    decay = stage.final_learning_rate_share + (1 - stage.final_learning_rate_share) * half_cosine
    return decay * min(1.0, (step + 1) / (stage.warmup_steps + 1))
