"""SIGINT and SIGTERM during a training."""
import contextlib
import os
import signal


class StopSignal:
    """A context in which SIGINT and SIGTERM are only noted, so that training stops after a call, not inside it.

    A second Ctrl-C stops at once.
    """

    def __enter__(self):
        self.number = None
        self.before = {caught: signal.signal(caught, self.note) for caught in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for caught, handler in self.before.items():
            signal.signal(caught, handler or signal.SIG_DFL)  # None: a handler that Python did not set

    def note(self, number, _):
        if self.number is None:
            with contextlib.suppress(OSError):  # print() may be interrupted in itself here, and then raises an error
                os.write(2, "\nsaving, then stopping … (Ctrl-C again: stop at once)\n".encode())
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
