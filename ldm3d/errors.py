"""What a user can get wrong, as exceptions whose text says what, where, and what would be right.

Besides: whether another error says that memory ran out, which is for the user to mend too.
"""

MEMORY_GUIDE = "docs/TROUBLESHOOTING.md#memory"


class UserError(Exception):
    """A mistake that the user can mend. Scripts print it as one line and exit with status 2.

    Of several processes rank 0 prints it, unless `met_by_one` says that another one may be the only one to know.
    """

    met_by_one = False

    def one_line(self) -> str:
        """The message; of an error from a loader's process, which torch hands on with its traceback, the last line."""
        lines = [line.strip() for line in str(self).splitlines() if line.strip()]
        if "Traceback (most recent call last):" in lines:
            lines = [lines[-1].removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: ")]
        return " ".join(lines)


class ConfigError(UserError):
    """A configuration file, key or command-line value that cannot be used."""


class DataError(UserError):
    """A data set or a volume that cannot be used."""


class WeightsError(UserError):
    """Published weights that are missing, damaged, or of another architecture."""


class LatentsError(WeightsError):
    """Latents that cannot be kept, of an autoencoder that makes them too large. Met where the volume is encoded."""

    met_by_one = True


class CheckpointError(UserError):
    """Training state that cannot be written, or cannot be resumed from."""


class OutputError(UserError):
    """A result that cannot be written where it was asked for."""


class NonFiniteLoss(UserError):
    """Training met NaN or infinity.

    Args:
        step: number of the optimizer step, counted from 0.
        terms: the loss terms of this step by name, and the norm of the gradients.
        cases: names of the volumes in the batch.
        ranges: of what went in and of the latents: name and what is known of it, `0 to 1`.

    Attributes:
        replay: where what is needed to make this step again was saved, if it was.
    """

    met_by_one = True

    def __init__(self, step: int, terms: dict[str, float], cases: list[str], ranges: dict[str, str] | None = None):
        self.step, self.terms, self.cases, self.ranges = step, terms, cases, ranges or {}
        self.replay: str | None = None
        super().__init__(step, terms, cases)

    @property
    def loss(self) -> float:
        """Sum of the terms: not finite where one of them is not."""
        return sum(value for name, value in self.terms.items() if not name.endswith("gradient_norm"))

    def __str__(self) -> str:
        terms = ", ".join(f"{name} = {value:g}" for name, value in self.terms.items())
        ranges = "".join(f"; {name} {value}" for name, value in self.ranges.items())
        replay = f"; make this step again, and see where, with --replay {self.replay}" if self.replay else ""
        return (
            f"training stopped at step {self.step}: not finite ({terms}) on cases {', '.join(self.cases)}{ranges}; "
            f"this step touched neither weights nor files{replay}; see docs/NaN_FIX_GUIDE.md"
        )


class NonFiniteValidation(UserError):
    """Validation met NaN or infinity: nobody can say how good the weights are.

    Args:
        measure: the one that weights are chosen by.
        cases: names of the volumes on which it is not finite.
    """

    def __init__(self, measure: str, cases: list[str]):
        shown = ", ".join(cases[:5]) + (f" and {len(cases) - 5} more" if len(cases) > 5 else "")
        super().__init__(
            f"validation is not finite: {measure} on cases {shown}; these weights were not published, what was saved "
            "and published before is intact; see docs/NaN_FIX_GUIDE.md"
        )


def shortage(error: BaseException) -> str | None:
    """What torch or numpy said when a device or the machine had no memory left; None if the error is another."""
    text = str(error)
    # torch's own kind is known by its name, so that programs without torch can ask too.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "Traceback (most recent call last):" in text:  # of a process that loads data, as torch hands it on
        kind, _, text = text.strip().splitlines()[-1].partition(": ")
        kinds = {"MemoryError"} if kind.endswith("MemoryError") else set()
    text = " ".join(text.split())
    if not (kinds & {"MemoryError", "OutOfMemoryError"} or "can't allocate memory" in text):
        return None
    # Before the message stands where torch noticed it; after three sentences CUDA's gives advice of its own.
    return ". ".join(text.split("err == 0. ")[-1].split(". ")[:3]) or "no memory"
