// The page: classifies pictures one after another, and classifies the shown one again after a change.

import * as api from "./api.js";
import * as classes from "./classes.js";
import * as correct from "./correct.js";
import { complain, count, find, make, noPreview, refuse, say, sayNothing, scrollTo } from "./dom.js";
import { acceptChoices, acceptDrops, filesOf } from "./pictures.js";
import { naming, show, verdict } from "./result.js";
import { showFacts, showSamples } from "./start.js";
import * as teach from "./teach.js";
import { drawn, prepared } from "./upright.js";

const TOP = 5;
const NEAREST = 6;
const MAX_ITEMS = 60; // Pictures in the strip.
const SLOW_MS = 250; // A slower answer is announced by "Classifying".
const LEARN_MS = 700; // An answer waits so long for what is being learnt.
const LEARNING = "that is still being learnt from the examples";
const SIDE = 640;

// {file, name, picture, sent: {file, notes}, busy, prediction, error, latencyMs, roundTripMs, version, unchecked: why it
// may belong to none of the classes}; after a change also {before: the previous prediction, marked: the changed class,
// taught: the class that got the picture}
let items = [];
const waiting = [];
let working = false;
let shown = null;
let following = true; // Show the next answer; false while the user looks at another picture.
let mark = null; // The class of the last change: {classId, name, word}.
let version = null;
let classCount = 0;
// To learn what pictures to reject takes the server up to a minute after a change, with thousands of examples.
let learnt = 0; // The version of which it can,
let learning = null; // the one of which it has been asked to,
let noPromise = null; // and why it never can at this version.

function add(files) {
  const accepted = files.slice(0, MAX_ITEMS);
  if (accepted.length < files.length) say(`The first ${MAX_ITEMS} of ${count(files.length, "picture")} are used.`);
  else sayNothing();
  const added = accepted.map((file) => ({ file, name: file.name || "pasted picture", busy: false }));
  items = [...items, ...added].slice(-MAX_ITEMS);
  following = true;
  queue(added);
}

async function queue(added) {
  waiting.push(...added);
  if (working) return;
  working = true;
  try {
    while (waiting.length) await classify(waiting.shift());
  } finally {
    working = false;
  }
}

async function classify(item) {
  item.busy = true;
  item.picture ??= await drawn(item.file, SIDE);
  const slow = setTimeout(() => following && view(item), SLOW_MS);
  let waited = false;
  const onWait = (seconds) => {
    waited = true;
    announceWait(seconds);
  };
  try {
    item.sent ??= await prepared(item.file);
    const { data, roundTripMs } = await predict(item, onWait);
    const [answer] = data.predictions;
    item.error = answer.error?.message ?? null;
    item.prediction = answer.error ? null : answer;
    Object.assign(item, { roundTripMs, latencyMs: data.latency_ms, version: data.version });
    if (data.version !== version) refresh({ keepForms: true });
  } catch (error) {
    item.error = error.message;
    item.prediction = null;
  }
  if (waited) sayNothing();
  clearTimeout(slow);
  item.busy = false;
  if (following || item === shown) view(item);
  else drawStrip();
}

/** A prediction that may reject the picture, or one that can't, with the reason in `item.unchecked`. */
async function predict(item, onWait) {
  const send = (reject) => api.predict(item.sent.file, { top: TOP, nearest: NEAREST, reject, onWait });
  if (learnt !== version && noPromise === null) await Promise.race([learn(item), pause(LEARN_MS)]);
  if (learnt === version) {
    try {
      item.unchecked = null;
      return await send(true);
    } catch (error) {
      if (!learnError(error)) throw error;
    }
  }
  item.unchecked = noPromise ?? LEARNING;
  if (noPromise === null) learn(item);
  return send(false);
}

/** Ask for rejection until the server can do it, then classify again what was answered without. */
async function learn({ sent }) {
  if (learning === version) return;
  const asked = (learning = version);
  while (asked === version && learnt !== version && noPromise === null) {
    try {
      const { data } = await api.predict(sent.file, { top: 1, nearest: 0, reject: true });
      if (!data.predictions[0].unknown) break; // The picture is bad.
      learnt = data.version;
    } catch (error) {
      if (!learnError(error)) break;
      await pause(LEARN_MS);
    }
  }
  learning = null;
  if (learnt === version || noPromise !== null) queue(items.filter((item) => item.unchecked === LEARNING));
}

