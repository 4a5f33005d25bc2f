/** Small helpers for the document. Text from the service only ever becomes text, never markup. */

export const byId = (id) => document.getElementById(id);

/** A new element: `make("button", { type: "button" }, "Show", other)`; properties that are undefined are left out. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) if (value !== undefined) element[name] = value;
  element.append(...children);
  return element;
}

/** A button whose visible text is `text` and whose whole name, for who does not see the page, adds `about`. */
export function makeButton(text, about, onClick) {
  const button = make("button", { type: "button" }, text, make("span", { className: "unseen" }, ` ${about}`));
  button.addEventListener("click", onClick);
  return button;
}

/** Shows `text` in `element`. Unchanged text is left alone: a live region would read it out again. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Waits; an aborted signal ends the wait with its reason. */
export function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, seconds * 1000);
    signal?.addEventListener("abort", stop, { once: true });
  });
}
