"""Segments cover the video, each gets the caption that it gets as a clip, and a caller can take a few at a time."""

from __future__ import annotations

import io
import math
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ALL_COMPLETED, Future
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any

import av
import numpy as np
import pytest
import torch

from etenet import errors
from etenet.captioning.captioner import Captioner
from etenet.captioning.captions import Caption, Outcome, SegmentCaptions
from etenet.captioning.options import CaptionOptions
from etenet.captioning.stream import JOB_DECODE_TRIES, Video
from etenet.sandbox.pool import Sandbox
from etenet.video import decoder, film, sampling
from etenet.video.clip import Clip
from etenet.video.limits import DecodeLimits
from etenet.video.segments import SHORTEST_SEGMENT_S, Cut, Segment
from tests import clips, numbered
from tests.conftest import EXAMPLES, REPOSITORY
from tests.test_video import every_frame

SIZE_PX = 48
PART_S = 3.0
FILM = clips.film([(REPOSITORY / "examples" / name).read_bytes() for name in EXAMPLES], part_s=PART_S)
SCENES = Cut(segment="scenes")


def random_video(rng: random.Random) -> tuple[list[float], float]:
    """The times of its frames, evenly spaced or not, and its duration."""
    gap_s = rng.choice([0.04, 1 / 30, 0.3, 2.5])
    gaps_s = [gap_s * (rng.uniform(0.1, 2) if rng.random() < 0.5 else 1) for _ in range(rng.randint(1, 400))]
    times_s = [sum(gaps_s[:number]) for number in range(len(gaps_s))]
    return times_s, sum(gaps_s)


def random_cut(rng: random.Random, duration_s: float) -> Cut:
    start_s = rng.choice([0.0, rng.uniform(0, 0.9) * duration_s])
    end_s = rng.choice([math.inf, start_s + 0.001 + rng.random() * duration_s])
    return Cut(start_s=start_s, end_s=end_s, segment_s=rng.choice([None, 1.0, rng.uniform(1, 20)]))


@pytest.mark.parametrize("seed", range(100))
def test_segments_cover_the_whole_part_without_overlap(seed: int) -> None:
    rng = random.Random(seed)
    times_s, duration_s = random_video(rng)
    cut = random_cut(rng, duration_s)
    segments = cut.segments(times_s, duration_s, most=10_000)
    assert segments[0].start_s == cut.start_s
    assert segments[-1].end_s == pytest.approx(min(cut.end_s, duration_s))
    for one, after in pairwise(segments):
        assert one.end_s == after.start_s
        assert one.end_s - one.start_s == pytest.approx(cut.segment_s, abs=0.0011)
    for segment in segments:
        assert segment.end_s - segment.start_s >= min(SHORTEST_SEGMENT_S, segments[-1].end_s - cut.start_s) - 0.0011
        shown = [n for n, time_s in enumerate(times_s) if segment.start_s - 0.001 <= time_s < segment.end_s - 0.001]
        if shown:
            assert list(segment.frames) == shown
        else:
            (still_shown,) = segment.frames
            assert still_shown == max(n for n, time_s in enumerate(times_s) if time_s < max(segment.start_s, 0.001))


