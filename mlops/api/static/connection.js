/** What happens while the server does not answer: one probe, with back-off, for everybody who waits. */

/** The service's own address, whatever path a proxy has put before it: this file lies in `static/`. */
export const BASE = new URL("..", import.meta.url);

/** Tells `down`, with `detail.seconds` until the next try, and `up`. */
export const connection = new EventTarget();

const LONGEST_WAIT_SECONDS = 30;
const PROBE_SECONDS = 10;
let probing = null;
let wake = () => {};

/** Resolves when the server answers again. */
export function untilBack() {
  probing ??= probe().finally(() => {
    probing = null;
  });
  return probing;
}

/** Tries now rather than at the end of the wait. */
export function tryNow() {
  wake();
}

async function probe() {
  for (let seconds = 1; ; seconds = Math.min(2 * seconds, LONGEST_WAIT_SECONDS)) {
    connection.dispatchEvent(new CustomEvent("down", { detail: { seconds } }));
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, seconds * 1000);
      wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
    if (await answers()) break;
  }
  connection.dispatchEvent(new Event("up"));
}

async function answers() {
  try {
    const signal = AbortSignal.timeout(PROBE_SECONDS * 1000);
    return (await fetch(new URL("health", BASE), { cache: "no-store", signal })).ok;
  } catch {
    return false;
  }
}
