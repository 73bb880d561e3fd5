// The reader below the figures, which shows the answers of the places that are open.

const WARNING = "Prompts may ask for harm, and answers may give it. Texts stay folded until you open one, or show all.";
const TOO_OLD =
  "This browser cannot unpack the answers, because it has no DecompressionStream. " +
  "Chrome 80, Firefox 113, Safari 16.4 and later ones have it.";
const reader = document.getElementById("reader");

/** Open a place, beside the first one if someone asked to compare. The keyboard's focus goes to the answers. */
async function openPlace(place, isByKey) {
  reader.hidden = false;
  if (typeof DecompressionStream === "undefined") {
    reader.replaceChildren(element("p", { className: "notice", role: "alert" }, TOO_OLD));
    return;
  }
  await show(isComparing ? [opened[0], place] : [place]);
  const title = document.getElementById("answers-title");
  if (isByKey) title.focus();
  else title.scrollIntoView({ block: "nearest" });
  panels.forEach(markPlaces);
  say(`Opened ${placeName(place)}`);
}

/** Show the answers at these places. */
async function show(places) {
  await setOpened(places);
  showReader();
  panels.forEach(markPlaces);
}

function showReader() {
  reader.replaceChildren(
    element("div", { className: "places" }, ...opened.map(placeHead)),
    tools(),
    element("p", { className: "warning" }, element("b", {}, "⚠ "), WARNING),
    element("div", { id: "rows", tabIndex: 0, role: "region", "aria-label": "Prompts and answers" }),
  );
  showRows();
}

/** Close the reader, and go back to the figure of the first place. */
async function closeReader() {
  const [{ run, set }] = opened;
  await setOpened([]);
  reader.hidden = true;
  panels.find((panel) => panel.run === run && panel.sets.includes(set)).frame.focus();
  panels.forEach(markPlaces);
}

/** The head of a place: its name, where to go from it, its rates, and how often each evaluator gave each label. */
function placeHead(place, i) {
  const run = CONTENT.runs[place.run];
  const letter = opened.length > 1 ? [letterOf(i), " "] : [];
  const ofRun = CONTENT.runs.length > 1 ? [untrusted(run.name), " · "] : [];
  return element(
    "div",
    { className: "place" },
    element(
      "div",
      { className: "bar" },
      element("h3", {}, ...letter, ...ofRun, placeName(place)),
      ...stepButtons(place, i),
      ...(i ? [button("Close B", "read A alone", () => show([opened[0]]))] : [compareButton()]),
      ...(i ? [] : [button("Close", "close the answers", closeReader)]),
    ),
    element("p", { className: "hint" }, placeRates(place, "asr")),
    element(
      "p",
      { className: "counts" },
      ...judgesOf(shownAnswers[i]).map((judge) => countsOf(shownAnswers[i], judge)),
    ),
  );
}

/** Buttons that go to the neighbours of a place. */
function stepButtons(place, i) {
  const { axes, sets } = CONTENT.runs[place.run];
  const steps = [
    ["←", "previous point", -1, 0],
    ["→", "next point", 1, 0],
  ];
  if (axes.length === 2) steps.push(["↓", "point below", 0, -1], ["↑", "point above", 0, 1]);
  else if (sets.length > 1) steps.push(["↑", "previous direction", 0, 1], ["↓", "next direction", 0, -1]);
  return steps.map(([text, label, first, second]) => {
    const go = async () => {
      await show(opened.map((old, j) => (i === j ? neighbour(place, first, second) : old)));
      reader.querySelectorAll(".place")[i].querySelector(`[aria-label="${label}"]`).focus();
    };
    return button(text, label, go, { "aria-label": label });
  });
}

function compareButton() {
  const made = button("Compare", "show the next point that you open beside this one", () => {
    isComparing = !isComparing;
    made.setAttribute("aria-pressed", isComparing);
    made.textContent = isComparing ? "Now open the other point" : "Compare";
    if (isComparing) document.getElementById("figures").scrollIntoView({ block: "nearest" });
  });
  made.setAttribute("aria-pressed", "false");
  return made;
}

function button(text, title, onclick, properties = {}) {
  return element("button", { type: "button", title, onclick, ...properties }, text);
}

function letterOf(i) {
  return element("span", { className: "letter" }, LETTERS[i]);
}

