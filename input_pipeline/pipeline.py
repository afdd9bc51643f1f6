"""Streams of batches: an endless one to train on, a finite one to evaluate.

The order of images and all random draws follow from the seed and the number of
the batch alone, and where bad files are skipped from which files are bad.
Threads, processes and hosts only share out the work.
"""

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection, resource_tracker

import cv2
import grain
import numpy as np
from absl import flags

from input_pipeline import datasets, decode, errors, sources, transforms

Batch = dict[str, np.ndarray]

# Key of an element for the images that could not be read, as (id, text of the
# DataError) in the order of the attempts; alone where nothing could replace
# them. As data it passes through grain's threads and processes unchanged and in
# order, where an exception would come out wrapped, or with a foreign traceback.
_BAD = "bad"


def make_train_stream(
  source: sources.Source,
  ids: Sequence[str],
  transform: transforms.TrainTransform,
  *,
  batch_size: int,
  seed: int,
  start_batch: int = 0,
  with_labels: bool,
  num_classes: int,
  ignore_label: int = 255,
  mask_format: datasets.MaskFormat = datasets.INDEX_MASKS,
  num_workers: int = 0,
  num_threads: int = 4,
  prefetch: int = 4,
  shard_index: int = 0,
  shard_count: int = 1,
  on_bad_record: Callable[[str, str], None] | None = None,
  max_bad_records: int = 0,
) -> Iterator[Batch]:
  """An endless stream of augmented batches.

  Every pass over the ids is a fresh permutation, and passes follow each other
  without a gap: a batch may hold the end of one and the start of the next, and
  may be larger than the list of ids. Batch k follows from `seed` and k alone,
  so that a run that resumes with start_batch=k sees what the first run would
  have seen, whatever num_workers, num_threads and prefetch are.

  Close the stream, or use it in a `with` statement, to stop its threads and
  processes. With num_workers > 0 the usual rule of multiprocessing holds: the
  main module must be importable and guard its work by `__name__`.

  An image that cannot be read ends the stream, or with `on_bad_record` is
  replaced by the next one of `ids` that can, the first following the last. The
  replacement takes over the random draws of the row. Every attempt reads the
  file anew, so that one that is mended is used again.

  Args:
    source: where images and masks come from, such as a Layout.
    ids: the images.
    transform: makes one crop, `(image, mask or None, rng) -> dict`.
    batch_size: rows of the global batch.
    seed: of order and augmentation, >= 0; give two streams different seeds.
    start_batch: number of the first batch.
    with_labels: whether to read masks; False never touches a mask file.
    num_classes: valid labels are 0 ... num_classes - 1.
    ignore_label: the one other label that masks may hold.
    mask_format: what the pixels of masks mean.
    num_workers: processes that build batches; 0 builds them in this process.
    num_threads: threads per process; 0 with num_workers=0 builds each batch
      when it is asked for.
    prefetch: batches to keep ready, raised to num_threads.
    shard_index: which contiguous rows of every global batch to build here.
    shard_count: into how many parts the global batch is cut. The parts put one
      behind the other are the batch of shard_count=1.
    on_bad_record: called with the id and the reason, one line, for every image
      that a batch does without, before the batch is handed out and in the
      process that iterates. What it raises ends the stream. None: no image is
      replaced.
    max_bad_records: with it, images that one row may try in vain.

  Returns:
    An iterator with close(), a context manager. It yields image uint8
    [b, h, w, 3], label uint8 [b, h, w] (with_labels only), valid_box int32
    [b, 4] and index int32 [b], with b = batch_size / shard_count.

  Raises:
    DataError: `ids` is empty. While iterating a RecordError: a file is missing
      or bad and, with on_bad_record, nothing can replace it.
    ValueError: an argument is out of range.
  """
  if not ids:
    raise errors.DataError("there are no images to train on: the list is empty")
  _check_counts(
    batch_size=(batch_size, 1),
    seed=(seed, 0),
    start_batch=(start_batch, 0),
    num_workers=(num_workers, 0),
    num_threads=(num_threads, 0),
    prefetch=(prefetch, 0),
    shard_count=(shard_count, 1),
    max_bad_records=(max_bad_records, 0),
  )
  _check_shard(batch_size, shard_index, shard_count)
  load = _LoadTrainExample(
    source,
    tuple(ids),
    transform,
    with_labels,
    num_classes,
    ignore_label,
    mask_format,
    0 if on_bad_record is None else max_bad_records,
  )
  rows_here = batch_size // shard_count
  # Seeds of our own, not grain's default ones: those depend on how many
  # operations stand in the chain below.
  shuffle_seed, augment_seed = np.random.SeedSequence(seed).generate_state(2)
  # grain keys the rng of random_map by the position in the endless stream, so
  # that the next pass over an image draws another crop.
  records = (
    grain.MapDataset.range(len(ids))
    .shuffle(seed=int(shuffle_seed))
    .repeat()
    .random_map(load, seed=int(augment_seed))
  )
  records = _HostRows(
    records,
    batch_size=batch_size,
    first_row=shard_index * rows_here,
    num_rows=rows_here,
  )
  # Batches are whole before processes take turns, so that the number of
  # processes does not change them.
  batches = records.batch(rows_here, batch_fn=_stack)[start_batch:]
  stream = batches.to_iter_dataset(_read_options(num_threads, prefetch))
  if num_workers:
    _let_grain_read_its_flags()
    stream = stream.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=num_workers,
        per_worker_buffer_size=max(1, prefetch // num_workers),
      ),
      worker_init_fn=_init_worker,
    )
  return _Stream(
    iter(stream), has_workers=num_workers > 0, on_bad_record=on_bad_record
  )


