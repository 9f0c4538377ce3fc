"""One stage of training, from its first step or its newest snapshot to its best checkpoint.

A stage's folder holds `best.pt` (highest validation CIDEr), `recipe.json`, `snapshots/` (to resume from), `log.jsonl`,
`speed.jsonl` and, at the end, `curves.png`. The weights after a step are a function of recipe, data set and start
alone: the order of the data and the random numbers of a step follow from the seed and the number of the step.

A stage that starts from a checkpoint validates it first, as epoch 0: `best.pt` is never worse than its start.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from etenet.errors import EtenetError, JavaError, UsageError
from etenet.model import checkpoint as checkpoints
from etenet.model.checkpoint import Checkpoint
from etenet.model.encoder import Encoder
from etenet.scoring.scores import Scorer
from training import curves
from training.data.datasets import Dataset, DatasetClip, EncodedCaptions
from training.loop import snapshots
from training.loop.agreement import with_preferences
from training.loop.averaging import WeightAverage
from training.loop.features import cached_features
from training.loop.imagined import Imagination, unseen_clips
from training.loop.loading import Loader
from training.loop.memory import checkpoint_activations, out_of_memory_named
from training.loop.optimizer import adam, clip_gradients, set_learning_rates
from training.loop.order import TrainingExample, epoch_windows, examples_per_epoch
from training.loop.processes import Processes
from training.loop.projection import start_projection
from training.loop.provenance import made_with, provenance, write_recipe
from training.loop.reward import CiderD
from training.loop.run_log import RunLog
from training.loop.self_critical import mixed_losses
from training.loop.step import Load, Objective, Trainee, accumulate, micro_batches
from training.loop.tensorboard import TensorBoard
from training.loop.validation import Validation, validate
from training.progress import Progress, say
from training.run_settings import Recipe, Stage


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
    recipe_name: str = ""
    resume: bool = False
    save_every_s: float = 300.0
    tensorboard: bool = False

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[self.stage_number]


class Interrupted(EtenetError):
    """SIGTERM or Ctrl-C came; the run is saved and can be resumed."""


def train_stage(run: Run, start: Checkpoint) -> Path:
    """Train `start` and return the path of the best checkpoint; raises `Interrupted`."""
    with out_of_memory_named(run.stage):
        return _Training(run, start).finish()


class _Training:
    def __init__(self, run: Run, start: Checkpoint) -> None:
        self.run, self.stage = run, run.stage
        self.checkpoint = replace(start, confidence=None, minimum_risk=None)  # which are of the weights that it had
        self.clips, self.validation = run.dataset.need("train"), run.dataset.need("validation")
        if self.stage.caption_agreement:
            self.clips = with_preferences(self.clips, start.vocabulary, self.stage.caption_agreement)
        self.best, self.snapshots = run.folder / "best.pt", run.folder / "snapshots"
        self.made_with = made_with(run, start)
        model = start.model.to(run.processes.device).to(memory_format=torch.channels_last)
        model.decoder.requires_grad_(True)
        if isinstance(model.encoder, Encoder):
            model.encoder.requires_grad_(self.stage.encoder_learning_rate > 0)
            if self.stage.activation_checkpointing and self.stage.encoder_learning_rate:
                checkpoint_activations(model.encoder.network)
        elif self.stage.encoder_learning_rate:
            raise UsageError("the data set holds features, so there is no encoder: set encoder_learning_rate to 0")
        self.learned = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.unseen = unseen_clips(run.dataset, self.stage, start.vocabulary)
        self.trainee = Trainee(model, start.preprocessing, self.stage, objective=self._objective())
        self.optimizer = adam(model, self.stage)
        self.average = WeightAverage(self.learned, self.stage.weight_average)
        self.position = self._restored()
        if run.processes.first:
            write_recipe(run, data=self.made_with["data set"])
        self.shared = run.processes.ddp(self.trainee)
        self.scorer = Scorer(
            {clip.video: clip.captions for clip in self.validation},
            tokenizer=self.stage.tokenizer,
            meteor=self.stage.meteor,
        )
        self.examples = examples_per_epoch(self.clips + self.unseen, self.stage)
        self.steps = self.stage.epochs * math.ceil(self.examples / self.stage.window_clips)
        silent, step = not run.processes.first, self.position.step
        board = TensorBoard(run.folder / "tensorboard", step) if run.tensorboard and not silent else None
        self.log = RunLog(
            run.folder,
            device=run.processes.device,
            silent=silent,
            log_bytes=self.position.log_bytes,
            board=board,
        )
        if not silent:
            for line in self._described():
                say(line)
        self.loader = Loader(
            run.dataset, start.vocabulary, start.max_words, run.processes.device, self._known_features()
        )
        self.imagination = self._imagination() if self.unseen else None
        if self.position.step == 0 and not start.provenance and start.model.decoder.config.projection_size:
            self._start_projection()
        self.saved_at = time.monotonic()

    def _described(self) -> list[str]:
        """What is about to run, in one line, and a warning if that takes long."""
        run, stage, device = self.run, self.stage, self.run.processes.device
        name = f"{torch.get_num_threads()} threads"
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)  # GPU only
        precision = "bfloat16 encoder" if stage.mixed_precision and run.dataset.has_frames else "float32"
        of = f" of {run.recipe_name}" if run.recipe_name else ""
        lines = [
            f"stage {run.stage_number}{of} on {device} ({name}), {self.checkpoint.model.encoder.name}, {precision}: "
            f"{len(self.clips):,} clips, {len(self.validation):,} to validate, at most {stage.epochs} epochs of "
            f"{self.steps // stage.epochs:,} steps"
        ]
        if device.type == "cpu" and stage.encoder_learning_rate:
            lines.append(
                "warning: the encoder learns on a CPU, which is slow; use a GPU (--device cuda), "
                "or fewer frames per step (--set frames_per_clip=2)"
            )
        if stage.unseen_weight and not self.unseen:
            lines.append(
                f"warning: {run.dataset.folder} lists no clips without frames, so unseen_weight does nothing; to have "
                "them, prepare it with --allow-missing from annotations that have more clips"
            )
        if stage.views > 1 and not run.dataset.has_frames:
            lines.append("warning: the data set holds features, so every clip has one view")
        return lines

    def _objective(self) -> Objective | None:
        """The reward of self-critical training. Document frequencies are those of the training captions."""
        stage, start = self.stage, self.checkpoint
        if not stage.samples_per_clip:
            return None
        captions = {(clip.part, clip.video): clip.captions for clip in [*self.clips, *self.unseen]}
        return partial(
            mixed_losses,
            reward=CiderD.from_captions(captions, start.vocabulary),
            teacher_forcing=stage.teacher_forcing,
            attention_penalty=stage.attention_penalty,
            sentences=stage.samples_per_clip,
            baseline=stage.baseline,
            max_words=start.max_words,
        )

    def _imagination(self) -> Imagination:
        """Of the clips without frames, by the training clips of the first folder."""
        donors = [clip for clip in self.clips if clip.part == 0]
        return Imagination(donors, self._means(donors), self.unseen, self.checkpoint.vocabulary)

    def _clips(self, epoch: int) -> list[DatasetClip]:
        """Those to train on in this epoch."""
        if self.imagination is None:
            return self.clips
        rng = np.random.default_rng([self.run.recipe.seed, self.run.stage_number, epoch])
        return self.clips + self.imagination.clips(rng)

    @torch.no_grad()
    def _means(self, clips: Sequence[DatasetClip]) -> NDArray[np.float32]:
        """The mean features of each clip, (N, D)."""
        batches = (clips[start : start + 32] for start in range(0, len(clips), 32))
        means = [self.trainee.features(self.loader.inputs(batch)).mean(1).cpu().numpy() for batch in batches]
        return np.concatenate(means)

    @torch.no_grad()
    def _start_projection(self) -> None:
        """Of a new decoder, from the mean features of the training clips and the words of their captions."""
        project = self.trainee.model.decoder.project
        assert isinstance(project, nn.Linear)
        start_projection(
            project,
            self._means(self.clips),
            [clip.captions for clip in self.clips],
            self.checkpoint.vocabulary,
            [clip.weight for clip in self.clips],
        )

    def finish(self) -> Path:
        stage, position = self.stage, self.position
        starts_trained = self.run.stage_number > 1 or bool(self.checkpoint.provenance)
        if starts_trained and math.isinf(position.best[0]):
            self._validate_start()
        done = position.epoch * self.examples + position.window * stage.window_clips
        self.log.show(
            Progress(
                f"stage {self.run.stage_number}",
                stage.epochs * self.examples,
                "clip",
                done=done,
                silent=not self.run.processes.first,
            )
        )
        while self.position.epoch < stage.epochs and self.position.epochs_since_best < stage.patience_epochs:
            self._epoch()
        self.log.close()
        if self.run.processes.first:
            curves.write(self.run.folder)
        return self.best

    def _epoch(self) -> None:
        run, stage = self.run, self.stage
        epoch = epoch_windows(
            self._clips(self.position.epoch),
            stage,
            seed=run.recipe.seed,
            stage_number=run.stage_number,
            epoch=self.position.epoch,
            frames_per_clip=stage.frames_per_clip,
        )
        windows = list(epoch)[self.position.window :]
        batches = (batch for window in windows for batch in micro_batches(window, stage.batch_clips, run.processes))
        self.trainee.train()
        with self.loader.ahead(batches) as load:
            for window in windows:
                self._step(window, partial(_with_clips, load) if stage.samples_per_clip else load)
                if run.processes.should_stop():
                    self._stop()
                if time.monotonic() - self.saved_at >= run.save_every_s:
                    self._save()
        self._end_epoch()

    def _step(self, window: Sequence[TrainingExample], load: Load) -> None:
        processes, position, stage = self.run.processes, self.position, self.stage
        seeds = [self.run.recipe.seed, self.run.stage_number, position.step, processes.rank]
        torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))
        rates = set_learning_rates(self.optimizer, stage, step=position.step, steps=self.steps)
        self.optimizer.zero_grad()
        loss = accumulate(self.shared, window, load, micro_batch=stage.batch_clips, processes=processes)
        norm = clip_gradients(self.learned.values(), stage)
        self.optimizer.step()
        self.average.update(position.step + 1)
        sentences = len(window) * stage.captions_per_clip
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
            **rates,
            gradient_norm=norm,
        )

    def _validate_start(self) -> None:
        """Epoch 0: what the stage has to beat."""
        self._scored(epoch=0, train_loss=None, waited_s=0.0)
        self._save()

    def _end_epoch(self) -> None:
        position = self.position
        better = self._scored(
            epoch=position.epoch + 1,
            train_loss=position.epoch_loss / position.epoch_sentences,
            waited_s=self.loader.waited_s,
        )
        self.position = Position(
            epoch=position.epoch + 1,
            step=position.step,
            best=self.position.best,
            epochs_since_best=0 if better else position.epochs_since_best + 1,
        )
        self._save()

    def _scored(self, *, epoch: int, train_loss: float | None, waited_s: float) -> bool:
        """Validate, save the checkpoint if it is the best so far, and log. Returns whether it is."""
        run = self.run
        try:
            with self.average.applied():
                validation = run.processes.broadcast(self._validate() if run.processes.first else None)
                assert validation is not None
                if (better := validation.rank > self.position.best) and run.processes.first:
                    made = provenance(run, data=self.made_with["data set"], epoch=epoch, validation=validation)
                    checkpoints.save(replace(self.checkpoint, provenance=made), self.best)
        except JavaError:  # Ctrl-C ends METEOR's program too
            if run.processes.stop.is_set():
                self._stop()  # not above, where the weights are the average
            raise
        if better:
            self.position = replace(self.position, best=validation.rank)
        self.log.epoch(
            waited_s=waited_s,
            epochs=self.stage.epochs,
            stage=run.stage_number,
            epoch=epoch,
            step=self.position.step,
            train_loss=train_loss,
            validation_loss=validation.loss,
            scores=validation.scores,
            best=better,
        )
        return better

    def _validate(self) -> Validation:
        return validate(
            self.trainee,
            self.checkpoint,
            self.validation,
            self.loader.inputs,
            self.scorer,
            batch_clips=min(self.stage.batch_clips, 32),
        )

    def _known_features(self) -> NDArray[np.float32] | None:
        run = self.run
        if not run.dataset.has_frames or self.stage.encoder_learning_rate:
            return None
        features = cached_features(
            self.trainee,
            run.dataset,
            run.folder / "features.npy",
            batch_clips=min(self.stage.batch_clips, 32),
            processes=run.processes,
            others=[run.folder.parent / f"stage{number}" / "features.npy" for number in range(1, run.stage_number)],
        )
        if features is None:
            raise Interrupted("stopped while computing features")
        return features

    def _stop(self) -> None:
        self._save()
        raise Interrupted(f"stopped after step {self.position.step}")

    def _save(self) -> None:
        self.saved_at = time.monotonic()
        if not self.run.processes.first:
            return
        contents = {
            "made_with": self.made_with,
            "learned": {name: weight.detach() for name, weight in self.learned.items()},
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.average,
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
        self.average.restore(snapshot["average"])
        position = Position(**snapshot["progress"])
        if self.run.processes.first:
            say(f"resuming after step {position.step}")
        return position


def _with_clips(
    load: Load, examples: Sequence[TrainingExample]
) -> tuple[Tensor, tuple[list[tuple[int, str]], EncodedCaptions]]:
    """What self-critical training takes: features, whose they are, and a caption of each."""
    features, captions = load(examples)
    return features, ([(example.clip.part, example.clip.video) for example in examples], captions)
