"""HDR clips come out as SDR. The colours are known: SDR colours on a screen whose white is 203 cd/m2, recoded.

The forward formulas stand here in their own words (ITU-R BT.2100, BT.2020, BT.1886), so each test is a round trip.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from etenet import errors
from etenet.video import tone_mapping
from etenet.video.sampling import sample_frames
from etenet.video.tone_mapping import BT709, BT2020, HLG, P3, PQ, to_sdr
from tests import clips

Floats = NDArray[np.float64]

SIZE_PX = 32
COLOURS = [(220, 20, 20), (20, 200, 20), (20, 20, 220), (220, 220, 20), (235, 235, 235), (128, 128, 128), (0, 0, 0)]
# Chromaticities of red, green, blue and white. Source: ITU-R BT.709, BT.2020, SMPTE RP 431-2 with the white of BT.709.
PRIMARIES = {
    BT709: ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)),
    BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    P3: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
WHITE = (0.3127, 0.3290)


def to_xyz(primaries: int) -> Floats:
    """The matrix from linear RGB, by SMPTE RP 177."""

    def xyz(x: float, y: float) -> list[float]:
        return [x / y, 1, (1 - x - y) / y]

    columns = np.array([xyz(*point) for point in PRIMARIES[primaries]]).T
    return np.asarray(columns * np.linalg.solve(columns, xyz(*WHITE)))


def pq_signal(cd_m2: Floats) -> Floats:
    power = (cd_m2 / 10_000) ** 0.1593017578125
    return np.asarray(((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375)


def hlg_oetf(scene: Floats) -> Floats:
    logarithmic = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), logarithmic)


def hlg_signal(cd_m2: Floats) -> Floats:
    """With the OOTF of each component, as FFmpeg's zscale."""
    return hlg_oetf((cd_m2 / 1000) ** (1 / 1.2))


def hlg_signal_of_bt2100(cd_m2: Floats) -> Floats:
    """With the OOTF of the luminance."""
    luminance = cd_m2 @ (0.2627, 0.6780, 0.0593) / 1000
    return hlg_oetf(cd_m2 / 1000 * np.maximum(luminance, 1e-9)[..., None] ** (1 / 1.2 - 1))


DARK = 24  # what 10 bits of PQ leave of a colour whose light is 0.2 % of white; the others are within 3
SIGNALS: dict[str, tuple[int, Callable[[Floats], Floats], float]] = {
    "PQ": (PQ, pq_signal, DARK),
    "HLG": (HLG, hlg_signal, DARK),
    "HLG of BT.2100": (HLG, hlg_signal_of_bt2100, 40),
}


def light(colours: object, primaries: int = BT2020, white_cd_m2: float = 203) -> Floats:
    """SDR colours (..., 3) -> cd/m2 in these primaries."""
    linear = (np.asarray(colours) / 255) ** 2.4 * white_cd_m2
    return np.asarray(np.maximum(linear @ np.linalg.solve(to_xyz(primaries), to_xyz(BT709)).T, 0))


