import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from u2pl_jax.models import convolution, layers, torch_weights
from u2pl_jax.models.deeplab import DeepLab
from u2pl_jax.models.resnet import BACKBONES

# (backbone, stem): parameters of the encoder. The conv7 numbers are those of
# torchvision's ResNets without their classifier.
ENCODER_PARAMETERS = {
  ("resnet18", "conv7"): 11_176_512,
  ("resnet34", "conv7"): 21_284_672,
  ("resnet50", "conv7"): 23_508_032,
  ("resnet101", "conv7"): 42_500_160,
  ("resnet152", "conv7"): 58_143_808,
  ("tiny", "conv7"): 309_456,
  ("resnet18", "deep"): 11_324_992,
  ("resnet34", "deep"): 21_433_152,
  ("resnet50", "deep"): 23_631_808,
  ("resnet101", "deep"): 42_623_936,
  ("resnet152", "deep"): 58_267_584,
  ("tiny", "deep"): 317_392,
}
# (head, auxiliary): parameters of everything, ResNet-101, 21 classes. The first
# is the published network's.
R101_PARAMETERS = {
  ("deeplabv3plus", False): 64_459_989,
  ("deeplabv3plus", True): 66_825_450,
  ("deeplabv3", False): 62_032_853,
}


def abstract_variables(**kwargs):
  model = DeepLab(21, **kwargs)
  return jax.eval_shape(
    lambda: model.init(
      jax.random.key(0), jnp.zeros((1, 65, 65, 3)), train=False
    )
  )


def count(tree):
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def test_every_backbone_is_in_the_table():
  assert {name for name, _ in ENCODER_PARAMETERS} == set(BACKBONES)


@pytest.mark.parametrize("backbone,stem", ENCODER_PARAMETERS)
def test_encoder_parameters(backbone, stem):
  variables = abstract_variables(backbone=backbone, stem=stem)
  expected = ENCODER_PARAMETERS[backbone, stem]
  assert count(variables["params"]["encoder"]) == expected


@pytest.mark.parametrize("head,auxiliary", R101_PARAMETERS)
def test_whole_parameters(head, auxiliary):
  variables = abstract_variables(head=head, auxiliary=auxiliary)
  assert count(variables["params"]) == R101_PARAMETERS[head, auxiliary]


@pytest.mark.parametrize(
  ("size", "stride", "grid"),
  [(513, 8, 129), (769, 8, 193), (65, 8, 17), (64, 8, 17), (321, 16, 81)],
)
def test_feature_grid(size, stride, grid):
  """Ceil-mode pooling: 513 -> 257 -> 129, but 64 -> 32 -> 17."""
  model = DeepLab(6, backbone="resnet50", output_stride=stride, auxiliary=True)

  def run():
    images = jnp.zeros((2, size, size, 3))
    variables = model.init(jax.random.key(0), images, train=False)
    return model.apply(variables, images, train=False)

  outputs = jax.eval_shape(run)
  assert outputs.logits.shape == (2, grid, grid, 6)
  assert outputs.reps.shape == (2, grid, grid, 256)
  stage3 = (grid + 1) // 2 if stride == 8 else (grid + 3) // 4
  assert outputs.aux_logits.shape == (2, stage3, stage3, 6)


def test_bfloat16_network_has_float32_parameters_and_outputs():
  model = DeepLab(6, backbone="tiny", dtype=jnp.bfloat16)

  def run():
    images = jnp.zeros((2, 33, 33, 3))
    variables = model.init(jax.random.key(0), images, train=False)
    return variables, model.apply(variables, images, train=False)

  variables, outputs = jax.eval_shape(run)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {
    jnp.dtype("float32")
  }
  assert outputs.logits.dtype == outputs.reps.dtype == jnp.float32


