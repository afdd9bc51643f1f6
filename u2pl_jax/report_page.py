"""The HTML of a report: one text that opens from a file, without a network.

Style and script stand in the page; pictures and plotly.min.js lie beside it.
Every function here takes values and returns text.
"""

import dataclasses
import html
import math
import pathlib
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from u2pl_jax.report_figures import Figure
from u2pl_jax.report_images import KINDS, WRONG

PLOTLY_FILE = "plotly.min.js"
_FOLDER = pathlib.Path(__file__).parent
_GROUPS = {
  "best": "best",
  "median": "median",
  "worst": "worst",
  "first": "of the list",
}
# Width to height above which five pictures in a row are too small to see.
_BROAD = 1.7


def escape(value: Any) -> str:
  """Text for HTML, also inside attributes."""
  return html.escape(str(value), quote=True)


def percent(value: float | None) -> str:
  """A share in percent with two digits, a dash for None."""
  return "–" if value is None else f"{100 * value:.2f}"


def page(title: str, body: Sequence[str]) -> str:
  """A complete page.

  Args:
    title: of the window.
    body: elements, in order.
  """
  css = (_FOLDER / "report_page.css").read_text(encoding="utf-8")
  script = (_FOLDER / "report_page.js").read_text(encoding="utf-8")
  return "\n".join(
    [
      "<!doctype html>",
      '<html lang="en">',
      "<head>",
      '<meta charset="utf-8">',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      '<link rel="icon" href="data:,">',
      f"<title>{escape(title)}</title>",
      f"<style>\n{css}</style>",
      "</head>",
      "<body>",
      *body,
      '<div id="live" class="quiet" aria-live="polite"></div>',
      f'<script src="{PLOTLY_FILE}"></script>',
      f"<script>\n{script}</script>",
      "</body>",
      "</html>",
      "",
    ]
  )


def no_script_notice() -> str:
  """Shown without JavaScript, or without plotly beside the page."""
  text = (
    "The figures are drawn with JavaScript{}; the numbers are also in"
    " metrics.jsonl."
  )
  return (
    f'<noscript><p class="card notice">{text.format("")}</p></noscript>'
    f'<p id="no-plotly" class="card notice" hidden>'
    f"{text.format(f' by {PLOTLY_FILE}, which is missing beside this page')}"
    "</p>"
  )


def navigation(sections: Sequence[tuple[str, str]]) -> str:
  """Links to (id, title) of sections."""
  items = "".join(
    f'<li><a href="#{name}">{escape(title)}</a></li>'
    for name, title in sections
  )
  return f'<nav aria-label="Sections"><ul>{items}</ul></nav>'


def section(name: str, title: str, parts: Sequence[str], note: str = "") -> str:
  """A section with a heading; empty without parts."""
  if not any(parts):
    return ""
  lead = f'<p class="muted">{escape(note)}</p>' if note else ""
  return (
    f'<section id="{name}" aria-labelledby="{name}-title">'
    f'<h2 id="{name}-title">{escape(title)}</h2>{lead}'
    + "\n".join(parts)
    + "</section>"
  )


def notice(text: str) -> str:
  """A line that must not be missed."""
  return f'<p class="card notice">{escape(text)}</p>'


def figure(figure: Figure) -> str:
  """The place that the script draws a figure into, and its data."""
  name = f"figure-{figure.stem}"
  caption = (
    f"<figcaption>{escape(figure.caption)}</figcaption>"
    if figure.caption
    else ""
  )
  return (
    f'<figure class="card{" wide" if figure.wide else ""}">'
    f"<h3>{escape(figure.title)}</h3>"
    f'<div class="plot" id="{name}" tabindex="0" role="img"'
    f' aria-label="{escape(figure.alt)}" style="height:{figure.height}px">'
    f"</div>{caption}"
    f'<script type="application/json" id="{name}-data">{figure.to_json()}'
    "</script></figure>"
  )


def figures(items: Sequence[Figure]) -> str:
  """Figures two in a row where there is room; a last single one is wide."""
  if not items:
    return ""
  if sum(not item.wide for item in items) % 2:
    items = [*items[:-1], dataclasses.replace(items[-1], wide=True)]
  return f'<div class="grid">{"".join(map(figure, items))}</div>'


def facts(items: Sequence[tuple[str, Any]]) -> str:
  """Names and values; those without a value are left out."""
  rows = "".join(
    f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
    for name, value in items
    if value not in (None, "")
  )
  return f'<dl class="card">{rows}</dl>' if rows else ""


