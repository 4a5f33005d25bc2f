/** The list of the caller's jobs: live while they wait or run, with previews, downloads and removal when finished. */

import { deleteJob, fileAddress, getBytes, getJson, Problem } from "./api.js";
import { byId, make, makeButton, pause, setText } from "./dom.js";
import { isFinished, watch } from "./events.js";
import { describe, details, nameOf } from "./messages.js";

const PAGE = 10;
const REFRESH_SECONDS = 15;
const list = byId("job-list");
const cards = new Map();
let session = new AbortController();
let next = null;
let hooks = {};

/** Shows the caller's jobs from now on. `given`: `show(pane, job, file, number)`, `changed(job)`, `failed(error)`. */
export function start(given) {
  stop();
  hooks = given;
  keepFresh(session.signal).catch(() => {}); // Ends when `stop` says so, with that as an error.
}

/** Forgets the jobs, and asks about none of them any more. */
export function stop() {
  session.abort();
  session = new AbortController();
  cards.clear();
  list.replaceChildren();
  next = null;
  showEnds();
}

/** Takes a job into the list, or what is new about it. */
export function put(job) {
  let card = cards.get(job.id);
  if (card?.finished && !isFinished(job)) return; // An answer that was overtaken by the stream.
  if (!card) {
    card = makeCard(job);
    cards.set(job.id, card);
    // Ids sort by time of creation.
    const after = [...list.children].find((item) => item.dataset.id < job.id);
    list.insertBefore(card.element, after ?? null);
    showEnds();
    if (!isFinished(job)) follow(job.id, session.signal);
  }
  card.update(job);
}

export function setUp() {
  byId("older").addEventListener("click", async () => {
    try {
      await load(`v1/jobs?limit=${PAGE}&before=${next}`, session.signal);
      if (byId("older").hidden) byId("jobs-title").focus();
    } catch (error) {
      if (!session.signal.aborted) hooks.failed(error);
    }
  });
}

async function load(address, signal) {
  const page = await getJson(address, { signal });
  page.jobs.forEach(put);
  next = page.next;
  showEnds();
}

// Jobs that other tabs and programs with the same key have sent, too.
async function keepFresh(signal) {
  for (let trouble = false; ; ) {
    try {
      if (!cards.size || document.visibilityState === "visible") await refresh(signal);
      if (trouble) setText(byId("jobs-error"), "");
      trouble = false;
    } catch (error) {
      signal.throwIfAborted();
      hooks.failed(error);
      trouble = true;
    }
    await pause(REFRESH_SECONDS, signal);
  }
}

async function refresh(signal) {
  if (!cards.size) return load(`v1/jobs?limit=${PAGE}`, signal);
  const known = [...cards.keys()];
  const page = await getJson(`v1/jobs?limit=${PAGE}`, { signal });
  page.jobs.forEach(put);
  // What the page would hold if it were still there has been removed elsewhere, or has expired.
  const oldest = page.next === null ? "" : page.jobs.at(-1).id;
  const present = new Set(page.jobs.map(({ id }) => id));
  known.filter((id) => id > oldest && !present.has(id) && cards.has(id)).forEach(remove);
  return undefined;
}

async function follow(id, signal) {
  try {
    await watch(id, hear, signal);
  } catch (error) {
    if (signal.aborted || !cards.has(id)) return;
    if (error instanceof Problem && error.status === 404) remove(id);
    else hooks.failed(error);
  }

  function hear(job) {
    if (!cards.has(id)) return; // Removed here, while its last words were on their way.
    put(job);
    hooks.changed(job);
  }
}

function remove(id) {
  const card = cards.get(id);
  const focused = card.element.contains(document.activeElement);
  card.element.remove();
  cards.delete(id);
  showEnds();
  if (focused) byId("jobs-title").focus();
}

function showEnds() {
  byId("no-jobs").hidden = cards.size > 0;
  byId("older").hidden = next === null;
}

function makeCard(first) {
  const bar = make("progress", { max: 1, hidden: true });
  bar.setAttribute("aria-label", `Progress of ${nameOf(first)}`);
  const state = make("p", { className: "state" });
  const files = make("div", { className: "files" });
  const end = makeButton("", `the job of ${nameOf(first)}`, () => discard(first.id));
  const text = make(
    "div",
    { className: "text" },
    make("h3", {}, `Seed ${first.request.seed}`),
    make("p", { className: "hint" }, details(first)),
    state,
    bar,
  );
  const element = make("li", { className: "job" }, text, make("div", { className: "actions" }, files, end));
  element.dataset.id = first.id;
  let shown = null;
  return {
    element,
    finished: false,
    update(job) {
      this.finished = isFinished(job);
      element.dataset.state = job.state;
      setText(state, describe(job));
      bar.hidden = job.state !== "running";
      bar.value = job.progress?.share ?? 0;
      setText(end.firstChild, isFinished(job) ? "Delete" : "Cancel");
      if (shown === job.state) return;
      shown = job.state;
      if (job.state === "done") fillFiles(files, text, job);
    },
  };
}

async function discard(id) {
  const done = cards.get(id).element.dataset.state === "done";
  if (done && !confirm("Delete this job and its volumes?")) return;
  try {
    await deleteJob(id);
  } catch (error) {
    if (error.status !== 404) return hooks.failed(error);
  }
  if (cards.has(id)) remove(id);
  return undefined;
}

/** What can be done with the volumes of a job that is done: one set of buttons, for the volume that is chosen. */
function fillFiles(place, text, job) {
  const volumes = job.files.filter(({ name }) => /\.nii(\.gz)?$/.test(name));
  if (!volumes.length) return;
  const preview = make("img", { className: "preview", alt: "" });
  const choice = make("select", {}, ...volumes.map((_, i) => make("option", { value: i }, `${i + 1} of ${volumes.length}`)));
  const about = `seed ${job.request.seed}`;
  choice.ariaLabel = `Volume of ${about}`;
  choice.hidden = volumes.length < 2;
  const chosen = () => volumes[choice.selectedIndex];
  const sidecar = () => beside(job, chosen().name, "json");
  const showPreview = () => loadPreview(preview, job, beside(job, chosen().name, "png"));
  choice.addEventListener("change", showPreview);
  place.replaceChildren(
    choice,
    makeButton("Show", about, () => hooks.show("a", job, chosen(), choice.selectedIndex + 1)),
    makeButton("Compare", about, () => hooks.show("b", job, chosen(), choice.selectedIndex + 1)),
    makeButton("NIfTI", `of ${about}`, () => download(job, chosen())),
    makeButton("Sidecar", `of ${about}`, () => download(job, sidecar())),
  );
  text.before(preview);
  showPreview();
}

function beside(job, volume, suffix) {
  const name = volume.replace(/\.nii(\.gz)?$/, `.${suffix}`);
  return job.files.find((file) => file.name === name);
}

async function loadPreview(image, job, file) {
  if (!file) return;
  const bytes = await getBytes(fileAddress(job, file.name), { signal: session.signal }).catch(() => null);
  if (!bytes) return; // A picture less; the volume itself says what is wrong when it is asked for.
  image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
  image.src = URL.createObjectURL(new Blob([bytes], { type: file.media_type }));
}

async function download(job, file) {
  try {
    const bytes = await getBytes(fileAddress(job, file.name), { signal: session.signal });
    const href = URL.createObjectURL(new Blob([bytes], { type: file.media_type }));
    make("a", { href, download: file.name }).click();
    setTimeout(() => URL.revokeObjectURL(href), 60_000); // The browser reads it after the click.
  } catch (error) {
    if (!session.signal.aborted) hooks.failed(error);
  }
}
