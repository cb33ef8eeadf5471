// The model card: what `/v1/model` tells, for people.

import { make, short } from "./dom.js";

const SHOWN_METRICS = 6;
const SHOWN_CLASSES = 12;

/** The card's elements. */
export function card(model) {
  const registered = model.registered;
  return [
    make(
      "dl",
      { class: "facts" },
      ...fact("Name", registered ? `${registered.model}, version ${registered.number}` : model.name),
      ...fact("Fingerprint", make("code", {}, model.version)),
      ...fact("Computed by", [model.engine, model.precision, model.device].filter(Boolean).join(", ")),
      ...fact("Reads", `${model.pair ? "pairs of texts" : "texts"} of up to ${model.max_length} tokens`),
      ...model.labels.flatMap(({ name, classes, multi }) => fact(name, listed(classes), multi ? "any number of" : "one of")),
    ),
    ...measured(model.metrics ?? {}),
    ...descended(model.lineage ?? {}),
  ];
}

function fact(name, value, kind = "") {
  return [make("dt", {}, make("bdi", {}, name), kind && make("small", {}, kind)), make("dd", {}, value)];
}

function listed(classes) {
  const items = classes.map((name) => make("li", { dir: "auto" }, name));
  const more = items.splice(SHOWN_CLASSES);
  const list = make("ul", { class: "chips" }, ...items);
  if (!more.length) return list;
  const rest = make("details", {}, make("summary", {}, `${more.length} more`), make("ul", { class: "chips" }, ...more));
  return make("div", {}, list, rest);
}

function measured(metrics) {
  const rows = Object.entries(metrics)
    .filter(([, value]) => ["number", "string"].includes(typeof value))
    .map(([name, value]) => {
      const shown = typeof value === "number" ? (Math.abs(value) < 10 && !Number.isInteger(value) ? value.toFixed(4) : short(value)) : value;
      return make("tr", {}, make("th", { scope: "row" }, name.replaceAll("_", " ")), make("td", { class: "number" }, shown));
    });
  if (!rows.length) return [];
  const more = rows.splice(SHOWN_METRICS);
  const table = (part) => make("table", {}, make("tbody", {}, ...part));
  return [
    make("h3", {}, "Measured"),
    table(rows),
    ...(more.length ? [make("details", {}, make("summary", {}, `${more.length} more`), table(more))] : []),
  ];
}

function descended(lineage) {
  const items = Object.entries(lineage).map(([stage, ancestor]) => {
    const fingerprint = typeof ancestor === "string" ? ancestor : ancestor?.fingerprint ?? JSON.stringify(ancestor);
    return make("tr", {}, make("th", { scope: "row" }, stage), make("td", {}, make("code", {}, fingerprint)));
  });
  return items.length ? [make("h3", {}, "Lineage"), make("table", {}, make("tbody", {}, ...items))] : [];
}
