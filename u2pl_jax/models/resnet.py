"""Dilated ResNet encoders of the published network.

He et al. 2016, with the deep stem and multi-grid of DeepLab (Chen et al. 2017).
Module names follow the published state dict (`layer3_0/conv1` is
`layer3.0.conv1`), which is all that `torch_weights` relies on.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from u2pl_jax.models.layers import BatchNorm, Conv, Dtype, max_pool_ceil

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ResNetSpec:
  """What tells one backbone from another.

  Attributes:
    blocks: number of residual blocks in each of the four stages.
    bottleneck: 1x1-3x3-1x1 blocks with 4x expansion instead of two 3x3.
    width: channels of the first stage before expansion.
    head_width: channels of the heads; 256 in the published network.
  """

  blocks: tuple[int, int, int, int]
  bottleneck: bool
  width: int = 64
  head_width: int = 256

  @property
  def stage_channels(self) -> tuple[int, ...]:
    """Output channels of the four stages."""
    expansion = 4 if self.bottleneck else 1
    return tuple(self.width * 2**i * expansion for i in range(4))


BACKBONES = {
  "resnet18": ResNetSpec((2, 2, 2, 2), bottleneck=False),
  "resnet34": ResNetSpec((3, 4, 6, 3), bottleneck=False),
  "resnet50": ResNetSpec((3, 4, 6, 3), bottleneck=True),
  "resnet101": ResNetSpec((3, 4, 23, 3), bottleneck=True),
  "resnet152": ResNetSpec((3, 8, 36, 3), bottleneck=True),
  # For CPU runs and tests: the same code path, about 0.4 M parameters.
  "tiny": ResNetSpec((1, 1, 1, 1), bottleneck=False, width=16, head_width=48),
}


class Block(nn.Module):
  """One residual block, basic or bottleneck."""

  features: int
  bottleneck: bool
  stride: int
  dilation: int
  project: bool
  zero_init: bool
  dtype: Dtype

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    out_features = self.features * (4 if self.bottleneck else 1)

    def conv(features, size, name, **kwargs):
      return Conv(features, size, dtype=self.dtype, name=name, **kwargs)

    def norm(name, **kwargs):
      return BatchNorm(dtype=self.dtype, name=name, **kwargs)

    last = {"scale_init": nn.initializers.zeros} if self.zero_init else {}
    spatial = {"stride": self.stride, "dilation": self.dilation}
    if self.bottleneck:
      y = conv(self.features, 1, "conv1")(x)
      y = nn.relu(norm("bn1")(y, train=train))
      y = conv(self.features, 3, "conv2", **spatial)(y)
      y = nn.relu(norm("bn2")(y, train=train))
      y = conv(out_features, 1, "conv3")(y)
      y = norm("bn3", **last)(y, train=train)
    else:
      y = conv(self.features, 3, "conv1", **spatial)(x)
      y = nn.relu(norm("bn1")(y, train=train))
      y = conv(out_features, 3, "conv2", dilation=self.dilation)(y)
      y = norm("bn2", **last)(y, train=train)
    if self.project:
      x = conv(out_features, 1, "downsample_0", stride=self.stride)(x)
      x = norm("downsample_1")(x, train=train)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """Returns the features of the four stages.

  Attributes:
    spec: depth and width.
    stem: 'deep' (three 3x3 convolutions, published) or 'conv7' (torchvision).
    output_stride: 8 or 16; later stages trade stride for dilation.
    multi_grid: multiply the dilations of stage 4 by 2, 2, 4 (the last factor
      repeats if there are more blocks), published.
    zero_init_residual: start each residual branch at zero.
    remat: recompute each block's activations in the backward pass.
    dtype: compute type.
  """

  spec: ResNetSpec
  stem: str = "deep"
  output_stride: int = 8
  multi_grid: bool = True
  zero_init_residual: bool = True
  remat: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> tuple[Array, ...]:
    """Encodes normalised images.

    Args:
      x: [b, h, w, 3].
      train: batch statistics instead of running ones.

    Returns:
      Four feature maps at stride 4, 8, and twice `output_stride` or less.

    Raises:
      ValueError: unknown stem or output stride.
    """
    norm = BatchNorm(dtype=self.dtype, name="bn1")
    width = self.spec.width
    if self.stem == "deep":
      for i, (features, stride) in enumerate(
        ((width, 2), (width, 1), (2 * width, 1))
      ):
        x = Conv(features, 3, stride, dtype=self.dtype, name=f"conv1_{3 * i}")(
          x
        )
        if i < 2:
          x = BatchNorm(dtype=self.dtype, name=f"conv1_{3 * i + 1}")(
            x, train=train
          )
          x = nn.relu(x)
    elif self.stem == "conv7":
      x = Conv(width, 7, 2, dtype=self.dtype, name="conv1")(x)
    else:
      raise ValueError(f"model.stem={self.stem!r}: choose 'deep' or 'conv7'")
    x = max_pool_ceil(nn.relu(norm(x, train=train)))

    if self.output_stride not in (8, 16):
      raise ValueError(
        f"model.output_stride={self.output_stride}: choose 8 or 16"
      )
    # The first block of a dilated stage keeps the dilation before it, as in
    # torchvision; the stage's own applies from the second block on.
    block_cls = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
    features, dilation, stride_so_far = [], 1, 4
    for stage, blocks in enumerate(self.spec.blocks):
      stride = 1 if stage == 0 else 2
      first_dilation = dilation
      if stride_so_far * stride > self.output_stride:
        dilation *= stride
        stride = 1
      stride_so_far *= stride
      grid = (2, 2, 4) if self.multi_grid and stage == 3 else (1,)
      planes = width * 2**stage
      out_features = self.spec.stage_channels[stage]
      for i in range(blocks):
        x = block_cls(
          planes,
          self.spec.bottleneck,
          stride=stride if i == 0 else 1,
          dilation=(first_dilation if i == 0 else dilation)
          * grid[min(i, len(grid) - 1)],
          project=i == 0 and (stride != 1 or x.shape[-1] != out_features),
          zero_init=self.zero_init_residual,
          dtype=self.dtype,
          name=f"layer{stage + 1}_{i}",
        )(x, train)
      features.append(x)
    return tuple(features)
