// What happens when the page is opened: cards and tables are made, then the figures are drawn.

const rateSelect = document.getElementById("rate");

/** The key of the rate that the figures show. */
function shownRate() {
  return rateSelect.value;
}

function openPage() {
  const { runs } = CONTENT;
  document.title = `Safety landscape: ${runs.map((run) => visible(run.name)).join(", ")}`;
  const rates = new Map(runs.flatMap((run) => run.rates.map((rate) => [rate.key, rate.label])));
  rateSelect.append(...[...rates].map(([key, label]) => element("option", { value: key }, visible(label))));
  rateSelect.addEventListener("change", drawAll);
  document.getElementById("figures").append(...runs.map(card));
  document.getElementById("numbers").append(numbersTable(CONTENT));
  document.getElementById("facts").append(factsTable(CONTENT));
  document.getElementById("facts").classList.toggle("single", runs.length < 2);
  document.getElementById("facts-hint").hidden = runs.length < 2;
  drawAll();
  // One or two planes have room for their surfaces, which are drawn after the contours.
  const planes = panels.filter((panel) => panel.isPlane);
  if (planes.length <= 2 && hasWebGL()) setTimeout(() => planes.forEach(toggleSurface));
}

openPage();
document.documentElement.dataset.drawn = performance.now(); // for tests and benchmarks
