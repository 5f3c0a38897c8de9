// Files of the user: dropped or chosen.

import { complain } from "./dom.js";

/** Pass files dropped on `element` to `take`; it is marked while something hovers over it. */
export function acceptDrops(element, take) {
  const marked = (on) => element.classList.toggle("hovered", on);
  element.addEventListener("dragover", (event) => {
    event.preventDefault();
    event.stopPropagation();
    marked(true);
  });
  element.addEventListener("dragleave", (event) => {
    if (!element.contains(event.relatedTarget)) marked(false);
  });
  element.addEventListener("drop", (event) => {
    event.preventDefault();
    event.stopPropagation();
    marked(false);
    const files = [...event.dataTransfer.files];
    if (files.length) take(files);
    else complain("No file was dropped. Save the picture first, or copy and paste it.");
  });
}

/** Pass files of an <input type="file"> to `take`; the same file can be chosen again. */
export function acceptChoices(input, take) {
  input.addEventListener("change", () => {
    const files = [...input.files];
    input.value = "";
    if (files.length) take(files);
  });
}
