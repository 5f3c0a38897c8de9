// The list of pictures with their answers: radio buttons, of which one is selected and shown in full.

import { breakable, complain, count, find, make, percent, span } from "./dom.js";
import { classify, isOutdated } from "./queue.js";
import { naming } from "./result.js";

const MOST = 2000; // Rows and thumbnails that a browser holds with ease.
const COLUMNS = ["file", "label", "confidence", "alternatives", "error"];
let items = [];
let page = null;

// The selected item: {file, name, line, row} with what queue.js adds; of a part also {box: [x, y, width, height] in
// shares of the picture's sides, number}; after a change also {before: the previous prediction, taught: the names of the
// classes that got the picture}.
export let shown = null;

/** Put files on the list and select the first of them: their items, for queue.js. */
export const add = (files) => put(files.map((file) => ({ file, name: file.name || "pasted picture" })));

/** Put the part of the shown picture in a box on the list, after the others, and select it: its item, for queue.js. */
export function addPart(box) {
  const { file, name } = wholeOf(shown.file);
  const number = 1 + (partsOf(file).at(-1)?.number ?? 0);
  const last = items.findLastIndex((item) => item.file === file);
  return put([{ file, name: `${name}, box ${number}`, box, number }], last + 1);
}

export const wholeOf = (file) => items.find((item) => item.file === file);
export const partsOf = (file) => items.filter((item) => item.file === file && item.box);

/** Remove the shown part, and select what is before it. */
export function removePart() {
  const place = items.indexOf(shown);
  items.splice(place, 1)[0].line.remove();
  update([]);
  select(items[place - 1]);
  shown.choice.focus();
}

function put(wanted, place = items.length) {
  const added = wanted.slice(0, MOST - items.length);
  const left = wanted.length - added.length;
  if (left) complain(`The list holds ${count(MOST, "picture")}: ${count(left, "picture")} left out. Clear it first.`);
  for (const item of added) {
    const change = () => {
      shown = item;
      page.selected();
    };
    item.choice = make("input", { type: "radio", name: "shown", class: "cover", change });
    item.row = span("row");
    item.line = make("label", {}, item.choice, item.row);
    item.busy = true;
    find("items").insertBefore(item.line, items[place]?.line ?? null);
  }
  items.splice(place, 0, ...added);
  update(added);
  if (added.length) select(added[0]);
  return added;
}

export function select(item) {
  item.choice.click();
  find("items").scrollTop = item.line.offsetTop;
}

/** Write the rows of items anew, and what there is to do with the list. */
export function update(changed) {
  for (const { row, name, notes, thumbnail, prediction, error } of changed) {
    row.classList.toggle("bad", Boolean(error));
    row.replaceChildren(
      thumbnail ?? span("missing"),
      span("file quiet", ...breakable([name, ...(notes ?? [])].join(", "))),
      span("name", ...breakable(prediction ? naming(prediction) : (error ?? "waiting"))),
      span("probability", prediction && !prediction.several ? percent(prediction.probability) : ""),
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

/** A part is named by a media fragment, which the command line takes for a path. */
function csvRow({ file, name: shownName, box, prediction, error }) {
  const name = box ? `${wholeOf(file).name}#xywh=percent:${box.map((share) => +(100 * share).toFixed(2))}` : shownName;
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
