"""Images of any kind as grey squares: uint8 (H, H)."""
import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from oasis.archives import is_hidden, naming
from oasis.files import OasisError

PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
PNG_COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}
MAX_PNG_SIDE = 4096           # pixels a side of the largest PNG that read_grey_png decodes


def read_grey_png(png):
    """The image of a square 8-bit grey PNG, uint8 (H, H). Raises OasisError for any other PNG, without decoding it."""
    if len(png) < 26 or not png.startswith(PNG_START):
        raise OasisError("is not a PNG")
    width, height, depth, colour = struct.unpack(">IIBB", png[16:26])
    if (depth, colour) != (8, 0):
        raise OasisError(f"is {depth}-bit {PNG_COLOURS.get(colour, 'of an unknown colour')}, not 8-bit grey")
    if width != height or not 1 <= width <= MAX_PNG_SIDE:
        raise OasisError(f"is {width}×{height}, not square or not within {MAX_PNG_SIDE}×{MAX_PNG_SIDE}")
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        return np.asarray(image)


def to_grey(image):
    """Convert a Pillow image of any mode to grey: (uint8 (H, W), {each conversion that it needed}).

    Colour becomes 0.299 R + 0.587 G + 0.114 B, so a grey image that was saved as colour keeps its values. Transparent
    pixels become black. A grey image of 16 bits or more is scaled from its own minimum and maximum to 0 … 255. Raises
    OasisError for NaN or infinite pixels.
    """
    transparent = "A" in image.getbands() or "transparency" in image.info
    if image.mode in ("L", "1") and not transparent:
        return np.asarray(image.convert("L")), set()
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image, np.float64)
        low, high = pixels.min(), pixels.max()
        if not np.isfinite([low, high]).all():
            raise OasisError("holds NaN or infinite pixels")
        scaled = (pixels - low) * (255 / (high - low) if high > low else 0)
        return np.rint(scaled).astype(np.uint8), {"16 bits or more became 8, by the range of each file"}
    conversions = set() if image.mode in ("L", "1", "LA") else {"colour became grey"}
    if transparent:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            conversions.add("transparent pixels became black")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.asarray(image.convert("RGB").convert("L")), conversions


def square_pixels(image, height, width):
    """An image, uint8 (H, W), whose pixels have height × width mm, enlarged along one axis until pixels are square."""
    if np.isclose(height, width, rtol=0.01):
        return image
    pixel = min(height, width)
    size = round(image.shape[1] * width / pixel), round(image.shape[0] * height / pixel)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def pad_to_square(image):
    """Put an image, uint8 (H, W), in the middle of a black square: (uint8 (H, H), {the conversion, if needed})."""
    height, width = image.shape
    if height == width:
        return image, set()
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.zeros((side, side), np.uint8)
    square[top:top + height, left:left + width] = image
    return square, {"padded with black to a square"}


def load_samples(path, limit):
    """At most `limit` images, uint8 (N, S, S, 1), from an .npy, or from a folder of grey PNGs in the order of names."""
    path = Path(path).expanduser()
    if not path.is_dir():
        return first_of(read_images(path), limit)
    images = []
    for file in first_of(sorted(file for file in path.glob("*.png") if not is_hidden(file.name)), limit):
        with naming(file, "Name a folder with grey, square PNGs of one size and nothing else."):
            png = file.read_bytes()
            images.append(read_grey_png(png)[:, :, None])
            if images[-1].shape != images[0].shape:
                raise OasisError(f"has {len(images[-1])} pixels a side, but the first image has {len(images[0])}")
    if not images:
        raise OasisError(f"{path.absolute()}: holds no .png. Name a folder with images, or an .npy.")
    return np.stack(images)


def first_of(images, limit):
    """The first `limit` of the images or of their files. If there are more, a line says that they are not judged."""
    if len(images) > limit:
        print(f"only the first {limit:,} of {len(images):,} images are judged: see --number-of-images")
    return images[:limit]


def read_images(path):
    """The images of an .npy, uint8 (N, S, S, 1). Raises OasisError for an array of another dtype or shape."""
    with naming(path, "Name an .npy with images uint8 (N, S, S, 1), or a folder of PNGs."):
        images = np.load(path, allow_pickle=False)
        if not isinstance(images, np.ndarray):
            raise OasisError("is an .npz")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[2:] != (images.shape[1], 1):
            raise OasisError(f"holds {images.dtype} {images.shape} instead of uint8 (N, S, S, 1)")
    return images