def make_eval_stream(
  source: sources.Source,
  ids: Sequence[str],
  *,
  batch_size: int,
  pad_to: tuple[int, int] | None = None,
  center_crop: bool = False,
  window: tuple[int, int] | None = None,
  stride: tuple[int, int] | None = None,
  row_multiple: int | None = None,
  num_classes: int,
  ignore_label: int = 255,
  mask_format: datasets.MaskFormat = datasets.INDEX_MASKS,
  with_labels: bool = True,
  num_threads: int = 4,
  prefetch: int = 4,
  shard_index: int = 0,
  shard_count: int = 1,
) -> Iterator[Batch]:
  """A finite stream of whole images, each exactly once and in order.

  With `pad_to` images are padded at the bottom and on the right, all to one
  size. With `window` they are batched by how many windows it takes to cover
  them, and padded to what so many windows cover; one that is smaller than the
  window lies in the middle of it, as in the published code. With neither they
  are not padded but batched by size. Sizes come in the order of their first
  image, and the images of a size in the order of `ids`. A batch that is not
  full repeats its last image, with is_real False and all labels ignored.

  Args:
    source: where images and masks come from, such as a Layout.
    ids: the images.
    batch_size: rows of every batch.
    pad_to: (h, w) of every batch, or None.
    center_crop: pad on both sides alike, and cut what is larger than `pad_to`
      down to its middle: the protocol of the published code.
    window, stride: (h, w) in pixels of windows and of the steps between them,
      or None.
    row_multiple: if given, the batches of a size that has fewer than
      `batch_size` images have only as many rows as they need, a multiple of
      this.
    num_classes: valid labels are 0 ... num_classes - 1.
    ignore_label: the one other label that masks may hold; label of the padding.
    mask_format: what the pixels of masks mean.
    with_labels: whether to read masks; False never touches a mask file.
    num_threads: threads that build batches; 0 builds them when asked for.
    prefetch: batches to keep ready, raised to num_threads.
    shard_index, shard_count: as for `make_train_stream`. Of the images of
      other shards only the headers are read, for their sizes.

  Returns:
    An iterator with close(), a context manager. It yields image uint8
    [b, h, w, 3], label uint8 [b, h, w] (with_labels only), valid_box int32
    [b, 4], index int32 [b] and is_real bool [b], with b rows of this shard.

  Raises:
    DataError: `ids` is empty, an image is missing, unreadable or larger than
      `pad_to` without `center_crop`. While iterating a RecordError: a file is
      missing or bad. None is ever replaced: a score over other images would be
      another score.
    ValueError: an argument is out of range.
  """
  if not ids:
    raise errors.DataError("there are no images to evaluate: the list is empty")
  _check_counts(
    batch_size=(batch_size, 1),
    num_threads=(num_threads, 0),
    prefetch=(prefetch, 0),
    shard_count=(shard_count, 1),
  )
  _check_shard(batch_size, shard_index, shard_count)
  if row_multiple is not None and row_multiple % shard_count:
    raise ValueError(
      f"row_multiple {row_multiple} must be a multiple of shard_count"
      f" {shard_count}"
    )
  if center_crop and pad_to is None:
    raise ValueError("center_crop needs the size of the crop in pad_to")
  if (window is None) != (stride is None) or (window and pad_to):
    raise ValueError("window and stride go together, and without pad_to")
  plan = _plan_eval(
    source,
    ids,
    batch_size=batch_size,
    pad_to=pad_to,
    center_crop=center_crop,
    window=window,
    stride=stride,
    row_multiple=row_multiple,
  )
  load = _LoadEvalBatch(
    source,
    tuple(ids),
    with_labels,
    num_classes,
    ignore_label,
    mask_format,
    center_crop,
    window,
    shard_index,
    shard_count,
  )
  batches = grain.MapDataset.source(plan).map(load)
  stream = batches.to_iter_dataset(_read_options(num_threads, prefetch))
  return _Stream(iter(stream))


