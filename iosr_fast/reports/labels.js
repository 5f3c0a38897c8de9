"use strict";
// Writes the labels that were typed as a CSV of path and label, which `iosr-fast fit` reads.
const inputs = [...document.querySelectorAll("input[data-path]")];
const status = document.querySelector("#status");
let saved = "";

// Quotes as in RFC 4180. What a spreadsheet would take for a formula gets an apostrophe, as all tables of iosr-fast.
function cell(text) {
  const safe = /^(?:[\s"'\u200b\u2060\ufeff]*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n])/.test(text) ? `'${text}` : text;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

function table() {
  const rows = inputs.filter((input) => input.value.trim());
  const lines = rows.map((input) => `${cell(input.dataset.path)},${cell(input.value.trim())}`);
  return { count: rows.length, csv: ["path,label", ...lines, ""].join("\n") };
}

function show() {
  const { count, csv } = table();
  const state = count && csv === saved ? ", saved" : "";
  status.textContent = `${count} of ${inputs.length} images labelled${state}`;
}

document.addEventListener("input", show);
document.querySelector("#save").addEventListener("click", () => {
  const { csv } = table();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv], { type: "text/csv" }));
  link.download = "labels.csv";
  link.click();
  saved = csv;
  show();
});
// Enter goes to the next image.
document.addEventListener("keydown", (event) => {
  const place = inputs.indexOf(event.target);
  if (event.key === "Enter" && place >= 0) {
    event.preventDefault();
    (inputs[place + 1] ?? document.querySelector("#save")).focus();
  }
});
window.addEventListener("beforeunload", (event) => {
  const { count, csv } = table();
  if (count && csv !== saved) {
    event.preventDefault();
  }
});
show();
