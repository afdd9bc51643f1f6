"""predictions.jsonl: which images of a folder are predicted, a line each.

A line is appended once the pictures of its image are complete on disk. What a
kill cuts off is dropped by the next run, which does that image again.
"""

import collections
import contextlib
import json
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from input_pipeline import DataError, storage

LOG_FILE = "predictions.jsonl"
MASKS, OVERLAYS = "masks", "overlays"
ENTROPY, CONFIDENCE = "entropy", "confidence"
# Folder of the outputs of a kind -> how their names end.
SUFFIXES = {
  MASKS: ".png",
  OVERLAYS: ".jpg",
  ENTROPY: ".png",
  CONFIDENCE: ".png",
}


def output_files(stem: str, kinds: Sequence[str]) -> dict[str, str]:
  """Kind -> file, relative to the folder of the predictions."""
  return {kind: f"{kind}/{stem}{SUFFIXES[kind]}" for kind in kinds}


class PredictionLog:
  """The lines of an output folder."""

  def __init__(self, folder: str | os.PathLike):
    """Opens the folder, which is made at need.

    Raises:
      DataError: it cannot be written, holds something else, or a line of its
        log cannot be read.
    """
    self.folder = pathlib.Path(folder)
    self.path = self.folder / LOG_FILE
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      if not self.path.exists():
        # Hidden: what a kill left of this file, or a file browser made.
        if any(path.name[0] != "." for path in self.folder.iterdir()):
          raise DataError(
            f"--output={folder}: the folder is not empty and holds no"
            f" {LOG_FILE} of earlier predictions: choose a new folder, so that"
            " nothing is mixed or overwritten"
          )
        # From now on the folder is known to be one of predictions.
        storage.write_whole(self.path, b"")
      self._lines = self._read()
      self._file = self.path.open("a", encoding="utf-8")
    except OSError as error:
      raise DataError(
        f"--output={folder}: cannot write there ({error.strerror}): choose a"
        " folder that you may write"
      ) from None

  def _read(self) -> dict[str, dict[str, Any]]:
    found = {}
    text = self.path.read_text(encoding="utf-8")
    # Behind the last newline there is nothing, or half a line.
    for number, line in enumerate(text.split("\n")[:-1], 1):
      try:
        value = json.loads(line)
        found[value["input"]] = value
        _ = value["root"], value["network"], value["grid"], value["outputs"]
      except (ValueError, KeyError, TypeError):
        raise DataError(
          f"{self.path}: line {number} is no line of this program: remove it,"
          " and its image is predicted again"
        ) from None
    return found

  def check(self, inputs: Collection[str], **same: Any) -> None:
    """Checks that lines of these inputs were made as they would be now.

    Args:
      inputs: names of images.
      **same: keys of a line and their value now.

    Raises:
      DataError: a line differs.
    """
    for name in inputs:
      line = self._lines.get(name, same)
      for key, value in same.items():
        if line[key] != value:
          shown = (
            "by another network"
            if key == "network"
            else f"with {key} {line[key]}, now {value}"
          )
          raise DataError(
            f"{self.path}: {name} was predicted {shown}: choose another"
            " --output, or --overwrite"
          )

  def stems(self, inputs: Sequence[str]) -> dict[str, str]:
    """Names of outputs, without suffix; no two inputs share one.

    An input keeps the name it has in the log. A new one gets its own without
    suffix, or all of it (a.jpg beside a.png) where that is taken or wanted
    twice.

    Raises:
      DataError: there is no free name.
    """
    stems = {}
    for name, line in self._lines.items():
      mask = line["outputs"][MASKS]
      stems[name] = mask.removeprefix(MASKS + "/").removesuffix(SUFFIXES[MASKS])
    taken = set(stems.values())
    new = [name for name in inputs if name not in stems]
    wanted = [os.path.splitext(name)[0] for name in new]
    times = collections.Counter(wanted)
    for name, stem in zip(new, wanted, strict=True):
      if stem in taken or times[stem] > 1:
        stem = name
      if stem in taken:
        raise DataError(
          f"{name}: the outputs would have the names of those of another image"
          f" in {self.folder}: rename it, or choose another --output"
        )
      taken.add(stem)
      stems[name] = stem
    return {name: stems[name] for name in inputs}

  def has(self, name: str, kinds: Sequence[str]) -> bool:
    """Whether an image is predicted, with all outputs of these kinds."""
    outputs = self._lines[name]["outputs"] if name in self._lines else {}
    return all(
      kind in outputs and (self.folder / outputs[kind]).is_file()
      for kind in kinds
    )

  def drop(self, names: Collection[str]) -> None:
    """Forgets images that will be predicted (again)."""
    for name in names:
      self._lines.pop(name, None)
    self.rewrite()

  def rewrite(self) -> None:
    """Writes all lines anew, sorted by input.

    Raises:
      DataError: they cannot be written; the file is as it was.
    """
    text = "".join(_to_text(self._lines[name]) for name in sorted(self._lines))
    with self._told():
      self._file.close()
      storage.write_whole(self.path, text.encode())
      self._file = self.path.open("a", encoding="utf-8")

  def append(self, line: Mapping[str, Any]) -> None:
    """Adds the line of an image whose outputs are complete.

    Raises:
      DataError: it cannot be written.
    """
    self._lines[line["input"]] = dict(line)
    with self._told():
      self._file.write(_to_text(line))
      self._file.flush()
      os.fsync(self._file.fileno())

  @contextlib.contextmanager
  def _told(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise DataError(
        f"{self.path}: cannot be written ({error.strerror}): make room for it;"
        " the same command goes on"
      ) from None

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def _to_text(line: Mapping[str, Any]) -> str:
  return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
