// Elements, words and numbers. Text is inserted as text nodes only, so foreign text is never markup.

const PER_CENT = new Intl.NumberFormat("en", { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });
const COUNT = new Intl.NumberFormat("en");

export const find = (id) => document.getElementById(id);

/** An element. A function as attribute listens to the event of that name; strings become text. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** A <span> of a class. */
export const span = (look, ...children) => make("span", { class: look }, ...children);

/** "1 example", "1,000 examples". */
export const count = (number, one, many = `${one}s`) => `${COUNT.format(number)} ${number === 1 ? one : many}`;

/** A probability to a tenth of a per cent, never rounded to certainty. */
export function percent(probability) {
  if (probability > 0.9995 && probability < 1) return "> 99.9%";
  if (probability < 0.0005 && probability > 0) return "< 0.1%";
  return PER_CENT.format(probability);
}

/** A number with two decimals and a true minus sign. */
export const signed = (number) => number.toFixed(2).replace("-", "\u2212");

export const quoted = (name) => `\u201c${name}\u201d`;

export const noPreview = () => make("span", { class: "missing", "aria-hidden": "true" }, "no preview");

/** A picture of a strip with a button that removes it. */
export const removable = (picture, words, remove) =>
  make("li", {}, picture, button("×", remove, { class: "button drop-one", "aria-label": words }));

export const button = (words, click, attributes = { class: "button" }) =>
  make("button", { type: "button", click, ...attributes }, words);

/** Say something to screen readers alone. */
export function announce(text) {
  find("notice-live").textContent = text;
}

/** Show a message in the bar at the bottom and announce it to screen readers, until it is closed or replaced. */
export function say(text, error = false) {
  find("notice").hidden = false;
  find("notice").classList.toggle("bad", error);
  find("notice-text").textContent = text;
  announce(text);
}

export const complain = (problem) => say(problem, true);

/** Mark a field, say why below it (in the element "<its id>-error"), and focus it, until its value changes. */
export function refuse(field, words) {
  field.setAttribute("aria-invalid", "true");
  find(`${field.id}-error`).textContent = words;
  field.addEventListener("input", () => accept(field), { once: true });
  field.focus();
}

export function accept(field) {
  field.removeAttribute("aria-invalid");
  find(`${field.id}-error`).textContent = "";
}

export function sayNothing() {
  find("notice").hidden = true;
  announce("");
}

/** Scroll to an element unless it is in sight. */
export function scrollTo(element) {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  element.scrollIntoView({ block: "nearest", behavior: still ? "auto" : "smooth" });
}

export const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

/** Call `send` when a form is submitted; not while it is running. A disabled button would lose the focus. */
export function onSubmit(form, send) {
  const button = form.querySelector("button:not([type])");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (button.getAttribute("aria-disabled") === "true") return;
    button.setAttribute("aria-disabled", "true");
    await send();
    button.removeAttribute("aria-disabled");
  });
}
