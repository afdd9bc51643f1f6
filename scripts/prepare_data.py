"""Completes a data set that you downloaded: unpacks, installs lists, checks.

  python scripts/prepare_data.py voc --archives ~/Downloads
  python scripts/prepare_data.py cityscapes --archives ~/Downloads
  python scripts/prepare_data.py voc --splits-from path/to/clone/of/U2PL
  python scripts/prepare_data.py voc --num-labelled 200 --seed 1
  python scripts/prepare_data.py folder --root data/own --ids all.txt \
    --num-labelled 20

The first four lines find data/VOC2012 and data/cityscapes, or --root. Archives
are VOCtrainval_11-May-2012.tar and SegmentationClassAug.zip, or
leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip; what is unpacked
already is left alone, so that they are not needed twice. The published lists
are fetched, or taken from a folder, and must have the SHA-256 that
published_splits.sha256 has. They go to ROOT/splits/u2pl and
ROOT/splits/unimatch, where the configs look.

--num-labelled draws a new list instead, into ROOT/splits/own, such that every
class appears. Also for camvid, and for your own folder with index masks.

Run it again after whatever went wrong: it goes on, and a file that is in its
place is whole. docs/datasets.md has more.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import http.client
import os
import pathlib
import re
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from input_pipeline import (
  DataError,
  decode,
  parallel,
  read_split,
  storage,
)
from input_pipeline.datasets import DATASETS, MaskFormat
from input_pipeline.new_splits import draw_split

MANIFEST = pathlib.Path(__file__).with_name("published_splits.sha256")
BASE_URL = "https://raw.githubusercontent.com"
# Where the lists of a family are: repository and commit, and the folder there.
UPSTREAM = {
  "u2pl": (
    "Haochen-Wang409/U2PL/ab3d2be313d4d6b2885e7a0213d4fce82a803b79",
    "data/splits",
  ),
  "unimatch": (
    "LiheYoung/UniMatch/0324f3dd4a22128105a5eb135d2586c0bb3cc647",
    "splits",
  ),
}
ATTEMPTS = 3
PAUSE_SECONDS = 1.0
_FILES_AT_ONCE = 32

_IGNORE = 255


@dataclasses.dataclass(frozen=True)
class Archive:
  """One file of a download.

  Attributes:
    name: as its publisher names it.
    pattern: glob that also finds copies of it under other names.
    member: regular expression of the names of the members to unpack.
    target: where they go below the root, with the groups of `member`.
    source: where to get it.
  """

  name: str
  pattern: str
  member: str
  target: str
  source: str


@dataclasses.dataclass(frozen=True)
class DataSet:
  """What a complete data set looks like.

  Attributes:
    name: of the data set.
    root: where the configs look for it.
    image: path of an image below the root, `{id}` in place of the id.
    masks: likewise of its mask, and how it is coded (`MaskFormat.kind`); any of
      several kinds.
    ids: lists, relative to the root, that make up the training images.
    config: whose arguments are printed.
    lists: its folder in the repositories of the lists, '' for none.
    num_training, num_validation: images of the published data set.
    archives: of images and of masks.
  """

  name: str
  root: str
  image: str
  masks: tuple[tuple[str, str], ...]
  ids: tuple[str, ...]
  config: str
  lists: str = ""
  num_training: int = 0
  num_validation: int = 0
  archives: tuple[Archive, ...] = ()


_PUBLISHED_IDS = (
  "splits/u2pl/{n}/labeled.txt",
  "splits/u2pl/{n}/unlabeled.txt",
)
_CITYSCAPES_URL = (
  "https://www.cityscapes-dataset.com/downloads/ (needs a login)"
)
DATA_SETS = {
  "voc": DataSet(
    name="voc",
    root="data/VOC2012",
    image="JPEGImages/{id}.jpg",
    masks=(("SegmentationClassAug/{id}.png", "index"),),
    ids=tuple(path.format(n=1464) for path in _PUBLISHED_IDS),
    config="configs/voc.py",
    lists="pascal",
    num_training=10_582,
    num_validation=1_449,
    archives=(
      Archive(
        name="VOCtrainval_11-May-2012.tar",
        pattern="VOCtrainval*.tar",
        member=r"(?:.*/)?JPEGImages/([\w-]+\.jpg)",
        target=r"JPEGImages/\1",
        source="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
      ),
      Archive(
        name="SegmentationClassAug.zip",
        pattern="SegmentationClass*.zip",
        member=r"(?:.*/)?SegmentationClass(?:Aug)?/([\w-]+\.png)",
        target=r"SegmentationClassAug/\1",
        source="https://github.com/LiheYoung/UniMatch, README, 'Dataset'",
      ),
    ),
  ),
  "cityscapes": DataSet(
    name="cityscapes",
    root="data/cityscapes",
    image="leftImg8bit/{id}_leftImg8bit.png",
    masks=(
      ("gtFine/{id}_gtFine_labelIds.png", "cityscapes_label_ids"),
      ("gtFine/{id}_gtFine_labelTrainIds.png", "index"),
    ),
    ids=tuple(path.format(n=744) for path in _PUBLISHED_IDS),
    config="configs/cityscapes.py",
    lists="cityscapes",
    num_training=2_975,
    num_validation=500,
    archives=(
      Archive(
        name="leftImg8bit_trainvaltest.zip",
        pattern="leftImg8bit*.zip",
        member=r"(?:.*/)?(leftImg8bit/(?:train|val)/[\w-]+"
        r"/[\w-]+_leftImg8bit\.png)",
        target=r"\1",
        source=_CITYSCAPES_URL,
      ),
      Archive(
        name="gtFine_trainvaltest.zip",
        pattern="gtFine*.zip",
        member=r"(?:.*/)?(gtFine/(?:train|val)/[\w-]+"
        r"/[\w-]+_gtFine_label(?:Train)?Ids\.png)",
        target=r"\1",
        source=_CITYSCAPES_URL,
      ),
    ),
  ),
  "camvid": DataSet(
    name="camvid",
    root="data/camvid",
    image="JPEGImages/{id}.jpg",
    masks=(("SegmentationClass/{id}.png", "index"),),
    ids=("ImageSets/Segmentation/train.txt",),
    config="configs/camvid.py",
  ),
  "folder": DataSet(
    name="folder",
    root="data/own",
    image="",
    masks=(("masks/{id}.png", "index"),),
    ids=(),
    config="configs/folder.py",
  ),
}


# -- Writing and waiting -------------------------------------------------------


def write_whole(path: pathlib.Path, data: bytes) -> None:
  """Puts a file in its place, whole or not at all; makes the folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  storage.write_whole(path, data)


