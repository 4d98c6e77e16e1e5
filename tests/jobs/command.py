"""Runs the command in this process, because a new process would spend most of its time on importing torch."""

import io
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from subprocess import CompletedProcess

import pytest

from jobs.cli import main


class Terminal(io.StringIO):
    """A text that takes itself for a terminal. The environment variable COLUMNS is its width."""

    def isatty(self) -> bool:
        return True


def multitask(*arguments: object, terminal: bool = False) -> CompletedProcess[str]:
    """Run `multitask ARGUMENTS`, and return what it prints and its exit status.

    Args:
        terminal: whether it prints to a terminal and not to a pipe.
    """
    kind = Terminal if terminal else io.StringIO
    out, err, status = kind(), kind(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["multitask", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        except Exception:
            # The interpreter ends a program like this.
            traceback.print_exc()
            status = 1
    return CompletedProcess(arguments, status, out.getvalue(), err.getvalue())
