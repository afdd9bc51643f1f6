"""What the first lines of a run say about its split and its learning rate."""

import types

import pytest

from configs import folder, voc
from input_pipeline import dataset_info
from tests import published_splits
from u2pl_jax import build as build_lib
from u2pl_jax.log_head import log_head as write_head


def log_head(config, labelled, unlabelled, caplog):
  """The lines that a run of these lists would begin with."""
  info = dataset_info("voc")
  program = build_lib.build(
    config,
    build_lib.DataSpec(info.num_classes, info.mean, info.std, len(unlabelled)),
  )
  data = types.SimpleNamespace(
    info=info, labelled=labelled, unlabelled=unlabelled, validation=("v",)
  )
  state = types.SimpleNamespace(student=types.SimpleNamespace(params={}))
  caplog.set_level("INFO", logger="u2pl_jax")
  write_head(config, "runs/x", program, data, state)
  return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
  ("split", "line"),
  [
    ("1464", "voc classic 1464, 1464 of 1464 labelled images finely"),
    ("2646", "voc blender of U2PL 2646, 1464 of 2646 labelled images finely"),
    ("cps_1_4", "voc blender of CPS 1_4, 388 of 2646 labelled images finely"),
  ],
)
def test_family_of_the_split(split, line, caplog):
  config = voc.get_config(f"split={split}")
  config.model.backbone = "tiny"
  ids = published_splits.read("voc", voc.SPLITS[split])
  lines = log_head(config, *ids, caplog)
  assert any(text.startswith(f"split: {line}") for text in lines)
  assert any(text.endswith("16 + 16 images a step, learning rate 0.001, poly")
             for text in lines)  # fmt: skip


def test_scaled_learning_rate_and_chosen_ranks(caplog):
  config = folder.get_config("cpu")
  config.batch.labelled = 4
  lines = log_head(config, ("a",), tuple("bcdefghijklmnopq"), caplog)
  assert "split: own list, 0 of 1 labelled images finely annotated (0.0%)" in (
    lines
  )
  assert (
    "schedule: 40 epochs of 2 steps, warm-up 40 steps, total 80 steps,"
    " 4 + 8 images a step, learning rate 0.01 (0.02 at 8 labelled images a"
    " step), poly"
  ) in lines
  assert "contrastive ranks for 21 classes: low_rank 3, high_rank 20" in lines
