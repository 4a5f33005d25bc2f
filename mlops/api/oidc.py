"""Bearer tokens of an identity provider (OpenID Connect Discovery 1.0), checked with its published keys (RFC 7517)."""

import hashlib
import ipaddress
import threading
import time
from collections import OrderedDict
from typing import Any
from urllib.parse import urlsplit

import httpx
import jwt

from ldm3d.errors import ConfigError
from mlops.api.callers import Caller, Role
from mlops.api.problems import ProblemError

# Signatures by a private key alone. With `none` or HS256 anybody could sign: the public key is public.
ALGORITHMS = ("RS256", "PS256", "ES256", "EdDSA")
TIMEOUT_SECONDS = 5
LARGEST_DOCUMENT_BYTES = 1 << 20
LEEWAY_SECONDS = 30
# An unknown key id asks the provider again, but forged ones must not make this service flood it.
REFRESH_SECONDS = 30
# A key that the provider has taken back is forgotten after this time, if the provider can be reached.
KEYS_SECONDS = 600
KNOWN_SECONDS, MAX_KNOWN = 60, 10_000
LONGEST_SUBJECT = 255


class OidcVerifier:
    """Checks tokens of one provider.

    Args:
        issuer: address of the provider, as `iss` of its tokens has it; https, or http on this machine.
        audience: what `aud` must name.
        roles_claim: claim that names roles, text or a list of texts; `realm_access.roles` goes into nested claims.

    Raises:
        ConfigError: the issuer is no such address.
    """

    def __init__(self, issuer: str, audience: str, roles_claim: str):
        if not _acceptable(issuer):
            raise ConfigError(f"LDM3D_OIDC_ISSUER {issuer!r}: must be an https address, or http on this machine")
        self._issuer, self._audience, self._roles_claim = issuer, audience, roles_claim
        self._keys: dict[str, dict[str, Any]] = {}
        self._fetched = self._tried = float("-inf")
        self._failed = False
        self._fetching, self._remembering = threading.Lock(), threading.Lock()
        self._known: OrderedDict[bytes, tuple[float, Caller]] = OrderedDict()

    def known(self, token: str) -> Caller | None:
        """The caller of a token that was verified within the last minute and has not expired since; does not block."""
        found = self._known.get(_digest(token))
        return found[1] if found and time.time() < found[0] else None

    def verify(self, token: str) -> Caller:
        """The caller whom a token names. May wait for the provider for seconds: not for the event loop.

        Raises:
            ProblemError: 401, the token proves nobody; 403, it names no role; 503, the provider cannot be asked.
        """
        try:
            claims = self._claims(token)
        except jwt.ExpiredSignatureError as error:
            raise _refused("the token has expired") from error
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            raise _refused(f"the token is not valid: {type(error).__name__}") from error
        subject = claims["sub"]
        if not 1 <= len(subject) <= LONGEST_SUBJECT:
            raise _refused("the token's sub must have 1 to 255 characters")
        role = _highest_role(_claim(claims, self._roles_claim))
        if role is None:
            wanted = ", ".join(map(str, Role))
            raise ProblemError(403, "No role", f"the token's claim {self._roles_claim} has none of {wanted}")
        name = claims.get("preferred_username") or claims.get("name") or subject
        caller = Caller(f"oidc:{subject}", str(name)[:LONGEST_SUBJECT], role)
        self._remember(token, min(float(claims["exp"]), time.time() + KNOWN_SECONDS), caller)
        return caller

    def _claims(self, token: str) -> dict[str, Any]:
        header = jwt.get_unverified_header(token)
        algorithm = header.get("alg")
        if algorithm not in ALGORITHMS:
            raise jwt.InvalidAlgorithmError
        key = self._key(header.get("kid"))
        if key.get("alg", algorithm) != algorithm:
            raise jwt.InvalidAlgorithmError
        return jwt.decode(
            token,
            jwt.PyJWK(key, algorithm),
            [algorithm],
            audience=self._audience,
            issuer=self._issuer,
            leeway=LEEWAY_SECONDS,
            options={"require": ["iss", "aud", "exp", "sub"], "enforce_minimum_key_length": True},
        )

    def _key(self, key_id: str | None) -> dict[str, Any]:
        """The provider's key, fetched anew if it is unknown or the keys are old, where that may be done again."""
        if time.monotonic() - self._fetched > KEYS_SECONDS or _choose(self._keys, key_id) is None:
            self._refresh(key_id)
        key = _choose(self._keys, key_id)
        if key is None and self._failed:
            wait = max(1, round(self._tried + REFRESH_SECONDS - time.monotonic()))
            raise ProblemError(
                503, "Provider unreachable", "the identity provider does not answer", headers={"Retry-After": str(wait)}
            )
        if key is None:
            raise jwt.InvalidKeyError
        return key

    def _refresh(self, key_id: str | None) -> None:
        # Who has a key goes on with it while another thread fetches; who has none waits for it.
        if not self._fetching.acquire(blocking=_choose(self._keys, key_id) is None):
            return
        try:
            if time.monotonic() - self._tried < REFRESH_SECONDS:
                return
            self._tried = time.monotonic()
            self._keys, self._failed = self._fetch(), False
            self._fetched = time.monotonic()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, TypeError, KeyError, AttributeError):
            self._failed = True
        finally:
            self._fetching.release()

    def _fetch(self) -> dict[str, dict[str, Any]]:
        """The provider's signing keys by id."""
        # A proxy of the environment is for the world outside.
        with httpx.Client(timeout=TIMEOUT_SECONDS, trust_env=not _on_this_machine(self._issuer)) as client:
            discovery = _get(client, f"{self._issuer.rstrip('/')}/.well-known/openid-configuration")
            if discovery["issuer"] != self._issuer or not _acceptable(discovery["jwks_uri"]):
                raise ValueError("the discovery document is not the issuer's")
            keys = _get(client, discovery["jwks_uri"])["keys"]
        return {str(key.get("kid", "")): key for key in keys if key.get("use", "sig") == "sig"}

    def _remember(self, token: str, until: float, caller: Caller) -> None:
        with self._remembering:
            self._known[_digest(token)] = (until, caller)
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)