/** Whether the server can't reject pictures, now or at this version. */
function learnError({ code, message }) {
  if (code === "no_promise") noPromise = message;
  if (code === "no_promise" || code === "deadline_exceeded") learnt = 0;
  return code === "no_promise" || code === "deadline_exceeded";
}

const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

const announceWait = (seconds) =>
  say(`The server is busy. The page tries again in ${count(Math.ceil(seconds), "second")}.`);

function view(item) {
  shown = item;
  document.body.classList.add("has-picture");
  show(item, mark, classCount);
  correct.show(item);
  drawStrip();
}

function drawStrip() {
  const strip = find("strip");
  const focused = strip.contains(document.activeElement);
  strip.hidden = items.length < 2;
  strip.replaceChildren(...items.filter((item) => item.picture !== undefined).map(thumbnail));
  const current = strip.querySelector('[aria-current="true"]');
  if (focused) current?.focus();
  else if (current) strip.scrollLeft = current.parentElement.offsetLeft; // On a phone the strip is one row.
}

function thumbnail(item) {
  const { prediction, error, name } = item;
  const words = prediction ? naming(prediction) : error ? `failed: ${name}` : "waiting";
  const look = prediction ? verdict(prediction) : null;
  const choose = () => {
    following = false;
    view(item);
  };
  let picture = noPreview();
  if (item.picture) {
    const { width, height } = item.picture;
    const side = Math.min(width, height);
    picture = make("canvas", { width: 56, height: 56, "aria-hidden": "true" });
    picture.getContext("2d").drawImage(item.picture, (width - side) / 2, (height - side) / 2, side, side, 0, 0, 56, 56);
  }
  const label = make("span", { class: "name" }, words);
  const current = String(item === shown);
  return make("li", { class: look }, make("button", { type: "button", "aria-current": current, click: choose }, picture, label));
}

async function refresh(how) {
  const data = await classes.refresh(how);
  if (!data) return;
  version = data.version;
  classCount = data.classes.length;
  const facts = await showFacts();
  noPromise = facts?.unknown?.promised === false ? facts.unknown.sentence : null;
  if (facts?.unknown?.promised) learnt = facts.version;
  const promise = find("promise"); // Until the first answer takes its place.
  if (!promise) return;
  promise.textContent = `Each picture gets one of the ${count(classCount, "class", "classes")} below, or none.`;
  showSamples(data.classes, add);
}

/**
 * Send a change, announce it, and classify the shown picture again. `describe(data)` returns {words, mark, look}: the
 * announcement, the class to mark, whether to scroll to the result. `nameField` has the new name of a class, if there is
 * one. True if it succeeded.
 */
async function change(request, describe, nameField = null) {
  let data;
  try {
    ({ data } = await request(announceWait));
  } catch (error) {
    if (error.status === 401) refuse(find("token"), api.token.get() ? error.message : "Enter the token.");
    else if (error.code === "name_taken") refuse(nameField, error.message);
    else complain(error.message);
    return false;
  }
  const { words, mark: marked = null, look: scroll = false } = describe(data);
  mark = marked;
  say(words);
  await refresh();
  if (marked?.word === "new") classes.reveal(marked.classId, !shown);
  if (!shown) return true;
  Object.assign(shown, { before: shown.prediction, marked });
  following = true;
  await queue([shown]);
  if (scroll) scrollTo(find("result"), "start");
  return true;
}

function setUp() {
  acceptChoices(find("choose"), add);
  acceptChoices(find("camera"), add);
  acceptDrops(document.documentElement, add); // Also pictures dropped outside of the stage.
  document.addEventListener("paste", (event) => {
    const { files } = filesOf(event.clipboardData);
    if (!files.length) {
      if (!event.target.closest?.("input")) complain("There is no picture in the clipboard.");
      return;
    }
    event.preventDefault();
    if (find("teach").contains(document.activeElement)) teach.collect(files);
    else add(files);
  });
  find("notice-close").addEventListener("click", sayNothing);
  classes.setUp(change);
  teach.setUp(change);
  correct.setUp(change, () => shown);
  refresh();
}

setUp();
