// What Plotly draws: lines, planes and surfaces, as traces and a layout.
//
// Plotly gets numbers and the page's own words. Names that come from a run's files are escaped, because Plotly reads
// some HTML in its labels. In traces that can be clicked, `meta` is the direction set, and `customdata` has the points.

// The palette of Okabe and Ito, which the colour-blind can tell apart. Dashes and markers differ too.
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];
const DASHES = ["solid", "dash", "dashdot", "dot"];
// In a legend: the lengths of each line's strokes and of the gaps after them, in pixels.
const STROKES = { solid: [28], dash: [7, 4], dashdot: [8, 3, 2, 3], dot: [2, 3] };
const MARKERS = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross"];
const MARKER_TEXTS = ["●", "■", "▲", "◆", "▼", "✚"];
const PATH_COLOURS = ["#FFFFFF", "#E69F00", "#56B4E9"];
// From the bottom up, so that the ASR lies on the border of two areas. In grey, complied is dark, refused light, and
// incoherent hatched.
const SHARES = {
  complied: { fillcolor: "#D55E00" },
  incoherent: { fillpattern: { shape: "/", bgcolor: "#ECECEC", fgcolor: "#9A9A9A", size: 6, solidity: 0.2 } },
  refused: { fillcolor: "#D6EBF8" },
};
const FONT = { family: "system-ui, sans-serif", size: 12, color: "#333" };
const GRID = "#e6e6e6";
const COLOUR_SCALE = "Cividis"; // its lightness rises evenly, so that it reads the same in grey
const OPTIONS = { displayModeBar: false, responsive: true, showTips: false, doubleClick: false, scrollZoom: false };
const LINE_HEIGHT = 320; // of figures, in pixels
const PLANE_HEIGHT = 400;

/** The text for Plotly. */
function plotlyText(text) {
  return visible(text).replace(/[&<>]/g, (character) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[character]);
}

/** An entry of a legend; with a line before its text if it has a dash. */
function legendEntry(text, dash, colour) {
  if (!dash) return element("span", {}, text);
  const swatch = element("i", { className: "swatch line" });
  swatch.style.background = dashed(STROKES[dash], colour);
  return element("span", {}, swatch, text);
}

/** A line as a background that repeats strokes and gaps of these lengths. */
function dashed(lengths, colour) {
  let start = 0;
  const parts = lengths.map((length, i) => `${i % 2 ? "transparent" : colour} ${start}px ${(start += length)}px`);
  return `repeating-linear-gradient(90deg, ${parts})`;
}

/** A line or a list of points: curves with bands, over the stacked shares where the ASR is drawn. */
function lineDrawing(run, sets, rate) {
  const shares = rate.key === "asr" ? sharesOf(run) : null;
  const legend = shares ? Object.keys(SHARES).map(shareEntry) : [];
  const traces = shares ? stackedShares(run, sets, shares) : [];
  sets.forEach((set, i) => {
    const colour = shares ? "#000" : COLOURS[i % COLOURS.length];
    const dash = DASHES[i % DASHES.length];
    traces.push(band(run, set, rate, colour, (shares ? 0.14 : 0.15) / (shares ? sets.length : 1)));
    traces.push(curve(run, set, rate, colour, dash, MARKERS[i % MARKERS.length]));
    const name = sets.length > 1 ? visible(run.sets[set].name) : visible(rate.label);
    legend.push(legendEntry(`${MARKER_TEXTS[i % MARKERS.length]} ${name}`, dash, colour));
  });
  legend.push(legendEntry("shaded: 95 % interval"));
  const radii = rate.key === "asr" ? sets.flatMap((set) => run.sets[set].radii) : [];
  if (radii.length) {
    const marker = { symbol: "diamond", size: 11, color: "#fff", line: { color: "#000", width: 1.5 } };
    traces.push({ x: radii, y: radii.map(() => 50), mode: "markers", hoverinfo: "skip", marker });
    legend.push(legendEntry("◇ radius: ASR rises above 50 %"));
  }
  return { traces, legend, layout: lineLayout(run, sets) };
}

function shareEntry(kind) {
  return element("span", {}, element("i", { className: `swatch ${kind}` }), kind);
}

/** The points at which a rate of a direction set is known. */
function knownPoints(run, values) {
  return run.x.map((_, point) => point).filter((point) => values[point] !== null);
}

