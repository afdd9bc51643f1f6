"""Predicts photographs, or exports a trained network.

  python -m u2pl_jax.predict --checkpoint=runs/voc_1464 --images=photos \
    --output=predictions
  python -m u2pl_jax.predict --checkpoint=runs/voc_1464 --output=exported \
    --export=stablehlo

docs/predict.md says what is read and written. Ends with 0 if the output folder
has something of it, with 1 and one line if not.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax
import ml_collections
import numpy as np

from input_pipeline import ConfigError, DataError, storage
from input_pipeline.command_line import fail, load_config
from input_pipeline.parallel import map_ahead, map_in_threads, progress
from input_pipeline.photos import (
  Photos,
  encode_classes,
  encode_map,
  encode_overlay,
  find_photos,
  has_image_suffix,
  photo_size,
  read_photo,
)
from u2pl_jax.checkpoint import CheckpointError
from u2pl_jax.export import write_export
from u2pl_jax.models.weight_files import WeightsError
from u2pl_jax.prediction_log import (
  CONFIDENCE,
  ENTROPY,
  MASKS,
  OVERLAYS,
  PredictionLog,
  output_files,
)
from u2pl_jax.tiling import SMALLEST_SIDE, Grid, Prediction, Predictor
from u2pl_jax.trained import NETWORKS, Trained, TrainedError, load_trained

# Side of the tiles of a network that was judged on images of any size: the
# window of the published evaluation of Cityscapes.
_DEFAULT_SIDE = 769
_LARGEST_SIDE = 4096
# Inputs that an accelerator takes at a time; a CPU takes one.
_ACCELERATOR_BATCH = 4
# Images that are read ahead, and predictions that wait to be written.
_AHEAD = 4
# Files without an image that are named at the end.
_SHOWN = 10

_USER_ERRORS = (
  CheckpointError,
  ConfigError,
  DataError,
  TrainedError,
  WeightsError,
)


@dataclasses.dataclass(frozen=True)
class _Job:
  """An image to predict.

  Attributes:
    name: of the input, relative to its folder.
    path: of the file.
    size: (height, width).
    files: kind -> output, relative to the output folder.
  """

  name: str
  path: str
  size: tuple[int, int]
  files: dict[str, str]


def make_grid(
  config: ml_collections.ConfigDict, tile: tuple[int, int] | None
) -> Grid:
  """The inputs of the network: those of its evaluation, if that had one shape.

  Args:
    config: of the network.
    tile: height and width of the tiles, if the user says so.
  """
  if tile is not None:
    return Grid(tile, one_shape=False)
  if config.eval.protocol == "padded":
    return Grid(tuple(config.eval.pad_to), one_shape=True)
  side = max(_DEFAULT_SIDE, *config.input.crop_size)
  return Grid((side, side), one_shape=False)


def network_digest(trained: Trained) -> str:
  """Digest of everything that decides the classes of a pixel."""
  digest = hashlib.sha256()
  info = trained.info
  facts = [info.class_names, info.palette, info.mean, info.std]
  digest.update(json.dumps(facts).encode())
  for path, leaf in jax.tree_util.tree_leaves_with_path(trained.variables):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()[:16]


def _check_apart(photos: Photos, output: str) -> None:
  """Outputs must not be among the inputs, this time or the next."""
  if storage.is_remote(output):
    raise DataError(f"--output={output}: must be a local folder")
  if storage.is_remote(photos.root):
    return
  target, root = os.path.realpath(output), os.path.realpath(photos.root)
  if photos.is_recursive and _is_inside(target, root):
    raise DataError(
      f"--output={output} is in the folder of the images, {photos.root}: the"
      " next run would predict the outputs: choose a folder outside"
    )
  for name in photos.names:
    if _is_inside(os.path.realpath(photos.path(name)), target):
      raise DataError(
        f"{photos.path(name)} is in --output={output}: choose an output folder"
        " without images"
      )


def _is_inside(path: str, folder: str) -> bool:
  return os.path.commonpath([path, folder]) == folder


def _look(path: str) -> tuple[int, int] | DataError:
  try:
    return photo_size(path)
  except DataError as error:
    return error


def _read(job: _Job) -> tuple[_Job, np.ndarray | DataError]:
  try:
    return job, read_photo(job.path)
  except DataError as error:
    return job, error


def _write(
  folder: str | os.PathLike,
  job: _Job,
  image: np.ndarray,
  prediction: Prediction,
  trained: Trained,
) -> dict[str, Any]:
  """Writes the pictures of an image; returns what its line says of it."""
  info = trained.info
  encoders = {
    MASKS: lambda: encode_classes(prediction.classes, info.palette),
    OVERLAYS: lambda: encode_overlay(image, prediction.classes, info.palette),
    ENTROPY: lambda: encode_map(prediction.entropy),
    CONFIDENCE: lambda: encode_map(prediction.confidence),
  }
  for kind, file in job.files.items():
    path = os.path.join(folder, file)
    try:
      os.makedirs(os.path.dirname(path), exist_ok=True)
      storage.write_whole(path, encoders[kind]())
    except OSError as error:
      raise DataError(
        f"{path}: cannot be written ({error.strerror}): make room for it; what"
        " is complete is kept, and the same command goes on"
      ) from None
  counts = np.bincount(prediction.classes.ravel(), minlength=info.num_classes)
  height, width = prediction.classes.shape
  return {
    "input": job.name,
    "outputs": job.files,
    "width": width,
    "height": height,
    "class_share": {
      name: round(count / (height * width), 6)
      for name, count in zip(info.class_names, counts.tolist(), strict=True)
    },
    "mean_confidence": round(prediction.mean_confidence, 6),
    "mean_entropy": round(prediction.mean_entropy, 6),
    "seconds": round(prediction.seconds, 4),
    "inputs": prediction.num_inputs,
    "checkpoint": trained.path,
    "weights": trained.weights,
    "step": trained.step,
  }


class _Writers:
  """Threads that write; the lines are appended by whoever gives the work."""

  def __init__(self, log: PredictionLog, same: dict[str, Any]):
    """`same` is added to every line."""
    self._log, self._same = log, same
    self._executor = concurrent.futures.ThreadPoolExecutor(_AHEAD)
    self._waiting: collections.deque = collections.deque()
    self.num_written = 0

  def put(self, *arguments: Any) -> None:
    """Has `_write(*arguments)` done; waits while there is too much to do."""
    if len(self._waiting) == _AHEAD:
      self._take()
    self._waiting.append(self._executor.submit(_write, *arguments))

  def _take(self) -> None:
    self._log.append(self._waiting.popleft().result() | self._same)
    self.num_written += 1

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback) -> None:
    with self._executor:
      # After an error what is written still gets its line; of a second error,
      # such as that of a full disk, the first one tells.
      failed = kind is not None
      while self._waiting:
        try:
          self._take()
        except DataError:
          if not failed:
            raise


def predict(
  trained: Trained,
  photos: Photos,
  output: str,
  *,
  tile: tuple[int, int] | None = None,
  batch: int | None = None,
  maps: Sequence[str] = (),
  overwrite: bool = False,
) -> int:
  """Predicts all images that are not predicted yet, and says so.

  Args:
    trained: the network.
    photos: the files.
    output: folder, local.
    tile: largest input; None for that of the network's evaluation.
    batch: inputs at a time; None for one a CPU, a few an accelerator.
    maps: of ENTROPY and CONFIDENCE, what to write besides masks and overlays.
    overwrite: predict everything again.

  Returns:
    Number of images that have outputs now.

  Raises:
    DataError: of the inputs or the output folder.
  """
  _check_apart(photos, output)
  grid = make_grid(trained.config, tile)
  if batch is None:
    on_cpu = jax.default_backend() == "cpu"
    batch = jax.device_count() * (1 if on_cpu else _ACCELERATOR_BATCH)
  with contextlib.closing(PredictionLog(output)) as log:
    kinds = (MASKS, OVERLAYS, *maps)
    return _predict(trained, photos, log, grid, batch, kinds, overwrite)


def _predict(
  trained: Trained,
  photos: Photos,
  log: PredictionLog,
  grid: Grid,
  batch: int,
  kinds: Sequence[str],
  overwrite: bool,
) -> int:
  is_remote = storage.is_remote(photos.root)
  same = {
    "root": photos.root if is_remote else os.path.realpath(photos.root),
    "network": network_digest(trained),
    "grid": grid.describe(),
  }
  stems = log.stems(photos.names)
  if not overwrite:
    log.check(photos.names, **same)
  todo = [n for n in photos.names if overwrite or not log.has(n, kinds)]
  num_done = len(photos.names) - len(todo)
  if not todo:
    print(f"{_count(num_done, 'image')} predicted already: {log.path}")
    return num_done
  log.drop(todo)

  looked = map_in_threads(
    _look, [photos.path(name) for name in todo], "looking at", "file"
  )
  jobs, failures = [], {}
  for name, found in zip(todo, looked, strict=True):
    if isinstance(found, DataError):
      failures[name] = found
    else:
      files = output_files(stems[name], kinds)
      jobs.append(_Job(name, photos.path(name), found, files))
  # Inputs of one shape together; the large images last, one by one.
  jobs.sort(
    key=lambda job: (
      not grid.fits(*job.size),
      grid.input_shape(*job.size),
      job.name,
    )
  )
  with contextlib.ExitStack() as stack:
    writers = stack.enter_context(_Writers(log, same))
    if jobs:
      print("\n".join(_plan(grid, jobs)), flush=True)
      pixels = sum(height * width for height, width in (j.size for j in jobs))
      bar = stack.enter_context(
        progress(pixels, "predicting", "px", scale=True)
      )
      predictor = Predictor(
        trained.model,
        trained.variables,
        num_classes=trained.info.num_classes,
        mean=trained.info.mean,
        std=trained.info.std,
        grid=grid,
        batch=batch,
        on_pixels=bar.update,
      )

      def images() -> Iterator[tuple[_Job, np.ndarray]]:
        for job, image in map_ahead(_read, jobs, _AHEAD):
          if isinstance(image, DataError):
            failures[job.name] = image
            bar.update(job.size[0] * job.size[1])
          else:
            yield job, image

      for job, image, prediction in predictor.predict(images()):
        writers.put(log.folder, job, image, prediction, trained)
        bar.set_postfix_str(job.name, refresh=False)
  log.rewrite()
  _say_result(photos, log, writers.num_written, num_done, failures)
  return writers.num_written + num_done


def _count(number: int, noun: str) -> str:
  return f"{number} {noun}{'' if number == 1 else 's'}"


def _plan(grid: Grid, jobs: Sequence[_Job]) -> list[str]:
  """What is about to be compiled, as lines."""
  shapes = collections.Counter(
    (not grid.fits(*job.size), grid.input_shape(*job.size)) for job in jobs
  )
  parts = [
    f"{count} in tiles of {h}x{w}" if is_tiled else f"{count} as one of {h}x{w}"
    for (is_tiled, (h, w)), count in sorted(shapes.items())
  ]
  return [
    f"{_count(len(jobs), 'image')}: {', '.join(parts)} (height x width);"
    f" {_count(len(shapes), 'shape')} to compile, of {grid.num_shapes()} that"
    " can occur"
  ]


def _say_result(
  photos: Photos,
  log: PredictionLog,
  num_written: int,
  num_done: int,
  failures: dict[str, DataError],
) -> None:
  no_images = sorted(n for n in failures if not has_image_suffix(n))
  unreadable = sorted(failures.keys() - set(no_images))
  if unreadable:
    print(
      f"{_count(len(unreadable), 'image')} cannot be read:", file=sys.stderr
    )
    for name in unreadable:
      print(f"  {failures[name]}", file=sys.stderr)
  if no_images:
    more = len(no_images) - _SHOWN
    print(
      f"not images, left out: {', '.join(no_images[:_SHOWN])}"
      + (f" and {more} more" if more > 0 else ""),
      file=sys.stderr,
    )
  if not num_written + num_done:
    raise DataError(
      f"--images: none of the {len(photos.names)} files in {photos.root} can be"
      " read as an image: nothing was predicted"
    )
  parts = [f"predicted {_count(num_written, 'image')}"]
  if num_done:
    parts.append(f"{num_done} predicted already")
  if failures:
    parts.append(f"{_count(len(failures), 'file')} left out")
  print(f"{', '.join(parts)}: {log.path}")


# -- The command ---------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
  """Tells what is wrong in one line."""

  def error(self, message: str) -> NoReturn:
    fail(message)


def _tile(text: str) -> tuple[int, int]:
  sides = text.lower().split("x")
  if len(sides) == 1:
    sides *= 2
  if len(sides) != 2 or not all(side.isdecimal() for side in sides):
    raise argparse.ArgumentTypeError(f"{text!r} is neither N nor HEIGHTxWIDTH")
  height, width = map(int, sides)
  for side in (height, width):
    if not SMALLEST_SIDE <= side <= _LARGEST_SIDE:
      raise argparse.ArgumentTypeError(
        f"a side has {SMALLEST_SIDE} to {_LARGEST_SIDE} pixels, not {side}"
      )
  return height, width


def _positive(text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
  return int(text)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = _Parser(
    prog="python -m u2pl_jax.predict",
    description="Predicts photographs, or exports a trained network.",
    epilog="Flags --config.key=value change keys of the --config.",
    allow_abbrev=False,
  )
  add = parser.add_argument
  add(
    "--checkpoint",
    required=True,
    metavar="PATH",
    help="workdir of a run, or a .pth or .npz file of weights",
  )
  add(
    "--images",
    metavar="PATH",
    help="folder (with those below), quoted pattern such as 'x/*.jpg', or file",
  )
  add(
    "--output",
    required=True,
    metavar="DIR",
    help="folder of the results; the same command again goes on",
  )
  add("--config", help="experiment file; for a file of weights, which needs it")
  add("--weights", choices=NETWORKS, help="default: the one judged in training")
  add("--step", type=_positive, help="checkpoint; default: the best by mIoU")
  add(
    "--tile",
    type=_tile,
    metavar="N|HxW",
    help="larger images are predicted in tiles of this size; default: the"
    f" padded shape of the run's evaluation, or {_DEFAULT_SIDE}",
  )
  add(
    "--batch",
    type=_positive,
    help="inputs at a time, over all devices; default: 1 a CPU,"
    f" {_ACCELERATOR_BATCH} an accelerator",
  )
  add("--entropy", action="store_true", help="also write maps of the entropy")
  add("--confidence", action="store_true", help="also of the confidence")
  add("--overwrite", action="store_true", help="do again what is there")
  add(
    "--export",
    choices=("stablehlo",),
    help="write the network itself, for images of the size of --tile",
  )
  options, rest = parser.parse_known_args(arguments)
  options.overrides = [x for x in rest if x.startswith("--config.")]
  unknown = [x for x in rest if not x.startswith("--config.")]
  if unknown:
    fail(f"unknown argument {unknown[0]!r}: see --help")
  if options.overrides and not options.config:
    fail(f"{options.overrides[0]}: needs --config")
  if options.export:
    for name in ("images", "batch", "entropy", "confidence"):
      if getattr(options, name):
        fail(f"--export writes the network alone: leave --{name} out")
  elif not options.images:
    fail("--images is missing: a folder, a pattern or a file")
  return options


def _run(options: argparse.Namespace) -> None:
  photos = None
  if not options.export:
    # Mistakes in paths should not wait for the weights.
    photos = find_photos(options.images)
    _check_apart(photos, options.output)
  config = None
  if options.config:
    config = load_config([f"--config={options.config}", *options.overrides])
  trained = load_trained(
    options.checkpoint,
    weights=options.weights,
    step=options.step,
    config=config,
  )
  step = "" if trained.step is None else f" of step {trained.step}"
  print(
    f"{trained.weights or 'network'}{step} from {trained.path}:"
    f" {trained.info.num_classes} classes",
    flush=True,
  )
  if options.export:
    shape = make_grid(trained.config, options.tile).tile
    for path in write_export(
      trained, shape, options.output, overwrite=options.overwrite
    ):
      print(path)
    return
  maps = [kind for kind in (ENTROPY, CONFIDENCE) if getattr(options, kind)]
  predict(
    trained,
    photos,
    options.output,
    tile=options.tile,
    batch=options.batch,
    maps=maps,
    overwrite=options.overwrite,
  )


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line; returns the exit status."""
  options = _parse(arguments)
  try:
    _run(options)
  except _USER_ERRORS as error:
    fail(str(error))
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    fail("the device has too little memory: choose a smaller --batch or --tile")
  except KeyboardInterrupt:
    without = " without --overwrite" if options.overwrite else ""
    fail(
      "interrupted; what is complete is kept, and the same command"
      f"{without} goes on",
      code=130,
    )
  return 0


if __name__ == "__main__":
  sys.exit(main())
