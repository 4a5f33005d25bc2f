"""mlops.api.security: who may call what, on a small application with all paths of the service."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from identity_provider import AUDIENCE, Provider
from starlette.staticfiles import StaticFiles

from ldm3d.errors import ConfigError
from mlops.api.callers import Role
from mlops.api.keys import KeyStore
from mlops.api.oidc import OidcVerifier
from mlops.api.problems import ProblemError
from mlops.api.security import ACCESS, Authenticator, authorise, check_access_table, require_safe_start
from mlops.api.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
GUARDED = [route for route, role in ACCESS.items() if role is not None]
OPEN = [route for route, role in ACCESS.items() if role is None]


def make_app(settings: Settings, keys: KeyStore, oidc: OidcVerifier | None = None) -> FastAPI:
    """Answers each path of the table with its caller; routers are nested, as the service has them."""
    app = FastAPI(docs_url=None, redoc_url=None, dependencies=[Depends(authorise)])
    app.state.settings, app.state.authenticator = settings, Authenticator(settings, keys, oidc)

    async def who(request: Request) -> dict[str, str] | None:
        caller = request.state.caller
        return caller and {"id": caller.id, "name": caller.name, "role": str(caller.role)}

    v1, jobs = APIRouter(prefix="/v1"), APIRouter(prefix="/jobs")
    for method, path in ACCESS:
        if path.startswith("/v1/jobs"):
            jobs.add_api_route(path.removeprefix("/v1/jobs"), who, methods=[method])
        elif path.startswith("/v1"):
            v1.add_api_route(path.removeprefix("/v1"), who, methods=[method])
        elif path not in ("/static", "/openapi.json"):
            app.add_api_route(path, who, methods=[method])
    v1.include_router(jobs)
    app.include_router(v1)
    app.mount("/static", StaticFiles(directory=ROOT / "figs"))

    @app.exception_handler(ProblemError)
    async def problem(_: Request, error: ProblemError) -> JSONResponse:
        return JSONResponse({"title": error.title, "detail": error.detail}, error.status, error.headers)

    return app


class Client:
    """Calls an application in this process."""

    def __init__(self, app: FastAPI, base_url: str = "http://127.0.0.1:8000"):
        self._transport, self._base_url = httpx.ASGITransport(app=app, raise_app_exceptions=False), base_url

    def __call__(self, method: str, path: str, key: str | None = None, **headers: str) -> httpx.Response:
        more = {"Authorization": f"Bearer {key}"} if key else {}

        async def call() -> httpx.Response:
            async with httpx.AsyncClient(transport=self._transport, base_url=self._base_url) as client:
                given = {name.replace("_", "-"): value for name, value in headers.items()}
                return await client.request(method, path.format(id="0" * 26, name="a.nii"), headers=given | more)

        return asyncio.run(call())


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, cors_origins=["https://viewer.example"])


@pytest.fixture
def keys(settings: Settings) -> KeyStore:
    return KeyStore(settings.data_dir / "keys.json")


@pytest.fixture
def client(settings: Settings, keys: KeyStore) -> Client:
    return Client(make_app(settings, keys))


# ---------------------------------------------------------------- roles


@pytest.mark.parametrize("route", GUARDED, ids=" ".join)
def test_each_route_asks_for_its_role(client: Client, keys: KeyStore, route: tuple[str, str]) -> None:
    made = {role: keys.create(str(role), str(role)) for role in Role}
    refused = client(*route)
    assert refused.status_code == 401 and refused.headers["WWW-Authenticate"] == "Bearer"
    for role, (entry, plaintext) in made.items():
        answer = client(*route, plaintext)
        if role >= ACCESS[route]:
            assert answer.status_code == 200
            assert answer.json() == {"id": f"key:{entry.id}", "name": entry.name, "role": str(role)}
        else:
            assert answer.status_code == 403
            assert answer.json()["detail"] == f"{' '.join(route)} needs the role {ACCESS[route]}; you have {role}"


@pytest.mark.parametrize("route", OPEN, ids=" ".join)
def test_open_routes_ask_nobody(client: Client, keys: KeyStore, route: tuple[str, str]) -> None:
    keys.create("some", "admin")
    method, path = route
    assert client(method, "/static/montage.png" if path == "/static" else path, "not-a-key").status_code in (200, 404)


def test_the_document_shows_the_same_table() -> None:
    text = (ROOT / "docs" / "SECURITY.md").read_text()
    rows = re.findall(r"^\| (GET|POST|DELETE) \| `([^`]+)` \| (\w+) \|$", text, re.MULTILINE)
    assert len(rows) == len(ACCESS)
    assert {(method, path): Role.named(role) for method, path, role in rows} == ACCESS
    assert {role for _, _, role in rows} == {"open", *map(str, Role)}


@pytest.mark.parametrize("document", ["docs/SECURITY.md", "mlops/docker/nginx.conf"])
def test_settings_that_are_named_exist(document: str) -> None:
    named = set(re.findall(r"\bLDM3D_(\w+)", (ROOT / document).read_text())) - {"DATA_DIR"}
    assert named and {name.lower() for name in named} <= set(Settings.model_fields)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Basic {key}",
        "{key}",
        "Bearer {key} x",
        "Bearer {key},{key}",
        "Bearer {key}x",
        'Bearer "{key}"',
        "Bearer " + "x" * 20000,
    ],
)
def test_only_a_bearer_header_proves_anything(client: Client, keys: KeyStore, header: str) -> None:
    _, key = keys.create("some", "admin")
    assert client("GET", "/v1/me", Authorization=f"bearer  {key}").status_code == 200
    assert client("GET", "/v1/me", Authorization=header.format(key=key)).status_code == 401
    for query in (f"access_token={key}", f"key={key}", f"authorization=Bearer%20{key}"):
        assert client("GET", f"/v1/me?{query}").status_code == 401
    assert client("GET", "/v1/me", Cookie=f"key={key}", X_API_Key=key).status_code == 401


def test_head_needs_what_get_needs(settings: Settings, keys: KeyStore) -> None:
    app = make_app(settings, keys)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") != "/ready"]

    @app.api_route("/ready", methods=["GET", "HEAD"])
    async def ready() -> None:
        pass

    check_access_table(app)
    keys.create("some", "admin")
    assert Client(app)("HEAD", "/ready").status_code == 200


# ---------------------------------------------------------------- keys at work


def test_revoking_takes_effect_at_the_next_request(client: Client, keys: KeyStore) -> None:
    entry, key = keys.create("some", "viewer")
    assert client("GET", "/v1/me", key).status_code == 200
    KeyStore(keys.path).revoke(entry.id)
    refused = client("GET", "/v1/me", key)
    assert refused.status_code == 401 and refused.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
    assert client("GET", "/v1/me").status_code == 401, "without any key left, the service must stay closed"


@pytest.mark.parametrize("damage", [lambda path: path.write_text("{"), lambda path: path.unlink()], ids=["bad", "gone"])
def test_keys_that_cannot_be_read_refuse_all(client: Client, keys: KeyStore, damage: Any) -> None:
    _, key = keys.create("some", "admin")
    assert client("GET", "/v1/me", key).status_code == 200
    damage(keys.path)
    refused = client("GET", "/v1/me", key)
    assert refused.status_code == 503 and str(keys.path) not in refused.text
    assert client("GET", "/v1/me").status_code == 401
    assert client("GET", "/health").status_code == 200


# ---------------------------------------------------------------- without keys


def test_without_keys_this_machine_is_admin_until_there_is_one(client: Client, keys: KeyStore) -> None:
    assert client("GET", "/v1/me").json() == {"id": "local", "name": "local", "role": "admin"}
    keys.create("first", "viewer")
    assert client("GET", "/v1/me").status_code == 401


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "127.0.0.1"])
def test_names_of_this_machine_are_answered(client: Client, host: str) -> None:
    assert client("GET", "/v1/me", Host=host).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "localhost.evil.example"},
        {"Host": "127.0.0.1.evil.example:8000"},
        {"Host": "x@127.0.0.1"},
        {"Host": "127.0.0.1/"},
        {"Host": "[::1"},
        {"Host": ""},
        {"X-Forwarded-For": "203.0.113.5"},
        {"Forwarded": "for=203.0.113.5"},
        {"X-Real-IP": "203.0.113.5"},
        {"Via": "1.1 proxy"},
    ],
    ids=str,
)
def test_without_keys_other_names_and_proxies_are_refused(
    client: Client, keys: KeyStore, headers: dict[str, str]
) -> None:
    refused = client("GET", "/v1/me", **headers)
    assert refused.status_code == 421 and "mlops.api.keys create" in refused.json()["detail"]
    _, key = keys.create("some", "viewer")
    assert client("GET", "/v1/me", key, **headers).status_code == 200


@pytest.mark.parametrize("with_key", [False, True])
def test_foreign_pages_change_nothing(client: Client, keys: KeyStore, with_key: bool) -> None:
    key = keys.create("some", "admin")[1] if with_key else None
    for origin in (
        "https://evil.example",
        "null",
        "http://127.0.0.1:3000",
        "http://localhost:8000",
        "https://127.0.0.1",
        "http://[",
        "",
        "http://127.0.0.1:99999",
    ):
        for method, path in (("POST", "/v1/samples"), ("DELETE", "/v1/jobs/{id}")):
            assert client(method, path, key, Origin=origin).status_code == 403, origin
    for origin in ("http://127.0.0.1:8000", "https://viewer.example"):
        assert client("POST", "/v1/samples", key, Origin=origin).status_code == 200
    assert client("GET", "/v1/me", key, Origin="https://evil.example").status_code == 200


def test_default_ports_are_the_same_origin(settings: Settings, keys: KeyStore) -> None:
    _, key = keys.create("some", "admin")
    client = Client(make_app(settings, keys), "http://brains.example")  # TLS ended at a proxy
    assert client("POST", "/v1/samples", key, Origin="https://brains.example").status_code == 200
    assert client("POST", "/v1/samples", key, Origin="https://brains.example:443").status_code == 200
    assert client("POST", "/v1/samples", key, Origin="https://brains.example:8443").status_code == 403


# ---------------------------------------------------------------- start


def test_other_addresses_need_a_key_or_a_provider(tmp_path: Path) -> None:
    keys = KeyStore(tmp_path / "keys.json")
    require_safe_start(Settings(), keys)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org", ""):
        with pytest.raises(ConfigError, match=r"there is no key: make one with python -m mlops\.api\.keys create"):
            require_safe_start(Settings(host=host), keys)
    require_safe_start(Settings(host="0.0.0.0", oidc_issuer="https://login.example"), keys)
    entry, _ = keys.create("some", "admin")
    require_safe_start(Settings(host="0.0.0.0"), keys)
    keys.revoke(entry.id)
    with pytest.raises(ConfigError, match="there is no key"):
        require_safe_start(Settings(host="0.0.0.0"), keys)
    keys.path.write_text("{")
    for settings in (Settings(), Settings(host="0.0.0.0"), Settings(oidc_issuer="https://login.example")):
        with pytest.raises(ConfigError, match="damaged"):
            require_safe_start(settings, keys)


def test_another_address_is_never_open(tmp_path: Path) -> None:
    settings = Settings(host="0.0.0.0")
    assert not Authenticator(settings, KeyStore(tmp_path / "keys.json")).open


def test_the_table_and_the_routes_agree(settings: Settings, keys: KeyStore) -> None:
    check_access_table(make_app(settings, keys))


def without(app: FastAPI, path: str) -> None:
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") != path]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda app: app.add_api_route("/v1/new", lambda: None), "GET /v1/new is not in ACCESS"),
        (lambda app: app.add_api_route("/health", lambda: None, methods=["PUT"]), "PUT /health is not in ACCESS"),
        (lambda app: app.mount("/files", StaticFiles(directory=ROOT / "figs")), "GET /files is not in ACCESS"),
        (lambda app: without(app, "/health"), "GET /health of ACCESS is no route"),
    ],
    ids=["route", "method", "mount", "missing"],
)
def test_a_difference_between_table_and_routes_is_seen(
    settings: Settings, keys: KeyStore, change: Any, says: str
) -> None:
    app = make_app(settings, keys)
    change(app)
    with pytest.raises(RuntimeError, match=re.escape(says)):
        check_access_table(app)


def test_a_route_that_asks_nobody_is_seen() -> None:
    app = FastAPI()
    app.add_api_route("/v1/me", lambda: None)
    with pytest.raises(RuntimeError, match="GET /v1/me does not ask authorise"):
        check_access_table(app)


def test_a_route_without_a_role_answers_500(settings: Settings, keys: KeyStore) -> None:
    app = make_app(settings, keys)
    app.add_api_route("/v1/new", lambda: "secret")
    _, key = keys.create("some", "admin")
    answer = Client(app)("GET", "/v1/new", key)
    assert answer.status_code == 500 and answer.json()["title"] == "Route without a role"


# ---------------------------------------------------------------- OIDC


@pytest.fixture
def provider() -> Iterator[Provider]:
    provider = Provider()
    yield provider
    provider.stop()


def test_keys_and_tokens_side_by_side(settings: Settings, keys: KeyStore, provider: Provider) -> None:
    client = Client(make_app(settings, keys, OidcVerifier(provider.issuer, AUDIENCE, "roles")))
    assert client("GET", "/v1/me").status_code == 401, "with a provider nobody is let in without a token"
    token = provider.token(sub="u/../7\n", preferred_username="ada")
    for _ in range(2):
        assert client("GET", "/v1/me", token).json() == {"id": "oidc:u/../7\n", "name": "ada", "role": "operator"}
    assert client("POST", "/v1/admin/reload", token).status_code == 403
    assert client("GET", "/v1/me", provider.token(roles=[])).status_code == 403
    assert client("GET", "/v1/me", "ldm3d_aaaaaaaa_" + "a" * 43).status_code == 401
    entry, key = keys.create("some", "viewer")
    assert client("GET", "/v1/me", key).json()["id"] == f"key:{entry.id}"


def test_an_unreachable_provider_is_503(settings: Settings, keys: KeyStore, provider: Provider) -> None:
    client = Client(make_app(settings, keys, OidcVerifier(provider.issuer, AUDIENCE, "roles")))
    token = provider.token()
    provider.stop()
    answer = client("GET", "/v1/me", token)
    assert answer.status_code == 503 and int(answer.headers["Retry-After"]) > 0
    _, key = keys.create("some", "viewer")
    assert client("GET", "/v1/me", key).status_code == 200
