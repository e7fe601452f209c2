"""Whom a client of servers believes: the certificates of the system, or one's own."""

from __future__ import annotations

import ssl
from pathlib import Path


def context(ca_file: str | None) -> ssl.SSLContext | bool:
    """What a client verifies servers with; True for the usual authorities.

    Raises:
        ValueError: the file holds no certificate.
        OSError: it cannot be read.
    """
    if ca_file is None:
        return True
    path = Path(ca_file).expanduser()
    path.read_bytes()  # ssl's own error names no file
    try:
        return ssl.create_default_context(cafile=str(path))
    except ssl.SSLError as error:
        raise ValueError(f"ca_file '{path}' holds no certificate in PEM: {error.reason}") from None


def check_pair(certificate: Path | None, key: Path | None) -> bool:
    """Whether a server is to encrypt: with a certificate (and those it rests on) and its key.

    Raises:
        ValueError: one without the other, or files that do not belong together.
        OSError: one cannot be read.
    """
    if certificate is None and key is None:
        return False
    if certificate is None or key is None:
        raise ValueError("--tls-cert and --tls-key belong together: give both, or none")
    for path in (certificate, key):
        path.read_bytes()
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        raise ValueError(
            f"--tls-cert '{certificate}' and --tls-key '{key}' are not a certificate in PEM and "
            f"its key without a password: {error.reason or error}"
        ) from None
    return True
