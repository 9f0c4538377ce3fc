"""What the text of an argument must be: for `type` of argparse, whose errors then name the option."""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path


def text(given: str) -> str:
    if not given:
        raise ArgumentTypeError("must not be empty; a variable of the shell may not be set")
    return given


def path(given: str) -> Path:
    return Path(text(given))


def whole(text: str) -> int:
    if not text.isdecimal():
        raise ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)


def count(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def shard(text: str) -> tuple[int, int]:
    number, _, shards = text.partition("/")
    if not (number.isdecimal() and shards.isdecimal() and 1 <= int(number) <= int(shards)):
        raise ArgumentTypeError(f"must look like 1/4, the first of four shards; got {text!r}")
    return int(number), int(shards)
