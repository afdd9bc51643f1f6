"""Images a second and core of the input pipeline, beside the published order.

  python scripts/bench_input.py
  python scripts/bench_input.py --json=input.json

Makes its own files: photo-like 500x375 JPEG with palette masks (crop 513, as
PASCAL VOC) and 2048x1024 PNG with grey masks (crop 769, as Cityscapes). Then it
reads each of them in turn with a mask:

  reference  the published order in PIL and torch: decode both, to float,
             normalise the whole image, resize all of it, flip, pad, crop
  ours       decode and crop, as a worker process of the input pipeline does

Both run in processes of their own with one thread each, in turns. What counts
is the best turn, in processor time: another program on the machine can only
make a turn slower. The rest of the table tells where our time goes, what grain
adds to a batch, and how much faster than one two workers are, for which wall
time must count: that row needs two idle cores and a third for this program.
"""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

import cv2
import numpy as np
import tqdm
from absl import app, flags
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import input_pipeline as ip
from input_pipeline import decode, parallel

# Not among everybody's flags: whoever imports this may have a --json too.
_FLAGS = flags.FlagValues()
_JSON = flags.DEFINE_string(
  "json", "", "Also write the rates here.", flag_values=_FLAGS
)
_SECONDS = flags.DEFINE_float(
  "seconds", 1.0, "Length of a turn.", lower_bound=0.1, flag_values=_FLAGS
)
_TURNS = flags.DEFINE_integer(
  "turns", 5, "Turns of each row.", lower_bound=1, flag_values=_FLAGS
)

_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)
_NUM_CLASSES = 19
_BATCH = 16
# Batches that a worker makes ahead: in its own buffer, in the queue, in work.
_HELD_BATCHES = 4


@dataclasses.dataclass(frozen=True)
class Case:
  """A kind of data set.

  Attributes:
    name: key in the JSON file.
    size: (height, width) of the files.
    suffix: of the images, '.jpg' or '.png'.
    crop: side of the crop.
    num_files: photographs to make.
    demand: images a second that one accelerator takes at this crop.
  """

  name: str
  size: tuple[int, int]
  suffix: str
  crop: int
  num_files: int
  demand: int

  def transform(self) -> ip.TrainTransform:
    return ip.TrainTransform((self.crop, self.crop))


CASES = (
  Case("voc", (375, 500), ".jpg", 513, 16, 150),
  Case("cityscapes", (1024, 2048), ".png", 769, 4, 60),
)


# -- Files ---------------------------------------------------------------------


def smooth_noise(
  rng: np.random.Generator, size: tuple[int, int], slope: float
) -> np.ndarray:
  """Noise with amplitude frequency ** -slope, as photographs have it (about 1).

  Returns:
    float [h, w] of mean 0 and standard deviation 1.
  """
  height, width = size
  y = np.fft.fftfreq(height)[:, None] * height
  x = np.fft.rfftfreq(width)[None] * width
  radius = np.hypot(y, x)
  radius[0, 0] = np.inf
  spectrum = np.fft.rfft2(rng.standard_normal(size)) * radius**-slope
  noise = np.fft.irfft2(spectrum, size)
  return noise / noise.std()


def make_photo(rng: np.random.Generator, case: Case) -> np.ndarray:
  """uint8 [h, w, 3] whose file is about as long as the real ones."""
  # The PNG of Cityscapes hold 2.3 MB, the JPEG of VOC 0.1 MB on average.
  slope, grain = (1.2, 1.0) if case.suffix == ".jpg" else (1.6, 0.7)
  brightness = smooth_noise(rng, case.size, slope)
  channels = [
    110
    + 40 * brightness
    + 12 * smooth_noise(rng, case.size, slope)
    + grain * rng.standard_normal(case.size)
    for _ in range(3)
  ]
  return np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8)


def make_mask(rng: np.random.Generator, case: Case) -> np.ndarray:
  """uint8 [h, w]: regions of a few classes."""
  scores = [smooth_noise(rng, case.size, 1.9) for _ in range(6)]
  classes = rng.permutation(_NUM_CLASSES)[:6].astype(np.uint8)
  return classes[np.argmax(scores, axis=0)]


