"""What the commands of the service share: errors as one line on stderr, `error: ...`, exit status 2."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from ldm3d.errors import MEMORY_GUIDE, UserError, shortage

EXIT_USER_ERROR = 2


class Parser(argparse.ArgumentParser):
    """argparse with errors in the house's form."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR)

    def note(self, message: str) -> None:
        """Tell the user something that is no result: results alone go to stdout."""
        print(message, file=sys.stderr)


def run_command(main: Callable[[], int]) -> NoReturn:
    """Call `main`, print a user's mistake, or that memory ran out, as one line, and exit."""
    try:
        code = main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error.one_line()}", file=sys.stderr)
        code = EXIT_USER_ERROR
    except (RuntimeError, MemoryError) as error:
        if not (short := shortage(error)):
            raise
        print(f"error: out of memory: {short}; see {MEMORY_GUIDE}", file=sys.stderr)
        code = EXIT_USER_ERROR
    except BrokenPipeError:  # `... | head`
        sys.stderr.close()
        code = 1
    raise SystemExit(code)
