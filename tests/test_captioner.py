"""From bytes to captions in process: outcomes item by item, the same alone and together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import etenet
from etenet import checkpoint as checkpoints
from etenet import errors
from etenet.captioner import Captioner
from etenet.config import CaptionOptions
from etenet.model import EtENet
from etenet.preprocess import preprocess
from etenet.video import SampledVideo, sample_frames
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


def test_clips_with_different_wishes_share_a_batch(captioner: Captioner) -> None:
    body = next(iter(BODIES.values()))
    wishes = [
        DEFAULT,
        CaptionOptions(beam_size=1),
        CaptionOptions(beam_size=3, captions=3),
        CaptionOptions(max_words=3),
        CaptionOptions(captions=5, length_penalty=2.0),
    ]
    together = captioner.caption_batch([body] * len(wishes), wishes)
    for wish, outcome in zip(wishes, together, strict=True):
        assert isinstance(outcome, etenet.Caption)
        alone = captioner.caption(body, wish)
        assert [said.text for said in outcome.sentences] == [said.text for said in alone.sentences]
        assert len(outcome.sentences) == wish.captions
        assert all(len(said.words) <= (wish.max_words or 20) for said in outcome.sentences)


def test_permuting_the_frames_changes_no_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    order = np.random.default_rng(0).permutation(16)

    def shuffled(body: bytes, **options: object) -> SampledVideo:
        video = sample(body, **options)
        return type(video)(
            **{field: getattr(video, field) for field in video.__slots__} | {"frames": video.frames[order]}
        )

    sample = etenet.sandbox.sample_frames
    monkeypatch.setattr(etenet.sandbox, "sample_frames", shuffled)
    captioner = etenet.load(DEMO, sandboxed=False)
    for name, body in BODIES.items():
        assert captioner.caption(body).text == EXAMPLES[name]


def test_best_sentences_come_first_and_probabilities_are_probabilities(captioner: Captioner) -> None:
    for body in BODIES.values():
        sentences = captioner.caption(body, CaptionOptions(captions=5)).sentences
        log_probs = [said.log_prob for said in sentences]
        assert log_probs == sorted(log_probs, reverse=True)
        for said in sentences:
            assert len(said.words) == len(said.word_probs) == len(said.attention)
            assert all(0 < prob <= 1 for prob in said.word_probs)
            np.testing.assert_allclose(np.sum(said.attention, axis=1), 1, atol=1e-5)


def test_a_single_frame_is_enough(captioner: Captioner) -> None:
    caption = captioner.caption(clips.video(1))
    assert caption.text
    assert caption.video.distinct_frames == 1


def test_a_bug_in_decoding_hurts_one_clip_only(monkeypatch: pytest.MonkeyPatch) -> None:
    sample, (first, second, *_) = etenet.sandbox.sample_frames, BODIES.values()

    def broken(body: bytes, **options: object) -> SampledVideo:
        if body == first:
            raise ZeroDivisionError
        return sample(body, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(etenet.sandbox, "sample_frames", broken)
    bad, good = etenet.load(DEMO, sandboxed=False).caption_batch([first, second], [DEFAULT] * 2)
    assert isinstance(bad, errors.InternalError)
    assert isinstance(good, etenet.Caption)


def test_a_network_that_gives_no_numbers_is_our_bug(small_checkpoint: Path) -> None:
    checkpoint = checkpoints.load(small_checkpoint)
    checkpoint.model.decoder.to_words.bias.fill_(torch.nan)
    with pytest.raises(errors.InternalError, match="no caption"):
        Captioner(checkpoint, sandboxed=False).caption(clips.video(3))


def test_a_batch_that_does_not_fit_is_captioned_one_by_one(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(model: EtENet, frames: torch.Tensor) -> torch.Tensor:
        if len(frames) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return whole(model, frames)

    whole = EtENet.encode
    monkeypatch.setattr(EtENet, "encode", encode)
    outcomes = captioner.caption_batch(list(BODIES.values()), [DEFAULT] * 6)
    assert [outcome.text for outcome in outcomes if isinstance(outcome, etenet.Caption)] == list(EXAMPLES.values())


@pytest.mark.parametrize("fault", ["exception", "nan"])
def test_of_a_batch_that_fails_only_the_guilty_clip_has_no_caption(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    culprit = 2

    def encode(model: EtENet, frames: torch.Tensor) -> torch.Tensor:
        guilty = (frames == shown[culprit]).flatten(1).all(1)
        if guilty.any() and fault == "exception":
            raise RuntimeError("a kernel failed")
        features = whole(model, frames)
        features[guilty] = torch.nan
        return features

    whole, preprocessing = EtENet.encode, captioner.checkpoint.preprocessing
    shown = [
        preprocess(torch.from_numpy(sample_frames(body, resize_px=preprocessing.resize_px).frames), preprocessing)
        for body in BODIES.values()
    ]
    monkeypatch.setattr(EtENet, "encode", encode)
    outcomes = captioner.caption_batch(list(BODIES.values()), [DEFAULT] * 6)
    assert isinstance(outcomes.pop(culprit), errors.InternalError)
    others = [text for number, text in enumerate(EXAMPLES.values()) if number != culprit]
    assert [outcome.text for outcome in outcomes if isinstance(outcome, etenet.Caption)] == others


def test_a_device_that_computes_nothing_any_more_is_no_fault_of_a_clips(small_checkpoint: Path) -> None:
    captioner = etenet.load(small_checkpoint, sandboxed=False)
    captioner.device = torch.device("cuda:63")
    with pytest.raises(errors.DeviceFailed, match="cuda:63 computes nothing"):
        captioner.caption(clips.video(3))


@pytest.mark.parametrize(
    ("texts", "said"),
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
def test_an_option_out_of_bounds_is_refused_with_the_bounds(texts: dict[str, str], said: str) -> None:
    with pytest.raises(errors.BadOption, match=said):
        CaptionOptions.parse(texts)


def test_options_are_read_from_text() -> None:
    texts = {"beam_size": " 3 ", "captions": "2", "max_words": "7", "length_penalty": "0.5", "other": "x"}
    assert CaptionOptions.parse(texts) == CaptionOptions(beam_size=3, captions=2, max_words=7, length_penalty=0.5)
