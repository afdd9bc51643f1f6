"""Who may import whom: fails on an upward edge.

The rules are the tables below; a module that no table names is at the top: it
may import anything, and nothing in the tables may import it.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_PACKAGES = ("configs", "input_pipeline", "u2pl_jax")
_STDLIB = sys.stdlib_module_names

# Leaves by level: one may import those of the levels below it.
_LEAF_LEVELS = (
  {"halves", "images", "selection", "strong_augmentation"},
  {"memory_bank", "photometric"},
  {
    "contrastive",
    "ema",
    "losses",
    "metrics",
    "optimizer",
    "pixel_counts",
    "plateau",
    "reliability",
    "rngs",
  },
)
_LEAVES = set().union(*_LEAF_LEVELS)


def _u2pl(names) -> set[str]:
  return {f"u2pl_jax.{name}" for name in names}


def _rules() -> dict[str, tuple[set[str], set[str]]]:
  """Module or package -> (own modules, third-party packages) it may import."""
  maths = {"jax", "numpy", "optax", "flax"}
  rules = {
    "configs": ({"configs"}, {"ml_collections"}),
    # No model and no backend: its worker processes must not start one. A config
    # (ml_collections) is data; who reads all files shows progress (tqdm).
    "input_pipeline": (
      {"input_pipeline"},
      {
        "PIL",
        "absl",
        "cv2",
        "etils",
        "grain",
        "kornia_rs",
        "ml_collections",
        "numpy",
        "tensorflow_datasets",
        "tqdm",
      },
    ),
    "u2pl_jax.models": (
      {"u2pl_jax.models"},
      {"flax", "jax", "numpy", "torch"},
    ),
    "u2pl_jax.sharding": (set(), {"jax", "numpy"}),
    "u2pl_jax.distributed": ({"input_pipeline"}, {"jax", "numpy"}),
    "u2pl_jax.checksum": (_u2pl({"distributed"}), {"jax", "numpy"}),
    "u2pl_jax.checkpoint": (
      _u2pl({"checksum", "distributed"}),
      {"flax", "jax", "numpy", "orbax"},
    ),
    # Tools that read a step and run nothing.
    "u2pl_jax.collectives": (set(), {"jax"}),
    "u2pl_jax.step_shapes": (
      {"input_pipeline.dataset_config"}
      | _u2pl({"build", "config_checks", "sharding", "train_state"}),
      {"jax", "ml_collections"},
    ),
    "u2pl_jax.roofline": (
      _u2pl({"build", "config_checks", "models.layers", "models.resnet"}),
      maths | {"ml_collections"},
    ),
    "u2pl_jax.scaling": (
      _u2pl({"build", "config_checks", "roofline"}),
      {"matplotlib", "ml_collections"},
    ),
    "u2pl_jax.preemption": (set(), {"jax"}),
    "u2pl_jax.tiling": (
      _u2pl({"evaluation", "images", "sharding", "train_state"}),
      maths,
    ),
    "u2pl_jax.prediction_log": ({"input_pipeline"}, set()),
    "u2pl_jax.train_state": (_u2pl({"memory_bank"}), maths),
    "u2pl_jax.train_step": (
      _u2pl(_LEAVES | {"models.layers", "train_state"}),
      maths,
    ),
    "u2pl_jax.evaluation": (
      _u2pl(_LEAVES | {"models.layers", "train_state"}),
      maths,
    ),
    # Two evaluations are compared without a backend, from any machine.
    "u2pl_jax.evaluation_record": (
      _u2pl({"metrics"}) | {"input_pipeline"},
      {"numpy"},
    ),
    # A page is drawn without a backend, from any machine.
    "u2pl_jax.run_log": (_u2pl({"plateau"}), {"numpy"}),
    "u2pl_jax.clock": (set(), set()),
    "u2pl_jax.xla_flags": (set(), set()),
    "u2pl_jax.bad_records": (
      {"input_pipeline"} | _u2pl({"distributed"}),
      {"jax", "numpy"},
    ),
    "u2pl_jax.advice": (_u2pl({"clock", "run_log"}), {"numpy"}),
    "u2pl_jax.run_stats": (
      {"input_pipeline.storage"} | _u2pl({"run_log"}),
      {"matplotlib", "numpy"},
    ),
    "u2pl_jax.report_figures": (_u2pl({"run_log"}), {"numpy"}),
    "u2pl_jax.report_images": (
      _u2pl({"run_log"}),
      {"PIL", "matplotlib", "numpy"},
    ),
    "u2pl_jax.report_page": (
      _u2pl({"report_figures", "report_images"}),
      set(),
    ),
    "u2pl_jax.report": (
      {"input_pipeline.storage"}
      | _u2pl(
        {
          "advice",
          "report_figures",
          "report_images",
          "report_page",
          "run_log",
          "run_stats",
        }
      ),
      {"numpy"},
    ),
    "u2pl_jax.image_strip": (
      _u2pl({"report_images"}),
      {"PIL", "matplotlib", "numpy"},
    ),
  }
  below: set[str] = set()
  for level in _LEAF_LEVELS:
    for name in level:
      rules[f"u2pl_jax.{name}"] = (_u2pl(below), maths)
    below |= level
  return rules


# Third-party package -> the only modules or packages that import it.
_OWNERS = {
  "orbax": {"u2pl_jax.checkpoint"},
  "torch": {"u2pl_jax.models.weight_files"},
  "grain": {"input_pipeline"},
  "kornia_rs": {"input_pipeline.png"},
  "tqdm": {"input_pipeline.parallel"},
  "tensorflow_datasets": {"input_pipeline"},
  "clu": {"u2pl_jax.main", "u2pl_jax.train", "u2pl_jax.writers"},
  "tensorflow": {"u2pl_jax.main", "u2pl_jax.train", "u2pl_jax.writers"},
  "wandb": {"u2pl_jax.writers"},
}
# Calls that place arrays on devices; as annotations the names are free.
_SHARDING_CALLS = {"Mesh", "NamedSharding", "make_mesh"}


def _is_in(module: str, package: str) -> bool:
  return module == package or module.startswith(package + ".")


def _is_module(name: str) -> bool:
  path = _ROOT.joinpath(*name.split("."))
  return path.with_suffix(".py").is_file() or path.is_dir()


def _imports(tree: ast.AST) -> set[str]:
  """Full names of the imported modules, also of imports inside functions."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      # A relative import has no name here: '.' breaks every rule.
      origin = "." * node.level + (node.module or "")
      for alias in node.names:
        full = f"{origin}.{alias.name}"
        # What is imported from one of our own modules is mostly no module.
        is_own = origin.split(".")[0] in _PACKAGES
        found.add(full if not is_own or _is_module(full) else origin)
  return found


