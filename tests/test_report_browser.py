"""The pages in a real browser, without a window and without a network."""

import json
import os
import pathlib
import shutil
import subprocess

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from tests.report_runs import (
  IGNORE,
  INFO,
  flat_sample,
  method_sample,
  metric_rows,
  pictures,
  sample,
  write_evaluation,
  write_run,
)
from u2pl_jax import report

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_PHONE, _DESK = 375, 1366


def _missing() -> str:
  """Why there is no browser to drive here; empty if there is one."""
  browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
  if browser is None:
    return f"no browser found (looked for {', '.join(_BROWSERS)})"
  if shutil.which("chromedriver") is None:
    return f"{browser} is installed, but chromedriver, which drives it, is not"
  return ""


pytestmark = pytest.mark.skipif(bool(_missing()), reason=_missing())


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
  """(page of a U2PL run, page of the comparison with a supervised one)."""
  root = tmp_path_factory.mktemp("runs")
  u2pl = write_run(root / "u2pl", metric_rows(gain=0.1))
  write_evaluation(u2pl)
  samples = [
    flat_sample("no coin", 0),
    sample("all classes"),
    flat_sample("only coin", 2),
  ]
  method = [method_sample("street"), method_sample("field")]
  page = report.write_report(
    u2pl, pictures(samples, method), INFO, IGNORE, labelled_pixels=[5, 3, 2]
  )
  base = write_run(root / "base", metric_rows(semi=False), name="base")
  return page, report.write_comparison([base, u2pl], root / "comparison")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  options = webdriver.ChromeOptions()
  options.binary_location = next(filter(None, map(shutil.which, _BROWSERS)))
  profile = tmp_path_factory.mktemp("profile")
  for argument in (
    "--headless=new",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--hide-scrollbars",
    f"--user-data-dir={profile}",
    # Where a page asked for a host in spite of all, it would find none.
    "--host-resolver-rules=MAP * ~NOTFOUND",
    # Refused to root otherwise.
    *(["--no-sandbox"] if os.geteuid() == 0 else []),
  ):
    options.add_argument(argument)
  options.set_capability(
    "goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"}
  )
  # The driver talks to the browser over this machine's own address.
  service = Service(shutil.which("chromedriver"), log_output=subprocess.DEVNULL)
  driver = webdriver.Chrome(options=options, service=service)
  yield driver
  driver.quit()


