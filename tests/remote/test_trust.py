"""Rewards over TLS: who is believed, and what is said of certificates that are none."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from torch import Tensor

from sfgrpo import cli, rewards
from sfgrpo.remote import trust
from sfgrpo.remote.wire import Limits
from sfgrpo.rewards.base import Metadata
from sfgrpo.serving import app
from sfgrpo.serving.device import Device
from tests.support.served import QUICK, served

IMAGES = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def signed(folder: Path, name: str, password: bytes | None = None) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that vouches for itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    begun = datetime.now() - timedelta(days=2)
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = x509.CertificateBuilder(who, who, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(begun).not_valid_after(begun + timedelta(days=9))
    made = made.add_extension(here, critical=False).sign(key, hashes.SHA256())
    paths = folder / f"{name}.pem", folder / f"{name}.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain, strong = serialization.NoEncryption(), serialization.BestAvailableEncryption
    hidden = strong(password) if password else plain
    form = serialization.PrivateFormat.PKCS8
    paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, form, hidden))
    return paths


def mean(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
    return images.flatten(1).mean(1)


def test_a_server_is_believed_by_its_certificate_alone(tmp_path: Path) -> None:
    certificate, key = signed(tmp_path, "here")
    other, _ = signed(tmp_path, "other")
    device = Device("mean", mean, limits=Limits(), queue=8)
    encrypted: dict[str, Any] = {"ssl_certfile": certificate, "ssl_keyfile": key}
    with served(app.build(device, None), **encrypted) as url:
        assert url.startswith("https://")
        reward = rewards.build("http", url=url, ca_file=str(certificate), **QUICK)
        found = reward(IMAGES, ["a"] * 3, [{}] * 3)
        torch.testing.assert_close(found, mean(IMAGES, [], []))
        for ca_file in (str(other), None):
            with pytest.raises(ValueError, match=r"certificate verify failed"):
                rewards.build("http", url=url, ca_file=ca_file, **{**QUICK, "retries": 0})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda a, b, c: ["--tls-cert", a[0]], "--tls-cert and --tls-key belong together"),
        (lambda a, b, c: ["--tls-key", a[1]], "--tls-cert and --tls-key belong together"),
        (lambda a, b, c: ["--tls-cert", a[0], "--tls-key", b[1]], "KEY_VALUES_MISMATCH"),
        (lambda a, b, c: ["--tls-cert", a[1], "--tls-key", a[1]], "are not a certificate in PEM"),
        (lambda a, b, c: ["--tls-cert", c[0], "--tls-key", c[1]], "its key without a password"),
        (lambda a, b, c: ["--tls-cert", "/no/such", "--tls-key", a[1]], "/no/such"),
    ],
)
def test_a_server_starts_with_what_belongs_together(
    given: Callable[..., list[object]], message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pairs = (signed(tmp_path, "a"), signed(tmp_path, "b"), signed(tmp_path, "c", b"secret"))
    asked = ["serve-reward", "colour", "--port", "0", *map(str, given(*pairs))]
    assert cli.main(asked) == 2
    said = capsys.readouterr().err
    assert said.startswith("sfgrpo serve-reward: ")
    assert message in said
    assert said.count("\n") == 1


def test_a_file_without_a_certificate_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match=r"reward 'vlm': ca_file '.*text' holds no certificate"):
        rewards.build("vlm", url="https://a", model="m", ca_file=str(tmp_path / "text"))
    with pytest.raises(FileNotFoundError, match="no-such"):
        trust.context(str(tmp_path / "no-such"))
