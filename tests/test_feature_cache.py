"""A clip that comes again is only searched, and its answer is the same: features are kept by content."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from prometheus_client import REGISTRY

import etenet
from etenet import metrics
from etenet.captioning.captioner import Captioner, decoders_for
from etenet.captioning.captions import Outcome, Timing
from etenet.captioning.feature_cache import DEFAULT_BYTES, FeatureCache, _Features
from etenet.captioning.options import CaptionOptions
from etenet.errors import CaptionError, InternalError, NotAVideo, Overloaded
from etenet.model import checkpoint as checkpoints
from etenet.model.hypothesis import Hypothesis
from etenet.runtime.interface import Features, FeaturesOfClips, Network
from etenet.runtime.network import TorchNetwork
from etenet.sandbox.pool import Decoders
from etenet.serving.request import Request
from etenet.serving.request_log import RequestRecord, record_batch
from etenet.video.clip import Clip, ClipInfo
from etenet.video.limits import DecodeLimits
from etenet.video.segments import WHOLE, Cut
from tests import clips
from tests.conftest import EXAMPLES, REPOSITORY, Server, ask

BODIES = [(REPOSITORY / "examples" / name).read_bytes() for name in EXAMPLES]
CLIP, OTHER = BODIES[:2]
DEFAULT = CaptionOptions()


@dataclass
class CountingDecoders:
    """Other decoders, whose videos are counted. The next `errors` come in place of clips."""

    decoders: Decoders
    videos: int = 0
    errors: list[CaptionError] = field(default_factory=list)

    @property
    def limits(self) -> DecodeLimits:
        return self.decoders.limits

    def submit(self, body: bytes, cut: Cut = WHOLE) -> Future[list[Clip]]:
        self.videos += 1
        if self.errors:
            failed: Future[list[Clip]] = Future()
            failed.set_exception(self.errors.pop())
            return failed
        return self.decoders.submit(body, cut)


@dataclass
class CountingNetwork:
    """Another network, whose encoded clips are counted. While it is `broken`, no feature is a number."""

    network: Network
    clips: int = 0
    broken: bool = False
    batch_clips: int = 8
    few_clips: int = 1
    precision: str = "float32"

    @property
    def exact(self) -> Network:
        return self

    def features(self, frames: NDArray[np.uint8]) -> Features:
        self.clips += len(frames)
        return self.network.features(frames) * (np.nan if self.broken else 1)

    def finite(self, features: Features) -> list[bool]:
        return self.network.finite(features)

    def mean_features(self, features: FeaturesOfClips) -> NDArray[np.float32]:
        return self.network.mean_features(features)

    def sentences(self, features: FeaturesOfClips, *, beam_size: int, max_words: int) -> list[list[Hypothesis]]:
        return self.network.sentences(features, beam_size=beam_size, max_words=max_words)

    def log_probs(self, feature: NDArray[np.float32], sentences: Sequence[Sequence[int]]) -> list[float]:
        return self.network.log_probs(feature, sentences)

    def recover(self) -> None:
        """It needs nothing."""


@dataclass
class Remembering:
    captioner: Captioner
    decoders: CountingDecoders
    network: CountingNetwork

    def work(self) -> tuple[int, int]:
        """How many videos were decoded and clips encoded since the last time."""
        done = self.decoders.videos, self.network.clips
        self.decoders.videos = self.network.clips = 0
        return done


@pytest.fixture
def remembering(captioner: Captioner) -> Remembering:
    decoders, network = CountingDecoders(captioner._decoders), CountingNetwork(captioner.network)
    caching = Captioner(captioner.checkpoint, network, decoders, feature_cache_bytes=DEFAULT_BYTES)
    return Remembering(caching, decoders, network)


def answer(outcome: Outcome, **changes: object) -> Any:
    """All that a client gets but the timing."""
    assert not isinstance(outcome, CaptionError), outcome
    return {**outcome.as_dict(attention=True), "timing_ms": None, **changes}


OPTIONS = {
    "the same": CaptionOptions(),
    "another beam": CaptionOptions(beam_size=2),
    "all sentences": CaptionOptions(captions=5, length_penalty=1.0),
    "fewer words": CaptionOptions(max_words=3),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_known_clip_is_only_searched_and_gets_the_same_answer(
    name: str, remembering: Remembering, captioner: Captioner
) -> None:
    first = remembering.captioner.caption(CLIP)
    assert remembering.work() == (1, 1)
    again = remembering.captioner.caption(CLIP, OPTIONS[name])
    assert remembering.work() == (0, 0)
    assert answer(again) == answer(captioner.caption(CLIP, OPTIONS[name]))
    assert "cached" not in first.as_dict()["timing_ms"]
    timing = again.as_dict()["timing_ms"]
    assert (timing["cached"], timing["decode"]) == (True, 0.0)


@pytest.mark.parametrize(
    "cut", [Cut(segment_s=1.0), Cut(segment="scenes"), Cut(start_s=1.0, end_s=2.5), Cut(segment_s=1, max_segments=2)]
)
def test_segments_are_known_by_how_they_were_cut(cut: Cut, remembering: Remembering, captioner: Captioner) -> None:
    options = CaptionOptions(cut=cut)
    remembering.captioner.caption_batch([CLIP], [DEFAULT])
    (first,) = remembering.captioner.caption_batch([CLIP], [options])
    segments = len(first.segments) if isinstance(first, etenet.SegmentCaptions) else 1
    assert remembering.work() == (2, 1 + segments)
    (again,) = remembering.captioner.caption_batch([CLIP], [options])
    assert remembering.work() == (0, 0)
    assert answer(again) == answer(first) == answer(*captioner.caption_batch([CLIP], [options]))


def test_thumbnails_of_a_known_clip_need_its_frames_only(remembering: Remembering, captioner: Captioner) -> None:
    remembering.captioner.caption(CLIP)
    remembering.work()
    options = CaptionOptions(thumbnails=32)
    pictured = remembering.captioner.caption(CLIP, options)
    assert remembering.work() == (1, 0)
    assert answer(pictured) == answer(captioner.caption(CLIP, options))
    assert pictured.timing_ms.cached
    assert answer(remembering.captioner.caption(CLIP)) == answer(captioner.caption(CLIP))
    assert remembering.work() == (0, 0)


def test_a_known_video_that_is_now_decoded_otherwise_is_an_error_and_no_wait_without_end(
    remembering: Remembering, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a decoder that has a bug: the same bytes give the same segments."""
    remembering.captioner.caption(CLIP)
    (segment,) = remembering.decoders.submit(CLIP).result()
    twice: Future[list[Clip]] = Future()
    twice.set_result([segment, segment])
    monkeypatch.setattr(remembering.decoders, "submit", lambda *_: twice)
    with pytest.raises(InternalError):
        remembering.captioner.caption(CLIP, CaptionOptions(thumbnails=32))


