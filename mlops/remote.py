"""Places that fsspec reaches by an address: opened, and asked again where they fail."""

import errno
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from fsspec.utils import get_protocol

from ldm3d.errors import ConfigError, OutputError, UserError

FINAL = (PermissionError, NotImplementedError, UserError)
FINAL_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""A full disk is as full four seconds later."""

T = TypeVar("T")


def reach(address: str) -> tuple[Any, str]:
    """The file system of an address such as `s3://bucket/prefix` or a folder, and the path in it.

    Raises:
        ConfigError: nobody knows this kind of address, or its package is not installed.
    """
    try:
        filesystem, root = url_to_fs(address)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or getattr(error, "name", None)
        wanted = f"the package {package}, which is not installed: pip install {package}" if package else str(error)
        raise ConfigError(f"{address}: {get_protocol(address)}:// needs {wanted}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{address}: {one_line(error)}; take a folder, s3://, gs:// or abfs://") from error
    return filesystem, root


def warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def patiently(
    what: str, action: Callable[[], T], pauses: Sequence[float] = (1.0, 4.0, 15.0), say: Callable[[str], None] = warn
) -> T:
    """Do something; where it fails otherwise than for good, again.

    Args:
        what: for people: the place and the file.
        action: what is done; must be good to do twice.
        pauses: seconds before each further try.
        say: told of what fails and is tried again.

    Raises:
        FileNotFoundError: said by the file system.
        FileExistsError: said by the file system.
        UserError: said by the action.
        OutputError: all else.
    """
    for seconds in (*pauses, None):
        try:
            return action()
        except (FileNotFoundError, FileExistsError, UserError):
            raise
        except Exception as error:  # each file system's library has kinds of its own
            trouble = f"{what}: {one_line(error)}"
            if seconds is None or isinstance(error, FINAL) or getattr(error, "errno", None) in FINAL_NUMBERS:
                raise OutputError(trouble) from error
        say(f"warning: {trouble}; again in {seconds:g} s")
        time.sleep(seconds)
    raise AssertionError("the last try returns or raises")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
