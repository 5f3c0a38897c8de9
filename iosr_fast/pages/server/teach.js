// The forms that teach: "Add a class", from examples; under an answer "It shows", which confirms or corrects it.

import { named, teach } from "./classes.js";
import { find, listed, onSubmit } from "./dom.js";
import { askLabels } from "./labels.js";
import { shown } from "./list.js";
import { acceptDrops } from "./pictures.js";
import { several } from "./queue.js";

/** Add files to the examples in the form of a new class. */
export function collect(files) {
  const all = new DataTransfer();
  for (const file of [...find("new-examples").files, ...files]) all.items.add(file);
  find("new-examples").files = all.files;
}

async function addClass() {
  if (await teach([find("new-name").value.trim()], [...find("new-examples").files])) find("teach").reset();
}

/** Offer the label of the shown answer, or say where its picture went. */
export function offer() {
  const { prediction, busy, taught } = shown;
  find("correct").hidden = !prediction || Boolean(taught);
  find("taught").hidden = !taught;
  if (taught) find("taught").textContent = `Added to the examples of ${listed(taught)}.`;
  if (busy || find("correct").contains(document.activeElement)) return;
  find("correct").reset();
  find("truth-label").hidden = find("truth").disabled = several; // A dialog asks for several.
  if (prediction?.label) find("truth").value = prediction.top[0].label; // The label may be above classes.
  nameButton();
}

function nameButton() {
  const name = find("truth").value.trim();
  const one = name && !named(name) ? "Add as a new class" : "Confirm";
  find("correct-button").textContent = several ? "Confirm or correct" : one;
}

async function correct() {
  const item = shown;
  const guess = item.prediction.labels.map(({ label }) => label);
  const names = several ? await askLabels(["Labels of this picture"], guess) : [find("truth").value.trim()];
  if (!names || !(await teach(names, [item.file]))) return;
  item.taught = names;
  if (item !== shown) return; // Another one was selected meanwhile.
  offer();
  find("taught").focus();
}

export function setUp() {
  find("new-name").addEventListener("input", ({ target }) =>
    target.setCustomValidity(named(target.value.trim()) ? "Another class has this name." : ""),
  );
  acceptDrops(find("teach"), collect);
  onSubmit(find("teach"), addClass);
  find("truth").addEventListener("focus", ({ target }) => target.select());
  find("truth").addEventListener("input", nameButton);
  onSubmit(find("correct"), correct);
}