def test_max_pool_ceil_by_hand():
  x = jnp.arange(16.0).reshape(1, 4, 4, 1)
  # Windows begin at -1, 1, 3: the last one holds index 3 alone.
  expected = [[5, 7, 7], [13, 15, 15], [13, 15, 15]]
  assert layers.max_pool_ceil(x)[0, ..., 0].tolist() == expected
  assert layers.max_pool_ceil(-x)[0, 0, 0, 0] == 0  # padding is no 0
  assert layers.max_pool_ceil(x[:, :3, :3]).shape == (1, 2, 2, 1)


def test_batch_norm_by_hand():
  x = jnp.asarray([1.0, 3.0]).reshape(2, 1, 1, 1)
  norm = layers.BatchNorm()
  variables = norm.init(jax.random.key(0), x, train=True)
  y, new = norm.apply(variables, x, train=True, mutable=["batch_stats"])
  # Mean 2, biased variance 1 normalises; unbiased variance 2 is stored.
  np.testing.assert_allclose(y.ravel(), [-1, 1], rtol=1e-5)
  np.testing.assert_allclose(new["batch_stats"]["mean"], [0.2], rtol=1e-6)
  np.testing.assert_allclose(
    new["batch_stats"]["var"], [0.9 + 0.1 * 2], rtol=1e-6
  )
  evaluated = norm.apply(variables, x, train=False)
  np.testing.assert_allclose(evaluated.ravel(), [1, 3], rtol=1e-5)


def test_batch_norm_refuses_a_single_value():
  norm = layers.BatchNorm()
  x = jnp.ones((1, 1, 1, 4))
  variables = norm.init(jax.random.key(0), x, train=True)
  with pytest.raises(ValueError, match="two images"):
    norm.apply(variables, x, train=True, mutable=["batch_stats"])


def test_resize_bilinear_by_hand():
  x = jnp.asarray([[0.0, 2.0], [4.0, 6.0]]).reshape(1, 2, 2, 1)
  y = layers.resize_bilinear(x, (3, 5))[0, ..., 0]
  np.testing.assert_allclose(y[0], [0, 0.5, 1, 1.5, 2], rtol=1e-6)
  np.testing.assert_allclose(y[:, 0], [0, 2, 4], rtol=1e-6)
  one = layers.resize_bilinear(jnp.full((1, 1, 1, 1), 7.0), (4, 3))
  assert (one == 7).all()


@pytest.mark.parametrize("sizes", [(3, 11), (5, 17), (9, 4), (1, 6), (6, 1)])
def test_interpolation_by_gathers_and_by_products(sizes):
  """The two forms, of which a device runs the faster one, are one matrix."""
  size_in, size_out = sizes
  matrix = layers._interpolation_matrix(size_in, size_out, np.dtype("float32"))
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, size_in, 4, 3), np.float32)
  gradient = rng.standard_normal((2, size_out, 4, 3), np.float32)
  for form in (layers._weighted_gathers, layers._product):
    for axis, y, weights in (
      (1, x, matrix),
      (1, gradient, matrix.T),
      (2, x.swapaxes(1, 2), matrix),
    ):
      expected = np.moveaxis(np.tensordot(weights, y, (1, axis)), 0, axis)
      np.testing.assert_allclose(
        form(jnp.asarray(y), weights, axis), expected, rtol=1e-5, atol=1e-6
      )
  _, pullback = jax.vjp(lambda x: layers.resize_bilinear(x, (size_out, 4)), x)
  np.testing.assert_allclose(
    pullback(jnp.asarray(gradient))[0],
    np.moveaxis(np.tensordot(matrix.T, gradient, (1, 1)), 0, 1),
    rtol=1e-5,
    atol=1e-6,
  )


@pytest.mark.parametrize(
  "platform, used, unused",
  [
    ("cpu", "gather", "dot_general"),
    ("tpu", "dot_general", "gather"),
    ("cuda", "dot_general", "gather"),
  ],
)
def test_which_device_interpolates_how(platform, used, unused):
  def loss(x):
    return jnp.square(layers.resize_bilinear(x, (17, 17))).sum()

  exported = jax.export.export(jax.jit(jax.grad(loss)), platforms=[platform])(
    jnp.ones((1, 5, 5, 3))
  )
  text = exported.mlir_module()
  assert f"stablehlo.{used}" in text
  assert f"stablehlo.{unused}" not in text
  assert "stablehlo.scatter" not in text


