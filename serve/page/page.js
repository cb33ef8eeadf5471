// The page: what is shown when, and what its buttons do.

import { answerOf, explained, sections } from "./answers.js";
import { card } from "./card.js";
import { ask, key, Refusal } from "./endpoint.js";
import { byId, make, percent } from "./dom.js";
import { unwatch, watch } from "./live.js";

/** What the endpoint offers, from its OpenAPI document, which is open to all. */
const offers = { explain: false, keys: "" };
let model = null;
/** Gives up what is asked for just now; a later wish takes the place of an earlier one. */
let current = new AbortController();

async function start() {
  byId("retry").hidden = true;
  byId("trouble").textContent = "";
  try {
    const { paths, components } = await ask("openapi.json");
    offers.explain = "/v1/explain" in paths;
    offers.keys = components?.securitySchemes ? (components.securitySchemes.bearer?.description ?? "It is an API key.") : "";
    if (offers.keys && !key.get()) demandKey();
    else await open();
  } catch (error) {
    trouble(error);
  }
}

/** Shows the model and what can be asked of it. */
async function open() {
  model = await ask("v1/model");
  document.title = `${model.name} · Shoal`;
  byId("name").textContent = model.name;
  byId("partner-field").hidden = !model.pair;
  byId("text-label").textContent = model.pair ? "First text" : "Text";
  byId("model").replaceChildren(...card(model));
  byId("forget").hidden = !key.get();
  byId("key-form").hidden = true;
  byId("desk").hidden = false;
  watch(model.name);
}

function demandKey(sentence = "") {
  key.forget();
  unwatch();
  current.abort();
  byId("desk").hidden = true;
  byId("forget").hidden = true;
  byId("key-form").hidden = false;
  byId("key-kind").textContent = offers.keys;
  byId("trouble").textContent = sentence;
  byId("results").replaceChildren();
  byId("results").removeAttribute("aria-busy");
  byId("key").value = "";
  byId("key").focus();
}

/** Tells what keeps the whole page from working. */
function trouble(error) {
  if (!(error instanceof Refusal)) throw error;
  if (error.status === 401) return demandKey(error.message);
  byId("trouble").textContent = error.message;
  byId("retry").hidden = false;
}

byId("retry").addEventListener("click", start);

byId("forget").addEventListener("click", () => demandKey());

byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const given = byId("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(given)) {
    byId("trouble").textContent = given ? "A key has letters, digits and signs of ASCII only." : "Type or paste a key first.";
    byId("key").focus();
    return;
  }
  key.set(given);
  byId("trouble").textContent = "";
  try {
    await open();
    byId("text").focus();
  } catch (error) {
    trouble(error);
  }
});

/** Runs what somebody asked for, in place of what they asked for before; `tell` is given the sentence of a failure. */
async function wished(work, tell) {
  current.abort();
  current = new AbortController();
  const { signal } = current;
  tell("");
  byId("results").setAttribute("aria-busy", "true");
  try {
    await work(signal);
  } catch (error) {
    if (signal.aborted) return;
    if (!(error instanceof Refusal)) throw error;
    if (error.status === 401) return demandKey(error.message);
    if (error.status === 501) withoutExplanations();
    byId("status").textContent = "";
    tell(error.message);
  } finally {
    if (!signal.aborted) byId("results").removeAttribute("aria-busy");
  }
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const fields = model.pair ? [byId("text"), byId("partner")] : [byId("text")];
  const empty = fields.find((field) => !field.value.trim());
  if (empty) {
    byId("problem").textContent = "Type a text first.";
    empty.focus();
    return;
  }
  classify(...fields.map((field) => field.value));
});

for (const id of ["text", "partner"]) {
  byId(id).addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    byId("ask").requestSubmit();
  });
}

function classify(text, pair) {
  return wished(async (signal) => {
    const { results } = await ask("v1/classify", { body: { texts: [pair === undefined ? text : [text, pair]] }, signal });
    const why = offers.explain ? (...asked) => explain(text, pair, ...asked) : null;
    byId("results").replaceChildren(...sections(results[0], why));
    byId("status").textContent = Object.entries(results[0].labels).map(sentence).join(" ");
  }, (sentence) => (byId("problem").textContent = sentence));
}

function sentence([column, said]) {
  const likeliest = Math.max(...Object.values(said.probabilities));
  const single = typeof said.label === "string" && Object.hasOwn(said.probabilities, said.label);
  return `${column}: ${answerOf(said)}${single ? `, ${percent(likeliest)}` : ""}.`;
}

function explain(text, pair, column, label, place, button) {
  return wished(async (signal) => {
    byId("status").textContent = `Explaining ${label}; the first time takes some seconds.`;
    button.classList.add("waiting");
    signal.addEventListener("abort", () => button.classList.remove("waiting"));
    try {
      const told = await ask("v1/explain", { body: { text, pair, column, label }, seconds: 120, signal });
      place.replaceChildren(explained(told));
      byId("status").textContent = `Why ${label}: its words are marked below the classes of ${column}.`;
    } finally {
      button.classList.remove("waiting");
    }
  }, (sentence) => place.replaceChildren(make("p", { class: "problem", role: "alert" }, sentence)));
}

/** The model is of a kind that cannot be explained. */
function withoutExplanations() {
  offers.explain = false;
  for (const button of document.querySelectorAll(".why-button")) button.remove();
}

start();
