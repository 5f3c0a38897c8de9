// Elements, words and numbers. Text is inserted as text nodes only, so foreign text is never markup.

const PER_CENT = new Intl.NumberFormat("en", { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });

export const find = (id) => document.getElementById(id);

/** An element. A function as attribute listens to the event of that name; strings become text. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** A <span> of a class. */
export const span = (look, ...children) => make("span", { class: look }, ...children);

/** A text as the children of an element: file names in it may break behind slashes, dots and the like. */
export const breakable = (text) => text.split(/(?<=[/\\._-])(?=\S)/).flatMap((part) => [part, make("wbr")]);

export const button = (words, click, attributes = { class: "button" }) =>
  make("button", { type: "button", click, ...attributes }, words);

/** A picture of a strip with a button that removes it. */
export const removable = (picture, words, remove) =>
  make("li", {}, picture, button("×", remove, { class: "button drop-one", "aria-label": words }));

/** "1 example", "1,000 examples". */
export const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

/** A probability to a tenth of a per cent, never rounded to certainty. */
export function percent(probability) {
  if (probability > 0.9995 && probability < 1) return "> 99.9%";
  if (probability < 0.0005 && probability > 0) return "< 0.1%";
  return PER_CENT.format(probability);
}

/** A number with two decimals and a true minus sign. */
export const signed = (number) => number.toFixed(2).replace("-", "\u2212");

export const quoted = (name) => `\u201c${name}\u201d`;

/** Names of classes, of which there may be none. */
export const listed = (names) => names.map(quoted).join(", ") || "no class";

/** Show a message in the bar at the bottom, which screen readers announce, until it is closed or replaced. */
export function say(text, look = "") {
  const words = make("p", {}, text);
  find("notice").className = `row ${look}`;
  find("notice").replaceChildren(words, button("Close", sayNothing));
  return words;
}

export const complain = (problem) => say(problem, "bad");

export const sayNothing = () => find("notice").replaceChildren();

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
