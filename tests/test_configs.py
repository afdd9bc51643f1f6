"""Every config builds; every impossible one is refused with a clear line."""

import functools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from configs import (
  camvid_46,
  cityscapes,
  common,
  folder,
  testing,
  voc,
  voc_1464,
)
from tests import published_splits
from u2pl_jax import build as build_lib
from u2pl_jax.config_checks import (
  ConfigError,
  check_config,
  contrastive_ranks,
)
from u2pl_jax.train_step import QUIRKS

ROOT = pathlib.Path(__file__).parent.parent
VARIANTS = ("paper", "method=supervised", "released")
ARGUMENTS = {
  "voc": [
    f"split={split}{variant}"
    for split in voc.SPLITS
    for variant in ("", *(f",{v}" for v in VARIANTS))
  ],
  "voc_1464": [
    "",
    *VARIANTS,
    "released,method=supervised",
    "backbone=resnet50",
    "photometric",
  ],
  "cityscapes": [
    f"split={split}{variant}"
    for split in cityscapes.SPLITS
    for variant in ("", *(f",{v}" for v in VARIANTS))
  ],
  "cityscapes_744": ["", *VARIANTS],
  "camvid": [
    f"split={split}{variant}"
    for split in ("23", "46", "92", "183")
    for variant in ("", ",cpu", ",cpu,method=supervised")
  ],
  "camvid_46": ["", "cpu", "cpu,method=supervised"],
  "folder": ["", "cpu", "cpu,method=supervised", "backbone=resnet101"],
  "shapes": ["", "method=supervised"],
  "testing": [""],
}
CLASSES = {
  "voc": 21,
  "voc_1464": 21,
  "cityscapes": 19,
  "cityscapes_744": 19,
  "camvid": 11,
  "camvid_46": 11,
  "folder": 5,
  "shapes": 7,
  "testing": 7,
}
# METHOD C.1 gives those of 92, 1464, 186, 744 and 1488; the others follow from
# the sampler, see test_iterations_are_the_published_ones.
STEPS_PER_EPOCH = {
  ("voc", "92"): 655,
  ("voc", "183"): 650,
  ("voc", "366"): 638,
  ("voc", "732"): 615,
  ("voc", "1464"): 570,
  ("voc", "662"): 620,
  ("voc", "1323"): 578,
  ("voc", "2646"): 496,
  ("voc", "5291"): 330,
  ("voc", "cps_1_16"): 620,
  ("voc", "cps_1_8"): 578,
  ("voc", "cps_1_4"): 496,
  ("cityscapes", "186"): 174,
  ("cityscapes", "372"): 163,
  ("cityscapes", "744"): 139,
  ("cityscapes", "1488"): 93,
  ("cityscapes", "unimatch_1_30"): 180,
  ("cityscapes", "unimatch_1_16"): 174,
  ("cityscapes", "unimatch_1_8"): 163,
  ("cityscapes", "unimatch_1_4"): 139,
  ("cityscapes", "unimatch_1_2"): 93,
}


def load(name):
  return __import__(f"configs.{name}", fromlist=["get_config"]).get_config


def every_config():
  return [(name, arg) for name, args in ARGUMENTS.items() for arg in args]


def recipe_of(config, num_classes, num_unlabelled):
  data = build_lib.DataSpec(num_classes, (0.0,) * 3, (1.0,) * 3, num_unlabelled)
  return build_lib.make_recipe(config, data)


def test_every_config_file_is_in_the_table():
  files = {p.stem for p in (ROOT / "configs").glob("*.py")}
  assert files - {"__init__", "common"} == set(ARGUMENTS)


