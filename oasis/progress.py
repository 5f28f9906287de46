"""Progress on stderr: a bar in a terminal; elsewhere, as in a log of SLURM or nohup, a line every half minute."""
import sys

from tqdm import tqdm

SECONDS_PER_LINE = 30


class Lines:
    """A text stream on which each frame of a progress bar becomes a line of its own."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, frame):
        if frame.strip():
            self.stream.write(frame.strip() + "\n")

    def flush(self):
        self.stream.flush()


class LogBar(tqdm):
    """A bar that prints a line for its first frame, which comes after `delay` seconds, and then each SECONDS_PER_LINE.

    tqdm itself would print nothing at all of a bar that has a delay and ends within its `mininterval`.
    """

    def __init__(self, *arguments, delay=0, **options):
        super().__init__(*arguments, file=Lines(sys.stderr), ascii=True, miniters=1, delay=delay,
                         mininterval=0 if delay else SECONDS_PER_LINE, **options)

    def update(self, n=1):
        if shown := super().update(n):
            self.mininterval = SECONDS_PER_LINE
        return shown


def progress(*arguments, **options):
    """A progress bar with these arguments of tqdm; without a terminal, a line each SECONDS_PER_LINE."""
    if sys.stderr.isatty():
        return tqdm(*arguments, dynamic_ncols=True, **options)
    return LogBar(*arguments, **options)
