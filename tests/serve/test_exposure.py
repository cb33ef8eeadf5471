"""What is refused at the start, and HAProxy with Ray's own configuration, mended, before a real endpoint."""

import contextlib
import datetime as dt
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions
from upath import UPath

from cluster.store import ClusterError
from models.engine import Engine
from models.settings import InputError
from models.torch_engine import load_torch_engine
from recipes.endpoint import KEY_VARIABLE, ask, key_to_ask_with
from serve import ingress
from serve.exposure import check_certificate, check_exposure, check_ingress
from serve.guard import Guard
from serve.haproxy import expect_end, write_starter
from serve.keys import create_key, revoke_key
from serve.known_keys import KnownKeys
from serve.rates import TokenBuckets
from serve.security_settings import RateSettings, TlsSettings, is_loopback
from serve.settings import ServeSettings
from tests.serve.endpoint import problem_of, raw, running
from tests.serve.test_rates import Clock
from tests.small_classifiers import make_classifier


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True)]
    + [(host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "127.example.com", "localhost.example.com", "")],
)
def test_what_only_this_machine_reaches(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


def test_a_public_address_is_guarded_unless_said_otherwise() -> None:
    assert not ServeSettings().guarded
    assert ServeSettings(keys=True).accepts_keys
    assert ServeSettings(host="0.0.0.0").accepts_keys
    assert not ServeSettings(host="0.0.0.0", open=True).guarded
    tokens = {"issuer": "i", "audience": "a", "jwks_file": "k"}
    assert ServeSettings.model_validate({"host": "0.0.0.0", "keys": False, "jwt": tokens}).guarded
    with pytest.raises(ValidationError, match=r"host is 10\.0\.0\.1, which others can reach, and keys is false; leave"):
        ServeSettings(host="10.0.0.1", keys=False)
    for contradiction in ({"keys": True}, {"jwt": tokens}):
        with pytest.raises(ValidationError, match=r"open is true, which lets anyone ask, but (keys|jwt) is set too"):
            ServeSettings.model_validate({"open": True, **contradiction})


def test_an_endpoint_that_no_key_opens_does_not_start(tmp_path: Path) -> None:
    store = UPath(tmp_path)
    public, private = ServeSettings(host="0.0.0.0"), ServeSettings(keys=True)
    for settings in (public, private):
        with pytest.raises(InputError, match=r"holds no valid API key; make one with `shoal keys create NAME"):
            check_exposure(settings, store)
    key, _ = create_key(store, "a")
    check_exposure(public, store)
    check_exposure(private, store)
    revoke_key(store, key.id)
    with pytest.raises(
        InputError, match=r"serve.host is 0\.0\.0\.0, which others can reach, but .*set serve.open=true"
    ):
        check_exposure(public, store)
    with pytest.raises(InputError, match="was given no store"):
        check_exposure(public, None)
    check_exposure(ServeSettings(host="0.0.0.0", open=True), None)
    check_exposure(ServeSettings(), None)


def test_what_a_cluster_cannot_do_is_told() -> None:
    tls = TlsSettings(certificate="c", key="k")
    rate = RateSettings(requests_per_second=1)
    with pytest.raises(ClusterError, match=r"serve\.tls works where the cluster is this machine alone"):
        check_ingress(ServeSettings(host="0.0.0.0", tls=tls), alone=False)
    with pytest.raises(ClusterError, match=r"serve\.rate counts by the client's address"):
        check_ingress(ServeSettings(host="0.0.0.0", open=True, rate=rate), alone=False)
    check_ingress(ServeSettings(host="0.0.0.0", rate=rate), alone=False)
    check_ingress(ServeSettings(host="0.0.0.0", open=True, rate=rate, tls=tls), alone=True)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What Ray Serve is started with on a cluster that this command made, and what the cluster then knows."""
    told: dict[str, Any] = {}
    session = SimpleNamespace(get_session_dir_path=lambda: str(tmp_path))
    monkeypatch.setattr(ingress.ray._private.worker, "_global_node", session)
    monkeypatch.setattr(ingress.ray, "nodes", lambda: [{"Alive": True}])
    monkeypatch.setattr(ingress, "is_own", lambda: True)
    monkeypatch.setattr(ingress, "_running_address", lambda: told.get("running"))
    monkeypatch.setattr(ingress.ray_serve, "start", lambda **options: told.update(options))
    monkeypatch.setattr(ingress, "_internal_kv_put", lambda key, value, **_: told.update({"address": value}))
    monkeypatch.setattr(ingress, "_internal_kv_get", lambda key, **_: told.get("address"))
    return told


def test_on_one_machine_haproxy_alone_is_reached_from_elsewhere(started: dict[str, Any], tmp_path: Path) -> None:
    port = free_port()
    ingress.start_ingress(ServeSettings(host="0.0.0.0", port=port))
    assert (started["http_options"].host, started["http_options"].port) == ("127.0.0.1", port)
    starter = (tmp_path / "shoal-haproxy" / "start-haproxy").read_text()
    assert f"bind 0.0.0.0:{port}|" in starter
    ingress.start_ingress(ServeSettings(port=port))
    assert started["http_options"].host == "127.0.0.1"
    assert "bind 0.0.0.0" not in (tmp_path / "shoal-haproxy" / "start-haproxy").read_text()


def test_on_a_cluster_that_nodes_join_each_has_rays_own(
    started: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingress, "is_own", lambda: False)
    ingress.start_ingress(ServeSettings(host="0.0.0.0", port=free_port()))
    assert started["http_options"].host == "0.0.0.0"
    assert "RAY_SERVE_HAPROXY_BINARY_PATH" not in started["controller_options"].runtime_env["env_vars"]
    with pytest.raises(ClusterError, match=r"serve\.tls works where"):
        ingress.start_ingress(ServeSettings(host="0.0.0.0", tls=TlsSettings(certificate="c", key="k")))


def test_what_is_running_already_is_not_taken_for_safer_than_it_is(started: dict[str, Any]) -> None:
    """Without keys on loopback is fine; but not where an endpoint listens to others already."""
    public = ServeSettings(host="0.0.0.0", port=free_port(), open=True)
    ingress.start_ingress(public)
    started["running"] = ("127.0.0.1", public.port)
    ingress.start_ingress(public)
    with pytest.raises(
        ClusterError, match=r"serves at 0\.0\.0\.0 without TLS already; stop that endpoint, or set serve"
    ):
        ingress.start_ingress(ServeSettings(port=public.port))
    with pytest.raises(ClusterError, match=r"serves at 0\.0\.0\.0 without TLS already"):
        ingress.start_ingress(public.model_copy(update={"tls": TlsSettings(certificate="c", key="k")}))
    del started["address"]
    started["running"] = ("0.0.0.0", public.port)
    with pytest.raises(ClusterError, match=r"serves at 0\.0\.0\.0 without TLS already"):
        ingress.start_ingress(ServeSettings(port=public.port))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def make_certificate(folder: Path, name: str = "endpoint") -> TlsSettings:
    """A certificate that signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
    certificate = builder.not_valid_before(now).not_valid_after(now + dt.timedelta(1)).sign(key, hashes.SHA256())
    files = folder / f"{name}.pem", folder / f"{name}.key"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    pkcs8 = serialization.PrivateFormat.PKCS8
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, pkcs8, plain))
    return TlsSettings(certificate=str(files[0]), key=str(files[1]))