def test_known_and_new_clips_share_a_batch_with_bad_ones(remembering: Remembering, captioner: Captioner) -> None:
    remembering.captioner.caption_batch(BODIES[::2], [DEFAULT] * 3)
    remembering.work()
    bodies = [*BODIES, b"not a video", CLIP]
    outcomes = remembering.captioner.caption_batch(bodies, [DEFAULT] * 8)
    assert remembering.work() == (4, 3)
    assert isinstance(outcomes[6], NotAVideo)
    for body, outcome in zip(bodies, outcomes, strict=True):
        if body != b"not a video":
            assert isinstance(outcome, etenet.Caption)
            assert outcome.text == captioner.caption(body).text
            assert outcome.timing_ms.cached == (body in BODIES[::2])


def test_one_other_byte_makes_another_clip(remembering: Remembering) -> None:
    remembering.captioner.caption(CLIP)
    changed = CLIP[:-1] + bytes([CLIP[-1] ^ 1])
    remembering.captioner.caption_batch([changed], [DEFAULT])
    assert remembering.work()[0] == 2


@pytest.mark.parametrize("fault", ["decoding", "encoding"])
def test_what_failed_is_not_kept(fault: str, remembering: Remembering, captioner: Captioner) -> None:
    if fault == "decoding":
        remembering.decoders.errors = [Overloaded("busy"), Overloaded("busy")]
    for _ in range(2):
        remembering.network.broken = fault == "encoding"
        with pytest.raises(Overloaded if fault == "decoding" else InternalError):
            remembering.captioner.caption(CLIP)
    remembering.network.broken = False
    assert answer(remembering.captioner.caption(CLIP)) == answer(captioner.caption(CLIP))
    assert remembering.decoders.videos == 3


