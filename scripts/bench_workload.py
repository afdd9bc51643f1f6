"""What the benchmarks of the step share: presets, data, rates of a device."""

import argparse
import dataclasses
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from configs import cityscapes_744, common, voc_1464
from input_pipeline import parallel
from u2pl_jax import build as build_lib
from u2pl_jax import ema, halves, roofline, step_shapes
from u2pl_jax.memory_bank import MemoryBank
from u2pl_jax.models.deeplab import Outputs
from u2pl_jax.models.layers import resize_bilinear, resize_nearest
from u2pl_jax.train_state import TrainState, Variables
from u2pl_jax.train_step import apply_gradients, forward_eval, forward_train

Array = jax.Array
Batch = dict[str, np.ndarray]

PRESETS = ("cpu-mid", "voc", "cityscapes")

# Unlabelled images of the recipes, which give the length of an epoch: the 10582
# of VOC with SBD but 1464, the 2975 of Cityscapes but 744.
_UNLABELLED = {"voc": 9118, "cityscapes": 2231}


def parser(doc: str) -> argparse.ArgumentParser:
  """The options that the benchmarks share.

  Args:
    doc: docstring of the command.
  """
  title, _, text = doc.partition("\n")
  result = argparse.ArgumentParser(
    description=title,
    epilog=text,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  result.add_argument(
    "--preset",
    choices=PRESETS,
    default="cpu-mid",
    help="what is timed (default: cpu-mid)",
  )
  result.add_argument(
    "--size",
    type=positive,
    action="append",
    help="crop size, if not the preset's; may be repeated",
  )
  result.add_argument(
    "--batch",
    type=positive,
    help="labelled images, and as many unlabelled, if not the preset's",
  )
  result.add_argument(
    "--repeats", type=positive, default=10, help="timed runs (default: 10)"
  )
  result.add_argument(
    "--json", type=pathlib.Path, help="also write the numbers to this file"
  )
  return result


def positive(text: str) -> int:
  """An option that counts something."""
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
  return value


@dataclasses.dataclass(frozen=True)
class Case:
  """What is timed.

  Attributes:
    preset: its name.
    config: complete.
    num_classes: k.
    steps: of the preset's schedule, (supervised, semi-supervised); None for a
      preset that is no recipe.
  """

  preset: str
  config: ml_collections.ConfigDict
  num_classes: int
  steps: tuple[int, int] | None = None

  @property
  def crop(self) -> tuple[int, int]:
    return tuple(self.config.input.crop_size)

  @property
  def name(self) -> str:
    batch, model = self.config.batch, self.config.model
    parts = batch.microbatches
    return (
      f"{self.preset}: {model.backbone}, {model.dtype},"
      f" {batch.labelled}+{batch.unlabelled} images of"
      f" {self.crop[0]}x{self.crop[1]}"
      + (f" in {parts} micro-batches" if parts > 1 else "")
      + (", remat" if model.remat else "")
      + f", {self.num_classes} classes"
    )


def _config(preset: str) -> tuple[ml_collections.ConfigDict, int]:
  if preset == "voc":
    config, num_classes = voc_1464.get_config(), 21
  elif preset == "cityscapes":
    config, num_classes = cityscapes_744.get_config(), 19
  else:
    config, num_classes = common.get_base_config(), 21
    config.model.backbone = "resnet50"
    config.batch.labelled = config.batch.unlabelled = 2
    config.input.crop_size = (129, 129)
  if preset != "cpu-mid":
    config.model.dtype = "bfloat16"
  return config, num_classes


def cases(
  preset: str,
  *,
  sizes: Sequence[int] | None = None,
  batch: int | None = None,
  microbatches: int | None = None,
  remat: bool = False,
) -> list[Case]:
  """The cases of a preset.

  Args:
    preset: one of `PRESETS`.
    sizes: crop sizes; None for the preset's, which are 129 and 257 of cpu-mid.
    batch: labelled images, and as many unlabelled ones; None for the preset's.
    microbatches: None for the preset's.
    remat: recompute the encoder's blocks.
  """
  if not sizes:
    sizes = (129, 257) if preset == "cpu-mid" else (None,)
  result = []
  for size in sizes:
    config, num_classes = _config(preset)
    if size:
      config.input.crop_size = (size, size)
    if batch:
      config.batch.labelled = config.batch.unlabelled = batch
    if microbatches:
      config.batch.microbatches = microbatches
    config.model.remat = remat
    steps = None
    if preset in _UNLABELLED:
      data = build_lib.DataSpec(
        num_classes, (0.0,) * 3, (1.0,) * 3, _UNLABELLED[preset]
      )
      recipe = build_lib.make_recipe(config, data)
      warmup = recipe.warmup_steps
      steps = (warmup, recipe.total_steps - warmup)
    config.schedule.warmup_epochs = 0
    # Without training all probabilities are about 1 / k: with the published
    # bounds there would be no anchor, and nothing to contrast.
    config.contrastive.anchor_min_probability = 0.0
    result.append(Case(preset, config, num_classes, steps))
  return result


def build(case: Case) -> build_lib.Program:
  """The program of a case."""
  return build_lib.build(
    case.config,
    build_lib.DataSpec(
      case.num_classes, (123.7, 116.3, 103.5), (58.4, 57.1, 57.4), 1000
    ),
    devices=jax.devices()[:1],
    for_one_cpu=build_lib.runs_on_one_cpu(),
  )


def random_labels(
  rng: np.random.Generator, case: Case, number: int
) -> np.ndarray:
  """[b, h, w] uint8: blocks, so that the feature grid sees every class."""
  coarse = rng.integers(0, case.num_classes, (number, 16, 16), dtype=np.uint8)
  return np.array(resize_nearest(jnp.asarray(coarse), case.crop))


def random_batches(case: Case, rng: np.random.Generator) -> tuple[Batch, Batch]:
  """Labelled and unlabelled half in the form of the input pipeline."""
  height, width = case.crop

  def half(number: int) -> Batch:
    shape = (number, height, width, 3)
    box = np.asarray([[0, 0, height, width]], np.int32)
    return {
      "image": rng.integers(0, 256, shape, dtype=np.uint8),
      "valid_box": np.repeat(box, number, axis=0),
    }

  labelled, unlabelled = (
    half(case.config.batch[name]) for name in ("labelled", "unlabelled")
  )
  labelled["label"] = random_labels(rng, case, len(labelled["image"]))
  return labelled, unlabelled


def full(bank: MemoryBank, seed: int = 0) -> MemoryBank:
  """The bank with every queue full of random keys."""
  keys = jax.random.normal(
    jax.random.key(seed), bank.keys.shape, bank.keys.dtype
  )
  return bank.replace(keys=keys, count=jnp.asarray(bank.capacities, jnp.int32))


class Tables:
  """A network whose outputs are its parameters.

  In the place of `model` in a training step it leaves all that is not the
  network: the gradient of the parameters is that of the outputs.
  """

  def apply(
    self,
    variables: dict[str, Any],
    images: Array,
    *,
    train: bool,
    mutable: Sequence[str] = (),
    rngs: dict[str, Array] | None = None,
  ) -> Any:
    """See `DeepLab`; what it needs no image for, it does not read."""
    del images, mutable, rngs
    params = variables["params"]
    outputs = Outputs(
      params["logits"], params["reps"], params.get("aux_logits")
    )
    if train:
      return outputs, {"batch_stats": variables["batch_stats"]}
    # Only the pass over clean images runs so.
    return outputs._replace(logits=params["clean_logits"])


def _keep_gradients() -> optax.GradientTransformation:
  """Changes nothing, and has the gradients as its state: they are computed."""
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads),
  )


