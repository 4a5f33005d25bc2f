/** The page: who is there, what is asked for, what comes of it. */

import { fileAddress, getBytes, getJson, key, postSample, Problem } from "./api.js";
import { connection, tryNow } from "./connection.js";
import { byId, pause, setText } from "./dom.js";
import * as form from "./form.js";
import * as jobs from "./jobs.js";
import { describe, explain, nameOf } from "./messages.js";
import * as viewer from "./viewer.js";

const RETRY_SECONDS = 5;
const ROLES = ["viewer", "operator", "admin"];
let caller = null;
let newest = null; // Of the jobs sent from here: the one whose first volume is shown when it is done.
let showing = 0;
let told = "";

/** Finds out who is there: with the key of this tab, or without one where the service is open. */
async function enter() {
  try {
    caller = await getJson("v1/me");
    form.offer(await getJson("v1/models"));
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    if (error.status === 401) return leave(key.get() ? explain(error) : "");
    setText(byId("entry-error"), `${explain(error).replace(/\.?$/, ".")} Trying again.`);
    await pause(error.retryAfter ?? RETRY_SECONDS);
    return enter();
  }
  setText(byId("entry-error"), "");
  setText(byId("caller-name"), `${caller.name} (${caller.role})`);
  byId("caller").hidden = false;
  byId("log-out").hidden = !key.get();
  byId("log-in").hidden = true;
  byId("work").hidden = false;
  const may = ROLES.indexOf(caller.role) >= ROLES.indexOf("operator");
  byId("may-not").hidden = may;
  byId("sample-form").hidden = !may;
  document.body.classList.toggle("viewing-only", !may);
  return jobs.start({ show, changed, failed });
}

/** Forgets the key and everything seen with it, and asks for another. */
function leave(reason = "") {
  key.forget();
  caller = newest = null;
  jobs.stop();
  viewer.clear();
  setText(byId("status"), "");
  setText(byId("jobs-error"), "");
  byId("caller").hidden = true;
  byId("work").hidden = true;
  byId("log-in").hidden = false;
  byId("key").setAttribute("aria-invalid", String(Boolean(reason)));
  setText(byId("key-error"), reason);
  byId("key").focus();
}

async function sample(seed, rest) {
  try {
    const job = await postSample(seed, rest);
    newest = job.id;
    jobs.put(job);
    changed(job);
  } catch (error) {
    if (error.status === 401) leave(explain(error));
    else form.object(error.errors ?? [], explain(error, caller.role));
  }
}

/** Tells what has become of the newest job. Percentages are in the list: nobody wants to hear each of them. */
function changed(job) {
  if (job.id !== newest) return;
  const text = `${nameOf({ ...job, request: { ...job.request, num: 1 } })}: `;
  const now = job.state === "running" ? "running" : describe(job);
  if (told !== job.id + now) setText(byId("status"), text + now);
  told = job.id + now;
  if (job.state !== "done") return;
  newest = null;
  const volume = job.files.find(({ name }) => /\.nii(\.gz)?$/.test(name));
  if (volume) show("a", job, volume, 1);
}

/** Shows a volume in pane `a`, or in `b` beside the one in `a`. */
async function show(pane, job, file, number) {
  const turn = ++showing;
  const asked = byId("work");
  setText(byId("viewer-error"), "");
  asked.setAttribute("aria-busy", "true");
  try {
    const bytes = await getBytes(fileAddress(job, file.name));
    if (!caller || (turn !== showing && pane === "a")) return; // Logged out, or another volume was asked for since.
    await viewer.show(byId("pane-a").hidden ? "a" : pane, bytes, file.name, `${nameOf(job, number)} · ${job.request.model} ${job.version}`);
  } catch (error) {
    setText(byId("viewer-error"), explain(error, caller?.role));
  } finally {
    asked.removeAttribute("aria-busy");
  }
}

function failed(error) {
  if (error instanceof Problem && error.status === 401) leave(explain(error));
  else setText(byId("jobs-error"), explain(error, caller?.role));
}

byId("log-in-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const value = byId("key").value.trim();
  byId("key").value = "";
  // A header takes these characters only, and no key has others.
  if (!/^[\x21-\x7e]+$/.test(value)) return leave("Enter the key as you were given it: it has no spaces.");
  key.set(value);
  await enter();
  if (caller) byId("main").focus();
  return undefined;
});
byId("log-out").addEventListener("click", () => leave());
byId("try-now").addEventListener("click", tryNow);
addEventListener("online", tryNow);
connection.addEventListener("down", ({ detail: { seconds } }) => {
  setText(byId("connection-text"), `The server does not answer. Trying again in ${seconds} s.`);
  byId("connection").hidden = false;
});
connection.addEventListener("up", () => {
  byId("connection").hidden = true;
});
form.onSample(sample);
jobs.setUp();
viewer.setUp();
enter();
