// Files of the user: dropped or chosen.

import { complain } from "./dom.js";

/** Pass files dropped on `element` to `take`; it is marked while something hovers over it. */
export function acceptDrops(element, take) {
  const over = (event) => {
    event.preventDefault();
    event.stopPropagation();
    element.classList.toggle("hovered", event.type === "dragover");
  };
  element.addEventListener("dragover", over);
  element.addEventListener("dragleave", (event) => {
    if (!element.contains(event.relatedTarget)) over(event);
  });
  element.addEventListener("drop", (event) => {
    over(event);
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
