"""From a config to compiled functions: the only reader of the method's keys.

The leaves take keywords and `train_step` a `Recipe`; here the config's values
are unpacked, statics bound and the steps jitted.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from u2pl_jax import memory_bank, rngs, sharding
from u2pl_jax.config_checks import (
  bank_capacities,
  check_config,
  contrastive_ranks,
  eval_protocol,
  parse_quirks,
  splits_bank,
)
from u2pl_jax.evaluation import EvalSettings, make_predict_step
from u2pl_jax.evaluator import Evaluator
from u2pl_jax.models.deeplab import DeepLab
from u2pl_jax.models.pretrained import (
  check_pretrained,
  load_pretrained,
  read_pretrained,
)
from u2pl_jax.optimizer import (
  Schedule,
  cosine_schedule,
  multistep_schedule,
  poly_schedule,
  sgd,
)
from u2pl_jax.photometric import PhotometricSettings
from u2pl_jax.train_state import TrainState, Variables, create_train_state
from u2pl_jax.train_step import (
  ONE_DEVICE,
  LabelledBatch,
  Layout,
  Recipe,
  UnlabelledBatch,
  semi_supervised_step,
  supervised_step,
)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """What the steps must know of the data.

  Attributes:
    num_classes: k.
    mean, std: of the channels in [0, 255].
    num_unlabelled: images, which give the length of an epoch.
  """

  num_classes: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  num_unlabelled: int


@dataclasses.dataclass(frozen=True)
class Program:
  """Everything that runs on the devices.

  Attributes:
    mesh: over all devices.
    model, tx, recipe: as in `train_step`.
    learning_rate: of the encoder by step; for the schedule 'plateau' the one of
      step 0, and the state of `tx` has the present one.
    supervised_step: compiled `(state, labelled dict) -> (state, metrics)`.
    semi_supervised_step: compiled `(state, labelled, unlabelled dicts) ->
      (state, metrics)`; None for the supervised method.
    evaluator: counts pixels under the config's protocol.
    predict_step: compiled `(variables, batch dict) -> (classes, entropy)`, on
      the devices of this process alone.
    create_state: `() -> TrainState` at step 0, on the devices of the mesh.
  """

  mesh: Mesh
  model: DeepLab
  tx: optax.GradientTransformation
  recipe: Recipe
  learning_rate: float | Schedule
  supervised_step: Callable[..., tuple[TrainState, dict]]
  semi_supervised_step: Callable[..., tuple[TrainState, dict]] | None
  evaluator: Evaluator
  predict_step: Callable[..., tuple[jax.Array, jax.Array]]
  create_state: Callable[[], TrainState]


def runs_on_one_cpu() -> bool:
  """Whether what this process computes runs on a single CPU device."""
  return jax.default_backend() == "cpu" and jax.device_count() == 1


def make_model(
  config: ml_collections.ConfigDict,
  num_classes: int,
  *,
  for_one_cpu: bool = False,
) -> DeepLab:
  """The network of student and teacher; `for_one_cpu` as in `build`."""
  model = config.model
  return DeepLab(
    num_classes=num_classes,
    backbone=model.backbone,
    head=model.head,
    stem=model.stem,
    output_stride=model.output_stride,
    multi_grid=model.multi_grid,
    aspp_rates=tuple(model.aspp_rates),
    rep_features=model.rep_features,
    auxiliary=config.supervised.aux_weight > 0,
    dropout=model.dropout,
    remat=model.remat,
    dtype=jnp.dtype(model.dtype),
    conv_products=for_one_cpu,
  )


def base_learning_rate(config: ml_collections.ConfigDict) -> float:
  """The encoder's rate at step 0, in proportion to the labelled batch."""
  optimizer = config.optimizer
  # The quotient first: it is exactly 1 at the reference batch.
  return optimizer.learning_rate * (
    config.batch.labelled / optimizer.reference_batch
  )


def make_learning_rate(
  config: ml_collections.ConfigDict, total_steps: int
) -> float | Schedule:
  """What `optimizer.sgd` takes as the learning rate."""
  optimizer, base = config.optimizer, base_learning_rate(config)
  match optimizer.schedule:
    case "poly":
      return poly_schedule(base, total_steps, optimizer.poly_power)
    case "cosine":
      return cosine_schedule(base, total_steps)
    case "multistep":
      return multistep_schedule(
        base, total_steps, optimizer.milestones, optimizer.decay_factor
      )
    case "plateau":
      return base
  raise ValueError(f"schedule {optimizer.schedule!r}: see config_checks")


