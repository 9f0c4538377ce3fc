"""Which packets must be decoded to get the wanted frames. Knows times, no decoder."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

from etenet.video.clock import Packet

_P = TypeVar("_P")
_PacketT = TypeVar("_PacketT", bound=Packet)


@dataclass(frozen=True, slots=True)
class TimedPacket(Generic[_P]):
    """A packet and when it is shown, if at all."""

    data: _P
    pts: int
    shown: bool
    starts_group: bool  # a key frame
    ends: int = 0  # when it is no longer shown, in ticks like pts


def timed_packets(packets: Iterable[_PacketT], *, pair_ticks: float = 0) -> list[TimedPacket[_PacketT]] | None:
    """When each packet is shown; None if one does not say so.

    With `pair_ticks`, how long a frame is shown, some frames come as two packets, a field each. The second has no time,
    or one before the next frame. It is decoded with the first, and not shown apart.
    """
    timed: list[TimedPacket[_PacketT]] = []
    first: TimedPacket[_PacketT] | None = None  # as long as the second field may come
    for packet in packets:
        if pair_ticks and first and (packet.pts is None or 0 < packet.pts - first.pts <= 0.75 * pair_ticks):
            timed[-1] = replace(first, ends=first.pts + round(pair_ticks))
            timed.append(TimedPacket(packet, first.pts, shown=False, starts_group=False))
            first = None
        elif packet.pts is None:
            return None
        else:
            ends = packet.pts + (packet.duration or 0)
            first = TimedPacket(packet, packet.pts, not packet.is_discard, packet.is_keyframe, ends)
            timed.append(first)
    return timed


class Run(NamedTuple, Generic[_P]):
    """Consecutive packets that are decoded together, and the first pts that they can show."""

    packets: Sequence[TimedPacket[_P]]
    first_shown: int


def doubtful_head(packets: Sequence[TimedPacket[_P]]) -> Sequence[TimedPacket[_P]]:
    """The first group of pictures, with what is before it, if a decoder may not show all of that. Else nothing.

    A recording or a piece of a stream may begin between key frames, or with a group whose leading pictures (shown
    before the key frame, sent after it) depend on a group that is not there.
    """
    starts = [number for number, packet in enumerate(packets) if packet.starts_group][:2]
    key, end = (*starts, len(packets), len(packets))[:2]
    if key == 0 and all(packet.pts >= packets[0].pts for packet in packets[:end]):
        return []
    return packets[:end]


def without_hidden(
    packets: Sequence[TimedPacket[_P]], head: Sequence[TimedPacket[_P]], delivered_pts: Collection[int | None]
) -> list[TimedPacket[_P]]:
    """The packets, if a decoder has shown only this of their head. What came to nothing before a key frame is dropped.

    The other packets that are not shown stay: a decoder notices if they are missing.
    """
    believed = [replace(packet, shown=packet.shown and packet.pts in delivered_pts) for packet in head]
    key = next((number for number, packet in enumerate(believed) if packet.starts_group), len(believed))
    if not any(packet.pts in delivered_pts for packet in believed[:key]):
        believed = believed[key:]
    return [*believed, *packets[len(head) :]]


def runs(packets: Sequence[TimedPacket[_P]], wanted: frozenset[int]) -> Iterator[Run[_P]]:
    """Runs of packets that hold every wanted frame and everything it depends on. None depends on another.

    A run is a group of pictures up to its last wanted packet. The last run of a clip is whole, because files are most
    often damaged at the end and its frames can then be checked. Frames that are shown before the key frame of their
    group but sent after it depend on the group before, so if one of them is wanted, both groups are one run.
    """
    starts = [0, *(number for number, packet in enumerate(packets) if packet.starts_group and number)]
    groups = [packets[a:b] for a, b in pairwise([*starts, len(packets)])]
    needed, dependent = set(), set()
    for number, group in enumerate(groups):
        for packet in group:
            if packet.pts in wanted and packet.shown:
                needed.add(number)
                if packet.pts < group[0].pts and number:
                    needed.add(number - 1)
                    dependent.add(number)
    for number in sorted(needed - dependent):
        end = number + 1
        while end in dependent:
            end += 1
        run = [packet for group in groups[number:end] for packet in group]
        if end < len(groups):
            run = run[: 1 + max(place for place, packet in enumerate(run) if packet.pts in wanted)]
        yield Run(run, run[0].pts if number else min(packet.pts for packet in run))
