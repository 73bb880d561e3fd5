// The table of numbers, and the table of what determines the runs.

/** A table from rows of nodes or texts; the first row is the head, and the first cell of a row names it. */
function table(rows, { differs = () => false } = {}) {
  const cell = (tag, content, scope) => element(tag, scope ? { scope } : {}, content);
  const [head, ...body] = rows;
  return element(
    "table",
    {},
    element("thead", {}, element("tr", {}, ...head.map((content) => cell("th", content, "col")))),
    element(
      "tbody",
      {},
      ...body.map((row) =>
        element(
          "tr",
          { className: differs(row) ? "differs" : "" },
          ...row.map((content, i) => (i ? cell("td", content) : cell("th", content, "row"))),
        ),
      ),
    ),
  );
}

/** For each run, its directions and its controls, what `landscape.json` says of them. */
function numbersTable({ runs, numbers }) {
  const titles = [...new Set(numbers.flatMap((row) => Object.keys(row.cells)))];
  const head = [...(runs.length > 1 ? ["run"] : []), "directions", ...titles];
  const names = (row) => [...(runs.length > 1 ? [untrusted(runs[row.run].name)] : []), untrusted(row.of)];
  return table([
    head,
    ...numbers.map((row) => [...names(row), ...titles.map((title) => numberCell(row.cells[title]))]),
  ]);
}

/** A number, and below it its interval. */
function numberCell(text = "–") {
  const [value, interval] = text.split(" (");
  return element("span", {}, value, ...(interval ? [element("small", {}, interval.replace(/\)$/, ""))] : []));
}

/** A row for each fact, a column for each run. */
function factsTable({ runs }) {
  const names = [...new Set(runs.flatMap((run) => run.facts.map(([name]) => name)))];
  const facts = runs.map((run) => new Map(run.facts));
  const rows = names.map((name) => [untrusted(name), ...facts.map((known) => untrusted(known.get(name) ?? "–"))]);
  const differs = (row) => new Set(row.slice(1).map((cell) => cell.textContent)).size > 1;
  return table([["", ...runs.map((run) => untrusted(run.name))], ...rows], { differs });
}
