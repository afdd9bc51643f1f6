"""Times this step beside that of the published PyTorch code, in one run.

  python scripts/bench_vs_torch.py --upstream=../U2PL --size=257
  python scripts/bench_vs_torch.py --upstream=../U2PL --preset=voc \
    --opponent=strong --json=versus.json

--upstream is your own checkout of the published repository; its `train()` runs
as it is, on the same device and shapes: random images and labels, full queues,
initial weights of the same network. What it gets is in its favour: a single
process without DistributedDataParallel, collectives that cost nothing, images
that lie on the device already. Opponents:

  eager   as published, in float32; on a GPU with TF32 and cuDNN's search for
          the fastest algorithm
  strong  the network in bfloat16 (autocast), channels_last, torch.compile

"losses" is `train()` again with the outputs of the networks given, as in
scripts/bench_losses.py. Needs torch, and of the packages that the published
code imports none beyond: stand-ins take the place of what is missing, and raise
an error if anything uses them.
"""

import bench_workload as workload  # isort: skip

import concurrent.futures
import dataclasses
import importlib
import importlib.util
import multiprocessing
import os
import pathlib
import statistics
import sys
import time
import types

import numpy as np

from input_pipeline.command_line import fail, write_json
from input_pipeline.parallel import progress
from u2pl_jax.xla_flags import set_xla_flags

# Here, and in `bench_workload.timings`.
ROWS = {
  "step": "semi-supervised step",
  "losses": "outside the network",
  "teacher, clean images": "teacher, clean images",
  "teacher, strong view": "teacher, strong view",
  "student, both ways": "student, both ways",
}

# What the published files import and no timed line uses.
_UNUSED = (
  "cv2",
  "einops",
  "skimage",
  "skimage.measure",
  "tensorboardX",
  "torchvision",
  "torchvision.transforms",
  "yaml",
)


@dataclasses.dataclass(frozen=True)
class Job:
  """What a process with the published code needs to know; plain data."""

  upstream: str
  opponent: str
  repeats: int
  backbone: str
  num_classes: int
  crop: tuple[int, int]
  num_l: int
  num_u: int
  ohem: bool
  ohem_threshold: float
  ohem_min_kept: int
  aux_weight: float
  capacities: tuple[int, ...]
  learning_rate: float
  momentum: float
  weight_decay: float
  head_multiplier: float


def job(case, opponent, upstream, repeats):
  """The published settings of a case."""
  from u2pl_jax.build import base_learning_rate
  from u2pl_jax.config_checks import bank_capacities

  config = case.config
  return Job(
    upstream=os.path.abspath(upstream),
    opponent=opponent,
    repeats=repeats,
    backbone=config.model.backbone,
    num_classes=case.num_classes,
    crop=case.crop,
    num_l=config.batch.labelled,
    num_u=config.batch.unlabelled,
    ohem=config.supervised.loss == "ohem",
    ohem_threshold=config.supervised.ohem_threshold,
    ohem_min_kept=config.supervised.ohem_min_kept,
    aux_weight=config.supervised.aux_weight,
    capacities=tuple(bank_capacities(config, case.num_classes)),
    learning_rate=base_learning_rate(config),
    momentum=config.optimizer.momentum,
    weight_decay=config.optimizer.weight_decay,
    head_multiplier=config.optimizer.head_multiplier,
  )


