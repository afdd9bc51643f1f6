"""Weights of the published code: reading, converting, refusing."""

import builtins
import collections
import pathlib
import pickle
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from scripts import convert_weights
from tests.torch_network import random_network
from u2pl_jax.models import torch_weights
from u2pl_jax.models.deeplab import DeepLab
from u2pl_jax.models.pretrained import (
  check_pretrained,
  load_pretrained,
  read_pretrained,
)
from u2pl_jax.models.weight_files import WeightsError, read_weights

ROOT = pathlib.Path(__file__).resolve().parent.parent


def refused(source, destination, *flags):
  """The message of a conversion that must leave the destination alone."""
  before = destination.read_bytes() if destination.is_file() else None
  siblings = set(destination.absolute().parent.iterdir())
  with pytest.raises(SystemExit) as error:
    convert_weights.main([str(source), str(destination), *flags])
  assert error.value.code == 1
  after = destination.read_bytes() if destination.is_file() else None
  assert after == before
  assert set(destination.absolute().parent.iterdir()) == siblings
  return error.value


@pytest.fixture
def message(capsys):
  """The one line on standard error."""

  def read():
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]

  return read


def tiny_model(**kwargs):
  return DeepLab(3, backbone="tiny", **kwargs)


@pytest.fixture(scope="module")
def tiny_variables():
  return jax.jit(tiny_model().init, static_argnames="train")(
    jax.random.key(0), jnp.zeros((1, 33, 33, 3)), train=False
  )


def torch_state(variables, *, shift=0.0, encoder_only=False, prefix=""):
  """A state dict as torch has it, counters of batches included."""
  state = {}
  for name, value in torch_weights.to_state_dict(variables).items():
    if encoder_only:
      if not name.startswith("encoder."):
        continue
      name = name.removeprefix("encoder.")
    state[prefix + name] = torch.from_numpy(np.array(value + shift))
    if name.endswith("running_var"):
      counter = name.replace("running_var", "num_batches_tracked")
      state[prefix + counter] = torch.tensor(7)
  return state


# -- The same network ----------------------------------------------------------


@pytest.mark.parametrize(
  ("backbone", "stem"),
  [
    ("resnet50", "conv7"),
    ("resnet101", "deep"),
    pytest.param("resnet50", "deep", marks=pytest.mark.slow),
    pytest.param("resnet101", "conv7", marks=pytest.mark.slow),
  ],
)
def test_converted_weights_give_the_same_outputs(tmp_path, backbone, stem):
  """Through the command, against an independent network in torch."""
  network = random_network(backbone, stem, num_classes=5)
  source, destination = tmp_path / "in.pth", tmp_path / "out.npz"
  torch.save(network.state_dict(), source)
  convert_weights.main([str(source), str(destination)])
  pretrained = read_pretrained(destination)
  assert (pretrained.description.backbone, pretrained.description.stem) == (
    backbone,
    stem,
  )
  model = DeepLab(5, backbone=backbone, stem=stem, auxiliary=True)
  check_pretrained(pretrained, model)
  abstract = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0), jnp.zeros((1, 65, 65, 3)), train=False
    )
  )
  assert set(pretrained.tensors) == set(torch_weights.shapes(abstract))
  variables, _ = load_pretrained(abstract, pretrained)

  images = np.random.default_rng(0).standard_normal((2, 65, 97, 3))
  images = images.astype(np.float32)
  with torch.no_grad():
    theirs = network(torch.from_numpy(images.transpose(0, 3, 1, 2)))
  ours = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
  for a, b in zip(ours, theirs, strict=True):
    b = b.numpy().transpose(0, 2, 3, 1)
    assert np.abs(b).max() > 0.1
    assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resnet101_in_memory(tmp_path):
  """Under 3 times the file, libraries included."""
  network = random_network("resnet101", "conv7", num_classes=21)
  source = tmp_path / "resnet101.pth"
  torch.save(network.encoder.state_dict(), source)
  # Not getrusage, which counts what this process had before the fork.
  program = (
    "import re, sys; from scripts import convert_weights;"
    "convert_weights.main(sys.argv[1:]);"
    "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
  )
  result = subprocess.run(
    [sys.executable, "-c", program, str(source), str(tmp_path / "out.npz")],
    cwd=ROOT,
    check=True,
    capture_output=True,
    text=True,
  )
  peak = int(result.stdout.split()[-1]) * 1024
  assert peak < 3 * source.stat().st_size


