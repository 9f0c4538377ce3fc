"""`python -m benchmarks.real_language`: does stage 1 learn real language from given features?

The data are MSR-VTT's first 1,000 videos with 20 sentences each, and features of another network (50 frames x 128, of
which 16 are used). They are split by source video into 800, 100 and 100. Stage 1 must beat two trivial captioners: one
sentence for all videos, and the sentence of the most similar training video.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.rig import command
from etenet.scoring.scores import score
from etenet.video.sampling import middle_of_slices
from training import prepare
from training.data.datasets import Dataset, DatasetClip
from training.data.sources import msrvtt_annotations
from training.data.wording import clean_caption
from training.evaluation.captioning import caption_split, load_captioner
from training.loop.processes import init_processes
from training.loop.stage import Run, train_stage
from training.loop.start import first_checkpoint
from training.recipes import Recipe, Stage, msrvtt

SHARES = {"validation": 100, "test": 100, "train": 800}


def recipe(epochs: int) -> Recipe:
    """The paper's decoder for few clips: small batches, a higher learning rate, dropout, several sentences a visit."""
    stage = Stage(
        epochs=epochs,
        patience_epochs=10,
        epoch_of="clips",
        batch_clips=16,
        accumulation_steps=1,
        captions_per_clip=5,
        encoder_learning_rate=0.0,
        decoder_learning_rate=1e-3,
        warmup_steps=100,
        final_learning_rate_share=0.05,
        meteor=False,
    )
    return replace(msrvtt(), dropout=0.5, stages={1: stage})


def splits_by_source(urls: Sequence[str]) -> list[str]:
    """The split of each video; videos from one source share it. Depends on the URLs only."""
    videos = defaultdict(list)
    for number, url in enumerate(urls):
        videos[url].append(number)
    groups = list(videos.values())
    splits, left = [""] * len(urls), dict(SHARES)
    for group in (groups[i] for i in np.random.default_rng(0).permutation(len(groups))):
        split = next(name for name, room in left.items() if room >= len(group) or name == "train")
        left[split] -= len(group)
        for number in group:
            splits[number] = split
    return splits


def described(annotations: Sequence[Path], count: int) -> list[dict[str, object]]:
    """One line per video{0..count-1}, in the order of the features' rows."""
    urls: dict[str, str] = {}
    captions: defaultdict[str, list[str]] = defaultdict(list)
    for path in annotations:
        for annotation in msrvtt_annotations(path):
            urls |= {video["video_id"]: video["url"] for video in annotation["videos"]}
            for sentence in annotation["sentences"]:
                captions[sentence["video_id"]].append(clean_caption(sentence["caption"]))
    names = [f"video{number}" for number in range(count)]
    splits = splits_by_source([urls[name] for name in names])
    return [{"video": n, "captions": captions[n], "split": s} for n, s in zip(names, splits, strict=True)]


def train(dataset: Dataset, plan: Recipe, folder: Path) -> Path:
    """The best checkpoint of stage 1."""
    start = first_checkpoint(plan, dataset, None)
    with init_processes() as processes:
        return train_stage(
            Run(recipe=plan, stage_number=1, dataset=dataset, folder=folder, processes=processes, resume=True), start
        )


def most_frequent(training: Sequence[DatasetClip], clips: Sequence[DatasetClip]) -> dict[str, list[str]]:
    ((caption, _),) = Counter(caption for clip in training for caption in clip.captions).most_common(1)
    return {clip.video: [caption] for clip in clips}


def nearest(dataset: Dataset, training: Sequence[DatasetClip], clips: Sequence[DatasetClip]) -> dict[str, list[str]]:
    """The first caption of the training video whose mean feature has the largest cosine."""
    features = dataset.features
    assert features is not None

    def directions(of: Sequence[DatasetClip]) -> NDArray[np.float32]:
        means = features[[clip.row for clip in of]].mean(axis=1)
        unit: NDArray[np.float32] = means / np.linalg.norm(means, axis=1, keepdims=True)
        return unit

    closest = (directions(clips) @ directions(training).T).argmax(axis=1)
    return {clip.video: [training[row].captions[0]] for clip, row in zip(clips, closest, strict=True)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_language", description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=Path, required=True, metavar="F.npy", help="row i is video{i}")
    parser.add_argument("--annotations", type=Path, required=True, nargs="+", metavar="F", help="official JSON or zip")
    parser.add_argument("--run", type=Path, metavar="DIR", help="keep the data set and the run here; default: deleted")
    parser.add_argument("--epochs", type=int, default=20)
    options, results = command.start(parser, arguments)
    with tempfile.TemporaryDirectory() as scratch:
        run = options.run or Path(scratch)
        run.mkdir(parents=True, exist_ok=True)
        features = np.load(options.features)
        np.save(run / "features.npy", features[:, middle_of_slices(features.shape[1])])
        lines = described(options.annotations, len(features))
        (run / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        given = ["--features", str(run / "features.npy"), "--captions", str(run / "captions.jsonl")]
        prepare.main(["features", *given, "--minimum-count", "3", "--out", str(run / "data")])
        dataset, plan = Dataset.load(run / "data"), recipe(options.epochs)
        training, test, words = dataset.clips["train"], dataset.clips["test"], len(dataset.vocabulary())
        best = train(dataset, plan, run / "stage1")
        captions = caption_split(load_captioner(best, dataset), dataset, "test")
        contenders = {
            "stage 1": {video: [caption] for video, caption in captions.items()},
            "nearest training video": nearest(dataset, training, test),
            "most frequent caption": most_frequent(training, test),
        }
    references = {clip.video: clip.captions for clip in test}
    scores = {name: score(captions, references).overall for name, captions in contenders.items()}
    for name, figures in scores.items():
        print(f"{name:24}", "  ".join(f"{measure} {100 * value:5.1f}" for measure, value in figures.items()))
    results.conclude(
        "real_language",
        {
            "clips": {split: len(clips) for split, clips in dataset.clips.items()},
            "words": words,
            "stage": asdict(plan.stages[1]),
            "scores": scores,
        },
    )


if __name__ == "__main__":
    command.run("real_language", main)
