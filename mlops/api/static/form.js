/** The form that asks for volumes: what the models offer goes in, a request comes out, mistakes are told at the field. */

import { byId, make, setText } from "./dom.js";

const LARGEST_SEED = 2n ** 63n - 1n;
const form = byId("sample-form");
let catalogue = null;

/** Offers what the service's models can make. */
export function offer(offered) {
  catalogue = offered;
  const model = byId("model");
  const before = model.value;
  model.replaceChildren(...catalogue.models.map(({ name }) => make("option", { value: name }, name)));
  if (catalogue.models.some(({ name }) => name === before)) model.value = before;
  byId("model-field").hidden = catalogue.models.length < 2;
  byId("num").max = catalogue.limits.max_num;
  setText(byId("num-hint"), `Up to ${catalogue.limits.max_num} volumes.`);
  offerVersion();
}

/** Runs `submit(seed, rest)` when the form is sent and nothing in it is wrong; one at a time. */
export function onSample(submit) {
  const button = byId("submit");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (button.ariaDisabled === "true" || !check()) return;
    button.ariaDisabled = "true"; // Not `disabled`: that would take the focus away.
    try {
      await submit(byId("seed").value.trim(), request());
    } finally {
      button.ariaDisabled = "false";
    }
  });
  byId("model").addEventListener("change", offerVersion);
  byId("random-seed").addEventListener("click", () => {
    byId("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
    showError("seed", "");
  });
}

/** Shows the service's objections, `{field, message}`, each at its field, and the others above the button. */
export function object(errors, otherwise) {
  clearErrors();
  const other = [];
  for (const { field = "", message } of errors) {
    const name = fieldName(field);
    if (name) showError(name, message);
    else other.push(field ? `${field}: ${message}` : message);
  }
  const marked = form.querySelector("[aria-invalid=true]");
  if (!marked || other.length) setText(byId("form-error"), other.join(" ") || otherwise);
  marked?.focus();
}

export function clearErrors() {
  for (const element of form.querySelectorAll("[aria-invalid=true]")) showError(element.name, "");
  setText(byId("form-error"), "");
}

// The versions of a model share its traffic, and which of them answers is the service's affair; the first one's
// defaults and conditions stand for all. Nobody sees what a shadow makes.
function version() {
  const versions = catalogue.models.find(({ name }) => name === byId("model").value)?.versions;
  return versions?.find(({ shadow }) => !shadow);
}

function offerVersion() {
  const chosen = version();
  if (!chosen) return object([], "The service offers no model at the moment.");
  const { shape, spacing_mm: spacing, max_steps: most, default_steps: steps } = chosen;
  setText(byId("model-hint"), `${shape.join(" × ")} voxels of ${spacing.join(" × ")} mm`);
  byId("steps").max = Math.min(most, catalogue.limits.max_steps);
  byId("steps").value = steps;
  setText(byId("steps-hint"), `Usually ${steps}; fewer are quicker.`);
  const fieldset = byId("conditions");
  const fields = Object.entries(chosen.conditions).map(([name, values]) => conditionField(name, values));
  fieldset.replaceChildren(fieldset.firstElementChild, ...fields);
  fieldset.hidden = !fields.length;
  return clearErrors();
}

function conditionField(name, values) {
  const id = `condition-${name}`;
  const select = make(
    "select",
    { id, name: `conditions.${name}` },
    make("option", { value: "" }, "not given"),
    ...values.map((value) => make("option", { value }, value)),
  );
  select.setAttribute("aria-describedby", `${select.name}-error`);
  const error = make("p", { className: "error", id: `${select.name}-error` });
  return make("div", { className: "field" }, make("label", { htmlFor: id }, name), select, error);
}

function request() {
  const conditions = {};
  for (const select of byId("conditions").querySelectorAll("select")) {
    if (select.value) conditions[select.name.slice("conditions.".length)] = select.value;
  }
  const rest = {
    num: byId("num").valueAsNumber,
    model: byId("model").value,
    format: byId("format").value,
    conditions,
  };
  // Left as offered, the steps are left to the version that answers.
  const steps = byId("steps").valueAsNumber;
  return steps === version().default_steps ? rest : { ...rest, steps };
}

function check() {
  const errors = [];
  const seed = byId("seed").value.trim();
  if (!/^\d{1,19}$/.test(seed) || BigInt(seed) > LARGEST_SEED) {
    errors.push({ field: "seed", message: `A whole number from 0 to ${LARGEST_SEED}.` });
  }
  for (const name of ["num", "steps"]) {
    const { validity, max } = byId(name);
    if (!validity.valid) errors.push({ field: name, message: `A whole number from 1 to ${max}.` });
  }
  if (errors.length || !version()) object(errors, "The service offers no model at the moment.");
  else clearErrors();
  return !errors.length && Boolean(version());
}

// The service names a field by its path: `steps`, `body.steps`, `conditions.sex`, `/conditions/sex`.
function fieldName(path) {
  const [first, second] = path.split(/[./]/).filter((part) => part && part !== "body");
  const name = first === "conditions" && second ? `conditions.${second}` : first;
  return [...form.elements].some((element) => element.name === name) ? name : null;
}

function showError(name, text) {
  form.elements[name].setAttribute("aria-invalid", String(Boolean(text)));
  setText(byId(`${name}-error`), text);
}
