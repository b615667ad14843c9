"""Encoded images to pixels: the one decoder that validation and runs share.

Knows formats, orientation, colour profiles and transparency. Reads no files; resizes nothing but
huge JPEG images, which it decodes at half of their sides.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 178_956_970
"""Most pixels of an image, and the most that a user can allow; Pillow decodes no more."""
MAX_FILE_BYTES = 2**30
"""Largest file that is read as an image."""
REDUCED_PIXELS = 2**26
"""JPEG images of more pixels are decoded at half of their sides, which is still more than any
checkpoint looks at."""

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000")
"""What Pillow decodes by itself; for some other formats it starts programs."""
_SUFFIXES = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "WEBP": ".webp",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "PPM": ".ppm",
    "TGA": ".tga",
    "JPEG2000": ".jp2",
    "AVIF": ".avif",
}
"""How the files of what is decoded are named, by Pillow's names of formats."""
_ORIENTATION = 0x0112
_MAX_PROFILE_BYTES = 2**24
_SRGB_TOLERANCE = 2
"""Levels that the profiles called sRGB differ by."""

_BROKEN = (
    ArithmeticError,
    EOFError,
    LookupError,
    OSError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What Pillow's decoders raise on bytes that are not a whole image."""

_STARTS = (
    (b"%!PS", "an EPS drawing"),
    (b"\xc5\xd0\xd3\xc6", "an EPS drawing"),
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"version https://git-lfs", "a Git LFS pointer, whose file `git lfs pull` fetches"),
)
_TEXTS = (
    (b"<svg", "an SVG drawing"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
)
_HEIF_BRANDS = frozenset([b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"])


class _WithoutWarnings:
    """A context in which warnings are ignored, for any number of threads at a time.

    Python's own context puts back what it found, which may be what another thread has set.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._kept = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_inside:
                self._kept = warnings.catch_warnings()
                self._kept.__enter__()
                warnings.simplefilter("ignore")
            self._num_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if not self._num_inside:
                self._kept.__exit__(None, None, None)


_WITHOUT_WARNINGS = _WithoutWarnings()


class UnusableImageError(Exception):
    """Why an image cannot be an input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """What validation keeps of an image."""

    height: int
    """Pixels, after its corrections."""
    width: int
    """Pixels, after its corrections."""
    corrections: str
    """What is done to the stored pixels: of `orientation`, `profile`, `alpha16` and `reduced`,
    joined by `+`; empty where they are used as stored."""


def check_image(content: bytes, *, as_stored: bool, max_pixels: int = MAX_PIXELS) -> ImageFacts:
    """Returns the facts of an encoded image after decoding all of it.

    Args:
        content: An image file's bytes.
        as_stored: Whether orientation and colour profile are to be ignored, as by the reference.
        max_pixels: Most pixels it may have.

    Raises:
        UnusableImageError: It is not an image, or damaged, or too large, or of an unknown range.
    """
    with _opened(content, max_pixels) as (image, profile):
        size, mode = image.size, image.mode
        if _is_jpeg(image):
            # An eighth of the size costs an eighth of the transform, yet decodes the whole stream.
            image.draft("L", (image.width // 8, image.height // 8))
        image.load()
        _check_mode(image)
        if image.format == "TIFF":
            # Pillow turns these itself, while it loads them.
            size = image.size
        corrections = [] if as_stored else _corrections(image, profile, size, mode)
        turned = _orientation(image) if "orientation" in corrections else 1
    width, height = size if turned < 5 else size[::-1]
    return ImageFacts(height=height, width=width, corrections="+".join(corrections))


def decode_image(
    content: bytes, *, corrections: str | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Returns an encoded image as RGB, or as L where it is opaque grey; transparency becomes white.

    An animation gives its first frame.

    Args:
        content: An image file's bytes.
        corrections: As `check_image` found them; no others are made. None finds them here.
        max_pixels: Most pixels it may have.

    Raises:
        UnusableImageError: It is not an image, or damaged, or too large, or of an unknown range.
    """
    if corrections is None:
        corrections = check_image(content, as_stored=False, max_pixels=max_pixels).corrections
    wanted = corrections.split("+")
    with _opened(content, max_pixels) as (image, profile):
        if "reduced" in wanted:
            image.draft(image.mode, (image.width // 2, image.height // 2))
        image.load()
        _check_mode(image)
        colours, alpha = _channels(image, keyed="alpha16" in wanted)
        turned = _orientation(image) if "orientation" in wanted else 1
        return _turned(_flattened(colours, alpha, profile if "profile" in wanted else None), turned)


def file_suffix(content: bytes) -> str:
    """Returns the suffix of an encoded image's format, such as `.png`.

    Raises:
        UnusableImageError: It is not an image.
    """
    with _opened(content, MAX_PIXELS) as (image, _):
        return _SUFFIXES[image.format or ""]


@contextmanager
def _opened(content: bytes, max_pixels: int) -> Iterator[tuple[Image.Image, bytes | None]]:
    """Yields an image that is not loaded yet, and its colour profile."""
    # Manifests without input images are read sooner without it.
    from PIL import Image, UnidentifiedImageError

    try:
        # Pillow warns of large photographs, which are fine, and of metadata that is not used.
        with _WITHOUT_WARNINGS:
            content, profile = _pixels_of_png(content)
            with Image.open(io.BytesIO(content), formats=_formats()) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise UnusableImageError(
                        f"expected at most {max_pixels:,} pixels, found {width}x{height}"
                    )
                yield image, profile or image.info.get("icc_profile")
    except UnidentifiedImageError as error:
        raise UnusableImageError(f"expected an image, found {_kind(content)}") from error
    except Image.DecompressionBombError as error:
        raise UnusableImageError(f"expected at most {max_pixels:,} pixels: {error}") from error
    except _BROKEN as error:
        raise UnusableImageError(
            f"expected a complete image, found a damaged one ({error})"
        ) from error


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Returns the formats that this Pillow can be asked for."""
    return (*_FORMATS, "AVIF") if find_spec("PIL.AvifImagePlugin") else _FORMATS


def _kind(content: bytes) -> str:
    """Returns what bytes are that are not an image."""
    if not content:
        return "an empty file"
    for start, kind in _STARTS:
        if content.startswith(start):
            return kind
    if content[4:8] == b"ftyp" and content[8:12] in _HEIF_BRANDS:
        return "a HEIC photo, which has to be converted to JPEG or PNG first"
    beginning = content[:1024].lower()
    return next((kind for text, kind in _TEXTS if text in beginning), "something else")


def _pixels_of_png(content: bytes) -> tuple[bytes, bytes | None]:
    """Returns a PNG without what is not its pixels, and its colour profile.

    Text, times and animation may be huge or damaged without harm to the image, but not to Pillow.
    Other formats are returned as they are.
    """
    place = 8
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content, None
    kept, profile = [memoryview(content)[:place]], None
    while place + 12 <= len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        name, body = content[place + 4 : place + 8], content[place + 8 : end - 4]
        if end > len(content):
            break
        if name == b"iCCP":
            profile = profile or _unpacked_profile(body)
        elif _decides_pixels(name) or (name == b"eXIf" and _is_sound(content[place + 4 : end])):
            kept.append(memoryview(content)[place:end])
        place = end
        if name == b"IEND":
            return b"".join(kept), profile
    # It is cut short; Pillow says where.
    kept.append(memoryview(content)[place:])
    return b"".join(kept), profile


def _decides_pixels(chunk: bytes) -> bool:
    """Whether a PNG's chunk of this name is critical, or its transparency."""
    return chunk[0] & 0x20 == 0 or chunk == b"tRNS"


def _is_sound(chunk: bytes) -> bool:
    """Whether the checksum at the end of a PNG's chunk, without its length, is right."""
    return zlib.crc32(chunk[:-4]) == int.from_bytes(chunk[-4:], "big")


def _unpacked_profile(body: bytes) -> bytes | None:
    """Returns the profile in a PNG's chunk, or None where it is damaged or far too large."""
    unpacking = zlib.decompressobj()
    try:
        profile = unpacking.decompress(body[body.find(b"\0") + 2 :], _MAX_PROFILE_BYTES)
    except zlib.error:
        return None
    return profile if unpacking.eof else None


def _is_jpeg(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO")


def _is_deep(image: Image.Image) -> bool:
    """Whether an image is grey of 16 bits."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def _check_mode(image: Image.Image) -> None:
    """Refuses pixels that cannot become RGB.

    Raises:
        UnusableImageError: The image has 32 bits a channel, whose range is not known, or other
            colours than those of a screen or a printer.
    """
    if image.mode not in _COLOUR_MODES and not _is_deep(image):
        raise UnusableImageError(
            f"expected 8 or 16 bits a channel of grey, RGB or CMYK, found mode {image.mode}"
        )


def _orientation(image: Image.Image) -> int:
    """Returns the orientation that a camera noted, from 1 to 8; 1 where it cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _BROKEN:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _corrections(
    image: Image.Image, profile: bytes | None, size: tuple[int, int], mode: str
) -> list[str]:
    """Returns what `decode_image` has to do, for an image of this size and mode before its load."""
    corrections = []
    if _orientation(image) > 1:
        corrections.append("orientation")
    if profile and _to_srgb(profile, _COLOUR_MODES.get(mode, "L")) is not None:
        corrections.append("profile")
    if _is_deep(image) and "transparency" in image.info:
        corrections.append("alpha16")
    if _is_jpeg(image) and size[0] * size[1] > REDUCED_PIXELS:
        corrections.append("reduced")
    return corrections


_COLOUR_MODES = {
    **dict.fromkeys(("1", "L", "LA", "La"), "L"),
    **dict.fromkeys(("P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "YCbCr", "HSV"), "RGB"),
    "CMYK": "CMYK",
}
"""What the colours of each mode of Pillow are; a profile is of one of these."""


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> Any:
    """Returns the transform of a profile's colours to sRGB.

    None where there is nothing to do: the profile is sRGB's, or not of such colours, or damaged.
    """
    import numpy as np
    from PIL import Image, ImageCms

    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError):
        return None
    if mode == "CMYK":
        return transform
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
    sample = Image.fromarray(grid) if mode == "RGB" else Image.linear_gradient("L")
    plain, shown = (
        np.asarray(colours.convert("RGB"), dtype=np.int16)
        for colours in (sample, transform.apply(sample))
    )
    return None if abs(plain - shown).max() <= _SRGB_TOLERANCE else transform


def _channels(image: Image.Image, *, keyed: bool) -> tuple[Image.Image, Image.Image | None]:
    """Returns an image's colours as L, RGB or CMYK, and its alpha if it has any.

    Grey of 16 bits keeps its high byte, as Pillow's own conversion would clip it to white.

    Args:
        image: A loaded image.
        keyed: Whether the transparent level of 16 bits counts.
    """
    if _is_deep(image):
        return _deep_channels(image, keyed=keyed)
    colours = _COLOUR_MODES[image.mode]
    if not image.has_transparency_data:
        # Converting to the same mode would copy what may be most of a gigabyte.
        return image if image.mode == colours else image.convert(colours), None
    if image.mode == "La":
        image = image.convert("LA")
    with_alpha = image.convert("RGBA")
    return with_alpha.convert("RGB").convert(colours), with_alpha.getchannel("A")


def _deep_channels(image: Image.Image, *, keyed: bool) -> tuple[Image.Image, Image.Image | None]:
    import numpy as np
    from PIL.Image import fromarray

    levels = np.asarray(image).astype(np.int64)
    grey = fromarray((levels >> 8).clip(0, 255).astype(np.uint8))
    if not keyed:
        return grey, None
    opaque = levels != image.info["transparency"]
    return grey, fromarray(opaque.astype(np.uint8) * 255)


def _flattened(
    colours: Image.Image, alpha: Image.Image | None, profile: bytes | None
) -> Image.Image:
    """Returns colours as L or RGB, those of a profile as sRGB, what is transparent on white."""
    from PIL.Image import new

    transform = None if profile is None else _to_srgb(profile, colours.mode)
    if transform is not None:
        colours = transform.apply(colours)
    if colours.mode == "CMYK":
        colours = colours.convert("RGB")
    if alpha is None:
        return colours
    white = new("RGB", colours.size, (255, 255, 255))
    white.paste(colours.convert("RGB"), mask=alpha)
    return white


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    """Returns an image upright that was stored in one of the eight orientations of EXIF."""
    from PIL.Image import Transpose

    turn = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(orientation)
    return image if turn is None else image.transpose(turn)
