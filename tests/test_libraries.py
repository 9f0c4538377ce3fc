"""An encoder of any library, or of several networks, is trained, stored, packaged, compiled and served alike."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import etenet
from etenet.cli import main
from etenet.model import checkpoint as checkpoints
from etenet.model.encoder import default_preprocessing
from etenet.model.vocabulary import Vocabulary
from etenet.serving import archive
from tests.conftest import EXAMPLES, REPOSITORY
from training import recipes
from training.data.datasets import Dataset, DatasetClip
from training.loop.processes import Processes
from training.loop.stage import Run, train_stage

VOCABULARY = Vocabulary(["a", "dog", "cat", "is", "running", "asleep"])
CROP_PX = 64
CLIP = (REPOSITORY / "examples" / next(iter(EXAMPLES))).read_bytes()

# Between them: networks side by side, BatchNorm with an activation, padding by the size of the input, and
# normalisation inside the network
ENCODERS = ["timm:tf_efficientnet_lite0+timm:tf_efficientnet_lite1", "torchvision:googlenet"]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Six clips of two noisy frames."""
    start = default_preprocessing(ENCODERS[0], crop_px=CROP_PX)
    shape = (6, 2, start.resize_px, start.resize_px, 3)
    np.save(tmp_path / "frames.npy", np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8))
    (tmp_path / "vocabulary.json").write_text(json.dumps({"words": VOCABULARY.known_words}))
    clips = [
        DatasetClip(row=row, video=str(row), captions=("a dog is running", "a cat is asleep")[row % 2 :])
        for row in range(6)
    ]
    frames = np.load(tmp_path / "frames.npy", mmap_mode="r")
    return Dataset(tmp_path, {"train": clips[:4], "validation": clips[4:]}, frames)


def trained(dataset: Dataset, encoder: str, folder: Path) -> Path:
    """The best checkpoint after an epoch of both stages."""
    best = folder / "stage1" / "best.pt"
    for number, rate in ((1, 0.0), (2, 1e-2)):
        stage = dataclasses.replace(
            recipes.demo().stages[number],
            epochs=1,
            batch_clips=2,
            mirrored_share=0.0,
            encoder_learning_rate=rate,
            warmup_steps=0,
            tokenizer="none",
            meteor=False,
            activation_checkpointing=number == 2,
        )
        recipe = dataclasses.replace(recipes.demo(), encoder=encoder, crop_px=CROP_PX, stages={number: stage})
        run = Run(
            recipe=recipe,
            stage_number=number,
            dataset=dataset,
            folder=folder / f"stage{number}",
            processes=Processes(),
        )
        torch.manual_seed(0)
        start = checkpoints.load(best) if number == 2 else checkpoints.initialise(encoder, VOCABULARY, crop_px=CROP_PX)
        best = train_stage(run, start)
    return best


@pytest.mark.parametrize(
    "encoder", [ENCODERS[0], *(pytest.param(encoder, marks=pytest.mark.long) for encoder in ENCODERS[1:])]
)
def test_an_encoder_is_trained_packaged_and_served_whatever_its_library(
    dataset: Dataset, encoder: str, tmp_path: Path
) -> None:
    best = trained(dataset, encoder, tmp_path / "run")
    captioner = etenet.load(best, compiled_encoder=False, sandboxed=False)
    assert captioner.encoder == encoder
    expected = captioner.caption(CLIP)

    mar = archive.package(best, tmp_path / "etenet.mar")
    with zipfile.ZipFile(mar) as contents:
        assert archive.ENCODER_FILE in contents.namelist()  # it is left out where its features differ by over 1e-4
    archive.unpack(mar, tmp_path / "unpacked")
    unpacked = tmp_path / "unpacked"
    compiled = etenet.load(
        unpacked / archive.CHECKPOINT_FILE, sandboxed=False, compiled_encoder=unpacked / archive.ENCODER_FILE
    )
    served = compiled.caption(CLIP)
    assert served.text == expected.text
    assert served.sentences[0].log_prob == pytest.approx(expected.sentences[0].log_prob, abs=1e-3)
    assert compiled.encoder == encoder


def test_init_takes_encoders_of_all_libraries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "words").write_text("a\ndog\n")
    words, out = ["--words", str(tmp_path / "words")], tmp_path / "init.pt"
    assert main(["init", "--encoder", "timm:test_efficientnet", *words, "--out", str(out)]) == 0
    assert checkpoints.load(out).encoder.name == "timm:test_efficientnet"
    capsys.readouterr()
    assert main(["init", "--encoder", "timm:test_eficientnet", *words, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "timm:test_efficientnet" in error
    assert error.count("\n") == 1
