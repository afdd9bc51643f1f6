"""Everything a run needs to go on, as one pytree."""

import functools
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from u2pl_jax.memory_bank import MemoryBank

Array = jax.Array


@flax.struct.dataclass
class Variables:
  """Parameters and batch statistics of one network."""

  params: Any
  batch_stats: Any

  def for_apply(self) -> dict[str, Any]:
    """As `Module.apply` takes them."""
    return {"params": self.params, "batch_stats": self.batch_stats}


@flax.struct.dataclass
class TrainState:
  """State of a training run.

  Attributes:
    step: int32 scalar, updates done.
    student: trained by gradient.
    teacher: parameters are an average of the student's; its batch statistics
      come from its own forward passes.
    opt_state: of the student's optimiser.
    memory_bank: queues of negatives; empty queues of capacity 1 if the method
      has none.
  """

  step: Array
  student: Variables
  teacher: Variables
  opt_state: optax.OptState
  memory_bank: MemoryBank


def create_train_state(
  key: Array,
  model: nn.Module,
  tx: optax.GradientTransformation,
  *,
  image_size: tuple[int, int],
  memory_bank: MemoryBank,
  cold_teacher: bool = False,
  load_pretrained: Callable[[dict], dict] | None = None,
) -> TrainState:
  """Initialises student, teacher, optimiser and bank.

  Args:
    key: random key of the initialisation.
    model: a `DeepLab`.
    tx: the optimiser.
    image_size: any size the network can take; the weights do not depend on it.
    memory_bank: an empty bank.
    cold_teacher: quirk `teacher_cold_start`: the teacher's own random weights
      instead of a copy of the student's.
    load_pretrained: takes and returns {'params', 'batch_stats'}; applied to
      both networks.

  Returns:
    The state at step 0. No buffer is shared between student and teacher, since
    the step donates the whole state.
  """

  def init(key: Array) -> Variables:
    images = jnp.zeros((1, *image_size, 3), jnp.float32)
    # Hundreds of small random draws compile five times faster unoptimised.
    init_fn = jax.jit(
      functools.partial(model.init, train=False),
      compiler_options={"xla_backend_optimization_level": "0"},
    )
    variables = dict(init_fn(key, images))
    if load_pretrained is not None:
      variables = load_pretrained(variables)
    return Variables(variables["params"], variables["batch_stats"])

  key_student, key_teacher = jax.random.split(key)
  student = init(key_student)
  teacher = (
    init(key_teacher) if cold_teacher else jax.tree.map(jnp.copy, student)
  )
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    student=student,
    teacher=teacher,
    opt_state=tx.init(student.params),
    memory_bank=memory_bank,
  )
