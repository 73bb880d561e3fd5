// Figures: a card for each run, in it a panel for each group of direction sets that share a figure. A *place* is a point
// of a direction set of a run: { run, set, point }.
//
// Plotly gets numbers and the page's own words. Names that come from a run's files are escaped, because Plotly reads some
// HTML in its labels.

// The palette of Okabe and Ito, which the colour-blind can tell apart; dashes and markers differ too.
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];
const DASHES = ["solid", "dash", "dashdot", "dot"];
const MARKERS = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross"];
const MARKER_TEXTS = ["●", "■", "▲", "◆", "▼", "✚"];
// From the bottom up, so that the ASR lies on the border of two areas. In grey, complied is dark and refused light.
const SHARES = {
  complied: { fillcolor: "#D55E00" },
  incoherent: { fillcolor: "#E4E4E4", fillpattern: { shape: "/", bgcolor: "#ECECEC", fgcolor: "#9A9A9A", size: 6, solidity: 0.2 } },
  refused: { fillcolor: "#D6EBF8" },
};
const FONT = { family: "system-ui, sans-serif", size: 12, color: "#333" };
const MAX_SURFACES = 8; // a browser keeps only so many WebGL contexts
const LINE_HEIGHT = 320; // of figures, in pixels
const PLANE_HEIGHT = 400;
const NAMES = ["A", "B"]; // of the places that are open

const panels = [];

/** The rate of this key in a run, or undefined. */
function rateOf(run, key) {
  return run.rates.find((rate) => rate.key === key);
}

/** The text for Plotly, which reads some HTML. */
function plotlyText(text) {
  return visible(text).replace(/[&<>]/g, (character) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[character]);
}

/** What a place is called: its coordinates, and its direction set if there are several. */
function placeName({ run, set, point }) {
  const { sets, points } = CONTENT.runs[run];
  return sets.length > 1 ? `${points[point]} of ${visible(sets[set].name)}` : points[point];
}

/** The rates at a place in words: the one that is drawn, and the three shares. */
function placeRates({ run, set, point }, key) {
  const at = (rate, end) => rate[end][set][point];
  const words = [];
  for (const rate of CONTENT.runs[run].rates) {
    if (rate.key === key) words.push(`${visible(rate.label)} ${percent(at(rate, "value"), at(rate, "low"), at(rate, "high"))}`);
    else if (rate.key.endsWith(" shares") && at(rate, "value") !== null) words.push(`${rate.label} ${at(rate, "value").toFixed(1)} %`);
  }
  return words.join(" · ");
}

/** The place that lies some steps along the first and the second axis away; at a border, the place itself. */
function neighbour({ run, set, point }, first, second) {
  const { axes, points, sets } = CONTENT.runs[run];
  const within = (number, count) => Math.min(Math.max(number, 0), count - 1);
  if (axes.length < 2) return { run, set: within(set - second, sets.length), point: within(point + first, points.length) };
  const size = axes[1].values.length;
  const row = within(Math.floor(point / size) + first, axes[0].values.length);
  return { run, set, point: row * size + within((point % size) + second, size) };
}

/** The card of a run, with its panels. */
function card(run, index) {
  const made = element(
    "article",
    { className: "card" },
    element("h2", {}, untrusted(run.name)),
    element("p", { className: "hint" }, ...run.summary.flatMap((part, i) => [i ? " · " : "", untrusted(part)])),
  );
  const grid = element("div", { className: "panels" });
  for (const sets of run.panels) grid.append(panelOf(run, index, sets));
  const legend = element("p", { className: "legend" });
  made.append(legend, grid);
  for (const panel of panels) if (panel.run === index) panel.legend = legend;
  return made;
}

