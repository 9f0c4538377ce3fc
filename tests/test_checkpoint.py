"""A checkpoint is one file with everything in it, survives a crash during writing, and cannot run code."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from etenet.errors import CheckpointError
from etenet.model import checkpoint as checkpoints
from etenet.model.vocabulary import Vocabulary
from tests.conftest import DEMO, REAL
from tests.hostile.damage import with_one_bit_flipped

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


def test_the_default_dtype_of_the_process_changes_no_weights(tmp_path: Path) -> None:
    checkpoints.save(fresh(), tmp_path / "a.pt")
    torch.set_default_dtype(torch.float64)
    try:
        read = checkpoints.load(tmp_path / "a.pt").model
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for value in read.state_dict().values() if value.is_floating_point()} == {torch.float32}


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


@pytest.mark.parametrize("with_encoder", [True, False])
def test_no_flipped_bit_of_a_checkpoint_is_accepted(tmp_path: Path, with_encoder: bool, thorough: bool) -> None:
    path, whole, rng = tmp_path / "flipped.pt", DEMO.read_bytes(), np.random.default_rng(int(with_encoder))
    ends = [(len(whole) - 200, None)] * 10  # the directory's end and the seal
    for start, end in [(0, None)] * (200 if thorough else 10) + ends:
        path.write_bytes(with_one_bit_flipped(whole, rng, start, end))
        with pytest.raises(CheckpointError, match=r"^.*flipped\.pt cannot be read as a checkpoint .*; .*$"):
            checkpoints.load(path, with_encoder=with_encoder)


def unsealed(body: bytes) -> bytes:
    """A zip file as older versions wrote it."""
    end = body.rindex(b"PK\5\6")
    return body[: end + 20] + bytes(2)


def test_a_flipped_bit_of_an_older_checkpoint_is_refused_or_changes_nothing(tmp_path: Path, thorough: bool) -> None:
    path, rng = tmp_path / "flipped.pt", np.random.default_rng(0)
    checkpoints.save(fresh(), path)
    expected, whole = checkpoints.load(path).model.state_dict(), unsealed(path.read_bytes())
    path.write_bytes(whole)
    checkpoints.load(path)
    directory, refusals = (len(whole) - 6000, None), list[str]()
    for start, end in [(0, None), directory, directory] * (100 if thorough else 4):
        path.write_bytes(with_one_bit_flipped(whole, rng, start, end))
        try:
            read = checkpoints.load(path).model.state_dict()
        except CheckpointError as error:
            refusals.append(str(error))
        else:
            assert all(torch.equal(read[name], value) for name, value in expected.items())
    assert refusals
    assert not [refusal for refusal in refusals if str(path) not in refusal or "\n" in refusal]


@pytest.mark.parametrize("path", [DEMO, REAL])
def test_the_shipped_checkpoints_load(path: Path) -> None:
    assert checkpoints.inspect(path).name == path.stem


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
        *(({"max_words": value}, "max_words") for value in (0, -1, 10**9, 2.5, "7", True, math.nan)),
        ({"vocabulary": ["a", "dog", "run s"]}, "run s"),
        ({"vocabulary": ["a", "dog", ""]}, "a word is not empty"),
        ({"vocabulary": ["a", "dog", "\ud800"]}, "surrogates"),
        ({"vocabulary": ["a", "dog", 3]}, "damaged"),
        ({"vocabulary": 3}, "damaged"),
        ({"encoder": 3}, "damaged"),
        ({"weights": 3}, "damaged"),
        ({"provenance": 3}, "damaged"),
        ({"confidence": {"weights": {}, "bias": 0.0, "beam_size": 5}}, "damaged"),
        ({"minimum_risk": {"typical": torch.zeros(512), "power": math.nan}}, "power"),
        ({"minimum_risk": {"typical": torch.full((512,), math.nan)}}, "typical"),
        ({"minimum_risk": {"typical": torch.zeros(3)}}, "typical"),
        ({"minimum_risk": {"typical": 3}}, "damaged"),
        ({"minimum_risk": {"typical": torch.zeros(512), "habits": 3}}, "damaged"),
        ({"minimum_risk": {"typical": torch.zeros(512), "habits": {(3, 4): math.nan}}}, "habits"),
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


BAD = [-1, 0, 2 * 10**6, 10**9, 2.5, math.nan, math.inf, "3", None, True, torch.zeros(1)]
SIZES = ("feature_size", "vocabulary_size", "hidden_size", "embedding_size", "attention_size")


@pytest.mark.parametrize(
    ("part", "field", "values"),
    [
        *(("preprocessing", field, BAD) for field in ("resize_px", "crop_px")),
        *(("decoder", field, BAD) for field in SIZES),
        ("decoder", "projection_size", [value for value in BAD if value != 0]),
        ("decoder", "dropout", [-0.1, 1.0, math.nan, math.inf, "0.5", None, True]),
        *(
            ("preprocessing", field, [(0.0,) * 3, (math.nan,) * 3, (math.inf,) * 3, (1.0,) * 2, 1.0])
            for field in ("std",)
        ),
        *(("preprocessing", "mean", [(math.nan,) * 3, (math.inf,) * 3, ("0",) * 3, 0.0, (0.0,) * 4]),),
        ("preprocessing", "input_max", [0.0, -1.0, math.nan, math.inf, "1"]),
        ("preprocessing", "channels", ["GBR", 3, None]),
    ],
)
def test_every_setting_has_bounds(tmp_path: Path, part: str, field: str, values: list[object]) -> None:
    path = tmp_path / "model.pt"
    checkpoints.save(fresh(), path)
    contents: dict[str, Any] = torch.load(path, weights_only=True) | {"weights": {}}
    for value in values:
        torch.save({**contents, part: {**contents[part], field: value}}, path)
        with pytest.raises(CheckpointError, match=r"^.*model\.pt is damaged or not from this version .*$") as caught:
            checkpoints.load(path, with_encoder=False)
        assert "state_dict" not in str(caught.value), "the weights were looked at first"


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: value.fill_(math.nan),
        lambda value: value.fill_(math.inf),
        lambda value: value[:-1],
        lambda value: value.to(torch.complex64),
        lambda value: value.to(torch.int64),
        lambda value: value.to_sparse(),
        lambda _: 3,
    ],
)
@pytest.mark.parametrize("part", ["encoder.", "decoder."])
def test_weights_that_do_not_fit_or_are_not_finite_are_named(
    tmp_path: Path, part: str, damage: Callable[[torch.Tensor], object]
) -> None:
    path = tmp_path / "model.pt"
    checkpoints.save(fresh(), path)
    contents = torch.load(path, weights_only=True)
    name = next(name for name in contents["weights"] if name.startswith(part))
    contents["weights"][name] = damage(contents["weights"][name])
    torch.save(contents, path)
    with pytest.raises(CheckpointError, match=r"^.*model\.pt (is damaged|cannot be read) .*$"):
        checkpoints.load(path)


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