def violations(module: str, source: str) -> list[str]:
  """What a module's source does against the rules.

  Args:
    module: full name, such as 'u2pl_jax.losses'.
    source: Python text.

  Returns:
    One line each, empty if all is well.
  """
  tree = ast.parse(source)
  found = []
  for name in sorted(_imports(tree)):
    top = name.split(".")[0]
    if not top:
      found.append(f"{module} imports {name}: use the absolute name")
      continue
    for rule, (own, third_party) in _rules().items():
      if not _is_in(module, rule) or top in _STDLIB:
        continue
      if top in _PACKAGES:
        allowed = any(_is_in(name, package) for package in own)
      else:
        allowed = top in third_party
      if not allowed:
        found.append(f"{module} must not import {name}")
    if top in _OWNERS and not any(
      _is_in(module, owner) for owner in _OWNERS[top]
    ):
      owners = ", ".join(sorted(_OWNERS[top]))
      found.append(f"{module} imports {name}, which belongs to {owners}")
    if module.removeprefix("u2pl_jax.") in _LEAVES:
      if _is_in(name, "flax.linen"):
        found.append(f"{module} must not import {name}: a leaf has no modules")
  if module != "u2pl_jax.sharding":
    for node in ast.walk(tree):
      if isinstance(node, ast.Call):
        called = node.func
        name = getattr(called, "attr", getattr(called, "id", ""))
        if name in _SHARDING_CALLS:
          found.append(f"{module} calls {name}: only sharding.py does")
  return found


def _modules() -> dict[str, pathlib.Path]:
  found = {}
  for package in _PACKAGES:
    for path in sorted((_ROOT / package).rglob("*.py")):
      parts = path.relative_to(_ROOT).with_suffix("").parts
      found[".".join(parts).removesuffix(".__init__")] = path
  return found


@pytest.mark.parametrize("module", sorted(_modules()))
def test_imports_point_downwards(module):
  assert violations(module, _modules()[module].read_text()) == []


