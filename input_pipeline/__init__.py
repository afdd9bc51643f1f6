"""The host side of the program: files to NumPy batches.

Knows nothing of models, configs or JAX. The contract with the trainer is the
batch, a dict of NumPy arrays:

  image      uint8 [b, h, w, 3]  RGB, 0 outside valid_box
  label      uint8 [b, h, w]     class ids or ignore_label; if with_labels
  valid_box  int32 [b, 4]        (top, left, bottom, right) of the photograph
  index      int32 [b]           position in the list of ids
  is_real    bool  [b]           eval streams only: False for filled-up rows

Data are checked where they are read; every problem is one DataError, and a file
that turns out to be bad in the middle of a stream one RecordError.
"""

import os
from typing import TYPE_CHECKING

from input_pipeline.datasets import (
  FOLDER,
  MASK_FORMATS,
  DatasetInfo,
  MaskFormat,
  dataset_info,
  read_class_table,
  voc_palette,
)
from input_pipeline.errors import ConfigError, DataError, RecordError
from input_pipeline.shards import Shards, shards_folder
from input_pipeline.sources import Layout, Source, check_files, find_unlabelled
from input_pipeline.splits import check_splits, read_split

if TYPE_CHECKING:
  from input_pipeline.decode import decode_image, decode_mask, image_sizes
  from input_pipeline.pipeline import make_eval_stream, make_train_stream
  from input_pipeline.transforms import TrainTransform

# Read when OpenCV is loaded, here and in worker processes. Its own lines about
# a damaged file come at every attempt to read it and say less than our errors.
os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")

__all__ = [
  "FOLDER",
  "MASK_FORMATS",
  "ConfigError",
  "DataError",
  "DatasetInfo",
  "Layout",
  "MaskFormat",
  "RecordError",
  "Shards",
  "Source",
  "TrainTransform",
  "check_files",
  "check_splits",
  "dataset_info",
  "decode_image",
  "decode_mask",
  "find_unlabelled",
  "image_sizes",
  "make_eval_stream",
  "make_train_stream",
  "read_class_table",
  "read_split",
  "shards_folder",
  "voc_palette",
]

# Loaded at first use: decoders and grain take a second to import, and whoever
# wants a palette or a list of ids should not wait for them.
_LAZY = {
  "TrainTransform": "transforms",
  "decode_image": "decode",
  "decode_mask": "decode",
  "image_sizes": "decode",
  "make_eval_stream": "pipeline",
  "make_train_stream": "pipeline",
}


def __getattr__(name: str):
  if name not in _LAZY:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  import importlib

  module = importlib.import_module(f"{__name__}.{_LAZY[name]}")
  return getattr(module, name)
