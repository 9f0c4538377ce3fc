"""A compressed body is undone within the limit of a body, or refused by name."""

from __future__ import annotations

import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etenet.errors import NotAVideo, TooLarge
from etenet.serving import content_encoding

LIMIT = 1000


def bare_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


CODINGS = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress, "Deflate": bare_deflate}


@pytest.mark.parametrize("coding", CODINGS)
@given(body=st.binary(min_size=1, max_size=LIMIT))
def test_what_was_compressed_comes_back(coding: str, body: bytes) -> None:
    assert content_encoding.undo(f" {coding}, identity", CODINGS[coding](body), LIMIT) == body


@given(parts=st.lists(st.binary(max_size=50), min_size=2, max_size=16))
def test_gzip_data_of_several_members_comes_back(parts: list[bytes]) -> None:
    assert content_encoding.undo("gzip", b"".join(map(gzip.compress, parts)), LIMIT) == b"".join(parts)


@pytest.mark.parametrize("none", ["", "identity", " , IDENTITY"])
def test_a_body_that_is_not_compressed_stays_as_it_is(none: str) -> None:
    assert content_encoding.undo(none, b"video", LIMIT) == b"video"


@pytest.mark.parametrize("coding", CODINGS)
def test_one_byte_more_than_the_limit_is_too_large_and_a_bomb_is_never_unpacked(coding: str) -> None:
    assert len(content_encoding.undo(coding, CODINGS[coding](bytes(LIMIT)), LIMIT)) == LIMIT
    for size in (LIMIT + 1, 10**8):
        with pytest.raises(TooLarge, match="more than 1000 bytes"):
            content_encoding.undo(coding, CODINGS[coding](bytes(size)), LIMIT)


@pytest.mark.parametrize("coding", CODINGS)
@given(share=st.floats(0, 0.99))
def test_data_that_is_cut_short_or_not_compressed_is_refused(coding: str, share: float) -> None:
    whole = CODINGS[coding](bytes(range(256)))
    for body in (whole[: max(1, int(share * len(whole)))], b"\0\0\0\x18ftypisom" + bytes(100)):
        with pytest.raises(NotAVideo, match="without that header"):
            content_encoding.undo(coding, body, LIMIT)


def test_gzip_data_of_endless_members_is_refused() -> None:
    with pytest.raises(NotAVideo):
        content_encoding.undo("gzip", gzip.compress(b"") * 100_000, LIMIT)


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip", "gzip, br", "x" * 1000])
def test_any_other_encoding_is_refused_by_name(coding: str) -> None:
    with pytest.raises(NotAVideo, match=f"Content-Encoding '{coding[:40]}' is not undone") as refused:
        content_encoding.undo(coding, b"video", LIMIT)
    assert refused.value.status == 415