class _Stream:
  """Iterates over a grain dataset; raises errors and stops threads for it."""

  def __init__(
    self,
    iterator: grain.DatasetIterator,
    *,
    has_workers: bool = False,
    on_bad_record: Callable[[str, str], None] | None = None,
  ):
    # The threads and processes here are the parallelism; OpenCV's own threads
    # would only compete with them.
    cv2.setNumThreads(1)
    # A list, to take the iterator out of: grain's iterators clean up once more
    # when they are deleted, which at exit comes too late and prints tracebacks.
    self._open = [iterator]
    self._has_workers = has_workers
    self._has_started = False
    self._on_bad_record = on_bad_record
    # Runs at close, when nobody holds the stream any more, or at exit while
    # modules are still there.
    self._finalize = weakref.finalize(self, _close_all, self._open)

  def __iter__(self) -> "_Stream":
    return self

  def __next__(self) -> Batch:
    if not self._open:
      raise ValueError("the stream of batches is closed")
    batch = dict(self._next())
    if bad := batch.pop(_BAD, ()):
      self._report(bad, is_lost=not batch)
    if self._has_workers:
      # Batches of another process lie in shared memory that ends with the
      # array: a device could still be reading it, and what is alive when the
      # interpreter exits prints a traceback.
      batch = {key: np.array(value) for key, value in batch.items()}
    return batch

  def _next(self) -> Mapping:
    if not self._has_workers or self._has_started:
      return next(self._open[0])
    # grain starts its workers when it is first asked for something.
    with _starting_workers():
      batch = next(self._open[0])
    self._has_started = True
    return batch

  def _report(self, bad: Sequence[tuple[str, str]], *, is_lost: bool) -> None:
    try:
      if self._on_bad_record is not None:
        for id, reason in bad:
          self._on_bad_record(id, reason)
      if is_lost:
        id, reason = bad[-1]
        if len(bad) > 1:
          reason = (
            f"{reason} (nor can the {len(bad) - 1} images be read that were"
            " tried before it)"
          )
        raise errors.RecordError(reason, id)
    except BaseException:
      self.close()
      raise

  def close(self) -> None:
    """Stops threads and processes; closing twice is fine."""
    self._finalize()

  def __enter__(self) -> "_Stream":
    return self

  def __exit__(self, *unused_exception) -> None:
    self.close()


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
  while iterators:
    iterators.pop().close()


class _HostRows(grain.MapDataset):
  """Of every `batch_size` elements, the `num_rows` from `first_row` on.

  Elements are looked up when they are asked for, so that rows of other hosts
  cost nothing, and keep the position that keys their rng.
  """

  def __init__(
    self,
    parent: grain.MapDataset,
    *,
    batch_size: int,
    first_row: int,
    num_rows: int,
  ):
    super().__init__(parent)
    self._batch_size = batch_size
    self._first_row = first_row
    self._num_rows = num_rows

  def __len__(self) -> int:
    # Endless in practice, yet below sys.maxsize by more than the rounding of
    # grain's float arithmetic on lengths.
    return sys.maxsize // (2 * self._batch_size) * self._num_rows

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    batch, row = divmod(index, self._num_rows)
    return self._parent[batch * self._batch_size + self._first_row + row]