def tiles(items: Sequence[tuple[str, str, str]]) -> str:
  """(label, value, note) as large numbers."""
  if not items:
    return ""
  cells = "".join(
    f'<div class="card"><span class="muted">{escape(label)}</span>'
    f"<strong>{escape(value)}</strong>"
    f'<span class="small muted">{escape(note)}</span></div>'
    for label, value, note in items
  )
  return f'<div class="tiles">{cells}</div>'


def code(text: str) -> str:
  """A command or a file, to copy."""
  return f'<pre tabindex="0">{escape(text)}</pre>'


def details(title: str, content: str) -> str:
  """Content that is folded away."""
  return (
    f'<details class="card"><summary>{escape(title)}</summary>{content}'
    "</details>"
  )


def advice(findings: Sequence[Any]) -> str:
  """What a person should know about this run, the worst first as given.

  Args:
    findings: each with the attributes title, evidence, advice and severity:
      'problem', 'warning' or 'hint'.
  """
  styles = {"problem": " notice bad", "warning": " notice"}
  return "".join(
    f'<div class="card finding{styles.get(item.severity, "")}">'
    f"<h3>{escape(item.title)}"
    f' <span class="badge">{escape(item.severity)}</span></h3>'
    f"<p>{escape(item.evidence)}</p><p>{escape(item.advice)}</p></div>"
    for item in findings
  )


def swatch(palette: Sequence[Sequence[int]], index: int) -> str:
  """The colour of a class as a small square; empty if there is none."""
  if index >= len(palette):
    return ""
  return _square(palette[index])


def _square(color: Sequence[int]) -> str:
  red, green, blue = (int(value) for value in color[:3])
  return (
    f'<span class="swatch" style="background:rgb({red},{green},{blue})"></span>'
  )


def table(
  head: Sequence[str],
  rows: Sequence[Sequence[str]],
  *,
  caption: str,
  label: str,
  foot: Sequence[Sequence[str]] = (),
) -> str:
  """A table that scrolls within itself; the first column names the rows.

  Args:
    head, rows, foot: cells as HTML.
    caption: of the table, as text.
    label: of the region, for those who do not see it.
  """

  def line(cells: Sequence[str]) -> str:
    first, *others = cells
    return (
      f'<tr><th scope="row">{first}</th>'
      + "".join(
        cell if cell.startswith("<td") else f"<td>{cell}</td>"
        for cell in others
      )
      + "</tr>"
    )

  heading = "".join(
    f'<th scope="col">{cell}</th>' if cell else "<td></td>" for cell in head
  )
  tail = f"<tfoot>{''.join(map(line, foot))}</tfoot>" if foot else ""
  return (
    f'<div class="card scroll" tabindex="0" role="region"'
    f' aria-label="{escape(label)}"><table>'
    f"<caption>{escape(caption)}</caption>"
    f"<thead><tr>{heading}</tr></thead>"
    f"<tbody>{''.join(map(line, rows))}</tbody>{tail}</table></div>"
  )


def bar_cell(value: float | None) -> str:
  """A table cell with a bar of length 0 to 1."""
  width = 0 if value is None else 100 * min(1.0, max(0.0, value))
  return (
    '<td class="bar" aria-hidden="true">'
    f'<span style="width:{width:.1f}%"></span></td>'
  )


# -- Pictures ------------------------------------------------------------------


def class_legend(names: Sequence[str], palette: Sequence[Sequence[int]]) -> str:
  """Colours of the classes, and of pixels without one."""
  items = "".join(
    f"<span>{swatch(palette, i)}{escape(name)}</span>"
    for i, name in enumerate(names)
  )
  items += '<span><span class="swatch ignored"></span>ignored</span>'
  return f'<div class="legend small">{items}</div>'


def _entropy_legend(num_classes: int) -> str:
  return (
    '<span>entropy 0<span class="ramp magma"></span>'
    f"{math.log(max(2, num_classes)):.2f} nats</span>"
  )


def _opacity_control() -> str:
  return (
    '<label>colours over the image<input type="range" min="0" max="100"'
    ' step="5" value="65" data-opacity></label>'
  )


def _layer(file: str, classes: str, alt: str) -> str:
  return (
    f'<img class="{classes}" src="{escape(urllib.parse.quote(file))}"'
    f' alt="{escape(alt)}">'
  )


