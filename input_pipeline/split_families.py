"""Which benchmark a list of labelled images belongs to, told from its ids.

Numbers on lists of one size are only comparable within a family. VOC has two
families called "blender" of the same sizes: U2PL's takes the images that VOC
itself annotated first, the one of CPS is random, and most of its masks are the
coarser ones of SBD.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Sequence

OWN = "own list"

# Per data set: the first 32 digits of `ids_digest` of the labelled ids ->
# (family, name in the family). The lists are those of scripts/prepare_data.py;
# the classic ones are the same in both repositories.
_FAMILIES: dict[str, dict[str, tuple[str, str]]] = {
  "voc": {
    "124b0aab2fcd1767214bf465d8fa24dd": ("voc classic", "92"),
    "79b959bccf7753cd70bba8d5abdb7e9c": ("voc classic", "183"),
    "f0e702c687e2ba711cb726ace02e2bb0": ("voc classic", "366"),
    "8c23014f512884b9ef51e91113e69b71": ("voc classic", "732"),
    "129f1fe991729b1862115b77738c938c": ("voc classic", "1464"),
    "feea4692738362e449721faff842a3aa": ("voc blender of U2PL", "662"),
    "23921931a21324cfefdf4c67d4d2119d": ("voc blender of U2PL", "1323"),
    "d35f7cd4b4815e1d83809e2acd19fe53": ("voc blender of U2PL", "2646"),
    "aacb97f26e9468b4eb3c6403cb39ab0c": ("voc blender of U2PL", "5291"),
    "baa85754594fcd33c7f06d9ef173db9f": ("voc blender of CPS", "1_16"),
    "c9ca45b4e688d408cd0856e9d17bdf99": ("voc blender of CPS", "1_8"),
    "fd0e8dca3dac524cf3b8c2b8540bc67b": ("voc blender of CPS", "1_4"),
  },
  "cityscapes": {
    "efb043e79b437970a0768168a6c8d007": ("cityscapes of U2PL", "186"),
    "e707971ec1208d48c69e357e860826e3": ("cityscapes of U2PL", "372"),
    "f208c28b5da141ee03c4df720b6396da": ("cityscapes of U2PL", "744"),
    "e98a302bf478df13be2b01fcb77e740b": ("cityscapes of U2PL", "1488"),
    "6e265ef2bfb4d9e5ad3465ae8dd7419f": ("cityscapes of UniMatch", "1_30"),
    "7f5edfea73278e1a9b9a092698abbc7e": ("cityscapes of UniMatch", "1_16"),
    "dceeaaf93e3044916c853d069e1622d8": ("cityscapes of UniMatch", "1_8"),
    "dd7a6fb33a01b01ae990efdfce471f12": ("cityscapes of UniMatch", "1_4"),
    "f33f121eb382b05e5c5f4ccc07c9ce52": ("cityscapes of UniMatch", "1_2"),
  },
}

_RIVALS = {
  "voc blender of U2PL": "voc blender of CPS",
  "voc blender of CPS": "voc blender of U2PL",
  "cityscapes of U2PL": "cityscapes of UniMatch",
  "cityscapes of UniMatch": "cityscapes of U2PL",
}


@dataclasses.dataclass(frozen=True)
class SplitFamily:
  """Where a list of labelled images comes from.

  Attributes:
    family: its benchmark, or `OWN`.
    name: of the list within the family; '' for an own list.
    num_labelled: its length.
    num_fine: how many of its images have fine masks; None where the data set
      knows one kind of mask only.
  """

  family: str
  name: str
  num_labelled: int
  num_fine: int | None

  def metrics(self) -> dict[str, float]:
    """What a line of metrics says of it; the family is in the key."""
    metrics = {f"data/labelled/{self.family}": float(self.num_labelled)}
    if self.num_fine is not None:
      metrics["data/fine_share"] = self.num_fine / self.num_labelled
    return metrics

  def __str__(self) -> str:
    text = f"{self.family} {self.name}".rstrip()
    if self.num_fine is not None:
      text += (
        f", {self.num_fine} of {self.num_labelled} labelled images finely"
        f" annotated ({self.num_fine / self.num_labelled:.1%})"
      )
    if self.family in _RIVALS:
      text += f"; not comparable with {_RIVALS[self.family]}"
    return text


def identify_split(dataset: str, labelled: Sequence[str]) -> SplitFamily:
  """Recognises a published list by its ids, in whatever order they are.

  Args:
    dataset: name of the data set, as in `DatasetInfo`.
    labelled: ids of the labelled images.

  Returns:
    `SplitFamily`; of the family `OWN` if no published list has just these ids.
  """
  families = _FAMILIES.get(dataset, {})
  family, name = families.get(ids_digest(labelled)[:32], (OWN, ""))
  num_fine = None
  if dataset == "voc":
    num_fine = len(voc_fine_ids() & set(labelled))
  return SplitFamily(family, name, len(labelled), num_fine)


def ids_digest(ids: Sequence[str]) -> str:
  """SHA-256 of the sorted ids, joined by newlines."""
  return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()


@functools.cache
def voc_fine_ids() -> frozenset[str]:
  """The 1 464 training images that VOC 2012 itself annotated."""
  path = pathlib.Path(__file__).with_name("voc_fine_ids.txt")
  return frozenset(path.read_text(encoding="utf-8").split())
