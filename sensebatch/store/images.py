"""Images as files: PNG, WebP or JPEG with the settings that made them and where they come from.

The same arrays give the same bytes: no times are written. Knows nothing of folders.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo, putchunk

from sensebatch.config import OutputConfig
from sensebatch.declarations import stated
from sensebatch.errors import ImageFileError
from sensebatch.jobs import EngineInfo, Job
from sensebatch.store.provenance import SOFTWARE, public_name, xmp_packet

EXTENSIONS = {"png": "png", "webp": "webp", "jpeg": "jpg"}
"""File name ending of each image format."""

FORMATS = ("PNG", "WEBP", "JPEG")
"""What Pillow calls them."""

METADATA_KEY = "sensebatch"
"""Keyword of the PNG text chunk that holds the settings as JSON."""
XMP_KEY = "XML:com.adobe.xmp"
"""Keyword of the one that holds XMP."""

_PNG_HEADER_BYTES = 33
"""A PNG begins with its signature and the chunk IHDR; text may follow."""
_USER_COMMENT = 0x9286
_EXIF_IFD = 0x8769
_EXIF_ASCII = b"ASCII\0\0\0"
_MAX_EXIF_PROMPT = 4000
"""Characters of the prompt that go into EXIF; a JPEG has room for 64 KiB, six bytes a character
at worst."""


def image_metadata(job: Job, key: str, info: EngineInfo, index: int) -> dict[str, Any]:
    """Returns what is embedded in an image: the prompt, the seed and every setting.

    Args:
        job: The job that made it.
        key: The job's key.
        info: What drew it.
        index: Which of the job's images it is, from 0.
    """
    size, identity = job.resolution, info.identity
    assert size is not None
    return {
        "id": job.id,
        "task": job.task,
        "prompt": job.prompt,
        "seed": job.seed,
        "width": size.width,
        "height": size.height,
        "think": job.think,
        "system_prompt": job.system_prompt,
        "input_max_pixels": job.input_max_pixels,
        "input_sha256": [image.sha256 for image in job.images],
        "image_index": index,
        "sampling": stated(job.sampling),
        "software": SOFTWARE,
        "model": public_name(info.model),
        "model_license": info.model_license,
        "checkpoint": identity.checkpoint,
        "lora": identity.lora,
        "dtype": identity.dtype,
        "precision": identity.precision,
        "key": key,
    }


def encode_job_image(
    job: Job,
    key: str,
    pixels: np.ndarray,
    index: int,
    *,
    output: OutputConfig,
    info: EngineInfo,
) -> bytes:
    """Returns one image of a job as the bytes of its file.

    Args:
        job: The job that made it.
        key: The job's key.
        pixels: uint8 `[height, width, 3]`.
        index: Which of the job's images it is, from 0.
        output: How images are written.
        info: The engine that drew it.

    Raises:
        ValueError: The array is not an image of the job's size.
    """
    size = job.resolution
    if size is None or pixels.shape[:2] != (size.height, size.width):
        raise ValueError(f"expected an image of {size}, found an array {list(pixels.shape)}")
    return encode_image(pixels, output, image_metadata(job, key, info, index))


def encode_image(pixels: np.ndarray, output: OutputConfig, metadata: dict[str, Any]) -> bytes:
    """Returns an image as the bytes of a file.

    Args:
        pixels: uint8 `[height, width, 3]`.
        output: The format, its quality, and whether `metadata` is embedded.
        metadata: What JSON can hold.

    Raises:
        ValueError: The array is not an image.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(
            f"expected uint8 pixels [height, width, 3], found {pixels.dtype} {list(pixels.shape)}"
        )
    pixels = np.ascontiguousarray(pixels)
    embedded = metadata if output.embed_metadata else None
    if output.image_format == "png":
        return _png(pixels, embedded)
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    if output.image_format == "webp":
        image.save(
            buffer,
            "WEBP",
            quality=output.image_quality,
            lossless=output.image_quality == 100,
            exif=_exif(embedded),
            xmp=_xmp(embedded),
        )
    elif output.image_format == "jpeg":
        image.save(
            buffer,
            "JPEG",
            quality=output.image_quality,
            subsampling=0,
            exif=_exif(embedded),
            xmp=_xmp(embedded),
        )
    else:
        raise ValueError(f"expected png, webp or jpeg, found {output.image_format!r}")
    return buffer.getvalue()


def read_metadata(image: Image.Image) -> dict[str, Any] | None:
    """Returns what `encode_image` embedded in an image, or None."""
    text = getattr(image, "text", {}).get(METADATA_KEY)
    if text is None:
        comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
        if not isinstance(comment, bytes) or not comment.startswith(_EXIF_ASCII):
            return None
        text = comment.removeprefix(_EXIF_ASCII).decode("ascii")
    return json.loads(text)


def metadata_of(path: Path) -> dict[str, Any]:
    """Returns what `encode_image` embedded in an image file.

    Raises:
        ImageFileError: It is not an image that sensebatch wrote with its settings.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            metadata = read_metadata(image)
    except UnidentifiedImageError:
        raise ImageFileError(f"{path}: expected a PNG, WebP or JPEG image") from None
    except (OSError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageFileError(f"{path}: cannot be read: {reason}") from None
    except (ValueError, SyntaxError) as error:
        raise ImageFileError(f"{path}: its metadata cannot be read: {error}") from None
    if not isinstance(metadata, dict):
        raise ImageFileError(
            f"{path}: expected an image with its prompt and settings, found one without; it was "
            "made with --no-embed-metadata or not by sensebatch, or was saved again since"
        )
    return metadata


def with_xmp(packet: bytes | None) -> PngInfo:
    """Returns what a PNG is saved with to have XMP; nothing where there is none.

    Args:
        packet: As `image.info["xmp"]` has it.
    """
    info = PngInfo()
    if packet:
        info.add_itxt(XMP_KEY, packet.decode())
    return info


def _png(pixels: np.ndarray, metadata: dict[str, Any] | None) -> bytes:
    """Returns an image as a PNG with one filter, and only runs of bytes compressed.

    An encoder that tries all five filters on each row, which takes longer than everything else,
    chooses this one for nearly all rows of a photograph. In grain, a search for repeats finds next
    to nothing.
    """
    png = imagecodecs.png_encode(
        pixels,
        level=1,
        strategy=imagecodecs.PNG.STRATEGY.RLE,
        filter=imagecodecs.PNG.FILTER.PAETH,
    )
    return b"".join((png[:_PNG_HEADER_BYTES], _png_text(metadata), png[_PNG_HEADER_BYTES:]))


def _png_text(metadata: dict[str, Any] | None) -> bytes:
    """Returns chunks with metadata."""
    if metadata is None:
        return b""
    info = with_xmp(_xmp(metadata))
    info.add_itxt(METADATA_KEY, json.dumps(metadata, ensure_ascii=False))
    buffer = io.BytesIO()
    for name, content, _ in info.chunks:
        putchunk(buffer, name, content)
    return buffer.getvalue()


def _xmp(metadata: dict[str, Any] | None) -> bytes:
    return b"" if metadata is None else xmp_packet(metadata)


def _exif(metadata: dict[str, Any] | None) -> bytes:
    if metadata is None:
        return b""
    prompt, system = metadata["prompt"], metadata["system_prompt"]
    cut = {"prompt": prompt[:_MAX_EXIF_PROMPT], "system_prompt": system and system[:1000]}
    text = json.dumps({**metadata, **cut}, ensure_ascii=True)
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _EXIF_ASCII + text.encode("ascii")
    return exif.tobytes()
