"""The settings of a script: its constants, the flags made from them, and facts about each setting.

A script declares each of its settings in one place, as an annotated constant with a comment:

    IMAGE_SIZE: flag(integer(1, 4096), NETWORK) = 128    # pixels a side

The constant is the default of the flag --image-size. The annotation holds the type and the facts below. The comment,
which may continue in indented comment lines, is the help text.
"""
import argparse
import ast
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from oasis.files import OasisError, command_line

NETWORK = "network"        # an argument of UNet
TRAINER = "trainer"        # an argument of Trainer
RESUMABLE = "resumable"    # may change when a run is resumed, such as the number of steps or the devices
PRIVATE = "private"        # is not written into model files, which other people receive
LOCAL = "local"            # may differ between the workers of one training


class flag:
    """The annotation of a constant that is a setting.

    kind: an argparse type, a tuple of choices, or bool for a switch. facts: some of the constants above.
    """

    def __init__(self, kind, *facts):
        self.kind, self.facts = kind, facts


class Setting(NamedTuple):
    """One setting of a script."""
    name: str              # as an attribute of the parsed flags, such as "image_size"
    default: Any
    kind: Any
    facts: tuple
    help: str


def read_settings(module):
    """Return {name in lower case: Setting} of the constants of a module that are annotated with a flag, in their order.

    Raises AssertionError for a constant without a help text.
    """
    source = Path(module.__file__).read_text(encoding="utf-8")
    lines, settings = source.encode().splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and isinstance(module.__annotations__[node.target.id], flag):
            comments = [lines[node.end_lineno - 1][node.end_col_offset:]]
            for line in lines[node.end_lineno:]:
                if not line.startswith(b" ") or not line.strip().startswith(b"#"):
                    break
                comments.append(line)
            text = " ".join(comment.decode().strip().lstrip("#").strip() for comment in comments)
            assert text, f"{module.__file__}: {node.target.id} needs a comment, which is the help text of its flag"
            name, annotation = node.target.id.lower(), module.__annotations__[node.target.id]
            settings[name] = Setting(name, getattr(module, node.target.id), annotation.kind, annotation.facts, text)
    return settings


def values_with(fact, settings, flags):
    """Return {name: value} of the settings that have a fact, such as NETWORK."""
    return {name: getattr(flags, name) for name, setting in settings.items() if fact in setting.facts}


def values_without(fact, settings, flags):
    """Return {name: value} of the settings that do not have a fact."""
    return {name: getattr(flags, name) for name, setting in settings.items() if fact not in setting.facts}


def flag_name(name):
    """The flag of a setting: "image_size" becomes "--image-size"."""
    return "--" + name.replace("_", "-")


def as_flag(name, value):
    """The text of a flag and its value, such as "--dim 32".

    They are joined by "=" if the value is empty or begins with "-", as in "--slices=-9:".
    """
    text = str(value)
    return command_line(f"{flag_name(name)}={text}") if text[:1] in ("", "-") else command_line(flag_name(name), text)


# ------------------------------------------------------------------------------------------------------------ parser

class FlagParser(argparse.ArgumentParser):
    """An argument parser that raises OasisError instead of exiting."""

    def error(self, message):
        raise OasisError(f"{message} (see --help)")


def make_parser(description, settings):
    """An argument parser with one flag, such as --batch-size, for each setting of read_settings()."""
    parser = FlagParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                        allow_abbrev=False)
    for name, default, kind, _, text in settings.values():
        text = text.replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag_name(name), action="store_true", help=text)
        elif isinstance(kind, tuple):
            parser.add_argument(flag_name(name), choices=kind, default=default, help=f"{text} ({default})")
        else:
            metavar = {int: "N", float: "X"}.get(type(default), "TEXT")
            parser.add_argument(flag_name(name), type=kind, default=default, metavar=metavar,
                                help=text if default == "" else f"{text} ({default})")
    return parser


def integer(minimum=1, maximum=2**63 - 1):
    """An argparse type: an integer in [minimum, maximum]."""
    def parse(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{text} is not between {minimum} and {maximum}")
        return value
    return parse


def number(minimum=0.0, maximum=math.inf, above=False):
    """An argparse type: a finite float in [minimum, maximum], or in (minimum, maximum] if `above`."""
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
        if not minimum <= value <= maximum or above and value == minimum:
            bound = f"above {minimum:g}" if above else f"at least {minimum:g}"
            at_most = f" and at most {maximum:g}" if maximum < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not {bound}{at_most}")
        return value
    return parse


def user_path(text):
    """An argparse type: a path. A ~ at its start becomes the home folder; shells do not expand --flag=~/folder."""
    return os.path.expanduser(text)


def auto_or(parse):
    """An argparse type: the word auto, or what `parse` accepts."""
    return lambda text: text if text == "auto" else parse(text)
