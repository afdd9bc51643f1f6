"""The quick way for plain PNG gives what the general decoders give."""

import concurrent.futures
import io
import multiprocessing
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

import input_pipeline as ip
from input_pipeline import png

RGB = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
GREY = RGB[..., 0] % 21


def png_of(image, **options):
  file = io.BytesIO()
  image.save(file, "PNG", **options)
  return file.getvalue()


def chunk(kind, data):
  check = struct.pack(">I", zlib.crc32(kind + data))
  return struct.pack(">I", len(data)) + kind + data + check


def palette_image(indices, num_colours=256):
  image = Image.fromarray(indices)
  image.putpalette(sum(ip.voc_palette(num_colours), ()))
  return image


@pytest.fixture
def in_worker(monkeypatch):
  monkeypatch.setattr(multiprocessing, "parent_process", lambda: "a process")


def test_only_a_worker_process_decodes_photographs_the_quick_way():
  data = png_of(Image.fromarray(RGB))
  assert png.decode_rgb(data) is None
  with concurrent.futures.ProcessPoolExecutor(
    1, mp_context=multiprocessing.get_context("spawn")
  ) as pool:
    pixels = pool.submit(png.decode_rgb, data).result()
  np.testing.assert_array_equal(pixels, RGB)


@pytest.mark.parametrize("level", [0, 1, 9])
@pytest.mark.parametrize("smooth", [False, True])
def test_photographs_equal_those_of_opencv(in_worker, smooth, level):
  # Smooth ones are written with the filters that predict from neighbours.
  image = cv2.GaussianBlur(RGB, (9, 9), 3) if smooth else RGB
  data = png_of(Image.fromarray(image), compress_level=level)
  pixels = png.decode_rgb(data)
  assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
  expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
  np.testing.assert_array_equal(pixels, expected)
  np.testing.assert_array_equal(pixels, image)


def test_masks_equal_those_of_pil():
  for image in (Image.fromarray(GREY), palette_image(GREY)):
    mask = png.decode_indices(png_of(image))
    assert mask.dtype == np.uint8 and mask.flags.c_contiguous
    np.testing.assert_array_equal(mask, np.asarray(image))
    np.testing.assert_array_equal(mask, GREY)
  # A transparent colour changes no index.
  with_alpha = png_of(palette_image(GREY), transparency=5)
  np.testing.assert_array_equal(png.decode_indices(with_alpha), GREY)


def special_images():
  plain = png_of(Image.fromarray(RGB))
  exif = Image.Exif()
  exif[0x0112] = 6
  rotated = png_of(Image.fromarray(RGB), exif=exif)
  assert b"eXIf" in rotated
  turned_at_the_end = plain[:-12] + chunk(
    b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")
  )
  _, wide = cv2.imencode(".png", RGB.astype(np.uint16) * 257)
  return {
    "rotated": rotated,
    "rotated, told at the end": turned_at_the_end + plain[-12:],
    "animated": plain[:33]
    + chunk(b"acTL", struct.pack(">II", 1, 0))
    + plain[33:],
    "16 bits": wide.tobytes(),
    "alpha": png_of(Image.fromarray(np.dstack([RGB, RGB[..., 0]]))),
    "grey": png_of(Image.fromarray(GREY)),
    "palette": png_of(palette_image(GREY)),
    "jpeg": cv2.imencode(".jpg", RGB)[1].tobytes(),
    "interlaced": plain[:28]
    + b"\1"
    + struct.pack(">I", zlib.crc32(plain[12:28] + b"\1"))
    + plain[33:],
    "empty": b"",
  }


@pytest.mark.parametrize("kind", special_images())
def test_other_images_are_for_the_general_decoder(in_worker, kind):
  assert png.decode_rgb(special_images()[kind]) is None


def test_a_rotated_photograph_is_turned(in_worker, tmp_path):
  for kind in ("rotated", "rotated, told at the end"):
    (tmp_path / "a.png").write_bytes(special_images()[kind])
    np.testing.assert_array_equal(
      ip.decode_image(tmp_path / "a.png"), np.rot90(RGB, k=-1)
    )


def test_masks_of_few_or_many_bits_are_for_the_general_decoder():
  few = palette_image(GREY % 4, 4)
  data = png_of(few, bits=2)
  assert data[24] == 2
  assert png.decode_indices(data) is None
  _, wide = cv2.imencode(".png", GREY.astype(np.uint16))
  assert png.decode_indices(wide.tobytes()) is None
  assert png.decode_indices(png_of(Image.fromarray(RGB))) is None


@pytest.mark.parametrize("fault", ["cut", "bit", "size"])
def test_damaged_files_get_the_usual_message(in_worker, tmp_path, fault):
  for values, read in (
    (RGB, ip.decode_image),
    (
      GREY,
      lambda path: ip.decode_mask(path, num_classes=21, ignore_label=255),
    ),
  ):
    data = bytearray(png_of(Image.fromarray(values)))
    if fault == "cut":
      del data[-200:]
    elif fault == "bit":
      data[len(data) // 2] ^= 16
    else:
      # A header that promises 4 gigapixels; its checksum is right.
      data[16:24] = struct.pack(">II", 65_535, 65_535)
      data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ip.DataError, match=r"a\.png: .*damaged"):
      read(tmp_path / "a.png")
