"""Who works next: huey's storage, an SQLite file or a Redis server, with the same code.

The queue holds nothing but the names of jobs. What a job is and how far it is stands in its folder (`mlops.api.jobs`),
so an entry that is lost is put in again, and one that comes twice does nothing. Names are all that is read back from
the queue: whoever writes to it can make a worker look at a job, not run code (huey's own tasks are pickles).
"""

import sqlite3
from pathlib import Path
from typing import Any

from huey.storage import PriorityRedisStorage, SqliteStorage
from redis import ConnectionPool
from redis.exceptions import RedisError

RELOAD = "reload-"
"""Begins a name that is no job's: the wish to read models.yaml again."""
URGENT, USUAL, LATE = 2, 1, 0
POLL_SECONDS = 0.05


class QueueDown(Exception):
    """The queue does not answer."""


class Queue:
    """Names of jobs, first in, first out; urgent ones before.

    Args:
        url: of a Redis server; empty for a file.
        file: the SQLite file.
    """

    def __init__(self, url: str, file: Path):
        self.file = file
        self.storage: Any
        if url:
            pool = ConnectionPool.from_url(url, socket_timeout=5, socket_connect_timeout=2)
            self.storage = PriorityRedisStorage("ldm3d", blocking=False, connection_pool=pool)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            self.storage = SqliteStorage("ldm3d", filename=str(file), timeout=10)

    def put(self, name: str, priority: int = USUAL) -> None:
        """Raises `QueueDown`."""
        self._ask(lambda: self.storage.enqueue(name.encode(), priority))

    def get(self) -> str | None:
        """The next name, or None where nothing waits. Raises `QueueDown`."""
        data = self._ask(self.storage.dequeue)
        return None if data is None else bytes(data).decode("ascii", "replace")

    def names(self) -> set[str]:
        """All that wait. Raises `QueueDown`."""
        return {bytes(data).decode("ascii", "replace") for data in self._ask(self.storage.enqueued_items)}

    def ping(self) -> None:
        """Raises `QueueDown`."""
        self._ask(self.storage.queue_size)

    def _ask(self, call: Any) -> Any:
        try:
            return call()
        except (RedisError, sqlite3.Error, OSError) as error:
            raise QueueDown(f"the queue does not answer: {error}") from error
