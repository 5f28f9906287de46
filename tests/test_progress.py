"""oasis/progress.py: a bar in a terminal, lines in a log."""
import io
import re
import sys
import types

import pytest

from modules import GaussianDiffusion
from oasis import progress
from oasis.generate import BatchGenerator


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def shown(monkeypatch):
    """shown(stream) runs through a bar of 60 items, each of which takes ten seconds, and returns what it wrote."""
    def show(stream):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.progress(total=60, desc="work") as bar:
            bar.start_t = bar.last_print_t = 0
            for now in range(0, 600, 10):
                bar._time = lambda now=now: now
                bar.update()
        return stream.getvalue()
    return show


def test_a_log_gets_a_line_every_half_minute(shown):
    lines = shown(io.StringIO()).splitlines()
    assert "\r" not in "".join(lines) and all(line.startswith("work:") for line in lines)
    steps = [int(re.search("([0-9]+)/60", line)[1]) for line in lines]
    assert steps == [0, *range(4, 60, 3), 60]


def test_the_bar_of_a_sampler_leaves_out_the_time_of_the_first_step():
    """The first step is compiled. With its time, the bar would promise hours."""
    network = types.SimpleNamespace(image_size=16, channels=1, fused=False, condition="")
    generator = BatchGenerator({"CPU:0": network}, GaussianDiffusion(), 2, 2, "images", steps=20)
    generator.bar.start_t = generator.bar.last_print_t = 0
    for now in 100, 101, 102:
        generator.bar._time = lambda now=now: now
        generator.count_step()
    assert generator.bar.n == 3 and generator.bar.start_t == 100


def test_a_terminal_gets_a_bar_on_one_line(shown):
    text = shown(Terminal())
    assert text.count("\r") > 50 and text.count("\n") == 1
