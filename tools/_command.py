"""What the tools share: errors in one line, and the exit codes that stand for them."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn, get_args

from megagrow.checkpoint.convert import tokenizer_of
from megagrow.checkpoint.remote import LOCAL, SEPARATOR, as_path
from megagrow.checkpoint.source import Source
from megagrow.config import Breaker, ModelConfig, require
from megagrow.errors import SHARED_ERROR_SECONDS, DataError, MegagrowError
from megagrow.growth.methods import make_recipe
from megagrow.growth.recipe import Recipe


class Arguments(argparse.ArgumentParser):
    """An argument parser whose complaints are one line (exit code 2)."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help\n")


def local_path(text: str) -> Path:
    """The type of an option for what is read or written on this machine's disks: a URL would become a folder's name."""
    protocol, separator, _ = text.partition(SEPARATOR)
    if separator and protocol not in LOCAL:
        raise argparse.ArgumentTypeError(f"{text} must be local; copy it to or from there")
    return as_path(text)


def add_method(parser: argparse.ArgumentParser) -> None:
    """The options that name a growth, for `recipe_of`."""
    parser.add_argument("--target", required=True, metavar="CONFIG", help="what to grow into")
    parser.add_argument("--method", required=True, help="width, depth or both, as in clone+stack; see docs/growth.md")
    parser.add_argument("--breaker", choices=get_args(Breaker), default="none", help="what tells replicas apart")
    parser.add_argument("--breaker-scale", type=float, default=0.3, help="its size; see docs/growth.md")
    parser.add_argument("--seed", type=int, default=1234, help="of everything random")


def recipe_of(options: argparse.Namespace, source: ModelConfig, target: ModelConfig) -> Recipe:
    """The growth that the options of `add_method` name."""
    return make_recipe(options.method, source, target, options.breaker, options.breaker_scale, options.seed)


def refuse_options(parser: Arguments, options: argparse.Namespace, names: Iterable[str], when: str) -> None:
    """Options that would do nothing must not be given."""
    for name in names:
        given = getattr(options, name) != parser.get_default(name)
        require(not given, f"--{name.replace('_', '-')} has no effect {when}; leave it out")


def find_tokenizer(given: str, source: Source) -> str | Path:
    """The tokenizer that `--tokenizer` gives, or the one of the checkpoint."""
    found = given or tokenizer_of(source)
    if not found:
        raise DataError(f"{source.path}: its tokenizer is not named or not there; give it with --tokenizer")
    return found


def run(main: Callable[[], None]) -> NoReturn:
    """Call `main` and exit: 0, or the code of the error that the user can mend."""
    try:
        main()
    except MegagrowError as error:
        if os.environ.get("RANK", "0") != "0":
            # An error that all ranks share is told by the first; its end makes torchrun end us while we wait.
            time.sleep(SHARED_ERROR_SECONDS)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
