"""SIGINT and SIGTERM during a training or a call of TensorFlow."""
import contextlib
import os
import signal
import sys
import threading


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


@contextlib.contextmanager
def ctrl_c_ends_process():
    """A context in which Ctrl-C ends the process at once. By default Python waits for the end of a call of TensorFlow.

    In a notebook it changes nothing, because Ctrl-C would end the notebook's process.
    """
    before = signal.getsignal(signal.SIGINT)
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or before is not signal.default_int_handler or "ipykernel" in sys.modules:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