@functools.cache
def step_shapes(text, num_classes):
  """Traces both steps of a config given as JSON -> pairs of flat trees."""
  config = testing.get_config()
  config.unlock()
  config.update(json.loads(text))
  data = build_lib.DataSpec(num_classes, (0.0,) * 3, (1.0,) * 3, 9118)
  program = build_lib.build(config, data)
  supervised, semi = build_lib.step_functions(
    config, model=program.model, tx=program.tx, recipe=program.recipe
  )
  state = build_lib.abstract_state(config, program)

  def batch(size):
    shape = (size, *config.input.crop_size)
    return {
      "image": jax.ShapeDtypeStruct((*shape, 3), jnp.uint8),
      "label": jax.ShapeDtypeStruct(shape, jnp.uint8),
      "valid_box": jax.ShapeDtypeStruct((size, 4), jnp.int32),
    }

  batch_l = batch(config.batch.labelled)
  batch_u = batch(config.batch.unlabelled)
  del batch_u["label"]
  results = [jax.eval_shape(supervised, state, batch_l)]
  if config.method == "u2pl":
    results.append(jax.eval_shape(semi, state, batch_l, batch_u))
  return state, results


def cases_of_eval_shape():
  """Those that trace a large network for a minor difference are slow."""
  cases = []
  for name, arg in every_config():
    config = load(name)(arg)
    is_minor = (
      "released" in arg
      or "backbone" in arg
      or "photometric" in arg
      or config.dataset.name in ("camvid", "folder")
    )
    is_slow = is_minor and config.model.backbone != "tiny"
    marks = pytest.mark.slow if is_slow else ()
    cases.append(pytest.param(name, arg, marks=marks))
  return cases


@pytest.mark.parametrize(("name", "arg"), cases_of_eval_shape())
def test_eval_shape_of_both_steps(name, arg):
  """Shapes and dtypes of a whole step, without computing or compiling.

  Configs that differ in their data alone share one tracing.
  """
  config = load(name)(arg)
  check_config(config, num_classes=CLASSES[name], num_devices=1)
  config.name, config.dataset.root = "any", "any"
  for part in ("labelled", "unlabelled", "validation"):
    config.dataset[f"{part}_list"] = "any.txt"
  state, results = step_shapes(
    json.dumps(config.to_dict(), sort_keys=True), CLASSES[name]
  )
  for new_state, metrics in results:
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert [x.shape for x in jax.tree.leaves(new_state)] == [
      x.shape for x in jax.tree.leaves(state)
    ]
    assert [x.dtype for x in jax.tree.leaves(new_state)] == [
      x.dtype for x in jax.tree.leaves(state)
    ]
    assert metrics["total_loss"].shape == ()


@pytest.mark.parametrize(("dataset", "split"), STEPS_PER_EPOCH)
def test_iterations_are_the_published_ones(dataset, split):
  """From the published lists and the published loader, imitated here.

  torch's DistributedSampler gives each GPU ceil(n / GPUs) images, repeating
  some, and its loader drops the last partial batch of each.
  """
  config = load(dataset)(f"split={split}")
  rows = {"voc": voc, "cityscapes": cityscapes}[dataset].SPLITS
  _, unlabelled = published_splits.read(dataset, rows[split])
  gpus, batch = {"voc": (4, 4), "cityscapes": (8, 2)}[dataset]
  steps = math.ceil(len(unlabelled) / gpus) // batch
  assert steps == STEPS_PER_EPOCH[dataset, split]
  recipe = recipe_of(config, CLASSES[dataset], len(unlabelled))
  assert recipe.steps_per_epoch == steps
  epochs, warmup = {"voc": (80, 1), "cityscapes": (200, 20)}[dataset]
  assert recipe.total_steps == epochs * steps
  assert recipe.warmup_steps == warmup * steps


def test_every_row_has_its_number_of_iterations():
  rows = [("voc", s) for s in voc.SPLITS]
  rows += [("cityscapes", s) for s in cityscapes.SPLITS]
  assert rows == list(STEPS_PER_EPOCH)