/** A panel: its title, its figures, and what is said of the point that is pointed at. */
function panelOf(run, index, sets) {
  const panel = { run: index, sets, cursor: { run: index, set: sets[0], point: run.origin ?? 0 }, opened: [] };
  panel.plot = element("div", { className: "plot" });
  panel.readout = element("p", { className: "readout" });
  panel.frame = element(
    "div",
    { className: "frame", tabIndex: 0, role: "application", "aria-label": `Figure of ${visible(run.name)}: arrow keys move between points, Enter opens one` },
    panel.plot,
  );
  panel.frame.addEventListener("keydown", (event) => moveByKey(panel, event));
  panel.frame.addEventListener("focus", () => pointAt(panel, panel.cursor));
  const title = element("h3", {}, untrusted(run.sets[sets[0]].name), run.sets[sets[0]].control ? element("span", { className: "tag" }, "control") : "");
  panel.element = element("div", { className: run.axes.length === 2 ? "panel plane" : "panel" }, ...(run.panels.length > 1 ? [title] : []), panel.frame, panel.readout);
  if (run.axes.length === 2) {
    panel.surface = element("div", { className: "plot" });
    panel.button = element("button", { type: "button", onclick: () => toggleSurface(panel), "aria-pressed": "false" }, "3D surface");
    panel.element.append(panel.button);
  }
  panels.push(panel);
  return panel.element;
}

function moveByKey(panel, event) {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  const { origin } = CONTENT.runs[panel.run];
  if (event.key in steps) {
    const place = neighbour(panel.cursor, ...steps[event.key]);
    if (panel.sets.includes(place.set)) pointAt(panel, place);
  } else if (event.key === "Home" && origin !== null) pointAt(panel, { ...panel.cursor, point: origin });
  else if (event.key === "Enter" || event.key === " ") openPlace(panel.cursor, true);
  else return;
  event.preventDefault();
}

/** Move the cursor of a panel to a place, and say what is there. */
function pointAt(panel, place) {
  panel.cursor = place;
  describe(panel, place);
  say(panel.readout.textContent);
  markPlaces(panel);
}

function describe(panel, place) {
  const name = panel.sets.length > 1 ? placeName(place) : CONTENT.runs[place.run].points[place.point];
  panel.readout.replaceChildren(element("b", {}, name), ` ${placeRates(place, shownRate())}`);
}

/** Draw a panel, or draw it again. */
function draw(panel) {
  const run = CONTENT.runs[panel.run];
  const rate = rateOf(run, shownRate()) ?? run.rates[0];
  const isPlane = run.axes.length === 2;
  const { traces, layout, legend } = isPlane ? plane(run, panel, rate) : line(run, panel, rate);
  const known = [...panel.legend.children].map((entry) => entry.textContent);
  panel.legend.append(...legend.filter((entry) => !known.includes(entry.textContent)));
  const marks = { x: [], y: [], hoverinfo: "skip", cliponaxis: false, marker: { color: "#000", line: { width: 2.5 } } };
  const cursor = { ...marks, mode: "markers", marker: { ...marks.marker, symbol: "circle-open", size: 15 } };
  const places = { ...marks, mode: "markers+text", textposition: "middle center", textfont: { color: "#fff" } };
  panel.height = (place) => (isPlane ? run.axes[1].values[place.point % run.axes[1].values.length] : rate.value[place.set][place.point]);
  panel.width = (place) => (isPlane ? run.axes[0].values[Math.floor(place.point / run.axes[1].values.length)] : run.x[place.point]);
  const options = { displayModeBar: false, responsive: true, showTips: false, doubleClick: false };
  const base = { font: FONT, height: isPlane ? PLANE_HEIGHT : LINE_HEIGHT, showlegend: false, dragmode: false, paper_bgcolor: "#fff", plot_bgcolor: "#fff", hoverdistance: -1 };
  Plotly.react(panel.plot, [...traces, cursor, places], { ...base, ...layout }, options);
  if (!panel.listens) listen(panel, panel.plot);
  panel.listens = true;
  describe(panel, panel.cursor);
  markPlaces(panel);
  if (panel.surface?.isConnected) drawSurface(panel);
}