# -- Kinds of files ------------------------------------------------------------


def saved(path, content, **kwargs):
  torch.save(content, path, **kwargs)
  return path


def assert_equal_states(ours, theirs):
  assert set(ours) == set(theirs)
  for name, value in theirs.items():
    assert ours[name].dtype == value.dtype, name
    assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("encoder_only", [True, False])
def test_round_trip_is_exact(tmp_path, tiny_variables, encoder_only):
  state = torch_state(tiny_variables, encoder_only=encoder_only)
  classifier = {"fc.weight": torch.zeros(10, 128), "fc.bias": torch.zeros(10)}
  source = saved(
    tmp_path / "a.pth", state | (classifier if encoder_only else {})
  )
  middle, back = tmp_path / "b.npz", tmp_path / "c.pth"
  convert_weights.main([str(source), str(middle)])
  convert_weights.main([str(middle), str(back), "--to-torch"])
  assert_equal_states(torch.load(back, weights_only=True), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_round_trip_keeps_types(tmp_path, tiny_variables, dtype):
  state = {
    name: value.to(dtype) if value.is_floating_point() else value
    for name, value in torch_state(tiny_variables).items()
  }
  source = saved(tmp_path / "a.pth", state)
  middle, back = tmp_path / "b.npz", tmp_path / "c.pth"
  convert_weights.main([str(source), str(middle)])
  convert_weights.main([str(middle), str(back), "--to-torch"])
  assert_equal_states(torch.load(back, weights_only=True), state)


def test_bfloat16_becomes_float32(tmp_path, tiny_variables):
  state = torch_state(tiny_variables)
  state["encoder.bn1.bias"] = torch.full((32,), 1.5, dtype=torch.bfloat16)
  file = read_weights(saved(tmp_path / "a.pth", state))
  bias = file.tensors["encoder.bn1.bias"]
  assert bias.dtype == np.float32
  np.testing.assert_array_equal(bias, 1.5)


def test_published_checkpoint(tmp_path, tiny_variables, capsys):
  """Both networks, 'module.' before every name, numpy scalars, optimiser."""
  checkpoint = {
    "epoch": 12,
    "best_miou": np.float64(0.71),
    "best_step": np.int64(3),
    "optimizer_state": {"state": {0: {"momentum_buffer": torch.ones(2)}}},
    "model_state": collections.OrderedDict(
      torch_state(tiny_variables, shift=1.0, prefix="module.")
    ),
    "teacher_state": torch_state(tiny_variables, shift=2.0, prefix="module."),
  }
  source = saved(tmp_path / "ckpt_best.pth", checkpoint)
  name = "encoder.layer1.0.conv1.weight"
  original = torch_weights.to_state_dict(tiny_variables)[name]
  for flags, shift, label in (
    ([], 2.0, "teacher (teacher_state)"),
    (["--network=student"], 1.0, "student (model_state)"),
  ):
    destination = tmp_path / "out.npz"
    convert_weights.main([str(source), str(destination), "--force", *flags])
    with np.load(destination) as archive:
      np.testing.assert_array_equal(archive[name], original + np.float32(shift))
    printed = capsys.readouterr().out
    assert f"network: {label}" in printed
    assert "best_miou" in printed and "optimizer_state" in printed
    assert "tiny, deep stem, deeplabv3plus, 3 classes" in printed
    assert " 0 missing, 0 of wrong shape, 0 unfit otherwise" in printed


@pytest.mark.parametrize("key", ["state_dict", "model"])
@pytest.mark.parametrize("legacy", [False, True])
def test_other_wrappers_and_legacy_files(tmp_path, tiny_variables, key, legacy):
  state = torch_state(tiny_variables, encoder_only=True, prefix="module.")
  source = saved(
    tmp_path / "a.pth",
    {key: state, "best_miou": np.float32(0.5), "lr": 0.1},
    _use_new_zipfile_serialization=not legacy,
  )
  file = read_weights(source)
  assert file.network == key
  assert file.others == ("best_miou", "lr")
  match = torch_weights.match(file.tensors)
  assert not match.problems
  assert match.description == torch_weights.Description("tiny", "deep")


def test_scalars_of_older_numpy(tmp_path, tiny_variables):
  """Files of numpy 1 name numpy.core, which numpy 2 has moved."""
  state = torch_state(tiny_variables, encoder_only=True)
  source = saved(
    tmp_path / "a.pth",
    {"model_state": state, "best_miou": np.float64(0.7)},
    _use_new_zipfile_serialization=False,
  )
  content = source.read_bytes()
  assert content.count(b"numpy._core.multiarray") == 1
  source.write_bytes(
    content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
  )
  assert read_weights(source).network == "student (model_state)"


@pytest.mark.parametrize("stem", ["deep", "conv7"])
@pytest.mark.parametrize("backbone", ["tiny", "resnet18", "resnet50"])
@pytest.mark.parametrize("head", ["deeplabv3plus", "deeplabv3"])
def test_finds_the_network(backbone, stem, head):
  model = DeepLab(7, backbone=backbone, stem=stem, head=head, auxiliary=True)
  abstract = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0), jnp.zeros((1, 65, 65, 3)), train=False
    )
  )
  state = {
    name: np.zeros(shape, np.float32)
    for name, shape in torch_weights.shapes(abstract).items()
  }
  match = torch_weights.match(state)
  assert match.description == torch_weights.Description(
    backbone, stem, head, 7, True
  )
  assert set(match.matched) == set(state) and not match.problems


