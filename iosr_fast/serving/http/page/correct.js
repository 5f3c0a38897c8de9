// Under an answer: "It is", which confirms or corrects it and adds the picture to the examples of that class.

import { named, namesWith, teach } from "./classes.js";
import { accept, find, make, onSubmit, quoted, refuse } from "./dom.js";

const OFFERED = 50; // Names at a time; a browser shows some ten of them.

/** Offer the label of an item that has an answer, or say where its picture went. */
export function show({ prediction, busy, taught }) {
  find("correct").hidden = !prediction || Boolean(taught);
  find("taught").hidden = !taught;
  if (taught) find("taught").textContent = `Added to the examples of ${quoted(taught)}.`;
  if (busy || find("correct").contains(document.activeElement)) return;
  accept(find("truth"));
  find("truth").value = prediction?.label ?? "";
  offer("");
}

function offer(words) {
  find("names").replaceChildren(...namesWith(words, OFFERED).map((value) => make("option", { value })));
  const name = find("truth").value.trim();
  find("correct-button").textContent = name && !named(name) ? "Add as a new class" : "Confirm";
}

async function send(shown) {
  const field = find("truth");
  const name = field.value.trim();
  if (!name) return refuse(field, "Which class is it? Choose one, or type a new name.");
  const item = shown();
  if (!(await teach(name, [item.file]))) return;
  item.taught = name;
  if (item !== shown()) return; // Another one was selected meanwhile.
  show(item);
  find("taught").focus();
}

/** `shown()` is the item in sight; see page.js. */
export function setUp(shown) {
  const field = find("truth");
  field.addEventListener("focus", () => field.select());
  field.addEventListener("input", () => offer(field.value.trim()));
  onSubmit(find("correct"), () => send(shown));
}
