"""Writes the images and masks of a config into shards, for object storage.

  python scripts/write_tfds.py --config=configs/voc_1464.py
  python scripts/write_tfds.py --config=configs/voc_1464.py \
    --output=gs://bucket/tfds

All images of the config's three lists, and every mask of theirs that there is,
so that the shards serve every split of the same images. The encoded bytes stay
as they are. Read them with --config.dataset.source=tfds and, unless they lie in
<dataset.root>/tfds, --config.dataset.tfds_dir=<output>. The lists (and the
class table) are still read from dataset.root.

Needs up to twice the size of the data on the disk of the output while it runs.
"""

import logging
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Nothing here computes.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags
from absl import logging as absl_logging

from input_pipeline import (
  ConfigError,
  DataError,
  dataset_config,
  find_unlabelled,
  parallel,
  storage,
  tfds_builders,
)
from input_pipeline.command_line import (
  CONFIG,
  fail,
  parse_flags,
)

_OUTPUT = flags.DEFINE_string(
  "output", None, "Folder of data sets. Default: dataset.tfds_dir of the root."
)


class _Progress:
  """One bar for each split."""

  def __init__(self):
    self._bars = {}

  def __call__(self, split: str, done: int, total: int) -> None:
    if split not in self._bars:
      self._bars[split] = parallel.progress(total, split, "record")
    bar = self._bars[split]
    bar.update(done - bar.n)
    if done == total:
      bar.close()


def write(config, output: str | None) -> str:
  """Writes the shards; returns their folder.

  Args:
    config: complete, see `configs/common.py`; read from files in any case.
    output: folder of data sets, None: dataset.tfds_dir.

  Raises:
    ConfigError, DataError: of the config, the data or the output.
  """
  config = config.copy_and_resolve_references()
  dataset = config.dataset
  dataset.source = "files"
  info = dataset_config.load_info(dataset)
  dataset_config.prepare_dataset(dataset)
  source, ids = dataset_config.read_lists(dataset)
  for part in ("labelled", "validation"):
    source.check(ids[part], masks=True)
  source.check(ids["unlabelled"], masks=False)
  in_folder = ()
  if dataset.unlabelled_dir:
    # Those that are in a list too: another list may leave them out.
    _, in_folder = find_unlabelled(source, dataset.unlabelled_dir, ())
  all_ids = (*ids["labelled"], *ids["unlabelled"], *ids["validation"])
  return tfds_builders.write_shards(
    source,
    tuple(dict.fromkeys(all_ids)),
    output or storage.join(dataset.root, dataset.tfds_dir),
    dataset_name=info.name,
    mask_format=dataset.mask_format,
    unlabelled_dir=dataset.unlabelled_dir,
    unlabelled=in_folder,
    report=_Progress(),
  )


def main(_: list[str]) -> None:
  absl_logging.set_verbosity(absl_logging.WARNING)
  logging.getLogger("u2pl_jax").setLevel(logging.WARNING)
  try:
    print(write(CONFIG.value, _OUTPUT.value))
  except (DataError, ConfigError) as error:
    fail(str(error))
  except KeyboardInterrupt:
    fail("interrupted: nothing was written; start again", code=130)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
