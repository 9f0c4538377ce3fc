"""What a GPU runs, run here without one: the same sums in the same order, neither recorded nor compiled."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from etenet import captioner as captioners
from etenet import checkpoint as checkpoints
from etenet.captioner import WORDS, Captioner
from etenet.decoder_search import GpuSearch, search
from etenet.gpu_encoder import GpuEncoder
from tests.conftest import DEMO

CPU = torch.device("cpu")


def at_once(function: Callable[[Tensor], Any], example: Tensor) -> Callable[[Tensor], Any]:
    """In place of a recording: refuses, as one would not notice, another shape."""

    def play(value: Tensor) -> Any:
        assert value.shape == example.shape
        return function(value)

    return play


@pytest.fixture(scope="module")
def checkpoint() -> checkpoints.Checkpoint:
    return checkpoints.load(DEMO)


@pytest.mark.parametrize("clips", [1, 3, 16, 19])
def test_a_search_without_a_look_at_the_host_finds_the_same(checkpoint: checkpoints.Checkpoint, clips: int) -> None:
    decoder = checkpoint.model.decoder.eval()
    torch.manual_seed(clips)
    features = torch.randn(clips, 16, decoder.config.feature_size).abs()
    plain = search(decoder, features, beam_size=5, max_words=checkpoint.max_words, words=WORDS)
    recorded = GpuSearch(decoder, max_words=checkpoint.max_words, words=WORDS, device=CPU, record=at_once)(features)
    assert [[said.words for said in of_clip] for of_clip in recorded] == [
        [said.words for said in of_clip] for of_clip in plain
    ]
    for one, other in zip(chain.from_iterable(recorded), chain.from_iterable(plain), strict=True):
        assert one.word_log_probs == pytest.approx(other.word_log_probs, abs=1e-4)
        np.testing.assert_allclose(one.attention, other.attention, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 16, 17, 256, 300])
def test_frames_of_any_number_have_the_features_of_the_network(
    checkpoint: checkpoints.Checkpoint, captioner: Captioner, frames: int
) -> None:
    how = checkpoint.preprocessing
    shape = (frames, how.resize_px, how.resize_px, 3)
    pictures = np.random.default_rng(frames).integers(0, 256, shape, dtype=np.uint8)
    encoder = GpuEncoder(checkpoint.model.encoder, how, device=CPU, compiled=False, record=at_once)
    found, expected = encoder(pictures), captioner.features(pictures[None])[0]
    assert found.shape == expected.shape
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.999


def test_what_cannot_be_compiled_runs_as_it_is(
    checkpoint: checkpoints.Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    encoder = GpuEncoder(checkpoint.model.encoder, checkpoint.preprocessing, device=CPU, record=at_once)
    size = checkpoint.preprocessing.resize_px
    assert encoder(np.zeros((1, size, size, 3), np.uint8)).isfinite().all()
    assert "runs uncompiled" in caplog.text


def test_where_nothing_can_be_recorded_the_plain_network_captions(
    checkpoint: checkpoints.Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    assert captioners._recorded(checkpoint, torch.device("cuda", 99)) == (None, None)
    assert "the plain network captions" in caplog.text
