"""Class tables, mask formats, mixed suffixes, folders of unlabelled images."""

import os
import shutil

import numpy as np
import pytest
from etils import epath
from PIL import Image

import input_pipeline as ip
from input_pipeline import decode, sources, storage


def write(path, text=""):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(text.encode())
  return path


def message_of(function, *args, **kwargs):
  with pytest.raises(ip.DataError) as error:
    function(*args, **kwargs)
  message = str(error.value)
  assert "\n" not in message
  return message


# -- Class tables --------------------------------------------------------------


def test_class_table_with_colours(tmp_path):
  path = write(
    tmp_path / "classes.txt",
    "\ufeffroad 128 64 128\r\n\nignore 0 0 0\n traffic  light 250 170 30",
  )
  info = ip.read_class_table(path, need_colours=True)
  assert info.name == "folder"
  assert info.class_names == ("road", "traffic light")
  assert info.palette == ((128, 64, 128), (250, 170, 30))
  assert info.ignore_colour == (0, 0, 0)
  assert info.mean == (123.675, 116.28, 103.53)


def test_class_table_of_names(tmp_path):
  path = write(tmp_path / "classes.txt", "ground\nzone 1\nzone 1 2\n7 8\n")
  info = ip.read_class_table(path)
  assert info.class_names == ("ground", "zone 1", "zone 1 2", "7 8")
  assert info.palette == ip.voc_palette(4)
  assert info.ignore_colour is None


@pytest.mark.parametrize(
  ("text", "parts"),
  [
    ("", ("0 classes",)),
    ("a\n" * 2, ("line 2", "'a' is in line 1")),
    ("a 1 2 3\nb 1 2 3", ("line 2", "(1, 2, 3) is that of line 1")),
    ("a 1 2 3\nignore 1 2 3", ("line 2", "(1, 2, 3) is that of line 1")),
    ("a 1 2 256", ("line 1", "0 to 255")),
    ("a 1 2 3\nb", ("line 2", "give all classes one, or none")),
    ("a\nignore", ("line 2", "ignore R G B")),
    ("a\nignore 1 1 1\nignore 2 2 2", ("line 3", "give it once")),
    ("\n".join(f"c{i}" for i in range(255)), ("255 classes", "1 to 254")),
  ],
)
def test_bad_class_tables(tmp_path, text, parts):
  path = write(tmp_path / "classes.txt", text)
  message = message_of(ip.read_class_table, path)
  assert message.startswith(str(path))
  for part in parts:
    assert part in message


def test_class_tables_that_cannot_serve(tmp_path):
  path = write(tmp_path / "classes.txt", "a\nb\nignore 0 0 0")
  assert ip.read_class_table(path).num_classes == 2
  assert "line 1: the class has no colour" in message_of(
    ip.read_class_table, path, need_colours=True
  )
  (tmp_path / "bytes.txt").write_bytes(b"\xff\xd8")
  for name, part in [
    ("none.txt", "does not exist"),
    ("bytes.txt", "not UTF-8"),
    ("", "cannot read"),
  ]:
    assert part in message_of(ip.read_class_table, tmp_path / name)


# -- Mask formats --------------------------------------------------------------

# Name, label id, train id, colour: the table of the Cityscapes scripts.
CITYSCAPES_LABELS = """
  unlabeled 0 255; ego_vehicle 1 255; rectification_border 2 255;
  out_of_roi 3 255; static 4 255; dynamic 5 255; ground 6 255; road 7 0;
  sidewalk 8 1; parking 9 255; rail_track 10 255; building 11 2; wall 12 3;
  fence 13 4; guard_rail 14 255; bridge 15 255; tunnel 16 255; pole 17 5;
  polegroup 18 255; traffic_light 19 6; traffic_sign 20 7; vegetation 21 8;
  terrain 22 9; sky 23 10; person 24 11; rider 25 12; car 26 13; truck 27 14;
  bus 28 15; caravan 29 255; trailer 30 255; train 31 16; motorcycle 32 17;
  bicycle 33 18
"""


