// What the endpoint's metrics page says: reading it, and figures from two readings.

const NAME = /[a-zA-Z_:][\w:]*/y;
const LABEL = /\s*([a-zA-Z_]\w*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*,?/y;
const ESCAPED = { n: "\n", '"': '"', "\\": "\\" };

/** The samples of a page in Prometheus' text form: [{name, labels, value}]; lines of another form are left out. */
export function parse(page) {
  return page.split("\n").map(sample).filter(Boolean);
}

function sample(line) {
  NAME.lastIndex = 0;
  const name = NAME.exec(line)?.[0];
  if (!name) return null;
  const labels = new Map();
  let end = NAME.lastIndex;
  if (line[end] === "{") {
    end += 1;
    for (let match; (LABEL.lastIndex = end), (match = LABEL.exec(line)); end = LABEL.lastIndex) {
      labels.set(match[1], match[2].replace(/\\(.)/g, (whole, letter) => ESCAPED[letter] ?? whole));
    }
    if (line[end] !== "}") return null;
    end += 1;
  }
  const word = line.slice(end).trim().split(/\s/)[0];
  const value = word === "+Inf" ? Infinity : word === "-Inf" ? -Infinity : word === "" ? NaN : Number(word);
  return word === "NaN" || !Number.isNaN(value) ? { name, labels, value } : null;
}

const replicaOf = ({ labels }) => JSON.stringify(["model", "version", "replica"].map((name) => labels.get(name)));
const seriesOf = ({ name, labels }) => JSON.stringify([name, ...labels]);

/** What a page said at some time, in seconds, of one model: other models of the endpoint are on it too. */
export function reading(page, at, model) {
  const samples = parse(page).filter(({ labels }) => (labels.get("model") ?? model) === model);
  return {
    at,
    samples,
    values: new Map(samples.map((each) => [seriesOf(each), each.value])),
    replicas: new Set(samples.map(replicaOf)),
    of: (name) => samples.filter((each) => each.name === name),
  };
}

/** By how much each counter of that name grew from one reading to the next: [{labels, value}]. */
function increases(before, now, name) {
  return now
    .of(name)
    .filter((each) => before.replicas.has(replicaOf(each))) // What a new replica counted before it was seen has no time.
    .map((each) => {
      const was = before.values.get(seriesOf(each)) ?? 0;
      return { labels: each.labels, value: each.value >= was ? each.value - was : each.value };
    });
}

const sum = (samples) => samples.reduce((total, { value }) => total + value, 0);

/** What happened on all replicas between two readings; `together` adds several up. */
export function between(before, now) {
  const requests = increases(before, now, "shoal_requests_total");
  const buckets = new Map();
  for (const { labels, value } of increases(before, now, "shoal_request_seconds_bucket")) {
    const bound = labels.get("le") === "+Inf" ? Infinity : Number(labels.get("le"));
    buckets.set(bound, (buckets.get(bound) ?? 0) + value);
  }
  const unanswered = requests.filter(({ labels }) => labels.get("status") !== "200");
  return { seconds: now.at - before.at, requests: sum(requests), unanswered: sum(unanswered), buckets };
}

/** Several spans of time as one. */
export function together(spans) {
  const all = { seconds: 0, requests: 0, unanswered: 0, buckets: new Map() };
  for (const span of spans) {
    for (const name of ["seconds", "requests", "unanswered"]) all[name] += span[name];
    for (const [bound, count] of span.buckets) all.buckets.set(bound, (all.buckets.get(bound) ?? 0) + count);
  }
  return all;
}

/**
 * The seconds that a share of the requests took at most, from cumulative buckets {bound: count}, as Prometheus'
 * histogram_quantile estimates them: {seconds, beyond}; `beyond`: more than that. Null where there was none.
 */
export function quantile(buckets, share) {
  const bounds = [...buckets.keys()].sort((a, b) => a - b);
  const total = buckets.get(Infinity) ?? 0;
  if (!total) return null;
  let [lower, below] = [0, 0];
  for (const bound of bounds) {
    const count = buckets.get(bound);
    if (bound === Infinity) break;
    if (count >= share * total && count > below) {
      return { seconds: lower + ((bound - lower) * (share * total - below)) / (count - below), beyond: false };
    }
    [lower, below] = [bound, count];
  }
  return { seconds: lower, beyond: true };
}

/** What holds at one reading: replicas, versions, queue and drift. */
export function state(now) {
  const builds = now.of("shoal_build_info");
  return {
    replicas: new Set(builds.map(replicaOf)).size,
    versions: new Set(builds.map(({ labels }) => labels.get("version"))).size,
    queued: sum(now.of("shoal_queued_requests")),
    tokens: sum(now.of("shoal_queue_tokens")),
    texts: sum(now.of("shoal_drift_texts")),
    referenced: now.of("shoal_reference_label_share").length > 0,
    drift: drift(now),
  };
}

/** The index of each signal: the replicas' mean, weighted by the texts in their windows. */
function drift(now) {
  const texts = new Map(now.of("shoal_drift_texts").map((each) => [replicaOf(each), each.value]));
  const signals = new Map();
  for (const kind of ["psi", "noise"]) {
    for (const each of now.of(kind === "psi" ? "shoal_drift_psi" : "shoal_drift_psi_noise")) {
      const [signal, column] = [each.labels.get("signal"), each.labels.get("column")];
      const id = JSON.stringify([signal, column]);
      const found = signals.get(id) ?? { signal, column, psi: 0, noise: 0, weight: 0 };
      const weight = texts.get(replicaOf(each)) ?? 0;
      found[kind] += weight * each.value;
      if (kind === "psi") found.weight += weight;
      signals.set(id, found);
    }
  }
  return [...signals.values()]
    .filter(({ weight }) => weight > 0)
    .map(({ signal, column, psi, noise, weight }) => ({ signal, column, psi: psi / weight, noise: noise / weight }));
}