function band(run, set, { value, low, high }, colour, opacity) {
  const points = knownPoints(run, value[set]);
  const back = [...points].reverse();
  return {
    x: [...points, ...back].map((point) => run.x[point]),
    y: [...points.map((point) => high[set][point]), ...back.map((point) => low[set][point])],
    mode: "lines",
    line: { width: 0 },
    fill: "toself",
    fillcolor: colour,
    opacity,
    hoverinfo: "skip",
  };
}

function curve(run, set, { value }, colour, dash, symbol) {
  const points = knownPoints(run, value[set]);
  return {
    x: points.map((point) => run.x[point]),
    y: points.map((point) => value[set][point]),
    meta: set,
    customdata: points,
    mode: "lines+markers",
    hoverinfo: "none",
    cliponaxis: false,
    line: { color: colour, width: 2, dash },
    marker: { color: colour, symbol, size: points.map((point) => (run.evaluated[set][point] ? 7 : 0)) },
  };
}

/** Areas of the three shares, the mean over direction sets, at the points where all of them are judged. */
function stackedShares(run, sets, shares) {
  const mean = (kind, point) => {
    const values = sets.map((set) => shares[kind].value[set][point]);
    return values.includes(null) ? null : values.reduce((sum, value) => sum + value, 0) / values.length;
  };
  const points = run.x.map((_, point) => point).filter((point) => mean("refused", point) !== null);
  return Object.entries(SHARES).map(([kind, style]) => ({
    x: points.map((point) => run.x[point]),
    y: points.map((point) => mean(kind, point)),
    mode: "lines",
    line: { width: 0 },
    stackgroup: "shares",
    hoverinfo: "skip",
    ...style,
  }));
}

function lineLayout(run, sets) {
  const line = { color: "#000", width: 1.5, dash: "dot" };
  const name = { yref: "paper", y: 1, yanchor: "bottom", showarrow: false, font: { size: 11 } };
  const axis = { fixedrange: true, zeroline: false, gridcolor: GRID };
  return {
    height: LINE_HEIGHT,
    xaxis: { ...axis, title: { text: plotlyText(run.xLabel), standoff: 6 }, range: commonRange(run) },
    yaxis: { ...axis, title: { text: "share of the answers (%)" }, range: [-1, 101], dtick: 25 },
    shapes: run.models.map(({ x }) => ({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line })),
    annotations: run.models.map(({ x, name: text }) => ({ x, text, ...name })),
    hovermode: sets.length > 1 ? "closest" : "x",
    margin: { l: 52, r: 14, t: 22, b: 42 },
  };
}

/** The range of the horizontal axis. Runs along the same axis share it, so that they can be compared. */
function commonRange(run) {
  const xs = CONTENT.runs.filter((other) => other.xLabel === run.xLabel).flatMap((other) => other.x);
  const [low, high] = [Math.min(...xs), Math.max(...xs)];
  const border = (high - low || 1) * 0.015;
  return [low - border, high + border];
}

/** A plane: filled contours in a fixed range of colours, a dot for each point, a cross at the model, and paths. */
function planeDrawing(run, set, rate) {
  const grid = gridOf(run, rate.value[set]);
  const traces = [
    filledContours(grid),
    contourLines(grid, 10, 50, "#fff"),
    contourLines(grid, 90, 90, "#000"),
    pointDots(run, set),
  ];
  const legend = [legendEntry("○ point"), legendEntry("lines at 10, 50 and 90 %")];
  if (run.origin !== null) {
    traces.push(cross("#000", 18, 6), cross("#fff", 16, 2.5));
    legend.push(legendEntry("✚ the model"));
  }
  // The plane of a control is another one than that on which the paths were projected.
  const paths = run.sets[set].control ? [] : run.trajectories;
  paths.forEach((path, i) => {
    traces.push(...pathTraces(path, PATH_COLOURS[i % PATH_COLOURS.length], MARKERS[i % MARKERS.length]));
    const residual = Math.round(100 * Math.max(...path.residual));
    const name = `${MARKER_TEXTS[i % MARKERS.length]} ${visible(path.name)} (residual up to ${residual} %)`;
    legend.push(legendEntry(name));
  });
  return { traces, legend, layout: planeLayout(run) };
}