/** Point at the place under the pointer, and open the one that is clicked. */
function listen(panel, plot) {
  const placeOf = ({ points }) => {
    const at = points.find((point) => point.customdata !== undefined);
    return at && { run: panel.run, set: at.data.meta, point: at.customdata };
  };
  plot.on("plotly_hover", (event) => placeOf(event) && describe(panel, placeOf(event)));
  plot.on("plotly_click", (event) => {
    if (!placeOf(event)) return;
    panel.cursor = placeOf(event);
    openPlace(panel.cursor, false);
  });
}

/** Mark the cursor while the panel has the focus, and the places that are open, by their letters if there are two. */
function markPlaces(panel) {
  const cursor = document.activeElement === panel.frame ? [panel.cursor] : [];
  const places = opened.filter((place) => place.run === panel.run && panel.sets.includes(place.set));
  const isPair = opened.length > 1;
  const marks = {
    x: [cursor.map(panel.width), places.map(panel.width)],
    y: [cursor.map(panel.height), places.map(panel.height)],
    text: [[], places.map((place) => (isPair ? `<b>${NAMES[opened.indexOf(place)]}</b>` : ""))],
    "marker.symbol": ["circle-open", isPair ? "circle" : "circle-open"],
    "marker.size": [15, isPair ? 18 : 15],
  };
  const count = panel.plot.data.length;
  Plotly.restyle(panel.plot, marks, [count - 2, count - 1]);
}

/** The figure of a line or of a list of points: curves with bands, over the stacked shares where the ASR is drawn. */
function line(run, panel, rate) {
  const hasShares = rate.key === "asr" && rateOf(run, "refused shares");
  const legend = [];
  const traces = hasShares ? stackedShares(run, panel, legend) : [];
  panel.sets.forEach((set, i) => {
    const colour = hasShares ? "#000" : COLOURS[i % COLOURS.length];
    const style = { dash: DASHES[i % DASHES.length], symbol: MARKERS[i % MARKERS.length] };
    const known = run.x.map((_, point) => point).filter((point) => rate.value[set][point] !== null);
    const back = [...known].reverse();
    traces.push({
      x: [...known, ...back].map((point) => run.x[point]),
      y: [...known.map((point) => rate.high[set][point]), ...back.map((point) => rate.low[set][point])],
      ...{ mode: "lines", line: { width: 0 }, fill: "toself", fillcolor: colour, opacity: hasShares ? 0.14 / panel.sets.length : 0.15, hoverinfo: "skip" },
    });
    traces.push({
      x: known.map((point) => run.x[point]),
      y: known.map((point) => rate.value[set][point]),
      ...{ meta: set, customdata: known, mode: "lines+markers", hoverinfo: "none", cliponaxis: false },
      line: { color: colour, width: 2, dash: style.dash },
      marker: { color: colour, symbol: style.symbol, size: known.map((point) => (run.evaluated[set][point] ? 7 : 0)) },
    });
    const what = panel.sets.length > 1 ? visible(run.sets[set].name) : visible(rate.label);
    legend.push(legendEntry(`${MARKER_TEXTS[i % MARKERS.length]} ${what}`, colour, style.dash));
  });
  const radii = rate.key === "asr" ? panel.sets.flatMap((set) => run.sets[set].radii) : [];
  if (radii.length) {
    const marker = { symbol: "diamond", size: 11, color: "#fff", line: { color: "#000", width: 1.5 } };
    traces.push({ x: radii, y: radii.map(() => 50), mode: "markers", hoverinfo: "skip", marker });
    legend.push(legendEntry("◇ radius: ASR rises above 50 %", "#000"));
  }
  legend.push(legendEntry("shaded: 95 % interval", "#000"));
  const marks = run.models.map(({ x, name }) => ({ x, text: name, yref: "paper", y: 1, yanchor: "bottom", showarrow: false, font: { size: 11 } }));
  const lines = run.models.map(({ x }) => ({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color: "#000", width: 1.5, dash: "dot" } }));
  const x = { title: { text: plotlyText(run.xLabel), standoff: 6 }, range: rangeOf(run), fixedrange: true, zeroline: false, gridcolor: "#e6e6e6" };
  const y = { title: { text: "share of the answers (%)" }, range: [-1, 101], dtick: 25, fixedrange: true, zeroline: false, gridcolor: "#e6e6e6" };
  const hovermode = panel.sets.length > 1 ? "closest" : "x";
  const layout = { xaxis: x, yaxis: y, annotations: marks, shapes: lines, hovermode, margin: { l: 52, r: 14, t: 22, b: 42 } };
  return { traces, layout, legend };
}

