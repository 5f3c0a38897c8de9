// The page: shows the answer of the selected picture, and classifies it again after a change.

import * as api from "./api.js";
import * as classes from "./classes.js";
import { button, complain, count, find, make, say, sayNothing } from "./dom.js";
import * as list from "./list.js";
import { acceptChoices, acceptDrops, preview } from "./pictures.js";
import * as queue from "./queue.js";
import { show } from "./result.js";
import * as teach from "./teach.js";

const SIDE = 1280; // Of the shown picture, in pixels.
const SAMPLES = 6;

function add(files) {
  sayNothing();
  queue.classify(list.add(files));
}

function view() {
  show(list.shown, classes.all.length);
  teach.offer();
}

async function selected() {
  view();
  const { file } = list.shown;
  const picture = await preview(file, SIDE);
  if (list.shown?.file === file) find("picture").replaceChildren(picture);
}

function answered(items) {
  list.update(items);
  if (items.includes(list.shown)) view();
}

function cleared() {
  queue.clear();
  find("choose").focus();
}

/** Offer stored examples of some classes to somebody who has no picture at hand. */
async function offerSamples() {
  const taught = classes.all.filter(({ examples }) => examples);
  const step = Math.max(1, Math.floor(taught.length / SAMPLES));
  for (const { class_id, name } of taught.filter((_, i) => i % step === 0).slice(0, SAMPLES)) {
    const src = api.pictureAddress(await api.firstExample(class_id));
    const picture = make("img", { src, alt: `Classify an example of ${name}` });
    const choose = async () => {
      const blob = await (await fetch(src)).blob();
      find("choose").focus({ preventScroll: true }); // The samples are about to disappear.
      add([new File([blob], `example of ${name}`, { type: blob.type })]);
    };
    const stored = await picture.decode().then(() => true, () => false);
    if (stored) find("samples").append(make("li", {}, button(picture, choose)));
  }
  find("samples-title").hidden = !find("samples").children.length;
}

/** Read classes and facts of the server's newest version, and show them. */
async function refresh() {
  try {
    const listed = await api.classes();
    classes.show(listed.classes);
    const facts = await api.classifier();
    const total = count(classes.all.length, "class", "classes");
    const some = facts.several_labels ? "those it shows" : "one";
    find("promise").textContent = `Each picture gets ${some} of the ${total} below, or none.`;
    find("collects").hidden = !facts.collects;
    showFacts(facts);
    queue.renew(listed.version, facts);
    if (facts.several_labels) classes.show(listed.classes, await api.unlabelled());
    list.update([]);
  } catch (error) {
    complain(error.message);
  }
}

/** Show model, method and measured accuracy in the headline, and what speaks against them. */
function showFacts({ model, method, measured, checked, note, doubts }) {
  const accuracy = measured?.summary.split("\n")[0] ?? "accuracy not measured";
  find("facts").textContent = [api.name, model, method, accuracy].filter(Boolean).join(" \u00b7 ");
  const alarms = [checked?.refuted && checked.sentence, note, ...doubts].filter((words) => words);
  find("alarm").textContent = alarms.map((words) => `${words[0].toUpperCase()}${words.slice(1)}.`).join(" ");
}

/** Wait for the request of a change, say `words`, and classify the shown picture again: true if it succeeded. */
async function change(request, words) {
  say("The server makes the change, and computes what it can promise.");
  try {
    await request;
  } catch (error) {
    complain(error.message);
    return false;
  }
  say(words);
  await refresh();
  const { shown } = list;
  if (shown) {
    queue.classify([shown], true);
    find("result").setAttribute("aria-busy", "true"); // Its nearest examples may be gone: not drawn again.
  }
  find(shown ? "answer" : "classes").scrollIntoView({ block: "nearest" });
  return true;
}

function paste(event) {
  const files = [...event.clipboardData.files];
  if (!files.length) {
    if (!event.target.closest?.("input")) complain("There is no picture in the clipboard.");
    return;
  }
  event.preventDefault();
  if (find("teach").contains(document.activeElement)) teach.collect(files);
  else add(files);
}

acceptChoices(find("choose"), add);
acceptChoices(find("camera"), add);
acceptDrops(document.documentElement, add); // Also pictures dropped outside of the stage.
document.addEventListener("paste", paste);
const ready = refresh();
queue.setUp({ answered, refresh, ready });
ready.then(offerSamples).catch((error) => complain(error.message));
list.setUp({ selected, cleared });
classes.setUp(change);
teach.setUp();