def striped(signal: Floats, pixels: str, *, full_range: bool) -> av.VideoFrame:
    """Vertical stripes of these R'G'B' signals (stripes, 3), of 16 pixels each, as YUV (BT.2020)."""
    luma = signal @ (0.2627, 0.6780, 0.0593)
    chroma = [(signal[:, 2] - luma) / 1.8814, (signal[:, 0] - luma) / 1.4746]
    frame = av.VideoFrame(16 * len(signal), 64, pixels)
    kind, step = (np.uint16, 4) if frame.format.components[0].bits == 10 else (np.uint8, 1)
    scale, offset, chroma_scale = (
        (256 * step - 1, 0, 256 * step - 1) if full_range else (219 * step, 16 * step, 224 * step)
    )
    values = [luma * scale + offset, *(values * chroma_scale + 128 * step for values in chroma)]
    for plane, stripes in zip(frame.planes, values, strict=True):
        line = np.repeat(np.clip(np.rint(stripes), 0, 256 * step - 1).astype(kind), plane.width // len(signal))
        lines = np.zeros((plane.height, plane.line_size // line.itemsize), kind)
        lines[:, : plane.width] = line
        plane.update(lines.tobytes())
    return frame


def hdr_clip(
    signal: Floats,
    transfer: int,
    *,
    primaries: int = BT2020,
    matrix: int = 9,
    full_range: bool = False,
    codec: str = "libx264",
    container: str = "mp4",
    pixels: str = "yuv420p10le",
    **options: str,
) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=25, options=options)
        frame = striped(signal, pixels, full_range=full_range)
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, pixels
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = transfer, primaries, matrix
        context.color_range, context.time_base = 2 if full_range else 1, Fraction(1, 25)
        frame.color_trc, frame.color_primaries, frame.colorspace = transfer, primaries, matrix
        frame.color_range = context.color_range
        for number in range(4):
            frame.pts, frame.time_base = number, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def shown(body: bytes, stripes: int) -> NDArray[np.int64]:
    """The colour in the middle of each stripe, (stripes, 3)."""
    frame = sample_frames(body, resize_px=16 * stripes).frames[0].astype(int)
    return np.asarray(frame[len(frame) // 2, 8::16])


LOSSLESS = {"qp": "1", "preset": "ultrafast"}
FILES: dict[str, dict[str, str]] = {
    "h264 in mp4": LOSSLESS,
    "hevc in ts": {
        "codec": "libx265",
        "container": "mpegts",
        "x265-params": "log-level=none:qp=1",
        "preset": "ultrafast",
    },
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", SIGNALS)
def test_colours_below_diffuse_white_come_out_as_on_an_sdr_screen(name: str, file: str) -> None:
    transfer, signal, tolerance = SIGNALS[name]
    body = hdr_clip(signal(light(COLOURS)), transfer, **FILES[file])  # type: ignore[arg-type]  # names of options
    assert np.abs(shown(body, len(COLOURS)) - COLOURS).max() <= tolerance


def test_the_container_may_say_that_a_clip_is_hdr() -> None:
    """VP9 has no place for the transfer."""
    vp9 = {"codec": "libvpx-vp9", "container": "matroska", "pixels": "yuv420p", "lossless": "1"}
    body = hdr_clip(hlg_signal(light(COLOURS)), HLG, **vp9)  # type: ignore[arg-type]
    assert np.abs(shown(body, len(COLOURS)) - COLOURS).max() <= DARK


@pytest.mark.parametrize("primaries", PRIMARIES)
@pytest.mark.parametrize("full_range", [True, False])
def test_primaries_and_range_are_those_of_the_file(primaries: int, full_range: bool) -> None:
    signal = pq_signal(light(COLOURS, primaries))
    body = hdr_clip(signal, PQ, primaries=primaries, full_range=full_range, **LOSSLESS)  # type: ignore[arg-type]
    assert np.abs(shown(body, len(COLOURS)) - COLOURS).max() <= DARK


@pytest.mark.parametrize("unknown", [{"matrix": 2}, {"primaries": 2}, {"matrix": 10}])
def test_an_hdr_clip_whose_matrix_or_primaries_are_not_known_counts_as_bt2020(unknown: dict[str, int]) -> None:
    body = hdr_clip(pq_signal(light(COLOURS)), PQ, **unknown, **LOSSLESS)  # type: ignore[arg-type]
    assert np.abs(shown(body, len(COLOURS)) - COLOURS).max() <= DARK


def test_sdr_clips_of_bt2020_and_of_10_bits_stay_as_they_were() -> None:
    """Transfer 14 is that of BT.2020, for SDR."""
    signal = np.asarray(COLOURS) / 255
    body = hdr_clip(signal, 14, **LOSSLESS)  # type: ignore[arg-type]
    assert np.abs(shown(body, len(COLOURS)) - COLOURS).max() <= DARK


def mapped(cd_m2: object, transfer: int = PQ) -> NDArray[np.uint8]:
    """Of a picture of one line of colours in BT.709 (pixels, 3)."""
    signal = {PQ: pq_signal, HLG: hlg_signal}[transfer](np.asarray(cd_m2, float))
    (line,) = to_sdr(np.rint(65280 * signal).astype(np.uint16)[None], transfer=transfer, primaries=BT709)
    return line


@pytest.mark.parametrize(("transfer", "peak"), [(PQ, 10_000), (PQ, 600), (HLG, 1000)])
def test_highlights_differ_from_each_other_and_from_diffuse_white(transfer: int, peak: float) -> None:
    grey = mapped(np.geomspace(50, peak, 20)[:, None].repeat(3, axis=1), transfer)[:, 0].astype(int)
    assert (np.diff(grey) >= 0).all()
    assert len(set(grey)) >= 16
    assert grey[-1] == 255
    assert grey[0] > 0.7 * 255 * (50 / 203) ** (1 / 2.4)


@given(st.lists(st.tuples(*[st.floats(0, 10_000)] * 3), min_size=1, max_size=8))
def test_every_picture_is_mapped_without_a_change_of_hue_or_order(colours: list[tuple[float, float, float]]) -> None:
    line = mapped(colours).astype(float) / 255
    linear = line**2.4
    for colour, seen in zip(np.array(colours), linear, strict=True):
        if colour.max() > 100:
            assert np.abs(seen / seen.max() - colour / colour.max()).max() < 0.03
    brightness = np.array(colours).max(axis=1)
    for one in range(len(colours)):
        for other in range(len(colours)):
            if brightness[one] > brightness[other] * 1.01:
                assert line[one].max() >= line[other].max()


@given(st.lists(st.tuples(*[st.floats(0, 203)] * 3), min_size=1, max_size=8))
def test_a_picture_without_highlights_is_not_compressed(colours: list[tuple[float, float, float]]) -> None:
    expected = 255 * (np.array(colours) / 203) ** (1 / 2.4)
    assert np.abs(mapped(colours) - expected).max() <= 1.5


def test_diffuse_white_is_where_bt2408_says() -> None:
    assert pq_signal(np.array([203.0])) == pytest.approx(0.58, abs=0.002)
    assert hlg_signal(np.array([203.0])) == pytest.approx(0.75, abs=0.002)
    np.testing.assert_array_equal(mapped([[203, 203, 203]], HLG), mapped([[203, 203, 203]], PQ))


def test_the_matrices_follow_from_the_chromaticities() -> None:
    for primaries, matrix in tone_mapping._TO_BT709.items():
        np.testing.assert_allclose(matrix, np.linalg.solve(to_xyz(BT709), to_xyz(primaries)), atol=2e-4)


def test_hdr_costs_little_memory_beside_the_frame() -> None:
    assert sum(table.nbytes for table in map(tone_mapping._light, (PQ, HLG))) < 2**20


@pytest.mark.parametrize(("profile", "compatibility"), [(5, 0), (10, 0)])
def test_dolby_vision_without_a_base_layer_is_refused_with_the_reason(profile: int, compatibility: int) -> None:
    body = clips.with_dolby_vision(clips.video(5), profile, compatibility)
    for copy in (body, clips.remuxed(body, "matroska")):
        with pytest.raises(errors.UndecodableVideo, match=r"Dolby Vision.*send it as"):
            sample_frames(copy, resize_px=SIZE_PX)


@pytest.mark.parametrize(("profile", "compatibility"), [(8, 1), (8, 4), (7, 6), (4, 2), (10, 4)])
def test_other_dolby_vision_is_shown_by_its_base_layer(profile: int, compatibility: int) -> None:
    plain = hdr_clip(hlg_signal(light(COLOURS)), HLG, **LOSSLESS)  # type: ignore[arg-type]
    body = clips.with_dolby_vision(plain, profile, compatibility)
    np.testing.assert_array_equal(
        sample_frames(body, resize_px=SIZE_PX).frames, sample_frames(plain, resize_px=SIZE_PX).frames
    )
    assert np.abs(shown(body, len(COLOURS)) - COLOURS).max() <= DARK
