"""Published lists are told apart by their ids, in any order."""

import random

import pytest

from input_pipeline import split_families
from input_pipeline.split_families import OWN, identify_split
from tests import published_splits

# (data set, list) -> (family, name, labelled, finely annotated). The shares of
# the blender families are what makes them two benchmarks: counted from the
# published lists against VOC's own list of training images.
EXPECTED = {
  ("voc", "u2pl/92"): ("voc classic", "92", 92, 92),
  ("voc", "u2pl/183"): ("voc classic", "183", 183, 183),
  ("voc", "u2pl/366"): ("voc classic", "366", 366, 366),
  ("voc", "u2pl/732"): ("voc classic", "732", 732, 732),
  ("voc", "u2pl/1464"): ("voc classic", "1464", 1464, 1464),
  ("voc", "u2pl/662"): ("voc blender of U2PL", "662", 662, 662),
  ("voc", "u2pl/1323"): ("voc blender of U2PL", "1323", 1323, 1323),
  ("voc", "u2pl/2646"): ("voc blender of U2PL", "2646", 2646, 1464),
  ("voc", "u2pl/5291"): ("voc blender of U2PL", "5291", 5291, 1464),
  ("voc", "unimatch/1_16"): ("voc blender of CPS", "1_16", 662, 93),
  ("voc", "unimatch/1_8"): ("voc blender of CPS", "1_8", 1323, 193),
  ("voc", "unimatch/1_4"): ("voc blender of CPS", "1_4", 2646, 388),
} | {
  ("cityscapes", f"{key}/{name}"): (
    f"cityscapes of {family}",
    name,
    count,
    None,
  )
  for key, family, rows in (
    ("u2pl", "U2PL", {"186": 186, "372": 372, "744": 744, "1488": 1488}),
    (
      "unimatch",
      "UniMatch",
      {"1_30": 100, "1_16": 186, "1_8": 372, "1_4": 744, "1_2": 1488},
    ),
  )
  for name, count in rows.items()
}


def test_every_published_list_is_expected():
  for dataset in ("voc", "cityscapes"):
    found = {(dataset, name) for name in published_splits.names(dataset)}
    assert found == {key for key in EXPECTED if key[0] == dataset}
  known = split_families._FAMILIES
  assert sum(len(lists) for lists in known.values()) == len(EXPECTED)


@pytest.mark.parametrize(("dataset", "name"), EXPECTED)
def test_published_lists(dataset, name):
  labelled = list(published_splits.read(dataset, name)[0])
  random.Random(0).shuffle(labelled)
  split = identify_split(dataset, labelled)
  assert (
    split.family,
    split.name,
    split.num_labelled,
    split.num_fine,
  ) == EXPECTED[dataset, name]


def test_one_image_more_is_an_own_list():
  labelled, unlabelled = published_splits.read("voc", "u2pl/92")
  # All that is not in the classic families is SBD's.
  coarse = next(
    id for id in unlabelled if id not in split_families.voc_fine_ids()
  )
  split = identify_split("voc", (*labelled, coarse))
  assert (split.family, split.num_fine) == (OWN, 92)
  assert split.metrics() == {
    "data/labelled/own list": 93.0,
    "data/fine_share": 92 / 93,
  }
  assert "own list, 92 of 93 labelled images finely annotated (98.9%)" == str(
    split
  )


def test_other_data_sets_have_one_kind_of_mask():
  split = identify_split("folder", ["a", "b"])
  assert (split.family, split.num_fine) == (OWN, None)
  assert split.metrics() == {"data/labelled/own list": 2.0}
  assert str(split) == "own list"


def test_the_blender_families_warn_of_each_other():
  ours = identify_split("voc", published_splits.read("voc", "u2pl/662")[0])
  cps = identify_split("voc", published_splits.read("voc", "unimatch/1_16")[0])
  assert "662 of 662 labelled images" in str(ours)
  assert "(100.0%); not comparable with voc blender of CPS" in str(ours)
  assert "93 of 662 labelled images finely annotated (14.0%)" in str(cps)
  assert "not comparable with voc blender of U2PL" in str(cps)


def test_fine_ids_are_the_list_of_voc():
  """SHA-256 of the published file, which holds just these ids, sorted."""
  ids = split_families.voc_fine_ids()
  assert len(ids) == 1464
  assert split_families.ids_digest(tuple(ids)) == (
    "129f1fe991729b1862115b77738c938c149c1f167baa02b4b3186aea9f0d6a84"
  )
