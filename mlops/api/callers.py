"""Who calls, and what they may do."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Self


class Role(IntEnum):
    """Each role may do what those below it may."""

    VIEWER = 1
    OPERATOR = 2
    ADMIN = 3

    def __str__(self) -> str:
        return self.name.lower()

    @classmethod
    def named(cls, name: object) -> Self | None:
        """The role that is written as `name`; None for any other text or thing."""
        return next((role for role in cls if name == str(role)), None)


@dataclass(frozen=True)
class Caller:
    """Somebody who has proved who they are.

    Args:
        id: what their jobs belong to: `key:<id>`, `oidc:<sub>`, or `local` where there are no keys. May hold any
            characters, since an identity provider chooses them: folders are named by its hash.
        name: for people to read.
        role: the most that they may do.
    """

    id: str
    name: str
    role: Role
