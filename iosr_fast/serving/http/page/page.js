// The page: shows the answer of the selected picture, and classifies it again after a change.

import * as api from "./api.js";
import * as boxes from "./boxes.js";
import * as classes from "./classes.js";
import { button, complain, count, find, make, percent, say, sayNothing } from "./dom.js";
import * as list from "./list.js";
import { acceptChoices, acceptDrops } from "./pictures.js";
import * as queue from "./queue.js";
import { show } from "./result.js";
import * as teach from "./teach.js";

const SAMPLES = 6;

function add(files) {
  sayNothing();
  queue.classify(list.add(files));
}

function view() {
  show(list.shown, classes.all.length);
  teach.offer();
}

function selected() {
  view();
  boxes.show();
}

function answered(items) {
  list.update(items);
  if (items.includes(list.shown)) view();
  boxes.draw();
}

function cleared() {
  queue.clear();
  find("choose").focus();
}

/** Read classes and facts of the server's newest version, and show them. */
async function refresh() {
  const first = queue.version === null;
  try {
    const listed = await api.classes();
    classes.show(listed.classes);
    find("facts").textContent = "The server computes what it can promise.";
    const facts = await api.classifier();
    const total = count(classes.all.length, "class", "classes");
    const some = facts.several_labels ? "those it shows" : "one";
    find("promise").textContent = `Each picture gets ${some} of the ${total} below, or none.`;
    find("collects").hidden = !facts.collects;
    showFacts(facts);
    queue.renew(listed.version, facts);
    if (facts.several_labels) classes.show(listed.classes, await api.unlabelled());
    list.update([]);
    if (first) await showSamples();
  } catch (error) {
    complain(error.message);
  }
}

/** Show model, method and measured accuracy in the headline, and what speaks against them. */
function showFacts({ model, method, measured, checked, note, doubts, several_labels: several }) {
  const words = [api.name, model, method, accuracy(measured, several)];
  find("facts").textContent = words.filter(Boolean).join(" \u00b7 ");
  find("facts").title = measured?.summary ?? ""; // With what was not judged.
  const alarms = [checked?.refuted && checked.sentence, note, ...doubts].filter((words) => words);
  find("alarm").textContent = alarms.map((words) => `${words[0].toUpperCase()}${words.slice(1)}.`).join(" ");
}

function accuracy(measured, several) {
  if (!measured?.interval) return "accuracy not measured";
  const [low, high] = measured.interval.map(percent);
  const picture = measured.protocol === "validation" ? "validation picture" : "left-out picture";
  const images = several ? `${count(measured.images, "label")} of ${picture}s` : count(measured.images, picture);
  const stale = measured.stale ? "; measured before the last changes" : "";
  return `${percent(measured.accuracy)} of ${images} right (95%: ${low} to ${high})${stale}`;
}

/** Offer stored pictures of some classes to somebody who has none at hand. */
async function showSamples() {
  const taught = classes.all.filter(({ examples }) => examples);
  const step = Math.max(1, Math.floor(taught.length / SAMPLES));
  const chosen = taught.filter((info, i) => i % step === 0).slice(0, SAMPLES);
  for (const { class_id, name } of chosen) showSample(name, api.pictureAddress(await api.firstExample(class_id)));
}

async function showSample(name, src) {
  const picture = make("img", { src, alt: `Classify an example of ${name}` });
  const choose = async () => {
    const blob = await (await fetch(src)).blob();
    find("choose").focus({ preventScroll: true }); // The samples are about to disappear.
    add([new File([blob], `example of ${name}`, { type: blob.type })]);
  };
  try {
    await picture.decode();
  } catch {
    return; // No picture is stored.
  }
  find("samples-list").append(make("li", {}, button(picture, choose)));
  find("samples").hidden = false;
}

/**
 * Wait for the request of a change, announce it in `words`, and classify the shown picture again. `name` is that of a
 * new class. True if it succeeded.
 */
async function change(request, words, name = "") {
  say("The server makes the change, and computes what it can promise.");
  try {
    await request;
  } catch (error) {
    complain(error.message);
    return false;
  }
  say(words);
  if (name) find("filter").value = name; // So that the new class is in sight.
  await refresh();
  const { shown } = list;
  if (shown) {
    shown.before = shown.prediction;
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
queue.setUp({ answered, refresh, ready: refresh() });
boxes.setUp();
list.setUp({ selected, cleared });
classes.setUp(change);
teach.setUp();