@pytest.mark.parametrize("dataset", ["voc", "cityscapes", "camvid"])
def test_the_tables_of_the_docstrings(dataset):
  """Labelled images, steps and updates of every row, read from the text."""
  module = __import__(f"configs.{dataset}", fromlist=["SPLITS"])
  lines = {
    line.split()[0]: re.findall(r"\d+(?: \d{3})*", line.split(maxsplit=1)[1])
    for line in module.__doc__.splitlines()
    if line.strip() and line.split()[0] in module.SPLITS
  }
  assert list(lines) == list(module.SPLITS)
  for split, folder_name in module.SPLITS.items():
    # Columns are two blanks apart, thousands one.
    numbers = [int(text.replace(" ", "")) for text in lines[split]]
    if dataset == "camvid":
      labelled, unlabelled = int(split), 367 - int(split)
      assert numbers.pop(1) == unlabelled
      cpu = recipe_of(module.get_config(f"split={split},cpu"), 11, unlabelled)
      assert numbers[3] == cpu.total_steps
    else:
      ids, others = published_splits.read(dataset, folder_name)
      labelled, unlabelled = len(ids), len(others)
    if dataset == "voc":
      fine = set(published_splits.read("voc", "u2pl/1464")[0])
      share = len(fine & set(ids)) / len(ids)
      assert numbers.pop(1) == round(100 * share)
    config = module.get_config(f"split={split}")
    recipe = recipe_of(config, CLASSES[dataset], unlabelled)
    assert numbers[:3] == [
      labelled,
      recipe.steps_per_epoch,
      recipe.total_steps,
    ]


def test_presets_of_the_data_sets():
  """METHOD C.1; the batch is global, and so is what counts its pixels."""
  of_voc, of_city = voc.get_config(), cityscapes.get_config()
  for config in (of_voc, of_city):
    assert (config.batch.labelled, config.batch.unlabelled) == (16, 16)
    assert config.optimizer.reference_batch == 16
    assert config.contrastive.weight == 0.1
    assert config.optimizer.momentum == 0.9
    assert config.quirks == ""
  assert of_voc.input.crop_size == (513, 513)
  assert of_voc.optimizer.learning_rate == 0.001
  assert of_voc.optimizer.head_multiplier == 10
  assert of_voc.optimizer.weight_decay == 1e-4
  assert (of_voc.supervised.loss, of_voc.supervised.aux_weight) == ("ce", 0)
  assert of_city.input.crop_size == (769, 769)
  assert of_city.optimizer.learning_rate == 0.01
  assert of_city.optimizer.head_multiplier == 1
  assert of_city.optimizer.weight_decay == 5e-4
  assert of_city.supervised.loss == "ohem"
  assert of_city.supervised.ohem_threshold == 0.7
  assert of_city.supervised.ohem_min_kept == 8 * 100_000
  assert of_city.supervised.aux_weight == 0.4
  assert of_city.eval.pad_to == (1024, 2048)


def test_presets_of_the_published_code():
  """Its gradient sees 1 / GPUs of a contrastive weight of 1 (METHOD C.2, 2)."""
  of_voc, of_city = (f("released") for f in (load("voc"), load("cityscapes")))
  assert (of_voc.contrastive.weight, of_city.contrastive.weight) == (
    0.25,
    0.125,
  )
  assert of_voc.schedule.warmup_epochs == 1
  assert of_city.schedule.warmup_epochs == 0
  assert of_voc.eval.pad_to == (513, 513)
  assert of_city.eval.pad_to == (769, 769)
  for config in (of_voc, of_city):
    assert set(config.quirks.split(",")) == set(QUIRKS)
    assert config.eval.protocol == "center_crop"


