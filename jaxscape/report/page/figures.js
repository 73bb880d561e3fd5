// Figures: a card for each run, in it a panel for each group of direction sets that share a figure. A panel is pointed
// at by the mouse or, while it has the focus, by the arrow keys, which move its cursor.

const MAX_SURFACES = 8; // a browser keeps only so many WebGL contexts
const MAX_DISTANCE = 5; // pixels that a pointer may move in a click
const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
const LETTERS = ["A", "B"]; // of two places that are open

const panels = [];

/** The card of a run, with its panels. */
function card(run, index) {
  const legend = element("p", { className: "legend" });
  const own = run.panels.map((sets) => makePanel(run, index, sets, legend));
  panels.push(...own);
  return element(
    "article",
    { className: "card" },
    element("h2", {}, untrusted(run.name)),
    element("p", { className: "hint" }, ...run.summary.flatMap((part, i) => [i ? " · " : "", untrusted(part)])),
    legend,
    element("div", { className: "panels" }, ...own.map((panel) => panel.element)),
  );
}

/** A panel: its title, its figures, what is said of the point that is pointed at, and for a plane a button. */
function makePanel(run, index, sets, legend) {
  const isPlane = run.axes.length === 2;
  const panel = { run: index, sets, isPlane, legend, cursor: { run: index, set: sets[0], point: run.origin ?? 0 } };
  panel.plot = element("div", { className: "plot" });
  panel.readout = element("p", { className: "readout" });
  const label = `Figure of ${visible(run.name)}: arrow keys move between points, Enter opens one`;
  panel.frame = element(
    "div",
    { className: "frame", tabIndex: 0, role: "application", "aria-label": label },
    panel.plot,
  );
  panel.frame.addEventListener("keydown", (event) => moveByKey(panel, event));
  panel.frame.addEventListener("focus", () => pointAt(panel, panel.cursor));
  panel.frame.addEventListener("blur", () => markPlaces(panel));
  panel.element = element("div", { className: isPlane ? "panel plane" : "panel" }, panel.frame, panel.readout);
  if (run.panels.length > 1) panel.element.prepend(panelTitle(run.sets[sets[0]]));
  if (isPlane) {
    panel.surface = element("div", { className: "plot" });
    panel.button = element("button", { type: "button", "aria-pressed": "false" }, "3D surface");
    panel.button.addEventListener("click", () => toggleSurface(panel));
    panel.element.append(panel.button);
  }
  return panel;
}

function panelTitle({ name, control }) {
  const tag = control ? [element("span", { className: "tag" }, "control")] : [];
  return element("h3", {}, untrusted(name), ...tag);
}

function moveByKey(panel, event) {
  const { origin } = CONTENT.runs[panel.run];
  if (event.key in STEPS) {
    const place = neighbour(panel.cursor, ...STEPS[event.key]);
    if (panel.sets.includes(place.set)) pointAt(panel, place);
  } else if (event.key === "Home" && origin !== null) {
    pointAt(panel, { ...panel.cursor, point: origin });
  } else if (event.key === "Enter" || event.key === " ") {
    openPlace(panel.cursor, true);
  } else {
    return;
  }
  event.preventDefault();
}

/** Move the cursor of a panel to a place, and say what is there. */
function pointAt(panel, place) {
  panel.cursor = place;
  describe(panel, place);
  say(panel.readout.textContent);
  markPlaces(panel);
}

/** Show below a panel what is at a place. */
function describe(panel, place) {
  const name = panel.sets.length > 1 ? placeName(place) : pointName(place);
  panel.readout.replaceChildren(element("b", {}, name), ` ${placeRates(place, shownRate())}`);
}

/** Draw all panels, or draw them again. */
function drawAll() {
  for (const panel of panels) panel.legend.replaceChildren();
  panels.forEach(draw);
}

function draw(panel) {
  const run = CONTENT.runs[panel.run];
  panel.rate = rateOf(run, shownRate());
  const { traces, legend, layout } = panel.isPlane
    ? planeDrawing(run, panel.sets[0], panel.rate)
    : lineDrawing(run, panel.sets, panel.rate);
  const known = [...panel.legend.children].map((entry) => entry.textContent); // other panels have the same entries
  panel.legend.append(...legend.filter((entry) => !known.includes(entry.textContent)));
  const common = { font: FONT, showlegend: false, dragmode: false, hoverdistance: -1 };
  Plotly.react(panel.plot, [...traces, ...placeTraces()], { ...common, ...layout }, OPTIONS);
  if (!panel.listens) listen(panel, panel.plot);
  panel.listens = true;
  describe(panel, panel.cursor);
  markPlaces(panel);
  if (panel.surface?.isConnected) drawSurface(panel);
}

