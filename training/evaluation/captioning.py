"""Checkpoint + data set -> the sentence of each clip, by exactly the serving code.

Clips of video are decoded from their files. Clips of stills have no file: their stored frames go to the serving
network. Given features go to the serving search.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import etenet
from etenet.captioning.captioner import SANDBOX_EXISTS, decoders_for
from etenet.captioning.captions import Sentence
from etenet.errors import UsageError, counted
from etenet.model import checkpoint as checkpoints
from etenet.runtime import CPU_BATCH_CLIPS
from etenet.runtime.load import compile_network
from etenet.runtime.network import TorchNetwork
from training.data.datasets import Dataset, DatasetClip
from training.evaluation.features import ClipFeatures, features_of
from training.loop.processes import device_named
from training.progress import Progress

WORTH_COMPILING_CLIPS = 64


def load_captioner(checkpoint: Path, dataset: Dataset, *, device: str = "cpu", clips: int = 0) -> etenet.Captioner:
    """A captioner for about so many clips of this data set: with an encoder for frames, without one for features."""
    chosen = device_named(device)
    device, on_cpu = str(chosen), chosen.type == "cpu"
    videos = any(clip.file is not None for of_split in dataset.clips.values() for clip in of_split)
    sandboxed = SANDBOX_EXISTS and videos  # stills need no decoder, and so no processes
    if dataset.features is None and not (on_cpu and clips >= WORTH_COMPILING_CLIPS):
        return etenet.load(checkpoint, device=device, sandboxed=sandboxed, compiled_encoder=False)
    loaded = checkpoints.load(checkpoint, with_encoder=dataset.features is None)
    if dataset.features is None:
        return etenet.Captioner(loaded, compile_network(loaded), decoders_for(loaded, sandboxed=sandboxed))
    expected, size = loaded.model.decoder.config.feature_size, dataset.features.shape[-1]
    if expected != size:
        raise UsageError(f"{checkpoint} takes features of size {expected}, those of {dataset.folder} have {size}")
    return etenet.Captioner(loaded, TorchNetwork(loaded, device=device), decoders_for(loaded, sandboxed=sandboxed))


def caption_split(captioner: etenet.Captioner, dataset: Dataset, split: str) -> dict[str, str]:
    """video -> caption. Raises `UsageError` for a clip that cannot be captioned."""
    sentences = sentences_of(captioner, dataset, dataset.need(split), etenet.CaptionOptions())
    return {video: sentence.text for video, sentence in sentences.items()}


def sentences_of(
    captioner: etenet.Captioner,
    dataset: Dataset,
    clips: Sequence[DatasetClip],
    options: etenet.CaptionOptions,
    features_folder: Path | None = None,
) -> dict[str, Sentence]:
    """video -> the best sentence. `features_folder` keeps the features of stills.

    Raises `UsageError` for a clip that cannot be captioned.
    """
    videos = all(clip.file is not None for clip in clips)
    features = None if videos else features_of(captioner, dataset, clips, features_folder)
    if features is None:
        _require_files(dataset, clips)
    sentences: dict[str, Sentence] = {}
    with Progress("captions", len(clips), "clip") as progress:
        for start in range(0, len(clips), CPU_BATCH_CLIPS):
            batch = clips[start : start + CPU_BATCH_CLIPS]
            if features is None:
                best = _of_videos(captioner, dataset, batch, options)
            else:
                best = _of_features(captioner, features, batch, options)
            sentences |= zip((clip.video for clip in batch), best, strict=True)
            progress.update(len(batch))
    return sentences


def _require_files(dataset: Dataset, clips: Sequence[DatasetClip]) -> None:
    if gone := [file for clip in clips if not (file := dataset.clip_file(clip)).is_file()]:
        raise UsageError(
            f"{counted(len(gone), 'clip')} of {len(clips)} cannot be found, such as {gone[0]}; put the clips back, or "
            f"prepare them where they are now, into another folder than {dataset.folder}"
        )


def _of_videos(
    captioner: etenet.Captioner, dataset: Dataset, clips: Sequence[DatasetClip], options: etenet.CaptionOptions
) -> Iterator[Sentence]:
    bodies = [dataset.clip_file(clip).read_bytes() for clip in clips]
    outcomes = captioner.caption_batch(bodies, [options] * len(clips))
    for clip, outcome in zip(clips, outcomes, strict=True):
        if isinstance(outcome, etenet.CaptionError):
            raise UsageError(f"{dataset.clip_file(clip)}: {outcome}") from outcome
        assert isinstance(outcome, etenet.Caption)
        yield outcome.sentences[0]


def _of_features(
    captioner: etenet.Captioner, features: ClipFeatures, clips: Sequence[DatasetClip], options: etenet.CaptionOptions
) -> Iterator[Sentence]:
    for clip, sentences in zip(clips, captioner.caption_features(features.of(clips), options), strict=True):
        if not sentences:
            raise UsageError(f"the network has no finite probabilities for the features of {clip.video}")
        yield sentences[0]