@pytest.mark.parametrize(
  ("name", "arg", "rate"),
  [
    ("voc_1464", "", 0.001),
    ("cityscapes_744", "", 0.01),
    ("camvid_46", "", 0.005),
    ("camvid_46", "cpu", 0.02),
    ("folder", "", 0.0005),
    ("folder", "cpu", 0.02),
    ("shapes", "", 0.1),
    ("testing", "", 0.02),
  ],
)
def test_learning_rate_of_every_recipe(name, arg, rate):
  config = load(name)(arg)
  assert build_lib.base_learning_rate(config) == rate
  data = build_lib.DataSpec(CLASSES[name], (0.0,) * 3, (1.0,) * 3, 100)
  program = build_lib.build(config, data)
  assert float(program.learning_rate(jnp.int32(0))) == pytest.approx(rate)


def test_learning_rate_follows_the_labelled_batch():
  config = voc.get_config()
  data = build_lib.DataSpec(21, (0.0,) * 3, (1.0,) * 3, 9118)
  for labelled, rate in ((8, 0.0005), (4, 0.00025), (32, 0.002)):
    config.batch.labelled = labelled
    program = build_lib.build(config, data)
    assert float(program.learning_rate(jnp.int32(0))) == pytest.approx(rate)
  # The unlabelled half alone changes the epoch, not the rate.
  config.batch.labelled, config.batch.unlabelled = 16, 32
  assert build_lib.base_learning_rate(config) == 0.001
  assert build_lib.make_recipe(config, data).steps_per_epoch == 285


@pytest.mark.parametrize(
  ("num_classes", "ranks"),
  [(2, (1, 2)), (5, (1, 5)), (7, (2, 7)), (11, (3, 11)), (19, (3, 19)),
   (21, (3, 20)), (150, (3, 20))],
)  # fmt: skip
def test_ranks_by_the_number_of_classes(num_classes, ranks):
  config = folder.get_config("cpu")
  assert contrastive_ranks(config, num_classes) == ranks
  check_config(config, num_classes=num_classes, num_devices=1)
  recipe = recipe_of(config, num_classes, 100)
  assert (recipe.low_rank, recipe.high_rank) == ranks


def test_lists_are_where_prepare_data_puts_them():
  config = voc.get_config("split=cps_1_16")
  assert config.dataset.labelled_list == "splits/unimatch/1_16/labeled.txt"
  assert config.dataset.unlabelled_list == "splits/unimatch/1_16/unlabeled.txt"
  assert config.dataset.validation_list == "splits/u2pl/val.txt"
  config = cityscapes.get_config("split=own/100_seed0")
  assert config.name == "cityscapes_own_100_seed0"
  assert config.dataset.labelled_list == "splits/own/100_seed0/labeled.txt"


def test_a_row_is_the_same_run_from_either_file():
  for row, module, split in (
    ("voc_1464", "voc", "1464"),
    ("cityscapes_744", "cityscapes", "744"),
    ("camvid_46", "camvid", "46"),
  ):
    assert load(row)() == load(module)(f"split={split}")


def test_released_is_the_set_of_all_quirks():
  config = voc_1464.get_config("released")
  assert set(config.quirks.split(",")) == set(QUIRKS)
  assert set(common.RELEASED_QUIRKS) == set(QUIRKS)
  assert voc_1464.get_config().quirks == ""


def test_names_differ_so_workdirs_do():
  configs = {}
  for name, arg in every_config():
    config = load(name)(arg)
    assert configs.setdefault(config.name, config) == config, (name, arg)
  # Every row of voc in three forms, and one with resnet50, supervised from the
  # published code, and photometric.
  assert len([name for name in configs if name.startswith("voc")]) == 12 * 3 + 3