def _get(client: httpx.Client, address: str) -> Any:
    """A JSON document of bounded size, within a bounded time however slowly it drips."""
    deadline, content = time.monotonic() + TIMEOUT_SECONDS, b""
    with client.stream("GET", address, headers={"Accept": "application/json"}) as answer:
        answer.raise_for_status()
        for piece in answer.iter_bytes():
            content += piece
            if len(content) > LARGEST_DOCUMENT_BYTES or time.monotonic() > deadline:
                raise ValueError("too large or too slow")
    return httpx.Response(200, content=content).json()


def _choose(keys: dict[str, dict[str, Any]], key_id: str | None) -> dict[str, Any] | None:
    """A token may leave its key's id out where the provider has one key only."""
    if key_id is None:
        return next(iter(keys.values())) if len(keys) == 1 else None
    return keys.get(key_id)


def _claim(claims: dict[str, Any], name: str) -> Any:
    """A claim by its name, or by the path of a nested one: names that are addresses have dots of their own."""
    found: Any = claims
    for part in [name] if name in claims else name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _highest_role(value: Any) -> Role | None:
    names = value if isinstance(value, list) else [value]
    return max((role for role in map(Role.named, names) if role), default=None)


def _refused(detail: str) -> ProblemError:
    return ProblemError(401, "Not authenticated", detail, headers={"WWW-Authenticate": 'Bearer error="invalid_token"'})


def _acceptable(address: str) -> bool:
    return address.startswith("https://") or (address.startswith("http://") and _on_this_machine(address))


def _on_this_machine(address: str) -> bool:
    try:
        host = urlsplit(address).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
