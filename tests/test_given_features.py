"""Features that somebody else computed become a dataset folder, at the rows of their clips."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from etenet.errors import UsageError
from training import prepare
from training.data.datasets import Dataset


def command(tmp_path: Path, features: np.ndarray, captions: str) -> list[str]:
    np.save(tmp_path / "given.npy", features)
    (tmp_path / "captions.jsonl").write_text(captions)
    given = ["--features", str(tmp_path / "given.npy"), "--captions", str(tmp_path / "captions.jsonl")]
    return ["features", *given, "--validation-share", "0", "--test-share", "0", "--out", str(tmp_path / "out")]


def test_given_features_take_the_place_of_frames(tmp_path: Path) -> None:
    given = np.random.default_rng(0).normal(size=(3, 5, 7))
    told = [{"video": name, "caption": "a dog", "row": row} for name, row in (("a", 2), ("b", 0))]
    assert prepare.main(command(tmp_path, given, "\n".join(map(json.dumps, told)))) == 0
    dataset = Dataset.load(tmp_path / "out")
    assert dataset.frames is None
    assert dataset.features is not None
    assert dataset.features.dtype == np.float32
    np.testing.assert_array_equal(dataset.features, given.astype(np.float32))
    a, b = dataset.clips["train"]
    assert (a.video, a.row, b.video, b.row) == ("a", 2, "b", 0)
    with pytest.raises(UsageError, match="made from features; it has no frames"):
        dataset.frames_of([a])
    with pytest.raises(UsageError, match="made from features; it has no file of a"):
        dataset.clip_file(a)


@pytest.mark.parametrize(
    ("shape", "rows", "said"),
    [
        ((2, 5, 7), [None, None, None], "tells of 3 clips, .* has 2 rows"),
        ((2, 5, 7), [0, 2], "speaks of row 2, .* has 2, from 0"),
        ((2, 5, 7), [1, 1], "two clips have the same row"),
        ((2, 5, 7), [0, None], "1 has no row, others have"),
        ((2, 7), [0, 1], r"must be floating-point \(clips, frames, size\), it is float64 \(2, 7\)"),
    ],
)
def test_features_that_do_not_fit_their_clips_are_refused(
    tmp_path: Path, shape: tuple[int, ...], rows: list[int | None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = [json.dumps({"video": str(n), "caption": "a dog", "row": row}) for n, row in enumerate(rows)]
    assert prepare.main(command(tmp_path, np.zeros(shape), "\n".join(told))) == 2
    assert re.search(said, capsys.readouterr().err)


def test_features_with_a_hole_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = np.zeros((1, 5, 7))
    given[0, 3, 3] = np.nan
    assert prepare.main(command(tmp_path, given, '{"video": "a", "caption": "a dog"}')) == 2
    assert "row 0 holds infinities or NaN" in capsys.readouterr().err
    assert not (tmp_path / "out" / "features.npy").exists()
