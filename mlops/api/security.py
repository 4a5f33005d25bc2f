"""Who may call what: one table of all routes, and the dependency that holds every request against it."""

import re
from typing import Any

import anyio.to_thread
from anyio import CapacityLimiter
from fastapi import FastAPI, Request
from fastapi.routing import iter_route_contexts
from starlette.types import Scope

from ldm3d.errors import ConfigError
from mlops.api.callers import Caller, Role
from mlops.api.keys import PREFIX, KeyStore
from mlops.api.oidc import OidcVerifier
from mlops.api.problems import ProblemError
from mlops.api.settings import Settings

# What each route needs; None is open to everybody. `docs/SECURITY.md` shows the same table; a test compares them.
ACCESS: dict[tuple[str, str], Role | None] = {
    ("POST", "/v1/samples"): Role.OPERATOR,
    ("GET", "/v1/jobs"): Role.VIEWER,
    ("GET", "/v1/jobs/{id}"): Role.VIEWER,
    ("GET", "/v1/jobs/{id}/events"): Role.VIEWER,
    ("GET", "/v1/jobs/{id}/files/{name}"): Role.VIEWER,
    ("DELETE", "/v1/jobs/{id}"): Role.OPERATOR,
    ("GET", "/v1/models"): Role.VIEWER,
    ("POST", "/v1/admin/reload"): Role.ADMIN,
    ("GET", "/v1/me"): Role.VIEWER,
    ("GET", "/health"): None,
    ("GET", "/ready"): None,
    ("GET", "/metrics"): None,
    ("GET", "/"): None,
    ("GET", "/static"): None,
    ("GET", "/openapi.json"): None,
}
LOCAL = Caller("local", "local", Role.ADMIN)
READING = ("GET", "HEAD", "OPTIONS")
THIS_MACHINE = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
# Headers that a proxy adds: whoever sends them does not speak for this machine.
FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/-]{1,16384}=*)", re.IGNORECASE)
ORIGIN = re.compile(r"(https?)://([^/?#@\s]+)")
DEFAULT_PORTS = {"http": 80, "https": 443}
# Tokens that are verified at once. Where the provider is slow, the rest wait outside the threads that serve routes.
VERIFYING_THREADS = 4
HOW_TO_MAKE_A_KEY = "python -m mlops.api.keys create --name NAME --role admin"


class Unauthenticated(ProblemError):
    """Nobody knows who calls. 401."""

    def __init__(self, detail: str, error: str = ""):
        challenge = f'Bearer error="{error}"' if error else "Bearer"
        super().__init__(401, "Not authenticated", detail, headers={"WWW-Authenticate": challenge})


class Forbidden(ProblemError):
    """The caller may not do this. 403."""

    def __init__(self, detail: str):
        super().__init__(403, "Not allowed", detail)


def require_safe_start(settings: Settings, keys: KeyStore) -> None:
    """Refuse to be reached from other machines where nobody would have to prove who they are.

    Raises:
        ConfigError: neither a key nor OIDC, and an address other than loopback; or the keys cannot be read.
    """
    if not (keys.any_active() or settings.oidc_issuer or settings.loopback_only):
        raise ConfigError(
            f"{settings.host} can be reached from other machines, and there is no key: make one with "
            f"{HOW_TO_MAKE_A_KEY}, or set LDM3D_OIDC_ISSUER, or LDM3D_HOST=127.0.0.1"
        )


class Authenticator:
    """Finds out who calls.

    Args:
        settings: of the service.
        keys: API keys.
        oidc: verifier of an identity provider's tokens, if there is one.
    """

    def __init__(self, settings: Settings, keys: KeyStore, oidc: OidcVerifier | None = None):
        self._settings, self._keys, self._oidc = settings, keys, oidc
        self._verifying = CapacityLimiter(VERIFYING_THREADS)

    @property
    def open(self) -> bool:
        """Whether everybody on this machine is admin: only where no key was ever made, and without OIDC.

        Asked at each request, so that the first key closes the door without a restart.
        """
        return self._settings.loopback_only and self._oidc is None and not self._keys.exists()

    async def authenticate(self, authorization: str | None) -> Caller:
        """The caller that a request's `Authorization` header proves.

        Raises:
            Unauthenticated: there is no header, or it proves nobody.
            ProblemError: 503, keys or provider cannot be asked; 403, a token without a role.
        """
        if self.open:
            return LOCAL
        if not authorization:
            raise Unauthenticated("send the header Authorization: Bearer, with an API key or a token")
        found = BEARER.fullmatch(authorization)
        if not found:
            raise Unauthenticated("the Authorization header must be Bearer, with an API key or a token")
        if self._oidc is None or found[1].startswith(f"{PREFIX}_"):
            return self._by_key(found[1])
        if caller := self._oidc.known(found[1]):
            return caller
        return await anyio.to_thread.run_sync(self._oidc.verify, found[1], limiter=self._verifying)

    def _by_key(self, plaintext: str) -> Caller:
        try:
            entry = self._keys.find(plaintext)
        except ConfigError as error:  # its text has a path, which is not for clients; the log has it
            raise ProblemError(503, "Keys unreadable", "the service cannot read its keys and refuses all") from error
        role = entry and Role.named(entry.role)
        if not entry or not role:
            raise Unauthenticated("the key is unknown, revoked or expired", "invalid_token")
        return Caller(f"key:{entry.id}", entry.name, role)


