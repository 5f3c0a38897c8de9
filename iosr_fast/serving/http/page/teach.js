// The forms that teach a class: "Add a class", from examples; under an answer "It is", which confirms or corrects it.

import { named, teach } from "./classes.js";
import { count, find, listed, onSubmit, removable } from "./dom.js";
import { chooser } from "./labels.js";
import { shown } from "./list.js";
import { acceptChoices, acceptDrops, preview } from "./pictures.js";
import { several } from "./queue.js";

let examples = [];
let truths = null; // The chooser of several labels.

/** Add examples to the form of a new class. */
export async function collect(files) {
  for (const file of files) examples.push({ file, picture: await preview(file) });
  draw();
}

function draw() {
  const strip = find("new-strip");
  strip.hidden = !examples.length;
  const pictures = examples.map((example) =>
    removable(example.picture, `Leave out ${example.file.name}`, () => leaveOut(example)),
  );
  strip.replaceChildren(...pictures);
  const words = examples.length ? ` with ${count(examples.length, "example")}` : "";
  find("add-class").textContent = `Add the class${words}`;
  find("new-examples").setCustomValidity(words ? "" : "The class needs at least one example.");
}

function leaveOut(example) {
  const place = examples.indexOf(example);
  examples.splice(place, 1);
  draw();
  const buttons = find("new-strip").querySelectorAll("button");
  (buttons[Math.min(place, buttons.length - 1)] ?? find("new-examples")).focus();
}

async function addClass() {
  const files = examples.map(({ file }) => file);
  if (!(await teach([find("new-name").value.trim()], files))) return;
  find("teach").reset();
  examples = [];
  draw();
}

/** Offer the label of the shown answer, or say where its picture went. */
export function offer() {
  const { prediction, busy, taught, box } = shown;
  find("correct").hidden = !prediction || Boolean(taught || box); // Examples are whole pictures.
  find("taught").hidden = !taught;
  if (taught) find("taught").textContent = `Added to the examples of ${listed(taught)}.`;
  if (busy || find("correct").contains(document.activeElement)) return;
  find("correct").reset();
  find("truth").required = !several;
  if (several) {
    truths.fill(prediction?.labels.map(({ label }) => label) ?? []);
    find("truth-label").textContent = "Its labels are";
    find("truth").placeholder = "Add a label";
    find("truth-hint").textContent = "Adds this picture to the examples of these classes, or of none.";
  } else find("truth").value = prediction?.label ? prediction.top[0].label : ""; // A label may be above classes.
  nameButton();
}

function nameButton() {
  const name = find("truth").value.trim();
  find("correct-button").textContent = name && !named(name) && !several ? "Add as a new class" : "Confirm";
}

async function correct() {
  const [item, names] = [shown, several ? truths.chosen() : [find("truth").value.trim()]];
  if (!(await teach(names, [item.file]))) return;
  item.taught = names;
  if (item !== shown) return; // Another one was selected meanwhile.
  offer();
  find("taught").focus();
}

export function setUp() {
  find("new-name").addEventListener("input", ({ target }) =>
    target.setCustomValidity(named(target.value.trim()) ? "Another class has this name." : ""),
  );
  acceptChoices(find("new-examples"), collect);
  acceptDrops(find("teach-stage"), collect);
  draw();
  onSubmit(find("teach"), addClass);
  truths = chooser(find("truth"), find("truths"), () => several);
  find("truth").addEventListener("focus", ({ target }) => target.select());
  find("truth").addEventListener("input", nameButton);
  onSubmit(find("correct"), correct);
}