@pytest.mark.parametrize("seed", range(100))
def test_segments_taken_a_few_at_a_time_equal_those_taken_at_once(seed: int) -> None:
    rng = random.Random(seed)
    times_s, duration_s = random_video(rng)
    cut = random_cut(rng, duration_s)
    scenes_s: Sequence[float] = ()
    if cut.segment_s is None:
        cut, scenes_s = (
            Cut(start_s=cut.start_s, end_s=cut.end_s, segment="scenes"),
            rng.sample(times_s, len(times_s) // 2),
        )
    segments: list[Segment] = []
    rest: Cut | None = replace(cut, max_segments=rng.randint(1, 5))
    while rest:
        segments += rest.segments(times_s, duration_s, sorted(scenes_s), most=rng.randint(1, 5))
        rest = rest.rest(round(segments[-1].end_s, 3), round(duration_s, 3))
    assert segments == cut.segments(times_s, duration_s, sorted(scenes_s), most=10_000)


def test_more_segments_than_the_limit_are_refused_unless_max_segments_is_set() -> None:
    times_s = [0.1 * number for number in range(100)]
    assert len(Cut(segment_s=2.0).segments(times_s, 20.0, most=10)) == 10
    with pytest.raises(errors.BadOption, match="more than 9 segments"):
        Cut(segment_s=2.0).segments(times_s, 20.0, most=9)
    assert len(Cut(segment_s=2.0, max_segments=30).segments(times_s, 20.0, most=9)) == 9


def test_the_rest_of_a_cut_starts_later_or_there_is_none() -> None:
    cut = Cut(start_s=5.0, segment_s=5.0, max_segments=1)
    assert cut.rest(10.0, 100.0) == replace(cut, start_s=10.0)
    for captioned_until_s in (5.0, 0.0, -1.0, math.nan):
        assert cut.rest(captioned_until_s, 100.0) is None


@pytest.mark.parametrize("max_segments", [None, 8])
def test_an_absurd_duration_is_refused_at_once(max_segments: int | None) -> None:
    for ends_s in (1e9, 1e14, 1e300):
        with pytest.raises(errors.BadOption, match="by its timestamps the video has"):
            Cut(segment_s=10.0, max_segments=max_segments).segments([0.0, ends_s], ends_s, most=16)


def test_times_are_rounded_to_milliseconds_before_they_are_checked() -> None:
    assert Cut(start_s=1, end_s=6, segment_s=2) == Cut(start_s=1.0004, end_s=5.9996, segment_s=2.0)
    assert all(isinstance(getattr(Cut(start_s=1, end_s=6), name), float) for name in ("start_s", "end_s"))
    with pytest.raises(errors.BadOption):
        Cut(start_s=1.0001, end_s=1.0004)


def test_different_parts_have_different_fragments() -> None:
    assert Cut(start_s=10000.01, end_s=10000.98).fragment == "#t=10000.01,10000.98"
    assert Cut(start_s=600, end_s=7200).fragment == "#t=600,7200"
    assert Cut(end_s=3600.125).fragment == "#t=0,3600.125"


@pytest.mark.parametrize(
    "wrong",
    [
        {"start_s": "-1"},
        {"start_s": "nan"},
        {"start_s": "5", "end_s": "5"},
        {"end_s": "soon"},
        {"segment_s": "0.5"},
        {"segment_s": "inf"},
        {"segment": "words"},
        {"segment": "scenes", "segment_s": "5"},
        {"max_segments": "0"},
        {"max_segments": "many"},
    ],
)
def test_an_invalid_cut_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(errors.BadOption):
        CaptionOptions.parse(wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"end_s": None}, "end_s must be a number of seconds, got None"),
        ({"start_s": "0:10"}, "start_s must be a number of seconds, got '0:10'"),
        ({"segment": 5}, "segment can only be scenes, got '5'"),
        ({"segment_s": 2.0, "max_segments": 2.0}, "max_segments must be a whole number, got 2.0"),
    ],
)
def test_the_error_for_a_part_of_another_type_names_it(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.BadOption, match=message):
        Cut(**wrong)


def test_options_written_as_text_are_read_back_unchanged() -> None:
    for options in (
        CaptionOptions(),
        CaptionOptions(beam_size=3, captions=2, max_words=7, length_penalty=0.5),
        CaptionOptions(cut=Cut(start_s=1.5, end_s=7.25, segment_s=2.0, max_segments=4)),
        CaptionOptions(cut=SCENES),
    ):
        assert CaptionOptions.parse(options.as_texts()) == options
    assert CaptionOptions().as_texts() == {}