def _set_view(browser, *, width=_DESK, scheme="light"):
  browser.execute_cdp_cmd(
    "Emulation.setDeviceMetricsOverride",
    {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
  )
  browser.execute_cdp_cmd(
    "Emulation.setEmulatedMedia",
    {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
  )


def _wait(browser, condition):
  return WebDriverWait(browser, 15, 0.05).until(lambda _: condition())


def _drawn(browser, scheme="light"):
  """Elements of the figures, once all are drawn."""
  figures = browser.find_elements(By.CLASS_NAME, "plot")
  script = "return arguments[0].every(e => e.dataset.drawn === arguments[1])"
  _wait(browser, lambda: browser.execute_script(script, figures, scheme))
  return figures


def _open(browser, page: pathlib.Path, **view):
  _set_view(browser, **view)
  for kind in ("browser", "performance"):
    browser.get_log(kind)
  browser.get(page.as_uri())
  return _drawn(browser, view.get("scheme", "light"))


def _requests(browser) -> list[str]:
  """Addresses that the page asked for since it was opened."""
  messages = [
    json.loads(entry["message"])["message"]
    for entry in browser.get_log("performance")
  ]
  return [
    message["params"]["request"]["url"]
    for message in messages
    if message["method"] == "Network.requestWillBeSent"
  ]


def _shown(browser) -> list[str]:
  """Names of the validation images that are to be seen, in their order."""
  headings = browser.find_elements(By.CSS_SELECTOR, "[data-classes] h3")
  return [heading.text for heading in headings if heading.is_displayed()]


def test_page_loads_clean_and_offline(browser, pages):
  for page in pages:
    figures = _open(browser, page)
    assert len(figures) >= 5
    for figure in figures:
      # An axis and marks: what is drawn, not only a frame.
      script = (
        "const count = (s) => arguments[0].querySelectorAll(s).length;"
        "return count('.xtick') *"
        " count('path.js-line, .bars .point, .heatmaplayer image')"
      )
      assert browser.execute_script(script, figure) > 0, figure.get_attribute(
        "id"
      )
      assert len(figure.get_attribute("aria-label")) > 20
    assert browser.get_log("browser") == []
    requests = _requests(browser)
    folder = page.parent.as_uri()
    outside = [
      url for url in requests if not url.startswith((folder, "data:", "blob:"))
    ]
    assert outside == []
    assert f"{folder}/plotly.min.js" in requests
    broken = browser.execute_script(
      "return [...document.images].filter(i => !i.naturalWidth).length"
    )
    assert broken == 0


def test_hover_shows_the_values(browser, pages):
  _open(browser, pages[0])
  figure = browser.find_element(By.ID, "figure-miou")
  # The second evaluation, where the best one is: two thirds along the axis.
  place = browser.execute_script(
    """
    const [figure] = arguments;
    figure.scrollIntoView({block: "center"});
    const {xaxis} = figure._fullLayout;
    const box = figure.getBoundingClientRect();
    return [box.left + xaxis._offset + xaxis.d2p(80), box.top + 150];
    """,
    figure,
  )
  browser.execute_cdp_cmd(
    "Input.dispatchMouseEvent",
    {"type": "mouseMoved", "x": place[0], "y": place[1]},
  )
  text = _wait(
    browser,
    lambda: browser.execute_script(
      "return arguments[0].querySelector('.hoverlayer').textContent", figure
    ),
  )
  for part in ("step 80", "mIoU : 70.00%", "pixel accuracy : 90.00%"):
    assert part in text


def test_arrow_keys_read_the_values(browser, pages):
  _open(browser, pages[0])
  live = browser.find_element(By.ID, "live")
  figure = browser.find_element(By.ID, "figure-miou")
  figure.send_keys(Keys.ARROW_RIGHT)
  said = live.get_attribute("textContent")
  assert said == "40: mIoU 0.5, pixel accuracy 0.7"

  def wait_for(text, element):
    script = "return arguments[0].querySelector('.hoverlayer').textContent"
    _wait(browser, lambda: text in browser.execute_script(script, element))

  wait_for("50.00%", figure)
  figure.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
  assert live.get_attribute("textContent").startswith("120: ")
  confusion = browser.find_element(By.ID, "figure-confusion")
  confusion.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
  said = live.get_attribute("textContent")
  assert said == "leaf & <twig>, ground: 30"
  wait_for("30.0%: 30 pixels", confusion)
  assert browser.get_log("browser") == []


def test_filter_and_order_of_the_images(browser, pages):
  _open(browser, pages[0])
  assert _shown(browser) == ["no coin", "all classes", "only coin"]
  by_class = browser.find_element(By.CSS_SELECTOR, "[data-filter]")
  select = Select(by_class)
  assert [option.text for option in select.options] == [
    "any",
    "ground (2)",
    "leaf & <twig> (1)",
    "coin (2)",
  ]
  select.select_by_visible_text("coin (2)")
  assert _shown(browser) == ["all classes", "only coin"]
  status = browser.find_element(By.CSS_SELECTOR, "[role=status]")
  assert status.text == "2 of 3 images"
  order = Select(browser.find_element(By.CSS_SELECTOR, "[data-sort]"))
  order.select_by_visible_text("mIoU, highest first")
  assert _shown(browser) == ["only coin", "all classes"]
  order.select_by_visible_text("mIoU, lowest first")
  assert _shown(browser) == ["all classes", "only coin"]
  # With the keyboard alone, from 'coin' two options up.
  by_class.send_keys(Keys.ARROW_UP, Keys.ARROW_UP)
  assert _shown(browser)[0] == "all classes" and "no coin" in _shown(browser)
  assert browser.get_log("browser") == []


def test_negatives_of_a_class(browser, pages):
  _open(browser, pages[0])
  image = browser.find_element(By.CLASS_NAME, "tiles-image")

  def tile():
    style = "return getComputedStyle(arguments[0]).backgroundPositionY"
    return browser.execute_script(style, image)

  # The class with most negatives comes first: the last of three tiles.
  assert tile() == "100%"
  assert image.get_attribute("aria-label") == (
    "100.0 % of the unreliable pixels are negatives of coin"
  )
  select = Select(browser.find_element(By.CSS_SELECTOR, "[data-negatives]"))
  select.select_by_visible_text("leaf & <twig>")
  assert tile() == "50%"
  assert "50.0 %" in image.get_attribute("aria-label")


def test_colours_over_the_image(browser, pages):
  _open(browser, pages[0])
  slider = browser.find_element(By.CSS_SELECTOR, "#images [data-opacity]")
  layer = browser.find_element(By.CSS_SELECTOR, "#images .over")
  assert layer.value_of_css_property("opacity") == "0.65"
  slider.send_keys(Keys.HOME)
  assert layer.value_of_css_property("opacity") == "0"


def test_theme_follows_the_reader(browser, pages):
  figures = _open(browser, pages[0])
  script = """
    const [figure] = arguments;
    const label = figure.querySelector(".xtick text");
    return [
      getComputedStyle(document.body).backgroundColor,
      getComputedStyle(label).fill,
      getComputedStyle(figure.querySelector("path.js-line")).stroke,
    ];
  """
  light = browser.execute_script(script, figures[0])
  _set_view(browser, scheme="dark")
  _drawn(browser, "dark")
  dark = browser.execute_script(script, figures[0])
  assert all(a != b for a, b in zip(light, dark, strict=True))
  assert dark[0] == "rgb(17, 20, 24)" and dark[2] == "rgb(111, 177, 255)"


@pytest.mark.parametrize("which", [0, 1])
def test_phone(browser, pages, which):
  """No sideways scrolling of the page, and nothing cut off."""
  figures = _open(browser, pages[which], width=_PHONE)
  script = "return document.documentElement.scrollWidth"
  assert browser.execute_script(script) <= _PHONE
  for figure in figures:
    assert figure.rect["x"] >= 0
    assert figure.rect["x"] + figure.rect["width"] <= _PHONE
    assert figure.rect["width"] > 0.75 * _PHONE


def test_what_has_a_use_can_be_reached_with_the_tab_key(browser, pages):
  _open(browser, pages[0])
  body = browser.find_element(By.TAG_NAME, "body")
  reached = []
  body.send_keys(Keys.TAB)
  for _ in range(60):
    name = browser.execute_script(
      "const e = document.activeElement;"
      "return e.id || Object.keys(e.dataset)[0] || e.tagName"
    )
    if reached and name == "BODY":
      break
    reached.append(name)
    browser.switch_to.active_element.send_keys(Keys.TAB)
  figures = {
    figure.get_attribute("id")
    for figure in browser.find_elements(By.CLASS_NAME, "plot")
  }
  assert figures | {"filter", "sort", "opacity", "negatives"} <= set(reached)


def test_a_page_without_plotly_says_so(browser, pages, tmp_path):
  page = tmp_path / "index.html"
  page.write_text(pages[1].read_text())
  browser.get(page.as_uri())
  notice = browser.find_element(By.ID, "no-plotly")
  assert notice.is_displayed() and "plotly.min.js" in notice.text
