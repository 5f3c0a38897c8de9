// The list of classes: filter, view examples, add and remove them, rename, remove.

import * as api from "./api.js";
import { button, complain, count, find, make, quoted, removable, span } from "./dom.js";
import { acceptChoices } from "./pictures.js";
import { supportPicture } from "./result.js";
import { preparedAll } from "./upright.js";

const SHOWN = 100; // 1,000 rows would be 1,000 stops of the Tab key.
let all = [];
let openId = null;
let change;

const namesLike = (words) => {
  const lower = words.trim().toLocaleLowerCase();
  return all.filter(({ name }) => name.toLocaleLowerCase().includes(lower));
};

/** The class of a name, or undefined. */
export const named = (name) => all.find((info) => info.name === name);

/** The names that contain `words`, at most `limit`. */
export const namesWith = (words, limit) => namesLike(words).slice(0, limit).map(({ name }) => name);

/** Read the classes from the server: its answer, or null after an error. */
export async function refresh() {
  try {
    const { data } = await api.classes();
    all = data.classes;
    draw();
    return data;
  } catch (error) {
    complain(error.message);
    return null;
  }
}

function draw() {
  const focused = find("classes").contains(document.activeElement);
  const matches = namesLike(find("filter").value);
  const total = count(all.length, "class", "classes");
  const words = matches.length === all.length ? total : `${matches.length} of ${total}`;
  find("matches").textContent = words + (matches.length > SHOWN ? `, the first ${SHOWN} are shown` : "");
  find("classes").replaceChildren(...matches.slice(0, SHOWN).map(row));
  // The focused element was replaced: focus the row of its class, or the filter if the class was removed.
  if (focused) (find("classes").querySelector("[open] summary") ?? find("filter")).focus();
}

function row(info) {
  const panel = make("div", { class: "panel" });
  const toggle = ({ target }) => {
    if (target.open) fill(panel, info);
    if (target.open || openId === info.class_id) openId = target.open ? info.class_id : null;
  };
  const name = make("summary", {}, info.name, span("quiet", count(info.examples, "example")));
  const open = info.class_id === openId;
  return make("li", {}, make("details", { name: "class", open, toggle }, name, panel));
}

function fill(panel, info) {
  const pictures = make("ul", { class: "strip", "aria-label": `Examples of ${info.name}` });
  drawExamples(info, pictures);
  const input = make("input", { type: "file", accept: "image/*", multiple: true });
  acceptChoices(input, (files) => teach(info.name, files));
  const actions = make(
    "div",
    { class: "row" },
    make("label", { class: "button" }, input, "Add examples"),
    button("Rename", () => rename(info)),
    button("Remove class", () => removeClass(info), { class: "button bad" }),
  );
  panel.replaceChildren(pictures, actions);
}

async function drawExamples(info, list) {
  try {
    const { data } = await api.examples(info.class_id);
    list.replaceChildren(
      ...data.example_ids.map((id, i) => {
        const words = `example ${i + 1} of ${info.name}`;
        return removable(supportPicture(id, words), `Remove ${words}`, () => removeExample(info, id, i + 1));
      }),
    );
  } catch (error) {
    complain(error.message);
  }
}

/** Add files to the examples of the class of this name, or as a new class: true if it succeeded. */
export function teach(name, files) {
  const known = named(name);
  const [examples, whose] = [count(files.length, "example"), quoted(name)];
  const request = async (onWait) => {
    const pictures = await preparedAll(files);
    return (known ? api.addExamples(known.class_id, pictures) : api.addClass(name, pictures))(onWait);
  };
  return known
    ? change(request, `${examples} added to ${whose}.`)
    : change(request, `Class ${whose} added with ${examples}.`, name);
}

function rename({ class_id: id, name: old }) {
  const name = prompt(`New name of ${quoted(old)}:`, old)?.trim();
  if (!name || name === old) return;
  change(api.renameClass(id, name), `${quoted(old)} renamed to ${quoted(name)}.`);
}

function removeClass({ class_id: id, name, examples }) {
  if (!confirm(`Remove ${quoted(name)} and its ${count(examples, "example")}? This can't be undone.`)) return;
  change(api.removeClass(id), `Class ${quoted(name)} removed.`);
}

function removeExample({ name }, exampleId, place) {
  if (!confirm(`Remove example ${place} of ${quoted(name)}? This can't be undone.`)) return;
  change(api.removeExample(exampleId), `Example of ${quoted(name)} removed.`);
}

/** `send(request, words)` sends a change and announces it; see page.js. */
export function setUp(send) {
  change = send;
  find("filter").addEventListener("input", draw);
}
