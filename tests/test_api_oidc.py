"""mlops.api.oidc against a real identity provider on this machine."""

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import identity_provider as idp
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from identity_provider import AUDIENCE, Provider, public

from ldm3d.errors import ConfigError
from mlops.api import oidc as module
from mlops.api.callers import Caller, Role
from mlops.api.oidc import OidcVerifier
from mlops.api.problems import ProblemError


@pytest.fixture
def provider() -> Iterator[Provider]:
    provider = Provider()
    yield provider
    provider.stop()


@pytest.fixture
def verifier(provider: Provider) -> OidcVerifier:
    return OidcVerifier(provider.issuer, AUDIENCE, "roles")


class Clock:
    """Time that passes when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.passed = 0.0
        monkeypatch.setattr(module, "time", self)

    def monotonic(self) -> float:
        return time.monotonic() + self.passed

    def time(self) -> float:
        return time.time() + self.passed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def status_of(verifier: OidcVerifier, token: str) -> int:
    with pytest.raises(ProblemError) as refused:
        verifier.verify(token)
    assert verifier.known(token) is None
    if refused.value.status == 401:
        assert refused.value.headers["WWW-Authenticate"].startswith("Bearer")
    return refused.value.status


def encoded(content: Any) -> str:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


@pytest.mark.parametrize(
    ("key", "key_id", "algorithm"),
    [
        (idp.RSA[0], "first", "RS256"),
        (idp.RSA[0], "first", "PS256"),
        (idp.EC, "ec", "ES256"),
        (idp.ED, "ed", "EdDSA"),
    ],
)
def test_each_algorithm_is_accepted(
    verifier: OidcVerifier, provider: Provider, key: Any, key_id: str, algorithm: str
) -> None:
    token = provider.token(key, key_id, algorithm, preferred_username="ada")
    assert verifier.known(token) is None
    assert verifier.verify(token) == Caller("oidc:u1", "ada", Role.OPERATOR) == verifier.known(token)


@pytest.mark.parametrize(
    "claims",
    [
        {"iss": "https://elsewhere.example"},
        {"iss": None},
        {"aud": "another"},
        {"aud": ["another", "more"]},
        {"aud": None},
        {"exp": None},
        {"exp": -31},
        {"exp": "soon"},
        {"nbf": 3600},
        {"sub": None},
        {"sub": ""},
        {"sub": 7},
        {"sub": "x" * 256},
    ],
    ids=str,
)
def test_wrong_claims_prove_nobody(verifier: OidcVerifier, provider: Provider, claims: dict[str, Any]) -> None:
    """Times are seconds from now: test names must be the same in every process that collects them."""
    assert verifier.verify(provider.token())
    now = int(time.time())
    if isinstance(seconds := claims.get("exp", claims.get("nbf")), int):
        claims = {next(iter(claims)): now + seconds}
    # Made here, not by the library, which would refuse to sign some of them.
    unsigned = f"{encoded({'alg': 'EdDSA', 'kid': 'ed'})}.{encoded(provider.claims(**claims))}"
    assert status_of(verifier, f"{unsigned}.{encoded(idp.ED.sign(unsigned.encode()))}") == 401


def test_a_little_skew_of_clocks_is_allowed(verifier: OidcVerifier, provider: Provider) -> None:
    now = int(time.time())
    assert verifier.verify(provider.token(exp=now - 5, sub="late"))
    assert verifier.verify(provider.token(nbf=now + 15, sub="early"))


def forged_hs256(provider: Provider, secret: bytes, key_id: str) -> str:
    unsigned = f"{encoded({'alg': 'HS256', 'kid': key_id})}.{encoded(provider.claims())}"
    return f"{unsigned}.{encoded(hmac.digest(secret, unsigned.encode(), hashlib.sha256))}"


def test_nobody_forges(verifier: OidcVerifier, provider: Provider) -> None:
    assert verifier.verify(provider.token())
    pem = idp.RSA[0].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    provider.keys.append({"kty": "oct", "kid": "secret", "k": encoded(b"s" * 32)})
    body = encoded(provider.claims())
    good = provider.token()
    forged = {
        "alg none": f"{encoded({'alg': 'none', 'kid': 'first'})}.{body}.",
        "alg None": f"{encoded({'alg': 'None', 'kid': 'first'})}.{body}.",
        "no alg": f"{encoded({'kid': 'first'})}.{body}.",
        "alg is a list": f"{encoded({'alg': ['RS256'], 'kid': 'first'})}.{body}.",
        "HS256 with the public key": forged_hs256(provider, pem, "first"),
        "HS256 with a published secret": forged_hs256(provider, b"s" * 32, "secret"),
        "another's key": provider.token(idp.RSA[1]),
        "another kind of key": provider.token(idp.EC, "first", "ES256"),
        "another's claims": ".".join([good.split(".")[0], encoded(provider.claims(sub="boss")), good.split(".")[2]]),
        "its own key": f"{encoded({'alg': 'RS256', 'jwk': public(idp.RSA[1], 'x'), 'kid': 'x'})}.{body}.AAAA",
        "critical": f"{encoded({'alg': 'RS256', 'kid': 'first', 'crit': ['x']})}.{body}.AAAA",
        "kid is a number": f"{encoded({'alg': 'RS256', 'kid': 1})}.{body}.AAAA",
        "deep": f"{encoded(b'[' * 9000)}.{body}.AAAA",
        "deep claims": f"{encoded({'alg': 'RS256', 'kid': 'first'})}.{encoded(b'[' * 9000)}.AAAA",
        "no token": "x",
        "dots": "...",
        "bytes": f"{encoded(bytes(range(256)))}.{body}.AAAA",
    }
    assert {name: status_of(verifier, token) for name, token in forged.items()} == dict.fromkeys(forged, 401)


def test_a_key_serves_its_own_algorithm_and_use_only(provider: Provider) -> None:
    provider.keys = [
        public(idp.RSA[0], "ps", alg="PS256"),
        public(idp.RSA[0], "enc", use="enc"),
        public(idp.LARGE_EC, "p384"),
        public(idp.SMALL_RSA, "small"),
    ]
    verifier = OidcVerifier(provider.issuer, AUDIENCE, "roles")
    assert verifier.verify(provider.token(idp.RSA[0], "ps", "PS256"))
    assert status_of(verifier, provider.token(idp.RSA[0], "ps", "RS256")) == 401
    assert status_of(verifier, provider.token(idp.RSA[0], "enc")) == 401
    unsigned = f"{encoded({'alg': 'ES256', 'kid': 'p384'})}.{encoded(provider.claims())}"
    assert status_of(verifier, f"{unsigned}.{'A' * 86}") == 401
    with pytest.warns(UserWarning):  # the library's own, at signing
        weak = provider.token(idp.SMALL_RSA, "small")
    assert status_of(verifier, weak) == 401


def test_a_token_without_key_id_needs_a_provider_with_one_key(provider: Provider) -> None:
    token = provider.token(key_id=None)
    assert status_of(OidcVerifier(provider.issuer, AUDIENCE, "roles"), token) == 401
    provider.keys = provider.keys[:1]
    assert OidcVerifier(provider.issuer, AUDIENCE, "roles").verify(token)


@pytest.mark.parametrize(
    ("claim", "claims", "role"),
    [
        ("roles", {"roles": "admin"}, Role.ADMIN),
        ("roles", {"roles": ["viewer", "unknown", "admin", 7]}, Role.ADMIN),
        ("realm_access.roles", {"realm_access": {"roles": ["viewer"]}}, Role.VIEWER),
        ("https://lab.example/roles", {"https://lab.example/roles": ["operator"]}, Role.OPERATOR),
        ("roles", {"roles": ["Admin", "root"]}, None),
        ("roles", {"roles": None}, None),
        ("roles", {"roles": {"admin": True}}, None),
        ("roles.deep", {"roles": ["admin"]}, None),
    ],
)
def test_the_highest_role_of_the_claim_counts(
    provider: Provider, claim: str, claims: dict[str, Any], role: Role | None
) -> None:
    verifier = OidcVerifier(provider.issuer, AUDIENCE, claim)
    token = provider.token(**claims)
    if role:
        assert verifier.verify(token).role == role
    else:
        assert status_of(verifier, token) == 403


def test_rotated_keys_are_fetched_once_in_a_while(verifier: OidcVerifier, provider: Provider, clock: Clock) -> None:
    old = provider.token()
    assert verifier.verify(old)
    provider.keys = [public(idp.RSA[1], "second")]
    new = provider.token(idp.RSA[1], "second")
    asked = len(provider.requests)
    assert status_of(verifier, new) == 401, "a forged key id must not make it ask again at once"
    assert len(provider.requests) == asked
    clock.passed += module.REFRESH_SECONDS
    assert verifier.verify(new)
    assert len(provider.requests) == asked + 2
    assert [status_of(verifier, provider.token(key_id=f"forged{number}")) for number in range(5)] == [401] * 5
    assert len(provider.requests) == asked + 2
    assert status_of(verifier, provider.token(sub="of the old key")) == 401


def test_a_key_that_was_taken_back_is_forgotten(verifier: OidcVerifier, provider: Provider, clock: Clock) -> None:
    assert verifier.verify(provider.token())
    provider.keys = provider.keys[1:]
    clock.passed += module.KEYS_SECONDS + 1
    assert status_of(verifier, provider.token(exp=int(time.time()) + 3600)) == 401


def test_a_verified_token_is_known_for_a_minute_and_not_beyond_its_end(
    verifier: OidcVerifier, provider: Provider, clock: Clock
) -> None:
    long, short = provider.token(), provider.token(exp=int(time.time()) + 20)
    verifier.verify(long)
    verifier.verify(short)
    clock.passed = 25
    assert verifier.known(long) and verifier.known(short) is None
    clock.passed = module.KNOWN_SECONDS + 1
    assert verifier.known(long) is None


def test_known_tokens_take_bounded_room(
    verifier: OidcVerifier, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_KNOWN", 2)
    tokens = [provider.token(idp.ED, "ed", "EdDSA", sub=f"u{number}") for number in range(3)]
    for token in tokens:
        verifier.verify(token)
    assert [verifier.known(token) is not None for token in tokens] == [False, True, True]


def test_a_provider_that_is_down_is_503_until_it_is_back(provider: Provider, clock: Clock) -> None:
    issuer, token = provider.issuer, provider.token()
    provider.stop()
    verifier = OidcVerifier(issuer, AUDIENCE, "roles")
    with pytest.raises(ProblemError) as refused:
        verifier.verify(token)
    assert refused.value.status == 503 and 1 <= int(refused.value.headers["Retry-After"]) <= module.REFRESH_SECONDS
    assert status_of(verifier, token) == 503
    assert status_of(verifier, "x") == 401, "what is no token needs no provider"


def test_fetched_keys_go_on_while_the_provider_is_down(
    verifier: OidcVerifier, provider: Provider, clock: Clock
) -> None:
    verifier.verify(provider.token())
    provider.stop()
    assert verifier.verify(provider.token(sub="another"))
    clock.passed += module.KEYS_SECONDS + 1
    later = int(time.time()) + 3600
    assert verifier.verify(provider.token(sub="another", exp=later))
    assert status_of(verifier, provider.token(idp.RSA[1], "second", exp=later)) == 503
    assert status_of(verifier, provider.token(idp.RSA[1], exp=later)) == 401


def test_who_has_a_key_does_not_wait_for_a_slow_provider(
    verifier: OidcVerifier, provider: Provider, clock: Clock
) -> None:
    verifier.verify(provider.token())
    clock.passed += module.KEYS_SECONDS + 1  # both would ask the provider
    provider.before_answer.clear()
    asked = len(provider.requests)
    slow = threading.Thread(target=lambda: status_of(verifier, provider.token(key_id="unknown")))
    slow.start()
    deadline = time.monotonic() + 120
    while len(provider.requests) == asked:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert verifier.verify(provider.token(sub="another"))
    assert slow.is_alive()
    provider.before_answer.set()
    slow.join()


def test_a_provider_that_never_answers_is_given_up(
    verifier: OidcVerifier, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 0.2)
    provider.before_answer.clear()
    assert status_of(verifier, provider.token()) == 503


@pytest.mark.parametrize(
    "discovery",
    [
        {"issuer": "http://127.0.0.1:1"},
        {"jwks_uri": "http://203.0.113.1/keys"},
        {"jwks_uri": "file:///etc/passwd"},
        {"jwks_uri": 7},
        {"jwks_uri": None},
    ],
    ids=str,
)
def test_a_discovery_document_of_another_is_not_followed(provider: Provider, discovery: dict[str, Any]) -> None:
    provider.discovery = discovery
    assert status_of(OidcVerifier(provider.issuer, AUDIENCE, "roles"), provider.token()) == 503
    assert "/keys" not in provider.requests


def test_keys_are_not_fetched_without_tls_from_elsewhere(provider: Provider) -> None:
    # An address that leads here, and is not called this machine's.
    provider.discovery = {"jwks_uri": provider.issuer.replace("127.0.0.1", "0.0.0.0") + "/keys"}
    assert status_of(OidcVerifier(provider.issuer, AUDIENCE, "roles"), provider.token()) == 503
    assert "/keys" not in provider.requests


@pytest.mark.parametrize("keys", [None, 7, ["x"], [{"kid": "first", "kty": "RSA"}], [None]], ids=str)
def test_nonsense_for_keys_is_no_internal_error(provider: Provider, keys: Any) -> None:
    provider.keys = keys
    assert status_of(OidcVerifier(provider.issuer, AUDIENCE, "roles"), provider.token()) in (401, 503)


def test_documents_have_a_largest_size(
    verifier: OidcVerifier, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGEST_DOCUMENT_BYTES", 100)
    assert status_of(verifier, provider.token()) == 503


@pytest.mark.parametrize(
    "issuer", ["http://login.example", "login.example", "ftp://127.0.0.1", "http://[", "http://127.0.0.1.example"]
)
def test_a_provider_without_tls_is_refused(issuer: str) -> None:
    with pytest.raises(ConfigError, match="must be an https address, or http on this machine"):
        OidcVerifier(issuer, AUDIENCE, "roles")


@pytest.mark.parametrize("issuer", ["https://login.example/realms/lab", "http://localhost:8080", "http://[::1]:80/x"])
def test_issuers_that_are_accepted(issuer: str) -> None:
    OidcVerifier(issuer, AUDIENCE, "roles")
