"""Reading ahead changes only the time: same batches, same order, errors in their place, no thread left behind."""

from __future__ import annotations

import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from etenet.model.vocabulary import Vocabulary
from tests.conftest import wait_until
from training.data.datasets import Dataset, DatasetClip, EncodedCaptions
from training.loop.loading import Loader, read_ahead
from training.loop.order import TrainingExample
from training.loop.views import Crop, View

VOCABULARY = Vocabulary(["a", "dog", "cat", "runs"])
CPU = torch.device("cpu")


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read ahead")]


@pytest.mark.parametrize(("count", "ahead"), [(0, 2), (1, 2), (2, 2), (20, 1), (20, 3), (3, 50)])
def test_what_is_read_ahead_is_what_is_read_one_by_one(count: int, ahead: int) -> None:
    assert list(read_ahead(lambda number: number**2, range(count), ahead)) == [n**2 for n in range(count)]
    assert not readers()


def test_only_the_next_items_are_read_in_advance() -> None:
    begun: list[int] = []
    with closing(read_ahead(begun.append, range(100), 3)) as reader:
        next(reader)
        wait_until(lambda: len(begun) == 4, 10)
        next(reader)
        wait_until(lambda: len(begun) == 5, 10)
    assert begun == [0, 1, 2, 3, 4]


def test_an_error_is_raised_in_its_place_and_leaves_no_thread() -> None:
    def read(number: int) -> int:
        return 10 // (3 - number)

    reader = read_ahead(read, range(9))
    assert [next(reader) for _ in range(3)] == [3, 5, 10]
    with pytest.raises(ZeroDivisionError):
        next(reader)
    assert not readers()


def test_closing_early_leaves_no_thread_and_waits_for_at_most_one_read() -> None:
    begun: list[int] = []
    go_on = threading.Event()

    def read(number: int) -> None:
        begun.append(number)
        if number:
            go_on.wait(10)

    with closing(read_ahead(read, range(100), 5)) as reader:
        next(reader)
        wait_until(lambda: len(begun) == 2, 10)
        threading.Timer(0.2, go_on.set).start()
    assert begun == [0, 1]
    assert not readers()


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Twelve clips of noise, in a file."""
    pixels = np.random.default_rng(0).integers(256, size=(12, 2, 6, 6, 3), dtype=np.uint8)
    np.save(tmp_path / "frames.npy", pixels)
    clips = [DatasetClip(row=row, video=str(row), captions=("a dog runs", "a cat")) for row in range(12)]
    return Dataset(tmp_path, {"train": clips}, np.load(tmp_path / "frames.npy", mmap_mode="r"))


@pytest.fixture
def batches(dataset: Dataset) -> list[list[TrainingExample]]:
    """Batches of three clips in random order. Every other clip is mirrored."""
    order = np.random.default_rng(1).permutation(12)
    examples = [
        TrainingExample(dataset.clips["train"][row], ("a dog runs", "a cat"), view=View(mirrored=bool(row % 2)))
        for row in order
    ]
    return [examples[start : start + 3] for start in range(0, 12, 3)]


def test_batches_hold_the_frames_of_their_clips_mirrored_where_asked(
    dataset: Dataset, batches: list[list[TrainingExample]]
) -> None:
    loader = Loader(dataset, VOCABULARY, 2, CPU)
    with loader.ahead(iter(batches)) as load:
        loaded = [load(batch) for batch in batches]
    for batch, (inputs, sentences) in zip(batches, loaded, strict=True):
        rows = [dataset.frames[example.clip.row] for example in batch]
        expected = [row[..., ::-1, :] if e.view.mirrored else row for row, e in zip(rows, batch, strict=True)]
        np.testing.assert_array_equal(inputs.numpy(), np.stack(expected))
        encoded = EncodedCaptions.encode([example.captions for example in batch], VOCABULARY, 2)
        assert torch.equal(sentences.target, encoded.target)
    assert loader.waited_s > 0


def test_a_crop_is_the_same_part_of_all_frames_at_the_size_of_the_whole(dataset: Dataset) -> None:
    side = np.arange(60, dtype=np.uint8)
    ramp = np.broadcast_to(side[:, None] + 2 * side, (2, 60, 60))[..., None].repeat(3, -1)
    slopes = replace(dataset, frames=ramp[None])
    lower_half = View(Crop(top=0.5, left=0.0, height=0.5, width=1.0))
    example = TrainingExample(dataset.clips["train"][0], ("a cat",), view=lower_half)
    with Loader(slopes, VOCABULARY, 20, CPU).ahead([[example]]) as load:
        inputs = load([example])[0][0].numpy()
    assert inputs.dtype == np.uint8
    assert inputs.shape == (2, 60, 60, 3)
    middle = inputs[:, 1:-1].astype(int)
    assert np.abs(middle - (29.75 + np.arange(1, 59)[:, None] / 2 + 2 * side)[None, :, :, None]).max() <= 0.5


def test_known_features_replace_frames_and_are_not_mirrored(
    dataset: Dataset, batches: list[list[TrainingExample]]
) -> None:
    features = np.random.default_rng(0).normal(size=(12, 2, 5)).astype(np.float32)
    loader = Loader(replace(dataset, frames=None, features=features), VOCABULARY, 20, CPU)
    with loader.ahead(batches) as load:
        for batch in batches:
            np.testing.assert_array_equal(load(batch)[0].numpy(), features[[example.clip.row for example in batch]])


def test_batches_in_another_order_than_announced_are_refused(
    dataset: Dataset, batches: list[list[TrainingExample]]
) -> None:
    loader = Loader(dataset, VOCABULARY, 20, CPU)
    with loader.ahead(batches) as load, pytest.raises(AssertionError, match="in the order given to"):
        load(batches[1])
    assert not readers()
