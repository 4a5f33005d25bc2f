"""What the scripts share and nothing else: arguments, run set-up and tear-down, errors as one line."""

import argparse
import sys
from collections.abc import Callable

from ldm3d import distributed
from ldm3d.errors import UserError

EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130


class Parser(argparse.ArgumentParser):
    """argparse with errors in the house's form: one line, `error: ...`, exit status 2."""

    def error(self, message: str) -> None:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR)


def script_parser(description: str) -> Parser:
    """A parser with what every script offers: `--traceback`."""
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    return parser


def run_script(main: Callable[[], None]) -> None:
    """Run `main`; turn a `UserError` into one line and exit status 2, Ctrl-C into 130."""
    try:
        main()
    except UserError as error:
        if "--traceback" in sys.argv:
            raise
        if distributed.is_main():
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
    except KeyboardInterrupt:
        if distributed.is_main():
            print("interrupted", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
