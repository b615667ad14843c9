"""Content Credentials (C2PA): a signature, with the user's certificate, of where an image is from.

The package c2pa-python does it; the extra `c2pa` brings it. A signature is another one each time,
so images are signed where they are published and never where a run writes them.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sensebatch.errors import ConfigError, JobError
from sensebatch.export.samples import ImageFile, Sample
from sensebatch.store.files import reason
from sensebatch.store.provenance import DRAWN, DRAWN_FROM_IMAGES, SOFTWARE

_NEEDED = "--c2pa-certificate"
_TYPES = {
    "png": "image/png",
    "webp": "image/webp",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "tif": "image/tiff",
    "tiff": "image/tiff",
    "gif": "image/gif",
    "avif": "image/avif",
}
"""By the ending of a file's name."""
_PARENT = "input"
"""Joins an edit with the image that it began with, inside of what is signed."""
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


class Signer:
    """Signs images with a certificate; used by several threads.

    Args:
        certificate: A PEM file: the certificate of the key, then those up to the root.
        key: A PEM file: its private key, without a password.
        timestamps: URL of a time stamping authority; None signs without a time.

    Raises:
        ConfigError: The package is missing, or the certificate or its key cannot be used.
    """

    def __init__(self, certificate: Path, key: Path, *, timestamps: str | None = None) -> None:
        try:
            import c2pa
        except ImportError as error:
            raise ConfigError(
                f"{_NEEDED}: a package is missing: pip install 'sensebatch[c2pa]'"
            ) from error
        chain, secret = _read(certificate), _read(key)
        algorithm = _algorithm(certificate, chain, key, secret)
        info = c2pa.C2paSignerInfo(algorithm, chain, secret, timestamps)
        self._c2pa = c2pa
        # Thumbnails would double the bytes of a small image.
        self._context = c2pa.Context.from_dict({"builder": {"thumbnail": {"enabled": False}}})
        try:
            self._signer = c2pa.Signer.from_info(info)
        except c2pa.C2paError as error:
            raise ConfigError(f"{certificate}: cannot be used to sign: {error}") from error
        self.fingerprint = hashlib.sha256(chain).hexdigest()[:16]
        """Tells certificates apart."""

    def __call__(
        self,
        content: bytes,
        file: ImageFile,
        sample: Sample,
        inputs: Sequence[tuple[ImageFile, bytes]],
    ) -> bytes:
        """Returns an image with Content Credentials.

        Args:
            content: The image, in a format that a run writes.
            file: What it is.
            sample: The row that it belongs to.
            inputs: The images that it was made of.

        Raises:
            JobError: It cannot be signed.
        """
        c2pa = self._c2pa
        signed = io.BytesIO()
        # Credentials cannot be read of every format that an input may have.
        known = [(image, original) for image, original in inputs if _media_type(image)]
        source = DRAWN_FROM_IMAGES if inputs else DRAWN
        manifest = _manifest(file, sample.values["model"], source, edits=bool(known))
        try:
            with c2pa.Builder(manifest, self._context) as builder:
                for number, (image, original) in enumerate(known):
                    builder.add_ingredient(
                        _ingredient(image, is_parent=number == 0),
                        _media_type(image),
                        io.BytesIO(original),
                    )
                builder.sign(self._signer, _media_type(file), io.BytesIO(content), signed)
        except c2pa.C2paError as error:
            raise JobError(f"{file.name}: cannot be signed: {error}") from error
        return signed.getvalue()


def _manifest(file: ImageFile, model: str, source: str, *, edits: bool) -> dict[str, Any]:
    """Returns what is signed. An image made of others is an edit of the first of them."""
    name, _, version = SOFTWARE.partition(" ")
    action = {
        "action": "c2pa.edited" if edits else "c2pa.created",
        "digitalSourceType": source,
        "softwareAgent": {"name": model},
    }
    opened = [{"action": "c2pa.opened", "parameters": {"ingredientIds": [_PARENT]}}]
    actions = {"actions": [*(opened if edits else []), action]}
    return {
        "claim_generator_info": [{"name": name, "version": version}],
        "title": file.name,
        "assertions": [{"label": "c2pa.actions.v2", "data": actions}],
    }


def _ingredient(image: ImageFile, *, is_parent: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "title": image.name,
        "relationship": "parentOf" if is_parent else "inputTo",
    }
    return found | ({"label": _PARENT} if is_parent else {})


def _media_type(file: ImageFile) -> str:
    return _TYPES.get(file.name.rpartition(".")[2], "")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: expected a PEM file: {reason(error)}") from error


def _algorithm(certificate: Path, chain: bytes, key: Path, secret: bytes) -> str:
    """Returns how a key signs, after making sure that it is that of the certificate."""
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        own = x509.load_pem_x509_certificates(chain)[0]
    except (ValueError, IndexError) as error:
        raise ConfigError(f"{certificate}: expected certificates in PEM, found others") from error
    try:
        private = load_pem_private_key(secret, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{key}: expected a private key in PEM without a password") from error
    if private.public_key() != own.public_key():
        raise ConfigError(f"{key}: expected the key of {certificate}, found another one")
    if not own.not_valid_before_utc <= datetime.now(UTC) <= own.not_valid_after_utc:
        raise ConfigError(
            f"{certificate}: expected a certificate that is valid today, found one from "
            f"{own.not_valid_before_utc:%Y-%m-%d} to {own.not_valid_after_utc:%Y-%m-%d}"
        )
    match private:
        case EllipticCurvePrivateKey() if private.curve.name in _CURVES:
            return _CURVES[private.curve.name]
        case Ed25519PrivateKey():
            return "ed25519"
        case RSAPrivateKey():
            return "ps256"
    raise ConfigError(f"{key}: expected a key that C2PA knows (P-256, P-384, P-521, Ed25519, RSA)")
