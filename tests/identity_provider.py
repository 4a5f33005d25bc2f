"""An identity provider on this machine: discovery document, published keys, and tokens that it signs."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

AUDIENCE = "ldm3d"
RSA = [rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2)]
EC, ED = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()
LARGE_EC = ec.generate_private_key(ec.SECP384R1())
SMALL_RSA = rsa.generate_private_key(public_exponent=65537, key_size=1024)


def public(key: Any, key_id: str, **more: str) -> dict[str, Any]:
    """A key as the provider publishes it."""
    kind = {rsa.RSAPrivateKey: RSAAlgorithm, ec.EllipticCurvePrivateKey: ECAlgorithm}
    algorithm = next((found for base, found in kind.items() if isinstance(key, base)), OKPAlgorithm)
    found = algorithm.to_jwk(key.public_key(), as_dict=True)
    return {name: value for name, value in found.items() if name != "key_ops"} | {"kid": key_id} | more


class Provider:
    """Serves on a free port of this machine. `requests` holds the paths that were asked for."""

    def __init__(self) -> None:
        self.keys = [public(RSA[0], "first"), public(EC, "ec"), public(ED, "ed")]
        self.requests: list[str] = []
        self.discovery: dict[str, Any] = {}
        self.before_answer = threading.Event()
        self.before_answer.set()
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.requests.append(self.path)
                provider.before_answer.wait(20)
                answers = {
                    "/.well-known/openid-configuration": {
                        "issuer": provider.issuer,
                        "jwks_uri": f"{provider.issuer}/keys",
                        **provider.discovery,
                    },
                    "/keys": {"keys": provider.keys},
                }
                body = json.dumps(answers.get(self.path, {})).encode()
                self.send_response(200 if self.path in answers else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.issuer = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self.before_answer.set()
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def claims(self, **more: Any) -> dict[str, Any]:
        """Claims of a good token; a None takes one away."""
        now = int(time.time())
        good = {"iss": self.issuer, "aud": AUDIENCE, "sub": "u1", "exp": now + 300, "iat": now, "roles": ["operator"]}
        return {name: value for name, value in (good | more).items() if value is not None}

    def token(self, key: Any = RSA[0], key_id: str | None = "first", algorithm: str = "RS256", **claims: Any) -> str:
        headers = {} if key_id is None else {"kid": key_id}
        return jwt.encode(self.claims(**claims), key, algorithm, headers=headers)