CODECS = {
    "h264, short groups": {"codec": "libx264", "g": "12", "bf": "2"},
    "h264, open groups": {"codec": "libx264", "g": "15", "x264-params": "open-gop=1:bframes=3"},
    "h264, one group": {"codec": "libx264", "g": "1000"},
    "hevc": {"codec": "libx265", "x265-params": "log-level=none:keyint=20"},
    "mpeg4 in avi": {"codec": "mpeg4", "container": "avi"},
    "vp9": {"codec": "libvpx-vp9", "container": "webm"},
}


@pytest.mark.parametrize("name", CODECS)
def test_a_segment_has_the_frames_of_its_part_of_the_video(name: str) -> None:
    body = clips.video(140, size=(64, 48), **CODECS[name])
    pictures = every_frame(body)
    with av.open(io.BytesIO(body)) as container:
        shown_s = [frame.time for frame in container.decode(video=0)]
    times_s = [time_s - shown_s[0] for time_s in shown_s]
    for cut, count in (
        (Cut(segment_s=1.5), 4),
        (Cut(start_s=1.23, end_s=4.0, segment_s=1.0), 2),
        (Cut(start_s=2.0, end_s=2.2), 1),
        (Cut(start_s=5.59), 1),
    ):
        segments = sampling.sample_segments(body, cut, resize_px=SIZE_PX)
        assert len(segments) == count
        for segment in segments:
            inside = [
                n for n, t in enumerate(times_s) if segment.info.start_s - 0.001 <= t < segment.info.end_s - 0.001
            ]
            expected = [(inside or [139])[place] for place in sampling.middle_of_slices(len(inside or [139]))]
            np.testing.assert_allclose(segment.info.times_s, [times_s[n] for n in expected], atol=1e-6)
            np.testing.assert_array_equal(segment.frames, [pictures[n] for n in expected])


def test_the_error_for_a_start_after_the_end_names_both() -> None:
    with pytest.raises(errors.BadOption, match=r"ends at 5\.600 s, before start_s=6"):
        sampling.sample_segments(clips.video(140), Cut(start_s=6.0), resize_px=SIZE_PX)


def test_a_single_picture_that_lasts_no_time_has_nothing_later_either() -> None:
    body = numbered.muxed("webm", numbered.Track(source=numbered.encoded("vp9", 1, container="webm")))
    (whole,) = sampling.sample_segments(body, Cut(), resize_px=SIZE_PX)
    assert whole.info.end_s == 0
    with pytest.raises(errors.BadOption, match=r"ends at 0\.000 s, before start_s=5"):
        sampling.sample_segments(body, Cut(start_s=5.0), resize_px=SIZE_PX)


def test_scenes_begin_where_the_picture_changes() -> None:
    sandbox = Sandbox(resize_px=SIZE_PX, processes=1)
    segments = sandbox.submit(FILM, SCENES).result()
    assert [segment.info.start_s for segment in segments] == [number * PART_S for number in range(len(EXAMPLES))]
    some = sandbox.submit(FILM, replace(SCENES, start_s=4.0, max_segments=2)).result()
    assert [(segment.info.start_s, segment.info.end_s) for segment in some] == [(4.0, 6.0), (6.0, 9.0)]


def test_nothing_is_decoded_after_the_last_scene_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    decode, decoded_s = decoder.Decoder.decode, []

    def counted(self: decoder.Decoder, packets: Iterable[decoder.VideoPacket]) -> Iterator[av.VideoFrame]:
        for frame in decode(self, packets):
            decoded_s.append(frame.time)
            yield frame

    monkeypatch.setattr(decoder.Decoder, "decode", counted)
    sampling.sample_segments(FILM, replace(SCENES, end_s=4.0), resize_px=SIZE_PX)
    assert 4.0 < max(decoded_s) < 4.5
    decoded_s.clear()
    sampling.sample_segments(FILM, replace(SCENES, max_segments=2), resize_px=SIZE_PX)
    assert max(decoded_s) == 2 * PART_S