async def authorise(request: Request) -> None:
    """Dependency of the whole application: lets a request through if `ACCESS` does.

    Puts the caller into `request.state.caller`, None on open routes. Needs an `Authenticator` in
    `app.state.authenticator` and the settings in `app.state.settings`.

    Raises:
        ProblemError: 401, 403; 421 or 403 for a request that a foreign page may have sent; 500 for a route that the
            table does not have; 503 where keys or provider cannot be asked.
    """
    authenticator: Authenticator = request.app.state.authenticator
    refuse_foreign_pages(request, request.app.state.settings, authenticator.open)
    method, template = route_of(request.scope)
    if (method, template) not in ACCESS:
        raise ProblemError(500, "Route without a role", f"{method} {template} is not in the table of roles")
    role = ACCESS[method, template]
    request.state.caller = None
    if role is None:
        return
    request.state.caller = caller = await authenticator.authenticate(request.headers.get("authorization"))
    if caller.role < role:
        raise Forbidden(f"{method} {template} needs the role {role}; you have {caller.role}")


def route_of(scope: Scope) -> tuple[str, str]:
    """Method and template path, `/v1/jobs/{id}`, of the route that a request found; HEAD counts as GET.

    `scope["route"].path` lacks the prefixes of the routers that include the route; FastAPI keeps the whole beside it.
    """
    context = scope.get("fastapi", {}).get("effective_route_context") or scope["route"]
    return _as_reading(scope["method"]), context.path_format


def methods_of(template: str) -> list[str]:
    """The methods that the route or routes of a template path answer."""
    return sorted(method for method, path in ACCESS if path == template)


def _as_reading(method: str) -> str:
    return "GET" if method == "HEAD" else method


def refuse_foreign_pages(request: Request, settings: Settings, open_to_all: bool) -> None:
    """Refuse what a page of another site may have made a browser send.

    A page whose name is pointed at 127.0.0.1 (DNS rebinding) reaches the service as its own site; the Host header still
    has the page's name. A form or script of another site sends its `Origin`.

    Raises:
        ProblemError: 421 where `open_to_all` and Host is not this machine, or a proxy forwards; 403 for a request that
            changes something, from another origin than this service's and those of `cors_origins`.
    """
    host = request.headers.get("host", "")
    if open_to_all and (
        len(request.headers.getlist("host")) != 1
        or not THIS_MACHINE.fullmatch(host)
        or any(header in request.headers for header in FORWARDED)
    ):
        raise ProblemError(
            421,
            "Not for this host",
            f"without keys this service answers localhost and 127.0.0.1, and no proxy; make one: {HOW_TO_MAKE_A_KEY}",
        )
    origin = request.headers.get("origin")
    if request.method in READING or origin is None or origin in settings.cors_origins:
        return
    found = ORIGIN.fullmatch(origin)
    if not found or _with_port(found[2], found[1]) != _with_port(host, found[1]):
        raise ProblemError(403, "Foreign origin", "pages of another origin may not change anything here")


def _with_port(host: str, scheme: str) -> str:
    """`example.org` as `example.org:443`, where the scheme is https."""
    return host.lower() if re.search(r":[0-9]+$", host) else f"{host.lower()}:{DEFAULT_PORTS[scheme]}"


def check_access_table(app: FastAPI) -> None:
    """Hold the application's routes against `ACCESS`.

    Raises:
        RuntimeError: our own mistake: a route is missing in the table or in the application, or one that needs a role
            does not depend on `authorise`.
    """
    found: dict[tuple[str, str], bool] = {}
    for route in iter_route_contexts(app.routes):
        path = getattr(route, "path_format", None) if route.methods else route.path
        for method in route.methods or {"GET"}:
            found[_as_reading(method), path or ""] = _depends_on_authorise(getattr(route, "dependant", None))
    wrong = [f"{method} {path} is not in ACCESS" for method, path in found.keys() - ACCESS.keys()]
    wrong += [f"{method} {path} of ACCESS is no route" for method, path in ACCESS.keys() - found.keys()]
    wrong += [
        f"{method} {path} does not ask authorise"
        for (method, path), guarded in found.items()
        if ACCESS.get((method, path)) is not None and not guarded
    ]
    if wrong:
        raise RuntimeError("; ".join(sorted(wrong)))


def _depends_on_authorise(dependant: Any) -> bool:
    return dependant is not None and (
        dependant.call is authorise or any(map(_depends_on_authorise, dependant.dependencies))
    )
