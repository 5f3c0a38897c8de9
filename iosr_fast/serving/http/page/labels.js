// Labels of a picture that may have several: chosen one by one, by the names of classes.

import { button, find, make, span } from "./dom.js";

let dialog = null;

/**
 * A list of the labels that are typed into an input or chosen from its suggestions, while `isUsed()`: {fill, chosen}.
 * `fill(names)` begins anew; `chosen()` has all names, that in the input, too.
 */
export function chooser(input, list, isUsed = () => true) {
  let names = [];
  const isClass = (name) => [...find("names").options].some(({ value }) => value === name);

  function fill(others) {
    names = others;
    list.replaceChildren(...names.map(chip));
    input.value = "";
    input.setCustomValidity("");
  }

  function chip(name) {
    const leaveOut = () => {
      fill(names.filter((other) => other !== name));
      input.focus();
    };
    const cross = button("\u00d7", leaveOut, { class: "plain", "aria-label": `Leave out ${name}` });
    return make("li", { class: "chip" }, span("name", name), cross);
  }

  function chosen() {
    const name = input.value.trim();
    if (name) fill([...names.filter((other) => other !== name), name]);
    return names;
  }

  input.addEventListener("input", ({ inputType = "insertReplacementText" }) => {
    if (!isUsed()) return;
    const name = input.value.trim();
    input.setCustomValidity(!name || isClass(name) ? "" : "No class has this name. Add the class first.");
    if (name && isClass(name) && inputType === "insertReplacementText") chosen(); // Of the suggestions.
  });
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !isUsed() || !isClass(input.value.trim())) return;
    event.preventDefault();
    chosen();
  });
  return { fill, chosen };
}

/** Ask for the labels of what `content` shows, at first these names: null if that is cancelled. */
export function askLabels(content, names) {
  dialog ??= chooser(find("labels-name"), find("labels-chosen"));
  dialog.fill(names);
  find("labels-words").replaceChildren(...content);
  find("labels").returnValue = "";
  find("labels").showModal();
  return new Promise((done) => {
    const close = () => done(find("labels").returnValue === "send" ? dialog.chosen() : null);
    find("labels").addEventListener("close", close, { once: true });
  });
}
