"""One command from start to end: what fails is one line, and no traceback unless it is asked for."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from pyro_invman.cli.parser import parser
from pyro_invman.cli.printed import say
from pyro_invman.variables import DataError

FAILED, INTERRUPTED, BROKEN_PIPE = 1, 130, 141  # the last two as shells have it: 128 + the signal


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status: 0, or not, with one line on standard error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter is no reason to fail
    arguments = parser(_prog()).parse_args(argv)
    with warnings.catch_warnings(), _threads(arguments.threads):
        if not arguments.debug:
            _one_line_warnings()
        try:
            arguments.run(arguments)
            sys.stdout.flush()
        except BrokenPipeError:
            if arguments.debug:
                raise
            # whoever read has enough; what is still to be flushed at the end would fail again
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            return BROKEN_PIPE
        except KeyboardInterrupt:
            if arguments.debug:
                raise
            more = "; --resume goes on with it" if arguments.command == "fit" else ""
            say(f"invman {arguments.command}: interrupted{more}")
            return INTERRUPTED
        except Exception as error:
            if arguments.debug:
                raise
            say(f"invman {arguments.command}: {_line(error)}")
            return FAILED
    return 0


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Work in so many threads. Tensors here are small: more of them gain little, and cost much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, number))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prog() -> str:
    return "invman" if Path(sys.argv[0]).stem == "invman" else "python -m pyro_invman"


def _line(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, (DataError, OSError)):
        text = str(error)
    else:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"unexpected {type(error).__name__} in {Path(where.filename).name}: {error} (--debug shows where)"
    return " ".join(text.split())


def _one_line_warnings() -> None:
    """What the package warns of is said once, in a line; what its libraries warn of is for developers."""
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        text = " ".join(str(message).split())
        if category.__module__.startswith("pyro_invman") and text not in said:
            said.add(text)
            say(f"note: {text}")

    warnings.simplefilter("always")
    warnings.showwarning = show
