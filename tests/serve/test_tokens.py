"""Tokens of an identity provider: only those that it signed, for this endpoint, of now, open it."""

import asyncio
import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from pydantic import ValidationError

from cluster.store import ClusterError
from models.settings import InputError
from serve import tokens
from serve.access import Caller
from serve.exposure import check_exposure
from serve.guard import Guard
from serve.problems import ProblemError
from serve.security_settings import JwtSettings, RateSettings
from serve.settings import ServeSettings
from serve.tokens import SigningKeys, TokenVerifier, fetch
from tests.serve.test_rates import Clock

ISSUER, AUDIENCE = "https://id.example/", "shoal"
PRIVATE: dict[str, Any] = {
    "RS256": rsa.generate_private_key(65537, 2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
_AS_JWK: dict[str, Callable[..., Any]] = {
    "RS256": RSAAlgorithm.to_jwk,
    "ES256": ECAlgorithm.to_jwk,
    "EdDSA": OKPAlgorithm.to_jwk,
}


def jwk(algorithm: str, kid: str | None = None) -> dict[str, Any]:
    """The public key as issuers publish it."""
    found = {**_AS_JWK[algorithm](PRIVATE[algorithm].public_key(), as_dict=True), "use": "sig"}
    return {**found, **({} if kid == "" else {"kid": kid or algorithm})}


def token(algorithm: str = "RS256", *, kid: str | None = None, key: Any = None, **claims: Any) -> bytes:
    """A token that is good but for what is given; a claim of None is left out."""
    now = time.time()
    usual = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "exp": now + 300, "nbf": now - 5, "scope": "classify other"}
    given = {name: value for name, value in (usual | claims).items() if value is not None}
    headers = {} if kid == "" else {"kid": kid or algorithm}
    return jwt.encode(given, key or PRIVATE[algorithm], algorithm, headers).encode()


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The issuer's file with its public keys."""
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [jwk(name) for name in PRIVATE]}))
    return path


@pytest.fixture
def its_settings(published: Path) -> JwtSettings:
    return JwtSettings(issuer=ISSUER, audience=AUDIENCE, jwks_file=str(published), leeway_s=2)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def verifier(its_settings: JwtSettings, clock: Clock) -> TokenVerifier:
    return TokenVerifier(its_settings, SigningKeys(its_settings, clock))


def caller(verifier: TokenVerifier, shown: bytes) -> Caller:
    return asyncio.run(verifier.caller(shown))


def refusal(verifier: TokenVerifier, shown: bytes) -> str:
    with pytest.raises(ProblemError) as refused:
        caller(verifier, shown)
    assert refused.value.status == 401
    assert refused.value.headers == {"WWW-Authenticate": 'Bearer error="invalid_token"'}
    return refused.value.detail


@pytest.mark.parametrize("algorithm", PRIVATE)
def test_what_the_issuer_signed_is_taken(verifier: TokenVerifier, algorithm: str) -> None:
    expires = time.time() + 100
    found = caller(verifier, token(algorithm, exp=expires))
    assert (found.identity, found.scopes) == ("token ada", {"classify"})
    assert found.expires == pytest.approx(expires + 2)


@pytest.mark.parametrize(
    ("claims", "sentence"),
    [
        ({"exp": time.time() - 10}, "The token has expired; get a new one."),
        ({"nbf": time.time() + 3600}, "The token is not valid yet."),
        ({"iss": "https://id.example"}, "The token comes from another issuer than this endpoint trusts."),
        ({"aud": "other"}, "The token is meant for another audience than this endpoint."),
        ({"aud": None}, "The token must have the claims exp, iss and aud."),
        ({"iss": None}, "The token must have the claims exp, iss and aud."),
        ({"exp": None}, "The token must have the claims exp, iss and aud."),
        ({"exp": "soon"}, "This is no valid token."),
    ],
)
def test_claims_are_checked(verifier: TokenVerifier, claims: dict[str, Any], sentence: str) -> None:
    assert refusal(verifier, token(**claims)) == sentence
    assert caller(verifier, token(aud=["other", AUDIENCE], exp=time.time() - 1)), "clocks may differ by the leeway"


