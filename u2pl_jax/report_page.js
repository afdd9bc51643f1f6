"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const live = document.getElementById("live");

  // -- Figures ---------------------------------------------------------------

  // A string that begins with -- is a CSS variable, the colour of the theme.
  function themed(value, css) {
    if (typeof value === "string") {
      return value.startsWith("--") ? css.getPropertyValue(value).trim() : value;
    }
    if (Array.isArray(value)) {
      return typeof value[0] === "number"
        ? value.map((item) => (typeof item === "string" ? themed(item, css) : item))
        : value.map((item) => themed(item, css));
    }
    if (value && typeof value === "object") {
      return Object.fromEntries(
        Object.entries(value).map(([key, item]) => [key, themed(item, css)]),
      );
    }
    return value;
  }

  const figures = [...document.querySelectorAll(".plot")].map((element) => ({
    element,
    source: JSON.parse(
      document.getElementById(`${element.id}-data`).textContent,
    ),
    place: -1,
  }));

  // A finger scrolls the page; a mouse zooms.
  const drag = matchMedia("(pointer: coarse)").matches ? false : "zoom";

  function draw({ element, source }) {
    const css = getComputedStyle(document.documentElement);
    const layout = { ...themed(source.layout, css), dragmode: drag };
    return Plotly.react(element, themed(source.data, css), layout, {
      displayModeBar: false,
      responsive: true,
    });
  }

  async function drawAll() {
    for (const figure of figures) {
      await draw(figure);
      figure.element.dataset.drawn = dark.matches ? "dark" : "light";
    }
  }

  // Where the arrow keys can go in a figure: what plotly shows, and its text.
  function places({ source }) {
    const shown = source.data
      .map((trace, curveNumber) => ({ trace, curveNumber }))
      .filter(({ trace }) => trace.hoverinfo !== "skip");
    if (!shown.length) return [];
    const heatmap = shown.find(({ trace }) => trace.type === "heatmap");
    if (heatmap) {
      const { trace } = heatmap;
      return trace.y.flatMap((row, i) =>
        trace.x.map((column, j) => ({
          // On an axis of names the place is the number of the name.
          hover: { xval: typeof column === "string" ? j : column, yval: i },
          text: `${row}, ${column}: ${(trace.customdata ?? trace.z)[i][j]}`,
          width: trace.x.length,
        })),
      );
    }
    const sideways = shown.some(({ trace }) => trace.orientation === "h");
    const key = sideways ? "y" : "x";
    const other = sideways ? "x" : "y";
    let values = [...new Set(shown.flatMap(({ trace }) => trace[key]))];
    if (typeof values[0] === "number") values.sort((a, b) => a - b);
    return values.map((value) => {
      const points = [];
      const words = [];
      for (const { trace, curveNumber } of shown) {
        const pointNumber = trace[key].indexOf(value);
        if (pointNumber < 0) continue;
        points.push({ curveNumber, pointNumber });
        words.push(`${trace.name} ${trace[other][pointNumber]}`);
      }
      return { hover: points, text: `${value}: ${words.join(", ")}`, width: 1 };
    });
  }

  function onKey(figure, event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1 };
    figure.places ??= places(figure);
    const width = figure.places[0]?.width ?? 1;
    if (width > 1) Object.assign(steps, { ArrowUp: -width, ArrowDown: width });
    if (!(event.key in steps) || !figure.places.length) return;
    event.preventDefault();
    const last = figure.places.length - 1;
    figure.place = Math.max(0, Math.min(last, figure.place + steps[event.key]));
    const { hover, text } = figure.places[figure.place];
    const subplots = Object.keys(figure.element._fullLayout._plots);
    Plotly.Fx.hover(figure.element, hover, subplots);
    live.textContent = text;
  }

  // -- Pictures --------------------------------------------------------------

  function setUpPictures(section) {
    const list = section.querySelector(".pictures");
    const pictures = [...list.children];
    const byClass = section.querySelector("[data-filter]");
    const order = section.querySelector("[data-sort]");
    const status = section.querySelector("[role=status]");
    function update() {
      const wanted = byClass.value;
      let shown = 0;
      for (const picture of pictures) {
        const classes = picture.dataset.classes.split(" ");
        picture.hidden = wanted !== "" && !classes.includes(wanted);
        shown += !picture.hidden;
      }
      status.textContent = `${shown} of ${pictures.length} images`;
    }
    function sort() {
      const [key, direction] = order.value.split(":");
      const value = (picture) => {
        const text = picture.dataset[key];
        // Those without a value come last.
        return text === "" ? Infinity : Number(direction) * Number(text);
      };
      const sorted = [...pictures].sort((a, b) => value(a) - value(b));
      list.append(...sorted);
    }
    byClass.addEventListener("change", update);
    order.addEventListener("change", sort);
    update();
    sort();
  }

  function setUpNegatives(section) {
    const select = section.querySelector("[data-negatives]");
    const images = [...section.querySelectorAll(".tiles-image")];
    function update() {
      const index = Number(select.value);
      const name = select.selectedOptions[0].textContent;
      for (const image of images) {
        const shares = image.dataset.shares.split(" ");
        const share = (100 * Number(shares[index])).toFixed(1);
        const last = Math.max(1, shares.length - 1);
        image.style.backgroundPosition = `0 ${(100 * index) / last}%`;
        const text = `${share} % of the unreliable pixels are negatives of ${name}`;
        image.setAttribute("aria-label", text);
        image.closest("figure").querySelector("figcaption").textContent =
          `negatives of ${name}: ${share} % of the unreliable`;
      }
    }
    select.addEventListener("change", update);
    update();
  }

  for (const section of document.querySelectorAll("[data-pictures]")) {
    setUpPictures(section);
  }
  for (const section of document.querySelectorAll("[data-method]")) {
    setUpNegatives(section);
  }
  for (const input of document.querySelectorAll("[data-opacity]")) {
    input.addEventListener("input", () => {
      const root = input.closest("section");
      root.style.setProperty("--opacity", Number(input.value) / 100);
    });
  }

  if (typeof Plotly === "undefined") {
    document.getElementById("no-plotly").hidden = false;
    return;
  }
  for (const figure of figures) {
    figure.element.addEventListener("keydown", (event) => onKey(figure, event));
    figure.element.addEventListener("blur", () => {
      if (figure.place >= 0) Plotly.Fx.unhover(figure.element);
      figure.place = -1;
    });
  }
  dark.addEventListener("change", drawAll);
  drawAll();
})();