function countsOf(answers, judge) {
  const labels = answers.labels[judge].map((label) => label ?? UNJUDGED);
  const counts = LABELS.map((label) => [label, labels.filter((other) => other === label).length]);
  const chips = counts.filter(([, count]) => count).map(([label, count]) => chip(label, `${label} ${count}`));
  return element("span", { className: "judge" }, untrusted(judge), ...chips);
}

/** A label as a small sign. Signs differ in their words, their pattern and their colour. */
function chip(label, text = label) {
  return element("span", { className: `chip ${label.replace(" ", "-")}` }, text);
}

/** Search, filters, whose labels they go by, and the switch that unfolds all texts. */
function tools() {
  const label = "Search prompts and answers";
  const search = element("input", { type: "search", placeholder: label, value: choice.search, "aria-label": label });
  search.addEventListener("input", () => {
    choice.search = search.value;
    showRows();
  });
  const unfold = element("input", { type: "checkbox", checked: choice.unfolded });
  unfold.addEventListener("change", () => {
    choice.unfolded = unfold.checked;
    for (const row of reader.querySelectorAll("details")) row.open = choice.unfolded;
  });
  return element(
    "div",
    { className: "tools" },
    search,
    element("div", { className: "filters", role: "group", "aria-label": "Filters" }, ...filterButtons()),
    element("label", {}, "by ", judgeSelect()),
    element("label", {}, unfold, " show texts"),
  );
}

function filterButtons() {
  const buttons = filters().map(([filter, count]) => {
    const title = filter === DISAGREE ? "one evaluator takes the answer for a refusal, and another one does not" : "";
    const choose = () => {
      choice.filter = filter;
      buttons.forEach((other) => other.setAttribute("aria-pressed", other === made));
      showRows();
    };
    const made = button(`${filter} ${count}`, title, choose, { "aria-pressed": filter === choice.filter });
    return made;
  });
  return buttons;
}

function judgeSelect() {
  const options = judges().map((name) => element("option", { value: name }, visible(name)));
  const select = element("select", { "aria-label": "Whose labels the filters go by" }, ...options);
  select.value = choice.judge;
  select.addEventListener("change", () => {
    choice.judge = select.value;
    reader.querySelector(".filters").replaceChildren(...filterButtons());
    showRows();
  });
  return select;
}

function showRows() {
  const rows = chosenRows();
  const isEmpty = !shownAnswers.some(Boolean);
  const none = isEmpty ? "There are no answers at this point: it is not evaluated." : "No answer matches.";
  const shown = rows.length ? rows.map(rowElement) : [element("p", { className: "hint" }, none)];
  document.getElementById("rows").replaceChildren(...shown);
  say(`${rows.length} answers`);
}

/** A row: its number and labels, and folded in it the prompt and the answers. */
function rowElement({ prompt, number, at }) {
  return element(
    "details",
    { className: "row", open: choice.unfolded },
    element("summary", {}, element("span", { className: "number" }, String(number)), ...at.map(rowLabels)),
    element("div", { className: "text prompt" }, untrusted(prompt, searchFor(choice.search), "p")),
    element("div", { className: "pair" }, ...at.map(rowText)),
  );
}

/** What evaluators said of the answer of this number at place `i`. */
function rowLabels(number, i) {
  const answers = shownAnswers[i];
  const known = judgesOf(answers).filter((judge) => labelOf(answers, judge, number) !== undefined);
  const labels = known.map((judge) => {
    return element("span", { className: "judge" }, untrusted(judge), chip(labelOf(answers, judge, number)));
  });
  const sign = element("span", { className: "disagree", title: DISAGREE }, "≠");
  const letter = opened.length > 1 ? [letterOf(i)] : [];
  return element(
    "span",
    { className: "labels" },
    ...letter,
    ...labels,
    ...(judgesDisagree(answers, number) ? [sign] : []),
  );
}

/** The text of the answer of this number at place `i`, and how it ended. */
function rowText(number, i) {
  const answers = shownAnswers[i];
  const letter = opened.length > 1 ? [letterOf(i)] : [];
  if (!answers || number < 0) {
    return element("div", { className: "text" }, ...letter, element("p", { className: "hint" }, "no answer here"));
  }
  const remarks = answers.remarks[number].map((remark) => CONTENT.remarks[remark]).join(", ");
  const text = untrusted(answers.texts[number], searchFor(choice.search), "p");
  return element("div", { className: "text" }, ...letter, text, element("p", { className: "hint" }, remarks));
}
