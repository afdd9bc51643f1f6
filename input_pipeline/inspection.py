"""Looks at single images and masks and says what is odd about them.

Never raises for what is wrong with a file: every problem becomes a `Problem`,
so that one look at a data set finds all of them.
"""

import dataclasses
import hashlib
import io
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image

from input_pipeline import datasets, decode, errors, sources

ERROR, WARNING = "error", "warning"

# Kind -> (severity, meaning). With an error the run fails or its numbers are
# wrong; with a warning it works, but somebody should look. docs/own_data.md has
# this table.
KINDS = {
  "unusable_list": (
    ERROR,
    "a list is missing, empty or no text",
  ),
  "repeated_id": (ERROR, "a list has an id twice"),
  "overlapping_lists": (ERROR, "two lists share an id"),
  "missing_image": (ERROR, "no image file for an id of a list"),
  "missing_mask": (ERROR, "no mask file for a labelled or validation image"),
  "ambiguous_id": (ERROR, "two files have the same id"),
  "empty_file": (ERROR, "a file of zero bytes"),
  "unreadable_image": (ERROR, "an image is damaged, truncated or no image"),
  "unreadable_mask": (ERROR, "a mask is damaged, truncated or no image"),
  "mask_format": (ERROR, "a mask is not stored as dataset.mask_format says"),
  "illegal_label": (ERROR, "a mask holds a value or colour that is no class"),
  "size_mismatch": (ERROR, "image and mask differ in size"),
  "leaked_image": (ERROR, "a validation image is also a training image"),
  "eval_size": (ERROR, "a validation image does not fit into eval.pad_to"),
  "rank_window": (
    ERROR,
    "contrastive.low_rank and high_rank do not fit",
  ),
  "duplicate_image": (WARNING, "the same training or validation image twice"),
  "rotated_image": (WARNING, "EXIF turns or mirrors an image when it is read"),
  "greyscale_image": (WARNING, "an image without colours"),
  "cmyk_image": (WARNING, "an image in printing colours, converted to RGB"),
  "sixteen_bit_image": (WARNING, "16 bits a channel, of which 8 are kept"),
  "alpha_image": (WARNING, "an image with transparency, which is dropped"),
  "mask_without_labels": (WARNING, "all pixels of a mask are ignored"),
  "class_without_labels": (WARNING, "no labelled pixel of a class"),
  "class_without_validation": (WARNING, "no validation pixel of a class"),
  "batch_size": (WARNING, "a batch is larger than its list"),
  "crop_size": (WARNING, "more than half of the crops would be padding"),
}


@dataclasses.dataclass(frozen=True)
class Problem:
  """One finding.

  Attributes:
    kind: a key of KINDS.
    path: the file, or the key of the config.
    detail: one line of text.
  """

  kind: str
  path: str
  detail: str

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f"kind {self.kind!r} must be one of {sorted(KINDS)}")

  @property
  def severity(self) -> str:
    return KINDS[self.kind][0]


@dataclasses.dataclass(frozen=True)
class ImageLook:
  """What one image is like.

  Attributes:
    path: of the file.
    problems: found.
    size: (height, width) as decoded; None if it cannot be.
    file_digest: of the encoded bytes; b'' if they cannot be read.
    pixel_digest: of the decoded pixels.
    sums: float64 [3, 3]: count, sum and sum of squares per channel, of every
      fourth row and column.
  """

  path: str
  problems: tuple[Problem, ...]
  size: tuple[int, int] | None = None
  file_digest: bytes = b""
  pixel_digest: bytes = b""
  sums: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class MaskLook:
  """What one mask is like.

  Attributes:
    path: of the file.
    problems: found.
    size: (height, width); None if the mask cannot be decoded to legal labels.
    storage: how its pixels are stored, such as 'palette'; '' if unknown.
    histogram: int64 [256], pixels of each label.
    digest: of the labels.
  """

  path: str
  problems: tuple[Problem, ...]
  size: tuple[int, int] | None = None
  storage: str = ""
  histogram: np.ndarray | None = None
  digest: bytes = b""


