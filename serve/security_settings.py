"""Where the endpoint listens, who may ask it, and how often."""

import ipaddress
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from models.settings import Settings


class RateSettings(Settings):
    """How often a client may ask one replica: a bucket of `burst` requests that fills again at a steady rate."""

    requests_per_second: float = Field(
        gt=0,
        allow_inf_nan=False,
        description="Requests a second that each replica takes of one client.",
    )
    burst: int | None = Field(
        None, ge=1, description="Requests that may come at once; by default those of one second, at least one."
    )


class JwtSettings(Settings):
    """Tokens (JWT) of an identity provider, taken beside or instead of API keys."""

    issuer: str = Field(min_length=1, description="The issuer, exactly as tokens name it in `iss`.")
    audience: str = Field(min_length=1, description="What tokens for this endpoint name in `aud`.")
    jwks_url: str | None = Field(None, description="Where the issuer publishes its public keys; https.")
    jwks_file: str | None = Field(None, description="A file with them instead, on every node at the same path.")
    scope_claim: str = Field(
        "scope", min_length=1, description="The claim with the scopes: words with spaces between, or a list."
    )
    leeway_s: float = Field(30.0, ge=0, le=600, description="Seconds by which the issuer's clock may differ.")

    @model_validator(mode="after")
    def _has_one_source(self) -> "JwtSettings":
        if (self.jwks_url is None) == (self.jwks_file is None):
            raise ValueError("give either jwks_url or jwks_file, where the issuer's public keys are")
        if self.jwks_url is not None:
            url = urlsplit(self.jwks_url)
            if url.scheme != "https" and not (url.scheme == "http" and is_loopback(url.hostname or "")):
                raise ValueError(f"jwks_url is {self.jwks_url}, but keys can be trusted only if they come by https")
        return self


class TlsSettings(Settings):
    """The endpoint's certificate. It serves where the cluster is this machine alone; elsewhere TLS stands before it."""

    certificate: str = Field(description="A PEM file: the certificate, then those between it and the root.")
    key: str = Field(description="A PEM file: its private key, without a password.")


class ExposureSettings(Settings):
    """The endpoint's address, and who may ask it."""

    host: str = Field(
        "127.0.0.1",
        description="The address to listen on; 0.0.0.0 for all, which a cluster of several nodes needs. "
        "Anything but loopback demands API keys or tokens.",
    )
    port: int = Field(8000, ge=1, le=65535, description="The port to listen on.")
    keys: bool | None = Field(
        None, description="Whether API keys are demanded; by default, wherever host is not loopback."
    )
    jwt: JwtSettings | None = Field(None, description="Tokens of an identity provider that are taken too.")
    open: bool = Field(False, description="Lets anyone who reaches the address ask, without keys or tokens.")
    rate: RateSettings | None = Field(
        None, description="How often one client may ask each replica: by key or token, else by address."
    )
    tls: TlsSettings | None = Field(None, description="Makes the endpoint speak HTTPS.")

    @model_validator(mode="after")
    def _is_guarded(self) -> "ExposureSettings":
        if self.open and (self.keys or self.jwt):
            named = "keys" if self.keys else "jwt"
            raise ValueError(f"open is true, which lets anyone ask, but {named} is set too; leave one of them out")
        if not (self.guarded or self.open or self.on_loopback):
            raise ValueError(
                f"host is {self.host}, which others can reach, and keys is false; leave keys out, set jwt, or set open "
                "to true to let anyone ask"
            )
        return self

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the endpoint."""
        return is_loopback(self.host)

    @property
    def accepts_keys(self) -> bool:
        """Whether API keys open the endpoint."""
        return self.keys if self.keys is not None else not (self.on_loopback or self.open)

    @property
    def guarded(self) -> bool:
        """Whether a key or a token is needed."""
        return self.accepts_keys or self.jwt is not None


def is_loopback(host: str) -> bool:
    """Whether an address reaches this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