def test_resize_nearest_is_torchs_floor_rule():
  x = jnp.arange(5).reshape(1, 5, 1)
  assert layers.resize_nearest(x, (3, 1)).ravel().tolist() == [0, 1, 3]
  assert layers.resize_nearest(x, (7, 1)).ravel().tolist() == [
    0, 0, 1, 2, 2, 3, 4,
  ]  # fmt: skip


@pytest.mark.parametrize(
  "size, features, kernel_size, dilation",
  [
    ((9, 8), 4, 1, 1),
    ((9, 8), 4, 3, 1),
    ((9, 8), 4, 3, 2),
    # Some elements of the kernel see nothing of the image.
    ((9, 8), 4, 3, 8),
    ((9, 8), 4, 3, 9),
    ((9, 8), 4, 5, 3),
    # More outputs than inputs: the other form of the kernel's gradient.
    ((9, 8), 12, 1, 1),
    ((9, 8), 12, 3, 4),
    # Large enough for its gradient by shifts.
    ((24, 20), 4, 3, 1),
    ((24, 20), 4, 3, 2),
    ((24, 20), 12, 3, 1),
    ((24, 20), 12, 5, 1),
  ],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_by_products(size, features, kernel_size, dilation, stride):
  """Against XLA's convolution, forward and both gradients."""
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (2, *size, 6))
  kernel = jax.random.normal(keys[1], (kernel_size, kernel_size, 6, features))
  shape = (2, *(-(-length // stride) for length in size), features)
  grad = jax.random.normal(keys[2], shape)

  @jax.jit
  def run(x, kernel, grad):
    results = []
    for function in (convolution.convolve, convolution.convolve_by_products):
      y, vjp = jax.vjp(
        lambda *args, f=function: f(*args, stride, dilation), x, kernel
      )
      results.append((y, *vjp(grad)))
    return results

  expected, found = run(x, kernel, grad)
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  "size, kernel_size, dilation",
  [
    # Multiples of the dilation, and not.
    ((8, 12), 3, 4),
    ((9, 14), 3, 2),
    ((17, 9), 5, 3),
    # A pixel or none in each of the images; elements that see nothing.
    ((5, 7), 3, 6),
    ((5, 7), 3, 12),
  ],
)
def test_kernel_gradient_by_subimages(size, kernel_size, dilation):
  """Against that of XLA's convolution."""
  keys = jax.random.split(jax.random.key(0), 2)
  x = jax.random.normal(keys[0], (2, *size, 6))
  grad = jax.random.normal(keys[1], (2, *size, 4))
  kernel = jnp.zeros((kernel_size, kernel_size, 6, 4))
  padding = dilation * (kernel_size // 2)
  (expected,) = jax.linear_transpose(
    lambda kernel: jax.lax.conv_general_dilated(
      x,
      kernel,
      (1, 1),
      [(padding, padding)] * 2,
      rhs_dilation=(dilation, dilation),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ),
    kernel,
  )(grad)
  found = jax.jit(
    functools.partial(
      convolution.kernel_gradient_by_subimages, dilation=dilation
    )
  )(x, grad, kernel)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda", "rocm"])
def test_no_gradient_on_a_gpu_has_the_dilation_as_stride(platform):
  """cuDNN's gradients of kernels have no stride; see `_convolve_dilated`."""
  x, kernel = jnp.zeros((2, 65, 65, 8)), jnp.zeros((3, 3, 8, 16))

  def gradients(x, kernel, grad):
    _, vjp = jax.vjp(lambda *args: convolution.convolve(*args, 1, 4), x, kernel)
    return vjp(grad)

  traced = jax.jit(gradients).trace(x, kernel, jnp.zeros((2, 65, 65, 16)))
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  # Of the input, and of the kernel.
  assert text.count("stablehlo.convolution") == 2
  strides = "window = {stride = [4, 4]" in text
  assert strides == (platform in ("cpu", "tpu"))


def test_products_are_only_of_what_is_on_the_image():
  """17 x 17 at dilation 12: five outputs on each side beside the centre's."""
  x, kernel = jnp.zeros((1, 17, 17, 8)), jnp.zeros((3, 3, 8, 16))
  lowered = jax.jit(
    lambda x: convolution.convolve_by_products(x, kernel, 1, 12)
  ).lower(x)
  products = 2 * 8 * 16 * (17 + 2 * 5) ** 2
  # Beside them the sums of nine parts, and a few indices.
  sums = 8 * 17 * 17 * 16 + 100
  assert products <= lowered.cost_analysis()["flops"] <= products + sums


def test_only_large_convolutions_run_as_products():
  kernel = jnp.zeros((1, 1, 256, 512))

  def is_convolution(size, dtype=jnp.float32):
    x = jnp.zeros((1, size, size, 256), dtype)
    jaxpr = jax.make_jaxpr(
      lambda x: convolution.convolve(x, kernel.astype(dtype), 1, 1)
    )(x)
    return "conv_general_dilated" in str(jaxpr)

  # 2**17 multiplications a pixel: worth it from 256 pixels on.
  with convolution.products(True):
    assert [is_convolution(size) for size in (15, 16)] == [True, False]
    assert is_convolution(16, jnp.bfloat16)
  assert is_convolution(16)


@pytest.mark.slow
def test_network_with_products_is_the_same_network(monkeypatch):
  monkeypatch.setattr(convolution, "_WORTH_PRODUCTS", 0)
  images = jax.random.normal(jax.random.key(0), (2, 65, 65, 3))
  model = DeepLab(5, backbone="tiny", auxiliary=True, rep_features=16)
  init = jax.jit(functools.partial(model.init, train=False))
  variables = init(jax.random.key(1), images)

  @functools.partial(jax.jit, static_argnums=0)
  def loss_and_gradient(model, params):
    def loss(params):
      outputs, _ = model.apply(
        variables | {"params": params},
        images,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(2)},
      )
      return sum((x**2).mean() for x in outputs)

    return jax.value_and_grad(loss)(params)

  expected = loss_and_gradient(model, variables["params"])
  found = loss_and_gradient(
    model.clone(conv_products=True), variables["params"]
  )
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
  # Relative to the largest: biases before a norm have no gradient but rounding.
  largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected[1]))
  for ours, theirs in zip(
    jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-4 * largest)