def published_config(job):
  """The config dictionary that the published functions read."""
  network = "u2pl.models"
  config = {
    "dataset": {"n_sup": 0, "ignore_label": 255, "type": "random"},
    "trainer": {
      "epochs": 80,
      # The teacher has been handed over; the parameters are no aliases.
      "sup_only_epoch": 0,
      "optimizer": {
        "type": "SGD",
        "kwargs": {
          "lr": job.learning_rate,
          "momentum": job.momentum,
          "weight_decay": job.weight_decay,
        },
      },
      "lr_scheduler": {"mode": "poly", "kwargs": {"power": 0.9}},
      "unsupervised": {"drop_percent": 80, "apply_aug": "cutmix"},
      "contrastive": {
        "negative_high_entropy": True,
        "low_rank": 3,
        "high_rank": 20,
        # As in bench_workload.cases: so that initial weights give anchors.
        "current_class_threshold": 0.0,
        "current_class_negative_threshold": 1,
        "low_entropy_threshold": 20,
        "num_negatives": 50,
        "num_queries": 256,
        "temperature": 0.5,
      },
    },
    "criterion": {"type": "CELoss", "kwargs": {"use_weight": False}},
    "net": {
      "num_classes": job.num_classes,
      "sync_bn": False,
      "ema_decay": 0.99,
      "encoder": {
        "type": f"{network}.resnet.{job.backbone}",
        "kwargs": {
          "pretrained": False,
          "multi_grid": True,
          "zero_init_residual": True,
          "fpn": True,
          "replace_stride_with_dilation": [False, True, True],
        },
      },
      "decoder": {
        "type": f"{network}.decoder.dec_deeplabv3_plus",
        "kwargs": {"inner_planes": 256, "dilations": [12, 24, 36]},
      },
    },
  }
  if job.ohem:
    config["criterion"] = {
      "type": "ohem",
      "kwargs": {
        "thresh": job.ohem_threshold,
        "min_kept": job.ohem_min_kept,
      },
    }
  if job.aux_weight:
    config["net"]["aux_loss"] = {
      "aux_plane": 1024,
      "loss_weight": job.aux_weight,
    }
  return config


class _Unused(types.ModuleType):
  """Stands for a package that is not installed."""

  def __getattr__(self, name):
    if name.startswith("__"):
      raise AttributeError(name)

    def use(*_, **__):
      raise ImportError(f"install {self.__name__}: its {name} is needed")

    return use


def import_published(upstream):
  """(train_semi, names of the stand-ins); patches what one process lacks."""
  missing = [
    name
    for name in _UNUSED
    if importlib.util.find_spec(name.partition(".")[0]) is None
  ]
  for name in missing:
    sys.modules[name] = _Unused(name)
  sys.path.insert(0, upstream)
  train_semi = importlib.import_module("train_semi")
  utils = importlib.import_module("u2pl.utils.utils")

  def gather(output, data):
    output[0] = data

  one_process = types.SimpleNamespace(
    get_rank=lambda: 0,
    get_world_size=lambda: 1,
    barrier=lambda: None,
    all_reduce=lambda x: None,
    all_gather_object=gather,
  )
  train_semi.dist = utils.dist = one_process
  return train_semi, [name for name in missing if "." not in name]


def run_ours(case, repeats):
  """{name: ms} of `bench_workload.timings`; for a process of its own."""
  set_xla_flags()
  timings = workload.timings(case, repeats)
  return {name: timing.ms for name, timing in timings.items()}


def run_published(job):
  """Times the published code; for a process of its own.

  Returns:
    Milliseconds of each of `ROWS`, and "info", a line about what ran.
  """
  import torch

  train_semi, missing = import_published(job.upstream)
  device = "cuda" if torch.cuda.is_available() else "cpu"
  if device == "cpu":
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self
  torch.backends.cudnn.benchmark = True
  torch.set_float32_matmul_precision("high")
  torch.manual_seed(0)
  np.random.seed(0)
  train_semi.cfg = published_config(job)
  published = Published(job, train_semi, device)
  result = published.time_network()
  result |= published.time_losses()
  name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
  result["info"] = (
    f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads"
    + (f"; stand-ins for {', '.join(missing)}" if missing else "")
  )
  return result


def synchronised():
  """The time when the device has done what it was told."""
  import torch

  if torch.cuda.is_available():
    torch.cuda.synchronize()
  return time.perf_counter()


class Loader:
  """Gives the same batch for ever; says when it is asked for one."""

  sampler = types.SimpleNamespace(set_epoch=lambda epoch: None)

  def __init__(self, batch, length, asked=lambda: None):
    self.batch, self.length, self.asked = batch, length, asked

  def __len__(self):
    return self.length

  def __iter__(self):
    return self

  def next(self):
    """As the iterators of old versions of torch have it."""
    self.asked()
    return self.batch

  __next__ = next