def _panel(size: Sequence[int], caption: str, layers: Sequence[str]) -> str:
  return (
    f'<figure><div class="stack" style="aspect-ratio:{size[1]}/{size[0]}">'
    f"{''.join(layers)}</div><figcaption>{escape(caption)}</figcaption>"
    "</figure>"
  )


def _photo_class(entry: Mapping[str, Any]) -> str:
  """Small images are enlarged so that pixels can be told apart."""
  return "small-image" if max(entry["size"]) < 260 else "photo"


def _said_shares(shares: Sequence[float], names: Sequence[str]) -> str:
  """The largest classes of a mask in words."""
  order = sorted(range(len(shares)), key=lambda i: -shares[i])[:4]
  said = [f"{names[i]} {100 * shares[i]:.0f} %" for i in order if shares[i] > 0]
  return ", ".join(said) or "no class"


def validation_pictures(
  entries: Sequence[Mapping[str, Any]],
  names: Sequence[str],
  palette: Sequence[Sequence[int]],
) -> str:
  """Image, truth, prediction, error and entropy of each image, filterable.

  Args:
    entries: from `report_images.draw_pictures`.
    names, palette: of the classes.
  """
  if not entries:
    return ""
  present = [
    {
      i
      for i in range(len(names))
      if entry["truth_shares"][i] > 0 or entry["prediction_shares"][i] > 0
    }
    for entry in entries
  ]
  options = "".join(
    f'<option value="{i}">{escape(name)} ({count})</option>'
    for i, name in enumerate(names)
    if (count := sum(i in classes for classes in present))
  )
  orders = "".join(
    f'<option value="{value}">{text}</option>'
    for value, text in (
      ("place:1", "best, median, worst"),
      ("miou:-1", "mIoU, highest first"),
      ("miou:1", "mIoU, lowest first"),
      ("entropy:-1", "entropy, highest first"),
    )
  )
  controls = (
    '<div class="controls"><label>with class<select data-filter>'
    f'<option value="">any</option>{options}</select></label>'
    f"<label>order<select data-sort>{orders}</select></label>"
    f"{_opacity_control()}"
    '<span class="muted" role="status"></span></div>'
  )
  legend = (
    f'<div class="legend small">{_entropy_legend(len(names))}'
    f"<span>{_square(WRONG)}wrong</span></div>"
  )
  cards = [
    _validation_picture(entry, place, sorted(classes), names)
    for place, (entry, classes) in enumerate(zip(entries, present, strict=True))
  ]
  return (
    f"<div data-pictures>{controls}{class_legend(names, palette)}{legend}"
    f'<div class="pictures">{"".join(cards)}</div></div>'
  )


def _validation_picture(
  entry: Mapping[str, Any],
  place: int,
  classes: Sequence[int],
  names: Sequence[str],
) -> str:
  files, size = entry["files"], entry["size"]
  photo = _photo_class(entry)
  miou, entropy = entry["miou"], entry["mean_entropy"]
  said = (
    "no labelled pixel"
    if miou is None
    else f"mIoU {percent(miou)} %, {100 * entry['accuracy']:.1f} % of the"
    " labelled pixels right"
  )
  said += f", mean entropy {entropy:.2f} nats"
  image = _layer(files["image"], photo, f"image {entry['id']}")
  below = _layer(files["image"], photo, "")
  wrong = (
    "no labelled pixel"
    if miou is None
    else f"{100 * (1 - entry['accuracy']):.1f} % of the labelled pixels wrong"
  )
  panels = [
    _panel(size, "image", [image]),
    _panel(
      size,
      "truth",
      [
        below,
        _layer(
          files["truth"],
          "over",
          f"truth: {_said_shares(entry['truth_shares'], names)}",
        ),
      ],
    ),
    _panel(
      size,
      "prediction",
      [
        below,
        _layer(
          files["prediction"],
          "over",
          f"prediction: {_said_shares(entry['prediction_shares'], names)}",
        ),
      ],
    ),
    _panel(
      size,
      "error",
      [
        _layer(files["image"], f"{photo} dim", ""),
        _layer(files["error"], "over", f"error: {wrong}"),
      ],
    ),
    _panel(
      size,
      "entropy",
      [_layer(files["entropy"], photo, f"entropy: {entropy:.2f} nats on mean")],
    ),
  ]
  group = _GROUPS[entry["group"]]
  broad = " broad" if size[1] > _BROAD * size[0] else ""
  return (
    f'<article class="card picture" data-place="{place}"'
    f' data-miou="{"" if miou is None else f"{miou:.6f}"}"'
    f' data-entropy="{entropy:.6f}"'
    f' data-classes="{" ".join(map(str, classes))}">'
    f"<header><h3>{escape(entry['id'])}</h3>"
    f'<span class="badge">{group}</span>'
    f'<span class="small muted">{escape(said)}</span></header>'
    f'<div class="panels{broad}">{"".join(panels)}</div></article>'
  )


