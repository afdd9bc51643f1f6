"""Small data sets in the form of the real ones, for tests.

Every mask is drawn once as class ids (`labels`) and stored in the convention of
its data set.
"""

import pathlib

import numpy as np
from PIL import Image

from configs import common
from input_pipeline import voc_palette

REPOSITORY = pathlib.Path(__file__).parent.parent
SIZE = (24, 32)


def _rng(id):
  return np.random.default_rng(list(id.encode()))


def photo(id, size=SIZE):
  """uint8 [h, w, 3], smooth enough for JPEG, different for every id."""
  corners = _rng(id).integers(0, 256, (3, 4, 3), np.uint8)
  image = Image.fromarray(corners)
  return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))


def labels(id, num_classes, size=SIZE):
  """uint8 [h, w]: class ids in blocks, and a stripe of 255."""
  blocks = _rng(id).integers(0, num_classes, (4, 4), np.uint8)
  image = Image.fromarray(blocks)
  mask = np.array(image.resize(size[::-1], Image.Resampling.NEAREST))
  mask[:, 3] = 255
  return mask


def save(path, pixels, *, palette=None):
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  image = Image.fromarray(pixels)
  if palette is not None:
    image.putpalette(sum(palette, ()))
  image.save(path)


def write_list(path, lines):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("\n".join(lines))  # Published lists end like this.


def small_config(root, **dataset):
  """The base config with everything small, and keys of config.dataset."""
  config = common.get_base_config()
  config.dataset.root = str(root)
  for key, value in dataset.items():
    config.dataset[key] = value
  config.batch.labelled = config.batch.unlabelled = 2
  config.input.crop_size = (33, 33)
  config.input.num_threads = 1
  config.eval.pad_to = (40, 40)
  config.eval.batch = 2
  return config


def write_voc(root):
  """VOC names, masks as VOC (palette) and SBD (grey) have them.

  The masks of unlabelled images are there, as in SegmentationClassAug.
  """
  fine, sbd = ("2007_000032", "2007_000039"), ("2008_000008", "2009_000001")
  validation = ("2007_000033", "2011_003276", "2011_003271")
  for id in fine + sbd + validation:
    save(root / "JPEGImages" / f"{id}.jpg", photo(id))
    palette = None if id in sbd else voc_palette(256)
    mask = root / "SegmentationClassAug" / f"{id}.png"
    save(mask, labels(id, 21), palette=palette)
  write_list(root / "splits/2/labeled.txt", fine)
  write_list(root / "splits/2/unlabeled.txt", sbd)
  write_list(root / "splits/val.txt", validation)
  return small_config(
    root,
    labelled_list="splits/2/labeled.txt",
    unlabelled_list="splits/2/unlabeled.txt",
    validation_list="splits/val.txt",
  )


# Label id of each train id, and of what has none ('out of roi').
_LABEL_IDS = np.full(256, 3, np.uint8)
_LABEL_IDS[:19] = (
  *(7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33),
)


def write_cityscapes(root):
  """Both kinds of masks, lists of paths, no masks of unlabelled images."""
  train = [f"train/ulm/ulm_{i:06}_000019" for i in range(4)]
  val = [f"val/lindau/lindau_{i:06}_000019" for i in range(2)]
  for id in train + val:
    save(root / f"leftImg8bit/{id}_leftImg8bit.png", photo(id))
    if id not in train[2:]:
      mask = labels(id, 19)
      save(root / f"gtFine/{id}_gtFine_labelTrainIds.png", mask)
      save(root / f"gtFine/{id}_gtFine_labelIds.png", _LABEL_IDS[mask])
  for name, ids in [
    ("splits/2/labeled.txt", train[:2]),
    ("splits/2/unlabeled.txt", train[2:]),
    ("splits/val.txt", val),
  ]:
    lines = [f"leftImg8bit/{id}_leftImg8bit.png" for id in ids]
    write_list(root / name, lines)
  return small_config(
    root,
    name="cityscapes",
    image_dir="leftImg8bit",
    mask_dir="gtFine",
    image_suffix="_leftImg8bit.png",
    mask_suffix="_gtFine_labelTrainIds.png",
    labelled_list="splits/2/labeled.txt",
    unlabelled_list="splits/2/unlabeled.txt",
    validation_list="splits/val.txt",
  )


OWN_COLOURS = {"ground": (10, 20, 30), "red coin": (200, 0, 0), "sky": (0,) * 3}
OWN_IGNORE = (255, 255, 255)


def write_own(root):
  """An own folder: mixed suffixes, colour masks, unlabelled images apart."""
  table = np.zeros((256, 3), np.uint8)
  table[:3] = list(OWN_COLOURS.values())
  table[255] = OWN_IGNORE
  for id, suffix in [
    ("IMG 1", ".jpg"),
    ("IMG 2", ".JPG"),
    ("sub/c", ".png"),
    ("v1", ".jpeg"),
    ("v2", ".bmp"),
  ]:
    save(root / f"images/{id}{suffix}", photo(id))
    save(root / f"masks/{id}.png", table[labels(id, 3)])
  for id, suffix in [("u1", ".JPEG"), ("u2", ".png"), ("day 2/u3", ".jpg")]:
    save(root / f"more/{id}{suffix}", photo(id))
  lines = [f"{name} {r} {g} {b}" for name, (r, g, b) in OWN_COLOURS.items()]
  lines.append("ignore 255 255 255")
  write_list(root / "classes.txt", lines)
  write_list(root / "labelled.txt", ["IMG 1.jpg", "IMG 2", "sub/c"])
  write_list(root / "val.txt", ["v1", "v2"])
  return small_config(
    root,
    name="folder",
    image_dir="images",
    mask_dir="masks",
    image_suffix="",
    mask_format="colours",
    classes_file="classes.txt",
    labelled_list="labelled.txt",
    validation_list="val.txt",
    unlabelled_dir="more",
  )
