// The list of classes: filter, view examples, add and remove them, rename, remove.

import * as api from "./api.js";
import { button, complain, count, find, make, quoted, removable, span } from "./dom.js";
import { acceptChoices, prepared } from "./pictures.js";
import { supportPicture } from "./result.js";

const SHOWN = 100; // 1,000 rows would be 1,000 stops of the Tab key.
let change = null;

export let all = [];

/** The class of a name, or undefined. */
export const named = (name) => all.find((info) => info.name === name);

/** Show these classes of the server. */
export function show(classes) {
  all = classes;
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
  find("classes").replaceChildren(...matches.slice(0, SHOWN).map((info) => row(info, info.class_id === openId)));
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
  acceptChoices(input, (files) => teach(info.name, files));
  const whole = `${quoted(info.name)} and its ${count(info.examples, "example")}`;
  const actions = make(
    "div",
    { class: "row" },
    make("label", { class: "button" }, input, "Add examples"),
    button("Rename", () => rename(info)),
    button("Remove class", () => remove(whole, () => api.removeClass(info.class_id)), { class: "button bad" }),
  );
  panel.replaceChildren(pictures, actions);
  try {
    const { example_ids: ids } = await api.examples(info.class_id);
    const removables = ids.map((id, i) => {
      const words = `example ${i + 1} of ${info.name}`;
      return removable(supportPicture(id, words), `Remove ${words}`, () => remove(words, () => api.removeExample(id)));
    });
    pictures.append(...removables);
  } catch (error) {
    complain(error.message);
  }
}

/** Add files to the examples of the class of this name, or as a new class: true if it succeeded. */
export function teach(name, files) {
  const known = named(name);
  const examples = count(files.length, "example");
  const send = async () => {
    const pictures = [];
    for (const file of files) pictures.push((await prepared(file)).file); // One by one: decoded photos are large.
    return known ? api.addExamples(known.class_id, pictures) : api.addClass(name, pictures);
  };
  return known
    ? change(send(), `${examples} added to ${quoted(name)}.`)
    : change(send(), `Class ${quoted(name)} added with ${examples}.`, name);
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
