// The list of pictures with their answers: radio buttons, of which one is selected and shown in full.

import { breakable, complain, count, find, make, percent, span } from "./dom.js";
import { classify, isOutdated } from "./queue.js";
import { naming } from "./result.js";

const MOST = 2000; // Rows and thumbnails that a browser holds with ease.
const COLUMNS = ["file", "label", "confidence", "alternatives", "error"];
let items = [];
let page = null;

// The selected item: {file, name, choice, row} with what queue.js adds, and `taught`, the names of the classes that got
// the picture.
export let shown = null;

/** Put files on the list and select the first of them: their items, for queue.js. */
export function add(files) {
  const added = files.slice(0, MOST - items.length).map(makeItem);
  const left = files.length - added.length;
  if (left) complain(`The list holds ${count(MOST, "picture")}: ${count(left, "picture")} left out. Clear it first.`);
  items.push(...added);
  update(added);
  if (!added.length) return added;
  added[0].choice.click();
  find("items").scrollTop = added[0].row.parentElement.offsetTop;
  return added;
}

function makeItem(file) {
  const change = () => {
    shown = item;
    page.selected();
  };
  const choice = make("input", { type: "radio", name: "shown", class: "cover", change });
  const item = { file, name: file.name || "pasted picture", busy: true, choice, row: span("row") };
  find("items").append(make("label", {}, choice, item.row));
  return item;
}

/** Write the rows of items anew, and what there is to do with the list. */
export function update(changed) {
  for (const { row, name, thumbnail, prediction, error } of changed) {
    row.classList.toggle("bad", Boolean(error));
    row.replaceChildren(
      thumbnail ?? span("missing"),
      span("file quiet", ...breakable(name)),
      span("name", ...breakable(prediction ? naming(prediction) : (error ?? "waiting"))),
      span("probability", prediction && !prediction.several ? percent(prediction.probability) : ""),
    );
  }
  const done = items.filter(({ busy }) => !busy).length;
  const again = items.filter(isOutdated).length;
  const working = done < items.length;
  find("list").hidden = !items.length;
  find("list-title").textContent = count(items.length, "picture");
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

function csvRow({ name, prediction, error }) {
  if (!prediction) return [name, "", "", "", error ?? "not classified yet"];
  const { labels, several, top } = prediction;
  const described = top.map(({ label, probability }) => `${label} ${probability.toFixed(4)}`);
  const answer = labels.map(({ label }) => label).join(";") || (several ? "" : "unknown");
  const others = several ? [] : described.slice(labels.length);
  return [name, answer, labels.map(({ probability }) => probability.toFixed(4)).join(";"), others.join("; "), ""];
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
  find("save").addEventListener("click", () => saveCsv("classified.csv", [COLUMNS, ...items.map(csvRow)]));
  find("clear").addEventListener("click", clear);
}