def test_every_key_has_a_comment():
  """A key without an explanation above it, or above its group, is a defect."""
  lines = (ROOT / "configs" / "common.py").read_text().splitlines()
  begin = lines.index("  config = ml_collections.ConfigDict()")
  commented = False
  for line in lines[begin + 1 :]:
    if line.startswith("  return"):
      break
    if line.strip().startswith("#"):
      commented = True
    elif not line.strip():
      commented = False
    elif "ConfigDict()" not in line:
      assert commented, f"no comment above: {line.strip()}"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("contrastive.low_rank=6", "low_rank=6.*high_rank"),
    ("contrastive.low_rank=8,contrastive.high_rank=9", "low_rank=8.*6 classes"),
    ("contrastive.high_rank=20", "high_rank=20.*only 6 classes"),
    ("contrastive.high_rank=7", "high_rank=7.*only 6 classes"),
    ("batch.labelled=6", "labelled=6.*4 devices"),
    ("batch.unlabelled=3", "unlabelled=3.*4 devices"),
    ("eval.batch=2", "eval.batch=2.*4 devices"),
    ("input.crop_size=(16, 33)", "crop_size.*33"),
    ("input.on_bad_record='ignore'", "'ignore'.*fail, skip"),
    ("input.max_bad_records=0", "max_bad_records=0.*at least 1"),
    ("method='fixmatch'", "'fixmatch'.*u2pl, supervised"),
    ("quirks='onehot'", "'onehot'.*batch_onehot"),
    ("strong.mix='mixup'", "mixup.*cutmix"),
    ("schedule.warmup_epochs=9", "warmup_epochs=9.*epochs=3"),
    ("model.output_stride=4", "output_stride=4"),
    ("model.backbone='vgg16'", "vgg16.*resnet101"),
    ("eval.protocol='center_crop'", "padded_center_crop"),
    ("contrastive.temperature=0.0", "temperature"),
    ("optimizer.learning_rate=-1.0", "learning_rate"),
    ("optimizer.reference_batch=0", "reference_batch=0.*at least 1"),
    ("schedule.reference_devices=0", "reference_devices=0.*at least 1"),
    ("contrastive.low_rank=0", "low_rank=0.*at least 1"),
    ("seed=-1", "seed=-1"),
    ("teacher.ema_decay=1.5", "ema_decay=1.5"),
    ("memory_bank.dtype='float16'", "'float16'.*float32, bfloat16"),
    ("sharding.memory_bank='split'", "'split'.*replicated, classes"),
    # 60 slots of class 0 and 41 of each of the other 5.
    (
      "sharding.memory_bank='classes',memory_bank.capacity=41",
      "265 slots.*6 queues.*4 devices.*capacity",
    ),
  ],
)
def test_impossible_values(change, message):
  config = testing.get_config()
  for item in re.split(r",(?=\w+\.)", change):
    key, _, value = item.partition("=")
    target = config
    *groups, leaf = key.split(".")
    for group in groups:
      target = target[group]
    target[leaf] = eval(value)
  with pytest.raises(ConfigError, match=message) as error:
    check_config(config, num_classes=6, num_devices=4)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("crop", [(513, 513), (321, 401), (64, 80), (33, 34)])
def test_crops_of_any_size_are_accepted(crop):
  config = testing.get_config()
  config.input.crop_size = crop
  check_config(config, num_classes=6, num_devices=1)


@pytest.mark.parametrize(
  ("arg", "message"),
  [
    ("metod=u2pl", "'metod' is unknown.*method"),
    ("seed=x", "seed='x' is not of type int"),
    ("method", "needs a value"),
    ("paper,released", "choose one"),
    ("split=92", "'split' is unknown"),
  ],
)
def test_bad_arguments(arg, message):
  with pytest.raises(ValueError, match=message):
    voc_1464.get_config(arg)


@pytest.mark.parametrize("name", ["voc", "cityscapes", "camvid"])
def test_unknown_split(name):
  with pytest.raises(ValueError, match="split='93' is unknown.*own/") as error:
    load(name)("split=93")
  assert "\n" not in str(error.value)
  rows = __import__(f"configs.{name}", fromlist=["SPLITS"]).SPLITS
  assert str(list(rows)) in str(error.value)


def test_arguments():
  config = camvid_46.get_config("cpu,method=supervised,seed=7")
  assert config.name == "camvid_46_cpu_supervised"
  assert (config.seed, config.model.backbone) == (7, "tiny")
