"""One decoder: what validation accepts can be used, upright, in sRGB, to the last row of pixels."""

from __future__ import annotations

import io
import struct
import threading
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from sensebatch import image_files
from sensebatch.image_files import UnusableImageError, check_image, decode_image, file_suffix
from tests.bounds import bounded

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
GREEN = (40, 160, 60)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 60, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def decoded(content: bytes, *, as_stored: bool = False) -> Image.Image:
    """Returns an image as a run has it, after validation."""
    facts = check_image(content, as_stored=as_stored)
    image = decode_image(content, corrections=facts.corrections)
    assert image.mode in ("L", "RGB")
    assert (image.width, image.height) == (facts.width, facts.height)
    return image.convert("RGB")


def chunk(name: bytes, body: bytes, checksum: int | None = None) -> bytes:
    """Returns a chunk of a PNG, with another checksum than the right one if that is given."""
    checksum = zlib.crc32(name + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def with_chunk(png: bytes, added: bytes, *, at_the_end: bool = False) -> bytes:
    place = len(png) - 12 if at_the_end else 33
    return png[:place] + added + png[place:]


@pytest.mark.parametrize("kind", image_files._formats())
def test_a_file_of_every_format_has_its_suffix(kind: str) -> None:
    suffix = file_suffix(encoded(noise(), kind))
    assert Image.registered_extensions()[suffix] == kind
    if kind == "JPEG":
        # As of a camera that adds a preview.
        both = encoded(noise(), "MPO", save_all=True, append_images=[noise()])
        assert file_suffix(both) == suffix


@pytest.mark.parametrize("kind", FORMATS)
def test_a_whole_image_is_accepted(kind: str) -> None:
    assert decoded(encoded(noise(), kind)).size == (60, 40)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("part", [0.0, 0.05, 0.5, 0.95])
def test_a_truncated_image_is_refused(kind: str, part: float) -> None:
    content = encoded(noise(), kind)
    with pytest.raises(UnusableImageError):
        check_image(content[: int(len(content) * part)], as_stored=False)


@settings(max_examples=200)
@given(kind=st.sampled_from(FORMATS), place=st.floats(0, 1), junk=st.binary(min_size=1, max_size=9))
def test_what_is_accepted_can_be_used_whatever_is_damaged(
    kind: str, place: float, junk: bytes
) -> None:
    content = bytearray(encoded(noise(), kind))
    start = int(place * len(content))
    content[start : start + len(junk)] = junk
    with bounded():
        try:
            facts = check_image(bytes(content), as_stored=False)
        except UnusableImageError:
            return
        decoded(bytes(content))
    assert facts.width > 0 < facts.height


def test_pixels_that_are_garbage_are_damage() -> None:
    png = encoded(noise())
    place = png.index(b"IDAT") + 4 + 100
    garbage = png[:place] + bytes(200) + png[place + 200 :]
    with pytest.raises(UnusableImageError, match="expected a complete image, found a damaged one"):
        check_image(garbage, as_stored=False)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_upright_as_every_viewer_shows_them(kind: str, orientation: int) -> None:
    upright = Image.new("RGB", (64, 32), "white")
    upright.paste("red", (0, 0, 32, 16))
    inverse = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    stored = image_files._turned(upright, inverse)
    content = encoded(stored, kind, exif=exif, **options)
    found = np.asarray(decoded(content), dtype=int)
    assert found.shape == (32, 64, 3)
    assert abs(found - np.asarray(upright, dtype=int)).mean() < 3


def test_the_reference_takes_pixels_as_stored_and_so_does_who_asks_for_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(noise(), "JPEG", exif=exif, icc_profile=p3())
    facts = check_image(content, as_stored=True)
    assert (facts.width, facts.height, facts.corrections) == (60, 40, "")
    with Image.open(io.BytesIO(content)) as stored:
        assert decoded(content, as_stored=True).tobytes() == stored.tobytes()
    assert check_image(content, as_stored=False).corrections == "orientation+profile"


def test_broken_exif_is_not_damage() -> None:
    content = encoded(noise(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff junk")
    assert check_image(content, as_stored=False).corrections == ""


def p3() -> bytes:
    """Returns a profile of a wider gamut than sRGB's: its primaries are those of Display P3."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }
    for index in range(struct.unpack(">I", profile[128:132])[0]):
        name, offset = struct.unpack(">4sI", profile[132 + 12 * index : 140 + 12 * index])
        if name in primaries:
            numbers = [round(value * 65536) for value in primaries[name]]
            profile[offset + 8 : offset + 20] = struct.pack(">3i", *numbers)
    return bytes(profile)


STORED_P3 = (79, 157, 75)
"""What `GREEN` is in that profile."""


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(kind, mode) for kind in ("PNG", "TIFF") for mode in ("RGB", "RGBA", "P")]
    + [("JPEG", "RGB"), ("WEBP", "RGB")],
)
def test_colours_are_converted_from_their_profile(kind: str, mode: str) -> None:
    image = Image.new("RGB", (32, 32), STORED_P3)
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    options: dict[str, Any] = {"quality": 100} if kind in ("JPEG", "WEBP") else {}
    content = encoded(image, kind, icc_profile=p3(), **options)
    found = decoded(content).getpixel((5, 5))
    assert found == pytest.approx(GREEN, abs=4)


def test_transparency_of_an_image_with_a_profile_is_white() -> None:
    image = Image.new("RGBA", (32, 32), (*STORED_P3, 0))
    assert decoded(encoded(image, icc_profile=p3())).getpixel((5, 5)) == (255, 255, 255)


def test_the_profile_that_is_that_of_the_screen_changes_no_byte_and_no_key() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    content = encoded(noise(), icc_profile=srgb)
    assert check_image(content, as_stored=False).corrections == ""
    assert decoded(content).tobytes() == noise().tobytes()


@pytest.mark.parametrize("profile", [b"junk", b"", bytes(20_000_000)])
def test_a_broken_profile_is_not_damage(profile: bytes) -> None:
    body = b"icc\0\0" + zlib.compress(profile)
    content = with_chunk(encoded(noise()), chunk(b"iCCP", body))
    assert decoded(content).tobytes() == noise().tobytes()


def test_a_profile_of_other_colours_is_not_used() -> None:
    content = encoded(Image.new("L", (32, 32), 100), icc_profile=p3())
    assert decoded(content).getpixel((0, 0)) == (100, 100, 100)


def test_grey_of_sixteen_bits_keeps_its_levels() -> None:
    levels = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    found = np.asarray(decoded(encoded(Image.fromarray(levels))))
    assert np.array_equal(found[..., 0], levels >> 8)


def test_the_transparent_level_of_sixteen_bits_is_white() -> None:
    levels = np.full((32, 32), 0x1234, np.uint16)
    levels[:, 16:] = 0x1235
    content = encoded(Image.fromarray(levels))
    keyed = with_chunk(content, chunk(b"tRNS", struct.pack(">H", 0x1234)))
    assert check_image(keyed, as_stored=False).corrections == "alpha16"
    found = decoded(keyed)
    assert found.getpixel((5, 5)) == (255, 255, 255)
    assert found.getpixel((20, 5)) == (0x12, 0x12, 0x12)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_of_every_mode_is_flattened_on_white(mode: str) -> None:
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0)).convert(mode)
    flat = image_files._flattened(*image_files._channels(image, keyed=False), None)
    assert flat.getcolors() == [(1024, (255, 255, 255))]


def test_transparent_palette_entry_is_white() -> None:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert decoded(encoded(image, transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert decoded(encoded(image)).getpixel((0, 0)) == (40, 50, 60)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_plain_colours_are_those_of_pillow(mode: str) -> None:
    image = noise().convert(mode)
    content = encoded(image, "TIFF")
    assert decoded(content).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_an_unknown_range_are_refused_when_they_are_validated(mode: str) -> None:
    content = encoded(Image.new(mode, (32, 32)), "TIFF")
    with pytest.raises(UnusableImageError, match=f"8 or 16 bits a channel.*, found mode {mode}"):
        check_image(content, as_stored=False)


HUGE = b"Comment\0\0" + zlib.compress(bytes(3_000_000))


@pytest.mark.parametrize(
    "comment",
    [
        chunk(b"zTXt", HUGE),
        chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"tEXt", b"a\0b", checksum=1),
        chunk(b"eXIf", b"II*\0", checksum=1),
        chunk(b"vpAg", bytes(9), checksum=1),
    ],
    ids=lambda comment: comment[4:8].decode(),
)
@pytest.mark.parametrize("at_the_end", [False, True])
def test_comments_are_not_damage_however_huge_or_wrong(comment: bytes, at_the_end: bool) -> None:
    content = with_chunk(encoded(noise()), comment, at_the_end=at_the_end)
    assert decoded(content).tobytes() == noise().tobytes()


def test_text_of_a_png_is_read_by_nobody() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 100_000, zip=True)
    assert decoded(encoded(noise(), pnginfo=info)).tobytes() == noise().tobytes()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "an empty file"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC photo, which has to be converted"),
        (b'<?xml version="1.0"?>\n<svg width="9">', "an SVG drawing"),
        (b"<!DOCTYPE html><title>404</title>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"%PDF-1.7", "a PDF document"),
        (b"PK\x03\x04....", "a ZIP archive"),
        (b"just text", "something else"),
    ],
)
def test_what_is_not_an_image_is_named(content: bytes, kind: str) -> None:
    with pytest.raises(UnusableImageError, match=f"expected an image, found {kind}"):
        check_image(content, as_stored=False)


def test_postscript_starts_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: Any, **__: Any) -> None:
        pytest.fail("a program was started")

    monkeypatch.setattr("subprocess.Popen", started)
    monkeypatch.setattr("subprocess.check_call", started)
    drawing = encoded(noise(), "EPS")
    with pytest.raises(UnusableImageError, match="expected an image, found an EPS drawing"):
        check_image(drawing, as_stored=False)


def test_an_image_of_more_pixels_than_allowed_is_refused_before_they_are_unpacked() -> None:
    content = encoded(Image.new("1", (4000, 4000)))
    tracemalloc.start()
    with pytest.raises(UnusableImageError, match="at most 1,000,000 pixels, found 4000x4000"):
        check_image(content, as_stored=False, max_pixels=1_000_000)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert check_image(content, as_stored=False).width == 4000


def test_a_bomb_is_refused_whatever_is_allowed() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")
    with pytest.raises(UnusableImageError, match="expected at most"):
        check_image(content, as_stored=False)


def test_huge_jpegs_are_decoded_at_half_of_their_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(noise(400, 300), "JPEG")
    assert check_image(content, as_stored=False).corrections == ""
    monkeypatch.setattr(image_files, "REDUCED_PIXELS", 100_000)
    facts = check_image(content, as_stored=False)
    assert (facts.width, facts.height, facts.corrections) == (400, 300, "reduced")
    assert decode_image(content, corrections=facts.corrections).size == (200, 150)
    assert check_image(content, as_stored=True).corrections == ""


def test_threads_that_decode_together_leave_warnings_as_they_were() -> None:
    """The one that begins first ends first, so that the other outlives it."""
    before = list(warnings.filters)
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first() -> None:
        with image_files._WITHOUT_WARNINGS:
            first_in.set()
            assert second_in.wait(10)
        first_out.set()

    def second() -> None:
        assert first_in.wait(10)
        with image_files._WITHOUT_WARNINGS:
            second_in.set()
            assert first_out.wait(10)
            warnings.warn("of a photograph", UserWarning, stacklevel=1)

    with ThreadPoolExecutor(2) as threads:
        for call in [threads.submit(first), threads.submit(second)]:
            call.result()
    assert list(warnings.filters) == before
    with pytest.warns(UserWarning, match="of a photograph"):
        warnings.warn("of a photograph", UserWarning, stacklevel=1)
