"""What a user can get wrong, as exceptions whose text says what, where, and what would be right."""


class UserError(Exception):
    """A mistake that the user can mend. Scripts print it as one line and exit with status 2."""


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

    def __init__(self, step: int, terms: dict[str, float], cases: list[str]):
        self.step, self.terms, self.cases = step, terms, cases
        shown = ", ".join(f"{name} = {value:g}" for name, value in terms.items())
        super().__init__(
            f"training stopped at step {step}: the loss is not finite ({shown}) on cases {', '.join(cases)}; "
            "the last checkpoint is intact"
        )
