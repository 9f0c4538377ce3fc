"""HDR pictures -> SDR ones, as a player shows them on an ordinary screen.

Signal -> light (ITU-R BT.2100: PQ, or HLG on a display of 1,000 cd/m2), where diffuse white, 203 cd/m2 (ITU-R BT.2408),
is 1.0 -> primaries of BT.709 -> highlights compressed (ITU-R BT.2390) -> gamma of BT.1886. Knows pixels, no frames.
"""

from __future__ import annotations

from functools import cache, reduce

import numpy as np
from numpy.typing import NDArray

# Code points of ITU-T H.273.
BT709, BT2020, P3 = 1, 9, 12  # primaries
PQ, HLG = 16, 18  # transfer characteristics

_DIFFUSE_WHITE_CD_M2 = 203.0
_PQ_PEAK_CD_M2 = 10_000.0
_HLG_PEAK_CD_M2 = 1_000.0
_HLG_SYSTEM_GAMMA = 1.2
_SDR_GAMMA = 2.4
_WHITE = 255 * 2**8  # of swscale's pictures of 16 bits

_TO_BT709 = {
    BT709: np.eye(3, dtype=np.float32),
    # Source: ITU-R BT.2087, and the same for the primaries of P3 with the white of BT.709.
    BT2020: np.array(
        [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]],
        np.float32,
    ),
    P3: np.array(
        [[1.224940, -0.224940, 0.0], [-0.042057, 1.042057, 0.0], [-0.019638, -0.078636, 1.098274]], np.float32
    ),
}


def is_hdr(transfer: int) -> bool:
    return transfer in (PQ, HLG)


def to_sdr(signal: NDArray[np.uint16], *, transfer: int, primaries: int) -> NDArray[np.uint8]:
    """RGB pictures (height, width, 3), full range, of swscale. Unknown primaries count as those of BT.2020.

    No brighter than diffuse white, colours stay as they are. Otherwise the brightest colour of the picture becomes the
    brightest of the screen, and the others give way to it; the ratio of red, green and blue is kept.
    """
    light = np.maximum(_light(transfer)[signal] @ _TO_BT709.get(primaries, _TO_BT709[BT2020]).T, 0)
    brightest = reduce(np.maximum, (light[..., channel : channel + 1] for channel in range(3)))
    if brightest.max() > 1:
        before, after = _compression(float(brightest.max()))
        light *= np.interp(brightest, before, after) / np.maximum(brightest, np.finfo(np.float32).tiny)
    pixels: NDArray[np.uint8] = np.rint(255 * np.minimum(light, 1) ** np.float32(1 / _SDR_GAMMA)).astype(np.uint8)
    return pixels


def _compression(peak: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Luminances from 0 to `peak`, and what becomes of them on a screen that shows 1. ITU-R BT.2390, 5.4.1."""
    pq_peak, pq_white = _pq_inverse(np.array([peak, 1.0]) * _DIFFUSE_WHITE_CD_M2)
    scaled, highest = np.linspace(0, 1, 1024), pq_white / pq_peak
    knee = 1.5 * highest - 0.5
    t = np.clip((scaled - knee) / (1 - knee), 0, 1)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * highest
    compressed = np.where(scaled < knee, scaled, spline)
    before, after = (_pq(values * pq_peak) / _DIFFUSE_WHITE_CD_M2 for values in (scaled, compressed))
    return before, after


@cache
def _light(transfer: int) -> NDArray[np.float32]:
    """Of each of the 65,536 values of a signal; diffuse white is 1."""
    signal = np.minimum(np.arange(2**16) / _WHITE, 1)
    cd_m2 = _pq(signal) if transfer == PQ else _hlg(signal)
    return (cd_m2 / _DIFFUSE_WHITE_CD_M2).astype(np.float32)


_M1, _M2, _C1, _C2, _C3 = 2610 / 16384, 2523 / 4096 * 128, 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32


def _pq(signal: NDArray[np.float64]) -> NDArray[np.float64]:
    """cd/m2. ITU-R BT.2100, table 4."""
    root = signal ** (1 / _M2)
    linear: NDArray[np.float64] = (np.maximum(root - _C1, 0) / (_C2 - _C3 * root)) ** (1 / _M1)
    return _PQ_PEAK_CD_M2 * linear


def _pq_inverse(cd_m2: NDArray[np.float64]) -> NDArray[np.float64]:
    power = (cd_m2 / _PQ_PEAK_CD_M2) ** _M1
    signal: NDArray[np.float64] = ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2
    return signal


def _hlg(signal: NDArray[np.float64]) -> NDArray[np.float64]:
    """cd/m2. ITU-R BT.2100, table 5: the inverse OETF, then the OOTF, of each component as FFmpeg's zscale has it."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    displayed: NDArray[np.float64] = _HLG_PEAK_CD_M2 * scene**_HLG_SYSTEM_GAMMA
    return displayed
