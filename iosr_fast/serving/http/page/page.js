// The page: shows the answer of the selected picture, and classifies it again after a change.

import * as api from "./api.js";
import * as classes from "./classes.js";
import * as correct from "./correct.js";
import { complain, count, find, refuse, say, sayNothing, scrollTo } from "./dom.js";
import * as list from "./list.js";
import { acceptChoices, acceptDrops, filesOf } from "./pictures.js";
import * as queue from "./queue.js";
import { show, showPicture } from "./result.js";
import { showFacts, showSamples } from "./start.js";
import * as teach from "./teach.js";

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
  if (classCount === null) showSamples(data.classes, add);
  classCount = data.classes.length;
  find("promise").textContent = `Each picture gets one of the ${count(classCount, "class", "classes")} below, or none.`;
  const facts = await showFacts();
  find("collects").hidden = !facts?.collects;
  queue.renew(data.version, facts?.unknown);
  list.update([]);
}

/**
 * Send a change, announce it in `words`, and classify the shown picture again. `added` is {name, field} of a new class:
 * its name and where it was typed. True if it succeeded.
 */
async function change(request, words, added = null) {
  try {
    await request(announceWait);
  } catch (error) {
    if (error.status === 401) refuse(find("token"), api.token.get() ? error.message : "Enter the token.");
    else if (error.code === "name_taken" && added) refuse(added.field, error.message);
    else complain(error.message);
    return false;
  }
  say(words);
  if (added) find("filter").value = added.name; // So that the new class is in sight.
  await refresh();
  if (shown) {
    shown.before = shown.prediction;
    queue.classify([shown], true);
    find("result").setAttribute("aria-busy", "true"); // Its nearest examples may be gone: not drawn again.
    correct.show(shown);
  }
  scrollTo(find(shown ? "answer" : "classes"));
  return true;
}

function paste(event) {
  const { files } = filesOf(event.clipboardData);
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
teach.setUp(change);
correct.setUp(change, () => shown);
refresh();
