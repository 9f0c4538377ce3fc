"""`python -m training.evaluate`: caption the clips of a split with exactly the serving code, and score the captions.

    captions.jsonl    a line for each clip; with --beside also what the others say of it
    metrics.json      scores, and what they were computed with
    table.md          a row for each baseline and checkpoint, in percent
    report.html       the table, and the best, the worst and some random clips: frames, attention, captions, references
    figure3.png       some of the same clips, as figure 3 of the paper shows its own
    features/         of frames, for the next run with the same encoder

A data set of given features has no pictures and no figure. Where clips carry labels (the demo world), a caption is
right about an attribute if it names the clip's own value and no other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import etenet
from etenet.captioning.captions import Sentence
from etenet.errors import UsageError
from etenet.files import json_line, replacing, require_replaceable
from etenet.model import checkpoint as checkpoints
from etenet.scoring.scores import TOKENIZERS, Scorer, Scores
from training import command
from training.data.datasets import Dataset, DatasetClip
from training.demo import world
from training.evaluation import baselines, figure, report, table
from training.evaluation.captioning import load_captioner, sentences_of
from training.evaluation.examples import Attention, ReportedClip, chosen, shown_once
from training.evaluation.features import features_of
from training.evaluation.search_options import SEARCH_OPTIONS, search_options
from training.evaluation.table import Row

FILES = ("captions.jsonl", "metrics.json", "table.md", "report.html", "figure3.png")
CLIPS_IN_REPORT = 8  # of each kind: best, worst, random
CLIPS_IN_FIGURE = 2


@dataclass(frozen=True, slots=True)
class Named:
    """A checkpoint and its name in the table: "step 1" by what the file says of itself, or a name that was given."""

    name: str
    path: Path
    stage: int | None = None

    @classmethod
    def parse(cls, text: str) -> Named:
        """F.pt or NAME=F.pt."""
        name, equals, rest = text.partition("=")
        given, path = (name, Path(rest)) if equals and not Path(text).exists() else (None, Path(text))
        stage = checkpoints.load(path, with_encoder=False).provenance.get("stage")
        return cls(given or (str(path) if stage is None else f"step {stage}"), path, stage)


def demo_accuracy(clips: Sequence[DatasetClip], captions: Mapping[str, str]) -> dict[str, float]:
    """The share of clips whose caption is right about each attribute, and about all three."""
    right = {"thing": 0, "motion": 0, "scene": 0, "all": 0}
    for clip in clips:
        named = world.named(captions[clip.video])
        hits = [attribute for attribute in clip.labels if getattr(named, attribute) == clip.labels[attribute]]
        for attribute in hits:
            right[attribute] += 1
        right["all"] += len(hits) == len(clip.labels)
    return {attribute: count / len(clips) for attribute, count in right.items()}


def baseline_captions(
    captioner: etenet.Captioner, dataset: Dataset, clips: Sequence[DatasetClip], folder: Path
) -> dict[str, dict[str, str]]:
    """baseline -> video -> caption, from the training split and the features of this encoder."""
    training = dataset.need("train")
    captions = [clip.captions for clip in training]
    train = features_of(captioner, dataset, training, folder).means(training)
    given = features_of(captioner, dataset, clips, folder).means(clips)
    of_clips = {
        "most frequent caption": [baselines.most_frequent_caption(captions)] * len(clips),
        "nearest training video": baselines.nearest_captions(train, captions, given),
        "ridge regression + retrieval": baselines.regressed_captions(train, captions, given),
    }
    videos = [clip.video for clip in clips]
    return {name: dict(zip(videos, sentences, strict=True)) for name, sentences in of_clips.items()}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`rows` of the table; the last is that of the checkpoint which is evaluated, like `sentences` and `scores`."""

    dataset: Dataset
    clips: Sequence[DatasetClip]
    rows: Sequence[Row]
    sentences: Mapping[str, Sentence]
    scores: Scores

    def shown(self, clip: DatasetClip) -> ReportedClip:
        """A clip with everything that is known about it."""
        sentence, frames, attention = self.sentences[clip.video], None, None
        if self.dataset.has_frames:
            weights = np.array(sentence.attention[: len(sentence.words)]).reshape(len(sentence.words), -1)
            frames, weights = shown_once(self.dataset.frames_of([clip])[0].numpy(), weights)
            attention = Attention(words=sentence.words, weights=weights)
        return ReportedClip(
            video=clip.video,
            frames=frames,
            captions={row.name: row.captions[clip.video] for row in self.rows if row.checkpoint},
            references=clip.captions,
            scores=self.scores.per_clip[clip.video],
            attention=attention,
        )

    def sections(self, count: int, *, seed: int) -> dict[str, list[ReportedClip]]:
        """heading -> clips."""
        by_video = {clip.video: clip for clip in self.clips}
        videos = chosen(self.scores.per_clip, count, seed=seed)
        return {heading: [self.shown(by_video[video]) for video in some] for heading, some in videos.items()}


