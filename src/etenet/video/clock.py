"""One clock for all packets of a stream, and the times of its frames. Knows times, no decoder.

Where recordings were joined, the clock goes back or jumps. FFmpeg's own command lets it go on, and so do we.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

# Source: FFmpeg, `ts_discontinuity_detect` in fftools/ffmpeg_demux.c, with the defaults of its options.
_BACK_S = 0.1
_JUMP_S = 10.0
_JUMP_IN_A_FILE_S = 30 * 3600.0


class Packet(Protocol):
    """What a clock needs of a packet. Times are in ticks of the stream's time base."""

    pts: int | None
    dts: int | None
    duration: int | None

    @property
    def is_keyframe(self) -> bool: ...

    @property
    def is_discard(self) -> bool: ...


def as_browsers_play(gif: Sequence[Packet]) -> None:
    """Give the pictures of a GIF, whose ticks are 10 ms, the times that they have in a browser.

    Source: Chromium's and Firefox's image decoders: one that asks for 10 ms or less is shown for 100 ms.
    """
    pts = 0
    for packet in gif:
        packet.duration = packet.duration if packet.duration and packet.duration > 1 else 10
        packet.pts = packet.dts = pts
        pts += packet.duration


@dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """How a stream counts its time."""

    tick_s: float
    frame_ticks: int  # from one frame to the next, by the stream's average rate
    is_broadcast: bool  # a container of broadcasts: where its clock jumps, nothing is missing
    stores_dts: bool = False  # and may go back at any packet, other than where the dts are guesses

    def go_on(self, packets: Sequence[Packet]) -> None:
        """Shift each piece that has a clock of its own, so that its times follow those of the piece before it.

        Packets that only prepare a decoder for a part that an edit list plays again have the times of that part.
        """
        shown = [packet for packet in packets if not packet.is_discard]
        for before, piece in pairwise(list(self._pieces(shown))):
            shift = self._shift(before, piece)
            for packet in before:
                if self._is_astray(packet):
                    packet.pts = _shifted(packet.pts, shift)
            for packet in piece:
                packet.pts, packet.dts = _shifted(packet.pts, shift), _shifted(packet.dts, shift)

    def _pieces(self, packets: Sequence[Packet]) -> Iterator[Sequence[Packet]]:
        start, last = 0, None
        for number, packet in enumerate(packets):
            dts = self._dts(packet)
            if dts is None:
                continue
            if last and self._is_restarted(last, dts, is_keyframe=packet.is_keyframe):
                yield packets[start:number]
                start = number
            last = dts, self._length(packet)
        yield packets[start:]

    def _is_restarted(self, last: tuple[int, int], dts: int, *, is_keyframe: bool) -> bool:
        last_dts, length = last
        goes_back = dts + _BACK_S / self.tick_s < last_dts
        jump_s = abs(dts - last_dts - length) * self.tick_s
        if self.is_broadcast:
            return goes_back or jump_s > _JUMP_S
        # Matroska stores no dts. FFmpeg guesses them, and after a restart the guesses go back at every B-frame.
        return (goes_back and (is_keyframe or self.stores_dts)) or jump_s > _JUMP_IN_A_FILE_S

    def _is_astray(self, packet: Packet) -> bool:
        """Whether the pts is on another clock: of the last picture of a piece, FFmpeg guesses it from the next dts."""
        if not self.is_broadcast or packet.pts is None or packet.dts is None:
            return False
        return not 0 <= (packet.pts - packet.dts) * self.tick_s <= _JUMP_S

    def _shift(self, before: Sequence[Packet], piece: Sequence[Packet]) -> int:
        """By the order of decoding, as FFmpeg does; by more where frames of two recordings would be shown in turns."""
        decoded = [(dts, self._length(packet)) for packet in before if (dts := self._dts(packet)) is not None]
        shift = sum(decoded[-1]) - next(dts for packet in piece if (dts := self._dts(packet)) is not None)
        if self.stores_dts and not piece[0].is_keyframe:
            return shift  # the same recording goes on
        shown = [
            (packet.pts, self._length(packet))
            for packet in before
            if packet.pts is not None and not self._is_astray(packet)
        ]
        pts = [packet.pts for packet in piece if packet.pts is not None and not self._is_astray(packet)]
        if shown and pts and min(pts) + shift <= max(shown)[0]:
            shift = sum(max(shown)) - min(pts)
        return shift

    def _dts(self, packet: Packet) -> int | None:
        """No picture is shown before it is decoded. Where a file says so, its dts is a guess from another clock."""
        if self.is_broadcast or packet.pts is None or packet.dts is None:
            return packet.dts
        return min(packet.pts, packet.dts)

    def _length(self, packet: Packet) -> int:
        return packet.duration or self.frame_ticks

    def times(self, frame_pts: Sequence[int | None], packets: Sequence[Packet]) -> list[int]:
        """When the frames are shown that a decoder gave in this order; `packets` are those of pictures that are shown.

        Some files have no presentation times, or the order of decoding in their place. Then the k-th frame is shown at
        the k-th smallest time, or at the average rate if there is not one time for each frame: program streams give one
        for several pictures.
        """
        known = [pts for pts in frame_pts if pts is not None]
        if len(known) == len(frame_pts) and (_is_sorted(known) or not _is_sorted([packet.pts for packet in packets])):
            return sorted(known)
        places = {packet.dts: place for place, packet in enumerate(packets) if packet.dts is not None}
        dts = sorted(places)
        if len(dts) == len(frame_pts):
            return dts
        first, step = min(known or dts, default=0), float(self.frame_ticks)
        if dts and places[dts[0]] < places[dts[-1]]:
            step = (dts[-1] - dts[0]) / (places[dts[-1]] - places[dts[0]])
        return [first + round(number * step) for number in range(len(frame_pts))]


def _shifted(time: int | None, shift: int) -> int | None:
    """None as well if FFmpeg has no number for it."""
    return None if time is None or abs(time + shift) >= 2**63 else time + shift


def _is_sorted(times: Sequence[int | None]) -> bool:
    return all(one is not None and after is not None and one <= after for one, after in pairwise(times))
