"use strict";
// Labels that are typed under pictures, saved as the CSV of path and label that `iosr-fast fit` reads; where a picture
// may have several, joined by ";", of path and labels. The browser keeps them between visits, by a hash of the
// pictures' paths.
const inputs = [...document.querySelectorAll("input[data-path]")];
const [status, button] = [document.querySelector("#status"), document.querySelector("#save")];
const names = [...document.querySelectorAll("#classes option")].map((option) => option.value);
const classes = new Map(names.flatMap((name) => spellings(name).map((spelling) => [spelling, name])));
const column = button.dataset.column ?? "label";
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

// What a name has in common with those that may be it mistyped, as head/names.py has it.
function spellings(name) {
  const quotes = name.replace(/[\u2018-\u201b\u02bc\u2032\xb4`]/g, "'").replace(/[\u201c-\u201f\u2033\xab\xbb]/g, '"');
  const typed = quotes.replace(/[\u2010-\u2015\u2212]/g, "-").normalize("NFKC").toLowerCase();
  const read = typed.replace(/(?<=[\p{L}\p{N}_])[\s_-]+(?=[\p{L}\p{N}_])/gu, " ");
  const words = [...read.matchAll(/(?:(?![\u2e80-\ud7ff])\p{L}){4,}|(?<=\p{L}) (?=\p{L})/gu)];
  const places = words.flatMap(({ 0: word, index }) => Array.from(word, (_, i) => index + i));
  const near = places.flatMap((place) => {
    const [before, letter, after] = [read.slice(0, place), read[place], read.slice(place + 1)];
    const marked = [`${before}_${after}`, `${before}_${letter}${after}`, `${before}${letter}_${after}`];
    return [...marked, `${before}${after}\n${letter}`];
  });
  return [read, ...near];
}

// A label that is close to a class is asked about; the button takes that.
function ask(input) {
  input.closest("li").querySelector(".meant")?.remove();
  const labels = (column === "labels" ? input.value.split(";") : [input.value]).map((label) => label.trim());
  const closest = (label) => spellings(label).map((spelling) => classes.get(spelling)).find(Boolean) ?? label;
  const meant = labels.map((label) => (names.includes(label) ? label : closest(label))).join(";");
  if (meant === labels.join(";")) return;
  const take = document.createElement("button");
  Object.assign(take, { type: "button", className: "button meant", textContent: `Did you mean ${meant}?` });
  take.dataset.label = meant;
  input.closest("label").after(take);
}

document.addEventListener("input", ({ target }) => {
  if (inputs.includes(target)) ask(target);
  update();
});
button.addEventListener("click", () => {
  saveCsv("labels.csv", [["path", column], ...rows()]);
  saved = JSON.stringify(rows());
  update();
});
// A button takes the label that it names.
document.addEventListener("click", ({ target }) => {
  if (target.dataset.label === undefined) return;
  const input = target.closest("li").querySelector("input");
  input.value = target.dataset.label;
  ask(input);
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
  for (const input of inputs) {
    input.value = labels.get(input.dataset.path) ?? "";
    if (input.value) ask(input);
  }
} catch {
  // Nothing was kept: update() says so.
}
update();