def random_outputs(case: Case, rng: np.random.Generator) -> dict[str, Array]:
  """What a network trained a little might give: parameters of `Tables`."""
  config, num_classes = case.config, case.num_classes
  shapes = roofline.describe(
    build_lib.make_model(config, num_classes), case.crop
  ).outputs
  labelled, unlabelled = config.batch.labelled, config.batch.unlabelled

  def logits(shape: tuple[int, ...], number: int) -> Array:
    labels = resize_nearest(random_labels(rng, case, number), shape[1:3])
    one_hot = labels[..., None] == np.arange(num_classes)
    noise = rng.standard_normal((number, *shape[1:]), dtype=np.float32)
    return jnp.asarray(noise + 4 * one_hot)

  grid = shapes.reps.shape[1:]
  reps = rng.standard_normal((labelled + unlabelled, *grid), dtype=np.float32)
  outputs = {
    "logits": logits(shapes.logits.shape, labelled + unlabelled),
    "clean_logits": logits(shapes.logits.shape, unlabelled),
    "reps": jnp.asarray(reps),
  }
  if shapes.aux_logits is not None:
    outputs["aux_logits"] = logits(
      shapes.aux_logits.shape, labelled + unlabelled
    )
  return outputs


def outside_network(
  case: Case,
  program: build_lib.Program,
  student: dict[str, Array],
  teacher: dict[str, Array],
) -> tuple[Callable, TrainState]:
  """The semi-supervised step without its network, and a state for it.

  The step is the trainer's own, forward and backward, with `Tables` in the
  place of the networks. Beside what it is meant to show it averages the
  outputs, as a step does with parameters: three passes over them.

  Args:
    case: of the program.
    program: its recipe counts.
    student, teacher: what the networks give, see `random_outputs`.

  Returns:
    (jitted `(state, labelled, unlabelled) -> (state, metrics)`, a state for it,
    which is donated).
  """
  tx = _keep_gradients()
  _, step = build_lib.step_functions(
    case.config, model=Tables(), tx=tx, recipe=program.recipe
  )

  def network(params: dict[str, Array]) -> Variables:
    return Variables(jax.tree.map(jnp.copy, params), {})

  state = TrainState(
    # Not the first one, where the teacher becomes a copy of the student.
    step=jnp.asarray(1, jnp.int32),
    student=network(student),
    teacher=network(teacher),
    opt_state=tx.init(student),
    memory_bank=full(build_lib.make_memory_bank(case.config, case.num_classes)),
  )
  return jax.jit(step, donate_argnums=0), state