/** The range of the horizontal axis, which runs along the same axis share, so that they can be compared. */
function rangeOf(run) {
  const xs = CONTENT.runs.filter((other) => other.xLabel === run.xLabel).flatMap((other) => other.x);
  const [low, high] = [Math.min(...xs), Math.max(...xs)];
  const border = (high - low || 1) * 0.015;
  return [low - border, high + border];
}

/** Areas of the three shares, the mean over the direction sets of the panel, where all of them are judged. */
function stackedShares(run, panel, legend) {
  const mean = (kind, point) => {
    const values = panel.sets.map((set) => rateOf(run, `${kind} shares`).value[set][point]);
    return values.includes(null) ? null : values.reduce((sum, value) => sum + value, 0) / values.length;
  };
  const points = run.x.map((_, point) => point).filter((point) => mean("refused", point) !== null);
  return Object.entries(SHARES).map(([kind, style]) => {
    legend.push(element("span", {}, element("i", { className: `swatch ${kind}` }), kind));
    const area = { mode: "lines", line: { width: 0 }, stackgroup: "shares", hoverinfo: "skip", ...style };
    return { x: points.map((point) => run.x[point]), y: points.map((point) => mean(kind, point)), ...area };
  });
}

function legendEntry(text, colour, dash) {
  const swatch = element("i", { className: "swatch line" });
  swatch.style.borderTop = dash ? `2px ${{ solid: "solid", dot: "dotted" }[dash] ?? "dashed"} ${colour}` : "0";
  return element("span", {}, ...(dash ? [swatch] : []), text);
}

/** The figure of a plane: filled contours in a fixed range of colours, a dot for each point, a cross at the model. */
function plane(run, panel, rate) {
  const [set] = panel.sets;
  const { x, y, z } = gridOf(run, rate.value[set]);
  const colours = { zmin: 0, zmax: 100, colorscale: "Cividis", hoverinfo: "skip" };
  const bar = { title: { text: "%", side: "top" }, thickness: 12, tick0: 0, dtick: 20, outlinewidth: 0 };
  const only = (start, end, colour) => ({
    ...{ type: "contour", x, y, z, hoverinfo: "skip", showscale: false, line: { color: colour, width: 1.2, smoothing: 0 } },
    contours: { coloring: "none", start, end, size: 40, showlabels: true, labelformat: ".0f", labelfont: { size: 11, color: colour } },
  });
  const points = run.points.map((_, point) => point).filter((point) => run.evaluated[set][point]);
  const dots = {
    ...{ meta: set, customdata: points, mode: "markers", hoverinfo: "none", cliponaxis: false },
    x: points.map((point) => x[Math.floor(point / y.length)]),
    y: points.map((point) => y[point % y.length]),
    marker: { size: 4, color: "rgba(255,255,255,0.75)", line: { color: "rgba(0,0,0,0.75)", width: 0.8 } },
  };
  const traces = [{ type: "contour", x, y, z, ...colours, colorbar: bar, contours: { start: 0, end: 100, size: 10 }, line: { width: 0 } }];
  traces.push(only(10, 50, "#fff"), only(90, 90, "#000"), dots);
  const legend = [legendEntry("○ point", "#000"), legendEntry("✚ the model, α = β = 0", "#000"), legendEntry("lines at 10, 50 and 90 %", "#000")];
  if (run.origin !== null) {
    for (const [colour, size, width] of [["#000", 18, 6], ["#fff", 16, 2.5]]) {
      traces.push({ x: [0], y: [0], mode: "markers", hoverinfo: "skip", marker: { symbol: "cross-thin", size, line: { color: colour, width } } });
    }
  }
  run.trajectories.forEach((path, i) => {
    const colour = ["#FFFFFF", "#E69F00", "#56B4E9"][i % 3];
    const [px, py] = [path.coords.map((point) => point[0]), path.coords.map((point) => point[1])];
    traces.push({ x: px, y: py, mode: "lines", hoverinfo: "skip", line: { color: "#000", width: 5 } });
    traces.push({ x: px, y: py, mode: "lines+markers", hoverinfo: "skip", line: { color: colour, width: 2.5 }, marker: { color: colour, symbol: MARKERS[i % MARKERS.length], size: 8, line: { color: "#000", width: 1 } } });
    const residual = `${MARKER_TEXTS[i % MARKERS.length]} ${visible(path.name)} (residual up to ${Math.round(100 * Math.max(...path.residual))} %)`;
    legend.push(legendEntry(residual, "#000"));
  });
  const [first, second] = run.axes.map((axis) => ({ title: { text: plotlyText(axis.label), standoff: 6 }, fixedrange: true, zeroline: false, showgrid: false, constrain: "domain" }));
  const square = run.axes[0].interpolation ? {} : { scaleanchor: "x", scaleratio: 1 };
  const layout = { xaxis: first, yaxis: { ...second, ...square }, hovermode: "closest", margin: { l: 60, r: 10, t: 12, b: 46 } };
  return { traces, layout, legend };
}

