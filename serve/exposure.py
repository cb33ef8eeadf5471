"""What must be in order before the endpoint can be reached: its keys, its certificate, what its rate is counted by."""

import ssl
from datetime import UTC, datetime
from pathlib import Path

from upath import UPath

from cluster.store import ClusterError
from models.settings import InputError
from serve.keys import read_keys
from serve.security_settings import ExposureSettings, TlsSettings
from serve.tokens import fetch


def check_exposure(settings: ExposureSettings, store: UPath | None) -> None:
    """Refuses an endpoint that nobody could ask, or whose certificate does not serve.

    Args:
        settings: the endpoint's.
        store: the root of the store with the API keys.

    Raises:
        ClusterError: the keys cannot be read, or those of the tokens' issuer cannot be had.
        InputError: no key opens the endpoint, or the certificate is wrong.
    """
    if settings.tls is not None:
        check_certificate(settings.tls)
    if settings.jwt is not None:
        fetch(settings.jwt)
    if not settings.accepts_keys:
        return
    if store is None:
        raise InputError("serve.keys demands API keys, but this endpoint was given no store that holds them.")
    now = datetime.now(UTC)
    if settings.jwt is None and not any(key.state(now) == "valid" for key in read_keys(store)):
        why = "serve.keys is true" if settings.keys else f"serve.host is {settings.host}, which others can reach"
        otherwise = "" if settings.keys else ", set serve.jwt, or set serve.open=true to let anyone ask"
        raise InputError(
            f"{why}, but {store} holds no valid API key; make one with `shoal keys create NAME --store {store}`"
            f"{otherwise}."
        )


def check_certificate(tls: TlsSettings) -> None:
    """Makes sure that the certificate and the key can be read and belong together.

    Raises:
        InputError: names the setting, the file and what is wrong.
    """
    for setting, name in (("certificate", tls.certificate), ("key", tls.key)):
        try:
            text = Path(name).expanduser().read_bytes()
        except OSError as error:
            raise InputError(f"serve.tls.{setting}: {name} cannot be read: {error.strerror}.") from error
        wanted = b"CERTIFICATE-----" if setting == "certificate" else b"PRIVATE KEY-----"
        if wanted not in text:
            raise InputError(f"serve.tls.{setting}: {name} holds no {setting} in PEM form.")
        if setting == "key" and b"ENCRYPTED" in text:
            raise InputError(f"serve.tls.key: {name} needs a password, which nobody could type; write it without one.")
    certificate, key = Path(tls.certificate).expanduser(), Path(tls.key).expanduser()
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        mismatch = "MISMATCH" in (error.reason or "")
        what = "does not belong to" if mismatch else f"cannot be used with (OpenSSL: {error.reason})"
        raise InputError(f"serve.tls.key: {tls.key} {what} the certificate {tls.certificate}.") from error


def check_ingress(settings: ExposureSettings, *, alone: bool) -> None:
    """Refuses what only an HAProxy that Shoal starts itself can do, which it does where the cluster is one machine.

    Raises:
        ClusterError: names the setting and what would be right.
    """
    if alone:
        return
    if settings.tls is not None:
        raise ClusterError(
            "serve.tls works where the cluster is this machine alone; leave it out here and let a load balancer that "
            "speaks TLS stand before the endpoint."
        )
    if settings.rate is not None and not settings.guarded:
        raise ClusterError(
            "serve.rate counts by the client's address, which replicas of a cluster are not told; demand API keys "
            "(serve.keys=true), or leave serve.rate out."
        )