def test_a_certificate_that_does_not_serve_is_told(tmp_path: Path) -> None:
    good, other = make_certificate(tmp_path), make_certificate(tmp_path, "other")
    check_certificate(good)
    (tmp_path / "locked").write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nx\n-----END ENCRYPTED PRIVATE KEY-----\n")
    (tmp_path / "damaged").write_text("-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n")
    for changes, sentence in (
        ({"certificate": "/nowhere/c.pem"}, r"serve\.tls\.certificate: /nowhere/c\.pem cannot be read: No such file"),
        ({"certificate": good.key}, r"serve\.tls\.certificate: .* holds no certificate in PEM form"),
        ({"key": good.certificate}, r"serve\.tls\.key: .* holds no key in PEM form"),
        ({"key": str(tmp_path / "locked")}, "needs a password, which nobody could type"),
        ({"key": other.key}, "does not belong to the certificate"),
        ({"certificate": str(tmp_path / "damaged")}, r"cannot be used with \(OpenSSL: "),
    ):
        with pytest.raises(InputError, match=sentence):
            check_certificate(good.model_copy(update=changes))


def test_asking_needs_a_key_where_the_endpoint_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert key_to_ask_with(ServeSettings()) is None
    with pytest.raises(InputError, match="set the environment variable SHOAL_API_KEY"):
        key_to_ask_with(ServeSettings(keys=True))
    monkeypatch.setenv(KEY_VARIABLE, "shoal_x")
    assert key_to_ask_with(ServeSettings(keys=True)) == "shoal_x"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return load_torch_engine(make_classifier(tmp_path_factory.mktemp("single")), precision="fp32")