def method_pictures(
  pictures: Mapping[str, Any],
  names: Sequence[str],
  palette: Sequence[Sequence[int]],
) -> str:
  """Unlabelled images: what is taught, what is not, what that is used for.

  Args:
    pictures: from `report_images.draw_pictures`.
    names, palette: of the classes.
  """
  entries = pictures.get("method") or []
  if not entries:
    return ""
  alpha = pictures["alpha"]
  kinds = {
    "reliable": f"reliable: the {alpha:.1f} % of lowest entropy; taught, and"
    " anchors",
    "kept": "taught only",
    "unreliable": f"unreliable: the {alpha:.1f} % of highest entropy; not"
    " taught, negatives",
  }
  legend = "".join(
    f"<span>{_square(KINDS[name])}{escape(text)}</span>"
    for name, text in kinds.items()
  )
  # The class with most negatives says most at first sight.
  total = [
    sum(entry["negative_shares"][i] for entry in entries)
    for i in range(len(names))
  ]
  first = total.index(max(total))
  options = "".join(
    f'<option value="{i}"{" selected" if i == first else ""}>{escape(name)}'
    "</option>"
    for i, name in enumerate(names)
  )
  controls = (
    '<div class="controls"><label>negatives of<select data-negatives>'
    f"{options}</select></label>{_opacity_control()}</div>"
  )
  ramps = (
    f'<div class="legend small">{_entropy_legend(len(names))}'
    '<span>negative of few<span class="ramp viridis"></span>many classes'
    "</span></div>"
  )
  cards = "".join(_method_picture(entry, names) for entry in entries)
  return (
    f"<div data-method>{controls}{class_legend(names, palette)}"
    f'<div class="legend small">{legend}</div>{ramps}'
    f'<div class="pictures">{cards}</div></div>'
  )


def _method_picture(entry: Mapping[str, Any], names: Sequence[str]) -> str:
  files, size, shares = entry["files"], entry["size"], entry["shares"]
  photo = _photo_class(entry)
  below = _layer(files["image"], photo, "")
  dim = _layer(files["image"], f"{photo} dim", "")
  kinds = ", ".join(f"{name} {100 * v:.1f} %" for name, v in shares.items())
  tiles_url = urllib.parse.quote(files["negatives"])
  negatives = (
    '<div class="tiles-image over" role="img" aria-label="negatives"'
    f' data-shares="{" ".join(f"{v:.4f}" for v in entry["negative_shares"])}"'
    f" style=\"background-image:url('{escape(tiles_url)}');"
    f'background-size:100% {100 * len(names)}%"></div>'
  )
  panels = [
    _panel(
      size, "image", [_layer(files["image"], photo, f"image {entry['id']}")]
    ),
    _panel(
      size,
      "pseudo labels",
      [
        below,
        _layer(
          files["pseudo_labels"],
          "over",
          f"pseudo labels: {_said_shares(entry['pseudo_shares'], names)}",
        ),
      ],
    ),
    _panel(
      size,
      "entropy",
      [
        _layer(
          files["entropy"],
          photo,
          f"entropy: {entry['mean_entropy']:.2f} nats on mean",
        )
      ],
    ),
    _panel(
      size, kinds, [dim, _layer(files["kinds"], "over", f"pixels: {kinds}")]
    ),
    _panel(
      size,
      f"negative of up to {entry['max_negatives']} classes",
      [
        dim,
        _layer(
          files["negative_counts"],
          "over",
          "number of classes that a pixel is a negative of: up to"
          f" {entry['max_negatives']}",
        ),
      ],
    ),
    _panel(size, "negatives", [dim, negatives]),
  ]
  broad = " broad" if size[1] > _BROAD * size[0] else ""
  return (
    f'<article class="card picture"><header><h3>{escape(entry["id"])}</h3>'
    f'</header><div class="panels six{broad}">{"".join(panels)}</div></article>'
  )
