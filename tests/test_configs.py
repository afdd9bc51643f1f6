"""Every config builds; every impossible one is refused with a clear line."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from configs import camvid_46, common, testing, voc_1464
from u2pl_jax import build as build_lib
from u2pl_jax.config_checks import ConfigError, check_config
from u2pl_jax.train_state import TrainState, Variables
from u2pl_jax.train_step import QUIRKS

ROOT = pathlib.Path(__file__).parent.parent
ARGUMENTS = {
  "voc_1464": ["", "method=supervised", "released", "backbone=resnet50"],
  "camvid_46": ["", "cpu", "cpu,method=supervised"],
  "shapes": ["", "method=supervised"],
  "testing": [""],
}
CLASSES = {"voc_1464": 21, "camvid_46": 11, "shapes": 7, "testing": 7}


def load(name):
  return __import__(f"configs.{name}", fromlist=["get_config"]).get_config


def test_every_config_file_is_in_the_table():
  files = {p.stem for p in (ROOT / "configs").glob("*.py")}
  assert files - {"__init__", "common"} == set(ARGUMENTS)


@pytest.mark.parametrize(
  "name,arg", [(n, a) for n, args in ARGUMENTS.items() for a in args]
)
def test_eval_shape_of_both_steps(name, arg):
  """Shapes and dtypes of a whole step, without computing or compiling."""
  config = load(name)(arg)
  data = build_lib.DataSpec(CLASSES[name], (0.0,) * 3, (1.0,) * 3, 9118)
  check_config(config, num_classes=CLASSES[name], num_devices=1)
  model = build_lib.make_model(config, data.num_classes)
  recipe = build_lib.make_recipe(config, data)
  tx = build_lib.build(config, data).tx
  supervised, semi = build_lib.step_functions(
    config, model=model, tx=tx, recipe=recipe
  )

  def initial_state():
    variables = model.init(
      jax.random.key(0), jnp.zeros((1, 65, 65, 3)), train=False
    )
    half = Variables(variables["params"], variables["batch_stats"])
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      student=half,
      teacher=half,
      opt_state=tx.init(half.params),
      memory_bank=build_lib.make_memory_bank(config, data.num_classes),
    )

  def batch(size):
    shape = (size, *config.input.crop_size)
    return {
      "image": jax.ShapeDtypeStruct((*shape, 3), jnp.uint8),
      "label": jax.ShapeDtypeStruct(shape, jnp.uint8),
      "valid_box": jax.ShapeDtypeStruct((size, 4), jnp.int32),
    }

  state = jax.eval_shape(initial_state)
  batch_l = batch(config.batch.labelled)
  batch_u = batch(config.batch.unlabelled)
  del batch_u["label"]
  results = [jax.eval_shape(supervised, state, batch_l)]
  if config.method == "u2pl":
    results.append(jax.eval_shape(semi, state, batch_l, batch_u))
  for new_state, metrics in results:
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert [x.shape for x in jax.tree.leaves(new_state)] == [
      x.shape for x in jax.tree.leaves(state)
    ]
    assert [x.dtype for x in jax.tree.leaves(new_state)] == [
      x.dtype for x in jax.tree.leaves(state)
    ]
    assert metrics["total_loss"].shape == ()


def test_voc_schedule():
  config = voc_1464.get_config()
  data = build_lib.DataSpec(21, (0.0,) * 3, (1.0,) * 3, 9118)
  recipe = build_lib.make_recipe(config, data)
  # METHOD C.1: 45.6 k iterations of 16 + 16; the last partial batch is dropped.
  assert recipe.steps_per_epoch == 569
  assert recipe.total_steps == 45_520
  assert recipe.warmup_steps == 569


def test_released_is_the_set_of_all_quirks():
  config = voc_1464.get_config("released")
  assert set(config.quirks.split(",")) == set(QUIRKS)
  assert set(common.RELEASED_QUIRKS) == set(QUIRKS)
  assert voc_1464.get_config().quirks == ""


def test_names_differ_so_workdirs_do():
  names = [load(n)(a).name for n, args in ARGUMENTS.items() for a in args]
  assert len(set(names)) == len(names)


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
    ("batch.labelled=6", "labelled=6.*4 devices"),
    ("batch.unlabelled=3", "unlabelled=3.*4 devices"),
    ("eval.batch=2", "eval.batch=2.*4 devices"),
    ("input.crop_size=(16, 33)", "crop_size.*33"),
    ("method='fixmatch'", "'fixmatch'.*u2pl, supervised"),
    ("quirks='onehot'", "'onehot'.*batch_onehot"),
    ("strong.mix='mixup'", "mixup.*cutmix"),
    ("schedule.warmup_epochs=9", "warmup_epochs=9.*epochs=3"),
    ("model.output_stride=4", "output_stride=4"),
    ("model.backbone='vgg16'", "vgg16.*resnet101"),
    ("eval.protocol='center_crop'", "padded_center_crop"),
    ("contrastive.temperature=0.0", "temperature"),
    ("optimizer.learning_rate=-1.0", "learning_rate"),
    ("seed=-1", "seed=-1"),
    ("teacher.ema_decay=1.5", "ema_decay=1.5"),
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
  ],
)
def test_bad_arguments(arg, message):
  with pytest.raises(ValueError, match=message):
    voc_1464.get_config(arg)


def test_arguments():
  config = camvid_46.get_config("cpu,method=supervised,seed=7")
  assert config.name == "camvid_46_cpu_supervised"
  assert (config.seed, config.model.backbone) == (7, "tiny")
