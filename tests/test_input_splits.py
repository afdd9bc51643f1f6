"""Lists of ids, folders, and the registry of data sets."""

import subprocess
import sys

import pytest

import input_pipeline as ip


def write(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(text.encode())
  return path


def one_line(error):
  message = str(error.value)
  assert "\n" not in message
  return message


@pytest.mark.parametrize(
  "text",
  [
    "a\nb\n",
    "a\nb",  # the published lists end like this
    "a\r\nb\r\n",
    "\n\n  a \n\nb\n\n",
    "\ufeffa\nb\n",
  ],
)
def test_read_split_accepts_every_line_ending(tmp_path, text):
  assert ip.read_split(write(tmp_path / "s.txt", text)) == ("a", "b")


@pytest.mark.parametrize(
  ("line", "id"),
  [
    ("2007_000032", "2007_000032"),
    ("train/ulm/x", "train/ulm/x"),
    ("holiday photo 1", "holiday photo 1"),
    ("photo.v2", "photo.v2"),
    ("2007_000032.jpg", "2007_000032"),
    ("my photos/IMG 1.JPG", "IMG 1"),
    (
      "JPEGImages/2007_000032.jpg SegmentationClassAug/2007_000032.png",
      "2007_000032",
    ),
    (
      "leftImg8bit/train/ulm/ulm_000061_000019_leftImg8bit.png",
      "train/ulm/ulm_000061_000019",
    ),
    (
      "leftImg8bit/train/jena/jena_1_leftImg8bit.png"
      " gtFine/train/jena/jena_1_gtFine_labelTrainIds.png",
      "train/jena/jena_1",
    ),
  ],
)
def test_read_split_understands_published_forms(tmp_path, line, id):
  assert ip.read_split(write(tmp_path / "s.txt", line)) == (id,)


def test_cityscapes_ids_lead_back_to_the_files(tmp_path):
  layout = ip.Layout(
    "root",
    image_dir="leftImg8bit",
    mask_dir="gtFine",
    image_suffix="_leftImg8bit.png",
    mask_suffix="_gtFine_labelTrainIds.png",
  )
  image = "leftImg8bit/train/ulm/ulm_1_leftImg8bit.png"
  mask = "gtFine/train/ulm/ulm_1_gtFine_labelTrainIds.png"
  (id,) = ip.read_split(write(tmp_path / "s.txt", f"{image} {mask}\n"))
  assert layout.image_path(id) == f"root/{image}"
  assert layout.mask_path(id) == f"root/{mask}"


def test_read_split_names_a_missing_file(tmp_path):
  with pytest.raises(ip.DataError) as error:
    ip.read_split(tmp_path / "none.txt")
  assert "none.txt" in one_line(error)
  assert "one image id per line" in one_line(error)


@pytest.mark.parametrize("text", ["", "\n \r\n\n"])
def test_read_split_refuses_an_empty_list(tmp_path, text):
  with pytest.raises(ip.DataError, match="empty") as error:
    ip.read_split(write(tmp_path / "s.txt", text))
  assert "s.txt" in one_line(error)


def test_read_split_names_both_lines_of_a_repeated_id(tmp_path):
  path = write(tmp_path / "s.txt", "a\n\nb\nJPEGImages/a.jpg M/a.png\n")
  with pytest.raises(ip.DataError) as error:
    ip.read_split(path)
  assert "'a' is listed twice, in lines 1 and 4" in one_line(error)


@pytest.mark.parametrize("line", ["/abs/a.jpg", "../a", "x/../../a.png"])
def test_read_split_refuses_paths_outside_the_data(tmp_path, line):
  with pytest.raises(ip.DataError, match="line 2"):
    ip.read_split(write(tmp_path / "s.txt", f"ok\n{line}\n"))


def test_read_split_refuses_what_is_not_text(tmp_path):
  (tmp_path / "s.txt").write_bytes(b"\xff\xd8\xff\xe0")
  with pytest.raises(ip.DataError, match="not UTF-8"):
    ip.read_split(tmp_path / "s.txt")
  with pytest.raises(ip.DataError, match="cannot read"):
    ip.read_split(tmp_path)


def test_check_splits_accepts_disjoint_lists():
  ip.check_splits({"l.txt": ["a", "b"], "u.txt": ["c"], "v.txt": ["d"]})


@pytest.mark.parametrize(
  ("labelled", "unlabelled", "validation", "names"),
  [
    (["a", "b"], ["b", "c"], ["d"], ("l.txt", "u.txt")),
    (["a", "b"], ["c"], ["b"], ("l.txt", "v.txt")),
    (["a"], ["b", "c"], ["b"], ("u.txt", "v.txt")),
  ],
)
def test_check_splits_names_the_overlap(
  labelled, unlabelled, validation, names
):
  with pytest.raises(ip.DataError) as error:
    ip.check_splits(
      {"l.txt": labelled, "u.txt": unlabelled, "v.txt": validation}
    )
  assert f"{names[0]} and {names[1]} share 1 id (b)" in one_line(error)


def test_check_splits_names_three_ids_and_the_count():
  ids = list("abcde")
  with pytest.raises(ip.DataError) as error:
    ip.check_splits({"l.txt": ids, "u.txt": ids, "v.txt": []})
  assert "share 5 ids (a, b, c, ...)" in one_line(error)


@pytest.fixture
def layout(tmp_path):
  root = tmp_path / "data"
  for id in ("a", "sub/b", "c"):
    write(root / "JPEGImages" / f"{id}.jpg", "")
    write(root / "SegmentationClass" / f"{id}.png", "")
  return ip.Layout(root)


def test_check_files_accepts_a_complete_folder(layout):
  ip.check_files(layout, ["a", "sub/b", "c"], masks=True)


def test_check_files_names_a_missing_root(tmp_path):
  with pytest.raises(ip.DataError) as error:
    ip.check_files(ip.Layout(tmp_path / "no"), ["a"], masks=True)
  message = one_line(error)
  assert str(tmp_path / "no") in message
  assert "JPEGImages/" in message and "SegmentationClass/" in message


def test_check_files_names_a_missing_folder(layout):
  (layout.root / "JPEGImages").rename(layout.root / "images")
  with pytest.raises(ip.DataError) as error:
    ip.check_files(layout, ["a"], masks=False)
  message = one_line(error)
  assert str(layout.root / "JPEGImages") in message
  assert "<id>.jpg" in message


@pytest.mark.parametrize(
  ("folder", "kind", "suffix"),
  [("JPEGImages", "image", ".jpg"), ("SegmentationClass", "mask", ".png")],
)
def test_check_files_names_the_first_missing_file(layout, folder, kind, suffix):
  (layout.root / folder / f"sub/b{suffix}").unlink()
  (layout.root / folder / f"c{suffix}").unlink()
  ids = ["a", "sub/b", "c", "sub/e", "nowhere/d"]
  if kind == "mask":
    write(layout.root / "JPEGImages/sub/e.jpg", "")
    write(layout.root / "JPEGImages/nowhere/d.jpg", "")
  with pytest.raises(ip.DataError) as error:
    ip.check_files(layout, ids, masks=True)
  message = one_line(error)
  assert message.startswith(str(layout.root / folder / f"sub/b{suffix}"))
  assert f"{kind} not found; 4 of 5 {kind}s are missing" in message


def test_check_files_without_masks_needs_no_mask_folder(layout):
  (layout.root / "SegmentationClass").rename(layout.root / "hidden")
  ip.check_files(layout, ["a", "c"], masks=False)
  with pytest.raises(ip.DataError, match="folder of the masks"):
    ip.check_files(layout, ["a", "c"], masks=True)


def test_voc_palette_is_the_published_one():
  palette = ip.voc_palette(256)
  assert palette[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
  assert palette[8] == (64, 0, 0)
  assert palette[15] == (192, 128, 128)  # person
  assert palette[20] == (0, 64, 128)  # tvmonitor
  assert palette[255] == (224, 224, 192)  # void
  assert len(set(palette)) == 256
  with pytest.raises(ValueError, match="257"):
    ip.voc_palette(257)


def test_registry():
  voc = ip.dataset_info("voc")
  assert voc.num_classes == 21 and voc.class_names[15] == "person"
  assert voc.palette == ip.voc_palette(21)
  assert voc.mean == (123.675, 116.28, 103.53)
  assert voc.std == (58.395, 57.12, 57.375)
  camvid = ip.dataset_info("camvid")
  assert camvid.num_classes == 11
  assert camvid.class_names[::5] == ("sky", "tree", "bicyclist")
  assert camvid.palette[3] == (128, 64, 128)  # road
  with pytest.raises(ip.DataError, match="'vok'.*camvid.*voc"):
    ip.dataset_info("vok")
  with pytest.raises(ValueError, match="2 class names but 1 palette"):
    ip.DatasetInfo("x", ("a", "b"), ((0, 0, 0),))


def test_a_palette_costs_no_decoder():
  code = (
    "import sys, input_pipeline; input_pipeline.dataset_info('voc');"
    "print([m for m in ('numpy', 'cv2', 'PIL', 'grain', 'jax')"
    " if m in sys.modules])"
  )
  result = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    check=True,
    env={"PYTHONPATH": ":".join(p for p in sys.path if p)},
  )
  assert result.stdout.strip() == "[]"


def test_everything_exported_exists():
  for name in ip.__all__:
    assert getattr(ip, name) is not None
  with pytest.raises(AttributeError):
    ip.no_such_name  # noqa: B018