@contextlib.contextmanager
def proxied(folder: Path, replica: str | None, tls: TlsSettings | None) -> Iterator[int]:
    """The port of HAProxy as Ray configures it, before one replica, started as Shoal starts it."""
    port = free_port()
    configuration = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=1),
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        has_received_routes=True,
        has_received_servers=True,
        metrics_enabled=False,
    )
    servers = [ServerConfig("replica", "127.0.0.1", int(replica.rsplit(":", 1)[1]))] if replica else []
    # A real replica answers this for Ray; the endpoint in a plain uvicorn has its own.
    backend = BackendConfig("app", "/", servers=servers, http_health_check_path="/healthz", app_name="shoal")
    path = folder / "haproxy.cfg"
    HAProxyApi(configuration, {"app": backend}, str(path))._generate_config_file_internal()
    # Their ports may be another's on this machine.
    text = path.read_text().replace(f"bind :{configuration.metrics_port}", f"bind unix@{folder}/metrics")
    path.write_text(text.replace(f"bind *:{configuration.stats_port}", f"bind unix@{folder}/stats"))
    starter = write_starter(folder / "a folder", 1, listen=("127.0.0.2", port), tls=tls, max_wait_s=2)
    with subprocess.Popen([starter, "-db", "-f", str(path)], stderr=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 10
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.2", port)):
                    break
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield port
        finally:
            expect_end(folder / "a folder")
            process.kill()


def test_a_client_behind_haproxy_is_told_by_its_own_address(engine: Engine, tmp_path: Path) -> None:
    settings = ServeSettings(rate=RateSettings(requests_per_second=1))
    guard = Guard(settings, buckets=TokenBuckets(Clock()))
    with running(engine, settings, guard) as replica, proxied(tmp_path, replica, None) as port:
        url = f"http://127.0.0.2:{port}"
        for number, expected in enumerate((200, 429)):
            pretended = {"X-Forwarded-For": f"192.0.2.{number}"}
            found = httpx.get(f"{url}/v1/model", headers=pretended)
            assert found.status_code == expected
            assert "server" not in found.headers
            assert found.headers.get_list("x-frame-options") == ["DENY"]
        # As another client: from an address of its own, not by what it says.
        transport = httpx.HTTPTransport(local_address="127.0.0.3")
        with httpx.Client(transport=transport) as other:
            assert other.get(f"{url}/v1/model").status_code == 200
        assert "cache-control" not in httpx.get(f"{url}/static-offline-docs/swagger-ui.css").headers


def test_tls_ends_in_haproxy(engine: Engine, tmp_path: Path) -> None:
    tls = make_certificate(tmp_path)
    store = UPath(tmp_path / "store")
    _, key = create_key(store, "a")
    settings = ServeSettings(keys=True, tls=tls)
    with (
        running(engine, settings, Guard(settings, KnownKeys(store))) as replica,
        proxied(tmp_path, replica, tls) as port,
    ):
        url = f"https://127.0.0.2:{port}"
        (result,) = ask(url, ["late"], key=key, tls=tls)
        assert result["tokens"] == 3
        with pytest.raises(ClusterError, match=r"refuses \(401\)"):
            ask(url, ["late"], key=f"{key}x", tls=tls)
        with pytest.raises(ClusterError, match="does not answer"):
            ask(url, ["late"], key=key, tls=make_certificate(tmp_path, "other"))
        client = ssl.create_default_context(cafile=tls.certificate)
        client.check_hostname = False
        client.set_alpn_protocols(["h2", "http/1.1"])
        with socket.create_connection(("127.0.0.2", port)) as plain, client.wrap_socket(plain) as connection:
            assert (connection.version(), connection.selected_alpn_protocol()) == ("TLSv1.3", "http/1.1")
        with socket.create_connection(("127.0.0.2", port)) as plain:
            plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200" not in plain.recv(100), "it speaks nothing but HTTPS"


def test_what_haproxy_says_by_itself_has_the_headers_too(tmp_path: Path) -> None:
    with proxied(tmp_path, None, None) as port:
        status, headers, _ = response = raw(f"http://127.0.0.2:{port}", b"GET /v1/model HTTP/1.1\r\nHost: x\r\n\r\n")
    assert problem_of(response)[0] == status == 503
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"].startswith("default-src 'none'; base-uri")
    assert headers["cache-control"] == "no-store"