def test_cityscapes_label_ids(tmp_path):
  rows = [row.split() for row in CITYSCAPES_LABELS.split(";")]
  names = ip.dataset_info("cityscapes").class_names
  expected = np.empty(34, np.uint8)
  for name, label_id, train_id in rows:
    expected[int(label_id)] = train_id
    if train_id != "255":
      assert names[int(train_id)] == name.replace("_", " ")
  assert len(rows) == 34 and len(names) == 19
  path = tmp_path / "a_gtFine_labelIds.png"
  Image.fromarray(np.arange(34, dtype=np.uint8).reshape(2, 17)).save(path)
  options = {
    "num_classes": 19,
    "ignore_label": 255,
    "mask_format": ip.MaskFormat("cityscapes_label_ids"),
  }
  mask = ip.decode_mask(path, **options)
  assert mask.dtype == np.uint8
  np.testing.assert_array_equal(mask.ravel(), expected)
  # Train ids hold 255, which is no label id; label ids hold 33, no train id.
  Image.fromarray(np.array([[0, 255]], np.uint8)).save(tmp_path / "b.png")
  message = message_of(ip.decode_mask, tmp_path / "b.png", **options)
  assert "label value 255 in 1 pixels, first at row 0, column 1" in message
  assert "dataset.mask_format='index'" in message
  options["mask_format"] = ip.MaskFormat()
  assert "dataset.mask_format" in message_of(ip.decode_mask, path, **options)


def test_cityscapes_palette():
  info = ip.dataset_info("cityscapes")
  colours = dict(zip(info.class_names, info.palette, strict=True))
  assert colours["road"] == (128, 64, 128)
  assert colours["car"] == (0, 0, 142)
  assert colours["bicycle"] == (119, 11, 32)
  assert len(set(info.palette)) == 19


COLOURS = ip.MaskFormat("colours", ((0, 0, 0), (200, 10, 30)), (255, 255, 255))


def read_colours(path, mask_format=COLOURS, ignore_label=255):
  return ip.decode_mask(
    path, num_classes=2, ignore_label=ignore_label, mask_format=mask_format
  )


@pytest.mark.parametrize("ignore_label", [254, 255])
def test_colour_masks(tmp_path, ignore_label):
  path = tmp_path / "a.png"
  rgb = np.zeros((2, 3, 3), np.uint8)
  rgb[0, 1] = 200, 10, 30
  rgb[1, 2] = 255
  expected = [[0, 1, 0], [0, 0, ignore_label]]
  image = Image.fromarray(rgb)
  for kind in ("RGB", "RGBA", "P"):
    image.convert(kind, palette=Image.Palette.ADAPTIVE).save(path)
    mask = read_colours(path, ignore_label=ignore_label)
    assert mask.dtype == np.uint8
    assert mask.tolist() == expected


def test_colour_masks_saved_as_grey(tmp_path):
  path = tmp_path / "a.png"
  mask_format = ip.MaskFormat("colours", ((0, 0, 0), (255, 255, 255)))
  for mode in ("L", "1"):
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert(mode).save(path)
    assert read_colours(path, mask_format).tolist() == [[0, 1]]


def test_a_colour_of_no_class_is_told_with_count_and_place(tmp_path):
  path = tmp_path / "a.png"
  rgb = np.zeros((4, 5, 3), np.uint8)
  rgb[1, 3] = rgb[2, 2] = 201, 10, 30
  rgb[3, 3] = 1, 2, 3
  Image.fromarray(rgb).save(path)
  message = message_of(read_colours, path)
  assert message.startswith(f"{path}: colour (201, 10, 30) in 2 pixels, and 1 ")
  assert "first at row 1, column 3" in message
  rgb[:] = 255
  Image.fromarray(rgb).save(path)
  assert (read_colours(path) == 255).all()
  nothing = ip.MaskFormat("colours", COLOURS.palette)
  assert "colour (255, 255, 255) in 20" in message_of(
    read_colours, path, nothing
  )


def test_masks_that_are_no_colour_masks(tmp_path):
  path = tmp_path / "a.png"
  Image.new("RGB", (4, 3)).save(path, format="JPEG")
  assert "is a JPEG" in message_of(read_colours, path)
  Image.fromarray(np.zeros((3, 4), np.uint16)).save(path)
  assert "mode I;16" in message_of(read_colours, path)
  path.write_bytes(path.read_bytes()[:60])
  assert "mode I;16" in message_of(read_colours, path)
  Image.new("RGB", (400, 300), (1, 2, 3)).save(path)
  path.write_bytes(path.read_bytes()[:-40])
  assert "damaged or truncated" in message_of(read_colours, path)


def test_mask_format_checks_itself():
  with pytest.raises(ValueError, match="rgb"):
    ip.MaskFormat("rgb")
  with pytest.raises(ValueError, match="palette"):
    ip.MaskFormat("colours")
  voc = ip.dataset_info("voc").mask_format("colours")
  assert voc.ignore_colour == (224, 224, 192)
  assert ip.dataset_info("voc").mask_format("index") == ip.MaskFormat()


