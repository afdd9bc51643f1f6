"""Plain 8-bit PNG by the quick way; all else is for the general decoders.

kornia_rs needs a third of OpenCV's time for a photograph and a quarter of PIL's
for a mask, but holds the interpreter lock meanwhile. PNG stores pixels without
losses, so that every decoder gives the same ones.
"""

import multiprocessing

import kornia_rs
import numpy as np

_SIGNATURE_AND_IHDR = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_GREY, _RGB, _PALETTE = 0, 2, 3
# One byte of a deflate stream stands for at most this many (RFC 1951: 258 in
# two bits). A header that promises more lies, and must not cost the memory.
_MOST_EXPANSION = 1032


def decode_rgb(data: bytes) -> np.ndarray | None:
  """Decodes an RGB photograph if this process may hold the interpreter lock.

  Only a worker process may: in the process that trains, a dozen milliseconds
  for each photograph would stop the thread that feeds the device, and further
  threads would not help.

  Args:
    data: an encoded image.

  Returns:
    uint8 [h, w, 3]; None if the general decoder must read the image, or say
    what is wrong with it.
  """
  if multiprocessing.parent_process() is None:
    return None
  if not _is_plain(data, (_RGB,)) or _needs_interpretation(data):
    return None
  return _decode(data, channels=3)


def decode_indices(data: bytes) -> np.ndarray | None:
  """Decodes an 8-bit mask: values of a grey image, indices of a palette one.

  Args:
    data: an encoded image.

  Returns:
    uint8 [h, w]; None as above.
  """
  if not _is_plain(data, (_GREY, _PALETTE)):
    return None
  pixels = _decode(data, channels=1)
  return None if pixels is None else pixels[..., 0]


def _is_plain(data: bytes, colour_types: tuple[int, ...]) -> bool:
  """Whether it is a PNG of 8 bits a sample without interlacing."""
  return (
    len(data) > 28
    and data.startswith(_SIGNATURE_AND_IHDR)
    and data[24] == 8
    and data[25] in colour_types
    and data[28] == 0
  )


def _needs_interpretation(data: bytes) -> bool:
  """Whether it holds a rotation (eXIf) or an animation (acTL)."""
  at = len(_SIGNATURE_AND_IHDR) - 8
  while at + 8 <= len(data):
    if data[at + 4 : at + 8] in (b"eXIf", b"acTL"):
      return True
    at += 12 + int.from_bytes(data[at : at + 4], "big")
  return False


def _decode(data: bytes, channels: int) -> np.ndarray | None:
  width = int.from_bytes(data[16:20], "big")
  height = int.from_bytes(data[20:24], "big")
  if height * width * channels > _MOST_EXPANSION * len(data):
    return None
  mode = {1: "mono", 3: "rgb"}[channels]
  try:
    return kornia_rs.io.decode_image_png_u8(data, (height, width), mode)
  except Exception:
    # It has no class of its own for errors. The general decoder fails too, and
    # its caller names the file.
    return None
