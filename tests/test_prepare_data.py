"""prepare_data.py on small archives and lists, a local server, and kills."""

import dataclasses
import hashlib
import http.server
import importlib.util
import io
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from input_pipeline import read_split
from input_pipeline.split_families import ids_digest, voc_fine_ids
from tests import published_splits

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "prepare_data.py"


def load_script():
  spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


LISTS = {
  "u2pl/pascal/1464/labeled.txt": "2007_000001\n2007_000002",
  "u2pl/pascal/1464/unlabeled.txt": "2008_000003\n2008_000004\n2008_000005",
  "u2pl/pascal/92/labeled.txt": "2007_000001",
  "u2pl/pascal/92/unlabeled.txt": (
    "2007_000002\n2008_000003\n2008_000004\n2008_000005"
  ),
  "u2pl/pascal/val.txt": "2009_000006\n2009_000007",
  "unimatch/pascal/1_16/labeled.txt": (
    "JPEGImages/2008_000003.jpg SegmentationClass/2008_000003.png\n"
  ),
  "unimatch/pascal/1_16/unlabeled.txt": (
    "JPEGImages/2007_000001.jpg SegmentationClass/2007_000001.png\n"
    "JPEGImages/2007_000002.jpg SegmentationClass/2007_000002.png\n"
  ),
  "u2pl/cityscapes/744/labeled.txt": (
    "leftImg8bit/train/ulm/ulm_000001_000019_leftImg8bit.png"
  ),
  "u2pl/cityscapes/744/unlabeled.txt": (
    "leftImg8bit/train/ulm/ulm_000002_000019_leftImg8bit.png\n"
    "leftImg8bit/train/bonn/bonn_000003_000019_leftImg8bit.png"
  ),
  "u2pl/cityscapes/val.txt": (
    "leftImg8bit/val/lindau/lindau_000004_000019_leftImg8bit.png"
  ),
}
TRAINING = [f"2007_00000{i}" for i in (1, 2)] + [
  f"2008_00000{i}" for i in (3, 4, 5)
]
IDS = [*TRAINING, "2009_000006", "2009_000007"]


@pytest.fixture
def script(tmp_path, monkeypatch):
  """The script, for data sets of 5 + 2 and 3 + 1 images."""
  module = load_script()
  path = tmp_path / "checksums"
  path.write_text(
    "".join(
      f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n"
      for name, text in LISTS.items()
    )
  )
  monkeypatch.setattr(module, "MANIFEST", path)
  monkeypatch.setattr(module, "PAUSE_SECONDS", 0.01)
  for name, sizes in (("voc", (5, 2)), ("cityscapes", (3, 1))):
    monkeypatch.setitem(
      module.DATA_SETS,
      name,
      dataclasses.replace(
        module.DATA_SETS[name], num_training=sizes[0], num_validation=sizes[1]
      ),
    )
  return module


@pytest.fixture
def lists(tmp_path):
  folder = tmp_path / "lists"
  for name, text in LISTS.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return folder


@pytest.fixture
def root(tmp_path):
  return tmp_path / "data"


def image_bytes(seed, kind="JPEG"):
  pixels = np.random.default_rng(seed).integers(0, 255, (40, 50, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, kind)
  return file.getvalue()


def mask_bytes(*values):
  pixels = np.resize(np.array(values, np.uint8), (40, 50))
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "PNG")
  return file.getvalue()


def write_tar(path, files):
  path.parent.mkdir(exist_ok=True)
  with tarfile.open(path, "w") as archive:
    for name, data in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))


def write_zip(path, files):
  path.parent.mkdir(exist_ok=True)
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, data in files.items():
      archive.writestr(name, data)


JPEGS = {
  f"VOCdevkit/VOC2012/JPEGImages/{id}.jpg": image_bytes(i)
  for i, id in enumerate(IDS)
}
MASKS = {
  f"SegmentationClassAug/{id}.png": mask_bytes(0, i % 21, 255)
  for i, id in enumerate(IDS)
}


