"""The connection to a server: TLS, retries, keepalive."""

import dataclasses
import json
import os
import pathlib
import re

import grpc

from pwiser_serving import services

# Only a call that reached no server is tried again: scoring twice is harmless, but a server that
# fails for another reason needs less work, not more.
_RETRY = {
    "name": [{"service": services.PREDICT.service}, {"service": services.GET_MODEL_STATUS.service}],
    "retryPolicy": {
        "maxAttempts": 4,
        "initialBackoff": "0.1s",
        "maxBackoff": "1s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    },
}
_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # gRPC keeps requests for a retry up to this many bytes; the default, 256 KiB, is less than
    # 1000 rows.
    ("grpc.per_rpc_retry_buffer_size", 2**30),
    # So that the retries find a server that comes back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A server with gRPC's defaults, such as TF Serving, disconnects a client that pings more often
    # than every five minutes, or without a running call. The second value finds a peer that is
    # gone: on Linux it also bounds how long sent bytes may stay unacknowledged.
    ("grpc.keepalive_time_ms", 360_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
]

# The variables that gRPC's core reads: in each group the first that is set.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_NO_PROXIES = ("no_grpc_proxy", "no_proxy")

_SCHEME = re.compile(r"dns:(//[^/]*/)?|ipv[46]:")
_LOOPBACK = re.compile(r"(localhost|127(\.\d+){3}|::1|\[::1\])(:\d+)?", re.IGNORECASE)

Path = str | os.PathLike


@dataclasses.dataclass(frozen=True)
class TLS:
    """Settings of a TLS connection.

    Attributes:
      root_certificates: a PEM file with the authorities to trust; None for gRPC's own list.
      private_key, certificate_chain: PEM files that identify this client (mutual TLS), both or
        neither.
      server_name: the name in the server's certificate; None for the address's host.
    """

    root_certificates: Path | None = None
    private_key: Path | None = None
    certificate_chain: Path | None = None
    server_name: str | None = None


def is_local(address: str) -> bool:
    """Whether an address is this machine: a Unix socket, or only loopback addresses."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    hosts = _SCHEME.sub("", address, count=1)
    return all(map(_LOOPBACK.fullmatch, hosts.split(",")))


def proxy(address: str) -> str | None:
    """The environment variable that makes gRPC use a proxy for this address, and its value without
    user and password: "http_proxy=http://proxy:3128". None if there is none."""
    name, value = _first_set(_PROXIES)
    # gRPC uses only HTTP proxies.
    if is_local(address) or not value.lower().startswith("http://"):
        return None
    host = _SCHEME.sub("", address, count=1).rsplit(":", 1)[0].strip("[]").lower()
    exempt = [entry.strip().lower() for entry in _first_set(_NO_PROXIES)[1].split(",")]
    if host.endswith(tuple(filter(None, exempt))):
        return None
    return f"{name}={re.sub('//.*@', '//', value)}"


def _first_set(names: tuple[str, ...]) -> tuple[str, str]:
    """The first of these environment variables that is set, and its value; "" if none is."""
    return next(((name, os.environ[name]) for name in names if name in os.environ), ("", ""))


def open_channel(address: str, tls: TLS | None, *, several_servers: bool) -> grpc.Channel:
    """A channel to the address. It connects at the first call, to loopback without a proxy.

    Args:
      several_servers: spread the calls over all servers of the address; otherwise they go to the
        first that answers.

    Raises:
      ValueError: a file of `tls` is missing or wrong.
    """
    config = {"methodConfig": [_RETRY]}
    if several_servers:
        config["loadBalancingConfig"] = [{"round_robin": {}}]
    options = [*_OPTIONS, ("grpc.service_config", json.dumps(config))]
    if is_local(address):
        options.append(("grpc.enable_http_proxy", 0))
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    if tls.server_name:
        options += [
            ("grpc.ssl_target_name_override", tls.server_name),
            ("grpc.default_authority", tls.server_name),
        ]
    return grpc.secure_channel(address, _credentials(tls), options=options)


def _credentials(tls: TLS) -> grpc.ChannelCredentials:
    # Checked here: gRPC would fail at the first call, with a message that names no file.
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    roots = _read("root_certificates", tls.root_certificates)
    if roots is not None:
        try:
            context.load_verify_locations(cadata=roots.decode("ascii"))
        except (ssl.SSLError, UnicodeDecodeError):
            raise ValueError(
                f"TLS: root_certificates {tls.root_certificates}: found no PEM, expected "
                "certificates"
            ) from None
    key = _read("private_key", tls.private_key)
    chain = _read("certificate_chain", tls.certificate_chain)
    if (key is None) != (chain is None):
        raise ValueError("TLS: private_key and certificate_chain go together, found one of them")
    if key is not None:
        try:
            # Without a password OpenSSL would ask for one at the terminal.
            context.load_cert_chain(tls.certificate_chain, tls.private_key, password="")
        except ssl.SSLError:
            raise ValueError(
                f"TLS: {tls.private_key} and {tls.certificate_chain}: expected a private key "
                "without a password, and the certificate that belongs to it, in PEM"
            ) from None
    return grpc.ssl_channel_credentials(roots, key, chain)


def _read(name: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"TLS: {name} {path}: {error.strerror}") from None
