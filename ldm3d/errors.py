"""What a user can get wrong, as exceptions whose text says what, where, and what would be right."""


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


class CheckpointError(UserError):
    """Training state that cannot be written, or cannot be resumed from."""


class OutputError(UserError):
    """A result that cannot be written where it was asked for."""


class NonFiniteLoss(UserError):
    """Training met NaN or infinity.

    Args:
        step: number of the optimizer step, counted from 0.
        terms: the loss terms of this step by name.
        cases: names of the volumes in the batch.
    """

    met_by_one = True

    def __init__(self, step: int, terms: dict[str, float], cases: list[str]):
        self.step, self.terms, self.cases = step, terms, cases
        shown = ", ".join(f"{name} = {value:g}" for name, value in terms.items())
        super().__init__(
            f"training stopped at step {step}: the loss is not finite ({shown}) on cases {', '.join(cases)}; "
            "the last checkpoint is intact"
        )