def make_recipe(config: ml_collections.ConfigDict, data: DataSpec) -> Recipe:
  """The steps' hyper-parameters; an epoch drops the last partial batch."""
  schedule, contrastive = config.schedule, config.contrastive
  low_rank, high_rank = contrastive_ranks(config, data.num_classes)
  # floor(ceil(n / devices) / batch of a device), as one division.
  padded = data.num_unlabelled + schedule.reference_devices - 1
  steps_per_epoch = max(1, padded // config.batch.unlabelled)
  warmup_epochs = (
    schedule.epochs if config.method == "supervised" else schedule.warmup_epochs
  )
  return Recipe(
    num_classes=data.num_classes,
    ignore_label=config.dataset.ignore_label,
    mean=tuple(data.mean),
    std=tuple(data.std),
    steps_per_epoch=steps_per_epoch,
    warmup_steps=warmup_epochs * steps_per_epoch,
    total_steps=schedule.epochs * steps_per_epoch,
    sup_loss=config.supervised.loss,
    ohem_threshold=config.supervised.ohem_threshold,
    ohem_min_kept=config.supervised.ohem_min_kept,
    aux_weight=config.supervised.aux_weight,
    mix=config.strong.mix,
    mix_probability=config.strong.mix_probability,
    alpha0=config.reliability.alpha0,
    alpha_decay=config.reliability.decay,
    unsup_weight=config.unsupervised.weight,
    contra_weight=contrastive.weight,
    num_anchors=contrastive.num_anchors,
    num_negatives=contrastive.num_negatives,
    temperature=contrastive.temperature,
    low_rank=low_rank,
    high_rank=high_rank,
    anchor_min_probability=contrastive.anchor_min_probability,
    negative_max_probability=contrastive.negative_max_probability,
    max_keys_per_step=config.memory_bank.max_keys_per_step or None,
    ema_max_decay=config.teacher.ema_decay,
    quirks=parse_quirks(config.quirks),
    photometric=make_photometric(config),
    microbatches=config.batch.microbatches,
  )


def make_photometric(
  config: ml_collections.ConfigDict,
) -> PhotometricSettings | None:
  """Settings of the photometric augmentation; None where it is off."""
  strong = config.strong
  if strong.photometric == 0:
    return None
  return PhotometricSettings(
    probability=strong.photometric,
    jitter=tuple(strong.jitter),
    jitter_probability=strong.jitter_probability,
    grey_probability=strong.grey_probability,
    blur_probability=strong.blur_probability,
    blur_sigma=tuple(strong.blur_sigma),
  )


def make_memory_bank(
  config: ml_collections.ConfigDict, num_classes: int
) -> memory_bank.MemoryBank:
  """An empty bank; of one slot a class for a method without one."""
  bank = config.memory_bank
  if config.method == "supervised":
    return memory_bank.create([1] * num_classes, config.model.rep_features)
  return memory_bank.create(
    bank_capacities(config, num_classes),
    config.model.rep_features,
    jnp.dtype(bank.dtype),
  )


def make_layout(config: ml_collections.ConfigDict, num_devices: int) -> Layout:
  """How the arrays of a step lie on the devices."""
  return Layout(
    pixel_parts=num_devices,
    bank_parts=num_devices if splits_bank(config) else 1,
  )


def step_functions(
  config: ml_collections.ConfigDict,
  *,
  model: DeepLab,
  tx: optax.GradientTransformation,
  recipe: Recipe,
  layout: Layout = ONE_DEVICE,
  trace: bool = False,
) -> tuple[Callable, Callable]:
  """Binds statics and randomness: the two steps before compilation.

  Args:
    config: complete.
    model, tx, recipe, layout, trace: see `semi_supervised_step`.

  Returns:
    supervised `(state, labelled dict)` and semi-supervised `(state, labelled
    dict, unlabelled dict)`, each -> (state, metrics).
  """
  # Keys of initialisation and training must not coincide.
  root_key = jax.random.fold_in(jax.random.key(config.seed), 1)

  def labelled(batch: dict[str, Any]) -> LabelledBatch:
    return LabelledBatch(batch["image"], batch["label"], batch["valid_box"])

  def run_supervised(state: TrainState, batch_l: dict[str, Any]):
    return supervised_step(
      state,
      labelled(batch_l),
      rngs.draw_supervised(root_key, state.step),
      model=model,
      tx=tx,
      recipe=recipe,
      trace=trace,
    )

  def run_semi_supervised(
    state: TrainState, batch_l: dict[str, Any], batch_u: dict[str, Any]
  ):
    draws = rngs.draw_semi_supervised(
      root_key,
      state.step,
      mix=recipe.mix,
      mix_probability=recipe.mix_probability,
      unlabelled_shape=batch_u["image"].shape[:3],
      num_classes=recipe.num_classes,
      num_anchors=recipe.num_anchors,
      num_negatives=recipe.num_negatives,
      max_keys=recipe.max_keys_per_step,
      photometric=recipe.photometric,
    )
    return semi_supervised_step(
      state,
      labelled(batch_l),
      UnlabelledBatch(batch_u["image"], batch_u["valid_box"]),
      draws,
      model=model,
      tx=tx,
      recipe=recipe,
      layout=layout,
      trace=trace,
    )

  return run_supervised, run_semi_supervised


def build(
  config: ml_collections.ConfigDict,
  data: DataSpec,
  *,
  devices: Sequence[jax.Device] | None = None,
  for_one_cpu: bool = False,
) -> Program:
  """Checks the config and prepares everything; compiles nothing yet.

  Args:
    config: complete.
    data: of the data set.
    devices: all by default.
    for_one_cpu: take what is fastest there, to rounding the same. Not for what
      only stands for an accelerator (its memory, what its devices send).

  Returns:
    `Program`.

  Raises:
    ConfigError: see `config_checks`.
  """
  mesh = sharding.create_mesh(devices)
  check_config(
    config, num_classes=data.num_classes, num_devices=mesh.devices.size
  )
  model = make_model(config, data.num_classes, for_one_cpu=for_one_cpu)
  recipe = make_recipe(config, data)
  optimizer = config.optimizer
  learning_rate = make_learning_rate(config, recipe.total_steps)
  tx = sgd(
    learning_rate,
    momentum=optimizer.momentum,
    weight_decay=optimizer.weight_decay,
    head_multiplier=optimizer.head_multiplier,
  )
  run_supervised, run_semi = step_functions(
    config,
    model=model,
    tx=tx,
    recipe=recipe,
    layout=make_layout(config, mesh.devices.size),
  )
  repl, split = sharding.replicated(mesh), sharding.batch_sharded(mesh)
  state_split = sharding.state_shardings(
    mesh,
    _state_shapes(config, model, tx, data.num_classes),
    split_bank=splits_bank(config),
  )
  jit_step = functools.partial(
    jax.jit, donate_argnums=0, out_shardings=(state_split, repl)
  )

  def create_state() -> TrainState:
    load = None
    if config.model.pretrained:
      pretrained = read_pretrained(config.model.pretrained)
      check_pretrained(pretrained, model)
      reports = []

      def load(variables: dict) -> dict:
        variables, report = load_pretrained(variables, pretrained)
        reports.append(report)
        return variables

    state = create_train_state(
      jax.random.fold_in(jax.random.key(config.seed), 0),
      model,
      tx,
      image_size=(65, 65),
      memory_bank=make_memory_bank(config, data.num_classes),
      cold_teacher="teacher_cold_start" in recipe.quirks,
      load_pretrained=load,
    )
    if load is not None:
      # The same for a teacher with weights of its own.
      for line in reports[0]:
        logger.info(line)
    return sharding.put(state, state_split)

  pixels = {"mean": recipe.mean, "std": recipe.std}
  own = sharding.local_mesh(mesh)
  own_repl = sharding.replicated(own)
  return Program(
    mesh=mesh,
    model=model,
    tx=tx,
    recipe=recipe,
    learning_rate=learning_rate,
    supervised_step=jit_step(run_supervised, in_shardings=(state_split, split)),
    semi_supervised_step=(
      jit_step(run_semi, in_shardings=(state_split, split, split))
      if config.method == "u2pl"
      else None
    ),
    evaluator=Evaluator(
      model,
      mesh,
      eval_protocol(config),
      EvalSettings(recipe.num_classes, recipe.ignore_label, **pixels),
    ),
    predict_step=jax.jit(
      make_predict_step(model, **pixels),
      in_shardings=(own_repl, sharding.batch_sharded(own)),
      out_shardings=own_repl,
    ),
    create_state=create_state,
  )


def _state_shapes(
  config: ml_collections.ConfigDict,
  model: DeepLab,
  tx: optax.GradientTransformation,
  num_classes: int,
) -> TrainState:
  """Shapes and types of the state; computes and reads nothing."""

  def create() -> TrainState:
    # Not program.create_state: it compiles, and reads config.model.pretrained,
    # which a run that goes on needs no more.
    variables = model.init(
      jax.random.key(0), jnp.zeros((1, 65, 65, 3)), train=False
    )
    network = Variables(variables["params"], variables["batch_stats"])
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      student=network,
      teacher=network,
      opt_state=tx.init(network.params),
      memory_bank=make_memory_bank(config, num_classes),
    )

  return jax.eval_shape(create)


def abstract_state(
  config: ml_collections.ConfigDict, program: Program
) -> TrainState:
  """Shapes, types and shardings of the state; computes and reads nothing."""
  shapes = _state_shapes(
    config, program.model, program.tx, program.recipe.num_classes
  )
  shardings = sharding.state_shardings(
    program.mesh, shapes, split_bank=splits_bank(config)
  )
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    shapes,
    shardings,
  )