def _passes(
  case: Case, program: build_lib.Program, state: TrainState
) -> dict[str, tuple[Callable, tuple]]:
  """The passes of the networks: {name: (function, arguments)}, not compiled."""
  model, microbatches = program.model, program.recipe.microbatches
  num_l, num_u = case.config.batch.labelled, case.config.batch.unlabelled
  images = jax.random.normal(jax.random.key(1), (num_l + num_u, *case.crop, 3))

  def clean_images(teacher: Variables, images: Array) -> Array:
    logits = forward_eval(model, teacher, images, microbatches).logits
    return resize_bilinear(logits, case.crop).argmax(-1).astype(jnp.uint8)

  def strong_view(network: Variables, images: Array) -> Outputs:
    outputs, _ = forward_train(
      model,
      network.params,
      network.batch_stats,
      images,
      jax.random.key(2),
      groups=halves.num_groups(num_l, num_u),
      microbatches=microbatches,
    )
    return outputs

  def both_ways(student: Variables, images: Array, factor: Array) -> Any:
    def scalar(params: Any) -> Array:
      outputs = strong_view(student.replace(params=params), images)
      # The compiler takes long to add up gradients that it knows to be one.
      return factor * sum(x.sum() for x in jax.tree.leaves(outputs))

    return jax.grad(scalar)(student.params)

  def update(state: TrainState) -> tuple[Variables, Any, Any]:
    grads = jax.tree.map(lambda x: x * 1e-3, state.student.params)
    student, opt_state = apply_gradients(
      state, grads, state.student.batch_stats, program.tx
    )
    teacher = ema.ema_update(state.teacher.params, student.params, 0.99)
    return student, opt_state, teacher

  return {
    "teacher, clean images": (clean_images, (state.teacher, images[:num_u])),
    "teacher, strong view": (strong_view, (state.teacher, images)),
    "student, both ways": (
      both_ways,
      (state.student, images, jnp.ones(())),
    ),
    "optimiser and average": (update, (state,)),
  }


class Timing(NamedTuple):
  """Of a compiled program.

  Attributes:
    ms: median.
    compile_s: tracing included.
    peak_bytes: by the compiler, arguments included.
  """

  ms: float
  compile_s: float
  peak_bytes: int


