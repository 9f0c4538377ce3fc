"""A dataset folder is read as it was written, and a missing file is named."""

from __future__ import annotations

import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from etenet.errors import UsageError
from tests.conftest import DEMO
from training import command, evaluate, train
from training.data.datasets import Dataset, DatasetClip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three clips, one of them with its file elsewhere. Row 1 of the cache belongs to no clip."""
    entries = [
        {"video": "a", "row": 0, "split": "train", "file": "clips/a.mp4", "captions": ["a dog", "the dog"]},
        {"video": "b", "row": 3, "split": "train", "file": "/films/b.avi", "captions": ["a\u2028cat"]},
        {"video": "c", "row": 2, "split": "test", "file": "c", "captions": ["a bird"], "labels": {"thing": "bird"}},
    ]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    known = {"words": ["a", "dog", "cat"], "splits": "train", "minimum_count": 1}
    (tmp_path / "vocabulary.json").write_text(json.dumps(known))
    pixels = np.random.default_rng(0).integers(256, size=(4, 16, 8, 8, 3))
    np.save(tmp_path / "frames.npy", pixels.astype(np.uint8))
    return tmp_path


def test_clips_come_with_their_rows_files_and_labels(folder: Path) -> None:
    dataset = Dataset.load(folder)
    a, b = dataset.clips["train"]
    assert b == DatasetClip(row=3, video="b", captions=("a\u2028cat",), file="/films/b.avi")
    assert dataset.clips["test"] == [DatasetClip(2, "c", ("a bird",), {"thing": "bird"}, "c")]
    assert dataset.clip_file(a) == folder / "clips" / "a.mp4"
    assert dataset.clip_file(b) == Path("/films/b.avi")
    np.testing.assert_array_equal(dataset.frames_of([b, a]).numpy(), np.load(folder / "frames.npy")[[3, 0]])
    assert dataset.vocabulary().known_words == ("a", "dog", "cat")


def test_what_a_dataset_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"manifest.jsonl is missing; make the dataset with"):
        Dataset.load(tmp_path)
    (tmp_path / "manifest.jsonl").write_text('{"video": "a", "split": "train", "captions": []}\n')
    with pytest.raises(UsageError, match=r"frames.npy is missing"):
        Dataset.load(tmp_path)
    np.save(tmp_path / "frames.npy", np.zeros((1, 16, 2, 2, 3), np.uint8))
    with pytest.raises(UsageError, match=r"manifest.jsonl is damaged or of another version .*row"):
        Dataset.load(tmp_path)
    (tmp_path / "manifest.jsonl").write_text('{"video": "a", "row": 0, "split": "train", "captions": []}\n')
    with pytest.raises(UsageError, match=r"vocabulary.json is missing"):
        Dataset.load(tmp_path).vocabulary()


def test_the_digest_depends_on_the_contents_and_not_on_the_place_of_files(folder: Path) -> None:
    def digest_with(name: str, old: str, new: str) -> str:
        file = folder / name
        whole = file.read_text()
        assert old in whole
        file.write_text(whole.replace(old, new))
        digest = Dataset.load(folder).digest()
        file.write_text(whole)
        return digest

    first, frames = Dataset.load(folder).digest(), np.load(folder / "frames.npy")
    assert digest_with("manifest.jsonl", "/films", "/elsewhere") == first
    others = {
        digest_with("manifest.jsonl", "the dog", "that dog"),
        digest_with("manifest.jsonl", '"split": "test"', '"split": "train"'),
        digest_with("manifest.jsonl", '"row": 3', '"row": 1'),
        digest_with("vocabulary.json", '"cat"', '"cats"'),
    }
    for row, differs in ((3, True), (1, False)):
        changed = frames.copy()
        changed[row] = 255 - changed[row]
        np.save(folder / "frames.npy", changed)
        assert (Dataset.load(folder).digest() != first) == differs
    np.save(folder / "frames.npy", frames[:, :, 1:, 1:])  # the same pixel in the middle
    others.add(Dataset.load(folder).digest())
    assert len(others | {first}) == 6


def test_what_is_damaged_or_cut_off_is_named_with_the_fix(folder: Path) -> None:
    def refused(name: str, body: bytes) -> None:
        file = folder / name
        whole = file.read_bytes() if file.exists() else None
        file.write_bytes(body)
        again = rf"^{re.escape(str(file))} is damaged or .*; (copy it again or )?prepare \S+ again$"
        with pytest.raises(UsageError, match=again):
            Dataset.load(folder).vocabulary()
        file.unlink() if whole is None else file.write_bytes(whole)

    for name in ("frames.npy", "features.npy"):
        whole = (folder / "frames.npy").read_bytes()
        header_bytes = whole.index(b"\n")
        for body in (b"", whole[:-1], whole[:50], b"PK\3\4" + whole[4:], whole.replace(b"(4,", b"(9,")):
            refused(name, body)
        for place in range(header_bytes - 40):
            if whole[place] in b"'{}(),":
                refused(name, whole[:place] + b"\0" + whole[place + 1 :])
    for body in (b"", b'{"words": ["a", "do', b"{}", b"[]", b'{"words": [1]}', b'{"words": ["a", "a"]}', b"\xff"):
        refused("vocabulary.json", body)
    for body in (b'{"video": "a", "ro', b'"a"\n', b"\xff"):
        refused("manifest.jsonl", body)
    assert Dataset.load(folder).vocabulary().known_words == ("a", "dog", "cat")


def test_a_damaged_dataset_ends_training_and_evaluation_in_one_line(
    features_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = shutil.copytree(features_dataset, tmp_path / "data"), str(tmp_path / "out")
    os.truncate(data / "features.npy", (data / "features.npy").stat().st_size - 1)
    evaluated = ["--checkpoint", str(DEMO), "--split", "validation", "--data", str(data), "--out", out]
    for main, arguments in (
        (train.main, ["demo", "--stage", "1", "--data", str(data), "--out", out]),
        (evaluate.main, evaluated),
    ):
        with pytest.raises(SystemExit) as ended:
            command.run(partial(main, arguments))
        assert ended.value.code == 2
        printed = f"training: {data}/features.npy is damaged or cut off; copy it again or prepare it again\n"
        assert capsys.readouterr().err == printed