def test_only_signatures_by_a_key_pair_of_the_issuers_are_taken(verifier: TokenVerifier, published: Path) -> None:
    other = rsa.generate_private_key(65537, 2048)
    assert refusal(verifier, token(key=other)) == "This is no valid token."
    header, body, signature = token().split(b".")
    unsigned = base64.urlsafe_b64encode(b'{"alg":"none","kid":"RS256"}').rstrip(b"=")
    for forged in (
        b".".join([unsigned, body, b""]),
        b".".join([header, body, b""]),
        b".".join([header, base64.urlsafe_b64encode(b'{"scope":"admin"}').rstrip(b"="), signature]),
        # The public key, which all know, taken for a shared secret.
        _hmac_signed(PRIVATE["RS256"].public_key()),
        # Signed with one of its keys by another's name.
        token("ES256", kid="RS256"),
    ):
        assert refusal(verifier, forged) == "This is no valid token."
    secret = base64.urlsafe_b64encode(b"s" * 32).decode().rstrip("=")
    published.write_text(json.dumps({"keys": [{"kty": "oct", "k": secret, "kid": "shared", "alg": "HS256"}]}))
    with pytest.raises(ClusterError, match="holds no public key that signs tokens"):
        fetch(JwtSettings(issuer=ISSUER, audience=AUDIENCE, jwks_file=str(published)))


def _hmac_signed(public: Any) -> bytes:
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    head = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"RS256"}').rstrip(b"=")
    body = token().split(b".")[1]
    mac = base64.urlsafe_b64encode(hmac.digest(pem, head + b"." + body, hashlib.sha256)).rstrip(b"=")
    return b".".join([head, body, mac])


@pytest.mark.parametrize(
    ("claims", "scopes"),
    [
        ({"scope": "metrics classify"}, {"metrics", "classify"}),
        ({"scope": ["admin", 3, "x"]}, {"admin"}),
        ({"scope": {"admin": True}}, set()),
        ({"scope": None}, set()),
    ],
)
def test_scopes_are_words_or_a_list(verifier: TokenVerifier, claims: dict[str, Any], scopes: set[str]) -> None:
    assert caller(verifier, token(**claims)).scopes == scopes


def test_a_single_key_needs_no_name(published: Path, its_settings: JwtSettings) -> None:
    published.write_text(json.dumps({"keys": [jwk("ES256", "")]}))
    verifier = TokenVerifier(its_settings, SigningKeys(its_settings))
    assert caller(verifier, token("ES256", kid=""))
    published.write_text(json.dumps({"keys": [jwk("ES256"), jwk("RS256")]}))
    verifier = TokenVerifier(its_settings, SigningKeys(its_settings))
    assert refusal(verifier, token("ES256", kid="")).startswith("The token is signed by a key that its issuer")


