// The form that adds a class: name, examples, token.

import * as api from "./api.js";
import { named, teach } from "./classes.js";
import { accept, count, find, noPreview, onSubmit, refuse, removable } from "./dom.js";
import { acceptChoices, acceptDrops } from "./pictures.js";
import { drawn } from "./upright.js";

const THUMBNAIL = 96;
let examples = [];

/** Add examples to the form. */
export async function collect(files) {
  for (const file of files) examples.push({ file, canvas: await drawn(file, THUMBNAIL) });
  accept(find("new-examples"));
  draw();
}

function draw() {
  const strip = find("new-strip");
  strip.hidden = !examples.length;
  const pictures = examples.map((example) =>
    removable(example.canvas ?? noPreview(), `Leave out ${example.file.name}`, () => leaveOut(example)),
  );
  strip.replaceChildren(...pictures);
  const words = examples.length ? ` with ${count(examples.length, "example")}` : "";
  find("add-class").textContent = `Add the class${words}`;
}

function leaveOut(example) {
  const place = examples.indexOf(example);
  examples = examples.filter((other) => other !== example);
  draw();
  const buttons = find("new-strip").querySelectorAll("button");
  (buttons[Math.min(place, buttons.length - 1)] ?? find("new-examples")).focus();
}

async function send() {
  const field = find("new-name");
  const name = field.value.trim();
  if (!name) return refuse(field, "The class needs a name.");
  if (named(name)) return refuse(field, "Another class has this name.");
  if (!examples.length) return refuse(find("new-examples"), "The class needs at least one example.");
  if (!(await teach(name, examples.map((example) => example.file)))) return;
  field.value = "";
  examples = [];
  draw();
}

export function setUp() {
  find("token").value = api.token.get();
  find("token").addEventListener("input", (event) => api.token.set(event.target.value.trim()));
  acceptChoices(find("new-examples"), collect);
  acceptDrops(find("teach-stage"), collect);
  onSubmit(find("teach"), send);
}
