"""Files to arrays, and every file that must be refused."""

import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

import input_pipeline as ip
from input_pipeline import decode


def smooth_image(h=40, w=60):
  """RGB ramps, which JPEG keeps to a few grey levels."""
  y, x = np.mgrid[:h, :w]
  return np.stack([4 * y, 3 * x, 2 * (y + x)], axis=-1).astype(np.uint8)


def write_png(path, *, size, bit_depth, colour_type, rows, chunks=()):
  """A PNG byte by byte; `rows` are packed, `chunks` go before the pixels."""

  def chunk(kind, data):
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check

  header = struct.pack(">IIBBBBB", *size, bit_depth, colour_type, 0, 0, 0)
  pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
  path.write_bytes(
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + b"".join(chunk(*c) for c in chunks)
    + chunk(b"IDAT", pixels)
    + chunk(b"IEND", b"")
  )


def read_mask(path, num_classes=21):
  return ip.decode_mask(path, num_classes=num_classes, ignore_label=255)


def message_of(function, *args):
  with pytest.raises(ip.DataError) as error:
    function(*args)
  message = str(error.value)
  assert "\n" not in message
  return message


def test_png_is_read_exactly_in_rgb_order(tmp_path):
  Image.fromarray(smooth_image()).save(tmp_path / "a.png")
  image = ip.decode_image(tmp_path / "a.png")
  assert image.dtype == np.uint8
  np.testing.assert_array_equal(image, smooth_image())


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_jpeg_equals_pil(tmp_path, options):
  Image.fromarray(smooth_image()).save(tmp_path / "a.jpg", **options)
  with Image.open(tmp_path / "a.jpg") as file:
    expected = np.asarray(file.convert("RGB"))
  np.testing.assert_array_equal(ip.decode_image(tmp_path / "a.jpg"), expected)


def test_cmyk_jpeg(tmp_path):
  rgb = Image.fromarray(smooth_image())
  rgb.convert("CMYK").save(tmp_path / "a.jpg", quality=95)
  image = ip.decode_image(tmp_path / "a.jpg")
  assert np.abs(image.astype(int) - smooth_image()).mean() < 3


