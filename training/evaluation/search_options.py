"""The options of the search, as flags of the commands that caption a split."""

from __future__ import annotations

import argparse

import etenet
from etenet.captioning.options import OPTIONS
from etenet.errors import BadOption, UsageError

SEARCH_OPTIONS = [option for option in OPTIONS if option.name in {"beam_size", "max_words", "length_penalty"}]


def search_options(arguments: argparse.Namespace) -> etenet.CaptionOptions:
    """From parsed flags. Raises `UsageError` for values out of bounds."""
    given = {option.name: getattr(arguments, option.name) for option in SEARCH_OPTIONS}
    try:
        return etenet.CaptionOptions.parse({name: text for name, text in given.items() if text is not None})
    except BadOption as error:
        raise UsageError(str(error)) from error
