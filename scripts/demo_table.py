"""Prints the mIoU of runs as a table and writes the page that compares them.

python scripts/demo_table.py WORKDIR WORKDIR ... --output FOLDER
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

# Run as a file, Python looks in scripts/ only.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from u2pl_jax import report
from u2pl_jax.run_log import Run, RunError, read_run


def format_table(runs: Sequence[Run]) -> str:
  """The runs' mIoU in percent, one line each, and the gain of the last run.

  Args:
    runs: the baseline first.

  Returns:
    Lines of aligned columns.

  Raises:
    RunError: a run was never evaluated.
  """
  rows = [("run", "steps", "mIoU", "best", "at step")]
  finals = []
  for run, label in zip(runs, report.run_labels(runs), strict=True):
    best, final = run.best_evaluation, run.last("eval/miou")
    if best is None:
      raise RunError(f"{run.workdir}: metrics.jsonl has no eval/miou yet")
    finals.append(final)
    rows.append(
      (
        label,
        f"{run.rows[-1]['step']:,}",
        f"{100 * final:.2f}",
        f"{100 * best[1]:.2f}",
        f"{best[0]:,}",
      )
    )
  if len(runs) > 1:
    gain = 100 * (finals[-1] - finals[0])
    rows.append((f"{runs[-1].name} - {runs[0].name}", "", f"{gain:+.2f}"))
  widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(5)]
  lines = []
  for row in rows:
    cells = [row[0].ljust(widths[0])]
    cells += [
      cell.rjust(width)
      for cell, width in zip(row[1:], widths[1:], strict=False)
    ]
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)


def main() -> int:
  """The command line; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
  parser.add_argument("--output", required=True, help="folder of the page")
  options = parser.parse_args()
  try:
    table = format_table([read_run(path) for path in options.workdirs])
    page = report.write_comparison(options.workdirs, options.output)
  except (RunError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print(
    f"\nmIoU in percent, at the last and at the best evaluation:\n\n{table}\n\n"
    f"Page: {page.resolve()}"
  )
  return 0


if __name__ == "__main__":
  sys.exit(main())
