"""DeepLabV3+ and DeepLabV3 with representation and auxiliary heads.

Chen et al. 2018, as in the published U2PL network: ASPP with a 3x3 head, a
256-channel low-level branch, and a representation head shaped like the
classifier whose output is not normalised (the loss takes cosines).
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from u2pl_jax.models import convolution
from u2pl_jax.models.layers import BatchNorm, Conv, Dtype, resize_bilinear
from u2pl_jax.models.resnet import BACKBONES, ResNet, ResNetSpec

Array = jax.Array

HEADS = ("deeplabv3plus", "deeplabv3")


class Outputs(NamedTuple):
  """What the network computes, all at the feature stride.

  Attributes:
    logits: [b, hf, wf, k], at least float32.
    reps: [b, hf, wf, d], at least float32.
    aux_logits: [b, h3, w3, k] from stage 3, or None without auxiliary head.
  """

  logits: Array
  reps: Array
  aux_logits: Array | None


def _conv_norm_relu(
  x: Array,
  features: int,
  name: str,
  *,
  index: int = 0,
  kernel_size: int = 3,
  dilation: int = 1,
  use_bias: bool = False,
  dropout: float = 0.0,
  train: bool,
  dtype: Dtype,
) -> Array:
  """Adds the layers to the calling module; `index` as in nn.Sequential."""
  x = Conv(
    features,
    kernel_size,
    dilation=dilation,
    use_bias=use_bias,
    head=True,
    dtype=dtype,
    name=f"{name}_{index}",
  )(x)
  x = BatchNorm(dtype=dtype, name=f"{name}_{index + 1}")(x, train=train)
  x = nn.relu(x)
  if dropout:
    # Whole channels, as torch's Dropout2d.
    x = nn.Dropout(dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
  return x


class ASPP(nn.Module):
  """Atrous spatial pyramid pooling: image pooling, 1x1 and three rates.

  Attributes:
    features: channels of each of the five branches.
    rates: dilations of the 3x3 branches at this output stride.
  """

  features: int
  rates: tuple[int, ...]
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """[b, h, w, c] -> [b, h, w, 5 * features], branches concatenated."""
    common = {"train": train, "dtype": self.dtype}
    # The mean of many bfloat16 values needs a wider accumulator.
    pooled = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    pooled = pooled.mean((1, 2), keepdims=True).astype(x.dtype)
    pooled = _conv_norm_relu(
      pooled, self.features, "conv1", index=1, kernel_size=1, **common
    )
    # Bilinear resize of a single pixel is a broadcast.
    branches = [jnp.broadcast_to(pooled, (*x.shape[:3], self.features))]
    branches.append(
      _conv_norm_relu(x, self.features, "conv2", kernel_size=1, **common)
    )
    for i, rate in enumerate(self.rates):
      branches.append(
        _conv_norm_relu(
          x, self.features, f"conv{i + 3}", dilation=rate, **common
        )
      )
    return jnp.concatenate(branches, -1)


class Decoder(nn.Module):
  """Heads on the encoder's features; see `DeepLab` for the attributes."""

  head: str
  num_classes: int
  features: int
  rep_features: int
  rates: tuple[int, ...]
  dropout: float
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, stages: tuple[Array, ...], *, train: bool
  ) -> tuple[Array, Array]:
    """Four stages -> (logits, reps)."""
    common = {"train": train, "dtype": self.dtype, "dropout": self.dropout}
    low, high = stages[0], stages[3]
    x = ASPP(self.features, self.rates, self.dtype, name="aspp")(
      high, train=train
    )
    x = _conv_norm_relu(x, self.features, "head", **common)

    if self.head == "deeplabv3plus":
      low = _conv_norm_relu(
        low,
        self.features,
        "low_conv",
        kernel_size=1,
        use_bias=True,
        train=train,
        dtype=self.dtype,
      )
      x = resize_bilinear(x, low.shape[1:3]).astype(self.dtype)
      x = jnp.concatenate([low, x], -1)

    def branch(x: Array, out_features: int, name: str) -> Array:
      for index in (0, 4):
        x = _conv_norm_relu(
          x, self.features, name, index=index, use_bias=True, **common
        )
      return self._project(x, out_features, f"{name}_8")

    if self.head == "deeplabv3plus":
      logits = branch(x, self.num_classes, "classifier")
    else:
      logits = self._project(x, self.num_classes, "head_4")
    return logits, branch(x, self.rep_features, "representation")

  def _project(self, x: Array, features: int, name: str) -> Array:
    x = Conv(
      features, 1, use_bias=True, head=True, dtype=self.dtype, name=name
    )(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class AuxiliaryHead(nn.Module):
  """Classifier on stage 3, used only by the auxiliary loss."""

  num_classes: int
  features: int
  dropout: float
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    x = _conv_norm_relu(
      x,
      self.features,
      "aux",
      use_bias=True,
      dropout=self.dropout,
      train=train,
      dtype=self.dtype,
    )
    x = Conv(
      self.num_classes,
      1,
      use_bias=True,
      head=True,
      dtype=self.dtype,
      name="aux_4",
    )(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class DeepLab(nn.Module):
  """The segmentation network of student and teacher.

  Attributes:
    num_classes: number of classes, without the ignore label.
    backbone: a key of `resnet.BACKBONES`, or a spec of one's own.
    head: 'deeplabv3plus' (published) or 'deeplabv3', whose logits come straight
      from the ASPP head at the output stride, with the same representation
      branch beside it.
    stem, output_stride, multi_grid, zero_init_residual: see `ResNet`.
    aspp_rates: dilations of ASPP; 12, 24, 36 at output stride 8.
    rep_features: width d of the representations.
    auxiliary: add the head on stage 3.
    dropout: probability of dropping a channel in the heads.
    remat: recompute the encoder's blocks in the backward pass.
    dtype: compute type of the convolutions.
    conv_products: run large convolutions as matrix products, for a CPU; see
      `convolution.convolve_by_products`.
  """

  num_classes: int
  backbone: str | ResNetSpec = "resnet101"
  head: str = "deeplabv3plus"
  stem: str = "deep"
  output_stride: int = 8
  multi_grid: bool = True
  zero_init_residual: bool = True
  aspp_rates: tuple[int, ...] = (12, 24, 36)
  rep_features: int = 256
  auxiliary: bool = False
  dropout: float = 0.1
  remat: bool = False
  dtype: Dtype = jnp.float32
  conv_products: bool = False

  @nn.compact
  def __call__(self, images: Array, *, train: bool) -> Outputs:
    """Runs the network.

    Args:
      images: [b, h, w, 3], normalised.
      train: use batch statistics (and collect running ones if `batch_stats` is
        mutable) and dropout (rng stream 'dropout').

    Returns:
      `Outputs` at stride 4 (deeplabv3plus) or the output stride (deeplabv3).

    Raises:
      ValueError: unknown backbone, head, stem or output stride.
    """
    if isinstance(self.backbone, ResNetSpec):
      spec = self.backbone
    elif self.backbone in BACKBONES:
      spec = BACKBONES[self.backbone]
    else:
      raise ValueError(
        f"model.backbone={self.backbone!r}: choose one of {list(BACKBONES)}"
      )
    if self.head not in HEADS:
      raise ValueError(f"model.head={self.head!r}: choose one of {list(HEADS)}")
    with convolution.products(self.conv_products):
      stages = ResNet(
        spec,
        stem=self.stem,
        output_stride=self.output_stride,
        multi_grid=self.multi_grid,
        zero_init_residual=self.zero_init_residual,
        remat=self.remat,
        dtype=self.dtype,
        name="encoder",
      )(images.astype(self.dtype), train=train)
      logits, reps = Decoder(
        head=self.head,
        num_classes=self.num_classes,
        features=spec.head_width,
        rep_features=self.rep_features,
        rates=self.aspp_rates,
        dropout=self.dropout,
        dtype=self.dtype,
        name="decoder",
      )(stages, train=train)
      aux_logits = None
      if self.auxiliary:
        aux_logits = AuxiliaryHead(
          num_classes=self.num_classes,
          features=spec.head_width,
          dropout=self.dropout,
          dtype=self.dtype,
          name="auxor",
        )(stages[2], train=train)
    return Outputs(logits, reps, aux_logits)
