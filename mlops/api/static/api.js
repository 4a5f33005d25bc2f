/** Requests to the service. A server that does not answer is waited for; other failures are `Problem`s. */

import { BASE, untilBack } from "./connection.js";
import { pause } from "./dom.js";

const KEY = "ldm3d.key";
const ANSWER_SECONDS = 30;
const GATEWAY = [502, 504];
const TRIES_WHEN_BUSY = 3;
const BUSY_SECONDS = 5;

/** A refusal of the service, RFC 9457. */
export class Problem extends Error {
  constructor(status, content, retryAfter = null) {
    super(content.detail || content.title || `The server answered with status ${status}.`);
    this.status = status;
    this.errors = Array.isArray(content.errors) ? content.errors : [];
    this.retryAfter = retryAfter;
  }

  /** Whether the same request may well work later. */
  get passing() {
    return this.status === 429 || this.status >= 500;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** One answer, headers only: for streams. Throws what `fetch` throws, or a `Problem`. */
export async function open(path, { method = "GET", headers = {}, body, signal } = {}) {
  const slow = new AbortController();
  const timer = setTimeout(() => slow.abort(), ANSWER_SECONDS * 1000);
  try {
    const answer = await fetch(new URL(path, BASE), {
      method,
      body,
      headers: key.get() ? { ...headers, Authorization: `Bearer ${key.get()}` } : headers,
      cache: "no-store",
      signal: signal ? AbortSignal.any([signal, slow.signal]) : slow.signal,
    });
    if (!answer.ok) throw await problemOf(answer);
    return answer;
  } finally {
    clearTimeout(timer);
  }
}

/** A whole answer, read by `read`; tried again for as long as the server is not there. */
async function request(path, options, read) {
  for (let busy = 1; ; ) {
    try {
      return await read(await open(path, options));
    } catch (error) {
      options.signal?.throwIfAborted();
      if (!(error instanceof Problem) || GATEWAY.includes(error.status)) {
        await untilBack();
      } else if (error.status === 429 && !options.method && busy++ < TRIES_WHEN_BUSY) {
        await pause(error.retryAfter ?? BUSY_SECONDS, options.signal);
      } else {
        throw error;
      }
    }
  }
}

export async function getJson(path, options = {}) {
  return parse(await request(path, options, (answer) => answer.text()));
}

export function getBytes(path, options = {}) {
  return request(path, options, (answer) => answer.arrayBuffer());
}

/** Asks for volumes. The idempotency key makes it safe to ask again when no answer came. */
export async function postSample(seed, rest) {
  const headers = { "Content-Type": "application/json", "Idempotency-Key": randomName() };
  // The seed goes in as text: it has up to 63 bits, and numbers of JavaScript have 53.
  const body = `{"seed":${seed},${JSON.stringify(rest).slice(1)}`;
  return parse(await request("v1/samples", { method: "POST", headers, body }, (answer) => answer.text()));
}

export async function deleteJob(id) {
  await request(`v1/jobs/${id}`, { method: "DELETE" }, () => null);
}

export const fileAddress = (job, name) => `v1/jobs/${job.id}/files/${encodeURIComponent(name)}`;

/** JSON of the service, with seeds beyond 53 bits as they are, where the browser tells the source text. */
export function parse(text) {
  try {
    return JSON.parse(text, (name, value, context) =>
      name === "seed" && !Number.isSafeInteger(value) && context?.source ? BigInt(context.source) : value,
    );
  } catch {
    throw new Problem(200, { detail: "The server's answer is not JSON. Does a proxy stand in between?" });
  }
}

async function problemOf(answer) {
  const text = await answer.text().catch(() => "");
  let content = {};
  try {
    content = JSON.parse(text) ?? {};
  } catch {
    content = { title: `${answer.status} ${answer.statusText}` };
  }
  const seconds = Number.parseInt(answer.headers.get("Retry-After"), 10);
  return new Problem(answer.status, content, Number.isNaN(seconds) ? null : seconds);
}

// crypto.randomUUID exists only over https.
function randomName() {
  return Array.from(crypto.getRandomValues(new Uint32Array(4)), (part) => part.toString(16).padStart(8, "0")).join("");
}
