// Places. A *place* is a point of a direction set of a run: { run, set, point }, all three counted from 0.

/** The rate of this key in a run; its ASR if it has no such rate. */
function rateOf(run, key) {
  return run.rates.find((rate) => rate.key === key) ?? run.rates[0];
}

/** The three shares of a run by name; null if it has none. */
function sharesOf(run) {
  const shares = run.rates.filter((rate) => rate.key.endsWith(" shares"));
  return shares.length ? Object.fromEntries(shares.map((rate) => [rate.label, rate])) : null;
}

/** What the point of a place is called: its coordinates. */
function pointName({ run, point }) {
  return visible(CONTENT.runs[run].points[point]);
}

/** What a place is called: its coordinates, and its direction set if there are several. */
function placeName(place) {
  const { sets } = CONTENT.runs[place.run];
  return sets.length > 1 ? `${pointName(place)} of ${visible(sets[place.set].name)}` : pointName(place);
}

/** The rates at a place in words: the one of this key with its interval, and the three shares. */
function placeRates({ run: index, set, point }, key) {
  const run = CONTENT.runs[index];
  const rate = rateOf(run, key);
  const value = rate.value[set][point];
  if (value === null) return "not evaluated yet";
  const words = [`${visible(rate.label)} ${percent(value, rate.low[set][point], rate.high[set][point])}`];
  for (const [name, share] of Object.entries(sharesOf(run) ?? {})) {
    const part = share.value[set][point];
    if (share !== rate && part !== null) words.push(`${name} ${percent(part)}`);
  }
  return words.concat(run.evaluated[set][point] ? [] : ["interpolated"]).join(" · ");
}

/**
 * The place that lies `first` steps along the first axis and `second` along the second one; a border is not left.
 *
 * On a line, direction sets take the place of the second axis, the first set on top.
 */
function neighbour({ run, set, point }, first, second) {
  const { axes, points, sets } = CONTENT.runs[run];
  const within = (number, count) => Math.min(Math.max(number, 0), count - 1);
  if (axes.length < 2) {
    return { run, set: within(set - second, sets.length), point: within(point + first, points.length) };
  }
  const [rows, columns] = axes.map((axis) => axis.values.length);
  const row = within(Math.floor(point / columns) + first, rows);
  return { run, set, point: row * columns + within((point % columns) + second, columns) };
}

/** The coordinates of a point of a plane. */
function coordinates({ axes }, point) {
  const columns = axes[1].values.length;
  return [axes[0].values[Math.floor(point / columns)], axes[1].values[point % columns]];
}
