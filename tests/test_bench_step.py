"""scripts/bench_*.py: what they time is the step, on a small one."""

import dataclasses
import functools
import pathlib
import shutil
import subprocess
import sys

import bench_step
import bench_vs_torch
import bench_workload as workload
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import testing
from u2pl_jax import build, halves, roofline

_SCRIPTS = pathlib.Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def case():
  config = testing.get_config()
  config.schedule.warmup_epochs = 0
  config.contrastive.anchor_min_probability = 0.0
  return workload.Case("testing", config, 6)


@pytest.fixture(scope="module")
def program(case):
  return workload.build(case)


@pytest.mark.slow
def test_what_is_timed_outside_the_network_is_the_step(case, program):
  batches = workload.random_batches(case, np.random.default_rng(0))
  state = program.create_state()
  other = jax.tree.map(lambda x: x * 1.5 + 0.1, state.student.params)
  state = state.replace(
    step=jnp.asarray(1, jnp.int32),
    student=state.student.replace(params=other),
    memory_bank=workload.full(state.memory_bank),
  )
  _, step = build.step_functions(
    case.config,
    model=program.model,
    tx=program.tx,
    recipe=program.recipe,
    trace=True,
  )
  _, metrics = jax.jit(step)(state, *batches)
  trace = metrics["trace"]

  def in_batch(outputs):
    num_l = case.config.batch.labelled
    return {
      "logits": halves.interleave(*jnp.split(outputs.logits, [num_l])),
      "reps": halves.interleave(*jnp.split(outputs.reps, [num_l])),
    }

  images_u = (batches[1]["image"] - np.asarray(program.recipe.mean)) / (
    np.asarray(program.recipe.std)
  )
  forward = jax.jit(functools.partial(program.model.apply, train=False))
  clean = forward(
    state.teacher.for_apply(), jnp.asarray(images_u, jnp.float32)
  ).logits
  tables = [
    in_batch(trace[which]) | {"clean_logits": clean}
    for which in ("student", "teacher")
  ]
  run, tables_state = workload.outside_network(case, program, *tables)
  after, timed = run(tables_state, *batches)
  for name in ("sup_loss", "unsup_loss", "contra_loss", "kept_share"):
    np.testing.assert_allclose(timed[name], metrics[name], rtol=1e-5)
    assert float(timed[name]) > 0
  np.testing.assert_array_equal(
    timed["keys_enqueued"], metrics["keys_enqueued"]
  )
  # The gradients of all outputs are computed, and they are not zero.
  grads = after.opt_state
  assert float(jnp.abs(grads["logits"]).max()) > 0
  assert float(jnp.abs(grads["reps"]).max()) > 0
  np.testing.assert_allclose(
    np.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(grads))),
    timed["grad_norm"],
    rtol=1e-5,
  )


def test_random_outputs_have_the_shapes_of_the_network(case, program):
  outputs = workload.random_outputs(case, np.random.default_rng(0))
  assert {name: x.shape for name, x in outputs.items()} == {
    "logits": (8, 9, 9, 6),
    "clean_logits": (4, 9, 9, 6),
    "reps": (8, 9, 9, 16),
  }
  # A class of each pixel stands out: anchors at the published bound.
  probs = np.asarray(jax.nn.softmax(outputs["logits"]))
  assert (probs.max(-1) > 0.3).mean() > 0.9


def test_presets():
  voc, city = (workload.cases(name)[0] for name in ("voc", "cityscapes"))
  assert voc.name == (
    "voc: resnet101, bfloat16, 16+16 images of 513x513, 21 classes"
  )
  assert city.name == (
    "cityscapes: resnet101, bfloat16, 16+16 images of 769x769, 19 classes"
  )
  assert city.config.supervised.loss == "ohem"
  assert city.config.supervised.aux_weight == 0.4
  # 80 epochs of 9118 images, one supervised, and 200 of 2231, 20 supervised.
  assert voc.steps == (570, 79 * 570)
  assert city.steps == (20 * 139, 180 * 139)
  mid = workload.cases("cpu-mid")
  assert all(x.steps is None for x in mid)
  assert [x.crop for x in mid] == [(129, 129), (257, 257)]
  small = workload.cases("voc", batch=8, microbatches=4, remat=True)[0]
  assert "8+8 images of 513x513 in 4 micro-batches, remat" in small.name


def test_hours_of_a_schedule():
  def row(ms):
    timing = workload.Timing(ms=ms, compile_s=0.0, peak_bytes=0)
    return bench_step.Row(timing, flops=1.0, floor_ms=1.0)

  rows = {"supervised step": row(3600.0), "semi-supervised step": row(7200.0)}
  assert bench_step.projected_hours((1000, 500), rows) == pytest.approx(2.0)
  voc = dataclasses.replace(workload.cases("voc")[0], steps=(1000, 500))
  device = roofline.Device("x", {"bfloat16": 1.0}, 1.0, "made up", 1.0, 1.0)
  text = bench_step.table(voc, device, 1, rows)
  (line,) = (x for x in text.splitlines() if "schedule" in x)
  assert line.startswith("the schedule of 1000 supervised and 500 other steps:")
  assert line.endswith(" 2.0 h without evaluations") and len(line) <= 80