@pytest.fixture
def archives(tmp_path):
  folder = tmp_path / "downloads"
  write_tar(
    folder / "VOCtrainval_11-May-2012.tar",
    JPEGS
    | {
      "VOCdevkit/VOC2012/Annotations/2007_000001.xml": b"<a/>",
      "VOCdevkit/VOC2012/SegmentationClass/2007_000001.png": b"other",
    },
  )
  write_zip(
    folder / "SegmentationClassAug.zip",
    MASKS | {"__MACOSX/SegmentationClassAug/._2007_000001.png": b"junk"},
  )
  return folder


def run(script, capsys, *arguments):
  """-> (exit code, stdout, the one line of stderr or '')."""
  code = 0
  try:
    script.main([str(argument) for argument in arguments])
  except SystemExit as error:
    code = error.code
  out, err = capsys.readouterr()
  assert err.count("\n") <= 1 and (not err or err.startswith("error: "))
  assert (code != 0) == bool(err)
  return code, out, err


def files_below(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file() and path.name != ".prepare_data.lock"
  }


# -- The pinned checksums ------------------------------------------------------


def test_manifest_has_every_published_list():
  script = load_script()
  u2pl = script.manifest("pascal", "u2pl")
  assert len(u2pl) == 2 * 9 + 1
  assert len(script.manifest("pascal", "unimatch")) == 2 * 11 + 2
  assert len(script.manifest("cityscapes", "u2pl")) == 2 * 4 + 1
  assert len(script.manifest("cityscapes", "unimatch")) == 2 * 5 + 1
  lines = script.MANIFEST.read_text().splitlines()
  assert len(lines) == 63 == len({line.split()[1] for line in lines})
  # This file holds just VOC's own training images, sorted, and no last newline.
  assert u2pl["1464/labeled.txt"] == ids_digest(tuple(voc_fine_ids()))
  for name in published_splits.names("voc"):
    family, split = name.split("/")
    for part in ("labeled", "unlabeled"):
      assert f"{split}/{part}.txt" in script.manifest("pascal", family)


def test_urls_are_those_of_the_pinned_commits(monkeypatch):
  script = load_script()
  asked = []

  def urlopen(url, timeout):
    asked.append(url)
    return io.BytesIO(b"x")

  monkeypatch.setattr(script.urllib.request, "urlopen", urlopen)
  digest = hashlib.sha256(b"x").hexdigest()
  for family in ("u2pl", "unimatch"):
    path = "pascal/92/labeled.txt"
    assert script.fetch(script.BASE_URL, family, path, digest) == b"x"
  raw = "https://raw.githubusercontent.com"
  assert asked == [
    f"{raw}/Haochen-Wang409/U2PL/ab3d2be313d4d6b2885e7a0213d4fce82a803b79"
    "/data/splits/pascal/92/labeled.txt",
    f"{raw}/LiheYoung/UniMatch/0324f3dd4a22128105a5eb135d2586c0bb3cc647"
    "/splits/pascal/92/labeled.txt",
  ]


# -- Lists from the network ----------------------------------------------------


