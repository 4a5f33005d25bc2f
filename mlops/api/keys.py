"""API keys: made and revoked by a command, kept as hashes, known to the web process at once.

    python -m mlops.api.keys create --name NAME --role operator [--days N]
    python -m mlops.api.keys list
    python -m mlops.api.keys revoke ID

A key is `ldm3d_<id>_<secret>`. The secret is 43 characters of 62, which is 256 random bits: nobody can try them all, so
that a plain SHA-256 is enough, where a password would need a slow hash. The file holds that hash alone.
"""

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock, Timeout
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from ldm3d.errors import ConfigError, OutputError
from ldm3d.files import write_text
from mlops.api.callers import Role
from mlops.api.records import flush_folder
from mlops.api.settings import load_settings
from mlops.commands import Parser, run_command

PREFIX = "ldm3d"
ID_CHARACTERS, ID_LENGTH = string.ascii_lowercase + string.digits, 8
SECRET_CHARACTERS, SECRET_LENGTH = string.ascii_letters + string.digits, 43
PATTERN = re.compile(rf"{PREFIX}_([a-z0-9]{{{ID_LENGTH}}})_([A-Za-z0-9]{{{SECRET_LENGTH}}})")
PRIVATE = 0o600
LOCK_SECONDS = 10
# Compared with where no key has the id, so that the time of an answer does not tell which ids there are.
NOBODY = hashlib.sha256(b"nobody").hexdigest()

log = logging.getLogger(__name__)