@pytest.mark.slow
def test_the_table_of_a_step(case):
  device = workload.measured_device("float32")
  assert device.rate("float32") > 1e9 and device.byte_rate > 1e8
  rows = bench_step.measure(case, device, 2)
  assert list(rows) == [
    "teacher, clean images",
    "teacher, strong view",
    "student, both ways",
    "optimiser and average",
    "outside the network",
    "supervised step",
    "semi-supervised step",
  ]
  step = rows["semi-supervised step"]
  parts = [row for name, row in rows.items() if not name.endswith("step")]
  assert step.flops == sum(row.flops for row in parts)
  assert step.floor_ms == pytest.approx(sum(row.floor_ms for row in parts))
  # The least of so small a step is next to nothing.
  assert all(row.timing.ms > 0 and row.floor_ms > 0 for row in rows.values())
  peaks = [rows[name].timing.peak_bytes for name in list(rows)[-2:]]
  assert peaks[1] > peaks[0] > 0
  text = bench_step.table(case, device, 2, rows)
  assert all(len(line) <= 80 for line in text.splitlines()[2:])
  assert f"{8e3 / step.timing.ms:.2f} images/s" in text


# The interface of the published files, which are not in this repository.
_TRAIN_SEMI = """
import tensorboardX
import torch
from u2pl.utils import utils


class ModelBuilder(torch.nn.Module):
  def __init__(self, config):
    super().__init__()
    assert config["encoder"]["type"] == "u2pl.models.resnet.resnet50"
    self.encoder = torch.nn.Conv2d(3, 8, 3, 4, 1)
    self.decoder = torch.nn.Conv2d(8, config["num_classes"], 1)

  def forward(self, x):
    x = self.encoder(x)
    return {"pred": self.decoder(x), "rep": x.repeat(1, 32, 1, 1)}


def get_criterion(config):
  return torch.nn.CrossEntropyLoss(ignore_index=255)


def get_optimizer(groups, config):
  return torch.optim.SGD(groups, **config["kwargs"])


def get_scheduler(config, steps, optimizer):
  return steps


def train(model, teacher, optimizer, scheduler, criterion, loader_l, loader_u,
          epoch, writer, logger, memobank, pointers, sizes):
  assert epoch > cfg["trainer"]["sup_only_epoch"] and dist.get_world_size() == 1
  assert [len(queue[0]) for queue in memobank] == sizes
  model.train()
  for _ in range(len(loader_l)):
    image_l, label_l = iter(loader_l).next()
    image_u, _ = iter(loader_u).next()
    teacher.eval()
    assert len(teacher(image_u.cuda())["pred"]) == len(image_u)
    out = model(torch.cat([image_l, image_u]).cuda())
    pred = torch.nn.functional.interpolate(
      out["pred"][: len(image_l)], label_l.shape[1:]
    )
    loss = criterion(pred, label_l) + 0 * out["rep"].sum()
    dist.all_reduce(loss)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert utils.gathered(loss) == [loss]
"""
_UTILS = """
import torch.distributed as dist


def gathered(x):
  result = [None]
  dist.all_gather_object(result, x)
  return result
"""


@pytest.mark.parametrize(
  "opponent",
  [
    "eager",
    pytest.param(
      "strong",
      marks=[
        pytest.mark.slow,
        pytest.mark.skipif(
          shutil.which("g++") is None, reason="torch.compile needs g++"
        ),
      ],
    ),
  ],
)
def test_versus_torch_runs_what_it_is_given(tmp_path, opponent):
  (tmp_path / "u2pl" / "utils").mkdir(parents=True)
  (tmp_path / "train_semi.py").write_text(_TRAIN_SEMI)
  (tmp_path / "u2pl" / "utils" / "utils.py").write_text(_UTILS)
  case = workload.cases("cpu-mid", sizes=(33,))[0]
  case.config.memory_bank.capacity = 4
  case.config.memory_bank.capacity_class0 = 5
  job = bench_vs_torch.job(case, opponent, tmp_path, 2)
  assert job.capacities == (5, *(4,) * 20)
  result = bench_vs_torch.alone(bench_vs_torch.run_published, job)
  assert set(result) == {*bench_vs_torch.ROWS, "info"}
  assert all(result[name] > 0 for name in bench_vs_torch.ROWS)
  assert "tensorboardX" in result["info"]


def run(*args):
  return subprocess.run(
    [sys.executable, str(_SCRIPTS / "bench_vs_torch.py"), *args],
    capture_output=True,
    text=True,
    timeout=600,
  )


def test_versus_torch_without_a_checkout():
  result = run("--upstream=/nowhere")
  assert result.returncode == 1
  assert result.stderr == (
    "error: --upstream=/nowhere: there is no train_semi.py in it\n"
  )