def test_every_rule_is_about_a_module_that_exists():
  assert set(_rules()) - set(_PACKAGES) - set(_modules()) == set()
  owners = set().union(*_OWNERS.values())
  assert owners <= set(_modules())


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("input_pipeline.decode", "import jax"),
    ("input_pipeline.decode", "from flax import struct"),
    ("input_pipeline.decode", "def f():\n  from u2pl_jax import images"),
    ("input_pipeline.decode", "from configs import common"),
    ("configs.voc_1464", "from u2pl_jax.train_step import QUIRKS"),
    ("configs.voc_1464", "import jax"),
    ("u2pl_jax.losses", "import ml_collections"),
    ("u2pl_jax.losses", "import flax.linen as nn"),
    ("u2pl_jax.losses", "from flax import linen"),
    ("u2pl_jax.losses", "from u2pl_jax import train_step"),
    ("u2pl_jax.losses", "from u2pl_jax.reliability import entropy"),
    ("u2pl_jax.losses", "from u2pl_jax.models.layers import resize_bilinear"),
    ("u2pl_jax.losses", "from . import selection"),
    ("u2pl_jax.selection", "from u2pl_jax.memory_bank import MemoryBank"),
    ("u2pl_jax.models.resnet", "from u2pl_jax.images import normalise"),
    ("u2pl_jax.models.resnet", "import optax"),
    ("u2pl_jax.train_state", "from u2pl_jax.models.deeplab import DeepLab"),
    ("u2pl_jax.train_step", "from u2pl_jax.models.deeplab import DeepLab"),
    ("u2pl_jax.train_step", "from u2pl_jax import sharding"),
    ("u2pl_jax.train_step", "from clu import metric_writers"),
    ("u2pl_jax.evaluation_record", "import jax"),
    ("u2pl_jax.report", "import jax"),
    ("u2pl_jax.report", "from u2pl_jax.train import evaluate"),
    ("u2pl_jax.train", "import orbax.checkpoint as ocp"),
    ("u2pl_jax.train", "import grain"),
    ("u2pl_jax.train", "import tensorflow_datasets as tfds"),
    ("u2pl_jax.build", "import tensorflow as tf"),
    ("u2pl_jax.train", "import wandb"),
    ("u2pl_jax.build", "mesh = jax.make_mesh((1,), ('data',))"),
    ("u2pl_jax.build", "sharding = NamedSharding(mesh, spec)"),
    ("u2pl_jax.build", "mesh = jax.sharding.Mesh(devices, ('data',))"),
  ],
)
def test_a_broken_rule_is_noticed(module, source):
  assert len(violations(module, source)) >= 1


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("u2pl_jax.losses", "from u2pl_jax.selection import order_statistics"),
    ("u2pl_jax.memory_bank", "import flax"),
    ("u2pl_jax.train", "import tensorflow as tf\nfrom input_pipeline import x"),
    ("u2pl_jax.build", "from jax.sharding import Mesh"),
    ("u2pl_jax.sharding", "mesh = jax.make_mesh((1,), ('data',))"),
    ("input_pipeline.pipeline", "import grain\nimport multiprocessing"),
    ("a_new_command", "from u2pl_jax import train"),
  ],
)
def test_what_the_design_allows_is_allowed(module, source):
  assert violations(module, source) == []


@pytest.mark.parametrize(
  ("module", "heavy"),
  [
    (
      "u2pl_jax.train_step",
      ("tensorflow", "clu", "tensorflow_datasets", "grain", "orbax"),
    ),
    ("input_pipeline", ("jax", "flax", "tensorflow")),
    # It hears SIGTERM while these are imported.
    ("u2pl_jax.preemption", ("jax", "numpy")),
    ("u2pl_jax.evaluation_record", ("jax", "flax", "tensorflow", "cv2")),
    (
      "u2pl_jax.report",
      (
        "jax",
        "flax",
        "tensorflow",
        "cv2",
        "matplotlib.pyplot",
        "plotly",
      ),
    ),
  ],
)
def test_importing_stays_light(module, heavy):
  # Also what third-party packages import in their turn.
  code = (
    f"import sys, {module}; print(*sorted(set({heavy}) & set(sys.modules)))"
  )
  result = subprocess.run(
    [sys.executable, "-c", code],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert result.stdout.split() == []