def timings(
  case: Case, repeats: int, *, phases: bool = True
) -> dict[str, Timing]:
  """Everything of a case, the two steps last.

  Args:
    case: see `cases`.
    repeats: runs of each; the median is given.
    phases: also the phases of the semi-supervised step, each alone.
  """
  rng = np.random.default_rng(0)
  program = build(case)
  batches = jax.device_put(random_batches(case, rng))
  state = program.create_state()
  state = state.replace(memory_bank=full(state.memory_bank))
  result = {}

  def compiled(
    name: str, function: Callable, *args: Any
  ) -> tuple[Callable, Callable]:
    begin = time.perf_counter()
    run = compile_for(name, function, *args)
    compile_s = time.perf_counter() - begin
    return run, lambda ms: Timing(ms, compile_s, step_shapes.peak_bytes(run))

  if phases:
    for name, (function, args) in _passes(case, program, state).items():
      run, timing = compiled(name, jax.jit(function), *args)
      result[name] = timing(median_ms(name, run, repeats, *args))
    step, tables = outside_network(
      case, program, *(random_outputs(case, rng) for _ in range(2))
    )
    name = "outside the network"
    run, timing = compiled(name, step, tables, *batches)
    ms, _ = step_ms(name, run, tables, batches, repeats)
    result[name] = timing(ms)
    del tables
  for name, step, halves_of_batch in (
    ("supervised step", program.supervised_step, batches[:1]),
    ("semi-supervised step", program.semi_supervised_step, batches),
  ):
    run, timing = compiled(name, step, state, *halves_of_batch)
    ms, state = step_ms(name, run, state, halves_of_batch, repeats)
    result[name] = timing(ms)
  return result


def compile_for(name: str, function: Callable, *args: Any) -> Callable:
  """The jitted function, compiled for `args`; stderr shows how long it took."""
  with parallel.elapsed(f"compiling {name}"):
    return function.lower(*args).compile()


def median_ms(
  name: str, run: Callable[..., Any], repeats: int, *args: Any
) -> float:
  """Median of `repeats` calls with `args`, after two that do not count.

  Args:
    name: of the progress bar.
    run: what is timed, until its results are there.
    repeats: calls that count.
    *args: of each call.
  """
  samples = []
  with parallel.progress(2 + repeats, name, "run") as bar:
    for _ in range(2 + repeats):
      begin = time.perf_counter()
      jax.block_until_ready(run(*args))
      samples.append(time.perf_counter() - begin)
      bar.update()
  return 1e3 * statistics.median(samples[2:])


def step_ms(
  name: str, step: Callable, state: TrainState, batches: tuple, repeats: int
) -> tuple[float, TrainState]:
  """Median of a step that donates its state; and the last state."""

  def run() -> Any:
    nonlocal state
    state, metrics = step(state, *batches)
    return state, metrics

  return median_ms(name, run, repeats), state


def measured_device(dtype: str) -> roofline.Device:
  """The device that runs this, with the rates of large products and copies."""
  on_cpu = jax.default_backend() == "cpu"
  size = 2048 if on_cpu else 8192
  a = jnp.ones((size, size), jnp.dtype(dtype))
  product = jax.jit(jnp.matmul).lower(a, a).compile()
  flops = 2 * size**3 / (1e-3 * median_ms("rate of products", product, 5, a, a))
  x = jnp.zeros((64 if on_cpu else 1024) * 2**20 // 4)
  copy = jax.jit(lambda x: x + 1).lower(x).compile()
  num_bytes = 2 * x.nbytes / (1e-3 * median_ms("rate of copies", copy, 5, x))
  return roofline.Device(
    jax.devices()[0].device_kind,
    {dtype: flops / 1e12},
    num_bytes / 1e12,
    f"measured: products of {size}x{size}, copies of {x.nbytes >> 20} MiB",
    reach=1.0,
    reach_bytes=1.0,
  )


def device_line(device: roofline.Device, dtype: str) -> str:
  """What ran, and its rates, as one line."""
  return (
    f"{device.name}, jax {jax.__version__}: {device.rate(dtype) / 1e12:.3g}"
    f" TFLOP/s in {dtype}, {device.byte_rate / 1e9:.3g} GB/s"
    f" ({device.source})"
  )