@dataclasses.dataclass(frozen=True)
class _LoadTrainExample:
  """(position in ids, rng) -> one example, and what is bad on the way to it.

  Attributes:
    max_bad: images that may be bad before there is no example; 0: none.
  """

  source: sources.Source
  ids: tuple[str, ...]
  transform: Callable[..., dict[str, np.ndarray]]
  with_labels: bool
  num_classes: int
  ignore_label: int
  mask_format: datasets.MaskFormat
  max_bad: int

  def __call__(self, index: int, rng: np.random.Generator) -> Mapping:
    bad = []
    for _ in self.ids:
      try:
        image, mask = _load(self, self.ids[index])
      except errors.DataError as error:
        bad.append((self.ids[index], str(error)))
        if len(bad) > self.max_bad:
          break
        index = (index + 1) % len(self.ids)
        continue
      example = self.transform(image, mask, rng)
      example = {**example, "index": np.int32(index)}
      return {**example, _BAD: tuple(bad)} if bad else example
    return {_BAD: tuple(bad)}


@dataclasses.dataclass(frozen=True)
class _EvalBatch:
  """Which images make a batch, its rows, and the size they are padded to."""

  indices: tuple[int, ...]
  num_rows: int
  size: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class _LoadEvalBatch:
  """_EvalBatch -> batch, or its first image that is bad."""

  source: sources.Source
  ids: tuple[str, ...]
  with_labels: bool
  num_classes: int
  ignore_label: int
  mask_format: datasets.MaskFormat
  center_crop: bool
  window: tuple[int, int] | None
  shard_index: int
  shard_count: int

  def __call__(self, plan: _EvalBatch) -> Mapping:
    num_rows = plan.num_rows // self.shard_count
    # Of the batch of all shards.
    rows = np.arange(num_rows) + self.shard_index * num_rows
    is_real = rows < len(plan.indices)
    index = np.asarray(plan.indices, np.int32)[
      np.minimum(rows, len(plan.indices) - 1)
    ]
    shape = (num_rows, *plan.size)
    image = np.zeros((*shape, 3), np.uint8)
    label = np.full(shape, self.ignore_label, np.uint8)
    valid_box = np.zeros((num_rows, 4), np.int32)
    # One image at least: a shard of fillers alone shows the last one too.
    num_read = max(1, int(is_real.sum()))
    for row, position in enumerate(index[:num_read].tolist()):
      try:
        photo, mask = _load(self, self.ids[position])
      except errors.DataError as error:
        return {_BAD: ((self.ids[position], str(error)),)}
      top = left = 0
      if self.center_crop:
        photo, (top, left) = _cut_middle(photo, plan.size)
        if mask is not None:
          mask, _ = _cut_middle(mask, plan.size)
      elif self.window is not None:
        top = max(self.window[0] - photo.shape[0], 0) // 2
        left = max(self.window[1] - photo.shape[1], 0) // 2
      h, w = photo.shape[:2]
      if h > plan.size[0] or w > plan.size[1]:
        id = self.ids[position]
        text = (
          f"{self.source.image_path(id)}: the image is {h}x{w} (height x"
          " width), not what its header says; save it again"
        )
        return {_BAD: ((id, text),)}
      box = np.s_[row, top : top + h, left : left + w]
      image[box] = photo
      if mask is not None and is_real[row]:
        label[box] = mask
      valid_box[row] = top, left, top + h, left + w
    for filled in (image, valid_box):
      filled[num_read:] = filled[num_read - 1]
    batch = {
      "image": image,
      "valid_box": valid_box,
      "index": index,
      "is_real": is_real,
    }
    if self.with_labels:
      batch["label"] = label
    return batch


