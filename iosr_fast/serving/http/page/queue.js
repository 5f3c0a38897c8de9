// Classifies pictures: sends those that wait, in requests that the server takes, at most two at a time.

import * as api from "./api.js";
import { prepared, preview } from "./pictures.js";
import { labelsOf } from "./result.js";

const ANSWER = { top: 5, nearest: 6 };
const REQUESTS = 2; // While the server answers one, the pictures of the other are prepared.
const PICTURES = 8; // Of a request, which then has at most 16 MiB. A server that takes less says so (413).

export let version = null; // The newest that the page knows.
export let several = false; // Whether pictures may have several labels there.
let unpromised = ""; // Why that version can't reject pictures, or "".
let waiting = [];
let running = 0;
let size = 1; // Pictures of the next request: one, for a first answer soon, then twice as many, up to `most`.
let most = PICTURES;
let page = null;

/**
 * `page.answered(items)` is called after each request, `page.refresh()` when classes were changed elsewhere. Nothing is
 * sent before the promise `page.ready`: facts say how answers are read.
 */
export function setUp(callbacks) {
  page = callbacks;
}

/** The server's newest version, and the facts of the classifier. */
export function renew(newest, { unknown, several_labels: maySeveral = false }) {
  version = newest;
  several = maySeveral;
  unpromised = unknown?.promised === false ? unknown.sentence : "";
}

/**
 * Classify items {file}, `first` before those that wait. An item is `busy` until it has `prediction`, `latencyMs`,
 * `roundTripMs`, `version` and `unchecked` (why it may belong to none of the classes), or an `error`, with `failed` if
 * another try may help. `notes` say how its file was changed for the server, `thumbnail` is an element.
 */
export async function classify(items, first = false) {
  for (const item of items) item.busy = true;
  await page.ready;
  waiting = first ? [...items, ...waiting] : [...waiting, ...items];
  if (!running) size = 1;
  while (running < Math.min(REQUESTS, waiting.length)) work();
}

/** Whether another try may give another answer. */
export const isOutdated = (item) => item.failed || (item.prediction && item.version !== version);

export function clear() {
  waiting = [];
}

async function work() {
  running += 1;
  while (waiting.length) {
    const batch = waiting.splice(0, Math.min(size, together()));
    size = Math.min(2 * size, most);
    await send(batch);
    page.answered(batch);
  }
  running -= 1;
}

/** How many of the first that wait a request may have: whole pictures, or parts of one. */
function together() {
  const [{ file, box }] = waiting;
  const other = waiting.findIndex((item) => (box ? !item.box || item.file !== file : item.box));
  return other < 0 ? waiting.length : other;
}

function settle(item, outcome) {
  Object.assign(item, { busy: false, prediction: null, error: null, failed: false }, outcome);
}

async function send(batch) {
  const files = new Map();
  for (const item of batch) {
    try {
      const { file, notes } = await prepared(item.file, item.box); // One by one: decoded photos are large.
      files.set(item, file);
      item.notes = notes;
      item.thumbnail ??= await preview(file, item.box);
    } catch (error) {
      settle(item, { error: error.message });
    }
  }
  const items = [...files.keys()];
  try {
    if (items.length) await predict(items, [...files.values()]);
  } catch (error) {
    if (items.length > 1 && [413, 504].includes(error.status)) {
      most = size = items.length >> 1; // Too large, or too slow.
      waiting.unshift(...items);
    } else {
      const others = error.status === 401 ? waiting.splice(0) : []; // The user has no token: it is asked for once.
      batch.push(...others);
      for (const item of [...items, ...others]) settle(item, { error: error.message, failed: true });
    }
  }
}

/** Predictions that may reject pictures, or some that can't, with the reason in `unchecked`. */
async function predict(items, files) {
  const known = version;
  let unchecked = unpromised;
  const boxes = items.flatMap(({ box }) => (box ? [box] : []));
  const sent = boxes.length ? files.slice(0, 1) : files;
  const ask = () => api.predict(sent, { ...ANSWER, reject: !unchecked }, boxes);
  const { data, roundTripMs } = await ask().catch((error) => {
    if (unchecked || error.code !== "no_promise") throw error;
    unchecked = error.message; // Somebody else changed the classes.
    return ask();
  });
  const facts = { latencyMs: data.latency_ms, roundTripMs, version: data.version, unchecked };
  items.forEach((item, i) => {
    const prediction = data.predictions[i];
    if (prediction.error) return settle(item, { error: prediction.error.message });
    Object.assign(prediction, { several, labels: labelsOf(prediction, several) });
    settle(item, { prediction, ...facts });
  });
  if (![known, version].includes(data.version)) page.refresh();
}
