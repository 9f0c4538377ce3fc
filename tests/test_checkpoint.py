"""A checkpoint is one file with everything in it, survives a crash during writing, and cannot run code."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from etenet.errors import CheckpointError
from etenet.model import checkpoint as checkpoints
from etenet.model.vocabulary import Vocabulary

WORDS = Vocabulary(["a", "dog", "runs"])


def fresh() -> checkpoints.Checkpoint:
    torch.manual_seed(0)
    return checkpoints.initialise("squeezenet1_1", WORDS, crop_px=64, max_words=7, dropout=0.25)


def test_everything_that_is_saved_is_loaded(tmp_path: Path) -> None:
    path, written = tmp_path / "model.pt", fresh()
    checkpoints.save(written, path)
    read = checkpoints.load(path)
    assert (read.vocabulary, read.preprocessing, read.max_words) == (WORDS, written.preprocessing, 7)
    assert read.model.encoder.name == "squeezenet1_1"
    assert read.model.decoder.config == written.model.decoder.config
    for name, value in written.model.state_dict().items():
        assert torch.equal(read.model.state_dict()[name], value), name
    assert not read.model.training


def test_what_made_the_weights_is_kept_and_unknown_in_older_files(tmp_path: Path) -> None:
    made = {"recipe": "own", "stage": 2, "seed": 0, "scores": {"CIDEr": 0.5}}
    checkpoints.save(replace(fresh(), provenance=made), tmp_path / "new.pt")
    assert checkpoints.load(tmp_path / "new.pt").provenance == made
    older = torch.load(tmp_path / "new.pt", weights_only=True)
    torch.save({name: value for name, value in older.items() if name != "provenance"}, tmp_path / "old.pt")
    assert checkpoints.load(tmp_path / "old.pt").provenance == {}


def test_without_the_encoder_its_name_and_everything_else_are_loaded(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    checkpoints.save(fresh(), path)
    read, whole = checkpoints.load(path, with_encoder=False), checkpoints.load(path)
    path.write_bytes(b"no longer needed")
    assert read.model.encoder.name == "squeezenet1_1"
    expected = {name: value for name, value in whole.model.state_dict().items() if name.startswith("decoder.")}
    assert read.model.state_dict().keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(read.model.state_dict()[name], value), name


def test_half_precision_halves_the_file_and_reads_as_float32(tmp_path: Path) -> None:
    whole, half = tmp_path / "whole.pt", tmp_path / "half.pt"
    checkpoints.save(fresh(), whole)
    checkpoints.save(fresh(), half, dtype=torch.float16)
    assert half.stat().st_size < 0.51 * whole.stat().st_size
    read = checkpoints.load(half).model.state_dict()
    for name, value in fresh().model.state_dict().items():
        assert read[name].dtype == torch.float32
        torch.testing.assert_close(read[name], value, rtol=1e-3, atol=1e-4)


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    checkpoints.save(fresh(), path)
    before = path.read_bytes()

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save(fresh(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


def test_a_checkpoint_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoints.FORMAT, "version": 1, "weights": Malicious()}, tmp_path / "zip.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Malicious()))
    for name in ("zip.pt", "pickle.pt"):
        with pytest.raises(CheckpointError, match=name):
            checkpoints.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def changed(contents: dict[str, object], **changes: object) -> dict[str, object]:
    return {**contents, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not an EtENet checkpoint"),
        ({"version": 99}, "version 99"),
        ({"vocabulary": ["a", "a"]}, "damaged"),
        ({"vocabulary": ["a"]}, "damaged"),
        ({"encoder": "resnet17"}, "resnet17"),
        ({"weights": {}}, "damaged"),
        ({"decoder": {"hidden": 3}}, "damaged"),
    ],
)
def test_the_error_for_a_wrong_checkpoint_names_it_in_one_line(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = tmp_path / "model.pt"
    checkpoints.save(fresh(), path)
    torch.save(changed(torch.load(path, weights_only=True), **changes), path)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoints.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("contents", [b"", b"hello", b"PK\x03\x04" + bytes(100)])
@pytest.mark.parametrize("with_encoder", [True, False])
def test_the_error_for_a_file_that_is_not_a_checkpoint_names_it(
    tmp_path: Path, contents: bytes, with_encoder: bool
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        checkpoints.load(path, with_encoder=with_encoder)


def test_the_error_for_a_truncated_checkpoint_names_it(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    checkpoints.save(fresh(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        checkpoints.load(path)
