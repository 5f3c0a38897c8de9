// How the reader's files get in: dropped, pasted or chosen.

/** The files of a drop or a paste: {files, problem}, where `problem` says in words what could not be taken. */
export function filesOf(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.());
  if (entries.some((entry) => entry?.isDirectory)) {
    return { files: [], problem: "A folder can't be taken. Open it and take its pictures." };
  }
  const files = [...transfer.files];
  const problem = files.length ? null : "That brought no file. Save the picture first, or copy and paste it.";
  return { files, problem };
}

/** Take the files that are dropped on `element`; it is marked while something hovers over it. */
export function acceptDrops(element, take, complain) {
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

/** Take the files that an <input type="file"> is given; the same file can be chosen again. */
export function acceptChoices(input, take) {
  input.addEventListener("change", () => {
    const files = [...input.files];
    input.value = "";
    if (files.length) take(files);
  });
}
