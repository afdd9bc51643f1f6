"""The small network that the recorded numbers belong to, with their weights."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.golden import DTYPE, weights
from u2pl_jax.models import resnet, torch_weights
from u2pl_jax.models.deeplab import DeepLab
from u2pl_jax.train_state import Variables


def make_model(
  names: np.ndarray, shapes: np.ndarray, *, conv_products: bool = False
) -> DeepLab:
  """The published network of the depth, heads and classes of a state dict."""
  names = names.tolist()
  blocks = tuple(
    len({n.split(".")[2] for n in names if n.startswith(f"encoder.layer{s}.")})
    for s in (1, 2, 3, 4)
  )
  last = names.index("decoder.classifier.8.bias")
  return DeepLab(
    num_classes=int(shapes[last]),
    backbone=resnet.ResNetSpec(blocks, bottleneck=True),
    auxiliary=any(n.startswith("auxor.") for n in names),
    # The recorded runs had no dropout.
    dropout=0.0,
    dtype=DTYPE,
    conv_products=conv_products,
  )


def load_variables(
  model: DeepLab, names: np.ndarray, shapes: np.ndarray, seed: int
) -> Variables:
  """The recorded initial weights, all of them and nothing else."""
  abstract = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0), jnp.zeros((2, 65, 65, 3)), train=False
    )
  )
  state = weights(names, shapes, seed)
  assert set(state) == set(torch_weights.shapes(abstract))
  variables = torch_weights.replace(abstract, state)
  variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, DTYPE), variables)
  return Variables(variables["params"], variables["batch_stats"])
