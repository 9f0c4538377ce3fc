"""Everything that can go wrong on purpose, as one tree; each caption error knows its HTTP status and its code.

    EtenetError
      UsageError               wrong use of a command or function: exit status 2, one line, no traceback
        CheckpointError        missing, damaged or of another version
      Stopped                  a batch job cannot go on now: exit status 1
      JavaError                a Java program that we asked died, hung or answered nonsense: exit status 1
      DeviceFailed             the GPU computes nothing any more: only a new process can
      CaptionError             this clip has no caption; its neighbours do
        BadOption              400 bad_option
        EmptyBody              400 empty_body
        TooLarge               413 too_large
        NotAVideo              415 not_a_video
        UndecodableVideo       422 undecodable_video
        TooManyPixels          422 too_many_pixels
        TooMuchMemory          422 too_much_memory
        DecodeTimeout          422 decode_timeout
        DecoderCrashed         422 decoder_crashed
        Overloaded             503 overloaded
        InternalError          500 internal_error: our own bug

A message names the thing and the mend. Foreign errors are translated where they arise, with `raise ... from`.
"""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import ClassVar

ERROR_HEADER = "x-etenet-error"  # of an answer: the code in its body; what TorchServe itself answers has none

_NAMED = 3


def named(things: Iterable[str]) -> str:
    """'a', 'b', 'c' and 4 more: the first few by name, so that a message stays one line."""
    names = list(map(repr, things))
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


class EtenetError(Exception):
    """Base of all errors this package raises on purpose."""


class UsageError(EtenetError):
    """The caller asked for something that cannot be done as asked."""


class CheckpointError(UsageError):
    """A checkpoint is missing, damaged or of another version."""


class Stopped(EtenetError):
    """A batch job cannot go on now; started again, it goes on where it was."""


class JavaError(EtenetError):
    """A Java program that was asked for something gave no answer that can be used."""


class DeviceFailed(EtenetError):
    """The accelerator computes nothing any more in this process; a new one may have more luck."""


class CaptionError(EtenetError):
    """One clip could not be captioned."""

    status: ClassVar[HTTPStatus]
    code: ClassVar[str]

    def as_dict(self) -> dict[str, dict[str, str]]:
        """The error body of the HTTP contract."""
        return {"error": {"code": self.code, "message": str(self)}}


class BadOption(CaptionError):
    status, code = HTTPStatus.BAD_REQUEST, "bad_option"


class EmptyBody(CaptionError):
    status, code = HTTPStatus.BAD_REQUEST, "empty_body"


class TooLarge(CaptionError):
    status, code = HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large"


class NotAVideo(CaptionError):
    status, code = HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "not_a_video"


class UndecodableVideo(CaptionError):
    status, code = HTTPStatus.UNPROCESSABLE_ENTITY, "undecodable_video"


class TooManyPixels(CaptionError):
    status, code = HTTPStatus.UNPROCESSABLE_ENTITY, "too_many_pixels"


class TooMuchMemory(CaptionError):
    status, code = HTTPStatus.UNPROCESSABLE_ENTITY, "too_much_memory"


class DecodeTimeout(CaptionError):
    status, code = HTTPStatus.UNPROCESSABLE_ENTITY, "decode_timeout"


class DecoderCrashed(CaptionError):
    status, code = HTTPStatus.UNPROCESSABLE_ENTITY, "decoder_crashed"


class Overloaded(CaptionError):
    status, code = HTTPStatus.SERVICE_UNAVAILABLE, "overloaded"


class InternalError(CaptionError):
    status, code = HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error"