def test_a_video_without_presentation_times_is_cut_up_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some AVI files have none. Then the numbers of the frames give their times."""
    demux = film.Film._demux

    def without_times(clip: film.Film, streams: list[av.VideoStream]) -> dict[int, list[decoder.VideoPacket]]:
        demuxed = demux(clip, streams)
        for packet in demuxed[0]:
            packet.pts = packet.dts = None
        return demuxed

    monkeypatch.setattr(film.Film, "_demux", without_times)
    body, rest, segments = clips.video(400, codec="mpeg4", container="avi"), Cut(segment_s=3.5, max_segments=2), []
    while rest:
        segments += sampling.sample_segments(body, rest, resize_px=SIZE_PX)
        rest = rest.rest(segments[-1].info.end_s, segments[-1].info.duration_s)
    assert [segment.info.start_s for segment in segments] == [0.0, 3.5, 7.0, 10.5, 14.0]
    assert {segment.info.duration_s for segment in segments} == {segments[-1].info.end_s}
    assert segments[-1].info.end_s == pytest.approx(16.0, abs=0.1)


@pytest.mark.parametrize("cut", [Cut(start_s=2.5, segment_s=2.0), replace(SCENES, start_s=4.0)])
def test_segments_are_the_same_where_timestamps_cannot_be_trusted(cut: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    by_timestamps = sampling.sample_segments(FILM, cut, resize_px=SIZE_PX)
    monkeypatch.setattr(sampling._Sampler, "_by_timestamps", lambda *_: None)
    by_counting = sampling.sample_segments(FILM, cut, resize_px=SIZE_PX)
    assert len(by_counting) == len(by_timestamps)
    for one, other in zip(by_counting, by_timestamps, strict=True):
        np.testing.assert_array_equal(one.frames, other.frames)
        assert replace(one.info, decode_ms=0) == replace(other.info, decode_ms=0)


@pytest.mark.parametrize("cut", [Cut(segment_s=PART_S), SCENES])
def test_each_part_of_a_film_gets_the_caption_that_it_gets_as_a_clip(captioner: Captioner, cut: Cut) -> None:
    (outcome,) = captioner.caption_batch([FILM], [CaptionOptions(cut=cut)])
    assert isinstance(outcome, SegmentCaptions)
    assert [caption.text for caption in outcome.segments] == list(EXAMPLES.values())
    video = Video(1, FILM, CaptionOptions(cut=replace(cut, max_segments=4)))
    streamed = captioner.caption_stream([video])
    assert [(key, texts(outcome)) for key, outcome in streamed] == [(1, list(EXAMPLES.values()))]


def texts(outcome: Outcome) -> list[str]:
    return [caption.text for caption in outcome.segments] if isinstance(outcome, SegmentCaptions) else [str(outcome)]


def test_videos_of_any_length_come_out_of_a_stream_complete(captioner: Captioner) -> None:
    """Some have more segments than fit into a batch; whole and broken clips come between them."""
    clip, cut = (REPOSITORY / "examples" / next(iter(EXAMPLES))).read_bytes(), Cut(segment_s=1.0, max_segments=3)
    outcome = captioner.caption_batch([FILM], [CaptionOptions(cut=replace(cut, max_segments=None, segment_s=1.25))])[0]
    expected = texts(outcome)
    assert len(expected) == 14
    stream = [("film", FILM), ("broken", b"no video"), ("clip", clip), ("again", FILM)]
    cut = replace(cut, segment_s=1.25)
    outcomes = dict(captioner.caption_stream([Video(name, body, CaptionOptions(cut=cut)) for name, body in stream]))
    assert texts(outcomes["film"]) == texts(outcomes["again"]) == expected
    assert isinstance(outcomes["broken"], errors.NotAVideo)
    assert len(texts(outcomes["clip"])) == 1


@pytest.mark.parametrize("held_up", [1, JOB_DECODE_TRIES - 1, JOB_DECODE_TRIES])
def test_a_job_tries_again_where_the_machine_was_too_busy_and_a_batch_does_not(
    held_up: int, captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part of a film and each clip is held up so often before it is decoded."""
    tries: Counter[tuple[bytes, Cut]] = Counter()

    def busy(video: Video[str]) -> Future[list[Clip]]:
        tries[video.body, video.options.cut] += 1
        if tries[video.body, video.options.cut] > held_up:
            return decode(video)
        future: Future[list[Clip]] = Future()
        future.set_exception(DecodeLimits().held_up(0.5))
        return future

    decode, clip = captioner.decode, (REPOSITORY / "examples" / next(iter(EXAMPLES))).read_bytes()
    stream = [Video("film", FILM, CaptionOptions(cut=Cut(segment_s=PART_S, max_segments=2)))]
    stream += [Video("clip", clip, CaptionOptions()), Video("broken", b"no video", CaptionOptions())]
    monkeypatch.setattr(captioner, "decode", busy)
    outcomes = dict(captioner.caption_stream(stream))
    if held_up < JOB_DECODE_TRIES:
        assert texts(outcomes["film"]) == list(EXAMPLES.values())
        assert isinstance(outcomes["clip"], Caption)
        assert outcomes["clip"].text == next(iter(EXAMPLES.values()))
        assert isinstance(outcomes["broken"], errors.NotAVideo)
        assert set(tries.values()) == {held_up + 1}
    else:
        assert {type(outcome) for outcome in outcomes.values()} == {errors.Overloaded}
        assert set(tries.values()) == {JOB_DECODE_TRIES}
    tries.clear()
    (outcome,) = captioner.caption_batch([clip], [CaptionOptions()])
    assert isinstance(outcome, errors.Overloaded)