# -- Mixed suffixes ------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
  """An own folder with every kind of suffix."""
  for name in ("a.jpg", "b.JPG", "sub/c.png", "d.jpeg", "d.txt", "._a.jpg"):
    write(tmp_path / "images" / name, name)
  for name in ("a", "b", "sub/c"):
    write(tmp_path / "masks" / f"{name}.png", "mask of " + name)
  return ip.Layout(
    tmp_path, image_dir="images", mask_dir="masks", image_suffix=""
  )


def test_any_suffix_is_found(mixed):
  ids = ["a", "b", "sub/c", "d"]
  ip.check_files(mixed, ids, masks=False)
  ip.check_files(mixed, ids[:3], masks=True)
  names = [os.path.relpath(mixed.image_path(id), mixed.root) for id in ids]
  assert names == [
    "images/a.jpg",
    "images/b.JPG",
    "images/sub/c.png",
    "images/d.jpeg",
  ]
  assert mixed.read_image("b") == b"b.JPG"
  assert mixed.read_mask("sub/c") == b"mask of sub/c"
  assert [mixed.has_mask(id) for id in ids] == [True, True, True, False]


def test_two_files_of_one_id(mixed):
  write(mixed.root / "images" / "b.png")
  message = message_of(ip.check_files, mixed, ["a", "b"], masks=False)
  assert f"{mixed.root}/images/b.JPG and {mixed.root}/images/b.png" in message
  assert "dataset.image_suffix" in message
  assert mixed.image_path("a").endswith("a.jpg")


def test_missing_file_of_any_suffix(mixed):
  message = message_of(ip.check_files, mixed, ["a", "x"], masks=False)
  assert message.startswith(f"{mixed.root}/images/x: image not found; 1 of 2")
  shutil.rmtree(mixed.root / "images")
  assert "<id>.jpg or .png per id" in message_of(
    ip.check_files, mixed, ["a"], masks=False
  )


# -- A folder of unlabelled images ---------------------------------------------


def test_unlabelled_images_beside_the_labelled_ones(mixed):
  layout, ids = ip.find_unlabelled(mixed, "images", ["a"])
  assert ids == ("b", "d", "sub/c")
  assert layout.images_elsewhere == {}
  layout, ids = ip.find_unlabelled(mixed, "images/sub", ["a"])
  assert ids == ("sub/c",)
  with pytest.raises(ip.DataError, match="none of its 1 files"):
    ip.find_unlabelled(mixed, "images/sub", ["sub/c"])


def test_unlabelled_images_elsewhere(mixed):
  for name in ("y.png", "x.JPG", "deep/er/z.jpg", "a.jpg", ".s.png", "n.txt"):
    write(mixed.root / "more" / name, name)
  write(mixed.root / "more/.thumbs/t.jpg")
  for folder in ("more", "more/", str(mixed.root / "more")):
    layout, ids = ip.find_unlabelled(mixed, folder, ["a"])
    assert ids == ("deep/er/z", "x", "y")
    assert layout.read_image("deep/er/z") == b"deep/er/z.jpg"
    assert layout.read_image("x") == b"x.JPG"
    # The labelled ones are still found where they were.
    assert layout.read_image("b") == b"b.JPG"
    ip.check_files(layout, ["a", *ids], masks=False)
  _, ids = ip.find_unlabelled(mixed, "more", [])
  assert ids == ("a", "deep/er/z", "x", "y")


def test_unlabelled_images_of_one_suffix(tmp_path):
  for name in ("a.jpg", "b.jpg", "b.png"):
    write(tmp_path / "JPEGImages" / name)
  _, ids = ip.find_unlabelled(ip.Layout(tmp_path), "JPEGImages", ["a"])
  assert ids == ("b",)


def test_unlabelled_folders_that_cannot_serve(mixed):
  message = message_of(ip.find_unlabelled, mixed, "more", [])
  assert message.startswith(f"{mixed.root}/more: the folder")
  for name in ("x.png", "x.jpg"):
    write(mixed.root / "more" / name)
  message = message_of(ip.find_unlabelled, mixed, "more", [])
  assert f"{mixed.root}/more/x.jpg and {mixed.root}/more/x.png" in message
  message = message_of(ip.find_unlabelled, mixed, ".", [])
  assert "contains the folder of the masks" in message


# -- Object storage ------------------------------------------------------------


