"""Certificates and keys of a deployment: made once, found again, a certificate renewed before it expires.

Each folder is for one reader, so that a container is given only what its role needs::

    authority/ca.key                       signs certificates; nobody but `fedcil deploy pki` reads it
    public/ca.pem, public/nodes/0000.pub   for everyone: whom to trust, and which nodes may join
    server/server.pem, server.key          the SuperLink's certificate and key
    server/superexec.secret                shared by SuperLink and server app
    nodes/0000/key                         one key for each node that may join
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from filelock import FileLock

from fedcil.errors import InputError
from fedcil.files import write_atomic

PEM = serialization.Encoding.PEM
PLAIN = serialization.NoEncryption()
SECRET_BYTES = 32
RENEW_AT = 0.2  # of a certificate's life that is left
MOST_DAYS = 36_500.0  # the authority's holds ten times as long, and no calendar goes beyond the year 9999
SIGNS_CERTIFICATES = x509.KeyUsage(
    digital_signature=False,
    key_cert_sign=True,
    crl_sign=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    encipher_only=False,
    decipher_only=False,
)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pki:
    """Where things are below ``folder``."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "public" / "ca.pem"

    @property
    def ca_key(self) -> Path:
        return self.folder / "authority" / "ca.key"

    @property
    def certificate(self) -> Path:
        return self.folder / "server" / "server.pem"

    @property
    def server_key(self) -> Path:
        return self.folder / "server" / "server.key"

    @property
    def secret(self) -> Path:
        return self.folder / "server" / "superexec.secret"

    def node_key(self, slot: int) -> Path:
        return self.folder / "nodes" / f"{slot:04d}" / "key"

    def node_public(self, slot: int) -> Path:
        return self.folder / "public" / "nodes" / f"{slot:04d}.pub"


def make_pki(folder: Path, *, hosts: Sequence[str], nodes: int, days: float = 365.0) -> Pki:
    """Everything that is not there yet; running it again changes nothing.

    ``hosts``: every name and address by which the SuperLink is called. ``nodes``: how many may join. Raises InputError
    for a host or days that no certificate can have, and where something cannot be written or is damaged.
    """
    pki = Pki(folder)
    if not days <= MOST_DAYS:  # nor nan
        raise InputError(
            f"a certificate cannot hold for {days:g} days",
            where="--days",
            allowed=f"at most {MOST_DAYS:g}",
            next="give fewer: running this again renews what is about to expire",
        )
    names = x509.SubjectAlternativeName([_host(host) for host in hosts])
    try:
        pki.ca_key.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(pki.ca_key.parent / ".lock"):
            authority = _authority(pki, days)
            _server_certificate(pki, authority, names, days)
            if not pki.secret.exists():
                new_secret(pki.secret)
            for slot in range(nodes):
                _node_key(pki, slot)
    except OSError as error:
        raise InputError(
            f"certificates and keys cannot be written: {error.strerror}",
            where=str(error.filename or folder),
            next="make the folder writable, or give another",
        ) from None
    return pki


@dataclass(frozen=True, slots=True)
class _Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def _authority(pki: Pki, days: float) -> _Authority:
    if pki.ca.exists() and pki.ca_key.exists():
        certificate = _load(pki.ca, x509.load_pem_x509_certificate)
        if not _expires(certificate):
            return _Authority(certificate, _load_key(pki.ca_key))
    key, name = ec.generate_private_key(ec.SECP384R1()), _name("fedcil authority")
    builder = (
        _builder(name, name, key.public_key(), 10 * days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(SIGNS_CERTIFICATES, critical=True)
    )
    authority = _Authority(builder.sign(key, hashes.SHA384()), key)
    _write_key(pki.ca_key, key)
    _write(pki.ca, authority.certificate.public_bytes(PEM), mode=0o644)
    return authority


def _server_certificate(pki: Pki, authority: _Authority, names: x509.SubjectAlternativeName, days: float) -> None:
    if pki.certificate.exists() and pki.server_key.exists():
        old = _load(pki.certificate, x509.load_pem_x509_certificate)
        if _signed_by(old, authority) and _names(old) == names and not _expires(old):
            return
    key = ec.generate_private_key(ec.SECP384R1())
    issuer = authority.certificate
    builder = (
        _builder(_name("fedcil superlink"), issuer.subject, key.public_key(), days)
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()),
            critical=False,
        )
    )
    _write_key(pki.server_key, key)
    _write(pki.certificate, builder.sign(authority.key, hashes.SHA384()).public_bytes(PEM), mode=0o644)


def _node_key(pki: Pki, slot: int) -> None:
    """Flower wants a NIST curve, the private half in OpenSSH's form, the public half as one line of SSH's."""
    private, public = pki.node_key(slot), pki.node_public(slot)
    if not private.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        _write(private, key.private_bytes(PEM, serialization.PrivateFormat.OpenSSH, PLAIN))
    half = _load(private, lambda content: serialization.load_ssh_private_key(content, None)).public_key()
    line = half.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    if not public.exists() or public.read_bytes() != line:  # of a private half that was lost
        _write(public, line, mode=0o644)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    end = now + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - timedelta(minutes=5))  # clocks differ a little
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _expires(certificate: x509.Certificate) -> bool:
    """Whether less than ``RENEW_AT`` of its life is left."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return datetime.now(UTC) > end - RENEW_AT * (end - begin)


def _signed_by(certificate: x509.Certificate, authority: _Authority) -> bool:
    try:
        certificate.verify_directly_issued_by(authority.certificate)
    except Exception:  # another name, another key, another algorithm
        return False
    return True


def _names(certificate: x509.Certificate) -> x509.SubjectAlternativeName:
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if re.fullmatch(r"[A-Za-z0-9_.*-]+", host):
            return x509.DNSName(host)
    raise InputError(
        f"{host!r} is no name or address of a host",
        where="--host",
        allowed="an IP address, or a name of letters a to z, digits, - and . without a port",
        next="give it without a port; a name with other letters in the form that begins with xn--",
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = _load(path, lambda content: serialization.load_pem_private_key(content, None))
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def _load(path: Path, read: Callable[[bytes], T]) -> T:
    try:
        return read(path.read_bytes())
    except ValueError as error:
        raise InputError(
            f"this is no key or certificate: {error}",
            where=str(path),
            next="put back what was there, or delete it: a new one is made",
        ) from None


def new_secret(path: Path) -> Path:
    """What Flower's processes of one machine know each other by."""
    _write(path, secrets.token_bytes(SECRET_BYTES))
    return path


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    _write(path, key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, PLAIN))


def _write(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Whole or absent, and private from its first moment on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = os.umask(0o777 & ~mode)
    try:
        write_atomic(path, content)
    finally:
        os.umask(old)