def test_a_fresh_clip_is_decoded_and_encoded_and_not_kept(remembering: Remembering) -> None:
    for _ in range(2):
        assert not remembering.captioner.caption(CLIP, fresh=True).timing_ms.cached
        assert remembering.work() == (1, 1)
    remembering.captioner.caption(CLIP)
    assert remembering.work() == (1, 1)
    assert not remembering.captioner.caption(CLIP, fresh=True).timing_ms.cached
    assert remembering.work() == (1, 1)


def test_each_checkpoint_has_features_of_its_own(remembering: Remembering, small_checkpoint: Path) -> None:
    checkpoint = checkpoints.load(small_checkpoint)
    network, decoders = TorchNetwork(checkpoint), decoders_for(checkpoint, sandboxed=False)
    other = Captioner(checkpoint, network, decoders, feature_cache_bytes=DEFAULT_BYTES)
    alone = answer(Captioner(checkpoint, network, decoders).caption(CLIP))
    remembering.captioner.caption(CLIP)
    for _ in range(2):
        assert answer(other.caption(CLIP)) == alone
    assert not other.caption(OTHER).timing_ms.cached


def test_without_room_nothing_is_kept(captioner: Captioner) -> None:
    network = CountingNetwork(captioner.network)
    for size in (0, 100):
        forgetful = Captioner(captioner.checkpoint, network, captioner._decoders, feature_cache_bytes=size)
        assert not any(forgetful.caption(CLIP).timing_ms.cached for _ in range(2))
    assert network.clips == 4


def features(kilobytes: int, value: float = 0.0) -> _Features:
    info = ClipInfo(
        **dict.fromkeys(ClipInfo.__slots__, 0.0) | {"times_s": (), "codec": "h264"}  # type: ignore[arg-type]
    )
    return _Features.kept(info, np.full(256 * kilobytes, value, np.float32))


def key(number: int) -> tuple[bytes, Cut]:
    return bytes([number]) * 32, WHOLE


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40) | st.just(100)), max_size=60))
def test_the_videos_that_were_asked_for_last_are_kept(uses: Sequence[tuple[int, int]]) -> None:
    """The oracle: going back from the last use, videos are kept as long as they fit."""
    cache, last = FeatureCache(100 * 1024), {}
    for number, kilobytes in uses:
        if not cache.get(key(number)):
            cache.put(key(number), (features(kilobytes),))
            if kilobytes == 100:  # too large with all that it needs, so others stay
                continue
            last[number] = kilobytes
        last[number] = last.pop(number)
        room, kept = cache.max_bytes, []
        for other in reversed(last):
            room -= features(last[other]).nbytes
            if room < 0:
                break
            kept.append(other)
        last = {other: last[other] for other in reversed(kept)}
        assert [video for video, _ in cache._videos] == [key(other)[0] for other in last]
        assert cache._bytes == sum(features(size).nbytes for size in last.values()) <= cache.max_bytes


def test_many_threads_get_what_was_kept_and_the_sum_is_right() -> None:
    cache, start = FeatureCache(64 * 1024), threading.Barrier(8)
    before = metrics.FEATURE_CACHE_BYTES._value.get()

    def use(seed: int) -> None:
        start.wait(10)
        for number in np.random.default_rng(seed).integers(0, 20, 300).tolist():
            for known in cache.get(key(number)):
                assert np.unique(known.features).tolist() == [number]
            cache.put(key(number), (features(4, number),))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(use, range(8)))
    assert 0 < cache._bytes == sum(each.nbytes for (each,) in cache._videos.values()) <= cache.max_bytes
    assert metrics.FEATURE_CACHE_BYTES._value.get() == before + cache._bytes