def test_dropout_drops_whole_channels_in_training_only():
  model = DeepLab(3, backbone="tiny", dropout=0.5)
  images = jax.random.normal(jax.random.key(1), (2, 33, 33, 3))
  init = jax.jit(functools.partial(model.init, train=False))
  variables = init(jax.random.key(0), images)

  @jax.jit
  def run(seed):
    return model.apply(
      variables,
      images,
      train=True,
      mutable=["batch_stats"],
      rngs={"dropout": jax.random.key(seed)},
    )[0].logits

  assert (run(0) == run(0)).all()
  assert (run(0) != run(1)).any()


def test_state_dict_round_trip_is_exact():
  model = DeepLab(3, backbone="resnet18", auxiliary=True)
  shapes = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0), jnp.zeros((1, 33, 33, 3)), train=False
    )
  )
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes
  )
  state = torch_weights.to_state_dict(variables)
  assert state["encoder.layer4.1.conv2.weight"].shape == (512, 512, 3, 3)
  assert "decoder.aspp.conv1.2.running_var" in state
  back = torch_weights.replace(shapes, state)
  jax.tree.map(np.testing.assert_array_equal, back, variables)


@pytest.fixture(scope="module")
def tiny_variables():
  model = DeepLab(3, backbone="tiny")
  return jax.jit(model.init, static_argnames="train")(
    jax.random.key(0), jnp.zeros((1, 33, 33, 3)), train=False
  )
