"""Given features become a dataset folder, and stage 1 makes of it a checkpoint without an encoder."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import etenet
from etenet.cli import main
from etenet.errors import CheckpointError, UsageError
from etenet.model import checkpoint as checkpoints
from etenet.model.encoder import AbsentEncoder
from tests.conftest import DEMO, REPOSITORY
from training import evaluate, prepare, train
from training.data.datasets import Dataset
from training.evaluation import captioning


def command(tmp_path: Path, features: np.ndarray, captions: str) -> list[str]:
    np.save(tmp_path / "given.npy", features)
    (tmp_path / "captions.jsonl").write_text(captions)
    given = ["--features", str(tmp_path / "given.npy"), "--captions", str(tmp_path / "captions.jsonl")]
    return ["features", *given, "--validation-share", "0", "--test-share", "0", "--out", str(tmp_path / "out")]


def test_given_features_take_the_place_of_frames(tmp_path: Path) -> None:
    given = np.random.default_rng(0).normal(size=(3, 5, 7))
    lines = [{"video": name, "caption": "a dog", "row": row} for name, row in (("a", 2), ("b", 0))]
    assert prepare.main(command(tmp_path, given, "\n".join(map(json.dumps, lines)))) == 0
    dataset = Dataset.load(tmp_path / "out")
    assert dataset.frames is None
    assert dataset.features is not None
    assert dataset.features.dtype == np.float32
    np.testing.assert_array_equal(dataset.features, given.astype(np.float32))
    a, b = dataset.clips["train"]
    assert (a.video, a.row, b.video, b.row) == ("a", 2, "b", 0)
    with pytest.raises(UsageError, match="made from features; it has no frames"):
        dataset.frames_of([a])
    with pytest.raises(UsageError, match="made from features; it has no video of a"):
        dataset.clip_file(a)


@pytest.mark.parametrize(
    ("shape", "rows", "message"),
    [
        ((2, 5, 7), [None, None, None], "names 3 clips and .* has 2 rows"),
        ((2, 5, 7), [0, 2], "names row 2, but .* has only 2 rows"),
        ((2, 5, 7), [1, 1], "two clips have the same row"),
        ((2, 5, 7), [0, None], "1 has no row, but other clips have"),
        ((2, 7), [0, 1], r"must be floating-point \(clips, frames, size\), it is float64 \(2, 7\)"),
    ],
)
def test_features_that_do_not_fit_their_clips_are_refused(
    tmp_path: Path, shape: tuple[int, ...], rows: list[int | None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"video": str(n), "caption": "a dog", "row": row}) for n, row in enumerate(rows)]
    assert prepare.main(command(tmp_path, np.zeros(shape), "\n".join(lines))) == 2
    assert re.search(message, capsys.readouterr().err)


def test_features_with_nan_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = np.zeros((1, 5, 7))
    given[0, 3, 3] = np.nan
    assert prepare.main(command(tmp_path, given, '{"video": "a", "caption": "a dog"}')) == 2
    assert "row 0 holds infinities or NaN" in capsys.readouterr().err
    assert not (tmp_path / "out" / "features.npy").exists()


def stage_1(data: Path, out: Path, *settings: str) -> Path:
    given = ["epochs=2", "batch_clips=4", "meteor=False", "tokenizer=none", *settings]
    sets = [argument for setting in given for argument in ("--set", setting)]
    train.main(["demo", "--stage", "1", "--data", str(data), "--out", str(out), *sets])
    return out / "stage1" / "best.pt"


@pytest.fixture(scope="module")
def decoder_alone(features_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that stage 1 made of given features."""
    return stage_1(features_dataset, tmp_path_factory.mktemp("run"))


def test_a_decoder_alone_says_by_type_that_it_has_no_encoder(decoder_alone: Path) -> None:
    alone = checkpoints.load(decoder_alone, with_encoder=False)
    assert alone.model.encoder == AbsentEncoder("given features")
    with pytest.raises(CheckpointError, match=r"without its encoder \(given features\)"):
        _ = alone.encoder
    for load in (checkpoints.load, etenet.load):
        with pytest.raises(CheckpointError, match=r"best\.pt has no encoder: .*; train on clips"):
            load(decoder_alone)


def test_a_decoder_alone_is_evaluated_on_features(
    decoder_alone: Path, features_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--split", "validation", "--tokenizer", "none", "--out", str(tmp_path)]
    evaluate.main(["--checkpoint", str(decoder_alone), "--data", str(features_dataset), *out])
    metrics = json.loads(capsys.readouterr().out)
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["checkpoint"] == f"sha256:{hashlib.sha256(decoder_alone.read_bytes()).hexdigest()}"
    assert metrics["clips"] == 3
    assert set(metrics["scores"]) >= {"BLEU-1", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"}
    dataset = Dataset.load(features_dataset)
    captions = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [line["video"] for line in captions] == [clip.video for clip in dataset.clips["validation"]]
    captioner = captioning.load_captioner(decoder_alone, dataset)
    for line, clip in zip(captions, dataset.clips["validation"], strict=True):
        features = torch.from_numpy(dataset.features[[clip.row]])
        ((best,),) = captioner.caption_features(features, etenet.CaptionOptions())
        assert line["caption"] == best.text != ""
    report = (tmp_path / "report.html").read_text()
    assert (report.count("<article>"), report.count("<img")) == (3, 0)


@pytest.mark.parametrize("command", ["package", "caption"])
def test_what_captions_video_refuses_a_decoder_alone_in_one_line(
    decoder_alone: Path, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = next((REPOSITORY / "examples").glob("*.mp4"))
    arguments = {
        "package": [str(decoder_alone), "--out", str(tmp_path / "etenet.mar")],
        "caption": [str(clip), "--checkpoint", str(decoder_alone), "--out", str(tmp_path / "captions.jsonl")],
    }
    assert main([command, *arguments[command]]) == 2
    error = capsys.readouterr().err
    assert "best.pt has no encoder: it was trained on features, so it cannot caption video; train on clips" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_features_of_another_size_than_the_decoders_are_refused(features_dataset: Path) -> None:
    with pytest.raises(UsageError, match=r"demo\.pt takes features of size 512, those of .* have 8"):
        captioning.load_captioner(DEMO, Dataset.load(features_dataset))


def test_given_features_have_no_encoder_to_train(decoder_alone: Path, features_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no encoder to train in stage 2"):
        train.main(["demo", "--stage", "2", "--data", str(features_dataset), "--out", str(decoder_alone.parents[1])])
    with pytest.raises(UsageError, match="set encoder_learning_rate to 0"):
        stage_1(features_dataset, tmp_path, "encoder_learning_rate=1e-5")
