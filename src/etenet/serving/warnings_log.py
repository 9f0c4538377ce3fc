"""The warnings of a worker, each as one line on the server's console. What else a worker writes goes to a file."""

from __future__ import annotations

import logging
import os

from etenet.serving.config import REQUEST_LOG_VARIABLE

LINE_START = "warning: "  # handler/log4j2.xml finds the lines by it
_LETTERS = 1000
_LEVELS = {"etenet": logging.WARNING, "opentelemetry": logging.ERROR}  # that warns of each try to reach its collector


def show_warnings() -> None:
    """From now on, if `etenet serve` started this process. Tracebacks stay in the file; the line names the error."""
    for name, level in _LEVELS.items():
        logger = logging.getLogger(name)
        shows = any(isinstance(handler, _Console) for handler in logger.handlers)
        if REQUEST_LOG_VARIABLE in os.environ and not shows:
            logger.addHandler(_Console(level))


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if REQUEST_LOG_VARIABLE not in os.environ:
            return
        error = record.exc_info[1] if record.exc_info else None
        because = f" ({type(error).__name__}: {error})" if error else ""
        text = " ".join(f"{record.getMessage()}{because}".split())
        # Escaped, as a clip may have written some of it.
        print(LINE_START + text.encode("unicode_escape").decode()[:_LETTERS], flush=True)
