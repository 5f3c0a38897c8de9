// The list of classes: filter, view examples, add and remove them, rename, remove.

import * as api from "./api.js";
import { button, complain, count, find, listed, make, quoted, removable, span } from "./dom.js";
import { askLabels } from "./labels.js";
import { acceptChoices, prepared } from "./pictures.js";
import { several } from "./queue.js";
import { supportPicture } from "./result.js";

const SHOWN = 100; // 1,000 rows would be 1,000 stops of the Tab key.
let change = null;
let unlabelled = null; // How many examples have no label, where they may have several.

export let all = [];

/** The class of a name, or undefined. */
export const named = (name) => all.find((info) => info.name === name);

/** Show these classes of the server; where pictures may have several labels, with how many examples have none. */
export function show(classes, without = null) {
  all = classes;
  unlabelled = without;
  find("names").replaceChildren(...all.map(({ name }) => make("option", { value: name })));
  draw();
}

function draw() {
  const focused = find("classes").contains(document.activeElement);
  const openId = find("classes").querySelector("[open]")?.dataset.id;
  const words = find("filter").value.trim().toLocaleLowerCase();
  const matches = all.filter(({ name, path = [] }) => [...path, name].join(" > ").toLocaleLowerCase().includes(words));
  const total = count(all.length, "class", "classes");
  find("matches").textContent =
    (matches.length < all.length ? `${matches.length} of ${total}` : total) +
    (matches.length > SHOWN ? `, the first ${SHOWN} are shown` : "");
  const rows = matches.slice(0, SHOWN);
  if (unlabelled !== null) rows.push({ class_id: "", name: "No label", examples: unlabelled });
  find("classes").replaceChildren(...rows.map((info) => row(info, info.class_id === openId)));
  // The focused element was replaced: focus the row of its class, or the filter if the class was removed.
  if (focused) (find("classes").querySelector("[open] summary") ?? find("filter")).focus();
}

function row(info, open) {
  const panel = make("div", { class: "panel" });
  const toggle = ({ target }) => target.open && fill(panel, info);
  const facts = [...(info.path?.length ? [info.path.join(" > ")] : []), count(info.examples, "example")];
  const name = make("summary", {}, info.name, span("quiet", facts.join(", ")));
  return make("li", {}, make("details", { name: "class", "data-id": info.class_id, open, toggle }, name, panel));
}

async function fill(panel, info) {
  const pictures = make("ul", { class: "strip", "aria-label": `Examples of ${info.name}` });
  const input = make("input", { type: "file", class: "cover", accept: "image/*", multiple: true });
  const own = info.class_id ? [info.name] : [];
  acceptChoices(input, async (files) => {
    const names = several ? await askLabels([`Labels of ${count(files.length, "new example")}`], own) : own;
    if (names) teach(names, files);
  });
  const whole = quoted(info.name) + (several ? "" : ` and its ${count(info.examples, "example")}`);
  const ofClass = [
    button("Rename", () => rename(info)),
    button("Remove class", () => remove(whole, () => api.removeClass(info.class_id)), { class: "button bad" }),
  ];
  const adding = make("label", { class: "button" }, input, "Add examples");
  const actions = make("div", { class: "row" }, adding, ...(info.class_id ? ofClass : []));
  panel.replaceChildren(pictures, actions);
  try {
    const { examples } = await api.examples(info.class_id);
    const removables = examples.map(({ example_id: id, class_ids: ids }, i) => {
      const words = `example ${i + 1} ${info.class_id ? `of ${info.name}` : "without a label"}`;
      const picture = supportPicture(id, words);
      const look = { class: "plain", "aria-label": `Labels of ${words}` };
      const shown = several ? button(picture, () => relabel(id, ids, words), look) : picture;
      return removable(shown, `Remove ${words}`, () => remove(words, () => api.removeExample(id)));
    });
    pictures.append(...removables);
  } catch (error) {
    complain(error.message);
  }
}

async function relabel(id, ids, words) {
  const names = all.filter((info) => ids.includes(info.class_id)).map(({ name }) => name);
  const chosen = await askLabels([supportPicture(id, words), `Labels of ${words}`], names);
  if (chosen) change(api.relabel(id, idsOf(chosen)), `Labels changed to ${listed(chosen)}.`);
}

const idsOf = (names) => names.map((name) => named(name).class_id);

/** Add files to the examples of the classes of these names, or as a new class of one: true if it succeeded. */
export function teach(names, files) {
  const known = names.every(named);
  const examples = count(files.length, "example");
  const send = async () => {
    const pictures = [];
    for (const file of files) pictures.push(await prepared(file)); // One by one: decoded photos are large.
    return known ? api.addExamples(idsOf(names), pictures) : api.addClass(...names, pictures);
  };
  return known
    ? change(send(), `${examples} added to ${listed(names)}.`)
    : change(send(), `Class ${listed(names)} added with ${examples}.`);
}

function rename({ class_id: id, name: old }) {
  const name = prompt(`New name of ${quoted(old)}:`, old)?.trim();
  if (!name || name === old) return;
  change(api.renameClass(id, name), `${quoted(old)} renamed to ${quoted(name)}.`);
}

function remove(words, send) {
  if (confirm(`Remove ${words}? This can't be undone.`)) change(send(), `Removed ${words}.`);
}

/** `send(request, words)` announces a change when its request succeeded; see page.js. */
export function setUp(send) {
  change = send;
  find("filter").addEventListener("input", draw);
}
