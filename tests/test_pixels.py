"""oasis/pixels.py: the pixels of image files of every kind become grey squares of 8 bits."""
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dataset import load_split
from helpers import png_of, refused, slice_pixels, write_images
from oasis.pixels import pad_to_square, read_grey_png, to_grey

pytestmark = pytest.mark.usefixtures("cache")
GREY = slice_pixels(1, 1, 16)


def only_image(folder, size=16):
    """Return (the only image of a folder, uint8 (size, size); its conversions)."""
    split = load_split(folder, image_size=size)
    return split.images[0, :, :, 0], split.conversions


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff", "bmp", "PNG"])
def test_every_lossless_format_gives_its_pixels(tmp_path, suffix):
    image, conversions = only_image(write_images(tmp_path / "data", [f"a.{suffix}"], GREY))
    assert np.array_equal(image, GREY) and conversions == {}


def test_a_jpeg_gives_the_pixels_that_pillow_decodes(tmp_path):
    path = write_images(tmp_path / "data", ["a.jpg"], GREY) / "a.jpg"
    assert np.array_equal(only_image(path.parent)[0], np.asarray(Image.open(path)))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "CMYK"])
def test_a_grey_image_that_was_saved_as_colour_comes_back_exactly(tmp_path, mode):
    every_grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    suffix = "tif" if mode == "CMYK" else "png"
    (tmp_path / "data").mkdir()
    colour = Image.fromarray(every_grey).convert("RGB" if mode == "CMYK" else mode).convert(mode)
    colour.save(tmp_path / "data" / f"a.{suffix}")
    image, conversions = only_image(tmp_path / "data")
    assert np.array_equal(image, every_grey) and conversions == ({} if mode == "LA" else {"colour became grey": 1})


def test_colours_become_the_luma_of_bt_601():
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 200, 30]]], np.uint8)
    grey, _ = to_grey(Image.fromarray(colours))
    assert np.abs(grey[0] - colours[0] @ [0.299, 0.587, 0.114]).max() <= 0.5


def test_transparent_pixels_become_black():
    rgba = np.full((1, 3, 4), 200, np.uint8)
    rgba[0, :, 3] = 0, 128, 255
    grey, conversions = to_grey(Image.fromarray(rgba))
    assert grey[0, 0] == 0 and abs(int(grey[0, 1]) - 100) <= 1 and grey[0, 2] == 200
    assert "transparent pixels became black" in conversions


@pytest.mark.parametrize("dtype, suffix", [(np.uint16, "png"), (np.uint16, "tif"), (np.int32, "tif"),
                                           (np.float32, "tif")])
def test_deep_pixels_are_scaled_by_the_range_of_their_file(tmp_path, dtype, suffix):
    deep = (1000 + 7 * np.arange(256).reshape(16, 16)).astype(dtype)
    image, conversions = only_image(write_images(tmp_path / "data", [f"a.{suffix}"], deep))
    assert np.array_equal(image, np.arange(256).reshape(16, 16))
    assert conversions == {"16 bits or more became 8, by the range of each file": 1}


def png_of_16_bits(colour, channels):
    """The bytes of a PNG of 1×1 pixels of 16 bits, which Pillow does not write."""
    return png_of([(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, colour, 0, 0, 0)),
                   (b"IDAT", zlib.compress(b"\0" + b"\1\2" * channels)), (b"IEND", b"")])


def tiff_of_16_bits(channels):
    """The bytes of a TIFF of 1×1 pixels, RGB or grey, of 16 bits. Pillow does not write one in colour."""
    tags = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, channels, 122 if channels == 3 else 16), (259, 3, 1, 1),
            (262, 3, 1, 2 if channels == 3 else 1), (273, 4, 1, 128), (277, 3, 1, channels), (278, 3, 1, 1),
            (279, 4, 1, 2 * channels)]
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) +
            bytes(4) + struct.pack("<3H", 16, 16, 16) + b"\1\2" * channels)


@pytest.mark.parametrize("name, data, words", [
    ("a.png", png_of_16_bits(2, 3), "holds 16 bits a channel: save it as 16-bit grey"),
    ("a.png", png_of_16_bits(4, 2), "holds 16 bits a channel"), ("a.png", png_of_16_bits(6, 4), "16 bits a channel"),
    ("a.tif", tiff_of_16_bits(3), "holds 16 bits a channel"), ("a.png", png_of_16_bits(0, 1), None),
    ("a.tif", tiff_of_16_bits(1), None)],
    ids=["RGB PNG", "grey PNG with alpha", "RGBA PNG", "RGB TIFF", "grey PNG", "grey TIFF"])
def test_deep_colour_of_which_pillow_reads_8_bits_is_refused(tmp_path, name, data, words):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(data)
    if words:
        refused(tmp_path / "data", name, words)
    else:
        assert only_image(tmp_path / "data", 1)[0] == 0


def test_deep_pixels_of_one_value_become_black():
    assert not to_grey(Image.fromarray(np.full((2, 2), 500, np.uint16)))[0].any()


def test_exif_rotation_is_honoured(tmp_path):
    """With orientation 6, the rows of the file are the columns of the scene, from right to left."""
    (tmp_path / "data").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(GREY).save(tmp_path / "data" / "a.png", exif=exif)
    image, conversions = only_image(tmp_path / "data")
    assert np.array_equal(image, np.rot90(GREY, -1)) and conversions == {"rotated as their EXIF data say": 1}


@pytest.mark.parametrize("shape", [(4, 10), (10, 4), (5, 10), (9, 10), (3, 3)])
def test_padding_puts_the_image_in_the_middle_of_black(shape):
    image = np.full(shape, 9, np.uint8)
    square, conversions = pad_to_square(image)
    rows, columns = (np.flatnonzero(square.any(axis=axis)) for axis in (1, 0))
    for places, length in (rows, shape[0]), (columns, shape[1]):
        assert len(places) == length and 0 <= (len(square) - 1 - places[-1]) - places[0] <= 1
    assert square.shape == (max(shape),) * 2 and bool(conversions) == (shape[0] != shape[1])


def test_images_of_several_shapes_are_padded_then_averaged(tmp_path):
    wide = np.full((16, 32), 200, np.uint8)
    write_images(tmp_path / "data", ["wide.png"], wide)
    write_images(tmp_path / "data", ["large.png"], np.full((64, 64), 100, np.uint8))
    split = load_split(tmp_path / "data", "train", 8), load_split(tmp_path / "data", "validate", 8)
    images = {part.slices[0].subject: part.images[0, :, :, 0] for part in split}
    assert (images["large.png"] == 100).all()
    assert (images["wide.png"][2:6] == 200).all() and not images["wide.png"][[0, 1, 6, 7]].any()


def interlaced(pixels):
    """The bytes of an 8-bit grey PNG in the seven passes of Adam7, which Pillow reads but does not write."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = [b"\0" + row.tobytes() for y, x, down, right in passes for row in pixels[y::down, x::right] if row.size]
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 0, 0, 0, 1)
    return png_of([(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")])


@pytest.mark.parametrize("size", [1, 5, 16])
def test_an_interlaced_png_holds_the_same_pixels(size):
    pixels = slice_pixels(1, 2, size)
    assert np.array_equal(read_grey_png(interlaced(pixels)), pixels)
