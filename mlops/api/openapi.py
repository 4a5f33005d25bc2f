"""The OpenAPI document: what FastAPI makes of the routes, and errors, keys and limits as they are here."""

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from ldm3d.samplers import LARGEST_SEED
from mlops.api.schemas import Problem
from mlops.api.settings import Settings

BEARER = {"type": "http", "scheme": "bearer", "description": "An API key, or a token of the identity provider."}


def operation_id(route: APIRoute) -> str:
    """Name of an operation, for generated clients: that of its function. Renaming one changes the API."""
    return route.name


def describe(app: FastAPI, settings: Settings) -> None:
    """Complete the OpenAPI document that `app` serves."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(made(), settings)
        return made()

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(document: dict[str, Any], settings: Settings) -> None:
    components = document["components"]
    schemas = components["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own form of errors, which is not used here
        schemas.pop(name, None)
    schemas["Problem"] = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    components["securitySchemes"] = {"bearer": BEARER}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["security"] = [{"bearer": []}] if path.startswith("/v1/") else []
    _show_limits(document, settings)


def _show_limits(document: dict[str, Any], settings: Settings) -> None:
    """What no model offers more of. A version may offer fewer steps: `GET /v1/models` says so."""
    asked = document["components"]["schemas"]["SampleRequest"]["properties"]
    asked["num"]["maximum"] = settings.max_num
    asked["seed"]["maximum"] = LARGEST_SEED  # FastAPI has made a float of it, which is larger by one
    for choice in asked["steps"]["anyOf"]:
        if choice["type"] == "integer":
            choice["maximum"] = settings.max_steps
    for parameter in document["paths"]["/v1/samples"]["post"]["parameters"]:
        if parameter["name"] == "wait":
            parameter["schema"]["maximum"] = settings.max_wait_seconds
