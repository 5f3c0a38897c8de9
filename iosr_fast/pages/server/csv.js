"use strict";
// CSV files of the page and of reports. A plain script, not a module, because reports hold it inline.

// Quotes as in RFC 4180. What a spreadsheet would take for a formula gets an apostrophe, as in utils/csv_text.py.
function csvCell(text) {
  const blank = /^(?:[\s\x1c-\x1f\x85"'\u200b\u2060\ufeff]*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n])/;
  const safe = blank.test(text) ? `'${text}` : text;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

const csvText = (rows) => rows.map((row) => `${row.map(csvCell).join(",")}\n`).join("");

/** Let the browser save rows of texts as a CSV file. */
function saveCsv(name, rows) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csvText(rows)], { type: "text/csv" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