# -- Safety --------------------------------------------------------------------


class Touch:
  """Unpickling it would create a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (open, (self.path, "w"))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(
  tmp_path, tiny_variables, message, form
):
  proof = tmp_path / "proof"
  content = {
    "model_state": torch_state(tiny_variables),
    "best_miou": Touch(str(proof)),
  }
  source = tmp_path / "a.pth"
  if form == "pickle":
    source.write_bytes(pickle.dumps({"best_miou": Touch(str(proof))}))
  else:
    saved(source, content, _use_new_zipfile_serialization=form == "zip")
  refused(source, tmp_path / "out.npz")
  text = message()
  assert str(source) in text
  if form != "pickle":  # Which no torch.save writes.
    assert "refused" in text and "open" in text
  assert not proof.exists()
  # The file does what it was made for when it is read without care.
  loader = (
    pickle.loads(source.read_bytes())
    if form == "pickle"
    else torch.load(source, weights_only=False)
  )
  assert loader and proof.exists()


def test_pickled_object_in_npz_is_refused(tmp_path, message):
  source = tmp_path / "a.npz"
  np.savez(source, a=np.asarray([Touch(str(tmp_path / "proof"))], object))
  refused(source, tmp_path / "out.pth", "--to-torch")
  assert "not a readable .npz" in message()
  assert not (tmp_path / "proof").exists()


# -- Bad input -----------------------------------------------------------------


@pytest.fixture
def good(tmp_path, tiny_variables):
  return saved(tmp_path / "good.pth", torch_state(tiny_variables))


def changed(state, **changes):
  state = dict(state)
  for name, value in changes.items():
    name = name.replace("__", ".")
    if value is None:
      del state[name]
    else:
      state[name] = value
  return state


BAD = {
  "missing": (lambda s: changed(s, encoder__bn1__bias=None),
    "encoder.bn1.bias is missing"),
  "shape": (lambda s: changed(s, encoder__bn1__weight=torch.ones(33)),
    "encoder.bn1.weight has shape (33,), expected (32,)"),
  "nan": (
    lambda s: changed(s, encoder__bn1__bias=torch.full((32,), float("nan"))),
    "encoder.bn1.bias holds values that are not finite"),
  "integers": (
    lambda s: changed(s, encoder__bn1__bias=torch.ones(32, dtype=torch.int32)),
    "encoder.bn1.bias is of type int32"),
  "extra": (lambda s: changed(s, encoder__bn7__bias=torch.ones(3)),
    "encoder.bn7.bias belongs to no layer"),
  "half": (lambda s: dict(list(s.items())[::2]), "is missing"),
  "vgg": (
    lambda s: {"features.0.weight": torch.ones(64, 3, 3, 3)},
    "no ResNet in it: there is no layer1.0.*, the first names are"
    " features.0.weight"),
  "headless": (
    lambda s: changed(
      s,
      decoder__classifier__8__weight=None,
      decoder__classifier__8__bias=None),
    "heads without a last layer"),
  "two encoders": (
    lambda s: s | {"bn1.bias": torch.ones(32)},
    "encoder.bn1.bias is there with and without 'encoder.'"),
  "scalar": (
    lambda s: changed(s, decoder__classifier__8__weight=torch.tensor(1.0)),
    "decoder.classifier.8.bias has shape (3,), expected (1,)"),
  "no state": (lambda s: {"epoch": 3}, "no state dict in it, only ['epoch']"),
  "a list": (lambda s: [torch.ones(3)], "holds a list, not a state dict"),
  "twice": (
    lambda s: s | {"module.encoder.bn1.bias": torch.ones(32)},
    "encoder.bn1.bias is there with and without 'module.'"),
}  # fmt: skip


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("kind", BAD)
def test_unfit_content(tmp_path, tiny_variables, message, kind, existing):
  change, expected = BAD[kind]
  source = saved(tmp_path / "bad.pth", change(torch_state(tiny_variables)))
  destination = tmp_path / "out.npz"
  flags = []
  if existing:
    destination.write_bytes(b"what was there")
    flags = ["--force"]
  refused(source, destination, *flags)
  text = message()
  assert text.startswith(f"error: {source}: ")
  assert expected in text


def test_damaged_files(tmp_path, good, message):
  destination = tmp_path / "out.npz"
  content = good.read_bytes()
  for name, data in {
    "cut.pth": content[: len(content) // 2],
    "text.pth": b"<html>404 not found</html>\n" * 40,
    "hello.pth": b"hello",
    "gate.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:1",
  }.items():
    path = tmp_path / name
    path.write_bytes(data)
    refused(path, destination)
    assert f"{path}: not a file of torch.save, or damaged" in message()
  legacy = tmp_path / "legacy.pth"
  saved(legacy, torch.load(good), _use_new_zipfile_serialization=False)
  cut = tmp_path / "legacy_cut.pth"
  cut.write_bytes(legacy.read_bytes()[:-1000])
  refused(cut, destination)
  assert f"{cut}: not a file of torch.save, or damaged" in message()


def test_paths_that_cannot_be(tmp_path, good, message, monkeypatch):
  destination = tmp_path / "out.npz"
  empty = tmp_path / "empty.pth"
  empty.touch()
  for source, text in (
    (tmp_path / "none.pth", "there is no such file"),
    (tmp_path, "is a directory"),
    (empty, "the file is empty"),
  ):
    refused(source, destination)
    assert message() == f"error: {source}: {text}" + (
      ", not a file of weights" if source == tmp_path else ""
    )
  for target, text in (
    (tmp_path / "out.pth", "must end in .npz without --to-torch"),
    (tmp_path / "no" / "out.npz", "its folder does not exist"),
  ):
    with pytest.raises(SystemExit):
      convert_weights.main([str(good), str(target)])
    assert text in message()
  (tmp_path / "dir.npz").mkdir()
  refused(good, tmp_path / "dir.npz", "--force")
  assert "is a directory" in message()

  real_open = builtins.open

  def denied(path, *args, **kwargs):
    if path == good:
      raise PermissionError(13, "Permission denied", str(path))
    return real_open(path, *args, **kwargs)

  monkeypatch.setattr(builtins, "open", denied)
  refused(good, destination)
  assert message() == f"error: {good}: cannot be read: Permission denied"


def test_existing_destination_needs_force(tmp_path, good, message):
  destination = tmp_path / "out.npz"
  destination.write_bytes(b"what was there")
  refused(good, destination)
  assert message() == (
    f"error: {destination}: exists: add --force to replace it"
  )
  convert_weights.main([str(good), str(destination), "--force"])
  assert read_pretrained(destination).description.backbone == "tiny"


@pytest.mark.parametrize("to_torch", [False, True])
def test_full_disk(tmp_path, good, message, to_torch):
  """A limit on the size of files stands for the disk."""
  source, destination, flags = good, tmp_path / "out.npz", []
  if to_torch:
    source = tmp_path / "good.npz"
    convert_weights.main([str(good), str(source)])
    destination, flags = tmp_path / "out.pth", ["--to-torch", "--force"]
    destination.write_bytes(b"what was there")
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
  try:
    refused(source, destination, *flags)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  text = message()
  assert f"{destination}: could not be written" in text
  assert "disk full" in text if to_torch else "File too large" in text


def test_wrong_network_of_a_file(tmp_path, good, tiny_variables, message):
  destination = tmp_path / "out.npz"
  refused(good, destination, "--network=student")
  assert "holds one network, no student beside it" in message()
  source = saved(
    tmp_path / "s.pth", {"model_state": torch_state(tiny_variables)}
  )
  refused(source, destination, "--network=teacher")
  assert "has no teacher, only student" in message()


def test_without_torch(tmp_path, good, message, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  refused(good, tmp_path / "out.npz")
  assert "pip install torch==2.13.0" in message()


# -- As initial weights --------------------------------------------------------


def equal_trees(a, b):
  return all(
    jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))
  )


def parts(variables, name):
  return {c: variables[c][name] for c in ("params", "batch_stats")}


def test_encoder_alone_is_loaded(tmp_path, tiny_variables):
  state = torch_state(tiny_variables, shift=1.0, encoder_only=True)
  state["fc.weight"] = torch.zeros(10, 10)
  pretrained = read_pretrained(saved(tmp_path / "a.pth", state))
  check_pretrained(pretrained, tiny_model())
  loaded, report = load_pretrained(tiny_variables, pretrained)
  expected = jax.tree.map(
    lambda x: x + np.float32(1), parts(tiny_variables, "encoder")
  )
  assert equal_trees(parts(loaded, "encoder"), expected)
  assert equal_trees(parts(loaded, "decoder"), parts(tiny_variables, "decoder"))
  assert "encoder.* loaded" in report[1]
  assert "decoder.* starts from random weights: the file has none" in report[2]


def test_heads_of_other_classes(tmp_path, tiny_variables):
  """All but the last layer is loaded."""
  other = jax.jit(
    DeepLab(5, backbone="tiny", auxiliary=True).init, static_argnames="train"
  )(jax.random.key(1), jnp.zeros((1, 33, 33, 3)), train=False)
  pretrained = read_pretrained(saved(tmp_path / "a.pth", torch_state(other)))
  loaded, report = load_pretrained(tiny_variables, pretrained)
  assert equal_trees(parts(loaded, "encoder"), parts(other, "encoder"))
  ours, theirs, old = (
    v["params"]["decoder"] for v in (loaded, other, tiny_variables)
  )
  for name in ours:
    source = old if name == "classifier_8" else theirs
    assert equal_trees(ours[name], source[name]), name
  text = " ".join(report)
  assert "decoder.classifier.8.bias, decoder.classifier.8.weight" in text
  assert "auxor.* not used, the network has none" in text


def test_heads_of_another_width_stay_random(tmp_path, tiny_variables):
  other = jax.jit(tiny_model(rep_features=32).init, static_argnames="train")(
    jax.random.key(1), jnp.zeros((1, 33, 33, 3)), train=False
  )
  pretrained = read_pretrained(saved(tmp_path / "a.pth", torch_state(other)))
  loaded, report = load_pretrained(tiny_variables, pretrained)
  assert equal_trees(parts(loaded, "encoder"), parts(other, "encoder"))
  assert equal_trees(parts(loaded, "decoder"), parts(tiny_variables, "decoder"))
  assert "decoder.representation.8.bias is of another shape" in report[2]


@pytest.mark.parametrize(
  ("model", "key"),
  [
    (DeepLab(3, backbone="resnet18"), "--config.model.backbone=tiny"),
    (DeepLab(3, backbone="tiny", stem="conv7"), "--config.model.stem=deep"),
  ],
)
def test_weights_of_another_encoder(tmp_path, tiny_variables, model, key):
  pretrained = read_pretrained(
    saved(tmp_path / "a.pth", torch_state(tiny_variables))
  )
  with pytest.raises(WeightsError, match=key):
    check_pretrained(pretrained, model)
