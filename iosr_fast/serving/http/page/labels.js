// The dialog that asks for the labels of a picture that may have several, one by one, by the names of classes.

import { button, find, make, span } from "./dom.js";

let names = [];

function fill(others) {
  names = others;
  find("labels-chosen").replaceChildren(...names.map(chip));
  find("labels-name").value = "";
  find("labels-name").setCustomValidity("");
}

function chip(name) {
  const leaveOut = () => {
    fill(names.filter((other) => other !== name));
    find("labels-name").focus();
  };
  const cross = button("\u00d7", leaveOut, { class: "plain", "aria-label": `Leave out ${name}` });
  return make("li", { class: "chip" }, span("name", name), cross);
}

const typed = () => find("labels-name").value.trim();
const isClass = (name) => [...find("names").options].some(({ value }) => value === name);

/** Take the name in the input, if it has one. */
function take() {
  const name = typed();
  if (name) fill([...names.filter((other) => other !== name), name]);
}

/** Ask for the labels of what `content` shows, at first these names: null if that is cancelled. */
export function askLabels(content, first) {
  fill(first);
  find("labels-words").replaceChildren(...content);
  find("labels").returnValue = "";
  find("labels").showModal();
  return new Promise((done) => {
    const close = () => {
      const isSent = find("labels").returnValue === "send";
      if (isSent) take();
      done(isSent ? names : null);
    };
    find("labels").addEventListener("close", close, { once: true });
  });
}

export function setUp() {
  find("labels-name").addEventListener("input", ({ target, inputType = "insertReplacementText" }) => {
    const known = isClass(typed());
    target.setCustomValidity(!typed() || known ? "" : "No class has this name. Add the class first.");
    if (known && inputType === "insertReplacementText") take(); // Of the suggestions.
  });
  find("labels-name").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !isClass(typed())) return;
    event.preventDefault();
    take();
  });
}
