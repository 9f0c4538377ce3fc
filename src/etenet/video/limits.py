"""What decoding one upload may cost."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields

from etenet.errors import DecodeTimeout, Overloaded, TooMuchMemory

MOST_SEGMENTS = 100  # of one request, whatever its limits
_MOST_OF_A_CORE = 0.9  # what a thread gets of one that it need not share


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeLimits:
    """What one upload may cost. Header claims are never trusted against these.

    Processor time decides about a clip. Where only the wall clock ran out, the machine was busy, and it may come again.
    """

    max_body_bytes: int = 64 * 2**20
    max_pixels: int = 4096 * 2304
    max_memory_bytes: int = 2**30  # of a decoder process, beyond what it uses at its start
    max_packets: int = 200_000
    max_segments: int = 16  # of one video, in one answer
    decode_cpu_s: float = 5.0  # processor time
    decode_deadline_s: float = 15.0  # wall-clock time

    def __post_init__(self) -> None:
        for limit in fields(self):
            if not 0 < getattr(self, limit.name) < math.inf:
                raise ValueError(f"{limit.name} must be positive and finite, got {getattr(self, limit.name)}")
        # With less room between the two, the wall clock would always run out first.
        object.__setattr__(self, "decode_cpu_s", min(self.decode_cpu_s, _MOST_OF_A_CORE * self.decode_deadline_s))
        if self.max_segments > MOST_SEGMENTS:
            raise ValueError(f"max_segments is at most {MOST_SEGMENTS}, got {self.max_segments}")

    def too_slow(self) -> DecodeTimeout:
        return DecodeTimeout(
            f"decoding takes more than {self.decode_cpu_s:g} s of processor time; send a shorter clip or scale it down"
        )

    def too_much_memory(self) -> TooMuchMemory:
        return TooMuchMemory(
            f"decoding takes more than {self.max_memory_bytes // 2**20} MiB of memory; scale the video down"
        )

    def held_up(self, cpu_s: float) -> Overloaded:
        return Overloaded(
            f"the machine is busy: in {self.decode_deadline_s:g} s decoding got {cpu_s:.1f} s of processor time; "
            "send it again in a moment"
        )


class Stopwatch:
    """The time since decoding of an upload began, of the wall clock and of the processor.

    Processor time is that of the calling thread or, with `of_process`, of all threads of a process that does nothing
    else meanwhile.
    """

    def __init__(self, *, of_process: bool = False) -> None:
        self._cpu_clock_s = time.process_time if of_process else time.thread_time
        self._began_s, self._cpu_began_s = time.monotonic(), self._cpu_clock_s()

    @property
    def elapsed_ms(self) -> float:
        return 1000 * (time.monotonic() - self._began_s)

    def check(self, limits: DecodeLimits) -> None:
        """Raises `DecodeTimeout` if the clip took too long, and `Overloaded` if only the wall clock ran out."""
        cpu_s = self._cpu_clock_s() - self._cpu_began_s
        if cpu_s > limits.decode_cpu_s:
            raise limits.too_slow()
        if time.monotonic() - self._began_s > limits.decode_deadline_s:
            raise limits.held_up(cpu_s)
