"""`python -m training.calibrate`: fit the confidence of a checkpoint on clips that it did not learn from.

The captions of a split that the network did not learn from are scored. Good is a caption whose METEOR is above the
median of the split. A logistic regression on what the search leaves behind (`etenet/model/confidence.py`) learns how
likely that is, and the checkpoint is written with it. With --minimum-risk it also gets the mean features of the split,
a regression from the features of the training split onto words (`etenet/model/word_evidence.py`), and the sentences
that it says of many clips of that split, and from then on says the sentence of least risk
(`etenet/model/minimum_risk.py`).

Prints as JSON how well the confidence can be trusted, by ten-fold cross-validation, and with --test-split on clips that
neither the network nor the regression has seen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import etenet
from etenet.errors import UsageError
from etenet.files import replacing, require_replaceable
from etenet.model import checkpoint as checkpoints
from etenet.model.confidence import FEATURES, Calibration, features_of
from etenet.model.hypothesis import Hypothesis
from etenet.model.minimum_risk import MinimumRisk, habits
from etenet.runtime import CPU_BATCH_CLIPS
from etenet.scoring.scores import TOKENIZERS, Scorer, Tokenizer
from training import command
from training.data.datasets import Dataset, DatasetClip
from training.evaluation import reliability
from training.evaluation.captioning import load_captioner
from training.evaluation.features import ClipFeatures
from training.evaluation.features import features_of as clip_features
from training.evaluation.reliability import Flags, Numbers
from training.evaluation.search_options import SEARCH_OPTIONS, search_options
from training.evaluation.word_evidence import fit_word_evidence
from training.progress import Progress, say

L2 = 10.0  # of weights of features with mean 0 and standard deviation 1, against the sum of the losses of the captions
FOLDS = 10
FEWEST_CLIPS = 50


@dataclass(frozen=True, slots=True)
class Captioned:
    """A split: the beam of each clip (most probable first), the number of its caption in the beam, and its METEOR."""

    beams: Sequence[Sequence[Hypothesis]]
    chosen: Sequence[int]
    meteor: Numbers  # (N,)

    @property
    def good(self) -> Flags:
        """(N,)."""
        return self.meteor > np.median(self.meteor)

    @property
    def log_probs(self) -> Numbers:
        """(N,)."""
        return np.array([beam[number].log_prob for beam, number in zip(self.beams, self.chosen, strict=True)])

    @property
    def features(self) -> Numbers:
        """(N, F), in the order of `FEATURES`."""
        rows = []
        for beam, number in zip(self.beams, self.chosen, strict=True):
            features = features_of(beam[number], [*beam[:number], *beam[number + 1 :]])
            rows.append([features[name] for name in FEATURES])
        return np.array(rows)

    def confidences(self, calibration: Calibration) -> Numbers:
        """(N,)."""
        pairs = zip(self.beams, self.chosen, strict=True)
        return np.array([calibration.confidence(beam[number], beam) for beam, number in pairs])


def caption_clips(
    captioner: etenet.Captioner,
    features: ClipFeatures,
    clips: Sequence[DatasetClip],
    options: etenet.CaptionOptions,
    tokenizer: Tokenizer,
) -> Captioned:
    """Raises `UsageError` for a clip that cannot be captioned."""
    beams = _beams(captioner, features, clips, options)
    chosen = [captioner.order(beam, options.length_penalty)[0] for beam in beams]
    vocabulary = captioner.checkpoint.vocabulary
    captions = {
        clip.video: [vocabulary.decode(beam[number].words)]
        for clip, beam, number in zip(clips, beams, chosen, strict=True)
    }
    per_clip = Scorer({clip.video: clip.captions for clip in clips}, tokenizer=tokenizer).score(captions).per_clip
    return Captioned(beams, chosen, np.array([per_clip[clip.video]["METEOR"] for clip in clips]))


def use_minimum_risk(
    captioner: etenet.Captioner,
    dataset: Dataset,
    held_out: NDArray[np.float32],
    options: etenet.CaptionOptions,
    folder: Path | None,
) -> None:
    """From now on, the captioner says the sentence of least risk.

    `held_out` are the mean features (N, D) of clips that the network did not learn from. Raises `UsageError`.
    """
    if not (learned := dataset.clips.get("train")):
        raise UsageError(f"{dataset.folder} has no train split, from which --minimum-risk learns what words to expect")
    features = clip_features(captioner, dataset, learned, folder)
    say(f"a regression from the features of {len(learned):,} clips onto words; a minute for 4,000 features")
    captions = [clip.captions for clip in learned]
    evidence = fit_word_evidence(features.means(learned), captions, captioner.checkpoint.vocabulary)
    minimum_risk = MinimumRisk(typical=held_out.mean(axis=0), evidence=evidence)
    captioner.checkpoint = replace(captioner.checkpoint, minimum_risk=minimum_risk)
    beams = _beams(captioner, features, learned, options)
    said = [beam[minimum_risk.order(beam)[0]].words for beam in beams]
    minimum_risk = replace(minimum_risk, habits=habits(said))
    captioner.checkpoint = replace(captioner.checkpoint, minimum_risk=minimum_risk)


def _beams(
    captioner: etenet.Captioner, features: ClipFeatures, clips: Sequence[DatasetClip], options: etenet.CaptionOptions
) -> list[list[Hypothesis]]:
    max_words = options.max_words or captioner.checkpoint.max_words
    beams: list[list[Hypothesis]] = []
    with Progress("sentences", len(clips), "clip") as progress:
        for start in range(0, len(clips), CPU_BATCH_CLIPS):
            batch = clips[start : start + CPU_BATCH_CLIPS]
            beams += captioner.beams(features.of(batch), beam_size=options.beam_size, max_words=max_words)
            progress.update(len(batch))
    if empty := [clip.video for clip, beam in zip(clips, beams, strict=True) if not beam]:
        raise UsageError(f"the network has no finite probabilities for the features of {empty[0]}")
    return beams


def _enough(dataset: Dataset, split: str) -> list[DatasetClip]:
    clips = dataset.need(split)
    if len(clips) < FEWEST_CLIPS:
        raise UsageError(f"the {split} split of {dataset.folder} has {len(clips)} clips; give at least {FEWEST_CLIPS}")
    return clips


def fit(features: Numbers, good: Flags, *, l2: float = L2) -> tuple[Numbers, float]:
    """features (N, F), good (N,) -> weights (F,) and bias of the logistic regression, by Newton's method.

    Features are standardised first, so the penalty `l2` / 2 |weights|^2 is the same for all; the bias has none.
    """
    mean, std = features.mean(axis=0), features.std(axis=0)
    std = np.where(std > 0, std, 1.0)
    inputs = np.column_stack([(features - mean) / std, np.ones(len(features))])  # (N, F + 1)
    penalty = np.diag([*np.full(features.shape[1], l2), 1e-6])
    solution = np.zeros(inputs.shape[1])
    for _ in range(100):
        probs = _sigmoid(inputs @ solution)
        gradient = inputs.T @ (probs - good) + penalty @ solution
        hessian = inputs.T @ (inputs * (probs * (1 - probs))[:, None]) + penalty
        step = np.linalg.solve(hessian, gradient)
        solution -= step
        if np.abs(step).max() < 1e-10:
            break
    weights = solution[:-1] / std
    return weights, float(solution[-1] - weights @ mean)


def cross_validated(features: Numbers, good: Flags) -> Numbers:
    """(N,): of each caption the confidence by a regression on the other folds."""
    confidences, order = np.empty(len(good)), np.random.default_rng(0).permutation(len(good))
    for fold in range(FOLDS):
        held_out = order[fold::FOLDS]
        others = np.setdiff1d(order, held_out)
        weights, bias = fit(features[others], good[others])
        confidences[held_out] = _sigmoid(features[held_out] @ weights + bias)
    return confidences


def _sigmoid(logits: Numbers) -> Numbers:
    probs: Numbers = 0.5 + 0.5 * np.tanh(0.5 * logits)
    return probs


def calibration_of(captioned: Captioned, beam_size: int) -> Calibration:
    weights, bias = fit(captioned.features, captioned.good)
    by_name = dict(zip(FEATURES, weights.tolist(), strict=True))
    return Calibration(weights=by_name, bias=bias, beam_size=beam_size)


def figures(captioned: Captioned, confidences: Numbers) -> dict[str, float]:
    """How far the confidences of a split can be trusted, beside plain log_prob."""
    numbers = {
        "clips": len(captioned.good),
        "meteor_median": float(np.median(captioned.meteor)),
        "auc": reliability.auc(confidences, captioned.good),
        "auc_of_log_prob": reliability.auc(captioned.log_probs, captioned.good),
        "calibration_error": reliability.calibration_error(confidences, captioned.good),
        "least_calibration_error": reliability.least_error(confidences),
    }
    return {name: round(number, 4) for name, number in numbers.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.figure and options.figure.suffix != ".png":
        raise UsageError(f"--figure must end in .png, got {options.figure}")
    require_replaceable(options.out, *filter(None, [options.figure]))
    settings = search_options(options)
    dataset = Dataset.load(options.data)
    splits = [options.split, *filter(None, [options.test_split])]
    captioner = load_captioner(
        options.checkpoint, dataset, device=options.device, clips=sum(len(dataset.need(split)) for split in splits)
    )
    of_splits: list[Captioned] = []
    for split in splits:
        clips = _enough(dataset, split)
        features = clip_features(captioner, dataset, clips, options.features)
        if options.minimum_risk and not of_splits:
            use_minimum_risk(captioner, dataset, features.means(clips), settings, options.features)
        of_splits.append(caption_clips(captioner, features, clips, settings, options.tokenizer))
    calibration = calibration_of(of_splits[0], settings.beam_size)
    confidences, title = cross_validated(of_splits[0].features, of_splits[0].good), f"{options.split}, cross-validated"
    measured = {options.split: figures(of_splits[0], confidences)}
    if options.test_split:
        confidences, title = of_splits[1].confidences(calibration), options.test_split
        measured[options.test_split] = figures(of_splits[1], confidences)
    checkpoints.calibrate(options.checkpoint, options.out, calibration, captioner.checkpoint.minimum_risk, measured)
    if options.figure:
        with replacing(options.figure) as file:
            reliability.draw(confidences, of_splits[-1].good, title).savefig(file, format="png", dpi=120)
    print(json.dumps(measured))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.calibrate", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="F.pt")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="made by training.prepare")
    parser.add_argument("--split", default="validation", help="clips that it did not learn from; default: validation")
    parser.add_argument("--test-split", metavar="SPLIT", help="also measure the confidence on this split")
    parser.add_argument("--out", type=Path, required=True, metavar="G.pt", help="the checkpoint with its calibration")
    parser.add_argument("--minimum-risk", action="store_true", help="say the sentence of least risk, not the likeliest")
    parser.add_argument("--features", type=Path, metavar="DIR", help="keep the features of frames there, for next time")
    parser.add_argument("--figure", type=Path, metavar="F.png", help="draw the reliability diagram (of the test split)")
    parser.add_argument(
        "--tokenizer", choices=TOKENIZERS, default="ptb", help="default: ptb; none if references are normalised already"
    )
    for option in SEARCH_OPTIONS:
        parser.add_argument(option.flag, metavar="N", help=option.usage)
    parser.add_argument("--device", default="cpu", metavar="NAME", help="a torch device, such as cuda; default: cpu")
    return parser


if __name__ == "__main__":
    command.run(main)