def test_grey_palette_and_transparent_images(tmp_path):
  grey = smooth_image()[..., 0]
  Image.fromarray(grey).save(tmp_path / "grey.png")
  expected = np.repeat(grey[..., None], 3, axis=-1)
  np.testing.assert_array_equal(
    ip.decode_image(tmp_path / "grey.png"), expected
  )
  palette = Image.fromarray(grey // 64)
  palette.putpalette(sum(ip.voc_palette(256), ()))
  palette.save(tmp_path / "palette.png")
  np.testing.assert_array_equal(
    ip.decode_image(tmp_path / "palette.png"),
    np.array(ip.voc_palette(256), np.uint8)[grey // 64],
  )
  rgba = np.dstack([smooth_image(), np.zeros((40, 60), np.uint8)])
  Image.fromarray(rgba).save(tmp_path / "rgba.png")
  np.testing.assert_array_equal(
    ip.decode_image(tmp_path / "rgba.png"), smooth_image()
  )


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_images_keep_the_upper_byte(tmp_path, channels):
  values = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
  cv2.imwrite(str(tmp_path / "a.png"), np.dstack([values] * channels))
  expected = np.dstack([(values >> 8).astype(np.uint8)] * 3)
  np.testing.assert_array_equal(ip.decode_image(tmp_path / "a.png"), expected)


def test_exif_rotation_is_applied_to_pixels_and_sizes(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # the top of the scene is on the right
  (tmp_path / "JPEGImages").mkdir()
  path = tmp_path / "JPEGImages/a.jpg"
  Image.fromarray(smooth_image()).save(path, exif=exif, quality=95)
  image = ip.decode_image(path)
  assert image.shape == (60, 40, 3)
  upright = np.rot90(smooth_image(), k=-1)
  assert np.abs(image.astype(int) - upright).max() < 20
  assert ip.image_sizes(ip.Layout(tmp_path), ["a"]) == [(60, 40)]


def test_image_sizes_reads_headers_only(tmp_path):
  (tmp_path / "JPEGImages").mkdir()
  path = tmp_path / "JPEGImages/a.jpg"
  Image.fromarray(smooth_image()).save(path)
  path.write_bytes(path.read_bytes()[:-50])
  assert ip.image_sizes(ip.Layout(tmp_path), ["a"]) == [(40, 60)]
  path.write_bytes(b"no image")
  assert str(path) in message_of(ip.image_sizes, ip.Layout(tmp_path), ["a"])
  assert "b.jpg" in message_of(ip.image_sizes, ip.Layout(tmp_path), ["b"])


def test_missing_image(tmp_path):
  message = message_of(ip.decode_image, tmp_path / "a.jpg")
  assert message.startswith(f"{tmp_path / 'a.jpg'}: image not found")


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("padding", [b"", bytes(500)])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_truncated_jpeg(tmp_path, options, padding, part):
  path = tmp_path / "a.jpg"
  noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
  thumbnail = tmp_path / "t.jpg"
  Image.fromarray(smooth_image(8, 8)).save(thumbnail)
  # A thumbnail brings end markers of its own; they must not deceive.
  comment = thumbnail.read_bytes()
  Image.fromarray(noise).save(path, quality=95, comment=comment, **options)
  whole = path.read_bytes()
  assert ip.decode_image(path).shape == (40, 60, 3)
  path.write_bytes(whole[: int(len(whole) * part)] + padding)
  message = message_of(ip.decode_image, path)
  assert message.startswith(f"{path}: ")
  assert "truncated" in message


def test_bytes_after_the_end_of_a_jpeg_are_fine(tmp_path):
  path = tmp_path / "a.jpg"
  Image.fromarray(smooth_image()).save(path)
  expected = ip.decode_image(path)
  path.write_bytes(path.read_bytes() + b"trailer" * 9)
  np.testing.assert_array_equal(ip.decode_image(path), expected)


@pytest.mark.parametrize(
  "data", [b"", b"x", b"GIF89a", b"\xff\xd8", b"\x89PNG"]
)
def test_files_that_are_no_image(tmp_path, data):
  (tmp_path / "a.jpg").write_bytes(data)
  assert str(tmp_path / "a.jpg") in message_of(
    ip.decode_image, tmp_path / "a.jpg"
  )
  (tmp_path / "a.png").write_bytes(data)
  assert str(tmp_path / "a.png") in message_of(read_mask, tmp_path / "a.png")


def test_truncated_png(tmp_path):
  path = tmp_path / "a.png"
  values = np.random.default_rng(0).integers(0, 21, (40, 60), np.uint8)
  Image.fromarray(values).save(path)
  path.write_bytes(path.read_bytes()[:-200])
  assert "truncated" in message_of(ip.decode_image, path)
  assert "truncated" in message_of(read_mask, path)


def test_masks_of_grey_and_palette_are_indices(tmp_path):
  values = np.arange(24, dtype=np.uint8).reshape(4, 6) % 21
  values[0, 0] = 255
  Image.fromarray(values).save(tmp_path / "grey.png")
  palette = Image.fromarray(values)
  palette.putpalette(sum(ip.voc_palette(256), ()))
  assert palette.mode == "P"
  palette.save(tmp_path / "palette.png")
  for name in ("grey.png", "palette.png"):
    mask = read_mask(tmp_path / name)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, values)


@pytest.mark.parametrize(
  ("bit_depth", "row", "expected"),
  [
    (1, 0b01100000, [0, 1, 1, 0]),
    (2, 0b00011011, [0, 1, 2, 3]),
    (4, 0x1F, [1, 15]),
  ],
)
@pytest.mark.parametrize("colour_type", [0, 3])
def test_masks_of_few_bits_are_indices(
  tmp_path, bit_depth, row, expected, colour_type
):
  chunks = [(b"PLTE", bytes(3 * 2**bit_depth))] if colour_type == 3 else []
  write_png(
    tmp_path / "a.png",
    size=(len(expected), 1),
    bit_depth=bit_depth,
    colour_type=colour_type,
    rows=[bytes([row])],
    chunks=chunks,
  )
  assert read_mask(tmp_path / "a.png").tolist() == [expected]


def test_16_bit_masks_with_small_values(tmp_path):
  cv2.imwrite(str(tmp_path / "a.png"), np.array([[0, 3], [255, 20]], np.uint16))
  mask = read_mask(tmp_path / "a.png")
  assert mask.dtype == np.uint8
  assert mask.tolist() == [[0, 3], [255, 20]]
  cv2.imwrite(str(tmp_path / "b.png"), np.array([[0, 259]], np.uint16))
  assert "label value 259" in message_of(read_mask, tmp_path / "b.png")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colour_masks_are_refused(tmp_path, mode):
  Image.new(mode, (4, 3)).save(tmp_path / "a.png")
  message = message_of(read_mask, tmp_path / "a.png")
  assert message.startswith(f"{tmp_path / 'a.png'}: ")
  assert f"holds colours ({mode})" in message
  assert "index (palette or 8-bit grey) PNG" in message


def test_jpeg_masks_are_refused(tmp_path):
  Image.new("L", (4, 3)).save(tmp_path / "a.png", format="JPEG")
  assert "is a JPEG" in message_of(read_mask, tmp_path / "a.png")


def test_values_out_of_range_are_told_with_count_and_place(tmp_path):
  mask = np.zeros((5, 7), np.uint8)
  mask[2, 3] = mask[4, 1] = 21
  mask[3, 3] = 30
  mask[0, 0] = 255
  Image.fromarray(mask).save(tmp_path / "a.png")
  message = message_of(read_mask, tmp_path / "a.png")
  assert "label value 21 in 2 pixels, and also 30" in message
  assert "first at row 2, column 3" in message
  assert "must be 0 to 20, or 255" in message
  assert read_mask(tmp_path / "a.png", num_classes=31)[3, 3] == 30


def test_missing_mask(tmp_path):
  message = message_of(read_mask, tmp_path / "a.png")
  assert message.startswith(f"{tmp_path / 'a.png'}: mask not found")


def test_image_and_mask_of_different_size(tmp_path):
  layout = ip.Layout(tmp_path, image_suffix=".png")
  for folder in ("JPEGImages", "SegmentationClass"):
    (tmp_path / folder).mkdir()
  Image.new("RGB", (6, 4)).save(layout.image_path("a"))
  Image.new("L", (6, 5)).save(layout.mask_path("a"))

  def read():
    decode.decode_pair(layout, "a", num_classes=2, ignore_label=255)

  message = message_of(read)
  assert f"{layout.image_path('a')} is 6x4" in message
  assert f"{layout.mask_path('a')} is 6x5" in message
  Image.new("L", (6, 4)).save(layout.mask_path("a"))
  read()


def test_a_mask_drawn_on_the_unrotated_photo_is_explained(tmp_path):
  layout = ip.Layout(tmp_path)
  for folder in ("JPEGImages", "SegmentationClass"):
    (tmp_path / folder).mkdir()
  exif = Image.Exif()
  exif[0x0112] = 8
  Image.new("RGB", (6, 4)).save(layout.image_path("a"), exif=exif)
  Image.new("L", (6, 4)).save(layout.mask_path("a"))
  with pytest.raises(ip.DataError, match="is 4x6.*is 6x4.*EXIF"):
    decode.decode_pair(layout, "a", num_classes=2, ignore_label=255)
