"""What training looks at, read and packed by one thread while what came before is computed.

Batches come in the order, and with the contents, of reading them one by one. For a GPU they are packed into pinned
memory, from which an upload makes nobody wait. Knows nothing of networks or losses.
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
from training.data.datasets import Dataset, DatasetClip, Sentences
from training.loop.order import TrainingExample
from training.loop.step import Load

AHEAD = 2  # batches: one being read, and one ready for whoever is slow once

WantedT = TypeVar("WantedT")
ReadT = TypeVar("ReadT")


def read_ahead(read: Callable[[WantedT], ReadT], wanted: Iterable[WantedT], ahead: int = AHEAD) -> Generator[ReadT]:
    """`map(read, wanted)`, the next `ahead` of which a thread reads meanwhile; an error comes in its turn.

    Whoever may leave before the end closes it (`contextlib.closing`), which ends the thread.
    """
    rest = iter(wanted)
    under_way: deque[Future[ReadT]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="read ahead") as thread:
        try:
            under_way.extend(thread.submit(read, one) for one in islice(rest, ahead))
            while under_way:
                next_one = under_way.popleft()
                under_way.extend(thread.submit(read, one) for one in islice(rest, 1))
                yield next_one.result()
        finally:
            for future in under_way:
                future.cancel()


class Loader:
    """Clips as frames, or as features where they are known already, and what is said about them, on a device.

    `waited_s` tells how long the batches since the last `ahead` made the network wait: on a GPU an upper bound, for
    it may still be busy with what it was told before.
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
        """What loads these batches, asked for in this order, the next ones being read meanwhile."""
        self.waited_s = 0.0
        with closing(read_ahead(self._read, batches)) as batches_read:

            def load(examples: Sequence[TrainingExample]) -> tuple[Tensor, Sentences]:
                started = time.perf_counter()
                read, inputs, sentences = next(batches_read)
                self.waited_s += time.perf_counter() - started
                assert read == examples, "batches are asked for in the order in which they were announced"
                return self._mirrored(inputs.to(self.device, non_blocking=True), examples), sentences.to(self.device)

            yield load

    def inputs(self, clips: Sequence[DatasetClip]) -> Tensor:
        """What the clips show, on the device: frames (B, L, resize_px, resize_px, 3) uint8, or features (B, L, D)."""
        return self._packed(clips).to(self.device, non_blocking=True)

    def _read(self, examples: Sequence[TrainingExample]) -> tuple[Sequence[TrainingExample], Tensor, Sentences]:
        captions = [example.captions for example in examples]
        sentences = Sentences.encode(captions, self.vocabulary, self.max_words)
        packed = self._packed([example.clip for example in examples])
        return examples, packed, sentences.pinned() if self._pinned else sentences

    @property
    def _pinned(self) -> bool:
        return self.device.type == "cuda"

    def _packed(self, clips: Sequence[DatasetClip]) -> Tensor:
        if self.features is None:
            return self.dataset.frames_of(clips, pinned=self._pinned)
        features = torch.from_numpy(self.features[[clip.row for clip in clips]])
        return features.pin_memory() if self._pinned else features

    def _mirrored(self, inputs: Tensor, examples: Sequence[TrainingExample]) -> Tensor:
        if self.features is None:
            for number, example in enumerate(examples):
                if example.mirrored:
                    inputs[number] = inputs[number].flip(-2)
        return inputs
