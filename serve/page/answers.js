// What the endpoint says of a text: bars for each label column, and the words that speak for a class.

import { make, percent, short } from "./dom.js";

/** So many classes are shown at first; of more, the likeliest. */
const SHOWN = 10;
/** Below this share of the strongest word a word is not marked. */
const FAINT = 0.05;
/** Beyond this relative error the documentation says not to rely on an explanation. */
const RELIABLE = 0.05;

/** What is answered in a column, in words. */
export function answerOf({ label, probabilities }) {
  if (!Object.keys(probabilities).length) return "no answer: the model gave no finite numbers";
  if (Array.isArray(label)) return label.length ? label.join(", ") : "none of the classes";
  if (label === null) return "no answer";
  return Object.hasOwn(probabilities, label) ? label : `no answer (${label})`;
}

/**
 * The sections of an answer, one for each column.
 * `why(column, class, place, button)` is called where somebody asks why; null: that cannot be asked.
 */
export function sections(result, why) {
  const notes = [
    result.truncated && "The text is longer than the model reads: its end was not seen.",
    result.windows > 1 && `It was read in ${result.windows} windows.`,
  ].filter(Boolean);
  return [
    ...Object.entries(result.labels).map(([column, said]) => section(column, said, why)),
    notes.length ? make("p", { class: "note" }, notes.join(" ")) : null,
  ].filter(Boolean);
}

function section(column, said, why) {
  const given = [said.label].flat();
  const place = make("div");
  const rows = Object.entries(said.probabilities)
    .sort(([, a], [, b]) => b - a)
    .map(([name, probability]) => row(name, probability, given.includes(name), why && ((button) => why(column, name, place, button))));
  const more = rows.splice(SHOWN);
  return make(
    "section",
    { class: "card answer" },
    make("h2", { dir: "auto" }, column),
    make("p", { class: "said", dir: "auto" }, answerOf(said)),
    make("ul", { class: "classes" }, ...rows),
    more.length
      ? make("details", {}, make("summary", {}, `${more.length} more classes`), make("ul", { class: "classes" }, ...more))
      : null,
    place,
  );
}

function row(name, probability, answered, why) {
  const bar = make("span", { class: "bar", "aria-hidden": "true" }, make("span"));
  bar.firstChild.style.width = `${100 * probability}%`;
  const button = why && make("button", { type: "button", class: "quiet why-button" }, "Why", make("span", { class: "unseen" }, ` ${name}?`));
  button?.addEventListener("click", () => why(button));
  return make(
    "li",
    { class: answered ? "answered" : null },
    make("span", { class: "class" }, make("bdi", {}, name), answered ? make("span", { class: "badge" }, "answer") : null),
    bar,
    make("span", { class: "number" }, percent(probability)),
    button,
  );
}

/** An explanation: the text with its words marked, how exact it is, and the same in numbers. */
export function explained(told) {
  const strongest = Math.max(...told.words.map(({ attribution }) => Math.abs(attribution)), 0);
  const texts = [["text", told.text], ["pair", told.pair]].filter(([, text]) => text !== null);
  return make(
    "div",
    { class: "why", role: "group", "aria-label": `Why ${told.label}` },
    make("h3", {}, "Why ", make("bdi", {}, told.label)),
    ...texts.map(([source, text]) => marked(text, told.words.filter((word) => word.source === source), strongest)),
    make("p", { class: "legend" }, make("mark", { class: "for full" }, "speaks for it"), " ", make("mark", { class: "against full" }, "speaks against it")),
    exactness(told),
    make("details", {}, make("summary", {}, "The words in numbers"), table(told.words)),
  );
}

/** The text's words marked by what they brought; `start` and `end` count code points, which are not UTF-16 units. */
function marked(text, words, strongest) {
  const points = Array.from(text);
  const place = make("p", { class: "words", dir: "auto" });
  let end = 0;
  for (const word of [...words].sort((a, b) => a.start - b.start)) {
    const share = strongest ? Math.abs(word.attribution) / strongest : 0;
    const start = Math.max(end, word.start); // Tokens of one character may overlap.
    place.append(points.slice(end, start).join(""));
    end = Math.max(end, word.end);
    const own = points.slice(start, end).join("");
    if (share < FAINT || !own) {
      place.append(own);
      continue;
    }
    const mark = make("mark", { class: word.attribution > 0 ? "for" : "against" }, own);
    mark.style.setProperty("--strength", share.toFixed(3));
    place.append(mark);
  }
  place.append(points.slice(end).join(""));
  return place;
}

function exactness({ total, difference, relative_error: error, truncated }) {
  const sums =
    `The words add up to ${short(total)}; from a text of padding to this one, the logit changes by ${short(difference)}. ` +
    `The sum is off by ${percent(error)}.`;
  const end = truncated ? " The end of the text was not read." : "";
  return error > RELIABLE
    ? make("p", { class: "problem" }, `${sums} That is much: do not rely on this explanation.${end}`)
    : make("p", { class: "hint" }, sums + end);
}

/** The words and what they brought, for whoever does not see the marks. */
function table(words) {
  const head = make("tr", {}, make("th", { scope: "col" }, "Word"), make("th", { scope: "col", class: "number" }, "Brought"));
  const rows = words.map(({ text, attribution }) =>
    make("tr", {}, make("th", { scope: "row", dir: "auto" }, text), make("td", { class: "number" }, signed(attribution))),
  );
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
}

const signed = (number) => (number > 0 ? `+${short(number)}` : short(number));