def test_a_stream_encodes_no_more_than_a_batch_at_once_on_any_number_of_cores(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, encode = [], captioner.encode

    def counted(clips: Mapping[int, Clip]) -> dict[int, torch.Tensor]:
        sizes.append(len(clips))
        return encode(clips)

    monkeypatch.setattr(captioner, "encode", counted)
    monkeypatch.setattr("etenet.captioning.captioner.cores", lambda: 64)
    monkeypatch.setattr("etenet.captioning.stream.FIRST_COMPLETED", ALL_COMPLETED)
    clip = (REPOSITORY / "examples" / next(iter(EXAMPLES))).read_bytes()
    outcomes = dict(captioner.caption_stream([Video(n, clip, CaptionOptions()) for n in range(20)], batch_clips=4))
    assert len(outcomes) == sum(sizes) == 20
    assert set(sizes) == {4}


def test_a_batch_takes_a_limited_number_of_segments(captioner: Captioner) -> None:
    """It takes one of three films of 14 segments, and still captions a clip beside them."""
    clip, name = (REPOSITORY / "examples" / next(iter(EXAMPLES))).read_bytes(), next(iter(EXAMPLES))
    options = CaptionOptions(cut=Cut(segment_s=1.25))
    *films, caption = captioner.caption_batch([FILM] * 3 + [clip], [options] * 3 + [CaptionOptions()])
    assert sorted(type(film).__name__ for film in films) == ["Overloaded", "Overloaded", "SegmentCaptions"]
    assert texts(caption) != []
    assert isinstance(caption, Caption)
    assert caption.text == EXAMPLES[name]


def test_looking_for_scenes_counts_as_processor_time_of_the_clip() -> None:
    def cost_s(cut: Cut, limits: DecodeLimits) -> float:
        began_s = time.thread_time()
        with suppress(errors.DecodeTimeout):
            sampling.sample_segments(FILM, cut, resize_px=SIZE_PX, limits=limits)
            return time.thread_time() - began_s
        return -(time.thread_time() - began_s)

    patient = DecodeLimits(decode_cpu_s=60, decode_deadline_s=120)
    whole_s = cost_s(SCENES, patient)
    stopped_s = -cost_s(SCENES, replace(patient, decode_cpu_s=whole_s / 3))
    assert whole_s / 3 < stopped_s < whole_s / 3 + 0.1
