// The list of pictures with their answers: radio buttons, of which one is selected and shown in full.

import { complain, count, find, make, percent, span } from "./dom.js";
import { classify, isOutdated } from "./queue.js";
import { naming, verdict } from "./result.js";

const MOST = 2000; // Rows and thumbnails that a browser holds with ease.
const COLUMNS = ["file", "label", "confidence", "alternatives", "error"];
let items = [];
let page = null;

// The selected item: {file, name, row} with what queue.js adds; after a change also {before: the previous prediction,
// taught: the class that got the picture}.
export let shown = null;

/** Put files on the list and select the first of them: their items, for queue.js. */
export function add(files) {
  const added = files.slice(0, MOST - items.length).map((file) => {
    const item = { file, name: file.name || "pasted picture", row: span("row"), busy: true };
    const change = () => {
      shown = item;
      page.selected();
    };
    item.choice = make("input", { type: "radio", name: "shown", class: "cover", change });
    return item;
  });
  const left = files.length - added.length;
  if (left) complain(`The list holds ${count(MOST, "picture")}: ${count(left, "picture")} left out. Clear it first.`);
  items.push(...added);
  find("items").append(...added.map(({ choice, row }) => make("label", {}, choice, row)));
  update(added);
  if (added.length) {
    added[0].choice.click();
    find("items").scrollTop = added[0].choice.labels[0].offsetTop;
  }
  return added;
}

/** Write the rows of items anew, and what there is to do with the list. */
export function update(changed) {
  for (const { row, name, notes, thumbnail, prediction, error } of changed) {
    row.classList.toggle("bad", Boolean(error));
    row.replaceChildren(
      thumbnail ?? span("missing"),
      span("file quiet", [name, ...(notes ?? [])].join(", ")),
      span("name", prediction ? naming(prediction) : (error ?? "waiting")),
      span("probability", prediction ? percent(prediction.probability) : ""),
    );
  }
  const done = items.filter(({ busy }) => !busy).length;
  const again = items.filter(isOutdated).length;
  const working = done < items.length;
  find("list").hidden = !items.length;
  find("list-title").textContent = (working ? `${done} of ` : "") + count(items.length, "picture");
  if (!working && !find("progress").hidden) find("classified").textContent = `${count(done, "picture")} classified.`;
  find("progress").hidden = !working;
  Object.assign(find("progress"), { max: items.length, value: done });
  find("again").hidden = !again || working;
  find("again").textContent = `Classify ${again} again`;
}

function classifyAgain() {
  const old = items.filter(isOutdated);
  classify(old);
  update(old);
  shown.choice.focus();
}

function line({ name, prediction, error }) {
  if (!prediction) return [name, "", "", "", error ?? "not classified yet"];
  const unknown = verdict(prediction) === "unknown";
  const described = prediction.top.map(({ label, probability }) => `${label} ${probability.toFixed(4)}`);
  const answer = unknown ? ["unknown", ""] : [prediction.label, prediction.probability.toFixed(4)];
  return [name, ...answer, described.slice(unknown ? 0 : 1).join("; "), ""];
}

function clear() {
  if (!confirm(`Remove ${count(items.length, "picture")} from the list?`)) return;
  [items, shown] = [[], null];
  find("items").replaceChildren();
  update([]);
  page.cleared();
}

/** `callbacks.selected()` is called when another item is shown, `callbacks.cleared()` when the list was cleared. */
export function setUp(callbacks) {
  page = callbacks;
  find("again").addEventListener("click", classifyAgain);
  find("save").addEventListener("click", () => saveCsv("classified.csv", [COLUMNS, ...items.map(line)]));
  find("clear").addEventListener("click", clear);
}
