// The live figures: the metrics page, read every few seconds while somebody looks.

import { ask, Refusal } from "./endpoint.js";
import { byId, make, short } from "./dom.js";
import { between, quantile, reading, state, together } from "./metrics.js";

const EVERY_S = 3;
/** How many spans between readings count together: other replicas' numbers are up to 2 s old, so one alone jumps. */
const SPANS = 5;

let watching = false;
let model = "";
/** Counts the beginnings: what an earlier one still reads is no longer wanted. */
let run = 0;
let timer = 0;
let last = null;
let spans = [];

/** Begins to read of the model of that name, or begins anew. */
export function watch(name = model) {
  unwatch();
  watching = true;
  model = name;
  [last, spans] = [null, []];
  read(run);
}

/** Ends it. */
export function unwatch() {
  watching = false;
  run += 1;
  clearTimeout(timer);
}

document.addEventListener("visibilitychange", () => {
  if (!watching) return;
  if (document.hidden) clearTimeout(timer);
  else watch();
});

async function read(mine) {
  let seconds = EVERY_S;
  try {
    const page = await ask("metrics", { plain: true, seconds: 10 });
    if (mine !== run) return;
    const now = reading(page, performance.now() / 1000, model);
    if (last) spans = [...spans, between(last, now)].slice(-SPANS);
    last = now;
    byId("live-problem").textContent = "";
    show(together(spans), state(now));
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (mine !== run) return;
    byId("live-problem").textContent = error.message;
    // It stays so without another key, or at another address.
    if ([401, 403, 404].includes(error.status)) return unwatch();
    seconds = Math.max(EVERY_S, error.retryAfter);
  }
  if (!document.hidden) timer = setTimeout(read, 1000 * seconds, mine);
}

function show(span, now) {
  const rate = (count) => (span.seconds ? short(count / span.seconds) : "–");
  const versions = now.versions > 1 ? `of ${now.versions} versions` : "";
  const queue = now.tokens ? `${now.tokens.toLocaleString("en")} tokens` : "";
  byId("tiles").replaceChildren(
    tile("Replicas", now.replicas, versions),
    tile("Requests a second", rate(span.requests)),
    tile("Refused or failed a second", rate(span.unanswered)),
    tile("Latency, median", latency(quantile(span.buckets, 0.5))),
    tile("Latency, 99th percentile", latency(quantile(span.buckets, 0.99))),
    tile("Requests in the queue", now.queued, queue),
  );
  showDrift(now);
}

function tile(name, value, more = "") {
  const shown = make("dd", {}, String(value), more && make("small", {}, more));
  return make("div", {}, make("dt", {}, name), shown);
}

function latency(found) {
  if (!found) return "–";
  const { seconds, beyond } = found;
  const text = seconds < 1 ? `${seconds < 0.01 ? (1000 * seconds).toFixed(1) : Math.round(1000 * seconds)} ms` : `${short(seconds)} s`;
  return beyond ? `> ${text}` : text;
}

function showDrift({ drift, referenced, texts }) {
  byId("drift").hidden = !drift.length;
  byId("drift-hint").textContent = !referenced
    ? "This classifier was served without an evaluation to compare with."
    : drift.length
      ? `The last ${texts.toLocaleString("en")} texts against those of the evaluation.`
      : `Told when there are enough texts to compare; ${texts.toLocaleString("en")} so far.`;
  byId("drift").tBodies[0].replaceChildren(
    ...drift.map(({ signal, column, psi, noise }) => {
      const [level, word] = change(psi, noise);
      return make(
        "tr",
        {},
        make("th", { scope: "row", dir: "auto" }, column ? `${signal} of ${column}` : signal),
        make("td", { class: "number" }, psi.toFixed(3)),
        make("td", {}, make("span", { class: `level ${level}` }, word)),
      );
    }),
  );
}

/** As the index is usually read; what chance alone would bring is no change. */
function change(psi, noise) {
  if (psi < 0.1 || psi <= noise) return ["calm", "none"];
  return psi <= 0.25 ? ["some", "some"] : ["much", "much"];
}
