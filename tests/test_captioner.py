"""Bytes to captions in one process: each clip gets its own outcome, the same alone and in a batch."""

from __future__ import annotations

import io
import subprocess
import sys
from concurrent.futures import ALL_COMPLETED
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import etenet
from etenet import errors
from etenet.captioning.captioner import Captioner, decoders_for
from etenet.captioning.options import CaptionOptions
from etenet.model import checkpoint as checkpoints
from etenet.model.encoder import Encoder
from etenet.model.preprocess import preprocess
from etenet.model.vocabulary import Vocabulary
from etenet.runtime import openvino
from etenet.runtime.network import TorchNetwork
from etenet.runtime.openvino import compile_encoder
from etenet.sandbox import pool
from etenet.video.clip import FRAMES_PER_CLIP, Clip
from etenet.video.sampling import sample_frames
from etenet.video.segments import Cut
from tests import clips
from tests.conftest import DEMO, EXAMPLES, REPOSITORY

BODIES = {name: (REPOSITORY / "examples" / name).read_bytes() for name in EXAMPLES}
DEFAULT = CaptionOptions()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_gets_its_caption(captioner: Captioner, name: str) -> None:
    assert captioner.caption(BODIES[name]).text == EXAMPLES[name]


def test_a_clip_gets_the_same_caption_alone_and_in_a_batch_with_bad_neighbours(captioner: Captioner) -> None:
    bodies = [*BODIES.values(), b"not a video", b""]
    outcomes = captioner.caption_batch(bodies, [DEFAULT] * 8)
    assert [outcome.text for outcome in outcomes[:6] if isinstance(outcome, etenet.Caption)] == list(EXAMPLES.values())
    assert isinstance(outcomes[6], errors.NotAVideo)
    assert isinstance(outcomes[7], errors.EmptyBody)


def test_clips_with_different_options_share_a_batch(captioner: Captioner) -> None:
    body = next(iter(BODIES.values()))
    options_of_clips = [
        DEFAULT,
        CaptionOptions(beam_size=1),
        CaptionOptions(beam_size=3, captions=3),
        CaptionOptions(max_words=3),
        CaptionOptions(captions=5, length_penalty=2.0),
    ]
    outcomes = captioner.caption_batch([body] * len(options_of_clips), options_of_clips)
    for options, outcome in zip(options_of_clips, outcomes, strict=True):
        assert isinstance(outcome, etenet.Caption)
        alone = captioner.caption(body, options)
        assert [sentence.text for sentence in outcome.sentences] == [sentence.text for sentence in alone.sentences]
        assert len(outcome.sentences) == options.captions
        assert all(len(sentence.words) <= (options.max_words or 20) for sentence in outcome.sentences)


def test_permuting_the_frames_changes_no_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    order = np.random.default_rng(0).permutation(16)

    def shuffled(body: bytes, cut: Cut, **options: object) -> list[Clip]:
        return [replace(clip, frames=clip.frames[order]) for clip in sample(body, cut, **options)]

    sample = pool.sample_segments
    monkeypatch.setattr(pool, "sample_segments", shuffled)
    captioner = etenet.load(DEMO, compiled_encoder=False, sandboxed=False)
    for name, body in BODIES.items():
        assert captioner.caption(body).text == EXAMPLES[name]


def test_the_best_sentence_comes_first_and_probabilities_are_between_0_and_1(captioner: Captioner) -> None:
    for body in BODIES.values():
        sentences = captioner.caption(body, CaptionOptions(captions=5)).sentences
        log_probs = [sentence.log_prob for sentence in sentences]
        assert log_probs == sorted(log_probs, reverse=True)
        for sentence in sentences:
            assert len(sentence.words) == len(sentence.word_probs) == len(sentence.attention)
            assert all(0 < prob <= 1 for prob in sentence.word_probs)
            np.testing.assert_allclose(np.sum(sentence.attention, axis=1), 1, atol=1e-5)


def test_a_single_frame_is_enough(captioner: Captioner) -> None:
    caption = captioner.caption(clips.video(1))
    assert caption.text
    assert caption.video.distinct_frames == 1