@contextlib.contextmanager
def only_one(root: pathlib.Path) -> Iterator[None]:
  """Holds the folder; two runs would write the same parts."""
  with (root / ".prepare_data.lock").open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise DataError(
        f"{root}: another prepare_data.py works here; wait for it"
      ) from None
    yield


# -- The published lists -------------------------------------------------------


def manifest(lists: str, family: str) -> dict[str, str]:
  """'<split>/labeled.txt' and so on -> SHA-256.

  Args:
    lists: folder of a data set in the repositories of the lists.
    family: a key of UPSTREAM.
  """
  prefix, found = f"{family}/{lists}/", {}
  for line in MANIFEST.read_text(encoding="utf-8").splitlines():
    digest, path = line.split()
    if path.startswith(prefix):
      found[path.removeprefix(prefix)] = digest
  return found


def install_lists(
  dataset: DataSet,
  root: pathlib.Path,
  families: Sequence[str],
  read: Callable[[str, str, str], bytes],
) -> None:
  """Puts the published lists under root/splits; those in place stay.

  Args:
    dataset: whose lists.
    root: of the data set.
    families: of UPSTREAM.
    read: `(family, path in its repository's lists, SHA-256) -> bytes` of it.

  Raises:
    DataError: a list cannot be had, or another file is in its place.
  """
  wanted = [
    (family, path, digest)
    for family in families
    for path, digest in manifest(dataset.lists, family).items()
  ]
  new = 0
  bar = parallel.progress(len(wanted), "lists", "list")
  for family, path, digest in wanted:
    target = root / "splits" / family / path
    if not target.is_file():
      write_whole(target, read(family, f"{dataset.lists}/{path}", digest))
      new += 1
    elif hashlib.sha256(target.read_bytes()).hexdigest() != digest:
      raise DataError(
        f"{target}: is not the published list (SHA-256 {digest[:12]}...): if it"
        " is yours, move it to another folder below splits/; else remove it,"
        " and run this again"
      )
    bar.update()
  bar.close()
  print(
    f"{len(wanted)} published lists in {root / 'splits'}, {new} of them new"
  )


