// The list of pictures with their answers: one of them is selected and shown in full.

import { announce, complain, count, find, make, percent, span } from "./dom.js";
import { classify, isOutdated } from "./queue.js";
import { naming, verdict } from "./result.js";

const MOST = 2000; // Rows and thumbnails that a browser holds with ease.
const STEPS = { ArrowUp: -1, ArrowDown: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
const COLUMNS = ["file", "label", "confidence", "alternatives", "error"];
let items = [];
let [selected, lastId] = [null, 0];
let [show, forget] = [null, null];

/** Put files on the list and select the first of them: their items, for queue.js. */
export function add(files) {
  const added = files.slice(0, MOST - items.length).map((file) => {
    const row = make("li", { role: "option", id: `item-${(lastId += 1)}`, "aria-selected": "false" });
    const item = { file, name: file.name || "pasted picture", row, busy: true };
    row.addEventListener("click", () => select(item));
    return item;
  });
  const left = files.length - added.length;
  if (left) complain(`The list holds ${count(MOST, "picture")}: ${count(left, "picture")} left out. Clear it first.`);
  items.push(...added);
  find("items").append(...added.map(({ row }) => row));
  update(added);
  if (added.length) select(added[0]);
  return added;
}

function select(item) {
  selected?.row.setAttribute("aria-selected", "false");
  selected = item;
  item.row.setAttribute("aria-selected", "true");
  const box = find("items");
  box.setAttribute("aria-activedescendant", item.row.id);
  const { offsetTop: top, offsetHeight: height } = item.row;
  box.scrollTop = Math.min(top, Math.max(box.scrollTop, top + height - box.clientHeight));
  show(item);
}

/** Write the rows of items anew, and what there is to do with the list. */
export function update(changed) {
  for (const { row, name, notes, thumbnail, prediction, error } of changed) {
    row.className = prediction ? verdict(prediction) : error ? "bad" : "";
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
  if (!working && !find("progress").hidden && find("notice").hidden) announce(`${count(done, "picture")} classified.`);
  find("progress").hidden = !working;
  Object.assign(find("progress"), { max: items.length, value: done });
  find("again").hidden = !again || working;
  find("again").textContent = `Classify ${again} again`;
}

function classifyAgain() {
  const old = items.filter(isOutdated);
  classify(old);
  update(old);
  find("items").focus();
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
  [items, selected] = [[], null];
  find("items").replaceChildren();
  update([]);
  forget();
}

/** `onSelect(item)` is called when another item is selected, `onClear()` when the list was cleared. */
export function setUp(onSelect, onClear) {
  [show, forget] = [onSelect, onClear];
  find("items").addEventListener("keydown", (event) => {
    if (!(event.key in STEPS)) return;
    event.preventDefault();
    const place = items.indexOf(selected) + STEPS[event.key];
    select(items[Math.min(Math.max(place, 0), items.length - 1)]);
  });
  find("again").addEventListener("click", classifyAgain);
  find("save").addEventListener("click", () => saveCsv("classified.csv", [COLUMNS, ...items.map(line)]));
  find("clear").addEventListener("click", clear);
}
