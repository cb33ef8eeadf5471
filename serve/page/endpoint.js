// Requests to the endpoint: the key that goes with them, and every failure as one sentence.

// By path as well, so that endpoints behind one host do not get each other's keys.
const ENTRY = `shoal key ${location.pathname}`;

/** The key, for as long as the tab is open. */
export const key = {
  get: () => sessionStorage.getItem(ENTRY),
  set: (value) => sessionStorage.setItem(ENTRY, value),
  forget: () => sessionStorage.removeItem(ENTRY),
};

/** A request that got no answer: the sentence that says why, the status (0: none came), seconds to wait where told. */
export class Refusal extends Error {
  constructor(sentence, status = 0, retryAfter = 0) {
    super(sentence);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/**
 * The endpoint's answer to GET, or to POST where there is a body; parsed unless `plain`.
 * Throws a Refusal, or AbortError when `signal` gave it up.
 */
export async function ask(path, { body, seconds = 60, signal, plain = false } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body) headers["Content-Type"] = "application/json";
  const late = AbortSignal.timeout(1000 * seconds);
  try {
    // Relative: the endpoint may stand under any path.
    const response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      cache: "no-store",
      signal: signal ? AbortSignal.any([signal, late]) : late,
    });
    if (!response.ok) throw await refusal(response);
    return await (plain ? response.text() : response.json());
  } catch (error) {
    if (error instanceof Refusal || signal?.aborted) throw error;
    if (late.aborted) throw new Refusal(`The endpoint did not answer within ${seconds} s; try again later.`);
    if (error instanceof SyntaxError) throw new Refusal("The endpoint's answer cannot be read as JSON.");
    throw new Refusal("The endpoint cannot be reached; see whether it runs, and whether you are online.");
  }
}

async function refusal(response) {
  let sentence = `The endpoint answered ${response.status} ${response.statusText}`.trim() + ".";
  if (response.headers.get("Content-Type")?.startsWith("application/problem+json")) {
    const problem = await response.json().catch(() => null);
    if (problem && typeof problem.detail === "string" && problem.detail) sentence = problem.detail;
  }
  const seconds = Number(response.headers.get("Retry-After")) || 0;
  if (seconds > 0 && !sentence.includes("again in")) sentence += ` Try again in ${seconds} s.`;
  return new Refusal(sentence, response.status, seconds);
}
