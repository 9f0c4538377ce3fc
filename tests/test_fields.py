"""Frames that come as two packets, a field each, are sampled without decoding all of them."""

from __future__ import annotations

import pytest

from etenet.video import sampling
from etenet.video.decoder import Decoder
from tests import fields
from tests.numbered import RATE, number_in

COUNT = 200
MIDDLES = [6, 18, 31, 43, 56, 68, 81, 93, 106, 118, 131, 143, 156, 168, 181, 193]  # of sixteen slices


@pytest.mark.parametrize("fields_apart", [True, False])
@pytest.mark.parametrize("container", ["mpegts", "mp4", "matroska"])
@pytest.mark.parametrize("every_nth_whole", [0, 3, 2])
def test_the_middles_of_slices_are_taken(
    every_nth_whole: int, container: str, fields_apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = fields.frames(COUNT, every_nth_whole=every_nth_whole)
    body = fields.muxed(units, container, fields_apart=fields_apart)
    decoded = 0
    checked = Decoder._checked

    def counting(self: Decoder, frames: object) -> object:
        nonlocal decoded
        for frame in checked(self, frames):  # type: ignore[arg-type]
            decoded += 1
            yield frame

    monkeypatch.setattr(Decoder, "_checked", counting)
    monkeypatch.delattr(sampling._Sampler, "_by_counting")  # which would decode everything twice
    clip = sampling.sample_frames(body, resize_px=96)
    assert [number_in(pixels) for pixels in clip.frames] == MIDDLES
    assert clip.info.duration_s == COUNT / RATE
    assert decoded < COUNT