/** The values of a plane as Plotly wants them: a row for each value of the second axis. */
function gridOf(run, values) {
  const [x, y] = run.axes.map((axis) => axis.values);
  return { x, y, z: y.map((_, j) => x.map((_, i) => values[i * y.length + j])) };
}

function hasWebGL() {
  return Boolean(document.createElement("canvas").getContext("webgl"));
}

/** Show or remove the surface beside the contours. Beyond a browser's number of surfaces, the oldest is removed. */
function toggleSurface(panel) {
  if (panel.surface.isConnected) {
    Plotly.purge(panel.surface);
    panel.surface.remove();
  } else if (hasWebGL()) {
    const drawn = panels.filter((other) => other.surface?.isConnected);
    if (drawn.length >= MAX_SURFACES) toggleSurface(drawn[0]);
    panel.frame.append(panel.surface);
    drawSurface(panel);
    listen(panel, panel.surface);
  } else {
    panel.button.replaceWith(element("p", { className: "hint" }, "This browser has no WebGL, which the 3D surface needs."));
  }
  panel.button.setAttribute("aria-pressed", panel.surface.isConnected);
  Plotly.Plots.resize(panel.plot);
}

function drawSurface(panel) {
  const run = CONTENT.runs[panel.run];
  const [set] = panel.sets;
  const { x, y, z } = gridOf(run, (rateOf(run, shownRate()) ?? run.rates[0]).value[set]);
  const numbers = y.map((_, j) => x.map((_, i) => i * y.length + j));
  const lines = { show: true, start: 50, end: 50.1, size: 1, color: "#fff", width: 2 };
  const surface = { type: "surface", x, y, z, cmin: 0, cmax: 100, colorscale: "Cividis", showscale: false, hoverinfo: "none", meta: set, customdata: numbers, contours: { z: lines } };
  const model = { type: "scatter3d", mode: "lines", x: [0, 0], y: [0, 0], z: [0, 100], hoverinfo: "skip", line: { color: "#000", width: 5 } };
  const [first, second] = run.axes.map((axis) => ({ title: { text: plotlyText(axis.name) } }));
  const scene = { xaxis: first, yaxis: second, zaxis: { title: { text: "%" }, range: [0, 100] }, camera: { eye: { x: 1.35, y: -1.35, z: 0.85 } }, aspectmode: "cube" };
  const layout = { font: FONT, height: PLANE_HEIGHT, showlegend: false, scene, margin: { l: 0, r: 0, t: 0, b: 0 }, uirevision: "camera" };
  Plotly.react(panel.surface, [surface, ...(run.origin === null ? [] : [model])], layout, { displayModeBar: false, responsive: true, scrollZoom: false, showTips: false });
}
