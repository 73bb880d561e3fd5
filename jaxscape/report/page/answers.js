// The answers of the places that are open, one or two, and which of them are shown.

const REFUSALS = ["refused", "partial"]; // labels that count as a refusal
const UNJUDGED = "not judged"; // what the page calls an answer that an evaluator could not judge
const LABELS = ["refused", "partial", "complied", "incoherent", UNJUDGED];
const RARE = ["partial", UNJUDGED]; // filters that are left out where they keep nothing
const [ALL, DISAGREE, DIFFER] = ["all", "judges disagree", "A and B differ"];

let opened = []; // the places
let shownAnswers = []; // their answers, see `answersAt`
let isComparing = false; // whether the next place is opened beside the first
const choice = { filter: ALL, search: "", judge: "", unfolded: false };

/**
 * The answers at a place, unpacked: `texts`, a text for each prompt; `labels`, a list for each evaluator; and `remarks`,
 * a list for each prompt. Null where there are none.
 */
async function answersAt({ run, set, point }) {
  const packed = document.getElementById(`answers-${run}-${set}-${point}`);
  if (packed === null) return null;
  const bytes = Uint8Array.from(atob(packed.textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** Make these the places that are open. */
async function setOpened(places) {
  const answers = await Promise.all(places.map(answersAt));
  [opened, shownAnswers, isComparing] = [places, answers, false];
  if (!judges().includes(choice.judge))
    choice.judge = judges().find((name) => name === "coherence") ?? judges()[0] ?? "";
  if (!filters().some(([filter]) => filter === choice.filter)) choice.filter = ALL;
}

/** The names of the evaluators that judged a place that is open. */
function judges() {
  return [...new Set(shownAnswers.flatMap(judgesOf))];
}

function judgesOf(answers) {
  return Object.keys(answers?.labels ?? {});
}

/** What an evaluator said of an answer; undefined if it has not judged the point, or there is no answer. */
function labelOf(answers, judge, number) {
  if (number < 0 || !judgesOf(answers).includes(judge)) return undefined;
  return answers.labels[judge][number] ?? UNJUDGED;
}

/** Whether one evaluator takes an answer for a refusal and another one does not. */
function judgesDisagree(answers, number) {
  const labels = judgesOf(answers).map((judge) => labelOf(answers, judge, number));
  const known = labels.filter((label) => label !== undefined && label !== UNJUDGED);
  return new Set(known.map((label) => REFUSALS.includes(label))).size > 1;
}

/**
 * The rows to read: each with a `prompt`, its `number`, and `at`, the number of its answer at each place, or −1 where
 * it was not asked. Places of one run are aligned by the order of its prompts, others by the prompts themselves.
 */
function allRows() {
  if (!shownAnswers.some(Boolean)) return [];
  const lists = opened.map(({ run }) => CONTENT.runs[run].prompts);
  const isOneRun = lists.every((list) => list === lists[0]);
  const prompts = isOneRun ? lists[0] : [...new Set(lists.flat())];
  return prompts.map((prompt, i) => {
    return { prompt, number: i + 1, at: lists.map((list) => (isOneRun ? i : list.indexOf(prompt))) };
  });
}

/** The rows that the filter and the search keep. */
function chosenRows() {
  const search = searchFor(choice.search);
  return allRows().filter((row) => keeps(choice.filter, row) && (search === null || contains(row, search)));
}

/** Whether a filter keeps a row: because of either place. */
function keeps(filter, { at }) {
  const labels = at.map((number, i) => labelOf(shownAnswers[i], choice.judge, number));
  if (filter === ALL) return true;
  if (filter === DISAGREE) return at.some((number, i) => judgesDisagree(shownAnswers[i], number));
  if (filter === DIFFER) return labels[0] !== labels[1];
  return labels.includes(filter);
}

function contains({ prompt, at }, search) {
  const texts = at.map((number, i) => shownAnswers[i]?.texts[number] ?? "");
  return [prompt, ...texts].some((text) => text.search(search) >= 0);
}

/** The filters, each with the number of rows that it keeps. */
function filters() {
  const rows = allRows();
  return [ALL, ...LABELS, DISAGREE, ...(opened.length > 1 ? [DIFFER] : [])]
    .map((filter) => [filter, rows.filter((row) => keeps(filter, row)).length])
    .filter(([filter, count]) => count || !RARE.includes(filter));
}
