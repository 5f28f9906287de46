"""oasis/progress.py: a bar in a terminal, lines in a log."""
import io
import re
import sys

import pytest

from oasis import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def shown(monkeypatch):
    """shown(stream, seconds an item, options of the bar) runs through a bar of 60 items and returns what it wrote."""
    def show(stream, seconds=10, **options):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.progress(total=60, desc="work", **options) as bar:
            bar.start_t = bar.last_print_t = 0
            for item in range(1, 61):
                bar._time = lambda now=item * seconds: now
                bar.update()
        return stream.getvalue()
    return show


def test_a_log_gets_a_line_every_half_minute(shown):
    lines = shown(io.StringIO()).splitlines()
    assert "\r" not in "".join(lines) and all(line.startswith("work:") for line in lines)
    steps = [int(re.search("([0-9]+)/60", line)[1]) for line in lines]
    assert steps == [*range(0, 61, 3), 60]


@pytest.mark.parametrize("seconds, steps", [(10, [1, *range(4, 60, 3), 60]), (0.01, [1, 60])])
def test_a_bar_that_begins_with_its_first_update_shows_it_in_a_log(shown, seconds, steps):
    lines = shown(io.StringIO(), seconds, delay=1e-9).splitlines()
    assert [int(re.search("([0-9]+)/60", line)[1]) for line in lines] == steps


def test_a_terminal_gets_a_bar_on_one_line(shown):
    text = shown(Terminal())
    assert text.count("\r") > 50 and text.count("\n") == 1
