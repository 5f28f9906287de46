"""SIGINT and SIGTERM during training, and SIGINT during sampling."""
import contextlib
import os
import signal
import socket
import threading


class StopSignal:
    """A context in which SIGINT and SIGTERM end the training after the running call of train_steps, not inside it.

    Ctrl-C after a first signal raises KeyboardInterrupt. Python handles signals only between calls of TensorFlow, so
    two of them during one call count as one.
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
def watching_ctrl_c():
    """A context that yields a function pressed(), which says in any thread whether Ctrl-C was pressed.

    Python by itself raises KeyboardInterrupt only in the main thread, after the call of TensorFlow has ended. If the
    context ends with an exception after Ctrl-C, KeyboardInterrupt replaces it: TensorFlow replaces a KeyboardInterrupt
    raised inside its call by an error of its own. Outside the main thread, pressed() is always False.
    """
    if threading.current_thread() is not threading.main_thread():  # only that thread can watch signals
        yield lambda: False
        return
    reader, writer = socket.socketpair()
    for end in reader, writer:
        end.setblocking(False)
    before, caught = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False), bytearray()

    def pressed():
        with contextlib.suppress(BlockingIOError):
            caught.extend(reader.recv(64))
        return signal.SIGINT in caught
    try:
        yield pressed
    except Exception:
        if pressed():
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.set_wakeup_fd(before)
        reader.close()
        writer.close()
