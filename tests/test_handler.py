"""The handler in this process, given rows as TorchServe gives them: each gets its own response."""

from __future__ import annotations

import gc
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import webvtt

from etenet import metrics
from etenet.assets import CANARY_CLIP
from etenet.errors import DeviceFailed
from etenet.model.confidence import FEATURES, Calibration
from etenet.serving import archive
from etenet.serving.config import FAILURE_FILE_VARIABLE, PROBE_HEADER, PROBE_SECRET_VARIABLE, REQUEST_LOG_VARIABLE
from handler.draining_handler import DrainingHandler
from handler.etenet_handler import EtenetHandler
from tests import clips
from tests.conftest import DEMO, EXAMPLES, REPOSITORY

CLIP = (REPOSITORY / "examples" / next(iter(EXAMPLES))).read_bytes()
CAPTION = next(iter(EXAMPLES.values()))
SECRET = "of this start"
FILM = clips.film([CLIP] * 6, part_s=3)


class Context:
    """What the handler uses of TorchServe's context."""

    model_name = "etenet"

    def __init__(self, folder: Path) -> None:
        self.system_properties = {"model_dir": str(folder), "gpu_id": None}
        self.model_yaml_config = archive.configuration(folder)
        self.manifest = json.loads((folder / archive.MANIFEST_FILE).read_text())
        self.headers: list[Mapping[str, Any]] = []
        self.statuses: dict[int, int] = {}
        self.response_headers: dict[tuple[int, str], str] = {}
        self.content_types: dict[int, str] = {}

    def get_all_request_header(self, number: int) -> Mapping[str, Any]:
        return self.headers[number]

    def get_request_id(self, number: int) -> str:
        return f"request {number}"

    def set_response_status(self, code: int, phrase: str, number: int) -> None:
        assert phrase.isascii()
        self.statuses[number] = code

    def set_response_header(self, number: int, name: str, value: str) -> None:
        self.response_headers[number, name] = value

    def set_response_content_type(self, number: int, content_type: str) -> None:
        self.content_types[number] = content_type


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    archive.unpack(archive.package(DEMO, folder / "etenet.mar"), folder / "unpacked")
    return folder / "unpacked"


@pytest.fixture(scope="module")
def handler(unpacked: Path) -> EtenetHandler:
    handler = EtenetHandler()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(PROBE_SECRET_VARIABLE, SECRET)
        handler.initialize(Context(unpacked))
    return handler


def responses(
    handler: EtenetHandler | DrainingHandler, unpacked: Path, *requests: tuple[Mapping[str, Any], Mapping[str, Any]]
) -> tuple[list[bytes], Context]:
    """The responses to a batch of rows with their headers."""
    context = Context(unpacked)
    context.headers = [headers for _, headers in requests]
    return handler.handle([row for row, _ in requests], context), context