def test_a_bug_in_decoding_fails_only_one_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    sample, (first, second, *_) = pool.sample_segments, BODIES.values()

    def broken(body: bytes, cut: Cut, **options: object) -> list[Clip]:
        if body == first:
            raise ZeroDivisionError
        return sample(body, cut, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(pool, "sample_segments", broken)
    bad, good = etenet.load(DEMO, compiled_encoder=False, sandboxed=False).caption_batch([first, second], [DEFAULT] * 2)
    assert isinstance(bad, errors.InternalError)
    assert isinstance(good, etenet.Caption)


def test_a_network_that_gives_nan_is_an_internal_error(small_checkpoint: Path) -> None:
    checkpoint = checkpoints.load(small_checkpoint)
    checkpoint.model.decoder.to_words.bias.fill_(torch.nan)
    with pytest.raises(errors.InternalError, match="no caption"):
        Captioner(checkpoint, TorchNetwork(checkpoint), decoders_for(checkpoint, sandboxed=False)).caption(
            clips.video(3)
        )


def test_a_batch_that_does_not_fit_into_memory_is_captioned_clip_by_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(encoder: Encoder, frames: torch.Tensor) -> torch.Tensor:
        sizes.append(len(frames))
        if len(frames) > FRAMES_PER_CLIP:
            raise torch.OutOfMemoryError("out of memory")
        return forward(encoder, frames)

    sizes: list[int] = []
    forward = Encoder.forward
    monkeypatch.setattr(Encoder, "forward", encode)
    monkeypatch.setattr("etenet.captioning.stream.FIRST_COMPLETED", ALL_COMPLETED)
    monkeypatch.setattr("etenet.runtime.network.MAX_FRAMES_ON_CPU", 256)  # as on a GPU
    outcomes = etenet.load(DEMO, compiled_encoder=False, sandboxed=False).caption_batch(
        list(BODIES.values()), [DEFAULT] * 6
    )
    assert sizes[0] > 5 * FRAMES_PER_CLIP
    assert [outcome.text for outcome in outcomes if isinstance(outcome, etenet.Caption)] == list(EXAMPLES.values())


@pytest.mark.parametrize("fault", ["exception", "nan"])
def test_only_the_clip_that_makes_a_batch_fail_gets_no_caption(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    captioner, bad_clip = etenet.load(DEMO, compiled_encoder=False, sandboxed=False), 2

    def encode(encoder: Encoder, frames: torch.Tensor) -> torch.Tensor:
        is_bad = (frames == bad_frame).flatten(1).all(1)
        if is_bad.any() and fault == "exception":
            raise RuntimeError("a kernel failed")
        features = forward(encoder, frames)
        features[is_bad] = torch.nan
        return features

    forward, preprocessing = Encoder.forward, captioner.checkpoint.preprocessing
    pictures = sample_frames(list(BODIES.values())[bad_clip], resize_px=preprocessing.resize_px).frames
    bad_frame = preprocess(torch.from_numpy(pictures), preprocessing)[5]
    monkeypatch.setattr(Encoder, "forward", encode)
    monkeypatch.setattr("etenet.captioning.stream.FIRST_COMPLETED", ALL_COMPLETED)
    outcomes = captioner.caption_batch(list(BODIES.values()), [DEFAULT] * 6)
    assert isinstance(outcomes.pop(bad_clip), errors.InternalError)
    others = [text for number, text in enumerate(EXAMPLES.values()) if number != bad_clip]
    assert [outcome.text for outcome in outcomes if isinstance(outcome, etenet.Caption)] == others


def test_a_device_that_no_longer_computes_is_not_blamed_on_a_clip(small_checkpoint: Path) -> None:
    captioner = etenet.load(small_checkpoint, compiled_encoder=False, sandboxed=False)
    captioner.network.device = torch.device("cuda:63")
    with pytest.raises(errors.DeviceFailed, match="cuda:63 no longer computes"):
        captioner.caption(clips.video(3))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"beam_size": "0"}, "from 1 to 10, got 0"),
        ({"beam_size": "11"}, "from 1 to 10, got 11"),
        ({"beam_size": "five"}, "whole number, got 'five'"),
        ({"beam_size": ""}, "whole number"),
        ({"captions": "6"}, "raise beam_size"),
        ({"max_words": "51"}, "from 1 to 50"),
        ({"length_penalty": "2.5"}, "from 0 to 2"),
        ({"length_penalty": "nan"}, "from 0 to 2"),
    ],
)
def test_the_error_for_an_option_out_of_bounds_names_the_bounds(texts: dict[str, str], message: str) -> None:
    with pytest.raises(errors.BadOption, match=message):
        CaptionOptions.parse(texts)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beam_size": 5.0}, "beam_size must be a whole number, got 5.0"),
        ({"beam_size": "5"}, "beam_size must be a whole number, got '5'"),
        ({"beam_size": None}, "beam_size must be a whole number, got None"),
        ({"max_words": 3.5}, "max_words must be a whole number, got 3.5"),
        ({"length_penalty": None}, "length_penalty must be a number, got None"),
        ({"min_confidence": "0.5"}, "min_confidence must be a number, got '0.5'"),
        ({"cut": (0, 2)}, r"cut must be a Cut, got \(0, 2\)"),
    ],
)
def test_the_error_for_an_option_of_another_type_names_the_option(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.BadOption, match=message):
        CaptionOptions(**fields)


def test_numbers_of_numpy_are_options(captioner: Captioner) -> None:
    body = next(iter(BODIES.values()))
    cut = Cut(start_s=np.float32(0.5), segment_s=np.int64(1), max_segments=np.int64(2))  # type: ignore[arg-type]
    options = CaptionOptions(beam_size=np.int64(3), length_penalty=np.float32(0.5), cut=cut)  # type: ignore[arg-type]
    plain = CaptionOptions(beam_size=3, length_penalty=0.5, cut=Cut(start_s=0.5, segment_s=1.0, max_segments=2))
    given, expected = captioner.caption_batch([body, body], [options, plain])
    assert isinstance(given, etenet.SegmentCaptions)
    assert isinstance(expected, etenet.SegmentCaptions)
    assert [caption.text for caption in given.segments] == [caption.text for caption in expected.segments]


