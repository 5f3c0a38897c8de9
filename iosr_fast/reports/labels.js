"use strict";
// Labels that are typed under pictures, saved as the CSV of path and label that `iosr-fast fit` reads. The browser
// keeps them between visits, by a hash of the pictures' paths.
const inputs = [...document.querySelectorAll("input[data-path]")];
const [status, button] = [document.querySelector("#status"), document.querySelector("#save")];
let saved = "";
let kept = false;

function rows() {
  const labelled = inputs.filter((input) => input.value.trim());
  return labelled.map((input) => [input.dataset.path, input.value.trim()]);
}

function update() {
  const labels = JSON.stringify(rows());
  try {
    localStorage.setItem(button.dataset.key, labels);
    kept = true;
  } catch {
    kept = false; // Some browsers have no storage for files, or none in private windows.
  }
  const state = labels === saved ? "; saved" : kept ? "; kept in this browser" : "; not kept, save them";
  status.textContent = `${rows().length} of ${inputs.length} images labelled${rows().length ? state : ""}`;
}

document.addEventListener("input", update);
button.addEventListener("click", () => {
  saveCsv("labels.csv", [["path", "label"], ...rows()]);
  saved = JSON.stringify(rows());
  update();
});
// A button takes the label that it names.
document.addEventListener("click", ({ target }) => {
  if (target.dataset.label === undefined) return;
  target.closest("li").querySelector("input").value = target.dataset.label;
  update();
});
// Enter goes to the next image in sight.
document.addEventListener("keydown", (event) => {
  const place = inputs.indexOf(event.target);
  if (event.key === "Enter" && place >= 0) {
    event.preventDefault();
    const next = inputs.slice(place + 1).find((input) => input.checkVisibility());
    (next ?? button).focus();
  }
});
window.addEventListener("beforeunload", (event) => {
  if (rows().length && !kept && JSON.stringify(rows()) !== saved) event.preventDefault();
});
try {
  const labels = new Map(JSON.parse(localStorage.getItem(button.dataset.key) ?? "[]"));
  for (const input of inputs) input.value = labels.get(input.dataset.path) ?? "";
} catch {
  // Nothing was kept: update() says so.
}
update();