def fetch(base_url: str, family: str, path: str, digest: str) -> bytes:
  """The list from its repository.

  Raises:
    DataError: the network or the content is not as it should be.
  """
  repository, folder = UPSTREAM[family]
  url = f"{base_url}/{repository}/{folder}/{path}"
  for attempt in range(ATTEMPTS):
    if attempt:
      time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
    try:
      with urllib.request.urlopen(url, timeout=30) as response:
        data = response.read()
    except urllib.error.HTTPError as error:
      problem = f"the server says {error.code} {error.reason}"
      if error.code < 500 and error.code != 429:
        break
    except (OSError, ValueError, http.client.HTTPException) as error:
      problem = str(getattr(error, "reason", error)) or type(error).__name__
    else:
      found = hashlib.sha256(data).hexdigest()
      if found == digest:
        return data
      problem = f"its SHA-256 is {found[:12]}... instead of {digest[:12]}..."
  raise DataError(
    f"{url}: cannot be fetched ({problem}): try again later, or copy a clone of"
    " the repository here and give --splits-from"
  )


def _places(folder: pathlib.Path, family: str, path: str) -> list[pathlib.Path]:
  """Where a folder of both families, or a clone of one, has a list."""
  below = (family, "data/splits", "splits", "")
  places = [folder / name / path for name in below]
  return [place for place in places if place.is_file()]


def has_family(folder: pathlib.Path, lists: str, family: str) -> bool:
  """Whether any of a family's published lists is in a folder."""
  return any(
    hashlib.sha256(place.read_bytes()).hexdigest() == digest
    for path, digest in manifest(lists, family).items()
    for place in _places(folder, family, f"{lists}/{path}")
  )


def read_from(
  folder: pathlib.Path, family: str, path: str, digest: str
) -> bytes:
  """The list from a folder of both families, or from a clone of one.

  Raises:
    DataError: it is not there, or is another one.
  """
  places = _places(folder, family, path)
  for place in places:
    data = place.read_bytes()
    if hashlib.sha256(data).hexdigest() == digest:
      return data
  if places:
    raise DataError(
      f"{places[0]}: is not the published list of {family} (SHA-256"
      f" {digest[:12]}...); take the commit {UPSTREAM[family][0]}"
    )
  raise DataError(
    f"--splits-from={folder}: holds neither {family}/{path} nor {path}; it must"
    f" be a folder of all lists, or a clone of {UPSTREAM[family][0]}"
  )


# -- Unpacking -----------------------------------------------------------------


def _members(
  path: pathlib.Path,
) -> Iterator[tuple[int, str, int, Callable]]:
  """(position in the archive, name, bytes, opener) of every file in it."""
  if zipfile.is_zipfile(path):
    with zipfile.ZipFile(path) as archive:
      for info in archive.infolist():
        if not info.is_dir():
          opener = functools.partial(archive.open, info)
          yield info.header_offset, info.filename, info.file_size, opener
  else:
    with tarfile.open(path) as archive:
      for info in archive:
        if info.isfile():
          opener = functools.partial(archive.extractfile, info)
          yield info.offset, info.name, info.size, opener
      # Of a header that is cut off, tarfile says nothing.
      archive.fileobj.seek(archive.offset)
      if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise EOFError("its end is missing")


def unpack(archive: Archive, path: pathlib.Path, root: pathlib.Path) -> None:
  """Unpacks what is wanted and not there in full size.

  Every file is written beside its place and renamed, so that one in its place
  is whole, whenever this was interrupted.

  Raises:
    DataError: the archive is broken or another one.
  """
  writer = _Writer()
  pattern = re.compile(archive.member)
  matches = new = 0
  bar = parallel.progress(path.stat().st_size, path.name, "B", scale=True)
  try:
    for position, name, size, open_member in _members(path):
      bar.update(position - bar.n)
      match = pattern.fullmatch(name)
      if match is None:
        continue
      matches += 1
      target = root / match.expand(archive.target)
      if not (target.is_file() and target.stat().st_size == size):
        writer.write(open_member, size, target)
        new += 1
    writer.settle()
  except (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
  ) as error:
    # Of tarfile's message, the first line of many; zipfile has none for some.
    reason = (str(error) or "it ends early").splitlines()[0].rstrip(":")
    raise DataError(
      f"{path}: broken after {matches} files ({reason}): the download is not"
      f" whole; download it again from {archive.source}"
    ) from None
  finally:
    bar.close()
  if not matches:
    raise DataError(
      f"{path}: holds no file like {archive.member}; {archive.name} is wanted,"
      f" from {archive.source}"
    )
  print(f"{path.name}: {matches} files, {new} of them new")


