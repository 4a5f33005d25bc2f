/** A job's progress as it comes: server-sent events, and polling where those do not get through. */

import { getJson, open, parse, Problem } from "./api.js";
import { pause } from "./dom.js";

// EventSource cannot send an Authorization header, hence fetch. A browser opens six connections to a host over
// HTTP/1.1; streams take half of them at most, other jobs are polled.
const MAX_STREAMS = 3;
const POLL_SECONDS = 2;
const BUSY_SECONDS = 10;
const SILENCE_SECONDS = 45;
const FINISHED = ["done", "failed", "cancelled"];
let streams = 0;

export const isFinished = (job) => FINISHED.includes(job.state);

/** Calls `onJob` with every new state of a job until it is finished. Raises what `getJson` raises. */
export async function watch(id, onJob, signal) {
  for (let streaming = true; ; ) {
    if (streaming && streams < MAX_STREAMS) {
      const { last, heard } = await follow(id, onJob, signal);
      if (last && isFinished(last)) return;
      streaming = heard;
    }
    let wait = POLL_SECONDS;
    try {
      const job = await getJson(`v1/jobs/${id}`, { signal });
      onJob(job);
      if (isFinished(job)) return;
    } catch (error) {
      if (!error.passing) throw error;
      wait = error.retryAfter ?? BUSY_SECONDS;
    }
    await pause(wait, signal);
  }
}

/** Follows one stream to its end, whatever ends it: the last job heard of, and whether anything was heard at all. */
async function follow(id, onJob, signal) {
  let last = null;
  streams += 1;
  try {
    for await (const data of read(`v1/jobs/${id}/events`, signal)) {
      last = parse(data);
      onJob(last);
    }
  } catch (error) {
    signal.throwIfAborted();
    if (error instanceof Problem && error.status === 401) throw error;
  } finally {
    streams -= 1;
  }
  return { last, heard: last !== null };
}

async function* read(path, signal) {
  const silence = new AbortController();
  const both = AbortSignal.any([signal, silence.signal]);
  const answer = await open(path, { headers: { Accept: "text/event-stream" }, signal: both });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const timer = setTimeout(() => silence.abort(), SILENCE_SECONDS * 1000);
      const { done, value } = await reader.read().finally(() => clearTimeout(timer));
      if (done) return;
      const blocks = (text + value).replaceAll("\r\n", "\n").split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    silence.abort(); // Closes the connection when nobody reads on.
  }
}
