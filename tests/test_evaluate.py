"""Evaluation of stills: the serving network's captions, beside baselines and other checkpoints, and their figure."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import etenet
from etenet.errors import CannotWrite, CheckpointError, UsageError
from etenet.files import sha256
from etenet.model import checkpoint as checkpoints
from etenet.model.checkpoint import Checkpoint
from etenet.model.vocabulary import Vocabulary
from tests.clips import pattern
from tests.clips import video as video_file
from training import evaluate, prepare
from training.data.datasets import Dataset, DatasetClip
from training.evaluation import features
from training.evaluation.captioning import load_captioner, sentences_of

WORDS = ("a", "dog", "cat", "runs", "sleeps", "here")
PICTURES = (1, 3, 5, 2, 20, 1)  # of each test clip; of 20, serving takes 16


def made(seed: int, **provenance: Any) -> Checkpoint:
    torch.manual_seed(seed)
    fresh = checkpoints.initialise("squeezenet1_1", Vocabulary(WORDS), crop_px=64, max_words=6)
    return replace(fresh, provenance=provenance)


@pytest.fixture(scope="module")
def stills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 training clips of two pictures, 6 test clips of 1 to 20."""
    folder = tmp_path_factory.mktemp("stills")
    clips = [("train", f"train{n}", 2) for n in range(12)] + [("test", f"test{n}", k) for n, k in enumerate(PICTURES)]
    lines = []
    for number, (split, video, pictures) in enumerate(clips):
        (folder / "frames" / video).mkdir(parents=True)
        for moment in range(pictures):
            file = folder / "frames" / video / f"{moment}.png"
            Image.fromarray(pattern(100 * number + moment, 80, 60)).save(file)
        captions = [f"a {WORDS[1 + number % 2]} {WORDS[3 + number % 3]}", "a dog runs here", f"clip number{number}"]
        lines.append({"video": video, "split": split, "captions": captions})
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["--frames", str(folder / "frames"), "--captions", str(folder / "captions.jsonl")]
    size = ["--resize-px", str(made(0).preprocessing.resize_px)]
    assert prepare.main(["frames", *given, *size, "--out", str(folder / "data")]) == 0
    return folder / "data"


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints that say of which stage they are. They have the same encoder."""
    paths = [tmp_path_factory.mktemp(f"stage{stage}") / "best.pt" for stage in (1, 2)]
    first, second = made(0, stage=1), made(1, stage=2)
    second.model.encoder = first.model.encoder
    for path, checkpoint in zip(paths, (first, second), strict=True):
        checkpoints.save(checkpoint, path)
    return paths


def run(out: Path, data: Path, checkpoint: Path | str, *arguments: str) -> dict[str, Any]:
    given = ["--checkpoint", str(checkpoint), "--data", str(data), "--out", str(out)]
    evaluate.main([*given, "--tokenizer", "none", "--no-meteor", *arguments])
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return metrics


@pytest.fixture(scope="module")
def evaluated(stills: Path, steps: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 2 beside step 1 and the baselines."""
    out = tmp_path_factory.mktemp("evaluated")
    run(out, stills, steps[1], "--beside", str(steps[0]))
    return out


def test_steps_stand_beside_baselines_in_one_table(stills: Path, steps: list[Path], evaluated: Path) -> None:
    metrics = json.loads((evaluated / "metrics.json").read_text())
    assert metrics["data"] == f"sha256:{Dataset.load(stills).digest()}"
    assert (metrics["clips"], metrics["tokenizer"], metrics["split"]) == (6, "none", "test")
    names = [row["name"] for row in metrics["table"]]
    assert names[3:] == ["step 1", "step 2"]
    assert metrics["table"][-1]["scores"] == metrics["scores"]
    assert metrics["table"][-1]["checkpoint"] == metrics["checkpoint"] == f"sha256:{sha256(steps[1])}"
    lines = [json.loads(line) for line in (evaluated / "captions.jsonl").read_text().splitlines()]
    assert [line["video"] for line in lines] == [f"test{number}" for number in range(6)]
    assert all(line["log_prob"] < 0 for line in lines)
    assert {line["beside"]["most frequent caption"] for line in lines} == {"a dog runs here"}
    for name, row in zip(names, metrics["table"], strict=True):
        counts = Counter(line["beside"].get(name, line["caption"]) for line in lines)
        assert row["distinct_captions"] == len(counts)
        assert row["most_frequent_share"] == pytest.approx(counts.most_common(1)[0][1] / 6)
    heading, _, *rows = (evaluated / "table.md").read_text().splitlines()
    assert heading == "|  | CIDEr | METEOR | BLEU-4 | ROUGE-L | distinct captions | most frequent caption |"
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == names
    assert all(row.split(" | ")[2] == "-" for row in rows)  # without METEOR


def test_stills_get_the_captions_of_the_serving_network(stills: Path, steps: list[Path], tmp_path: Path) -> None:
    """Alone and from all 16 frames, as in serving, though each different frame is encoded once and among others."""
    dataset, served = Dataset.load(stills), etenet.load(steps[0], compiled_encoder=False, sandboxed=False)
    captions = sentences_of(served, dataset, dataset.clips["test"], etenet.CaptionOptions(), tmp_path)
    for clip in dataset.clips["test"]:
        frames = dataset.frames_of([clip]).numpy()
        ((expected,),) = served.caption_features(served.network.features(frames), etenet.CaptionOptions())
        assert captions[clip.video].text == expected.text
        assert captions[clip.video].log_prob == pytest.approx(expected.log_prob, abs=1e-4)
    compiled = load_captioner(steps[0], dataset, clips=10**6)
    assert {video: sentence.text for video, sentence in captions.items()} == {
        video: sentence.text
        for video, sentence in sentences_of(compiled, dataset, dataset.clips["test"], etenet.CaptionOptions()).items()
    }