def strong_network(network, device):
  """In bfloat16, channels_last and compiled; outputs in float32."""
  import torch

  # Half a dozen programs: two sizes, training or not, with gradients or not,
  # and the averages of the teacher have other strides than its first weights.
  # Beyond the limit torch would go on without compiling.
  torch._dynamo.config.recompile_limit = 32
  torch._dynamo.config.fail_on_recompile_limit_hit = True

  class Strong(torch.nn.Module):
    def __init__(self):
      super().__init__()
      # A program for each size: one for both would be slower.
      self.network = torch.compile(
        network.to(memory_format=torch.channels_last), dynamic=False
      )

    def forward(self, images):
      with torch.autocast(device, torch.bfloat16):
        images = images.contiguous(memory_format=torch.channels_last)
        outputs = self.network(images)
      return {name: x.float() for name, x in outputs.items()}

  return Strong()


def table_network(outputs, clean):
  """Its outputs are its parameters: train() without the network."""
  import torch

  class Tables(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.outputs = torch.nn.ParameterDict(outputs)

    def forward(self, images):
      del images
      # Only the pass over clean images runs in the mode of evaluation.
      return dict(self.outputs) if self.training else {"pred": clean}

  return Tables()


class Published:
  """The published training, on random data."""

  # Steps that do not count: compilation, the choice of algorithms.
  WARMUP = 3

  def __init__(self, job, train_semi, device):
    import torch

    self.job, self.train_semi, self.device = job, train_semi, device
    self.images_l, self.images_u = (
      torch.randn(number, 3, *job.crop, device=device)
      for number in (job.num_l, job.num_u)
    )
    self.images = torch.cat([self.images_l, self.images_u])
    self.labels = self.blocks(job.num_l, job.crop)
    # Shapes of the outputs of the network: {name: tensor}.
    self.outputs = {}

  def blocks(self, number, size):
    """[b, *size] labels, of which the feature grid sees every class."""
    import torch

    coarse = torch.randint(self.job.num_classes, (number, 1, 16, 16)).float()
    large = torch.nn.functional.interpolate(coarse, size=size)
    return large[:, 0].long().to(self.device)

  def training_ms(self, name, student, teacher, groups):
    """{name: median of a step of the published train()}."""
    import torch

    train_semi, job = self.train_semi, self.job
    for parameter in teacher.parameters():
      parameter.requires_grad = False
    settings = train_semi.cfg["trainer"]
    optimizer = train_semi.get_optimizer(groups, settings["optimizer"])
    length = self.WARMUP + job.repeats
    times = []

    def asked():
      times.append(synchronised())
      # The first time no step is behind it.
      bar.update(min(len(times) - 1, 1))

    silent = types.SimpleNamespace(
      info=lambda *_: None, add_scalar=lambda *_: None
    )
    with progress(length, f"published {name}", "step") as bar:
      train_semi.train(
        student,
        teacher,
        optimizer,
        train_semi.get_scheduler(settings, length, optimizer),
        train_semi.get_criterion(train_semi.cfg),
        Loader((self.images_l, self.labels), length, asked),
        Loader((self.images_u, None), length),
        1,
        silent,
        silent,
        [[torch.randn(size, 256)] for size in job.capacities],
        [torch.zeros(1, dtype=torch.long) for _ in job.capacities],
        list(job.capacities),
      )
      bar.update()
    samples = np.diff([*times, synchronised()])
    return {name: 1e3 * statistics.median(samples[self.WARMUP :])}

  def median_ms(self, name, run):
    """{name: median of a phase}."""
    samples = []
    length = self.WARMUP + self.job.repeats
    with progress(length, f"published {name}", "run") as bar:
      for _ in range(length):
        begin = synchronised()
        run()
        samples.append(synchronised() - begin)
        bar.update()
    return {name: 1e3 * statistics.median(samples[self.WARMUP :])}

  def time_network(self):
    """Milliseconds of the whole step, and of the passes of the networks."""
    import torch

    job = self.job
    networks = [
      self.train_semi.ModelBuilder(self.train_semi.cfg["net"]).to(self.device)
      for _ in range(2)
    ]
    groups = [
      {
        "params": part.parameters(),
        "lr": job.learning_rate
        * (1 if name == "encoder" else job.head_multiplier),
      }
      for name, part in networks[0].named_children()
    ]
    if job.opponent == "strong":
      networks = [strong_network(x, self.device) for x in networks]
    student, teacher = networks
    result = self.training_ms("step", student, teacher, groups)

    @torch.no_grad()
    def clean():
      large = torch.nn.functional.interpolate(
        teacher(self.images_u)["pred"],
        job.crop,
        mode="bilinear",
        align_corners=True,
      )
      return large.max(1)

    @torch.no_grad()
    def strong_view():
      return teacher(self.images)

    def both_ways():
      student.zero_grad()
      sum(x.sum() for x in student(self.images).values()).backward()

    teacher.eval()
    result |= self.median_ms("teacher, clean images", clean)
    teacher.train()
    result |= self.median_ms("teacher, strong view", strong_view)
    student.train()
    result |= self.median_ms("student, both ways", both_ways)
    self.outputs = strong_view()
    return result

  def time_losses(self):
    """The same of train() with the outputs of the networks given."""
    import torch

    # As bench_workload.random_outputs: logits that tell the classes a little.
    def logits(number, size):
      labels = self.blocks(number, size)
      one_hot = torch.nn.functional.one_hot(labels, self.job.num_classes)
      one_hot = one_hot.permute(0, 3, 1, 2).float()
      return torch.randn_like(one_hot) + 4 * one_hot

    def tables():
      drawn = {
        name: torch.randn_like(x)
        if name == "rep"
        else logits(len(x), x.shape[2:])
        for name, x in self.outputs.items()
      }
      size = self.outputs["pred"].shape[2:]
      return table_network(drawn, logits(self.job.num_u, size))

    student, teacher = tables(), tables()
    groups = [{"params": student.parameters(), "lr": 0.0}]
    return self.training_ms("losses", student, teacher, groups)


def alone(function, *args):
  """function(*args), in a process whose memory and threads end with it."""
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
    return pool.submit(function, *args).result()


def main():
  parser = workload.parser(__doc__)
  parser.add_argument(
    "--upstream",
    type=pathlib.Path,
    required=True,
    help="checkout of the published repository",
  )
  parser.add_argument(
    "--opponent",
    choices=("eager", "strong"),
    default="eager",
    help="see below (default: eager)",
  )
  options = parser.parse_args()
  upstream = options.upstream
  if not (upstream / "train_semi.py").is_file():
    fail(f"--upstream={upstream}: there is no train_semi.py in it")
  if importlib.util.find_spec("torch") is None:
    fail("torch is not installed: requirements-test.txt names the version")
  # Of several sizes the first: a run is one comparison.
  case, *_ = workload.cases(
    options.preset, sizes=options.size, batch=options.batch
  )
  ours = alone(run_ours, case, options.repeats)
  # Should the other side fail, for want of memory say, these are known.
  times = (f"{name} {ours[own_name]:.1f}" for name, own_name in ROWS.items())
  print(f"ours, ms: {', '.join(times)}", file=sys.stderr, flush=True)
  published = job(case, options.opponent, upstream, options.repeats)
  theirs = alone(run_published, published)
  rows = {
    name: {
      "ours_ms": ours[own_name],
      "theirs_ms": theirs[name],
      "ratio": theirs[name] / ours[own_name],
    }
    for name, own_name in ROWS.items()
  }
  print(f"{case.name}\nagainst {options.opponent}: {theirs['info']}")
  print(f"{'':<26}{'ours ms':>10}{'theirs ms':>11}{'ratio':>8}")
  for name, row in rows.items():
    print(
      f"{name:<26}{row['ours_ms']:>10.1f}{row['theirs_ms']:>11.1f}"
      f"{row['ratio']:>8.2f}"
    )
  if options.json:
    about = {
      "case": case.name,
      "opponent": options.opponent,
      "info": theirs["info"],
    }
    write_json(options.json, rows | about)


if __name__ == "__main__":
  main()