def problem_of(error: errors.DataError, path: str, what: str) -> Problem:
  """The problem that an error of reading an image or a mask stands for.

  Args:
    error: raised for the file.
    path: of the file.
    what: 'image' or 'mask'.
  """
  kinds = {
    errors.MissingFileError: f"missing_{what}",
    errors.EmptyFileError: "empty_file",
    errors.AmbiguousIdError: "ambiguous_id",
    errors.MaskFormatError: "mask_format",
    errors.LabelError: "illegal_label",
  }
  kind = kinds.get(type(error), f"unreadable_{what}")
  path = getattr(error, "path", path)
  return Problem(kind, path, str(error).removeprefix(f"{path}: "))


def look_at_image(
  source: sources.Source, id: str, *, has_mask: bool
) -> ImageLook:
  """Reads and decodes an image as a run would.

  Args:
    source: where images are.
    id: of the image.
    has_mask: whether a mask belongs to it; for the advice alone.
  """
  path = id
  try:
    path = source.image_path(id)
    data = source.read_image(id)
  except errors.DataError as error:
    return ImageLook(path, (problem_of(error, path, "image"),))
  file_digest = _digest(data)
  try:
    image = decode.image_from_bytes(data, path)
    problems = tuple(_oddities(data, path, has_mask))
  except errors.DataError as error:
    problem = problem_of(error, path, "image")
    return ImageLook(path, (problem,), file_digest=file_digest)
  sample = image[::4, ::4].reshape(-1, 3).astype(np.float64)
  sums = np.stack([np.full(3, len(sample)), sample.sum(0), (sample**2).sum(0)])
  return ImageLook(
    path,
    problems,
    size=image.shape[:2],
    file_digest=file_digest,
    pixel_digest=_digest(np.ascontiguousarray(image), image.shape),
    sums=sums,
  )


def look_at_mask(
  source: sources.Source,
  id: str,
  *,
  num_classes: int,
  ignore_label: int,
  mask_format: datasets.MaskFormat,
) -> MaskLook:
  """Reads and decodes a mask as a run would.

  Args:
    source: where masks are.
    id: of the image.
    num_classes, ignore_label, mask_format: as for `decode.decode_mask`.
  """
  path = id
  try:
    path = source.mask_path(id)
    data = source.read_mask(id)
  except errors.DataError as error:
    return MaskLook(path, (problem_of(error, path, "mask"),))
  stored = storage_of(data)
  try:
    labels = decode.mask_from_bytes(
      data,
      path,
      num_classes=num_classes,
      ignore_label=ignore_label,
      mask_format=mask_format,
    )
  except errors.DataError as error:
    problem = problem_of(error, path, "mask")
    if mask_format.kind == "colours" and problem.kind == "illegal_label":
      if _is_index(data, path, num_classes, ignore_label):
        problem = Problem(
          "mask_format",
          path,
          "all values are class ids, not colours of classes: the mask needs"
          " dataset.mask_format='index'",
        )
    return MaskLook(path, (problem,), storage=stored)
  histogram = np.bincount(labels.ravel(), minlength=256).astype(np.int64)
  problems = ()
  if histogram[ignore_label] == labels.size:
    problems = (
      Problem(
        "mask_without_labels",
        path,
        f"all pixels have the value to ignore, {ignore_label}: nothing is"
        " learnt from it",
      ),
    )
  return MaskLook(
    path,
    problems,
    size=labels.shape,
    storage=stored,
    histogram=histogram,
    digest=_digest(np.ascontiguousarray(labels), labels.shape),
  )


def look_at_pair(image: ImageLook, mask: MaskLook) -> tuple[Problem, ...]:
  """What is wrong between an image and its mask."""
  if image.size is None or mask.size is None or image.size == mask.size:
    return ()
  detail = (
    f"the mask is {size_text(mask.size)} but the image {image.path} is"
    f" {size_text(image.size)}; make one mask pixel per image pixel"
  )
  is_turned = any(p.kind == "rotated_image" for p in image.problems)
  if is_turned and mask.size == image.size[::-1]:
    detail = (
      f"the mask is {size_text(mask.size)} but the image {image.path} is"
      f" {size_text(image.size)} when its EXIF tag has turned it: save the"
      " image without the tag"
    )
  return (Problem("size_mismatch", mask.path, detail),)


