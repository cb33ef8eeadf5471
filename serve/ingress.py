"""Starting what listens: Serve's controller and HAProxy, once for a cluster."""

import contextlib
import json
import socket
from pathlib import Path

import ray
from ray import serve as ray_serve
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from ray.serve.config import ControllerOptions, HTTPOptions
from ray.serve.schema import LoggingConfig

from cluster.connect import is_own
from cluster.store import ClusterError
from models.settings import InputError
from serve.exposure import check_ingress
from serve.haproxy import expect_end, write_starter
from serve.settings import ServeSettings

_NAMESPACE, _ADDRESS = "shoal-endpoint", b"address"
"""Where the cluster's own key-value store says at which host the endpoint was asked for, and whether with TLS."""

_PROXY = {
    # A request that was in the hands of a replica that died is given to another one: classifying changes nothing,
    # so it may be done twice. Until HAProxy has
    # noticed the death, the dead one has the fewest connections and may be chosen again, hence several tries.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_RETRIES": "5",
    # HAProxy is started anew when it has failed three checks in a row; with the 10 s that Ray leaves between them,
    # nobody would answer for half a minute.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "3",
    # On a busy machine it takes longer than three times 5 s to start, and would be killed on its way for ever.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20",
    # HAProxy would send a line about each request to a Python process of Ray's, which takes a quarter of a millisecond
    # to count it, once more: replicas count their requests themselves.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # Looking at all deployments ten times a second, as it does otherwise, is the most that an idle endpoint costs.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
}
"""Environment of Serve's controller, from which HAProxy's settings are taken."""


def start_ingress(settings: ServeSettings) -> bool:
    """Starts Serve's controller and HAProxy, unless they run already at the same address.

    Returns whether it is the HAProxy that `serve.haproxy` configures.

    Raises:
        ClusterError: the port is taken, or the cluster serves elsewhere already.
        InputError: the address cannot work on this cluster.
    """
    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    if settings.on_loopback and nodes > 1:
        raise InputError(
            f"serve.host is {settings.host}, where the replicas of a cluster of {nodes} nodes cannot be reached; "
            "set serve.host=0.0.0.0, make API keys (`shoal keys create NAME`), and mind the firewall."
        )
    # Where nodes come and go, each has an HAProxy of its own, as Ray starts it.
    folder = _folder()
    alone = folder is not None and nodes == 1 and (settings.on_loopback or is_own())
    check_ingress(settings, alone=alone)
    running = _running_address()
    if running is None:
        _require_free_port(settings)
    else:
        _require_same_address(settings, *running)
    variables, host = dict(_PROXY), settings.host
    if alone and folder is not None:
        listen = None
        if settings.tls is not None or not settings.on_loopback:
            listen = settings.host, settings.port
        if not settings.on_loopback:
            host = "127.0.0.1"  # Of all that listens, HAProxy alone is to be reached from elsewhere.
        at_rest = settings.max_body_bytes if settings.min_replicas == 0 else None
        starter = write_starter(
            folder,
            settings.body_timeout_s,
            listen=listen,
            tls=settings.tls,
            rests_with_bodies_of=at_rest,
            max_wait_s=settings.max_wait_s,
        )
        variables["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(starter)
    ray_serve.start(
        http_options=HTTPOptions(host=host, port=settings.port),
        logging_config=LoggingConfig(enable_access_log=False),
        controller_options=ControllerOptions(runtime_env={"env_vars": variables}),
    )
    address = json.dumps([settings.host, settings.tls is not None])
    _internal_kv_put(_ADDRESS, address.encode(), overwrite=True, namespace=_NAMESPACE)
    return alone


def stop_ingress() -> None:
    """Takes down all that Serve runs, its HAProxy too."""
    folder = _folder()
    if folder is not None:
        expect_end(folder)
    ray_serve.shutdown()
    _internal_kv_del(_ADDRESS, namespace=_NAMESPACE)


def _folder() -> Path | None:
    """Of what HAProxy is started with; None where this process is not on one of the cluster's nodes."""
    node = getattr(ray._private.worker, "_global_node", None)
    return None if node is None else Path(node.get_session_dir_path()) / "shoal-haproxy"


def url_of(settings: ServeSettings) -> str:
    """Where this host reaches the endpoint."""
    return f"{'https' if settings.tls else 'http'}://{_reachable(settings.host)}:{settings.port}"


def _running_address() -> tuple[str | None, int] | None:
    with contextlib.suppress(Exception):
        details = ray_serve.context._get_global_client(raise_if_no_controller_running=False)
        if details is not None:
            return details.http_config.host, details.http_config.port
    return None


def _require_same_address(settings: ServeSettings, host: str | None, port: int) -> None:
    """Ray keeps where it listens until it is stopped; another wish would go unheard, and with it what made it safe."""
    if port != settings.port:
        raise ClusterError(f"this cluster serves at port {port} already and a cluster has one; set serve.port={port}.")
    told = _internal_kv_get(_ADDRESS, namespace=_NAMESPACE)
    its_host, encrypted = json.loads(told) if told else (host, False)
    if (its_host, encrypted) != (settings.host, settings.tls is not None):
        raise ClusterError(
            f"this cluster serves at {its_host} {'with' if encrypted else 'without'} TLS already; stop that endpoint, "
            f"or set serve.host={its_host} and serve.tls as there."
        )


def _require_free_port(settings: ServeSettings) -> None:
    """HAProxy shares a port with whoever allows it, so a taken one would go unnoticed."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            address = f"{settings.host}:{settings.port}"
            raise ClusterError(
                f"cannot listen on {address}: {error.strerror}; choose another with serve.port=PORT."
            ) from error


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
