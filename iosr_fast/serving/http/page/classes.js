// The list of classes: filter, view examples, add and remove them, rename, remove.

import * as api from "./api.js";
import { complain, confirmed, count, find, make, quoted, refuse, removable, scrollTo } from "./dom.js";
import { acceptChoices } from "./pictures.js";
import { supportPicture } from "./result.js";
import { preparedAll } from "./upright.js";

// Rows at first and with every "more"; 1,000 rows at once would be 1,000 stops of the Tab key.
const [FIRST, STEP] = [12, 100];
let all = [];
let rows = FIRST;
let openId = null;
let newId = null; // A class that was just added stands first and is marked.
let change;

const matching = () => {
  const words = find("filter").value.trim().toLocaleLowerCase();
  const matches = all.filter(({ name }) => name.toLocaleLowerCase().includes(words));
  const first = ({ class_id: id }) => Number(id === newId);
  return newId === null ? matches : matches.sort((a, b) => first(b) - first(a));
};

/** The class of a name, or undefined. */
export const named = (name) => all.find((info) => info.name === name);

/** The names that contain `words`, at most `limit`. */
export function namesWith(words, limit) {
  const lower = words.toLocaleLowerCase();
  return all.filter(({ name }) => name.toLocaleLowerCase().includes(lower)).slice(0, limit).map(({ name }) => name);
}

/** Put a new class first in the list, marked, and scroll to it if `scroll`. */
export function reveal(classId, scroll) {
  newId = classId;
  if (!matching().some((info) => info.class_id === classId)) find("filter").value = "";
  draw();
  if (scroll) scrollTo(find("classes").firstElementChild, "center");
}

/**
 * Read the classes from the server: its answer, or null after an error. `keepForms` leaves the list unchanged while a
 * name is being edited in it.
 */
export async function refresh({ keepForms = false } = {}) {
  try {
    const { data } = await api.classes();
    all = data.classes;
    if (!keepForms || !find("classes").querySelector("form")) draw();
    return data;
  } catch (error) {
    complain(error.message);
    return null;
  }
}

function draw() {
  const focused = find("classes").contains(document.activeElement);
  const matches = matching();
  const total = count(all.length, "class", "classes");
  find("matches").textContent = matches.length === all.length ? total : `${matches.length} of ${total}`;
  find("classes").replaceChildren(...matches.slice(0, rows).map(row));
  const left = matches.length - rows;
  find("more").hidden = left <= 0;
  find("more").textContent = left > STEP ? `Show ${STEP} more of ${left}` : `Show ${left} more`;
  // The focused element was replaced: focus the row of its class, or the filter if the class was removed.
  if (focused) (find("classes").querySelector('[aria-expanded="true"]') ?? find("filter")).focus();
}

function row(info) {
  const open = info.class_id === openId;
  const toggle = () => {
    openId = open ? null : info.class_id;
    draw();
    find("classes").querySelector(`[data-class="${CSS.escape(info.class_id)}"] button`)?.focus();
  };
  const isNew = info.class_id === newId;
  return make(
    "li",
    { "data-class": info.class_id, class: isNew && "new" },
    make(
      "button",
      { type: "button", class: "row-button", "aria-expanded": String(open), click: toggle },
      make("span", { class: "name" }, info.name, isNew ? " " : null, isNew ? make("span", { class: "tag" }, "new") : null),
      make("span", { class: "quiet" }, count(info.examples, "example")),
    ),
    open ? panel(info) : null,
  );
}

function panel(info) {
  const pictures = make("ul", { class: "strip", "aria-label": `Examples of ${info.name}` });
  drawExamples(info, pictures);
  const actions = make("div", { class: "row" });
  drawActions(info, actions);
  return make("div", { class: "panel" }, pictures, actions);
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

function drawActions(info, actions) {
  const input = make("input", { type: "file", accept: "image/*", multiple: true });
  acceptChoices(input, (files) => addExamples(info, files));
  const rename = make("button", { type: "button", class: "button", click: () => askName(info, actions) }, "Rename");
  actions.replaceChildren(
    make("label", { class: "button" }, input, "Add examples"),
    rename,
    make("button", { type: "button", class: "button danger", click: () => removeClass(info) }, "Remove class"),
  );
  return rename;
}

function askName(info, actions) {
  const input = make("input", {
    id: "rename",
    value: info.name,
    maxlength: 200,
    "aria-label": `New name of ${info.name}`,
    "aria-describedby": "rename-error",
  });
  const cancel = () => drawActions(info, actions).focus();
  const form = make(
    "form",
    {
      class: "row",
      submit: (event) => {
        event.preventDefault();
        rename(info, input, cancel);
      },
      keydown: (event) => {
        if (event.key === "Escape") cancel();
      },
    },
    input,
    make("p", { id: "rename-error", class: "error" }),
    make("button", { class: "button strong" }, "Save"),
    make("button", { type: "button", class: "button", click: cancel }, "Cancel"),
  );
  actions.replaceChildren(form);
  input.select();
}

function addExamples(info, files) {
  return change(
    async (onWait) => api.addExamples(info.class_id, await preparedAll(files), onWait),
    () => ({
      words: `${count(files.length, "example")} added to ${quoted(info.name)}.`,
      mark: { classId: info.class_id, name: info.name, word: "more examples" },
      look: true,
    }),
  );
}

function rename(info, input, cancel) {
  const name = input.value.trim();
  if (name === info.name) return cancel();
  if (!name) return refuse(input, "The class needs a name.");
  return change(
    (onWait) => api.renameClass(info.class_id, name, onWait),
    () => ({
      words: `${quoted(info.name)} renamed to ${quoted(name)}.`,
      mark: { classId: info.class_id, name, word: "renamed" },
    }),
    input,
  );
}

async function removeClass(info) {
  const question = `Remove ${quoted(info.name)} and its ${count(info.examples, "example")}? This can't be undone.`;
  if (!(await confirmed(question))) return;
  await change(
    (onWait) => api.removeClass(info.class_id, onWait),
    () => ({ words: `Class ${quoted(info.name)} removed.` }),
  );
}

async function removeExample(info, exampleId, place) {
  if (!(await confirmed(`Remove example ${place} of ${quoted(info.name)}? This can't be undone.`))) return;
  await change(
    (onWait) => api.removeExample(exampleId, onWait),
    () => ({ words: `Example of ${quoted(info.name)} removed.` }),
  );
}

/** `send(request, describe)` sends a change and announces it; see page.js. */
export function setUp(send) {
  change = send;
  find("filter").addEventListener("input", () => {
    rows = FIRST;
    draw();
  });
  find("more").addEventListener("click", () => {
    const next = rows;
    rows += STEP;
    draw();
    find("classes").children[next]?.querySelector("button").focus();
  });
}