class _Writer:
  """Writes files beside their places, and renames them when they are on disk.

  Many at a time: a file system settles the files of many threads at once.
  """

  def __init__(self):
    self._pool = concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE)
    self._waiting: list[tuple[pathlib.Path, pathlib.Path]] = []

  def write(
    self, open_member: Callable, size: int, target: pathlib.Path
  ) -> None:
    """Copies a member; EOFError if it is not of that size."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with open_member() as source, part.open("wb") as file:
      shutil.copyfileobj(source, file)
      if file.tell() != size:
        raise EOFError(f"{target.name} has {file.tell()} of {size} bytes")
    self._waiting.append((part, target))
    if len(self._waiting) == _FILES_AT_ONCE:
      self.settle()

  def settle(self) -> None:
    """Puts what is written in its place."""
    for _ in self._pool.map(_sync_file, [part for part, _ in self._waiting]):
      pass
    for part, target in self._waiting:
      os.replace(part, target)
    self._waiting.clear()


def _sync_file(path: pathlib.Path) -> None:
  with path.open("rb+") as file:
    os.fsync(file.fileno())


def unpack_all(
  dataset: DataSet, root: pathlib.Path, folder: pathlib.Path
) -> None:
  """Unpacks the archives of a data set that are in a folder.

  Raises:
    DataError: there is no such folder, or none of the archives is in it.
  """
  if not folder.is_dir():
    raise DataError(f"--archives={folder}: there is no such folder")
  found = False
  for archive in dataset.archives:
    for path in sorted(folder.glob(archive.pattern)):
      unpack(archive, path, root)
      found = True
  if not found:
    names = " or ".join(archive.name for archive in dataset.archives)
    raise DataError(f"--archives={folder}: holds neither {names}")


# -- Checking ------------------------------------------------------------------


class _Folders:
  """Which files exist and are not empty; lists every folder once."""

  def __init__(self, root: pathlib.Path):
    self._root = root
    self._names: dict[str, set[str]] = {}

  def missing(self, paths: Iterable[str]) -> list[str]:
    return [path for path in paths if not self._has(path)]

  def _has(self, path: str) -> bool:
    folder, name = os.path.split(path)
    if folder not in self._names:
      try:
        with os.scandir(self._root / folder) as entries:
          names = {e.name for e in entries if e.is_file() and e.stat().st_size}
      except (FileNotFoundError, NotADirectoryError):
        names = set()
      self._names[folder] = names
    return name in self._names[folder]


def training_ids(dataset: DataSet, root: pathlib.Path) -> tuple[str, ...]:
  """All training images, sorted."""
  return tuple(
    sorted(id for path in dataset.ids for id in read_split(root / path))
  )


def check(dataset: DataSet, root: pathlib.Path) -> None:
  """Counts the files of a data set, and says what is missing.

  Raises:
    DataError: something is.
  """
  folders = _Folders(root)
  parts = {
    "training": training_ids(dataset, root),
    "validation": read_split(root / "splits" / "u2pl" / "val.txt"),
  }
  expected = (dataset.num_training, dataset.num_validation)
  assert tuple(len(ids) for ids in parts.values()) == expected
  everything = [id for ids in parts.values() for id in ids]
  mask, _ = best = _best_mask(dataset, folders, everything)
  problems = []
  kinds = (("images", dataset.image), ("masks", mask))
  for archive, (kind, template) in zip(dataset.archives, kinds, strict=True):
    for part, ids in parts.items():
      missing = folders.missing(template.format(id=id) for id in ids)
      print(f"{part} {kind}: {len(ids) - len(missing)} of {len(ids)}")
      if missing:
        more = ", ..." if len(missing) > 3 else ""
        problems.append(
          f"{root}: {len(missing)} of {len(ids)} {part} {kind} are missing or"
          f" empty, for example {', '.join(missing[:3])}{more}: give --archives"
          f" a folder with {archive.name}, from {archive.source}"
        )
  if best != dataset.masks[0]:
    suffix = mask.split("{id}")[1]
    print(
      f"masks are of train ids: run with --config.dataset.mask_suffix={suffix}"
      " --config.dataset.mask_format=index"
    )
  if not problems:
    print(f"{root}: complete")
    return
  usable = _usable_splits(dataset, root, folders, mask)
  print(f"splits that can be used as it is: {', '.join(usable) or 'none'}")
  for problem in problems[1:]:
    print(f"also: {problem}")
  raise DataError(problems[0])


def _best_mask(
  dataset: DataSet, folders: _Folders, ids: Sequence[str]
) -> tuple[str, str]:
  """The kind of masks of which the fewest are missing, the first of equals."""
  return min(
    dataset.masks,
    key=lambda mask: len(folders.missing(mask[0].format(id=id) for id in ids)),
  )


def _usable_splits(
  dataset: DataSet, root: pathlib.Path, folders: _Folders, mask: str
) -> list[str]:
  """Splits of which all images, labelled and validation masks are there."""
  usable = []
  validation = read_split(root / "splits" / "u2pl" / "val.txt")
  for path in sorted((root / "splits").glob("*/*/labeled.txt")):
    labelled = read_split(path)
    unlabelled = read_split(path.with_name("unlabeled.txt"))
    images = (*labelled, *unlabelled, *validation)
    files = [dataset.image.format(id=id) for id in images]
    files += [mask.format(id=id) for id in (*labelled, *validation)]
    if not folders.missing(files):
      usable.append(f"{path.parent.parent.name}/{path.parent.name}")
  return usable


# -- New splits ----------------------------------------------------------------


def _classes_of(
  dataset: DataSet, root: pathlib.Path, ids: tuple[str, ...]
) -> dict[str, frozenset[int]]:
  """Class ids in the mask of every image."""
  template, kind = _best_mask(dataset, _Folders(root), ids)
  info = DATASETS.get(dataset.name)

  def look(id: str) -> frozenset[int]:
    labels = decode.decode_mask(
      root / template.format(id=id),
      # Your own classes may be as many as there are bytes.
      num_classes=info.num_classes if info else _IGNORE,
      ignore_label=_IGNORE,
      mask_format=MaskFormat(kind),
    )
    return frozenset(np.unique(labels).tolist()) - {_IGNORE}

  found = parallel.map_in_threads(look, ids, "reading masks", "mask")
  classes = dict(zip(ids, found, strict=True))
  num_classes = info.num_classes if info else 0
  absent = set(range(num_classes)) - set().union(*classes.values())
  if absent:
    raise DataError(
      f"class {min(absent)} is in none of the {len(ids)} masks, so that no list"
      " can show every class"
    )
  return classes


def new_split(
  dataset: DataSet,
  root: pathlib.Path,
  *,
  num_labelled: int,
  seed: int,
  ids: str | None,
  name: str | None,
) -> None:
  """Draws a split and writes both lists, at once or not at all.

  Args:
    dataset: whose masks to read.
    root: of the data set.
    num_labelled, seed: see `draw_split`.
    ids: list, relative to the root, to draw from; all training images by
      default. What is not drawn is unlabelled, and so are the training images
      that it does not have.
    name: of the split; by default its number and seed.

  Raises:
    DataError: it cannot be drawn, or another split has its place.
  """
  if ids is None and not dataset.ids:
    raise DataError(
      "folder needs --ids: a list of the images that have masks, relative to"
      " --root"
    )
  pool = read_split(root / ids) if ids else training_ids(dataset, root)
  everything = sorted({*pool, *training_ids(dataset, root)})
  if not 1 <= num_labelled < len(everything):
    raise DataError(
      f"--num-labelled={num_labelled}: must be between 1 and"
      f" {len(everything) - 1}, so that some of the {len(everything)} images"
      " stay unlabelled"
    )
  classes = _classes_of(dataset, root, pool)
  labelled = draw_split(classes, num_labelled, seed=seed)
  taken = set(labelled)
  texts = {
    "labeled.txt": "\n".join(labelled) + "\n",
    "unlabeled.txt": "\n".join(i for i in everything if i not in taken) + "\n",
  }
  folder = root / "splits" / "own" / (name or f"{num_labelled}_seed{seed}")
  if folder.exists():
    for file, text in texts.items():
      path = folder / file
      if not path.is_file() or path.read_text(encoding="utf-8") != text:
        raise DataError(
          f"{folder}: holds another split: remove it, or choose a --name"
        )
  else:
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    for file, text in texts.items():
      write_whole(part / file, text.encode())
    os.rename(part, folder)
  counts = collections.Counter(c for id in labelled for c in classes[id])
  shown = ", ".join(f"{c}: {counts[c]}" for c in sorted(counts))
  print(f"{folder}: {num_labelled} labelled, images of each class: {shown}")
  print(f"run with: {_config_flags(dataset, root, folder)}")


def _config_flags(
  dataset: DataSet, root: pathlib.Path, folder: pathlib.Path
) -> str:
  split = folder.relative_to(root / "splits")
  flags = [f"--config={dataset.config}"]
  if dataset.name != "folder":
    flags[0] += f":split={split}"
  if str(root) != dataset.root:
    flags.append(f"--config.dataset.root={root}")
  if dataset.name == "folder":
    flags += [
      f"--config.dataset.labelled_list=splits/{split}/labeled.txt",
      f"--config.dataset.unlabelled_list=splits/{split}/unlabeled.txt",
    ]
  return " ".join(flags)


# -- The command ---------------------------------------------------------------


def _install(
  arguments: argparse.Namespace, dataset: DataSet, root: pathlib.Path
) -> None:
  """The published lists, from where the arguments say."""
  folder = arguments.splits_from
  if folder is None:

    def read(family: str, path: str, digest: str) -> bytes:
      return fetch(arguments.base_url, family, path, digest)

    install_lists(dataset, root, tuple(UPSTREAM), read)
    return

  if not folder.is_dir():
    raise DataError(f"--splits-from={folder}: there is no such folder")

  def read(family: str, path: str, digest: str) -> bytes:
    return read_from(folder, family, path, digest)

  # A clone of U2PL has its own lists only, and most rows need no others.
  families = ["u2pl"]
  if has_family(folder, dataset.lists, "unimatch"):
    families.append("unimatch")
  else:
    print(f"lists of unimatch: not in {folder}, left out")
  install_lists(dataset, root, families, read)


def prepare(arguments: argparse.Namespace) -> None:
  """Does what the arguments ask for; DataError with one line if it cannot."""
  dataset = DATA_SETS[arguments.dataset]
  root = arguments.root or pathlib.Path(dataset.root)
  if arguments.masks is not None:
    if "{id}" not in arguments.masks:
      raise DataError(
        f"--masks={arguments.masks}: needs {{id}} in place of the id"
      )
    dataset = dataclasses.replace(dataset, masks=((arguments.masks, "index"),))
  if arguments.num_labelled is None:
    if not dataset.lists:
      raise DataError(
        f"there is nothing to fetch or to count for {dataset.name}: give"
        " --num-labelled to draw a list"
      )
    root.mkdir(parents=True, exist_ok=True)
    with only_one(root):
      _install(arguments, dataset, root)
      if arguments.archives is not None:
        unpack_all(dataset, root, arguments.archives)
      check(dataset, root)
    return

  if not root.is_dir():
    raise DataError(f"{root}: there is no such folder; --root names another")
  if arguments.seed < 0:
    raise DataError(f"--seed={arguments.seed}: must be 0 or more")
  with only_one(root):
    there = all((root / path).is_file() for path in dataset.ids)
    if dataset.lists and not there:
      _install(arguments, dataset, root)
    new_split(
      dataset,
      root,
      num_labelled=arguments.num_labelled,
      seed=arguments.seed,
      ids=arguments.ids,
      name=arguments.name,
    )


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("dataset", choices=DATA_SETS)
  parser.add_argument(
    "--root", type=pathlib.Path, help="of the data set; default: data/..."
  )
  parser.add_argument(
    "--archives", type=pathlib.Path, help="folder with what you downloaded"
  )
  parser.add_argument(
    "--splits-from",
    type=pathlib.Path,
    help="folder with the published lists, or a clone of their repository;"
    " default: fetch them",
  )
  parser.add_argument(
    "--base-url", default=BASE_URL, help="mirror of " + BASE_URL
  )
  parser.add_argument(
    "--num-labelled", type=int, help="draw a list of so many images instead"
  )
  parser.add_argument("--seed", type=int, default=0, help="of the draw")
  parser.add_argument(
    "--ids", help="list to draw from, relative to the root; default: all"
  )
  parser.add_argument(
    "--name", help="of the drawn split; default: <number>_seed<seed>"
  )
  parser.add_argument(
    "--masks",
    help="where index masks are, such as labels/{id}.png; default: as the"
    " config of the data set has it",
  )
  try:
    prepare(parser.parse_args(argv))
  except DataError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
  except OSError as error:
    where = f"{error.filename}: " if error.filename else ""
    print(f"error: {where}{error.strerror or error}", file=sys.stderr)
    sys.exit(1)
  except KeyboardInterrupt:
    print("error: interrupted; run it again to go on", file=sys.stderr)
    sys.exit(130)


if __name__ == "__main__":
  main()