def mean_and_std(
  sums: Sequence[np.ndarray],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and standard deviation per channel of the `sums` of some images."""
  count, total, squares = np.sum(sums, axis=0)
  mean = total / count
  std = np.sqrt(np.maximum(squares / count - mean**2, 0))
  return tuple(mean.tolist()), tuple(std.tolist())


def size_text(size: tuple[int, int]) -> str:
  """(height, width) for people."""
  return f"{size[1]}x{size[0]} (width x height)"


def _oddities(data: bytes, path: str, has_mask: bool) -> list[Problem]:
  """What is unusual about how an image is stored.

  Raises:
    DataError: there is no readable header.
  """
  found = []
  # Also raises what reading the sizes before an evaluation would raise.
  height, width, orientation = decode.read_header(io.BytesIO(data), path)
  if orientation != 1:
    advice = "; its mask must be turned alike" if has_mask else ""
    found.append(
      Problem(
        "rotated_image",
        path,
        f"stored as {size_text((height, width))}, and turned or mirrored by its"
        f" EXIF tag (orientation {orientation}) when it is read{advice}",
      )
    )
  with Image.open(io.BytesIO(data)) as file:
    mode = file.mode
    has_alpha = mode in ("RGBA", "LA", "PA") or "transparency" in file.info
    if mode in ("L", "LA", "1") or mode.startswith(("I", "F")):
      found.append(
        Problem(
          "greyscale_image",
          path,
          f"stored without colours (mode {mode}); red, green and blue become"
          " equal",
        )
      )
    if mode == "CMYK":
      found.append(
        Problem(
          "cmyk_image",
          path,
          "stored in printing colours (CMYK), which come out slightly"
          " different as RGB: save it as RGB",
        )
      )
    if _bits(file, data) > 8:
      found.append(
        Problem(
          "sixteen_bit_image",
          path,
          "16 bits a channel, of which the upper 8 are kept: if it comes out"
          " dark, rescale it to 8 bits",
        )
      )
    if has_alpha:
      try:
        alpha = np.asarray(file.convert("RGBA"))[..., 3]
      except decode.PIL_ERRORS:
        raise errors.UnreadableFileError(
          f"{path}: the file is damaged: copy or export it again"
        ) from None
      found.append(
        Problem(
          "alpha_image",
          path,
          f"has transparency, which is dropped; {int((alpha < 255).sum())}"
          " pixels are not opaque and show what lies behind",
        )
      )
  return found


def _bits(file: Image.Image, data: bytes) -> int:
  """Bits a channel; PIL's mode says it for grey images alone."""
  if file.format == "PNG":
    return data[24]
  if file.format == "TIFF":
    return max(file.tag_v2.get(258, (8,)))
  return 16 if file.mode.startswith("I") else 8


def storage_of(data: bytes) -> str:
  """How the pixels of a mask are stored, such as 'palette'; '' if unknown."""
  names = {"P": "palette", "L": "grey", "1": "bilevel"}
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", Image.DecompressionBombWarning)
      with Image.open(io.BytesIO(data)) as file:
        if file.format == "JPEG":
          return "JPEG"
        if file.mode.startswith("I"):
          return "16-bit grey"
        return names.get(file.mode, f"colour ({file.mode})")
  except decode.PIL_ERRORS:
    return ""  # `mask_from_bytes` says what is wrong.


def _is_index(
  data: bytes, path: str, num_classes: int, ignore_label: int
) -> bool:
  try:
    decode.mask_from_bytes(
      data, path, num_classes=num_classes, ignore_label=ignore_label
    )
  except errors.DataError:
    return False
  return True


def _digest(data: bytes | np.ndarray, shape: tuple[int, ...] = ()) -> bytes:
  digest = hashlib.blake2b(data, digest_size=16)
  digest.update(repr(shape).encode())
  return digest.digest()