def test_a_new_key_is_fetched_but_not_for_every_token(
    published: Path, verifier: TokenVerifier, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetches: list[float] = []
    real = tokens.fetch
    monkeypatch.setattr(tokens, "fetch", lambda given: fetches.append(clock.now) or real(given))
    published.write_text(json.dumps({"keys": [jwk("RS256")]}))
    assert caller(verifier, token())
    published.write_text(json.dumps({"keys": [jwk("ES256")]}))
    unknown = "The token is signed by a key that its issuer does not publish."
    clock.now += tokens.RETRY_S - 1
    assert [refusal(verifier, token("ES256")) for _ in range(3)] == [unknown] * 3
    assert len(fetches) == 1
    clock.now += 1
    assert caller(verifier, token("ES256"))
    assert len(fetches) == 2
    assert refusal(verifier, token()) == unknown, "one that was withdrawn is taken no longer"


def test_a_key_that_was_withdrawn_is_noticed_after_a_while(
    published: Path, verifier: TokenVerifier, clock: Clock
) -> None:
    shown = token()
    assert caller(verifier, shown) is caller(verifier, shown), "it is verified once"
    published.write_text(json.dumps({"keys": [jwk("ES256")]}))
    clock.now += tokens.LIFETIME_S - 1
    assert caller(verifier, shown)
    clock.now += 1
    assert refusal(verifier, shown).startswith("The token is signed by a key that its issuer")


def test_an_issuer_that_cannot_be_reached(
    published: Path, verifier: TokenVerifier, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    text = published.read_text()
    published.unlink()
    with pytest.raises(ProblemError) as refused:
        caller(verifier, token())
    assert (refused.value.status, refused.value.headers) == (503, {"Retry-After": "30"})
    published.write_text(text)
    clock.now += tokens.RETRY_S
    shown = token()
    assert caller(verifier, shown)
    published.write_text("[]")
    clock.now += tokens.LIFETIME_S
    assert caller(verifier, shown), "the keys last known stay"
    assert "cannot get the issuer's keys from" in caplog.text
    assert shown.decode() not in caplog.text


@given(
    shown=st.binary(max_size=200)
    | st.lists(st.binary(max_size=40).map(base64.urlsafe_b64encode), min_size=2, max_size=4).map(b".".join)
    | st.sampled_from([b"[" * 20_000, b'{"kid": 3}', b'{"alg": "RS256", "kid": []}', b"null"]).map(
        lambda header: base64.urlsafe_b64encode(header) + b".e30.e30"
    )
)
@settings(max_examples=200)
def test_whatever_is_shown_is_refused_and_nothing_fails(shown: bytes) -> None:
    its = JwtSettings(issuer=ISSUER, audience=AUDIENCE, jwks_file="/nowhere")
    signing = SigningKeys(its, lambda: 0.0)
    signing.known = {"RS256": jwt.PyJWK(jwk("RS256"))}
    signing._tried = 0.0
    refusal(TokenVerifier(its, signing), shown)


def test_the_guard_takes_tokens_by_their_scopes_and_rates(verifier: TokenVerifier, its_settings: JwtSettings) -> None:
    clock = Clock()
    clock.now = time.time()
    given = ServeSettings(jwt=its_settings, rate=RateSettings(requests_per_second=1, burst=2))
    guard = Guard(given, tokens=verifier, now=clock)

    def ask(shown: bytes, path: str = "/v1/classify", header: bytes = b"authorization") -> int:
        scope = {
            "method": "POST",
            "path": path,
            "headers": [(header, b"Bearer " + shown if header == b"authorization" else shown)],
        }
        try:
            asyncio.run(guard.admit(scope))
        except ProblemError as refused:
            return refused.status
        return 200

    shown = token()
    assert [ask(shown), ask(token(jti="another")), ask(token(jti="a third"))] == [200, 200, 429], (
        "one subject, one rate"
    )
    assert ask(token(sub="bob")) == 200
    assert ask(shown, "/metrics") == 403
    assert ask(b"shoal_00000000_x") == 401
    assert ask(shown, header=b"x-api-key") == 401
    clock.now += 400
    assert ask(shown) == 401, "it was remembered, and has expired since"


def test_wrong_settings_are_told() -> None:
    usual = {"issuer": ISSUER, "audience": AUDIENCE}
    for wrong in ({}, {"jwks_url": "https://x/k", "jwks_file": "k"}):
        with pytest.raises(ValidationError, match="give either jwks_url or jwks_file"):
            JwtSettings.model_validate({**usual, **wrong})
    for url in ("http://id.example/keys", "file:///etc/passwd", "id.example/keys"):
        with pytest.raises(ValidationError, match="can be trusted only if they come by https"):
            JwtSettings.model_validate({**usual, "jwks_url": url})
    assert JwtSettings.model_validate({**usual, "jwks_url": "http://127.0.0.1:1/keys"})


def test_keys_are_fetched_from_where_the_issuer_publishes_them(published: Path) -> None:
    answers = {"/keys": (200, {}), "/moved": (302, {"Location": "/keys"})}

    class Issuer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers = answers[self.path]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(published.read_bytes())

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    with HTTPServer(("127.0.0.1", 0), Issuer) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            given = JwtSettings(issuer=ISSUER, audience=AUDIENCE, jwks_url=f"{url}/keys")
            assert set(fetch(given)) == set(PRIVATE)
            with pytest.raises(ClusterError, match="cannot get the issuer's keys from"):
                fetch(given.model_copy(update={"jwks_url": f"{url}/moved"}))
        finally:
            server.shutdown()


def test_keys_that_cannot_be_had_are_told_at_the_start() -> None:
    for where in ({"jwks_file": "/nowhere/keys.json"}, {"jwks_url": "http://127.0.0.1:1/keys"}):
        given = ServeSettings(jwt=JwtSettings(issuer=ISSUER, audience=AUDIENCE, **where))
        with pytest.raises(
            (ClusterError, InputError), match=f"cannot get the issuer's keys from {next(iter(where.values()))}"
        ):
            check_exposure(given, None)
