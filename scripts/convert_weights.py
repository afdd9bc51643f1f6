"""Converts weights between torch's .pth and .npz.

  python scripts/convert_weights.py resnet101.pth resnet101.npz
  python scripts/convert_weights.py ckpt_best.pth u2pl.npz --network=student
  python scripts/convert_weights.py u2pl.npz u2pl.pth --to-torch

Takes ResNets of torchvision (7x7 stem) and with the deep stem of the published
network, with or without classifier, and checkpoints of whole networks, of which
the teacher is taken unless told otherwise. The .npz needs no torch to be read:
--config.model.pretrained= takes either. What does not fit is refused by name,
and the destination is written whole or not at all.
"""

import argparse
import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Nothing here computes.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from u2pl_jax.models import torch_weights, weight_files
from u2pl_jax.models.weight_files import WeightsError


def convert(
  source: pathlib.Path,
  destination: pathlib.Path,
  *,
  network: str | None,
  to_torch: bool,
  force: bool,
) -> None:
  """Reads, reports, writes; WeightsError with one line if it cannot."""
  start = time.perf_counter()
  if (destination.suffix == ".npz") == to_torch:
    wanted = "anything but .npz with" if to_torch else ".npz without"
    raise WeightsError(
      f"{destination}: the name of the destination must end in {wanted}"
      " --to-torch"
    )
  # Before minutes are spent on reading.
  weight_files.check_destination(destination, force=force)
  file = weight_files.read_weights(source, network=network)
  try:
    match = torch_weights.match(file.tensors)
  except ValueError as error:
    raise WeightsError(f"{source}: {error}") from error

  print(f"{source}: network: {file.network}")
  if file.others:
    print(f"  beside it, not converted: {_list(file.others)}")
  print(f"  it is {match.description}")
  kinds = ("missing", "has shape")
  missing, shapes = (
    sum(f" {kind}" in text for text in match.problems) for kind in kinds
  )
  unfit = len(match.problems) - missing - shapes
  numbers = sum(file.tensors[name].size for name in match.matched)
  print(
    f"  tensors: {len(match.matched)} matched ({numbers / 1e6:.1f} M numbers),"
    f" {len(match.ignored)} ignored, {missing} missing, {shapes} of wrong"
    f" shape, {unfit} unfit otherwise"
  )
  counters, ignored = [], []
  for name in match.ignored:
    is_counter = name.endswith("num_batches_tracked")
    (counters if is_counter else ignored).append(name)
  if ignored:
    print(f"  ignored: {_list(ignored)}")
  for problem in match.problems[:20]:
    print(f"  does not fit: {problem}")
  if match.problems:
    raise WeightsError(
      f"{source}: refused, {len(match.problems)} tensors do not fit"
      f" {match.description.backbone}, the first: {match.problems[0]}"
    )

  # Counters of batches are kept for torch, which wants them back.
  kept = set(match.matched) | set(counters)
  tensors = {n: value for n, value in file.tensors.items() if n in kept}
  write = weight_files.write_torch if to_torch else weight_files.write_npz
  write(destination, tensors, force=force)
  size = destination.stat().st_size / 1e6
  seconds = time.perf_counter() - start
  print(f"wrote {destination} ({size:.0f} MB) in {seconds:.1f} s")


def _list(names) -> str:
  names = [str(name) for name in names]
  more = f" and {len(names) - 6} more" if len(names) > 6 else ""
  return ", ".join(names[:6]) + more


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("source", type=pathlib.Path, help=".pth or .npz")
  parser.add_argument("destination", type=pathlib.Path)
  parser.add_argument(
    "--network",
    choices=("teacher", "student"),
    help="of a checkpoint that holds both; default: the teacher",
  )
  parser.add_argument(
    "--to-torch", action="store_true", help="write a state dict for torch.load"
  )
  parser.add_argument(
    "--force", action="store_true", help="replace the destination"
  )
  arguments = parser.parse_args(argv)
  try:
    convert(
      arguments.source,
      arguments.destination,
      network=arguments.network,
      to_torch=arguments.to_torch,
      force=arguments.force,
    )
  except WeightsError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
  main()
