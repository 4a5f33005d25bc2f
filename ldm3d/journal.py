"""Which volumes of an unfinished latent cache have been encoded, so that a run that was killed goes on there."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from ldm3d.errors import OutputError
from ldm3d.files import write_text


class EncodedVolumes:
    """A text file: the cache's key, then a line of JSON for each time that volumes were added. For one process alone.

    Adding appends, as rewriting the file at each of thousands of times would grow with the square of their number.

    Args:
        path: of the file.
        key: digest of all that the encoded volumes depend on.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        self.cases: dict[int, str] = {}
        """Names of the encoded volumes by number."""

    def resume(self) -> bool:
        """Read what an earlier run has left; False where there is nothing, or nothing of this key."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return False
        if not lines or lines[0] != self.key:
            return False
        for line in lines[1:]:
            try:
                self.cases |= {int(i): str(name) for i, name in json.loads(line).items()}
            except ValueError:  # cut short when the run was killed
                break
        self.begin()  # whole again, for what is appended
        return True

    def begin(self) -> None:
        """Write the key, and what is known to be encoded. Raises `OutputError`."""
        write_text(self.path, "\n".join([self.key, json.dumps(self.cases), ""]))

    def add(self, cases: Mapping[int, str]) -> None:
        """Note volumes whose data are on the disk; when it returns, so is the note. Raises `OutputError`."""
        self.cases |= cases
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(cases) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror or error}") from error
