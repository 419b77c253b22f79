"""Ctrl-C between two steps of a loop, not in the middle of one."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupt:
    """While this context is entered, the first Ctrl-C only sets `requested`, so that a loop can finish its step and
    save; the second raises KeyboardInterrupt where it strikes. In threads other than the main one nothing changes."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: object = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            # Even where SIGINT was ignored, as for the background jobs of a shell: `kill -INT` should save there too.
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
