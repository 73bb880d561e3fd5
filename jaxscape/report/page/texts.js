// Texts and elements. What a model wrote is untrusted: it enters the page through `textContent` and text nodes only, so
// the browser never reads it as HTML, and characters that cannot be seen are shown by their code points.

const CONTENT = JSON.parse(document.getElementById("content").textContent);

// Control and format characters (also those that turn the direction of writing), lone surrogates, private characters
// and separators of lines. The tab, the line feed, and the two joiners that many scripts need are left as they are.
const UNSEEN = /(?![\t\n\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/gu;

/** The name of a character's code point, such as U+202E. */
function codePoint(character) {
  return "U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
}

/** The text with code points in place of characters that cannot be seen, where only plain text can stand. */
function visible(text) {
  return text.replace(UNSEEN, (character) => `[${codePoint(character)}]`);
}

/** An element with properties and children. A child that is a text stays a text. */
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

/**
 * An element that shows an untrusted text, isolated from the direction of the text around it.
 *
 * What the regular expression `search` matches is marked.
 */
function untrusted(text, search = null, tag = "bdi") {
  const shown = element(tag, { className: "untrusted", dir: "auto" });
  for (const [part, isUnseen] of pieces(text, UNSEEN)) {
    if (isUnseen) {
      shown.append(
        element("span", { className: "unseen-character", title: "a character that cannot be seen" }, codePoint(part)),
      );
    } else {
      for (const [piece, isHit] of search ? pieces(part, search) : [[part, false]]) {
        shown.append(isHit ? element("mark", {}, piece) : piece);
      }
    }
  }
  return shown;
}

/** The parts of a text, each with whether the regular expression matched it. */
function* pieces(text, pattern) {
  let end = 0;
  for (const match of text.matchAll(pattern)) {
    if (match.index > end) yield [text.slice(end, match.index), false];
    yield [match[0], true];
    end = match.index + match[0].length;
  }
  if (end < text.length) yield [text.slice(end), false];
}

/** A regular expression that finds a text as it is written, in small or capital letters; null for an empty text. */
function searchFor(text) {
  return text ? new RegExp(text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"), "giu") : null;
}

/** A number in percent with one decimal, and its interval if it is given. */
function percent(value, ...interval) {
  const [text, ...ends] = [value, ...interval].map((number) => number.toFixed(1));
  return ends.length ? `${text} % (${ends.join(" to ")})` : `${text} %`;
}

/** Tell readers of the page who cannot see it. */
function say(text) {
  document.getElementById("said").textContent = text;
}