class Entry(BaseModel):
    """What is kept of a key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, Field(pattern=rf"^[a-z0-9]{{{ID_LENGTH}}}$")]
    name: Annotated[str, Field(min_length=1, max_length=64)]
    role: Literal["viewer", "operator", "admin"]
    created: AwareDatetime
    revoked: AwareDatetime | None = None
    expires: AwareDatetime | None = None
    secret_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @property
    def active(self) -> bool:
        return self.revoked is None and (self.expires is None or datetime.now(UTC) < self.expires)


class KeyFile(BaseModel):
    """`keys.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    keys: list[Entry]


class KeyStore:
    """The keys in a file, `keys.json` of the data folder.

    Other processes may change it: each look-up asks the file system whether the file is another, which takes
    microseconds, so that a revoked key is refused at the next request.
    """

    def __init__(self, path: Path):
        self.path = path
        self._seen = False
        # What the file was when it was read, and what it held. Entries are never removed and each command adds to the
        # text, so that no two states agree in inode, time and size.
        self._read: tuple[tuple[int, int, int], dict[str, Entry] | ConfigError] | None = None

    def exists(self) -> bool:
        """Whether keys were ever made here. A file that vanishes while the service runs counts: it opens nothing."""
        self._seen = self._seen or os.path.lexists(self.path)
        return self._seen

    def list(self) -> Sequence[Entry]:
        """All keys, in order of creation; none where there is no file.

        Raises:
            ConfigError: the file is damaged, cannot be read, or has vanished.
        """
        return [*self._entries().values()]

    def any_active(self) -> bool:
        """Whether a key would be accepted now. Raises as `list` does."""
        return any(entry.active for entry in self.list())

    def find(self, plaintext: str) -> Entry | None:
        """The key's entry; None if it is unknown, revoked or expired. Raises as `list` does."""
        entries = self._entries()
        found = PATTERN.fullmatch(plaintext)
        key_id, secret = found.groups() if found else ("", "")
        entry = entries.get(key_id)
        right = hmac.compare_digest(_digest(secret), entry.secret_sha256 if entry else NOBODY)
        return entry if entry and right and entry.active else None

    def create(self, name: str, role: str, days: int | None = None) -> tuple[Entry, str]:
        """Make a key, which is valid for `days`, or until it is revoked.

        Returns:
            What is kept of it, and the key itself, which nobody can recover later.

        Raises:
            ConfigError: name, role or days cannot be used, or as in `list`.
            OutputError: the file cannot be written.
        """
        _check(name, role, days)
        with self._changing() as entries:
            key_id = _random(ID_CHARACTERS, ID_LENGTH)
            while key_id in entries:
                key_id = _random(ID_CHARACTERS, ID_LENGTH)
            secret = _random(SECRET_CHARACTERS, SECRET_LENGTH)
            now = datetime.now(UTC).replace(microsecond=0)
            entries[key_id] = Entry.model_validate(
                {
                    "id": key_id,
                    "name": name,
                    "role": role,
                    "created": now,
                    "expires": None if days is None else now + timedelta(days=days),
                    "secret_sha256": _digest(secret),
                }
            )
        return entries[key_id], f"{PREFIX}_{key_id}_{secret}"

    def revoke(self, key_id: str) -> Entry:
        """Refuse a key from now on. One that was revoked before keeps its time.

        Raises:
            ConfigError: there is no such key, or as in `list`.
            OutputError: the file cannot be written.
        """
        with self._changing() as entries:
            if key_id not in entries:
                raise ConfigError(f"{self.path}: no key has the id {key_id!r}; see python -m mlops.api.keys list")
            entry = entries[key_id]
            if entry.revoked is None:
                entries[key_id] = entry.model_copy(update={"revoked": datetime.now(UTC).replace(microsecond=0)})
        return entries[key_id]

    def _entries(self) -> dict[str, Entry]:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            if self._seen:
                raise ConfigError(f"{self.path}: was here and is gone; every key is refused") from None
            return {}
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read: {error.strerror}") from error
        self._seen = True
        state = (status.st_ino, status.st_mtime_ns, status.st_size)
        read = self._read
        if read is None or read[0] != state:
            read = self._read = (state, _load(self.path))
        if isinstance(read[1], ConfigError):
            raise read[1]
        return read[1]

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Entry]]:
        """The entries, to be changed; written when the block ends, while no other command changes them."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(".keys.lock"), timeout=LOCK_SECONDS, mode=PRIVATE):
                entries = dict(self._entries())
                yield entries
                text = KeyFile(keys=[*entries.values()]).model_dump_json(indent=2)
                write_text(self.path, text + "\n", mode=PRIVATE)
                flush_folder(self.path.parent)  # a power cut must not bring a revoked key back
                self._seen = True
        except Timeout as error:
            raise OutputError(f"{self.path}: another command has held it for {LOCK_SECONDS} s") from error
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror or error}") from error


def _load(path: Path) -> dict[str, Entry] | ConfigError:
    """The entries by id; the error, to be raised at each look-up, if they cannot be read."""
    try:
        entries = KeyFile.model_validate_json(path.read_bytes()).keys
        if len({entry.id for entry in entries}) < len(entries):
            raise ValueError("an id stands there twice")
        return {entry.id: entry for entry in entries}
    except (OSError, ValueError) as error:
        why = _first_line(error)
        log.error("%s: %s; every key is refused until it is mended", path, why)
        return ConfigError(f"{path}: {why}; every key is refused until a good copy is put back")


def _first_line(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror}"
    if isinstance(error, ValidationError):  # without the input, which may hold a hash
        first = error.errors()[0]
        return f"damaged: {'.'.join(str(part) for part in first['loc']) or 'file'}: {first['msg']}"
    return f"damaged: {error}"


def _check(name: str, role: str, days: int | None) -> None:
    if not 1 <= len(name) <= 64 or not name.isprintable():
        raise ConfigError(f"name {name[:80]!r}: 1 to 64 printable characters")
    if Role.named(role) is None:
        raise ConfigError(f"role {role!r}: one of {', '.join(map(str, Role))}")
    if days is not None and not 1 <= days <= 36500:
        raise ConfigError(f"days {days}: 1 to 36500")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _random(characters: str, length: int) -> str:
    return "".join(secrets.choice(characters) for _ in range(length))


def main() -> int:
    parser = Parser(prog="python -m mlops.api.keys", description="API keys of the service in LDM3D_DATA_DIR")
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="make a key and print it, once")
    create.add_argument("--name", required=True, help="whose it is, for the list")
    create.add_argument("--role", required=True, choices=[str(role) for role in Role], help="what it may do")
    create.add_argument("--days", type=int, help="days until it expires; never by default")
    commands.add_parser("list", help="ids, names and roles, one JSON object for each key")
    commands.add_parser("revoke", help="refuse a key from now on").add_argument("id", help="of the list")
    args = parser.parse_args()
    keys = KeyStore(load_settings().data_dir / "keys.json")
    if args.command == "create":
        entry, plaintext = keys.create(args.name, args.role, args.days)
        print(plaintext)
        parser.note(f"key {entry.id} for {entry.name}, {entry.role}; it is shown this once")
    elif args.command == "revoke":
        parser.note(f"key {keys.revoke(args.id).id} is refused from now on")
    else:
        for entry in keys.list():
            print(json.dumps({**entry.model_dump(mode="json", exclude={"secret_sha256"}), "active": entry.active}))
    return 0


if __name__ == "__main__":
    run_command(main)