def test_every_row_of_a_batch_gets_its_own_response(
    handler: EtenetHandler, unpacked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(REQUEST_LOG_VARIABLE, "json")
    cut = {"X-Etenet-Segment-S": "3", "Accept": "text/vtt", "X-Request-Start": "t=1"}
    bodies, context = responses(
        handler,
        unpacked,
        ({"body": bytearray(CLIP)}, {}),
        ({"body": "text, as TorchServe might decode it"}, {"Content-Type": "text/plain"}),
        ({"body": {"parsed": "JSON"}}, {}),
        ({}, {}),
        ({"body": CLIP}, {"x-etenet-beam-size": "99"}),
        ({"body": CLIP}, {"Accept": "text/plain, */*"}),
        ({"body": FILM}, cut),
        ({"body": FILM}, {"X-Etenet-Segment-S": "3", "Accept": "*/*"}),
        ({"data": CLIP, "captions": b"2"}, {"explain": "True", "data": {"Content-Disposition": "form-data"}}),
        ({"body": clips.video(40)[:1500]}, {}),
    )
    assert json.loads(bodies[0])["caption"] == CAPTION
    codes = {number: json.loads(bodies[number])["error"]["code"] for number in context.statuses}
    assert codes == {1: "not_a_video", 2: "not_a_video", 3: "empty_body", 4: "bad_option", 9: "undecodable_video"}
    assert context.statuses == {1: 415, 2: 415, 3: 400, 4: 400, 9: 422}
    assert {value for (_, name), value in context.response_headers.items() if name == "x-etenet-error"} == {
        *codes.values()
    }
    assert bodies[5].decode() == f"{CAPTION}\n"
    assert bodies[6].startswith(b"WEBVTT")
    assert len(json.loads(bodies[7])["segments"]) == 6
    assert [len(sentence["attention"][0]) for sentence in json.loads(bodies[8])["captions"]] == [16, 16]
    assert context.content_types[6] == "text/vtt; charset=utf-8"
    lines = [json.loads(line.removeprefix("request ")) for line in capsys.readouterr().out.splitlines()]
    assert [line["status"] for line in lines] == [context.statuses.get(number, 200) for number in range(10)]
    assert [line["request_id"] for line in lines] == [f"request {number}" for number in range(10)]


def test_what_is_withheld_is_null_an_empty_text_or_no_cue(
    handler: EtenetHandler, unpacked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    confident = {"X-Etenet-Min-Confidence": "0.9"}
    segments = {**confident, "X-Etenet-Segment-S": "3", "Accept": "text/vtt"}
    (refused,), context = responses(handler, unpacked, ({"body": CLIP}, confident))
    assert (json.loads(refused)["error"]["code"], context.statuses) == ("bad_option", {0: 400})
    never_sure = Calibration(weights=dict.fromkeys(FEATURES, 0.0), bias=0.0, beam_size=5)
    checkpoint = replace(handler.captioner.checkpoint, confidence=never_sure)
    monkeypatch.setattr(handler.captioner, "checkpoint", checkpoint)
    bodies, context = responses(
        handler,
        unpacked,
        ({"body": CLIP}, confident),
        ({"body": CLIP}, {**confident, "Accept": "text/plain"}),
        ({"body": FILM}, segments),
        ({"data": CLIP, "min_confidence": b"0.5"}, confident),
    )
    assert context.statuses == {}
    withheld, given = json.loads(bodies[0]), json.loads(bodies[3])
    assert (withheld["caption"], withheld["captions"][0]["caption"], given["caption"]) == (None, CAPTION, CAPTION)
    assert {fields["captions"][0]["confidence"] for fields in (withheld, given)} == {0.5}
    assert (bodies[1], bodies[2]) == (b"", b"WEBVTT\n")


def test_subtitles_count_from_the_start_of_the_file_and_json_says_both(handler: EtenetHandler, unpacked: Path) -> None:
    body, cut = clips.with_sound(picture_starts_s=2, container="matroska"), {"X-Etenet-Segment-S": "1"}
    (whole, of_segments, *texts), context = responses(
        handler,
        unpacked,
        ({"body": body}, {}),
        ({"body": body}, cut),
        ({"body": body}, {**cut, "Accept": "text/vtt"}),
        ({"body": body}, {**cut, "Accept": "application/x-subrip"}),
    )
    assert context.statuses == {}
    start_s = json.loads(whole)["video"]["start_s"]
    assert start_s == pytest.approx(2, abs=0.012)
    assert json.loads(of_segments)["video"]["start_s"] == start_s
    times_s = [(segment["start_s"], segment["end_s"]) for segment in json.loads(of_segments)["segments"]]
    assert [segment_start_s for segment_start_s, _ in times_s] == [0.0, 1.0]
    for text, form in zip(texts, ("vtt", "srt"), strict=True):
        cues = webvtt.from_buffer(io.StringIO(text.decode()), format=form).captions
        assert cues[0].start_in_seconds + cues[0].start_time.milliseconds / 1000 == pytest.approx(start_s)
        last = cues[-1].end_in_seconds + cues[-1].end_time.milliseconds / 1000
        assert last == pytest.approx(times_s[-1][1] + start_s, abs=1.1e-3)


def test_too_many_segments_for_one_batch_get_503_and_retry_after(handler: EtenetHandler, unpacked: Path) -> None:
    bodies, context = responses(handler, unpacked, *[({"body": FILM}, {"X-Etenet-Segment-S": "1.25"})] * 2)
    assert sorted(context.statuses.values()) == [503]
    (number,) = context.statuses
    assert context.response_headers[number, "Retry-After"] == "1"
    assert len(json.loads(bodies[1 - number])["segments"]) == 13


@pytest.mark.parametrize(
    ("body", "mark", "is_probe"),
    [
        (CANARY_CLIP.read_bytes(), SECRET, True),
        (CLIP, SECRET, True),
        (CANARY_CLIP.read_bytes(), None, False),
        (CANARY_CLIP.read_bytes(), "", False),
        (CANARY_CLIP.read_bytes(), SECRET[:-1], False),
        (CANARY_CLIP.read_bytes(), "\udcff\x00é", False),
    ],
)
def test_only_who_knows_the_secret_of_this_start_is_neither_counted_nor_logged(
    handler: EtenetHandler,
    unpacked: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    body: bytes,
    mark: str | None,
    is_probe: bool,
) -> None:
    monkeypatch.setenv(REQUEST_LOG_VARIABLE, "plain")

    def counted() -> tuple[float, float]:
        return metrics.CAPTIONS._value.get(), metrics.PROBES._value.get()

    captions, probes = counted()
    busy_s = metrics.BUSY_SECONDS._value.get()
    responses(handler, unpacked, ({"body": body}, {} if mark is None else {PROBE_HEADER.upper(): mark}))
    assert counted() == (captions + (not is_probe), probes + is_probe)
    assert len(capsys.readouterr().out.splitlines()) == (not is_probe)
    assert metrics.BUSY_SECONDS._value.get() > busy_s


def test_the_servers_own_clip_is_decoded_and_encoded_each_time(handler: EtenetHandler, unpacked: Path) -> None:
    own, client = (({"body": CANARY_CLIP.read_bytes()}, headers) for headers in ({PROBE_HEADER: SECRET}, {}))
    responses(handler, unpacked, client)
    for request, answered_from_memory in ((client, True), (own, False), (own, False), (client, True)):
        hits, misses = metrics.FEATURE_CACHE_HITS._value.get(), metrics.FEATURE_CACHE_MISSES._value.get()
        (body,), _ = responses(handler, unpacked, request)
        assert ("cached" in json.loads(body)["timing_ms"]) == answered_from_memory
        assert metrics.FEATURE_CACHE_HITS._value.get() == hits + answered_from_memory
        assert metrics.FEATURE_CACHE_MISSES._value.get() == misses


def test_a_server_without_a_secret_counts_every_request(
    handler: EtenetHandler, unpacked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler, "probe_secret", "")
    before = metrics.CAPTIONS._value.get()
    responses(handler, unpacked, ({"body": CLIP}, {PROBE_HEADER: ""}))
    assert metrics.CAPTIONS._value.get() == before + 1


def test_during_a_shutdown_every_row_gets_503_and_is_counted_and_logged(
    unpacked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(REQUEST_LOG_VARIABLE, "json")
    refused = metrics.ERRORS.labels("overloaded")._value
    before, rows = refused.get(), ({"body": CLIP}, {"data": b"12345"}, {})
    bodies, context = responses(DrainingHandler(), unpacked, *((row, {"X-Request-Id": "mine"}) for row in rows))
    assert context.statuses == dict.fromkeys(range(3), 503)
    assert {context.response_headers[number, "Retry-After"] for number in range(3)} == {"1"}
    assert {json.loads(body)["error"]["code"] for body in bodies} == {"overloaded"}
    lines = [json.loads(line.removeprefix("request ")) for line in capsys.readouterr().out.splitlines()]
    assert [(line["status"], line["bytes"]) for line in lines] == [(503, len(CLIP)), (503, 5), (503, 0)]
    assert {line["request_id"] for line in lines} == {"mine"}
    assert {context.response_headers[number, "X-Request-Id"] for number in range(3)} == {"mine"}
    assert refused.get() == before + 3


def test_refused_clips_leave_no_garbage(handler: EtenetHandler, unpacked: Path) -> None:
    rows = [({"body": body}, {}) for body in (b"text", CLIP[:5000], CLIP[:-5000], clips.audio_only(), CLIP)]
    rows += [({}, {}), ({"body": CLIP}, {"X-Etenet-Beam-Size": "many"}), ({"data": ""}, {})]
    responses(handler, unpacked, *rows)
    gc.collect()
    gc.disable()
    try:
        _, context = responses(handler, unpacked, *rows)
        assert set(context.statuses.values()) >= {415, 422}
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_a_bug_is_an_error_for_each_row_and_a_lost_device_ends_the_worker(
    handler: EtenetHandler, unpacked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(handler, "captioner", SimpleNamespace(caption_batch=fails))
    error: Exception = ZeroDivisionError()
    bodies, context = responses(handler, unpacked, ({"body": CLIP}, {}), ({}, {}))
    assert [json.loads(body)["error"]["code"] for body in bodies] == ["internal_error", "empty_body"]
    assert context.statuses == {0: 500, 1: 400}
    error, ended = DeviceFailed("gone"), []
    monkeypatch.setattr("os._exit", ended.append)
    handler._outcomes([], [], context)
    assert ended == [1]


def test_a_response_that_cannot_be_made_costs_no_other_of_the_batch(
    handler: EtenetHandler, unpacked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as subtitles at times that a decoder process made up."""
    context = Context(unpacked)
    context.headers = [{"Accept": "text/vtt"}, {}]
    monkeypatch.setattr("handler.etenet_handler.subtitles.on_players_clock", lambda *_: 1 / 0)
    bodies = [json.loads(body) for body in handler.handle([{"body": CLIP}] * 2, context)]
    assert (bodies[0]["error"]["code"], context.statuses[0]) == ("internal_error", 500)
    assert bodies[1]["caption"] == CAPTION


def test_a_worker_that_cannot_load_writes_the_reason_for_the_launcher(
    unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAILURE_FILE_VARIABLE, str(tmp_path / "failure"))
    context = Context(unpacked)
    context.system_properties["model_dir"] = str(tmp_path)
    with pytest.raises(Exception, match="cannot be read"):
        EtenetHandler().initialize(context)
    assert "package it again" in (tmp_path / "failure").read_text()