def test_each_frame_is_shown_once_with_its_attention(evaluated: Path) -> None:
    page = (evaluated / "report.html").read_text()
    assert page.count("<article>") == len(PICTURES)
    assert page.count("<img") == page.count("<figcaption>") == sum(min(count, 16) for count in PICTURES)
    with Image.open(evaluated / "figure3.png") as picture:
        assert picture.height > picture.width / 2


def test_features_are_computed_once_for_all_checkpoints_with_one_encoder(
    stills: Path, steps: list[Path], evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(list((evaluated / "features").iterdir())) == 2  # of both splits

    def never(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(features, "_encoded", never)
    dataset = Dataset.load(stills)
    for split in ("train", "test"):
        features.features_of(
            etenet.load(steps[0], compiled_encoder=False, sandboxed=False),
            dataset,
            dataset.clips[split],
            evaluated / "features",
        )
    other = tmp_path / "other.pt"
    checkpoints.save(made(7), other)
    with pytest.raises(AssertionError, match="encoded again"):
        features.features_of(
            etenet.load(other, compiled_encoder=False, sandboxed=False),
            dataset,
            dataset.clips["test"],
            evaluated / "features",
        )


def test_options_of_the_search_reach_it(stills: Path, steps: list[Path], tmp_path: Path) -> None:
    metrics = run(tmp_path, stills, steps[0], "--max-words", "1", "--beam-size", "2", "--length-penalty", "0.7")
    assert metrics["options"] == {"beam_size": "2", "max_words": "1", "length_penalty": "0.7"}
    captions = [json.loads(line)["caption"] for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert all(len(caption.split()) <= 1 for caption in captions)


def test_checkpoints_are_named_by_their_stage_or_by_the_user(steps: list[Path], tmp_path: Path) -> None:
    first, _ = steps
    assert evaluate.Named.parse(str(first)).name == "step 1"
    assert evaluate.Named.parse(f"ours={first}") == evaluate.Named("ours", first, 1)
    odd = tmp_path / "a=b.pt"
    checkpoints.save(made(0), odd)
    assert evaluate.Named.parse(str(odd)) == evaluate.Named(str(odd), odd)
    with pytest.raises(CheckpointError, match=r"no checkpoint at gone\.pt"):
        evaluate.Named.parse("ours=gone.pt")


def test_what_cannot_be_evaluated_is_one_line_with_the_fix(stills: Path, steps: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"two checkpoints have the same name: .*--beside NAME=F.pt"):
        run(tmp_path, stills, steps[0], "--beside", str(steps[0]))
    larger = tmp_path / "larger.pt"
    checkpoints.save(checkpoints.initialise("squeezenet1_1", Vocabulary(WORDS), crop_px=96), larger)
    with pytest.raises(UsageError, match=r"have 67 pixels, the checkpoint takes 101; .*--encoder squeezenet1_1"):
        run(tmp_path, stills, larger)
    with pytest.raises(UsageError, match="beam_size must be from 1 to 10, got 99"):
        run(tmp_path, stills, steps[0], "--beam-size", "99")
    with pytest.raises(UsageError, match="has no validation split"):
        run(tmp_path, stills, steps[0], "--split", "validation")
    with pytest.raises(UsageError, match="--device gpu is no device; choose cpu, cuda or cuda:1"):
        run(tmp_path, stills, steps[0], "--device", "gpu")


def test_clips_that_were_moved_after_they_were_prepared_are_named_before_any_is_captioned(
    steps: list[Path], tmp_path: Path
) -> None:
    captioner, clips = etenet.load(steps[0], compiled_encoder=False, sandboxed=False), []
    for number, name in enumerate(("here.mp4", "moved.mp4", "moved-too.mp4")):
        clips.append(DatasetClip(row=number, video=name, captions=("a dog",), file=str(tmp_path / name)))
    (tmp_path / "here.mp4").write_bytes(video_file())
    dataset = Dataset(tmp_path / "data", {"test": clips}, np.zeros((3, 16, 67, 67, 3), np.uint8))
    message = (
        rf"^2 clips of 3 cannot be found, such as {tmp_path}/moved\.mp4; put the clips back, or prepare them where"
    )
    with pytest.raises(UsageError, match=message):
        sentences_of(captioner, dataset, clips, etenet.CaptionOptions())
    assert list(sentences_of(captioner, dataset, clips[:1], etenet.CaptionOptions())) == ["here.mp4"]


def test_where_nothing_can_be_written_nothing_is_evaluated(
    stills: Path, steps: list[Path], evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {path.name for path in evaluated.iterdir()} == {*evaluate.FILES, "features"}
    monkeypatch.delattr(evaluate, "evaluate")
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match=rf"^cannot write {tmp_path}/file/captions\.jsonl: Not a directory; "):
        run(tmp_path / "file", stills, steps[0])
    (tmp_path / "report.html").mkdir()
    with pytest.raises(CannotWrite, match=rf"^cannot write {tmp_path}/report\.html: it is no regular file; "):
        run(tmp_path, stills, steps[0])
