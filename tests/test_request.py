"""A request is read once: video, options and headers, or the reason why it cannot be captioned."""

from __future__ import annotations

import gzip
from typing import Any

import pytest

from etenet.captioning.options import CaptionOptions
from etenet.errors import BadOption, EmptyBody, NotAVideo, TooLarge
from etenet.serving.request import Request


def read(row: dict[str, Any], headers: dict[str, Any] | None = None) -> Request:
    return Request.read("7", row, headers or {})


@pytest.mark.parametrize("value", [b"clip", bytearray(b"clip"), "clip"])
@pytest.mark.parametrize("field", ["body", "data", "file", "video"])
def test_the_video_is_the_body_or_a_field_of_a_form(field: str, value: object) -> None:
    request = read({field: value})
    assert (request.id, request.body, request.options, request.error) == ("7", b"clip", CaptionOptions(), None)
    assert (request.accept, request.explain, request.waited_s) == ("", False, None)


def test_headers_are_read_without_regard_to_case() -> None:
    headers = {"X-ETENET-Captions": "2", "Accept": "text/vtt", "Explain": "True", "beam_size": {"a form": "field"}}
    request = read({"body": b"clip"}, headers)
    assert (request.options, request.accept, request.explain) == (CaptionOptions(captions=2), "text/vtt", True)


def test_a_form_field_goes_before_the_header() -> None:
    request = read({"data": b"clip", "captions": b"3"}, {"x-etenet-captions": "2", "x-etenet-beam-size": "4"})
    assert request.options == CaptionOptions(captions=3, beam_size=4)


def test_a_bad_option_leaves_the_body_to_be_counted() -> None:
    request = read({"body": b"clip"}, {"x-etenet-captions": "many"})
    assert isinstance(request.error, BadOption)
    assert request.body == b"clip"


@pytest.mark.parametrize(
    ("row", "error"),
    [({}, EmptyBody), ({"body": {"video": 1}}, NotAVideo), ({"body": b"clip", "captions": {"a": 1}}, NotAVideo)],
)
def test_what_holds_no_video_becomes_an_error(row: dict[str, Any], error: type[Exception]) -> None:
    assert isinstance(read(row).error, error)


def test_a_compressed_body_is_the_video_in_it_and_a_form_was_taken_apart_before() -> None:
    compressed, headers = gzip.compress(b"clip"), {"CONTENT-Encoding": "gzip"}
    assert read({"body": bytearray(compressed)}, headers).body == b"clip"
    assert read({"data": b"clip"}, headers).body == b"clip"
    assert read({"body": compressed}).body == compressed
    assert Request.read("7", {"body": compressed}, headers, max_body_bytes=4).error is None
    assert isinstance(Request.read("7", {"body": compressed}, headers, max_body_bytes=3).error, TooLarge)
    assert isinstance(read({"body": b"clip"}, headers).error, NotAVideo)
    assert isinstance(read({"body": b"clip"}, {"content-encoding": "br"}).error, NotAVideo)
    assert (read({"body": b""}, headers).body, read({"body": b""}, headers).error) == (b"", None)


def test_of_two_errors_the_options_come_first() -> None:
    assert isinstance(read({}, {"x-etenet-captions": "many"}).error, BadOption)


def test_a_form_with_several_videos_is_refused() -> None:
    error = read({"video": b"clip", "data": b"clip"}).error
    assert isinstance(error, BadOption)
    assert "in data and video" in str(error)


@pytest.mark.parametrize(
    ("header", "nearest"),
    [
        ("X-Etenet-Beam-Sise", "X-Etenet-Beam-Size"),
        ("x-etenet-beams", "X-Etenet-Beam-Size"),
        ("X-ETENET-SEGMENTS", "X-Etenet-Segment"),
        ("X-Etenet-Max_Words", "X-Etenet-Max-Words"),
        ("X-Etenet-", "X-Etenet-End-S"),
    ],
)
def test_an_unknown_header_is_refused_with_the_nearest_known_one(header: str, nearest: str) -> None:
    request = read({"body": b"clip"}, {"X-Etenet-Captions": "2", header: "3", "X-Other": "4"})
    assert isinstance(request.error, BadOption)
    assert str(request.error) == f"there is no header {header.title()}; the nearest one is {nearest}"
    assert request.body == b"clip"


def test_an_unknown_form_field_is_refused_with_the_nearest_known_one() -> None:
    for field, nearest in (("beam-size", "beam_size"), ("Captions", "captions"), ("dota", "data"), ("x" * 10**7, "")):
        error = read({"data": b"clip", field: b"3"}).error
        assert isinstance(error, BadOption)
        assert f"no form field {field[:40]}; the nearest one is {nearest}" in str(error)


def test_a_form_whose_video_has_another_name_is_told_the_name() -> None:
    error = read({"upload": b"clip", "captions": b"2"}).error
    assert isinstance(error, EmptyBody)
    assert "form field 'data'" in str(error)


def test_a_form_in_which_no_field_was_found_is_told_about_its_boundary() -> None:
    """TorchServe finds none if the Content-Type has no boundary or another one, as it may when a person writes it."""
    error = read({}).error
    assert isinstance(error, EmptyBody)
    assert "leave the Content-Type of a form to the client" in str(error)
