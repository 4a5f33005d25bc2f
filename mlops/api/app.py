"""The web process: routes, who may call them, and what is around them. It never loads a model."""

from pathlib import Path
from typing import Any

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
from mlops.api.problems import ProblemError, problem_response
from mlops.api.queue import Queue
from mlops.api.routes import health, jobs, models, samples
from mlops.api.schemas import Problem
from mlops.api.security import Authenticator, Unauthenticated, authorise, check_access_table, require_safe_start
from mlops.api.service import Service
from mlops.api.settings import Settings

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
    )
    problems.install(app)
    app.add_exception_handler(Unauthenticated, refuse_key)
    for room in (samples, jobs, models, health):
        app.include_router(room.router)
    app.get("/", include_in_schema=False)(page)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    check_access_table(app)
    _describe(app)
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
    app.add_middleware(Observe, audit=AuditLog(settings.data_dir / "audit", settings.audit_max_mib))


def _describe(app: FastAPI) -> None:
    """Complete the OpenAPI document: problems as errors, how to log in."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = made()
            components = schema.setdefault("components", {})
            schemas = components.setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            schemas["Problem"] = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            bearer = {"type": "http", "scheme": "bearer", "description": "An API key, or a token of the provider."}
            components["securitySchemes"] = {"bearer": bearer}
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    operation["security"] = [{"bearer": []}] if path.startswith("/v1/") else []
        return app.openapi_schema or schema

    app.openapi = openapi  # type: ignore[method-assign]
