"""What can go wrong for a user, and the exit code that each case ends the program with.

Every message is one line: what, where, the rule, the remedy. The traceback is shown only with `--run.debug true`.
"""

import reprlib
from itertools import islice
from typing import Any

# How long other ranks wait with an error that all share: the first tells it, and its end makes torchrun end them.
SHARED_ERROR_SECONDS = 3.0


class MegagrowError(Exception):
    """Base of all errors that a user can cause and mend; `exit_code` is what the program exits with."""

    exit_code = 1


class ConfigError(MegagrowError, ValueError):
    """The command line or the configuration breaks a rule."""

    exit_code = 2


class DataError(MegagrowError, ValueError):
    """A dataset, corpus, tokenizer or score file is missing, malformed or does not fit the model."""

    exit_code = 3


class UnknownToken(DataError):
    """A sample holds a token that the model which is to read it does not know."""

    def __init__(self, message: str, token: int = -1) -> None:  # a default, or no copy of it can be made
        super().__init__(message)
        self.token = token


class CheckpointError(MegagrowError, ValueError):
    """A checkpoint is missing, damaged, or belongs to another model."""

    exit_code = 4


class Damaged(CheckpointError):
    """A checkpoint is proven to be no longer what was saved, so that an older one is better.

    A file is missing, has another size or digest, or breaks the format. What could not be read just now, or belongs to
    another model, is a CheckpointError: nothing follows from it.
    """


class NonFiniteError(MegagrowError):
    """Loss or gradients stayed non-finite for longer than allowed."""

    exit_code = 5


class InexactError(MegagrowError):
    """Ranks together compute something else than one process; starting again gives the same, as with NaN."""

    exit_code = 5


class HangError(MegagrowError):
    """A rank did not answer within its time limit, or died."""

    exit_code = 6


class Preempted(MegagrowError):
    """The run was asked to stop; its state has been saved."""

    exit_code = 7


class _Short(reprlib.Repr):
    """One line of at most about 100 characters, whatever the value; takes no longer for a large one."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80
        self.maxlist = self.maxtuple = self.maxdict = 8
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if abs(x) < 10**80 else "an integer of more than 80 digits"

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """In the order of the file; reprlib sorts."""
        if level <= 0 and x:
            return "{...}"
        entries = [f"{self.repr1(k, level - 1)}: {self.repr1(x[k], level - 1)}" for k in islice(x, self.maxdict)]
        return "{" + ", ".join(entries + ["..."] * (len(x) > self.maxdict)) + "}"


_short = _Short()


def shown(value: Any) -> str:
    """A value from a file as a message shows it: `repr`, cut to a short line."""
    text = _short.repr(value)
    return text if len(text) <= 120 else f"{text[:100]}..."


def one_line(error: BaseException) -> str:
    """What a library says, on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def named(name: str) -> str:
    """A name from a file as a message shows it: as it stands when it is short and printable."""
    return name if len(name) <= 80 and name.isprintable() else shown(name)