@pytest.mark.parametrize("body", ["clip.mp4", Path("clip.mp4"), io.BytesIO(b"ftyp"), None, [b"ftyp"]])
def test_a_video_that_is_not_given_as_bytes_is_refused_before_anything_is_decoded(
    captioner: Captioner, body: Any
) -> None:
    kind = type(body).__name__
    with pytest.raises(errors.UsageError, match=rf"not as a {kind}; read its file first: Path\('clip.mp4'\)"):
        captioner.caption(body)
    with pytest.raises(errors.UsageError, match=f"not as a {kind}"):
        captioner.caption_batch([clips.video(3), body], [DEFAULT] * 2)


FORKED = """
import os, etenet

captioner = etenet.load("model_store/demo.pt", sandboxed=False)
if pid := os.fork():
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
else:
    try:
        captioner.caption(b"a video")
    except etenet.EtenetError as error:
        print(error, flush=True)
    del captioner
"""


def test_a_fork_of_the_process_says_that_it_has_no_decoders() -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKED]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120)
    refusal, status = ran.stdout.splitlines()
    assert "load one in each process" in refusal
    assert status == "0"


def test_options_are_parsed_from_text() -> None:
    texts = {"beam_size": " 3 ", "captions": "2", "max_words": "7", "length_penalty": "0.5", "other": "x"}
    assert CaptionOptions.parse(texts) == CaptionOptions(beam_size=3, captions=2, max_words=7, length_penalty=0.5)


def test_consecutive_equal_frames_are_encoded_once(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(encoder: Encoder, frames: torch.Tensor) -> torch.Tensor:
        encoded.append(len(frames))
        return forward(encoder, frames)

    encoded: list[int] = []
    forward = Encoder.forward
    size_px = captioner.checkpoint.preprocessing.resize_px
    a, b = np.random.default_rng(0).integers(0, 256, (2, size_px, size_px, 3), dtype=np.uint8)
    clips_of_two_frames = np.stack([[a, a], [a, b], [b, a]])
    alone = {id(frame): captioner.network.features(frame[None, None])[0, 0] for frame in (a, b)}
    monkeypatch.setattr(Encoder, "forward", encode)
    features = captioner.network.features(clips_of_two_frames)
    assert encoded == [3]
    for clip_features, frames in zip(features, ((a, a), (a, b), (b, a)), strict=True):
        for feature, frame in zip(clip_features, frames, strict=True):
            torch.testing.assert_close(feature, alone[id(frame)])


def test_the_compiled_encoder_gives_the_features_and_captions_of_the_network(
    captioner: Captioner, tmp_path: Path
) -> None:
    compile_encoder(captioner.checkpoint, tmp_path / "encoder.xml")
    compiled = etenet.load(DEMO, compiled_encoder=tmp_path / "encoder.xml", sandboxed=False)
    size_px = captioner.checkpoint.preprocessing.resize_px
    frames = np.stack([sample_frames(body, resize_px=size_px).frames for body in BODIES.values()])
    expected, features = captioner.network.features(frames).numpy(), compiled.network.features(frames)
    assert np.abs(features - expected).max() <= 1e-4 * np.abs(expected).max()
    for number, clip in enumerate(frames):
        np.testing.assert_array_equal(compiled.network.features(clip[None])[0], features[number])
    outcomes = compiled.caption_batch(list(BODIES.values()), [DEFAULT] * 6)
    assert [outcome.text for outcome in outcomes if isinstance(outcome, etenet.Caption)] == list(EXAMPLES.values())


@pytest.mark.parametrize("name", ["bninception", "inceptionresnetv2"])
def test_every_kind_of_preprocessing_is_compiled_into_the_encoder(name: str, tmp_path: Path) -> None:
    """bninception takes BGR up to 255, and a crop of 97 pixels leaves an odd margin."""
    checkpoint = checkpoints.initialise(name, Vocabulary(["dog"]), crop_px=97)
    compile_encoder(checkpoint, tmp_path / "encoder.xml")  # raises if the features differ


def test_a_compiled_encoder_that_gives_other_features_is_not_written(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "crop_start", lambda _: 0)
    with pytest.raises(RuntimeError, match="features of squeezenet1_1 are off by"):
        compile_encoder(checkpoints.load(small_checkpoint), tmp_path / "encoder.xml")


def test_the_torch_form_is_used_if_the_compiled_encoder_cannot_be_read(
    small_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "encoder.xml").write_text("<net/>")
    captioner = etenet.load(small_checkpoint, compiled_encoder=tmp_path / "encoder.xml", sandboxed=False)
    assert captioner.caption(clips.video(3)).text
    assert "its compiled form cannot be used" in caplog.text
