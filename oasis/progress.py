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


def progress(*arguments, **options):
    """A progress bar with these arguments of tqdm. If stderr is no terminal, it prints a line each SECONDS_PER_LINE."""
    if sys.stderr.isatty():
        return tqdm(*arguments, dynamic_ncols=True, **options)
    return tqdm(*arguments, file=Lines(sys.stderr), ascii=True, miniters=1, mininterval=SECONDS_PER_LINE, **options)
