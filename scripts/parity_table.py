"""Prints the table of docs/parity.md from what the parity tests recorded.

  U2PL_PARITY_LOG=parity.jsonl python -m pytest tests/parity
  python scripts/parity_table.py parity.jsonl

Of every group of numbers: the check that came nearest to its tolerance, in
float32 and in float64.
"""

import argparse
import collections
import json
import pathlib
import sys

TYPES = ("float32", "float64")


def read(path: pathlib.Path) -> dict[str, dict[str, list[dict]]]:
  """group -> type -> checks, in the order of the file."""
  groups: dict = collections.defaultdict(lambda: collections.defaultdict(list))
  for number, line in enumerate(path.read_text().splitlines(), 1):
    try:
      check = json.loads(line)
      groups[check["group"]][check["type"]].append(check)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
      raise ValueError(f"{path}:{number}: not a recorded check") from error
  if not groups:
    raise ValueError(f"{path}: no checks in it")
  return groups


def nearest(checks: list[dict]) -> dict:
  """The one with the largest error relative to its bound."""
  return max(
    checks,
    key=lambda c: c["error"] / c["bound"] if c["bound"] else c["error"] > 0,
  )


def cell(checks: list[dict]) -> str:
  """'error / bound'; of discrete values how many were compared."""
  if not checks:
    return "-"
  worst = nearest(checks)
  if not worst["bound"]:
    wrong = sum(check["error"] for check in checks)
    return f"{len(checks)} equal" if not wrong else f"{wrong:.0f} differ"
  return f"{worst['error']:.1e} / {worst['bound']:.1e}"


def table(groups: dict) -> str:
  lines = [
    "| what | checks | float32: error / allowed | float64: error / allowed |",
    "|---|---|---|---|",
  ]
  for group, by_type in groups.items():
    count = max(len(checks) for checks in by_type.values())
    cells = [cell(by_type.get(kind, [])) for kind in TYPES]
    lines.append(f"| {group} | {count} | {' | '.join(cells)} |")
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("log", type=pathlib.Path)
  path = parser.parse_args().log
  try:
    print(table(read(path)))
  except (OSError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
  main()