@pytest.fixture
def no_tensorflow(monkeypatch):
  # etils would open gs:// with it, past the stand-in for a bucket.
  monkeypatch.setattr(epath.gpath, "_is_tf_installed", lambda: False)


@pytest.fixture
def bucket(tmp_path, no_tensorflow):
  """gs://bucket is tmp_path/bucket; opening anything else there is refused."""
  local = tmp_path / "bucket"

  def real(path):
    return str(local) + os.fspath(path).removeprefix("gs://bucket")

  def walk(original, top, **options):
    for parent, folders, names in original(real(top), **options):
      below = os.path.relpath(parent, real(top))
      parent = os.fspath(top) if below == "." else f"{top}/{below}"
      yield parent, folders, names

  with epath.testing.mock_epath(
    open=lambda original, path, mode: original(real(path), mode),
    exists=lambda original, path: original(real(path)),
    isdir=lambda original, path: original(real(path)),
    listdir=lambda original, path: original(real(path)),
    walk=walk,
  ):
    yield local


def test_object_storage_is_read_as_files_are(bucket):
  rng = np.random.default_rng(0)
  for name in ("images/a.jpg", "images/b.PNG", "more/c.png", "masks/a.png"):
    (bucket / name).parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 2, (9, 12), np.uint8)
    if "masks" not in name:
      pixels = rng.integers(0, 256, (9, 12, 3), np.uint8)
    Image.fromarray(pixels).save(bucket / name)
  write(bucket / "more/.thumbs/t.jpg")
  write(bucket / "labelled.txt", "a\n")
  write(bucket / "classes.txt", "ground\ncoin\n")

  def everything(root):
    layout = ip.Layout(root, "images", "masks", "")
    layout, ids = ip.find_unlabelled(layout, "more", ["a"])
    layout.check(["a"], masks=True)
    layout.check(ids, masks=False)
    image, mask = decode.decode_pair(
      layout, "a", num_classes=2, ignore_label=255
    )
    return {
      "ids": ids,
      "list": ip.read_split(storage.join(root, "labelled.txt")),
      "classes": ip.read_class_table(f"{root}/classes.txt"),
      "sizes": ip.image_sizes(layout, ["a", "b", *ids]),
      "masks": [layout.has_mask(id) for id in ("a", "b")],
      "pixels": [image.tolist(), mask.tolist()],
    }

  remote = everything("gs://bucket")
  assert remote == everything(str(bucket))
  assert remote["ids"] == ("c",) and remote["sizes"] == [(9, 12)] * 3
  layout = ip.Layout("gs://bucket", "images", "masks", "")
  assert layout.image_path("b") == "gs://bucket/images/b.PNG"
  assert message_of(layout.read_mask, "b").startswith(
    "gs://bucket/masks/b.png: mask not found"
  )
  message = message_of(layout.check, ["a", "b"], masks=True)
  assert message.startswith("gs://bucket/masks/b.png: mask not found; 1 of 2")


@pytest.mark.parametrize("kind", [RuntimeError, OSError])
def test_errors_of_object_storage_are_one_line(no_tensorflow, kind):
  def refuse(original, path, *mode):
    raise kind("403\nno credentials for the bucket")

  with epath.testing.mock_epath(
    open=refuse, isdir=refuse, exists=refuse, listdir=refuse
  ):
    message = message_of(sources.read_file, "gs://bucket/a.jpg", "image")
    layout = ip.Layout("gs://bucket", "i", "m", "")
    for function, argument in [
      (layout.has_mask, "a"),
      (layout.read_image, "a"),
      (lambda id: layout.check([id], masks=False), "a"),
      (ip.read_split, "gs://bucket/list.txt"),
      (lambda folder: ip.find_unlabelled(layout, folder, ()), "u"),
      (lambda path: ip.Shards(path, mask_format="index"), "gs://bucket/tfds"),
    ]:
      assert "403 no credentials" in message_of(function, argument)
  assert message == (
    f"gs://bucket/a.jpg: cannot read the image: {kind.__name__}: 403 no"
    " credentials for the bucket"
  )


def test_local_files_do_not_load_the_object_store(tmp_path, monkeypatch):
  write(tmp_path / "a", "text")
  monkeypatch.setattr(storage, "_remote", None)
  assert storage.read_bytes(tmp_path / "a") == b"text"
  assert storage.names_in(tmp_path) == {"a"}
  assert storage.is_file(tmp_path / "a") and storage.is_folder(tmp_path)
  assert list(storage.files_below(tmp_path)) == ["a"]