def write_files(folder: str, case: Case) -> tuple[ip.Layout, list[str]]:
  """Writes photographs and masks of a case -> (layout, ids)."""
  layout = ip.Layout(folder, image_suffix=case.suffix)
  ids = [f"{i:04}" for i in range(case.num_files)]
  palette = sum(ip.voc_palette(256), ())
  for i, id in enumerate(ids):
    rng = np.random.default_rng(i)
    for path in (layout.image_path(id), layout.mask_path(id)):
      os.makedirs(os.path.dirname(path), exist_ok=True)
    photo = Image.fromarray(make_photo(rng, case))
    mask = Image.fromarray(make_mask(rng, case))
    if case.suffix == ".jpg":
      photo.save(layout.image_path(id), quality=93)
      mask.putpalette(palette)
    else:
      photo.save(layout.image_path(id))
    mask.save(layout.mask_path(id))
  return layout, ids


# -- What is measured ----------------------------------------------------------
# Functions of (case, layout) that return what to call with the id of an image.


def reference(case: Case, layout: ip.Layout) -> Callable[[str], object]:
  """The published order; independent of the input pipeline."""
  import torch
  from torch.nn import functional

  torch.set_num_threads(1)
  rng = np.random.default_rng(0)
  mean = torch.tensor(_MEAN)[:, None, None]
  std = torch.tensor(_STD)[:, None, None]

  def load(id):
    with open(layout.image_path(id), "rb") as file:
      image = np.asarray(Image.open(file).convert("RGB")).copy()
    with open(layout.mask_path(id), "rb") as file:
      label = np.asarray(Image.open(file)).copy()
    image = torch.from_numpy(image.transpose(2, 0, 1)[None]).float()
    label = torch.from_numpy(label[None, None]).float()
    image -= mean
    image /= std
    if rng.random() < 0.5:
      scale = 0.5 + 0.5 * rng.random()
    else:
      scale = 1 + rng.random()
    height, width = (int(side * scale) for side in case.size)
    image = functional.interpolate(
      image, size=(height, width), mode="bilinear", align_corners=False
    )
    label = functional.interpolate(label, size=(height, width), mode="nearest")
    if rng.random() < 0.5:
      image, label = image.flip(3), label.flip(3)
    missing = [max(case.crop - side, 0) for side in (width, height)]
    if any(missing):
      border = [part for m in missing for part in (m // 2, m - m // 2)]
      image = functional.pad(image, border, value=0.0)
      label = functional.pad(label, border, value=0.0)
    top, left = (
      int(rng.integers(0, side - case.crop + 1)) for side in image.shape[2:]
    )
    window = np.s_[..., top : top + case.crop, left : left + case.crop]
    return image[window][0].contiguous(), label[window][0, 0].long()

  return load


def ours(case: Case, layout: ip.Layout) -> Callable[[str], object]:
  """Decoding and crop of a labelled image."""
  transform, rng = case.transform(), np.random.default_rng(0)

  def load(id):
    image, mask = decode.decode_pair(
      layout, id, num_classes=_NUM_CLASSES, ignore_label=255
    )
    return transform(image, mask, rng)

  return load


def ours_unlabelled(case: Case, layout: ip.Layout) -> Callable[[str], object]:
  """Decoding and crop of an unlabelled image: its mask is never touched."""
  transform, rng = case.transform(), np.random.default_rng(0)
  return lambda id: transform(
    decode.decode_image(layout.image_path(id)), None, rng
  )


def decode_photo(case: Case, layout: ip.Layout) -> Callable[[str], object]:
  """The photograph alone."""
  return lambda id: decode.decode_image(layout.image_path(id))


def decode_mask(case: Case, layout: ip.Layout) -> Callable[[str], object]:
  """The mask alone."""
  return lambda id: decode.decode_mask(
    layout.mask_path(id), num_classes=_NUM_CLASSES, ignore_label=255
  )


def crop(case: Case, layout: ip.Layout) -> Callable[[str], object]:
  """Scale, flip and crop of an image and a mask that are decoded already."""
  transform, rng = case.transform(), np.random.default_rng(0)
  image = decode.decode_image(layout.image_path("0000"))
  mask = decode.decode_mask(
    layout.mask_path("0000"), num_classes=_NUM_CLASSES, ignore_label=255
  )
  return lambda id: transform(image, mask, rng)


def long_list(ids: list[str]) -> list[str]:
  """The ids again and again: grain takes up to 1 ms to shuffle a few."""
  return ids * (1464 // len(ids))


def grain_stream(case: Case, layout: ip.Layout) -> Callable[[str], object]:
  """A labelled image as a row of a batch, made when the batch is asked for."""
  stream = ip.make_train_stream(
    layout,
    long_list([f"{i:04}" for i in range(case.num_files)]),
    case.transform(),
    batch_size=_BATCH,
    seed=0,
    with_labels=True,
    num_classes=_NUM_CLASSES,
    num_threads=0,
  )
  waiting = []

  def load(unused_id):
    if not waiting:
      waiting.extend([next(stream)] * _BATCH)
    return waiting.pop()

  return load


_MEASURED = (
  reference,
  ours,
  ours_unlabelled,
  decode_photo,
  decode_mask,
  crop,
  grain_stream,
)


# -- Measuring -----------------------------------------------------------------


def cpu_rate(load: Callable[[str], object], ids: list[str]) -> float:
  """Calls a second of processor time, over at least one pass over `ids`."""
  # What lay idle since the last turn, caches and pages, is not its cost.
  for id in ids:
    load(id)
  count, begin = 0, time.process_time()
  while not count or time.process_time() < begin + _SECONDS.value:
    for id in ids:
      load(id)
    count += len(ids)
  return count / (time.process_time() - begin)


def serve(connection, argv, make, case, layout, ids):
  """Main of a measuring process: one turn for each message, until None."""
  _FLAGS(argv)
  cv2.setNumThreads(1)
  load = make(case, layout)
  connection.send(None)
  while connection.recv() is not None:
    connection.send(cpu_rate(load, ids))


class Process:
  """A process that measures one row, at rest between its turns."""

  def __init__(self, make, case, layout, ids):
    context = multiprocessing.get_context("spawn")
    self._connection, other = context.Pipe()
    self._process = context.Process(
      target=serve, args=(other, sys.argv, make, case, layout, ids), daemon=True
    )
    self._process.start()
    other.close()
    self._connection.recv()

  def turn(self) -> float:
    """Images a second of processor time."""
    self._connection.send(True)
    return self._connection.recv()

  def close(self) -> None:
    self._connection.send(None)
    self._process.join()


class Workers:
  """A stream of batches from worker processes."""

  def __init__(self, case, layout, ids, *, num_workers):
    self._stream = ip.make_train_stream(
      layout,
      long_list(ids),
      case.transform(),
      batch_size=_BATCH,
      seed=0,
      with_labels=True,
      num_classes=_NUM_CLASSES,
      num_workers=num_workers,
      num_threads=0,
      prefetch=num_workers,
    )
    self._num_workers = num_workers
    # Best rate of this process by its own processor time.
    self.main_rate = 0.0
    next(self._stream)

  def turn(self) -> float:
    """Images a second of wall time."""
    # What the workers hold ready is not the work of this turn.
    for _ in range(_HELD_BATCHES * self._num_workers):
      next(self._stream)
    num_batches, begin = 0, time.perf_counter()
    cpu_begin = time.process_time()
    # Workers take turns, and what they finish together arrives together.
    while num_batches % self._num_workers or (
      time.perf_counter() < begin + _SECONDS.value
    ):
      next(self._stream)
      num_batches += 1
    images = _BATCH * num_batches
    own = images / (time.process_time() - cpu_begin)
    self.main_rate = max(self.main_rate, own)
    rate = images / (time.perf_counter() - begin)
    # They work on until their buffers are full: not in the next row's turn.
    time.sleep(_HELD_BATCHES * self._num_workers * _BATCH / rate)
    return rate

  def close(self) -> None:
    self._stream.close()


def measure(case: Case, bar: tqdm.tqdm) -> dict[str, float]:
  """Best rates of a case in images a second, by row."""
  with tempfile.TemporaryDirectory() as folder:
    bar.set_postfix_str(f"{case.name}: writing files")
    layout, ids = write_files(folder, case)
    rows = {
      make.__name__: Process(make, case, layout, ids) for make in _MEASURED
    }
    for n in (1, 2):
      rows[f"workers_{n}"] = Workers(case, layout, ids, num_workers=n)
    rates = {name: [] for name in rows}
    for _ in range(_TURNS.value):
      for name, row in rows.items():
        bar.set_postfix_str(f"{case.name}: {name}")
        rates[name].append(row.turn())
        bar.update()
    for row in rows.values():
      row.close()
    best = {name: max(values) for name, values in rates.items()}
    best["main_process"] = rows["workers_2"].main_rate
    for name, path in (
      ("image_kilobytes", layout.image_path),
      ("mask_kilobytes", layout.mask_path),
    ):
      best[name] = sum(os.path.getsize(path(id)) for id in ids) / len(ids) / 1e3
  return best


def report(case: Case, best: dict[str, float]) -> str:
  """The table of a case."""

  def row(text, name, also=""):
    rate = best[name]
    return f"  {text:<40}{rate:>9.1f}{1e3 / rate:>9.2f}  {also}".rstrip()

  ratio = best["ours"] / best["reference"]
  # Half of the images that a step takes are unlabelled.
  mixed = 2 / (1 / best["ours"] + 1 / best["ours_unlabelled"])
  grain_ms = 1e3 * _BATCH * (1 / best["grain_stream"] - 1 / best["ours"])
  scaling = best["workers_2"] / best["workers_1"]
  height, width = case.size
  return "\n".join(
    [
      f"{case.name}: {width}x{height} {case.suffix[1:]} of"
      f" {best['image_kilobytes']:.0f} kB, masks of"
      f" {best['mask_kilobytes']:.1f} kB, crop {case.crop}",
      f"  {'':<40}{'images/s':>9}{'ms':>9}",
      row("published order, with mask", "reference"),
      row("ours, with mask", "ours", f"{ratio:.2f} x the published order"),
      row("  read and decode the image", "decode_photo"),
      row("  read and decode the mask", "decode_mask"),
      row("  scale, flip and crop both", "crop"),
      row("ours, unlabelled", "ours_unlabelled"),
      row(
        f"grain, with mask, in batches of {_BATCH}",
        "grain_stream",
        f"grain and stacking: {grain_ms:.1f} ms a batch",
      ),
      row("1 worker process (wall time)", "workers_1"),
      row("2 workers (wall time)", "workers_2", f"{scaling:.2f} x one"),
      row(
        "  of the main process, which copies",
        "main_process",
        f"{1e3 * _BATCH / best['main_process']:.1f} ms a batch",
      ),
      f"  cores for {case.demand} images/s, half unlabelled:"
      f" {case.demand / mixed:.2f}"
      f" (published order: {case.demand / best['reference']:.1f})",
    ]
  )


def main(unused_argv):
  _FLAGS.mark_as_parsed()
  turns = _TURNS.value * (len(_MEASURED) + 2) * len(CASES)
  bar = parallel.progress(turns, "measuring", "turn")
  record, tables = {}, []
  for case in CASES:
    best = measure(case, bar)
    tables.append(report(case, best))
    record[case.name] = {
      "ours": best["ours"],
      "reference": best["reference"],
      "ratio": best["ours"] / best["reference"],
    }
  bar.close()
  print(
    f"{os.cpu_count()} cores; one thread each, best of {_TURNS.value} turns of"
    f" {_SECONDS.value:g} s, images a second of processor time\n"
  )
  print("\n\n".join(tables))
  if _JSON.value:
    text = json.dumps(record, indent=2) + "\n"
    pathlib.Path(_JSON.value).write_text(text)


if __name__ == "__main__":
  # Before NumPy's and torch's libraries start theirs in the processes.
  for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
  flags.FLAGS.append_flag_values(_FLAGS)
  app.run(main)
