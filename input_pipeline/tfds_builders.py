"""Builders of tensorflow-datasets that write a data set into shards.

`write_shards` is the way to run them. They take the encoded files as they are;
nothing is decoded and nothing needs tensorflow.
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds

from input_pipeline import decode, errors, shards, sources, storage

# Keys of records are spread over the range of the writer's hashes, because it
# sorts bucket by bucket: small keys would share one, all of it in memory.
_KEY_RANGE = 2**128


class _EncodedFiles(tfds.core.GeneratorBasedBuilder):
  """Splits 'images' and 'masks' of records {'id', 'data'}, in a given order."""

  VERSION = tfds.core.Version(shards.VERSION)

  def __init__(
    self,
    *,
    data_dir: str,
    source: sources.Source,
    index: dict,
    report: Callable[[str, int, int], None],
  ):
    self._source = source
    self._index = index
    self._report = report
    super().__init__(data_dir=data_dir, file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=(
        "Encoded images and masks for semi-supervised segmentation; the ids of"
        " the records and the sizes of the images are in the metadata."
      ),
      features=tfds.features.FeaturesDict(
        {
          "id": tfds.features.Text(),
          "data": tfds.features.Tensor(shape=(), dtype=np.object_),
        }
      ),
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(self._index),
    )

  def _split_generators(self, dl_manager) -> dict[str, Iterator]:
    del dl_manager  # Nothing is downloaded.
    return {
      shards.IMAGES: self._generate_examples(
        shards.IMAGES, self._source.read_image
      ),
      shards.MASKS: self._generate_examples(
        shards.MASKS, self._source.read_mask
      ),
    }

  def _generate_examples(
    self, split: str, read: Callable[[str], bytes]
  ) -> Iterator[tuple[int, dict]]:
    ids = self._index[split]
    for i, id in enumerate(ids):
      self._report(split, i, len(ids))
      yield i * (_KEY_RANGE // len(ids)), {"id": id, "data": read(id)}
    self._report(split, len(ids), len(ids))


class VocAug(_EncodedFiles):
  """PASCAL VOC 2012 with the masks of SBD, class ids in palette PNG."""


class CityscapesTrainids(_EncodedFiles):
  """Cityscapes with its 19 train classes, made from label ids if need be."""


class Folder(_EncodedFiles):
  """A user's own images and masks."""


_BUILDERS = {
  "voc_aug": VocAug,
  "cityscapes_trainids": CityscapesTrainids,
  "folder": Folder,
}


def write_shards(
  source: sources.Source,
  ids: Sequence[str],
  output: str,
  *,
  dataset_name: str,
  mask_format: str = "index",
  unlabelled_dir: str = "",
  unlabelled: Sequence[str] = (),
  report: Callable[[str, int, int], None] = lambda split, done, total: None,
) -> str:
  """Writes images and all masks there are into ArrayRecord shards.

  The folder appears under its name when it is complete; interrupted writing
  leaves nothing but a folder 'incomplete.*' beside it at worst.

  Args:
    source: of the files.
    ids: of all images of all lists.
    output: folder of data sets, local or remote.
    dataset_name: as in `datasets`, decides the builder.
    mask_format: kind of the masks, for whoever reads them.
    unlabelled_dir: folder that stands for the list of unlabelled images, or ''.
    unlabelled: ids of all images in that folder.
    report: called with the split, the records done, and their number.

  Returns:
    The folder of the shards.

  Raises:
    DataError: it exists already, cannot be written, a file cannot be read, or
      there is no mask.
  """
  name = shards.builder_name(dataset_name)
  folder = shards.shards_folder(output, dataset_name)
  if storage.is_folder(folder):
    raise errors.DataError(
      f"{folder}: exists already; remove it to write the shards again, or name"
      " another place"
    )
  masks = [id for id in ids if source.has_mask(id)]
  if not masks:
    raise errors.DataError(
      f"{source.mask_path(ids[0])}: there is not one mask to write"
    )
  index = {
    "made_by": "u2pl_jax",
    "mask_format": mask_format,
    "unlabelled_dir": unlabelled_dir,
    "unlabelled": list(unlabelled),
    shards.IMAGES: list(ids),
    "sizes": decode.image_sizes(source, ids),
    shards.MASKS: masks,
  }
  builder = _BUILDERS[name](
    data_dir=os.fspath(output), source=source, index=index, report=report
  )
  tfds.disable_progress_bar()
  try:
    with (
      tempfile.TemporaryDirectory() as downloads,
      # It announces a download of unknown size, and the reuse of its result.
      contextlib.redirect_stdout(io.StringIO()),
    ):
      builder.download_and_prepare(download_dir=downloads)
  except OSError as error:
    raise errors.DataError(
      f"{folder}: cannot write the shards: {error.strerror or error}"
    ) from None
  return folder