class Server:
  """Serves LISTS as the upstream does, with faults to order."""

  def __init__(self, script):
    outer, self.faults, self.served = self, {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_GET(self):
        for family, (repository, folder) in script.UPSTREAM.items():
          prefix = f"/{repository}/{folder}/"
          if self.path.startswith(prefix):
            name = f"{family}/{self.path.removeprefix(prefix)}"
        outer.served.append(name)
        data = LISTS[name].encode()
        faults = outer.faults.get(name, [])
        fault = faults.pop(0) if faults else None
        if isinstance(fault, int):
          self.send_error(fault)
          return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "cut":
          self.wfile.write(data[: len(data) // 2])
        elif fault == "other":
          self.wfile.write(b"x" * len(data))
        else:
          self.wfile.write(data)

      def log_message(self, *_):
        pass

    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self._server.server_port}"
    threading.Thread(target=self._server.serve_forever, daemon=True).start()

  def close(self):
    self._server.shutdown()
    self._server.server_close()


@pytest.fixture
def server(script):
  server = Server(script)
  yield server
  server.close()


def installed(root, dataset="pascal"):
  return {
    name.replace(f"/{dataset}/", "/"): text.encode()
    for name, text in LISTS.items()
    if f"/{dataset}/" in name
  }


def test_lists_are_fetched_through_faults(script, server, root, capsys):
  """A connection that breaks, a wrong content, an overloaded server."""
  server.faults = {
    "u2pl/pascal/92/unlabeled.txt": ["cut", "other"],
    "u2pl/pascal/val.txt": [503, "cut"],
  }
  code, _, err = run(
    script, capsys, "voc", "--root", root, "--base-url", server.url
  )
  # The lists are there, the images are not.
  assert code == 1 and "5 of 5 training images are missing" in err
  assert files_below(root / "splits") == installed(root)
  assert server.served.count("u2pl/pascal/val.txt") == 3

  before = len(server.served)
  run(script, capsys, "voc", "--root", root, "--base-url", server.url)
  assert len(server.served) == before


@pytest.mark.parametrize(
  ("faults", "message", "requests"),
  [
    (["cut"] * 3, "IncompleteRead", 3),
    (["other"] * 3, "its SHA-256 is", 3),
    ([404], "404 Not Found", 1),
  ],
)
def test_a_list_that_cannot_be_had(
  script, server, root, capsys, faults, message, requests
):
  name = "u2pl/pascal/92/labeled.txt"
  server.faults = {name: list(faults)}
  code, _, err = run(
    script, capsys, "voc", "--root", root, "--base-url", server.url
  )
  assert code == 1 and message in err
  assert "pascal/92/labeled.txt" in err and "--splits-from" in err
  assert server.served.count(name) == requests
  # What came before stays, the rest is fetched the next time.
  before = files_below(root / "splits")
  assert f"{name.replace('/pascal', '')}" not in before and len(before) == 2
  server.served.clear()
  run(script, capsys, "voc", "--root", root, "--base-url", server.url)
  assert files_below(root / "splits") == installed(root)
  assert len(server.served) == len(installed(root)) - 2


def test_no_network(script, root, capsys):
  code, _, err = run(
    script, capsys, "voc", "--root", root, "--base-url", "http://127.0.0.1:9"
  )
  assert code == 1 and "refused" in err and "--splits-from" in err


# -- Lists from a folder -------------------------------------------------------


def test_lists_from_a_clone_of_one_repository(
  script, lists, archives, root, tmp_path, capsys
):
  clone = tmp_path / "clone"
  (clone / "data").mkdir(parents=True)
  (lists / "u2pl").rename(clone / "data" / "splits")
  code, out, _ = run(
    script, capsys, "voc", "--root", root, "--splits-from", clone,
    "--archives", archives,
  )  # fmt: skip
  assert code == 0 and "lists of unimatch: not in" in out
  assert sorted(path.name for path in (root / "splits").iterdir()) == ["u2pl"]


def test_changed_list_in_the_folder(script, lists, root, capsys):
  (lists / "u2pl/pascal/92/labeled.txt").write_text("2007_000002")
  code, _, err = run(
    script, capsys, "voc", "--root", root, "--splits-from", lists
  )
  assert code == 1 and "92/labeled.txt: is not the published list" in err
  assert not (root / "splits/u2pl/92/labeled.txt").exists()


def test_changed_list_in_its_place(script, lists, root, capsys):
  place = root / "splits/u2pl/92/labeled.txt"
  place.parent.mkdir(parents=True)
  place.write_text("2007_000002")
  code, _, err = run(
    script, capsys, "voc", "--root", root, "--splits-from", lists
  )
  assert code == 1 and f"{place}: is not the published list" in err
  assert place.read_text() == "2007_000002"


def test_folder_without_lists(script, root, tmp_path, capsys):
  code, _, err = run(
    script, capsys, "voc", "--root", root, "--splits-from", tmp_path / "no"
  )
  assert code == 1 and "there is no such folder" in err
  (tmp_path / "empty").mkdir()
  code, _, err = run(
    script, capsys, "voc", "--root", root, "--splits-from", tmp_path / "empty"
  )
  assert code == 1 and "holds neither u2pl/pascal/" in err


# -- Archives ------------------------------------------------------------------


def expected_voc():
  images = {f"JPEGImages/{k.split('/')[-1]}": v for k, v in JPEGS.items()}
  return images | MASKS


def voc_files(root):
  return {k: v for k, v in files_below(root).items() if "splits" not in k}


def prepare_voc(script, capsys, root, lists, archives):
  return run(
    script, capsys, "voc", "--root", root, "--splits-from", lists,
    "--archives", archives,
  )  # fmt: skip


def test_voc_from_archives_to_complete(script, lists, archives, root, capsys):
  code, out, _ = prepare_voc(script, capsys, root, lists, archives)
  assert code == 0
  assert voc_files(root) == expected_voc()
  assert "training images: 5 of 5\nvalidation images: 2 of 2\n" in out
  assert "training masks: 5 of 5\nvalidation masks: 2 of 2\n" in out
  assert f"{root}: complete" in out

  times = {path: path.stat().st_mtime_ns for path in root.glob("*/*.*")}
  _, out, _ = prepare_voc(script, capsys, root, lists, archives)
  assert out.count("7 files, 0 of them new") == 2
  assert times == {path: path.stat().st_mtime_ns for path in root.glob("*/*.*")}


def test_what_is_missing_is_named(script, lists, archives, root, capsys):
  prepare_voc(script, capsys, root, lists, archives)
  (root / "JPEGImages/2009_000007.jpg").unlink()
  for id in TRAINING[1:]:
    (root / f"SegmentationClassAug/{id}.png").write_bytes(b"")
  code, out, err = run(
    script, capsys, "voc", "--root", root, "--splits-from", lists
  )
  assert code == 1
  assert "1 of 2 validation images are missing or empty, for example" in err
  assert "JPEGImages/2009_000007.jpg: give --archives" in err
  assert "VOCtrainval_11-May-2012.tar, from http://host.robots.ox.ac.uk" in err
  assert (
    "also: "
    f"{root}: 4 of 5 training masks are missing or empty, for example"
    " SegmentationClassAug/2007_000002.png, SegmentationClassAug/2008_000003"
    ".png, SegmentationClassAug/2008_000004.png, ...: give --archives a folder"
    " with SegmentationClassAug.zip"
  ) in out
  # All lists need the validation image.
  assert "splits that can be used as it is: none" in out

  (root / "JPEGImages/2009_000007.jpg").write_bytes(image_bytes(0))
  _, out, _ = run(script, capsys, "voc", "--root", root, "--splits-from", lists)
  assert "splits that can be used as it is: u2pl/92\n" in out
  # The archives put it right.
  code, _, _ = prepare_voc(script, capsys, root, lists, archives)
  assert code == 0 and voc_files(root) == expected_voc()


@pytest.mark.parametrize("kind", ["tar", "zip"])
# The last one cuts the header of a member.
@pytest.mark.parametrize("share", [0.5, 0.97, 1.0])
def test_download_that_stopped(
  script, lists, archives, root, capsys, kind, share
):
  """Cut anywhere: one line, nothing broken, and the whole one completes it."""
  name = {
    "tar": "VOCtrainval_11-May-2012.tar",
    "zip": "SegmentationClassAug.zip",
  }[kind]
  path, whole = archives / name, (archives / name).read_bytes()
  last = whole.rindex(b".jpg" if kind == "tar" else b".png")
  path.write_bytes(whole[: int(last * share)])
  code, _, err = prepare_voc(script, capsys, root, lists, archives)
  assert code == 1 and f"{path}: broken after" in err
  assert "download it again from" in err
  expected = expected_voc()
  for name, data in voc_files(root).items():
    assert name.endswith(".part") or data == expected[name]
  path.write_bytes(whole)
  code, _, _ = prepare_voc(script, capsys, root, lists, archives)
  assert code == 0
  files = voc_files(root)
  assert {k: files[k] for k in expected} == expected


def test_flipped_bit_in_a_zip(script, lists, archives, root, capsys):
  path = archives / "SegmentationClassAug.zip"
  data = bytearray(path.read_bytes())
  begin = data.index(b"SegmentationClassAug/2008_000004.png") + 60
  data[begin] ^= 8
  path.write_bytes(data)
  code, _, err = prepare_voc(script, capsys, root, lists, archives)
  assert code == 1 and f"{path}: broken after 4 files" in err
  assert not (root / "SegmentationClassAug/2008_000004.png").exists()


def test_members_cannot_leave_the_folder(script, archives, root, tmp_path):
  path = archives / "evil.zip"
  write_zip(
    path,
    {
      "../../leftImg8bit/train/../../../x/y_leftImg8bit.png": b"x",
      "leftImg8bit/train/../y_leftImg8bit.png": b"x",
      "/leftImg8bit/train/ulm/y_leftImg8bit.png": b"fine",
    },
  )
  script.unpack(script.DATA_SETS["cityscapes"].archives[0], path, root)
  assert files_below(tmp_path / "data") == {
    "leftImg8bit/train/ulm/y_leftImg8bit.png": b"fine"
  }


def test_other_archives(script, lists, archives, root, tmp_path, capsys):
  (tmp_path / "none").mkdir()
  _, _, err = prepare_voc(script, capsys, root, lists, tmp_path / "none")
  assert "holds neither VOCtrainval_11-May-2012.tar or Segm" in err
  write_tar(archives / "VOCtrainval_11-May-2012.tar", {"a/b.jpg": b"x"})
  _, _, err = prepare_voc(script, capsys, root, lists, archives)
  assert "holds no file like" in err
  (archives / "VOCtrainval_11-May-2012.tar").write_text("<html>busy</html>")
  _, _, err = prepare_voc(script, capsys, root, lists, archives)
  assert "broken after 0 files" in err


def test_cityscapes(script, lists, root, tmp_path, capsys):
  """Only what training needs is unpacked; either kind of masks will do."""
  downloads = tmp_path / "downloads"
  stems = [
    "train/ulm/ulm_000001_000019",
    "train/ulm/ulm_000002_000019",
    "train/bonn/bonn_000003_000019",
    "val/lindau/lindau_000004_000019",
  ]
  write_zip(
    downloads / "leftImg8bit_trainvaltest.zip",
    {f"leftImg8bit/{s}_leftImg8bit.png": image_bytes(0, "PNG") for s in stems}
    | {"leftImg8bit/test/berlin/berlin_000005_000019_leftImg8bit.png": b"x"},
  )
  kinds = ("labelIds", "instanceIds", "color")
  write_zip(
    downloads / "gtFine_trainvaltest.zip",
    {
      f"gtFine/{s}_gtFine_{kind}.png": mask_bytes(7, 8)
      for s in stems
      for kind in kinds
    },
  )
  arguments = ("cityscapes", "--root", root, "--splits-from", lists)
  code, out, _ = run(script, capsys, *arguments, "--archives", downloads)
  assert code == 0 and "training masks: 3 of 3" in out
  assert len([f for f in files_below(root) if "splits" not in f]) == 8
  for path in root.rglob("*_labelIds.png"):
    path.rename(str(path).replace("labelIds", "labelTrainIds"))
  code, out, _ = run(script, capsys, *arguments)
  assert code == 0
  assert "--config.dataset.mask_suffix=_gtFine_labelTrainIds.png" in out


def test_killed_while_unpacking(tmp_path):
  """SIGKILL among the files of an archive: whole files, and it goes on."""
  files = {
    f"JPEGImages/{i:06d}.jpg": bytes([i % 251]) * 20_000 for i in range(400)
  }
  archive, target = tmp_path / "VOCtrainval.tar", tmp_path / "data"
  write_tar(archive, files)
  code = (
    "import importlib.util, pathlib, sys\n"
    f"spec = importlib.util.spec_from_file_location('p', {str(SCRIPT)!r})\n"
    "p = importlib.util.module_from_spec(spec)\n"
    "sys.modules['p'] = p\n"
    "spec.loader.exec_module(p)\n"
    f"p.unpack(p.DATA_SETS['voc'].archives[0], pathlib.Path({str(archive)!r}),"
    f" pathlib.Path({str(target)!r}))\n"
  )
  process = subprocess.Popen([sys.executable, "-c", code])
  folder = target / "JPEGImages"
  deadline = time.monotonic() + 30
  while len(list(folder.glob("*.jpg"))) < 20:
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.001)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  there = {
    name: data
    for name, data in files_below(target).items()
    if not name.endswith(".part")
  }
  assert 20 <= len(there) < 400
  assert all(files[name] == data for name, data in there.items())
  subprocess.run([sys.executable, "-c", code], check=True)
  found = files_below(target)
  assert {name: found[name] for name in files} == files


def test_interrupted_between_two_bytes(
  script, lists, archives, root, capsys, monkeypatch
):
  def copy(source, file):
    file.write(source.read()[:100])
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(script.shutil, "copyfileobj", copy)
    code, _, err = prepare_voc(script, capsys, root, lists, archives)
  assert code == 130 and "run it again to go on" in err
  assert list(voc_files(root)) == ["JPEGImages/2007_000001.jpg.part"]
  code, _, _ = prepare_voc(script, capsys, root, lists, archives)
  assert code == 0 and voc_files(root) == expected_voc()


def test_two_at_once(script, lists, root, capsys):
  root.mkdir()
  with script.only_one(root):
    code, _, err = run(
      script, capsys, "voc", "--root", root, "--splits-from", lists
    )
  assert code == 1 and "another prepare_data.py works here" in err


# -- New lists -----------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
  """12 images; class 2 is in two of them only, and 255 is no class."""
  root = tmp_path / "own"
  (root / "masks").mkdir(parents=True)
  for i in range(12):
    values = (0, 1 if i % 2 else 0, 2 if i in (4, 9) else 0, 255)
    (root / f"masks/im{i:02d}.png").write_bytes(mask_bytes(*values))
  (root / "all.txt").write_text("".join(f"im{i:02d}\n" for i in range(12)))
  return root


def draw(script, capsys, root, *arguments):
  return run(
    script, capsys, "folder", "--root", root, "--ids", "all.txt", *arguments
  )


def test_new_list_of_own_images(script, own, capsys):
  for seed in range(4):
    code, out, _ = draw(
      script, capsys, own, "--num-labelled", 3, "--seed", seed
    )
    assert code == 0
    folder = own / f"splits/own/3_seed{seed}"
    labelled = read_split(folder / "labeled.txt")
    unlabelled = read_split(folder / "unlabeled.txt")
    assert len(labelled) == 3 and len(unlabelled) == 9
    assert not set(labelled) & set(unlabelled)
    assert set(labelled) & {"im04", "im09"}
    assert any(int(id[2:]) % 2 for id in labelled)
    assert (
      f"--config.dataset.labelled_list=splits/own/3_seed{seed}/labeled.txt"
      in out
    )
  lists = {
    (own / f"splits/own/3_seed{seed}/labeled.txt").read_text()
    for seed in range(4)
  }
  assert len(lists) > 1


def test_the_same_again_is_fine_and_another_is_not(script, own, capsys):
  draw(script, capsys, own, "--num-labelled", 3)
  before = files_below(own / "splits")
  assert draw(script, capsys, own, "--num-labelled", 3)[0] == 0
  assert files_below(own / "splits") == before
  (own / "masks/im00.png").write_bytes(mask_bytes(3))
  code, _, err = draw(script, capsys, own, "--num-labelled", 3)
  assert code == 1 and "3_seed0: holds another split" in err
  assert files_below(own / "splits") == before
  arguments = ("--num-labelled", 3, "--name", "again")
  assert draw(script, capsys, own, *arguments)[0] == 0


def test_new_list_of_voc(script, lists, archives, root, capsys):
  prepare_voc(script, capsys, root, lists, archives)
  # 5 of the 21 classes at most are in these masks.
  code, _, err = run(script, capsys, "voc", "--root", root, "--num-labelled", 2)
  assert code == 1 and "class 5 is in none of the 5 masks" in err
  for i, id in enumerate(TRAINING):
    values = range(5 * i, min(5 * i + 5, 21))
    path = root / f"SegmentationClassAug/{id}.png"
    path.write_bytes(mask_bytes(*values, 255))
  code, _, err = run(script, capsys, "voc", "--root", root, "--num-labelled", 4)
  assert code == 1 and "no 4 images show all 21 classes: ask for more" in err
  # Drawn from the classic list, all other training images are unlabelled.
  (root / f"SegmentationClassAug/{TRAINING[0]}.png").write_bytes(
    mask_bytes(*range(21))
  )
  (root / f"SegmentationClassAug/{TRAINING[1]}.png").write_bytes(mask_bytes(0))
  code, out, _ = run(
    script, capsys, "voc", "--root", root, "--num-labelled", 1,
    "--ids", "splits/u2pl/1464/labeled.txt",
  )  # fmt: skip
  assert code == 0 and ":split=own/1_seed0 " in out
  folder = root / "splits/own/1_seed0"
  assert read_split(folder / "labeled.txt") == (TRAINING[0],)
  assert read_split(folder / "unlabeled.txt") == tuple(TRAINING[1:])


def test_new_list_of_cityscapes_from_label_ids(script, root, lists, capsys):
  """19 classes by their label ids; all other ids are no class."""
  run(script, capsys, "cityscapes", "--root", root, "--splits-from", lists)
  # In the order of the train ids (cityscapesScripts, labels.py).
  label_ids = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28)
  label_ids += (31, 32, 33)
  folder = root / "gtFine/train"
  for stem, values in (
    ("ulm/ulm_000001_000019", label_ids[:10]),
    ("ulm/ulm_000002_000019", label_ids[10:]),
    ("bonn/bonn_000003_000019", (0, 1, 6, 9, 30)),
  ):
    path = folder / f"{stem}_gtFine_labelIds.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(mask_bytes(*values))
  code, _, _ = run(
    script, capsys, "cityscapes", "--root", root, "--num-labelled", 2
  )
  assert code == 0
  assert read_split(root / "splits/own/2_seed0/labeled.txt") == (
    "train/ulm/ulm_000001_000019",
    "train/ulm/ulm_000002_000019",
  )


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--num-labelled", 0], "--num-labelled=0: must be between 1 and 11"),
    (["--num-labelled", 12], "--num-labelled=12: must be between 1 and 11"),
    (["--num-labelled", 1], "no 1 images show all 3 classes"),
    (["--num-labelled", 3, "--seed", -1], "--seed=-1"),
    (["--num-labelled", 3, "--masks", "masks/x.png"], "needs {id} in place"),
    (
      ["--num-labelled", 3, "--masks", "no/{id}.png"],
      "im00.png: mask not found",
    ),
    ([], "nothing to fetch or to count for folder"),
  ],
)
def test_lists_that_cannot_be_drawn(script, own, capsys, arguments, message):
  # Images 1, 3, ... hold classes 0 and 1; 9 alone would show all three.
  (own / "masks/im09.png").write_bytes(mask_bytes(0))
  code, _, err = draw(script, capsys, own, *arguments)
  assert code == 1 and message in err
  assert not (own / "splits").exists()


def test_masks_that_are_no_index_masks(script, own, capsys):
  Image.new("RGB", (4, 4)).save(own / "masks/im03.png")
  code, _, err = draw(script, capsys, own, "--num-labelled", 3)
  assert code == 1 and "im03.png: the mask holds colours (RGB)" in err
  (own / "masks/im03.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
  code, _, err = draw(script, capsys, own, "--num-labelled", 3)
  assert code == 1 and "im03.png: the mask cannot be decoded" in err
