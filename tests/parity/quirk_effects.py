"""Prints the table of docs/quirks.md: each quirk alone on a recorded run.

  python -m tests.parity.quirk_effects

Every row trains the small network of trajectory D from its recorded weights, on
its recorded images and draws; rows differ in `quirks` alone.
"""

import sys

import numpy as np

from tests.parity.golden import fixtures
from tests.parity.test_trajectory import QUIRKS, Recorded, distances, flat_state
from tests.parity.test_trajectory import iterate as train

ROWS = {
  "none (paper)": frozenset(),
  **{name: frozenset({name}) for name in sorted(QUIRKS["released"])},
  "all five (released)": QUIRKS["released"],
}


def effects(recorded: Recorded, quirks: frozenset) -> tuple[dict, dict]:
  """Means over the semi-supervised iterations, and the final student."""
  columns: dict[str, list] = {
    name: [] for name in ("keys", "anchors", "classes", "con", "uns", "kept")
  }
  for _, state, metrics in train(recorded, quirks):
    student = state.student
    if metrics is None or "contra_loss" not in metrics:
      continue
    trace = metrics["trace"]
    contrast = trace["contrast"]
    columns["keys"].append(np.asarray(contrast.num_candidates).sum())
    columns["anchors"].append(np.asarray(contrast.num_anchors).sum())
    columns["classes"].append(np.asarray(contrast.active).sum())
    columns["con"].append(metrics["contra_loss"])
    columns["uns"].append(metrics["unsup_loss"])
    columns["kept"].append((np.asarray(trace["kept_labels"]) != 255).sum())
  return (
    {name: np.asarray(v, np.float64) for name, v in columns.items()},
    flat_state(student),
  )


def main() -> None:
  paths = fixtures("trajectory_D*.npz")
  if not paths:
    sys.exit("error: there is no trajectory_D*.npz in the fixtures")
  recorded = Recorded(paths[0], "paper")
  print(
    "| quirks | keys per step | anchors per step | classes with a loss"
    " | contrastive loss, first, mean | unsupervised loss, first, mean"
    " | student apart from row 1, of its way |"
  )
  print("|---|---|---|---|---|---|---|")
  paper = None
  for name, quirks in ROWS.items():
    columns, student = effects(recorded, quirks)
    mean = {key: values.mean() for key, values in columns.items()}
    if paper is None:
      paper = student
      _, start, _ = next(train(recorded, quirks))
      origin = flat_state(start.student)
      way = np.linalg.norm(distances(paper, origin))
    apart = np.linalg.norm(distances(student, paper)) / way
    print(
      f"| {name} | {mean['keys']:.0f} | {mean['anchors']:.0f}"
      f" | {mean['classes']:.1f}"
      f" | {columns['con'][0]:.4f}, {mean['con']:.4f}"
      f" | {columns['uns'][0]:.4f}, {mean['uns']:.4f}"
      f" | {apart:.1%} |",
      flush=True,
    )


if __name__ == "__main__":
  main()