def evaluate(options: argparse.Namespace) -> Evaluation:
    """Caption and score the split, with every checkpoint and, if they are wanted, with the baselines."""
    contenders = _contenders(options)
    dataset, settings = Dataset.load(options.data), search_options(options)
    clips, features = dataset.need(options.split), options.out / "features"
    references = {clip.video: clip.captions for clip in clips}
    scorer = Scorer(references, tokenizer=options.tokenizer, meteor=options.meteor)
    rows: list[Row] = []
    for one in contenders:
        captioner = load_captioner(one.path, dataset, device=options.device, clips=len(clips))
        if not rows and options.baselines:
            for name, captions in baseline_captions(captioner, dataset, clips, features).items():
                rows.append(Row(name=name, captions=captions, scores=_scored(scorer, captions).overall))
        sentences = sentences_of(captioner, dataset, clips, settings, features)
        captions = {video: sentence.text for video, sentence in sentences.items()}
        scores = _scored(scorer, captions)
        rows.append(Row(name=one.name, captions=captions, scores=scores.overall, checkpoint=captioner.checkpoint_id))
    return Evaluation(dataset, clips, rows, sentences, scores)


def _contenders(options: argparse.Namespace) -> list[Named]:
    """Those beside, by their stages, then the one that is evaluated."""
    beside = sorted(map(Named.parse, options.beside), key=lambda one: one.stage or 0)
    contenders = [*beside, Named.parse(options.checkpoint)]
    if len({one.name for one in contenders}) < len(contenders):
        names = ", ".join(f"{one.name} ({one.path})" for one in contenders)
        raise UsageError(f"two checkpoints have the same name: {names}; give each its own, as in --beside NAME=F.pt")
    return contenders


def _scored(scorer: Scorer, captions: Mapping[str, str]) -> Scores:
    return scorer.score({video: [caption] for video, caption in captions.items()})


def metrics(options: argparse.Namespace, evaluation: Evaluation) -> dict[str, Any]:
    """What `metrics.json` holds: scores, and what they were computed with."""
    row = evaluation.rows[-1]
    numbers = {
        "checkpoint": row.checkpoint,
        "split": options.split,
        "clips": len(evaluation.clips),
        "data": f"sha256:{evaluation.dataset.digest()}",
        "tokenizer": options.tokenizer,
        "options": search_options(options).as_texts(),
        "scores": row.scores,
        "table": [row.as_dict() for row in evaluation.rows],
    }
    if all(clip.labels for clip in evaluation.clips):
        numbers["right"] = demo_accuracy(evaluation.clips, row.captions)
    return numbers


def write(out: Path, title: str, numbers: Mapping[str, Any], evaluation: Evaluation, *, seed: int) -> None:
    """All files of an evaluation."""
    *others, last = evaluation.rows
    lines = [
        {"video": video, **sentence.summary()}
        | ({"beside": {row.name: row.captions[video] for row in others}} if others else {})
        for video, sentence in evaluation.sentences.items()
    ]
    contents = {
        "captions.jsonl": b"".join(map(json_line, lines)),
        "metrics.json": json.dumps(numbers, indent=2).encode() + b"\n",
        "table.md": table.markdown(evaluation.rows).encode(),
        "report.html": report.html(
            title, last.scores, evaluation.sections(CLIPS_IN_REPORT, seed=seed), evaluation.rows
        ).encode(),
    }
    if evaluation.dataset.has_frames:
        contents["figure3.png"] = figure.png(evaluation.sections(CLIPS_IN_FIGURE, seed=seed))
    for name, body in contents.items():
        with replacing(out / name) as file:
            file.write(body)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.baselines is None:
        options.baselines = bool(options.beside)
    require_replaceable(*(options.out / name for name in FILES))
    evaluation = evaluate(options)
    numbers = metrics(options, evaluation)
    write(options.out, f"{options.split}: {options.checkpoint}", numbers, evaluation, seed=options.seed)
    if len(evaluation.rows) > 1:
        print(table.markdown(evaluation.rows), file=sys.stderr)
    print(json.dumps(numbers))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", required=True, metavar="F.pt", help="the checkpoint, or NAME=F.pt to name it in the table"
    )
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="F.pt",
        help="another checkpoint for the table, or NAME=F.pt; repeatable",
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="made by training.prepare")
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument(
        "--baselines",
        action=argparse.BooleanOptionalAction,
        help="score three baselines too; needs the features of the training split; default: with --beside",
    )
    parser.add_argument(
        "--tokenizer", choices=TOKENIZERS, default="ptb", help="default: ptb; none if references are normalised already"
    )
    parser.add_argument(
        "--meteor", action=argparse.BooleanOptionalAction, default=True, help="METEOR, for which Java is needed"
    )
    for option in SEARCH_OPTIONS:
        parser.add_argument(option.flag, metavar="N", help=option.usage)
    parser.add_argument("--device", default="cpu", metavar="NAME", help="a torch device, such as cuda; default: cpu")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which clips are shown at random; default 0")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder for scores and report")
    return parser


if __name__ == "__main__":
    command.run(main)
