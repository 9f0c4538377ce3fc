"""Every error that this package raises on purpose, as one tree. Each caption error has an HTTP status and a code.

    EtenetError
      UsageError               wrong use of a command or function: exit status 2, one line, no traceback
        CheckpointError        missing, damaged or of another version
        CannotWrite            a file that is asked for cannot be written; also an `OSError`
      OutputLost               standard output takes no more: exit status 1
      JobStopped               a batch job cannot go on now: exit status 1
      JavaError                a Java program died, hung or gave an unusable reply: exit status 1
      DeviceFailed             the GPU does not compute in this process
      CaptionError             this clip gets no caption; the other clips of its batch do
        BadOption              400 bad_option
        BadRequest             400 bad_request
        EmptyBody              400 empty_body
        ModelNotFound          404 model_not_found
        TooLarge               413 too_large
        NotAVideo              415 not_a_video
        UndecodableVideo       422 undecodable_video
        TooManyPixels          422 too_many_pixels
        TooMuchMemory          422 too_much_memory
        DecodeTimeout          422 decode_timeout: too much processor time
        DecoderCrashed         422 decoder_crashed
        Overloaded             503 overloaded: no room or no time now
        InternalError          500 internal_error: a bug of ours

A message names the thing and the fix. Foreign errors are translated where they arise, with `raise ... from`.
"""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import ClassVar, Self

ERROR_HEADER = "x-etenet-error"  # of a response: the code of its error. Errors of TorchServe's own have none

_NAMED = 3


def named(things: Iterable[str]) -> str:
    """'a', 'b', 'c' and 4 more: the names of a few, so that a message fits on one line."""
    names = list(map(repr, things))
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def counted(count: int, thing: str) -> str:
    """1 clip, 2 clips."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


class EtenetError(Exception):
    """Base of all errors that this package raises on purpose."""


class UsageError(EtenetError):
    """Wrong use of a command or a function."""


class CheckpointError(UsageError):
    """A checkpoint is missing, damaged or of another version."""


class CannotWrite(UsageError, OSError):
    """A file cannot be written: its disk is full, or its folder cannot be used."""

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}; fix that, or name another file"


class OutputLost(EtenetError):
    """Standard output takes no more: it is closed, its disk is full, or nobody reads it."""


class JobStopped(EtenetError):
    """A batch job cannot go on now. Started again, it continues where it stopped."""


class JavaError(EtenetError):
    """A Java program died, hung or gave an unusable reply."""


class DeviceFailed(EtenetError):
    """The GPU does not compute in this process, or has too little memory. It may in a new one."""


class CaptionError(EtenetError):
    """One clip could not be captioned."""

    status: ClassVar[HTTPStatus]
    code: ClassVar[str]

    def as_dict(self) -> dict[str, dict[str, str]]:
        """The error body of the HTTP contract."""
        return {"error": {"code": self.code, "message": str(self)}}

    def without_frames(self) -> Self:
        """The same error without its traceback and causes, whose frames hold the video and often the error itself."""
        self.__cause__ = self.__context__ = None
        return self.with_traceback(None)


class BadOption(CaptionError):
    status, code = HTTPStatus.BAD_REQUEST, "bad_option"


class BadRequest(CaptionError):
    status, code = HTTPStatus.BAD_REQUEST, "bad_request"


class EmptyBody(CaptionError):
    status, code = HTTPStatus.BAD_REQUEST, "empty_body"


class ModelNotFound(CaptionError):
    status, code = HTTPStatus.NOT_FOUND, "model_not_found"


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
