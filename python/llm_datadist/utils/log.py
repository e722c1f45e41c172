# SPDX-License-Identifier: Apache-2.0
"""The package's logger: one handler on standard output, its level from ASCEND_GLOBAL_LOG_LEVEL.

Both packages log through a :class:`PackageLog` of their own, so that only the logger's name differs. Nothing is
created before the first use, and the process's own logging configuration is left alone.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import traceback
from types import FrameType
from typing import Any

__all__ = ["LOG_FORMAT", "PackageLog", "error", "get_logger", "info", "warn"]

LOG_FORMAT = (
    "[%(levelname)s] %(name)s(%(process)d,%(processName)s) %(asctime)s.%(msecs)03d "
    "%(filename)s:%(lineno)d thread %(thread)d %(funcName)s: %(message)s"
)
DATE_FORMAT = "%Y-%m-%d %H:%M:%S"
LEVEL_VARIABLE = "ASCEND_GLOBAL_LOG_LEVEL"

_LEVELS = {"0": logging.DEBUG, "1": logging.INFO, "2": logging.WARNING, "3": logging.ERROR}
_UNKNOWN_CALLER = ("(unknown file)", 0, "(unknown function)", None)


def _find_caller(stack_info: bool = False, stack_level: int = 1) -> tuple[str, int, str, str | None]:
    """Tell who is logging: the first frame that belongs neither to this file nor to the logging module.

    Never raises: a stack that ends before such a frame (a thread that starts in here) has an unknown caller.
    """
    frame: FrameType | None = _outside_logging(sys._getframe())
    for _ in range(stack_level - 1):
        if frame is None:
            break
        frame = frame.f_back
    if frame is None:
        return _UNKNOWN_CALLER
    code = frame.f_code
    return code.co_filename, frame.f_lineno, code.co_name, _stack_text(frame) if stack_info else None


def _outside_logging(frame: FrameType | None) -> FrameType | None:
    while frame is not None and frame.f_code.co_filename in _LOGGING_FILES:
        frame = frame.f_back
    return frame


def _stack_text(frame: FrameType) -> str:
    text = io.StringIO()
    text.write("Stack (most recent call last):\n")
    traceback.print_stack(frame, file=text)
    return text.getvalue().rstrip("\n")


# Taken from code objects, because that is what a frame's file name is compared with.
_LOGGING_FILES = frozenset({_find_caller.__code__.co_filename, logging.Logger.info.__code__.co_filename})


class _StdoutHandler(logging.StreamHandler):  # type: ignore[type-arg]  # not subscriptable at run time in 3.9
    """Writes to what sys.stdout is at that moment: a captured stream that was closed must not be kept."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stdout is not None:
            self.stream = sys.stdout
            super().emit(record)


class PackageLog:
    """The logger of one package, built at its first use."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()  # guards the building of _logger
        self._logger: logging.Logger | None = None

    def get_logger(self) -> logging.Logger:
        """Return the logger. The level variable is read once, by the first call."""
        if self._logger is None:
            with self._lock:
                if self._logger is None:
                    self._logger = self._build()
        return self._logger

    def info(self, message: str, *args: Any, **kwargs: Any) -> None:
        """Log with level INFO; the arguments are those of logging.Logger.info."""
        self.get_logger().info(message, *args, **kwargs)

    def warn(self, message: str, *args: Any, **kwargs: Any) -> None:
        """Log with level WARNING."""
        self.get_logger().warning(message, *args, **kwargs)

    def error(self, message: str, *args: Any, **kwargs: Any) -> None:
        """Log with level ERROR."""
        self.get_logger().error(message, *args, **kwargs)

    def _build(self) -> logging.Logger:
        logger = logging.getLogger(self._name)
        logger.setLevel(_LEVELS.get(os.environ.get(LEVEL_VARIABLE, ""), logging.ERROR))
        logger.propagate = False  # or a configured root logger would print each line twice
        if not any(isinstance(handler, _StdoutHandler) for handler in logger.handlers):
            handler = _StdoutHandler()
            handler.setFormatter(logging.Formatter(LOG_FORMAT, DATE_FORMAT))
            logger.addHandler(handler)
        logger.findCaller = _find_caller  # type: ignore[method-assign,assignment]
        return logger


_log = PackageLog("LLM_DATADIST")
get_logger = _log.get_logger
info = _log.info
warn = _log.warn
error = _log.error
