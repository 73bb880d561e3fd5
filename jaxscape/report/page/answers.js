// The reader: prompts and answers at one point, or at two points side by side, with what every evaluator said.

const WARNING = "Prompts may ask for harm, and answers may give it. Texts stay folded until you open one, or show all.";
const REFUSALS = ["refused", "partial"]; // labels that count as a refusal
const LABELS = ["refused", "partial", "complied", "incoherent", "not judged"];
const ALL = "all", DISAGREE = "judges disagree", DIFFER = "A and B differ";

let opened = []; // the places that are shown: one, or two
let shownAnswers = []; // what is unpacked of them
let comparing = false; // whether the next place is shown beside the first
const choice = { filter: ALL, search: "", judge: "", all: false };

/** Unpack the answers at a place: `{texts, labels, remarks}`, or null where there are none. */
async function answersAt({ run, set, point }) {
  const packed = document.getElementById(`answers-${run}-${set}-${point}`);
  if (packed === null) return null;
  const bytes = Uint8Array.from(atob(packed.textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** Open a place, in place of what is open or beside it. */
async function openPlace(place, byKey) {
  const places = comparing ? [opened[0], place] : [place];
  const reader = document.getElementById("reader");
  reader.hidden = false;
  if (typeof DecompressionStream === "undefined") {
    const text = "This browser cannot unpack the answers, because it has no DecompressionStream. Chrome 80, Firefox 113, Safari 16.4 and later ones have.";
    reader.replaceChildren(element("p", { className: "notice", role: "alert" }, text));
    return;
  }
  const answers = await Promise.all(places.map(answersAt));
  [opened, shownAnswers, comparing] = [places, answers, false];
  showReader();
  const title = document.getElementById("answers-title");
  if (byKey) title.focus();
  else title.scrollIntoView({ block: "nearest" });
  panels.forEach(markPlaces);
  say(`Opened ${placeName(place)}`);
}

function closeReader() {
  const panel = panels.find(({ run, sets }) => run === opened[0].run && sets.includes(opened[0].set));
  [opened, shownAnswers, comparing] = [[], [], false];
  document.getElementById("reader").hidden = true;
  panels.forEach(markPlaces);
  panel.frame.focus();
}

/** The names of the evaluators that judged a place that is open. */
function judges() {
  return [...new Set(shownAnswers.flatMap((answers) => Object.keys(answers?.labels ?? {})))];
}

/** What an evaluator said of an answer; undefined if it has not judged the point, or there is no answer. */
function labelOf(answers, judge, number) {
  if (number < 0 || !(judge in (answers?.labels ?? {}))) return undefined;
  return answers.labels[judge][number] ?? "not judged";
}

/** Whether one evaluator takes an answer for a refusal and another one does not. */
function disagree(answers, number) {
  const said = Object.keys(answers?.labels ?? {}).map((judge) => labelOf(answers, judge, number));
  const known = said.filter((label) => label !== undefined && label !== "not judged");
  return new Set(known.map((label) => REFUSALS.includes(label))).size > 1;
}

/** The rows of the reader: each prompt with the number of its answer at each place, −1 where it was not asked. */
function readerRows() {
  if (!shownAnswers.some(Boolean)) return [];
  const lists = opened.map(({ run }) => CONTENT.runs[run].prompts);
  const prompts = [...new Set(lists.flat())];
  const rows = prompts.map((prompt, i) => ({ prompt, number: i + 1, at: lists.map((list) => list.indexOf(prompt)) }));
  return lists.length === 1 ? lists[0].map((prompt, i) => ({ prompt, number: i + 1, at: [i] })) : rows;
}

/** Whether a filter keeps a row. */
function keeps(filter, row) {
  const labels = row.at.map((number, i) => labelOf(shownAnswers[i], choice.judge, number));
  if (filter === ALL) return true;
  if (filter === DISAGREE) return row.at.some((number, i) => disagree(shownAnswers[i], number));
  if (filter === DIFFER) return labels[0] !== labels[1];
  return labels.includes(filter);
}

function contains(row, search) {
  const texts = [row.prompt, ...row.at.map((number, i) => shownAnswers[i]?.texts[number] ?? "")];
  return search === null || texts.some((text) => text.search(search) >= 0);
}

/** Show the places that are open: who they are, the tools, and the answers. */
function showReader() {
  if (!judges().includes(choice.judge)) choice.judge = judges().includes("coherence") ? "coherence" : (judges()[0] ?? "");
  document
    .getElementById("reader")
    .replaceChildren(
      element("div", { className: "places" }, ...opened.map(placeHeader)),
      readerTools(),
      element("p", { className: "warning" }, element("b", {}, "⚠ "), WARNING),
      element("div", { id: "rows", tabIndex: 0, role: "region", "aria-label": "Prompts and answers" }),
    );
  showRows();
}

/** The head of a place: its name, its rates, how often each evaluator gave each label, and what to do next. */
function placeHeader(place, i) {
  const run = CONTENT.runs[place.run];
  const button = (text, title, onclick, properties = {}) => element("button", { type: "button", title, onclick, ...properties }, text);
  const step = (text, title, first, second) => button(text, title, () => stepTo(i, neighbour(place, first, second)), { "aria-label": title });
  const steps = [step("←", "previous point", -1, 0), step("→", "next point", 1, 0)];
  if (run.axes.length === 2) steps.push(step("↓", "point below", 0, -1), step("↑", "point above", 0, 1));
  else if (run.sets.length > 1) steps.push(step("↑", "previous direction", 0, 1), step("↓", "next direction", 0, -1));
  const compare = button("Compare", "show the next point that you open beside this one", () => waitForOther(compare), { "aria-pressed": "false" });
  const actions = i ? [button("Close B", "read A alone", () => keepOnly(opened[0]))] : [compare, button("Close", "close the answers", closeReader)];
  const name = element("h3", {}, ...(opened.length > 1 ? [element("span", { className: "letter" }, NAMES[i]), " "] : []));
  name.append(...(CONTENT.runs.length > 1 ? [untrusted(run.name), " · "] : []), placeName(place));
  return element(
    "div",
    { className: "place" },
    element("div", { className: "bar" }, name, ...steps, ...actions),
    element("p", { className: "hint" }, placeRates(place, "asr")),
    element("p", { className: "counts" }, ...Object.keys(shownAnswers[i]?.labels ?? {}).flatMap((judge) => judgeCounts(shownAnswers[i], judge))),
  );
}

function judgeCounts(answers, judge) {
  const said = answers.labels[judge].map((label) => label ?? "not judged");
  const counts = LABELS.map((label) => [label, said.filter((one) => one === label).length]).filter(([, count]) => count);
  return [element("span", { className: "judge" }, untrusted(judge), ...counts.map(([label, count]) => chip(label, `${label} ${count}`)))];
}

/** A label as a small sign, which differs in its words, its pattern and its colour. */
function chip(label, text = label) {
  return element("span", { className: `chip ${label.replace(" ", "-")}` }, text);
}

async function stepTo(i, place) {
  const places = opened.map((old, j) => (j === i ? place : old));
  shownAnswers = await Promise.all(places.map(answersAt));
  opened = places;
  showReader();
  panels.forEach(markPlaces);
}

function waitForOther(button) {
  comparing = !comparing;
  button.setAttribute("aria-pressed", comparing);
  button.textContent = comparing ? "Now open the other point" : "Compare";
  if (comparing) document.getElementById("figures").scrollIntoView({ block: "nearest" });
}

function keepOnly(place) {
  [opened, shownAnswers] = [[place], [shownAnswers[0]]];
  showReader();
  panels.forEach(markPlaces);
}

/** Search, filters with their counts, whose labels they go by, and the switch that unfolds all texts. */
function readerTools() {
  const rows = readerRows();
  const search = element("input", { type: "search", placeholder: "search prompts and answers", value: choice.search, "aria-label": "Search prompts and answers" });
  search.addEventListener("input", () => ((choice.search = search.value), showRows()));
  const filters = [ALL, ...LABELS, DISAGREE, ...(opened.length > 1 ? [DIFFER] : [])];
  const counted = filters.map((filter) => [filter, rows.filter((row) => keeps(filter, row)).length]);
  const rare = ["partial", "not judged"];
  const shown = counted.filter(([filter, count]) => count || !rare.includes(filter));
  if (!shown.some(([filter]) => filter === choice.filter)) choice.filter = ALL;
  const buttons = shown.map(([filter, count]) => {
    const button = element("button", { type: "button", "aria-pressed": String(filter === choice.filter) }, `${filter} ${count}`);
    if (filter === DISAGREE) button.title = "one evaluator takes the answer for a refusal, and another one does not";
    button.addEventListener("click", () => {
      choice.filter = filter;
      buttons.forEach((other) => other.setAttribute("aria-pressed", other === button));
      showRows();
    });
    return button;
  });
  const judge = element("select", { "aria-label": "Whose labels the filters go by" }, ...judges().map((name) => element("option", { value: name }, visible(name))));
  judge.value = choice.judge;
  judge.addEventListener("change", () => ((choice.judge = judge.value), showReader()));
  const all = element("input", { type: "checkbox", checked: choice.all });
  all.addEventListener("change", () => {
    choice.all = all.checked;
    for (const row of document.querySelectorAll("#rows details")) row.open = choice.all;
  });
  return element(
    "div",
    { className: "tools" },
    search,
    element("div", { className: "filters", role: "group", "aria-label": "Filters" }, ...buttons),
    element("label", {}, "by ", judge),
    element("label", {}, all, " show texts"),
  );
}

/** Show the rows that the filter and the search keep. */
function showRows() {
  const search = searchFor(choice.search);
  const rows = readerRows().filter((row) => keeps(choice.filter, row) && contains(row, search));
  const list = document.getElementById("rows");
  list.replaceChildren(...rows.map((row) => rowElement(row, search)));
  if (!rows.length) {
    const text = shownAnswers.some(Boolean) ? "No answer matches." : "There are no answers at this point: it is not evaluated.";
    list.append(element("p", { className: "hint" }, text));
  }
  say(`${rows.length} answers`);
}

/** A row: its number and labels, and folded in it the prompt and the answers. */
function rowElement({ prompt, number, at }, search) {
  const places = at.map((index, i) => ({ answers: shownAnswers[i], index, letter: opened.length > 1 ? NAMES[i] : "" }));
  const answer = ({ answers, index, letter }) =>
    element(
      "div",
      { className: "text" },
      ...(letter ? [element("span", { className: "letter" }, letter)] : []),
      ...(index >= 0 && answers ? [untrusted(answers.texts[index], search, "p"), remarks(answers, index)] : [element("p", { className: "hint" }, "no answer here")]),
    );
  return element(
    "details",
    { className: "row", open: choice.all },
    element("summary", {}, element("span", { className: "number" }, String(number)), ...places.map(labelsElement)),
    element("div", { className: "text prompt" }, untrusted(prompt, search, "p")),
    element("div", { className: "pair" }, ...places.map(answer)),
  );
}

function labelsElement({ answers, index, letter }) {
  const said = Object.keys(answers?.labels ?? {}).map((judge) => [judge, labelOf(answers, judge, index)]).filter(([, label]) => label);
  const differ = answers && index >= 0 && disagree(answers, index) ? [element("span", { className: "disagree", title: DISAGREE }, "≠")] : [];
  return element(
    "span",
    { className: "labels" },
    ...(letter ? [element("span", { className: "letter" }, letter)] : []),
    ...said.map(([judge, label]) => element("span", { className: "judge" }, untrusted(judge), chip(label))),
    ...differ,
  );
}

function remarks(answers, index) {
  return element("p", { className: "hint" }, answers.remarks[index].map((remark) => CONTENT.remarks[remark]).join(", "));
}
