// Files of the user: dropped, pasted or chosen.

import { complain } from "./dom.js";

/** The files of a drop or a paste: {files, problem}; `problem` describes what could not be used. */
export function filesOf(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.());
  if (entries.some((entry) => entry?.isDirectory)) {
    return { files: [], problem: "Folders are not supported. Open it and drop its pictures." };
  }
  const files = [...transfer.files];
  const problem = files.length ? null : "No file was dropped. Save the picture first, or copy and paste it.";
  return { files, problem };
}

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
    const { files, problem } = filesOf(event.dataTransfer);
    if (problem) complain(problem);
    else take(files);
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
