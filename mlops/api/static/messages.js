/** What is said to the user: refusals, and how far a job is. */

/** One or two sentences on an error that `api.js` has thrown. */
export function explain(error, role) {
  if (!("status" in error)) return `This page has made a mistake: ${error.message}`;
  switch (error.status) {
    case 401:
      return "The key is not accepted. It may be mistyped, revoked or expired.";
    case 403:
      return `Your role, ${role}, does not allow this. ${error.message}`;
    case 404:
      return "It is no longer there: it was removed, or its time has run out.";
    case 429:
      return `${error.message} ${error.retryAfter === null ? "Try again later." : `Try again in ${duration(error.retryAfter)}.`}`;
    default:
      return error.message;
  }
}

/** How far a job is, in a few words. */
export function describe(job) {
  switch (job.state) {
    case "queued":
      return job.place ? `Waiting, place ${job.place} in the queue` : "Waiting";
    case "running":
      return `Running${left(job.progress)}`;
    case "done":
      return job.expires ? `Done, kept until ${clock(job.expires)}` : "Done";
    case "failed":
      return `Failed: ${job.error ?? "the service does not say why"}`;
    default:
      return "Cancelled";
  }
}

/** `Seed 7` or `Seed 7, volume 2 of 4`; the number counts from 1. */
export function nameOf(job, number = 1) {
  const { seed, num } = job.request;
  return num > 1 ? `Seed ${seed}, volume ${number} of ${num}` : `Seed ${seed}`;
}

/** What was asked for, beside the seed. */
export function details(job) {
  const { num, steps, model, conditions } = job.request;
  const parts = [`${model} ${job.version}`, `${steps} steps`];
  if (num > 1) parts.unshift(`${num} volumes`);
  return parts.concat(Object.entries(conditions).map(([name, value]) => `${name}: ${value}`)).join(" · ");
}

function left(progress) {
  if (!progress) return "";
  const percent = `, ${Math.floor(100 * progress.share)} %`;
  return progress.seconds_left === null ? percent : `${percent}, about ${duration(progress.seconds_left)} left`;
}

function duration(seconds) {
  if (seconds >= 90) return `${Math.round(seconds / 60)} minutes`;
  const whole = Math.max(1, Math.round(seconds));
  return whole === 1 ? "1 second" : `${whole} seconds`;
}

function clock(time) {
  const date = new Date(time);
  const day = date - Date.now() < 6 * 24 * 3600 * 1000 ? { weekday: "short" } : { month: "short", day: "numeric" };
  return date.toLocaleString([], { ...day, hour: "numeric", minute: "2-digit" });
}
