"""The table of docs/parity.md, from made-up checks."""

import json

import pytest

from scripts import parity_table


def write(path, *checks):
  keys = ("group", "type", "error", "bound")
  lines = (json.dumps(dict(zip(keys, c, strict=True))) for c in checks)
  path.write_text("\n".join(lines) + "\n")
  return path


def test_nearest_to_its_tolerance(tmp_path):
  path = write(
    tmp_path / "log.jsonl",
    ("loss", "float32", 1e-3, 1e-1),
    # A smaller error that is nearer to what is allowed.
    ("loss", "float32", 5e-4, 1e-3),
    ("loss", "float64", 1e-12, 1e-8),
    ("masks", "float32", 0, 0),
    ("masks", "float32", 0, 0),
    ("masks", "float64", 3, 0),
  )
  assert parity_table.table(parity_table.read(path)).splitlines()[2:] == [
    "| loss | 2 | 5.0e-04 / 1.0e-03 | 1.0e-12 / 1.0e-08 |",
    "| masks | 2 | 2 equal | 3 differ |",
  ]


@pytest.mark.parametrize("text", ["", "no json\n", '{"group": "a"}\n'])
def test_bad_log(tmp_path, text):
  path = tmp_path / "log.jsonl"
  path.write_text(text)
  with pytest.raises(ValueError, match="log.jsonl"):
    parity_table.read(path)
