// Classifies pictures, each by a request of its own and a few at a time: the server makes batches of them.

import * as api from "./api.js";
import { prepared, preview } from "./pictures.js";
import { labelsOf } from "./result.js";

const REQUESTS = 4; // At a time; browsers have six connections.

export let version = null; // The newest that the page knows.
export let several = false; // Whether pictures may have several labels there.
let unpromised = ""; // Why that version can't reject pictures, or "".
let waiting = [];
let running = 0;
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
 * Classify items {file}, `first` before those that wait. An item is `busy` until it has `prediction`, `version` and
 * `unchecked` (why it may belong to none of the classes), or an `error`, with `failed` if another try may help.
 * `thumbnail` is an element.
 */
export async function classify(items, first = false) {
  for (const item of items) item.busy = true;
  await page.ready;
  waiting = first ? [...items, ...waiting] : [...waiting, ...items];
  while (running < REQUESTS && waiting.length) work();
}

/** Whether another try may give another answer. */
export const isOutdated = (item) => item.failed || (item.prediction && item.version !== version);

export function clear() {
  waiting = [];
}

async function work() {
  running += 1;
  while (waiting.length) {
    const item = waiting.shift();
    try {
      item.thumbnail ??= await preview(item.file);
      settle(item, await predicted(await prepared(item.file)));
      page.answered([item]);
    } catch ({ message, status }) {
      const others = status === 401 ? waiting.splice(0) : []; // The user has no token: it is asked for once.
      const failed = [item, ...others];
      for (const one of failed) settle(one, { error: message, failed: true });
      page.answered(failed);
    }
  }
  running -= 1;
}

function settle(item, outcome) {
  Object.assign(item, { busy: false, prediction: null, error: null, failed: false }, outcome);
}

/** A prediction that may reject the picture, or that can't, with the reason in `unchecked`; or an error. */
async function predicted(file) {
  const [known, unchecked] = [version, unpromised];
  const { version: newest, predictions: [prediction] } = await api.predict(file, !unchecked);
  if (![known, version].includes(newest)) page.refresh();
  if (prediction.error) return { error: prediction.error.message };
  Object.assign(prediction, { several, labels: labelsOf(prediction, several) });
  return { prediction, unchecked, version: newest };
}