def _cut_middle(
  pixels: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, tuple[int, int]]:
  """The middle of an image, and where it lies in a canvas of `size`."""
  h, w = pixels.shape[:2]
  top, left = max(h - size[0], 0) // 2, max(w - size[1], 0) // 2
  pixels = pixels[top : top + size[0], left : left + size[1]]
  return pixels, (max(size[0] - h, 0) // 2, max(size[1] - w, 0) // 2)


def _plan_eval(
  source: sources.Source,
  ids: Sequence[str],
  *,
  batch_size: int,
  pad_to: tuple[int, int] | None,
  center_crop: bool,
  window: tuple[int, int] | None,
  stride: tuple[int, int] | None,
  row_multiple: int | None,
) -> list[_EvalBatch]:
  groups = collections.defaultdict(list)
  for position, (h, w) in enumerate(decode.image_sizes(source, ids)):
    if window is not None:
      groups[covered_size((h, w), window, stride)].append(position)
      continue
    if pad_to is None:
      groups[h, w].append(position)
      continue
    if not center_crop and (h > pad_to[0] or w > pad_to[1]):
      raise errors.DataError(
        f"{source.image_path(ids[position])}: the image is {h}x{w} (height x"
        f" width), larger than eval.pad_to {pad_to[0]}x{pad_to[1]}; raise"
        " eval.pad_to to the largest image, or set it to None"
      )
    groups[tuple(pad_to)].append(position)
  plan = []
  for size, positions in groups.items():
    num_rows = batch_size
    if row_multiple is not None and len(positions) < batch_size:
      num_rows = -(-len(positions) // row_multiple) * row_multiple
    for start in range(0, len(positions), num_rows):
      rows = tuple(positions[start : start + num_rows])
      plan.append(_EvalBatch(rows, num_rows, size))
  return plan


def covered_size(
  size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]
) -> tuple[int, int]:
  """(h, w) that as many windows cover as it takes to cover `size`.

  All in pixels. The stride must not exceed the window.
  """
  steps = (
    max(0, -(-(length - wide) // step))
    for length, wide, step in zip(size, window, stride, strict=True)
  )
  return tuple(
    wide + n * step for wide, step, n in zip(window, stride, steps, strict=True)
  )


def _load(
  job: _LoadTrainExample | _LoadEvalBatch, id: str
) -> tuple[np.ndarray, np.ndarray | None]:
  if not job.with_labels:
    data = job.source.read_image(id)
    return decode.image_from_bytes(data, job.source.image_path(id)), None
  return decode.decode_pair(
    job.source,
    id,
    num_classes=job.num_classes,
    ignore_label=job.ignore_label,
    mask_format=job.mask_format,
  )


def _stack(examples: Sequence[Mapping]) -> Mapping:
  bad = []
  for example in examples:
    bad += example.get(_BAD, ())
    if example.keys() == {_BAD}:
      return {_BAD: tuple(bad)}
  batch = {
    key: np.stack([example[key] for example in examples])
    for key in examples[0]
    if key != _BAD
  }
  return {**batch, _BAD: tuple(bad)} if bad else batch


def _check_shard(batch_size: int, shard_index: int, shard_count: int) -> None:
  if not 0 <= shard_index < shard_count:
    raise ValueError(f"shard_index {shard_index} must be in 0 ... shard_count")
  if batch_size % shard_count:
    raise ValueError(
      f"batch_size {batch_size} must be a multiple of shard_count {shard_count}"
    )


def _read_options(num_threads: int, prefetch: int) -> grain.ReadOptions:
  # A buffer smaller than the number of threads would leave threads idle; grain
  # warns about it.
  buffer = max(prefetch, num_threads) if num_threads else 0
  return grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=buffer)


def _check_counts(**counts: tuple[int, int]) -> None:
  for name, (value, lowest) in counts.items():
    if value < lowest:
      raise ValueError(f"{name} is {value}; it must be at least {lowest}")


def _let_grain_read_its_flags() -> None:
  # Before it starts a process grain asks for a flag of its own, which absl
  # answers only once main has parsed flags: not in a test or a notebook.
  name = "grain_enable_multiprocess_worker_profiling"
  if name in flags.FLAGS and not flags.FLAGS.is_parsed():
    flags.FLAGS[name].present = 1


def _init_worker(worker_index: int, worker_count: int) -> None:
  del worker_index, worker_count
  cv2.setNumThreads(1)
  # Ctrl-C reaches the whole group; the parent ends its workers itself.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  # grain's workers wait for ever for a parent that was killed; a run that is
  # preempted must not leave them behind.
  threading.Thread(target=_exit_with_parent, daemon=True).start()


@contextlib.contextmanager
def _starting_workers() -> Iterator[None]:
  """Blocks SIGTERM, for good in workers that are started in here.

  A cluster sends it to all processes, and the parent needs its workers until it
  has stopped; it ends them itself. What is blocked in a thread, the threads and
  processes that it starts inherit. The parent hears the signal in another
  thread, or afterwards.
  """
  # To start this takes unblocking the signal, in the thread that needs it.
  resource_tracker.ensure_running()
  blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _exit_with_parent() -> None:
  parent = multiprocessing.parent_process()
  if parent is not None:
    connection.wait([parent.sentinel])
    os._exit(1)
