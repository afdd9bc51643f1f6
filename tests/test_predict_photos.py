"""Photographs of every format, and the pictures made of them."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from input_pipeline import DataError
from input_pipeline.decode import read_header
from input_pipeline.parallel import map_ahead
from input_pipeline.photos import (
  draw_overlay,
  encode_classes,
  encode_map,
  encode_overlay,
  find_photos,
  has_image_suffix,
  photo_size,
  read_photo,
)

ORIENTATION = 0x0112


def scene(height=24, width=40):
  """Smooth, with a corner that tells how it is turned."""
  image = np.zeros((height, width, 3), np.uint8)
  image[..., 0] = np.linspace(0, 200, width)[None]
  image[..., 1] = np.linspace(0, 200, height)[:, None]
  image[: height // 3, : width // 3] = 250, 10, 10
  return image


def exif(orientation):
  tags = Image.Exif()
  tags[ORIENTATION] = orientation
  return tags


def with_alpha(image):
  alpha = np.full(image.shape[:2], 255, np.uint8)
  alpha[:, : image.shape[1] // 2] = 0
  return Image.fromarray(np.dstack([image, alpha]))


RGB = Image.fromarray(scene())
GREY = np.asarray(RGB.convert("L"))
LOSSY = 5  # Mean difference of grey levels that compression may make.

# name -> (how to save it, what is read, mean difference allowed)
FORMATS = {
  "jpeg.jpg": (lambda p: RGB.save(p, quality=95), scene(), LOSSY),
  "progressive.jpg": (
    lambda p: RGB.save(p, quality=95, progressive=True),
    scene(),
    LOSSY,
  ),
  "cmyk.jpg": (lambda p: RGB.convert("CMYK").save(p, quality=95), scene(), 2),
  "plain.png": (lambda p: RGB.save(p), scene(), 0),
  "lossless.webp": (lambda p: RGB.save(p, lossless=True), scene(), 0),
  "lzw.tif": (lambda p: RGB.save(p, compression="tiff_lzw"), scene(), 0),
  "plain.bmp": (lambda p: RGB.save(p), scene(), 0),
  "plain.ppm": (lambda p: RGB.save(p), scene(), 0),
  "plain.jp2": (lambda p: RGB.save(p), scene(), 1),
  "grey.png": (
    lambda p: RGB.convert("L").save(p),
    np.dstack([GREY] * 3),
    0,
  ),
  "grey_alpha.png": (
    lambda p: RGB.convert("LA").save(p),
    np.dstack([GREY] * 3),
    0,
  ),
  "grey.jpg": (
    lambda p: RGB.convert("L").save(p, quality=95),
    np.dstack([GREY] * 3),
    LOSSY,
  ),
  "palette.png": (
    lambda p: RGB.quantize(16).save(p),
    np.asarray(RGB.quantize(16).convert("RGB")),
    0,
  ),
  "palette.gif": (
    lambda p: RGB.quantize(16).save(p),
    np.asarray(RGB.quantize(16).convert("RGB")),
    0,
  ),
  "one_bit.png": (
    lambda p: RGB.convert("1").save(p),
    np.asarray(RGB.convert("1").convert("RGB")),
    0,
  ),
  # Not the black of an empty canvas: what is stored under the alpha.
  "alpha.png": (lambda p: with_alpha(scene()).save(p), scene(), 0),
  "alpha.webp": (
    lambda p: with_alpha(scene()).save(p, lossless=True, exact=True),
    scene(),
    0,
  ),
  "alpha.tif": (
    lambda p: with_alpha(scene()).save(p),
    scene() * (np.asarray(with_alpha(scene()))[..., 3:] > 0),
    0,
  ),
  # 257 * v has v in its upper byte; so has 257 * v - 1 for v - 1.
  "rgb16.png": (
    lambda p: cv2.imwrite(str(p), scene()[..., ::-1].astype(np.uint16) * 257),
    scene(),
    0,
  ),
  "rgb16.tif": (
    lambda p: cv2.imwrite(str(p), scene()[..., ::-1].astype(np.uint16) * 257),
    scene(),
    0,
  ),
  "grey16.png": (
    lambda p: Image.fromarray(GREY.astype(np.uint16) * 256 + 255).save(p),
    np.dstack([GREY] * 3),
    0,
  ),
  "rotated.jpg": (
    lambda p: RGB.save(p, quality=95, exif=exif(6)),
    np.rot90(scene(), -1),
    LOSSY,
  ),
  "rotated.png": (
    lambda p: RGB.save(p, exif=exif(8)),
    np.rot90(scene(), 1),
    0,
  ),
  "rotated.webp": (
    lambda p: RGB.save(p, exif=exif(3), lossless=True),
    scene()[::-1, ::-1],
    0,
  ),
  "rotated.tif": (
    lambda p: RGB.save(p, tiffinfo={ORIENTATION: 6}),
    np.rot90(scene(), -1),
    0,
  ),
  "mirrored.png": (lambda p: RGB.save(p, exif=exif(2)), scene()[:, ::-1], 0),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, name):
  save, wanted, tolerance = FORMATS[name]
  path = tmp_path / name
  save(path)
  image = read_photo(str(path))
  assert image.dtype == np.uint8
  assert image.shape == wanted.shape
  difference = np.abs(image.astype(int) - wanted).mean()
  assert difference <= tolerance
  assert photo_size(str(path)) == wanted.shape[:2]
  assert has_image_suffix(name)


def test_tiny_images(tmp_path):
  for height, width in ((1, 1), (5, 3)):
    path = str(tmp_path / f"{height}.png")
    Image.fromarray(scene(height, width)).save(path)
    assert read_photo(path).shape == (height, width, 3)
    assert photo_size(path) == (height, width)


def test_size_in_a_rotated_tiff_is_that_of_the_pixels(tmp_path):
  # 40 wide and 24 high as stored.
  path = tmp_path / "a.tif"
  RGB.save(path, tiffinfo={ORIENTATION: 6})
  with path.open("rb") as file:
    assert read_header(file, path) == (24, 40, 6)


@pytest.mark.parametrize(
  ("name", "data", "message"),
  [
    ("a.jpg", b"", "empty"),
    ("a.png", b"hello", "cannot be read as an image"),
    ("a.jpg", b"\xff\xd8\xff\xe0", "cannot be read as an image"),
  ],
)
def test_unreadable_files(tmp_path, name, data, message):
  path = tmp_path / name
  path.write_bytes(data)
  with pytest.raises(DataError, match=message) as raised:
    photo_size(str(path))
  assert str(path) in str(raised.value)
  with pytest.raises(DataError):
    read_photo(str(path))


def test_a_truncated_image_has_a_size_but_no_pixels(tmp_path):
  data = io.BytesIO()
  RGB.save(data, "JPEG")
  path = tmp_path / "a.jpg"
  path.write_bytes(data.getvalue()[:-100])
  assert photo_size(str(path)) == (24, 40)
  with pytest.raises(DataError, match="truncated"):
    read_photo(str(path))


def test_an_image_beyond_all_measure_is_named(tmp_path, monkeypatch):
  path = tmp_path / "a.png"
  RGB.save(path)
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
  with pytest.raises(DataError, match="960 pixels.*limit of 800") as e:
    photo_size(str(path))
  assert str(path) in str(e.value)


# -- Finding -------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
  for name in ("b.jpg", "a.png", "x/c.jpg", "x/y/d.jpg", ".hidden/e.jpg"):
    path = tmp_path / "photos" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
  (tmp_path / "photos" / ".f.jpg").write_bytes(b"x")
  return tmp_path / "photos"


def test_files_of_a_folder(folder):
  photos = find_photos(str(folder))
  assert photos.names == ("a.png", "b.jpg", "x/c.jpg", "x/y/d.jpg")
  assert photos.is_recursive
  assert photos.path("x/c.jpg") == str(folder / "x" / "c.jpg")


@pytest.mark.parametrize(
  ("pattern", "root", "names", "is_recursive"),
  [
    ("*.jpg", ".", ("b.jpg",), False),
    ("x/*.jpg", "x", ("c.jpg",), False),
    ("*/*.jpg", ".", ("x/c.jpg",), False),
    ("x/**/*.jpg", "x", ("c.jpg", "y/d.jpg"), True),
    ("**", ".", ("a.png", "b.jpg", "x/c.jpg", "x/y/d.jpg"), True),
    ("x/c.jpg", "x", ("c.jpg",), False),
    ("b.jpg", ".", ("b.jpg",), False),
  ],
)
def test_files_of_a_pattern(
  folder, monkeypatch, pattern, root, names, is_recursive
):
  monkeypatch.chdir(folder)
  photos = find_photos(pattern)
  assert (photos.root, photos.names) == (root, names)
  assert photos.is_recursive == is_recursive
  absolute = find_photos(f"{folder}/{pattern}")
  assert absolute.names == names
  assert absolute.root == str(folder / root)


def test_a_file_whose_name_looks_like_a_pattern(folder):
  path = folder / "a[1].jpg"
  path.write_bytes(b"x")
  assert find_photos(str(path)).names == ("a[1].jpg",)


def test_nothing_found(folder):
  (folder / "empty").mkdir()
  for what, message in (
    ("empty", "folder is empty"),
    ("*.bmp", "no file matches"),
    ("c.jpg", "no such file or folder"),
  ):
    with pytest.raises(DataError, match=message) as raised:
      find_photos(f"{folder}/{what}")
    assert f"--images={folder}/{what}" in str(raised.value)


# -- Pictures ------------------------------------------------------------------


def test_index_png_holds_ids_and_palette():
  classes = np.array([[0, 1], [2, 1]], np.uint8)
  palette = ((10, 20, 30), (255, 0, 0), (0, 0, 255))
  picture = Image.open(io.BytesIO(encode_classes(classes, palette)))
  assert (picture.mode, picture.format) == ("P", "PNG")
  np.testing.assert_array_equal(np.asarray(picture), classes)
  np.testing.assert_array_equal(
    np.asarray(picture.convert("RGB")), np.array(palette)[classes]
  )
  # One byte a pixel, whatever the number of classes.
  assert encode_classes(classes, palette)[24] == 8


def test_map_is_grey():
  values = np.arange(6, dtype=np.uint8).reshape(2, 3)
  picture = Image.open(io.BytesIO(encode_map(values)))
  assert picture.mode == "L"
  np.testing.assert_array_equal(np.asarray(picture), values)


def test_overlay_by_hand():
  image = np.full((3, 4, 3), 100, np.uint8)
  classes = np.array([[0, 0, 1, 1]] * 3, np.uint8)
  overlay = draw_overlay(image, classes, ((0, 0, 0), (200, 100, 0)))
  assert overlay[0].tolist() == [
    [50, 50, 50],
    [255, 255, 255],  # The last column of class 0.
    [150, 100, 50],
    [150, 100, 50],
  ]
  # A large image has outlines that show when it is reduced.
  wide = np.zeros((1500, 1600), np.uint8)
  wide[:, 800:] = 1
  row = draw_overlay(
    np.zeros((1500, 1600, 3), np.uint8), wide, ((0, 0, 0),) * 2
  )
  assert (row[700, :, 0] == 255).sum() == 3
  decoded = np.asarray(
    Image.open(io.BytesIO(encode_overlay(image, classes, ((0, 0, 0),) * 2)))
  )
  assert decoded.shape == (3, 4, 3)


# -- Threads -------------------------------------------------------------------


def test_map_ahead_is_in_order_and_never_too_far_ahead():
  begun = []

  def function(item):
    begun.append(item)
    return 10 * item

  taken = 0
  for result in map_ahead(function, range(20), 3):
    assert result == 10 * taken
    taken += 1
    assert len(begun) <= taken + 3
  assert sorted(begun) == list(range(20))


def test_map_ahead_raises_where_the_result_is_due():
  results = map_ahead(lambda x: 1 // (x - 2), range(5), 2)
  assert [next(results), next(results)] == [-1, -1]
  with pytest.raises(ZeroDivisionError):
    next(results)
