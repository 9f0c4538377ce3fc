"""Batches for training: a thread reads and packs the next ones while one is computed.

Order and contents are those of reading batch by batch. For a GPU, batches are packed into pinned memory, so that
copying them to the GPU does not block the host. Knows nothing of networks or losses.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etenet.model.vocabulary import Vocabulary
from training.data.datasets import Dataset, DatasetClip, EncodedCaptions
from training.loop.order import TrainingExample
from training.loop.step import Load
from training.loop.views import WHOLE, seen

AHEAD = 2  # batches: one that is being read, and one that is ready

WantedT = TypeVar("WantedT")
ReadT = TypeVar("ReadT")


def read_ahead(read: Callable[[WantedT], ReadT], wanted: Iterable[WantedT], ahead: int = AHEAD) -> Generator[ReadT]:
    """`map(read, wanted)`; a thread reads the next `ahead` items in advance. An error is raised in its item's place.

    To end the thread before the last item, close the generator (`contextlib.closing`).
    """
    rest = iter(wanted)
    pending: deque[Future[ReadT]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="read ahead") as thread:
        try:
            pending.extend(thread.submit(read, item) for item in islice(rest, ahead))
            while pending:
                first = pending.popleft()
                pending.extend(thread.submit(read, item) for item in islice(rest, 1))
                yield first.result()
        finally:
            for future in pending:
                future.cancel()


class Loader:
    """Loads clips to a device: their frames, or their features if these are known, and their sentences.

    `features` (views * F, D) are by number of the view and frame row. A data set of given features needs none: its own
    are loaded.

    `waited_s` is how long the network waited for batches since the last call of `ahead`. On a GPU it is an upper
    bound, because the GPU may still be busy with earlier work.
    """

    def __init__(
        self,
        dataset: Dataset,
        vocabulary: Vocabulary,
        max_words: int,
        device: torch.device,
        features: NDArray[np.float32] | None = None,
    ) -> None:
        self.dataset, self.vocabulary, self.max_words = dataset, vocabulary, max_words
        self.device, self.features = device, features
        self.waited_s = 0.0

    @contextmanager
    def ahead(self, batches: Iterable[Sequence[TrainingExample]]) -> Iterator[Load]:
        """A function that loads these batches, called in their order; the next ones are read in advance."""
        self.waited_s = 0.0
        with closing(read_ahead(self._read, batches)) as reader:

            def load(examples: Sequence[TrainingExample]) -> tuple[Tensor, EncodedCaptions]:
                started = time.perf_counter()
                read, inputs, sentences = next(reader)
                self.waited_s += time.perf_counter() - started
                assert read == examples, "batches must be loaded in the order given to `ahead`"
                return _augmented(inputs.to(self.device, non_blocking=True), examples), sentences.to(self.device)

            yield load

    def inputs(self, clips: Sequence[DatasetClip]) -> Tensor:
        """On the device: frames (B, L, resize_px, resize_px, 3) uint8 of the clips, or their features (B, L, D)."""
        return self._packed(clips).to(self.device, non_blocking=True)

    def _read(self, examples: Sequence[TrainingExample]) -> tuple[Sequence[TrainingExample], Tensor, EncodedCaptions]:
        captions = [example.captions for example in examples]
        sentences = EncodedCaptions.encode(captions, self.vocabulary, self.max_words)
        moments = [example.moments for example in examples if example.moments is not None]
        view_numbers = [example.view_number for example in examples]
        packed = self._packed([example.clip for example in examples], moments or None, view_numbers)
        return examples, packed, sentences.pinned() if self._pinned else sentences

    @property
    def _pinned(self) -> bool:
        return self.device.type == "cuda"

    def _packed(
        self,
        clips: Sequence[DatasetClip],
        moments: Sequence[Sequence[int]] | None = None,
        view_numbers: Sequence[int] = (),
    ) -> Tensor:
        if self.dataset.features is not None:
            features = torch.from_numpy(self.dataset.features[[clip.row for clip in clips]])
        elif self.features is not None:
            rows = self._rows(clips, moments)
            if view_numbers:
                rows += np.array(view_numbers)[:, None] * self.dataset.frame_count
            features = torch.from_numpy(self.features[rows])
            for number, clip in enumerate(clips):
                if clip.shift is not None:
                    features[number] = _moved(features[number], torch.from_numpy(clip.shift))
        else:
            return self.dataset.frames_of(clips, moments, pinned=self._pinned)
        return features.pin_memory() if self._pinned else features

    def _rows(self, clips: Sequence[DatasetClip], moments: Sequence[Sequence[int]] | None) -> NDArray[np.int64]:
        if moments is None:
            return np.stack([self.dataset.frame_rows(clip) for clip in clips])
        chosen = zip(clips, moments, strict=True)
        return np.stack([self.dataset.distinct_rows(clip)[list(of_clip)] for clip, of_clip in chosen])


def _moved(features: Tensor, shift: Tensor) -> Tensor:
    """Features (L, D) and a shift (D,). What has no negative numbers, as after a ReLU, gets none."""
    moved = features + shift
    return moved.clamp(min=0) if features.min() >= 0 else moved


def _augmented(inputs: Tensor, examples: Sequence[TrainingExample]) -> Tensor:
    """Frames (B, L, px, px, 3) uint8 as the examples' views show them. Features stay as they are."""
    if inputs.dtype == torch.uint8:
        for frames, example in zip(inputs, examples, strict=True):
            if example.view != WHOLE:
                frames.copy_(seen(frames, example.view))
    return inputs