/** The values of a plane as Plotly wants them: a row for each value of the second axis. */
function gridOf(run, values) {
  const [x, y] = run.axes.map((axis) => axis.values);
  return { x, y, z: y.map((_, j) => x.map((_, i) => values[i * y.length + j])) };
}

function filledContours(grid) {
  return {
    ...grid,
    type: "contour",
    zmin: 0,
    zmax: 100,
    colorscale: COLOUR_SCALE,
    colorbar: { title: { text: "%", side: "top" }, thickness: 12, tick0: 0, dtick: 20, outlinewidth: 0 },
    contours: { start: 0, end: 100, size: 10 },
    line: { width: 0 },
    hoverinfo: "skip",
  };
}

function contourLines(grid, start, end, colour) {
  const labels = { showlabels: true, labelformat: ".0f", labelfont: { size: 11, color: colour } };
  return {
    ...grid,
    type: "contour",
    contours: { coloring: "none", start, end, size: 40, ...labels },
    line: { color: colour, width: 1.2, smoothing: 0 },
    showscale: false,
    hoverinfo: "skip",
  };
}

function pointDots(run, set) {
  const points = run.points.map((_, point) => point).filter((point) => run.evaluated[set][point]);
  return {
    x: points.map((point) => coordinates(run, point)[0]),
    y: points.map((point) => coordinates(run, point)[1]),
    meta: set,
    customdata: points,
    mode: "markers",
    hoverinfo: "none",
    cliponaxis: false,
    marker: { size: 4, color: "rgba(255,255,255,0.75)", line: { color: "rgba(0,0,0,0.75)", width: 0.8 } },
  };
}

function cross(color, size, width) {
  const marker = { symbol: "cross-thin", size, line: { color, width } };
  return { x: [0], y: [0], mode: "markers", hoverinfo: "skip", marker };
}

/** The path of a finetuning, with an outline so that it stands out from any colour. */
function pathTraces(path, color, symbol) {
  const [x, y] = [0, 1].map((axis) => path.coords.map((point) => point[axis]));
  const marker = { color, symbol, size: 8, line: { color: "#000", width: 1 } };
  return [
    { x, y, mode: "lines", hoverinfo: "skip", line: { color: "#000", width: 5 } },
    { x, y, mode: "lines+markers", hoverinfo: "skip", line: { color, width: 2.5 }, marker },
  ];
}

function planeLayout(run) {
  const axis = { fixedrange: true, zeroline: false, showgrid: false, constrain: "domain" };
  const [x, y] = run.axes.map(({ label }) => ({ ...axis, title: { text: plotlyText(label), standoff: 6 } }));
  const square = run.axes[0].interpolation ? {} : { scaleanchor: "x", scaleratio: 1 };
  const margin = { l: 60, r: 10, t: 12, b: 46 };
  return { height: PLANE_HEIGHT, xaxis: x, yaxis: { ...y, ...square }, hovermode: "closest", margin };
}

/** The surface over a plane, in the same colours, with a line at 50 % and an upright line at the model. */
function surfaceDrawing(run, set, rate) {
  const grid = gridOf(run, rate.value[set]);
  const surface = {
    ...grid,
    type: "surface",
    cmin: 0,
    cmax: 100,
    colorscale: COLOUR_SCALE,
    showscale: false,
    contours: { z: { show: true, start: 50, end: 50.1, size: 1, color: "#fff", width: 2 } },
    meta: set,
    customdata: grid.y.map((_, j) => grid.x.map((_, i) => i * grid.y.length + j)),
    hoverinfo: "none",
  };
  const ends = { x: [0, 0], y: [0, 0], z: [0, 100] };
  const model = { ...ends, type: "scatter3d", mode: "lines", hoverinfo: "skip", line: { color: "#000", width: 5 } };
  const [x, y] = run.axes.map(({ name }) => ({ title: { text: plotlyText(name) } }));
  const z = { title: { text: "%" }, range: [0, 100] };
  const camera = { eye: { x: 1.35, y: -1.35, z: 0.85 } };
  const scene = { xaxis: x, yaxis: y, zaxis: z, camera, aspectmode: "cube" };
  const layout = { height: PLANE_HEIGHT, scene, margin: { l: 0, r: 0, t: 0, b: 0 }, uirevision: "camera" };
  return { traces: run.origin === null ? [surface] : [surface, model], layout };
}
