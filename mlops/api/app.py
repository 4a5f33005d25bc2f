"""The web process: routes, who may call them, and what is around them. It never loads a model."""

from pathlib import Path

from fastapi import Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ldm3d import __version__
from mlops.api import problems
from mlops.api.audit import AuditLog
from mlops.api.catalogue import Catalogue
from mlops.api.jobs import open_store
from mlops.api.keys import KeyStore
from mlops.api.limits import RateLimit, RequestLimits, Streams
from mlops.api.observe import Observe
from mlops.api.oidc import OidcVerifier
from mlops.api.openapi import describe, operation_id
from mlops.api.problems import PlainErrors, ProblemError, problem, problem_response
from mlops.api.queue import Queue
from mlops.api.routes import health, jobs, models, samples
from mlops.api.security import (
    Authenticator,
    Unauthenticated,
    authorise,
    check_access_table,
    methods_of,
    require_safe_start,
    route_of,
)
from mlops.api.service import Service
from mlops.api.settings import Settings
from mlops.api.usage import Usage

STATIC = Path(__file__).with_name("static")
DESCRIPTION = "Generates 3D brain MRI volumes. What it generates is not a patient, and this is not a medical device."


def create_app(settings: Settings) -> FastAPI:
    """The application.

    Raises:
        ConfigError: it would be open to everybody, or its keys cannot be read.
    """
    keys = KeyStore(settings.data_dir / "keys.json")
    require_safe_start(settings, keys)
    app = FastAPI(
        title="ldm3d",
        version=__version__,
        description=DESCRIPTION,
        root_path=settings.root_path,
        docs_url=None,
        redoc_url=None,
        dependencies=[Depends(authorise), Depends(count_request)],
        separate_input_output_schemas=False,
        generate_unique_id_function=operation_id,
    )
    app.state.settings = settings
    oidc = None
    if settings.oidc_issuer:
        oidc = OidcVerifier(settings.oidc_issuer, settings.oidc_audience, settings.oidc_roles_claim)
    app.state.authenticator = Authenticator(settings, keys, oidc)
    app.state.service = Service(
        settings=settings,
        store=open_store(settings),
        queue=Queue(settings.queue_url, settings.data_dir / "queue.sqlite"),
        catalogue=Catalogue(settings.data_dir),
        rate=RateLimit(settings.requests_per_minute, settings.queue_url),
        streams=Streams(settings.max_streams),
        usage=Usage(settings.data_dir),
    )
    problems.install(app)
    app.add_exception_handler(Unauthenticated, refuse_key)
    app.add_exception_handler(405, refuse_method)
    for room in (samples, jobs, models, health):
        app.include_router(room.router)
    app.get("/", include_in_schema=False)(page)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    check_access_table(app)
    describe(app, settings)
    _surround(app, settings)
    return app


async def count_request(request: Request) -> None:
    """Refuse callers that call too often."""
    if request.state.caller:
        await request.app.state.service.rate.count(request.state.caller.id)


async def refuse_key(request: Request, error: Exception) -> Response:
    """Answer a wrong key; after many from one address say that it is enough."""
    assert isinstance(error, Unauthenticated)
    try:
        await request.app.state.service.rate.count_failure(request.client.host if request.client else "")
    except ProblemError as enough:
        return problem_response(enough)
    return problem_response(error)


async def refuse_method(request: Request, error: Exception) -> Response:
    """Name all methods of the path; Starlette knows only those of the first route there."""
    # What is mounted and the OpenAPI document leave no route; both are read.
    methods = methods_of(route_of(request.scope)[1]) if "route" in request.scope else ["GET", "HEAD"]
    allowed = ", ".join(methods)
    return problem_response(problem(405, f"{request.method}: only {allowed} here", headers={"Allow": allowed}))


async def page() -> FileResponse:
    """The page to generate and look at volumes."""
    return FileResponse(STATIC / "index.html")


def _surround(app: FastAPI, settings: Settings) -> None:
    """Layers around the routes; the last one added is the outermost."""
    app.add_middleware(RequestLimits, max_bytes=settings.max_body_bytes, seconds=settings.request_seconds)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Range"],
            expose_headers=["Location", "Retry-After", "X-Request-Id", "Content-Range"],
        )
    if settings.trusted_hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=settings.trusted_hosts, www_redirect=False)
    app.add_middleware(PlainErrors)
    app.add_middleware(Observe, audit=AuditLog(settings.audit_folder, settings.audit_max_mib))
