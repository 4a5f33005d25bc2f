"""Requests against what a version offers: what was left open is decided, what cannot be is refused by its field."""

from ldm3d.errors import ConfigError
from ldm3d.samplers import choose_sampler
from ldm3d.sections import SamplerName
from mlops.api.catalogue import ActiveModel, ActiveSet, ActiveVersion
from mlops.api.schemas import ResolvedRequest, SampleRequest
from mlops.api.settings import Settings


class FieldError(ValueError):
    """A field of a request that cannot be granted.

    Attributes:
        field: path of the field, `conditions.sex`.
        message: what would be right.
    """

    def __init__(self, field: str, message: str):
        self.field, self.message = field, message
        super().__init__(message if message.startswith(f"{field} ") else f"{field}: {message}")


def find_model(active: ActiveSet, name: str | None) -> ActiveModel:
    """The model that is asked for; the first one where none is.

    Raises:
        FieldError: there is none of this name.
    """
    found = active.models[0] if name is None else active.model(name)
    if found is None:
        known = ", ".join(model.name for model in active.models)
        raise FieldError("model", f"no model {_shown(name)} here; there is {known}")
    return found


def validate_request(request: SampleRequest, version: ActiveVersion, settings: Settings) -> ResolvedRequest:
    """Decide what a request leaves open, as this version does it.

    Raises:
        FieldError: the first field that this version or the service's limits do not allow.
    """
    if not 1 <= request.num <= settings.max_num:
        raise FieldError("num", f"num {request.num}: must be between 1 and {settings.max_num}")
    scheduler = _scheduler(request, version, settings.max_steps)
    return ResolvedRequest(
        num=request.num,
        seed=request.seed,
        steps=_steps(request, version, scheduler, settings.max_steps),
        scheduler=scheduler,
        model=version.model,
        format=request.format,
        dtype=request.dtype,
        conditions=_conditions(request.conditions, version),
    )


def _scheduler(request: SampleRequest, version: ActiveVersion, max_steps: int) -> SamplerName:
    try:
        name, _ = choose_sampler(version.schedule, request.scheduler, None)
    except ConfigError as error:
        raise FieldError("scheduler", str(error)) from error
    offered = version.default_steps(max_steps)
    if name not in offered:
        raise FieldError(
            "scheduler",
            f"scheduler {name!r}: takes other than the 1 to {max_steps} steps allowed here; use {' or '.join(offered)}",
        )
    return name


def _steps(request: SampleRequest, version: ActiveVersion, scheduler: SamplerName, max_steps: int) -> int:
    if request.steps is None:
        return version.default_steps(max_steps)[scheduler]
    if request.steps > max_steps:
        most = min(max_steps, version.schedule.num_train_timesteps)
        raise FieldError("steps", f"steps {request.steps}: must be between 1 and {most}")
    try:
        return choose_sampler(version.schedule, scheduler, request.steps)[1]
    except ConfigError as error:
        raise FieldError("steps", str(error)) from error


def _conditions(given: dict[str, str], version: ActiveVersion) -> dict[str, str]:
    """All conditions of a model must be given: none is guessed."""
    known = version.conditions
    if given and not known:
        raise FieldError("conditions", f"{version.name} generates without conditions; leave them out")
    for name in given:
        if name not in known:
            raise FieldError("conditions", f"no condition {_shown(name)}; {version.name} knows {', '.join(known)}")
    for name, values in known.items():
        if name not in given:
            raise FieldError(f"conditions.{name}", f"{version.name} needs it; one of {', '.join(values)}")
        if given[name] not in values:
            raise FieldError(f"conditions.{name}", f"{_shown(given[name])}: must be one of {', '.join(values)}")
    return {name: given[name] for name in known}


def _shown(text: str | None) -> str:
    """What a client wrote, escaped and cut."""
    shown = ascii(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
