// The page: shows the answer of the selected picture, and classifies it again after a change.

import * as api from "./api.js";
import * as classes from "./classes.js";
import * as correct from "./correct.js";
import { button, complain, count, find, make, percent, refuse, say, sayNothing, scrollTo } from "./dom.js";
import * as list from "./list.js";
import { acceptChoices, acceptDrops } from "./pictures.js";
import * as queue from "./queue.js";
import { show, showPicture } from "./result.js";
import * as teach from "./teach.js";

const SAMPLES = 6;
// {file, name, row} of list.js, with what queue.js adds; after a change also {before: the previous prediction,
// taught: the class that got the picture}
let shown = null;
let classCount = null;
let waitWords = ""; // What was said last of a busy server.

function add(files) {
  sayNothing();
  document.body.classList.add("has-picture");
  queue.classify(list.add(files));
}

function select(item) {
  shown = item;
  showPicture(item, () => item === shown);
  view();
}

function view() {
  show(shown, classCount);
  correct.show(shown);
}

function answered(items) {
  if (find("notice-text").textContent === waitWords) sayNothing();
  list.update(items);
  if (items.includes(shown)) view();
}

function announceWait(seconds) {
  waitWords = `The server is busy. The page tries again in ${count(Math.ceil(seconds), "second")}.`;
  say(waitWords);
}

function forget() {
  queue.clear();
  shown = null;
  document.body.classList.remove("has-picture");
  find("choose").focus();
}

async function refresh() {
  const data = await classes.refresh();
  if (!data) return;
  if (classCount === null) showSamples(data.classes);
  classCount = data.classes.length;
  find("promise").textContent = `Each picture gets one of the ${count(classCount, "class", "classes")} below, or none.`;
  const facts = await showFacts();
  find("collects").hidden = !facts?.collects;
  queue.renew(data.version, facts?.unknown);
  list.update([]);
}

/** Show model, method and measured accuracy in the headline: the server's answer, or undefined after an error. */
async function showFacts() {
  try {
    const data = await api.classifier();
    const { model, method, measured, checked, note, doubts } = data;
    find("facts").textContent = [model, method, accuracy(measured)].filter((words) => words).join(" \u00b7 ");
    const alarms = [checked?.refuted && checked.sentence, note, ...doubts].filter((words) => words);
    find("alarm").textContent = alarms.map((words) => `${words[0].toUpperCase()}${words.slice(1)}.`).join(" ");
    find("facts").title = measured?.summary ?? ""; // With what was not judged.
    return data;
  } catch (error) {
    return complain(error.message);
  }
}

function accuracy(measured) {
  if (!measured?.interval) return "accuracy not measured";
  const [low, high] = measured.interval.map(percent);
  const images = count(measured.images, measured.protocol === "validation" ? "validation picture" : "left-out picture");
  const stale = measured.stale ? "; measured before the last changes" : "";
  return `${percent(measured.accuracy)} of ${images} right (95%: ${low} to ${high})${stale}`;
}

/** Offer stored pictures of some classes to somebody who has none at hand. */
async function showSamples(classes) {
  const taught = classes.filter(({ examples }) => examples);
  const step = Math.max(1, Math.floor(taught.length / SAMPLES));
  const chosen = taught.filter((info, i) => i % step === 0).slice(0, SAMPLES);
  const asked = Promise.all(chosen.map((info) => api.firstExample(info.class_id)));
  const ids = await asked.catch((error) => complain(error.message) ?? []);
  ids.forEach((id, i) => {
    const [address, { name }] = [api.pictureAddress(id), chosen[i]];
    const choose = async () => {
      const blob = await (await fetch(address)).blob();
      find("choose").focus({ preventScroll: true }); // The samples are about to disappear.
      add([new File([blob], `example of ${name}`, { type: blob.type })]);
    };
    const shown = () => (find("samples").hidden = false); // Not where no thumbnails are stored.
    const picture = make("img", { src: address, alt: `Classify an example of ${name}`, load: shown });
    const item = make("li", {}, button(picture, choose, {}));
    picture.addEventListener("error", () => item.remove());
    find("samples-list").append(item);
  });
}

/**
 * Send a change, announce it in `words`, and classify the shown picture again. `name` is that of a new class. True if it
 * succeeded.
 */
async function change(request, words, name = "") {
  try {
    await request(announceWait);
  } catch (error) {
    if (error.status === 401) refuse(find("token"), api.token.get() ? error.message : "Enter the token.");
    else complain(error.message);
    return false;
  }
  say(words);
  if (name) find("filter").value = name; // So that the new class is in sight.
  await refresh();
  if (shown) {
    shown.before = shown.prediction;
    queue.classify([shown], true);
    find("result").setAttribute("aria-busy", "true"); // Its nearest examples may be gone: not drawn again.
  }
  scrollTo(find(shown ? "answer" : "classes"));
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
find("notice-close").addEventListener("click", sayNothing);
queue.setUp({ answered, announceWait, refresh });
list.setUp(select, forget);
classes.setUp(change);
teach.setUp();
correct.setUp(() => shown);
refresh();