@pytest.mark.parametrize("of_network", [np.asarray, torch.from_numpy])
def test_a_kept_row_of_a_batch_does_not_keep_the_batch(of_network: Callable[[NDArray[np.float32]], Features]) -> None:
    batch = np.arange(32, dtype=np.float32).reshape(8, 4)
    kept = _Features.kept(features(1).info, of_network(batch)[3]).features
    assert kept.base is None
    batch[:] = 0
    assert kept.tolist() == [12.0, 13.0, 14.0, 15.0]


def test_hits_misses_and_bytes_are_counted(remembering: Remembering) -> None:
    figures = metrics.FEATURE_CACHE_HITS, metrics.FEATURE_CACHE_MISSES, metrics.FEATURE_CACHE_BYTES
    before = [figure._value.get() for figure in figures]
    remembering.captioner.caption(CLIP, fresh=True)
    for body in (CLIP, CLIP, OTHER, CLIP):
        remembering.captioner.caption(body)
    hits, misses, size = (figure._value.get() - was for figure, was in zip(figures, before, strict=True))
    assert (hits, misses) == (2, 2)
    cache = remembering.captioner._cache
    assert cache is not None
    assert size == cache._bytes > 2 * 16 * 512 * 4


def test_a_batch_of_known_clips_counts_as_searched_and_not_as_encoded(remembering: Remembering) -> None:
    request = Request.read("", {"body": CLIP}, {})

    def stages() -> list[float]:
        name = "etenet_stage_duration_seconds_count"
        return [REGISTRY.get_sample_value(name, {"stage": stage}) or 0 for stage in ("decode", "encode", "search")]

    counted = []
    for bodies in ((CLIP,), (CLIP, CLIP), (CLIP, OTHER)):
        before = stages()
        outcomes = remembering.captioner.caption_batch(bodies, [DEFAULT] * len(bodies))
        record_batch([RequestRecord(request=request, outcome=outcome, seconds=1.0) for outcome in outcomes])
        counted.append([now - was for was, now in zip(before, stages(), strict=True)])
    assert counted == [[1, 1, 1], [0, 0, 1], [1, 1, 1]]


def test_explanations_after_predictions_cost_a_search_only_on_a_server(server: Server) -> None:
    body = clips.video(30, size=(320, 240), crf="30")  # that no other test sends
    first, second = server.caption(body), server.caption(body)
    explained = ask(f"{server.inference}/explanations/etenet", body)
    known = [response.json()["timing_ms"].get("cached", False) for response in (first, second, explained)]
    assert known == [False, True, True]
    without_timing = [response.body.rpartition(b'"timing_ms"')[0] for response in (first, second)]
    assert without_timing[0] == without_timing[1] != b""
    fields = {**explained.json(), "timing_ms": None}
    assert [len(sentence.pop("attention")) for sentence in fields["captions"]] == [len(fields["captions"][0]["words"])]
    assert fields == {**first.json(), "timing_ms": None}
    figures = server.figures()
    assert figures["etenet_feature_cache_hits_total"] >= 2
    assert figures["etenet_feature_cache_misses_total"] >= 1
    assert 0 < figures["etenet_feature_cache_bytes"] <= DEFAULT_BYTES


def test_the_contract_knows_the_mark() -> None:
    contract = yaml.safe_load((REPOSITORY / "docs" / "openapi.yaml").read_text())
    properties = contract["components"]["schemas"]["Timing"]["properties"]
    timing = Timing(decode=0.0, encode=1.0, search=1.0, total=2.0, cached=True).as_dict()
    assert list(properties) == list(timing)
    assert properties["cached"]["type"] == "boolean"
    assert timing["cached"] is True