/** The last two traces of a figure: its cursor, and the places that are open. They are empty until these are marked. */
function placeTraces() {
  const marker = { color: "#000", line: { width: 2.5 }, symbol: "circle-open", size: 15 };
  const marks = { x: [], y: [], hoverinfo: "skip", cliponaxis: false, marker };
  const letters = { mode: "markers+text", textposition: "middle center", textfont: { color: "#fff" } };
  return [
    { ...marks, mode: "markers" },
    { ...marks, ...letters },
  ];
}

/** Mark the cursor while the panel has the focus, and the places that are open, by their letters if there are two. */
function markPlaces(panel) {
  const run = CONTENT.runs[panel.run];
  const where = ({ set, point }) =>
    panel.isPlane ? coordinates(run, point) : [run.x[point], panel.rate.value[set][point]];
  const cursor = document.activeElement === panel.frame ? [panel.cursor] : [];
  const places = opened.filter((place) => place.run === panel.run && panel.sets.includes(place.set));
  const isPair = opened.length > 1;
  const marks = {
    x: [cursor, places].map((list) => list.map((place) => where(place)[0])),
    y: [cursor, places].map((list) => list.map((place) => where(place)[1])),
    text: [[], places.map((place) => (isPair ? `<b>${LETTERS[opened.indexOf(place)]}</b>` : ""))],
    "marker.symbol": ["circle-open", isPair ? "circle" : "circle-open"],
    "marker.size": [15, isPair ? 18 : 15],
  };
  const count = panel.plot.data.length;
  Plotly.restyle(panel.plot, marks, [count - 2, count - 1]);
}

/** Say what is at the point under the pointer, and open the point that is clicked. */
function listen(panel, plot) {
  onPlace(panel, plot, "plotly_hover", (place) => describe(panel, place));
  onPlace(panel, plot, "plotly_click", (place) => openByPointer(panel, place));
}

/** The same for a surface, where Plotly calls the beginning of a turn a click. */
function listenToSurface(panel) {
  let pointed = null;
  let start = null;
  for (const event of ["plotly_hover", "plotly_click"]) {
    onPlace(panel, panel.surface, event, (place) => {
      pointed = place;
      describe(panel, place);
    });
  }
  panel.surface.on("plotly_unhover", () => (pointed = null));
  panel.surface.onpointerdown = (event) => (start = event);
  panel.surface.onclick = (event) => {
    const distance = Math.hypot(event.clientX - start.clientX, event.clientY - start.clientY);
    if (pointed && distance < MAX_DISTANCE) openByPointer(panel, pointed);
  };
}

function onPlace(panel, plot, event, act) {
  plot.on(event, ({ points }) => {
    const hit = points.find((point) => point.customdata !== undefined);
    if (hit) act({ run: panel.run, set: hit.data.meta, point: hit.customdata });
  });
}

function openByPointer(panel, place) {
  panel.cursor = place;
  describe(panel, place); // a finger does not hover
  openPlace(place, false);
}

function hasWebGL() {
  return Boolean(document.createElement("canvas").getContext("webgl"));
}

/** Show or remove the surface beside the contours. Beyond the number that a browser draws, the oldest is removed. */
function toggleSurface(panel) {
  if (panel.surface.isConnected) {
    Plotly.purge(panel.surface);
    panel.surface.remove();
  } else if (hasWebGL()) {
    const drawn = panels.filter((other) => other.surface?.isConnected);
    if (drawn.length >= MAX_SURFACES) toggleSurface(drawn[0]);
    panel.frame.append(panel.surface);
    drawSurface(panel);
    listenToSurface(panel);
  } else {
    const reason = "This browser has no WebGL, which the 3D surface needs.";
    panel.button.replaceWith(element("p", { className: "hint" }, reason));
  }
  panel.button.setAttribute("aria-pressed", panel.surface.isConnected);
  Plotly.Plots.resize(panel.plot);
}

function drawSurface(panel) {
  const { traces, layout } = surfaceDrawing(CONTENT.runs[panel.run], panel.sets[0], panel.rate);
  Plotly.react(panel.surface, traces, { font: FONT, showlegend: false, ...layout }, OPTIONS);
}
