// Pictures of the user's disk to labels, one after another, by the model beside this page. Nothing leaves the browser.

import { find, make, percent, span } from "./dom.js";
import { acceptChoices, acceptDrops } from "./pictures.js";

const RUNTIME = "./ort.wasm.bundle.min.mjs";
const SHOWN = 5; // bars of a picture
const PREVIEW = 224; // Longer side of a shown picture, in pixels.
const MARGIN = 3; // A large JPEG is shrunk while this many times the model's pixels are left, as iosr_fast does.
const facts = JSON.parse(find("facts").textContent);
const ort = await import(RUNTIME).catch(() => null);
export const model = ort && loaded();
let queue = Promise.resolve();
let waiting = 0;

/** The model that this page was written with, whose classes it names; a browser may have kept an older one. */
async function loaded() {
  const response = await fetch("model.onnx", { cache: "no-cache", integrity: facts.integrity }).catch(() => {
    throw new Error("The model can't be loaded, or is of another export than this page. Reload the page.");
  });
  return ort.InferenceSession.create(await response.arrayBuffer(), { executionProviders: ["wasm"] });
}

/** `source` on an opaque white canvas. */
function drawn(source, width, height) {
  const canvas = make("canvas", { width: Math.ceil(width), height: Math.ceil(height) });
  const context = canvas.getContext("2d", { alpha: false, willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(source, 0, 0, width, height);
  return canvas;
}

/** A file's picture: upright, on white, its colours as stored. */
export async function opened(file) {
  const asStored = { colorSpaceConversion: "none", premultiplyAlpha: "none", imageOrientation: "from-image" };
  const bitmap = await createImageBitmap(file, asStored);
  const { width, height } = bitmap;
  const { image_size: size, resize_mode: mode } = facts.geometry;
  const ratio = (mode === "longest" ? Math.max : Math.min)(width, height) / size;
  const scale = (file.type === "image/jpeg" && [8, 4, 2].find((each) => ratio >= MARGIN * each)) || 1;
  const canvas = drawn(bitmap, width / scale, height / scale);
  bitmap.close();
  return canvas;
}

/** The model's input: uint8 (1, height, width, 3). */
export function tensor(canvas) {
  const { data, width, height } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const rgb = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; to < rgb.length; from += 4, to += 3) {
    for (let channel = 0; channel < 3; channel++) rgb[to + channel] = data[from + channel];
  }
  return new ort.Tensor("uint8", rgb, [1, height, width, 3]);
}

function bar([name, probability]) {
  const length = make("span");
  length.style.width = `${100 * probability}%`; // The policy allows no style attribute in markup.
  return make("li", {}, name, span("bar", length), span("probability", percent(probability)));
}

async function card(file) {
  const canvas = await opened(file);
  const { probabilities, label, accepted, rejected } = await (await model).run({ picture: tensor(canvas) });
  const name = facts.class_names[label.data[0]];
  let [look, words] = ["sure", name];
  if (accepted?.data[0] === 0) [look, words] = ["unsure", `Needs a look: ${name}?`];
  if (rejected?.data[0]) [look, words] = ["unknown", `None of the classes; the nearest is ${name}`];
  const ranked = [...probabilities.data].map((probability, i) => [facts.class_names[i], probability]);
  const top = ranked.sort((one, other) => other[1] - one[1]).slice(0, SHOWN);
  const part = PREVIEW / Math.max(canvas.width, canvas.height);
  const small = drawn(canvas, part * canvas.width, part * canvas.height);
  const source = make("div", { class: "flow picture" }, small, make("p", { class: "quiet" }, file.name));
  const result = make("p", { class: "label" }, words);
  const answer = make("div", { class: "flow" }, result, make("ol", { class: "bars" }, ...top.map(bar)));
  return make("li", { class: `columns answer ${look}` }, source, answer);
}

function classify(files) {
  waiting += files.length;
  for (const file of files) queue = queue.then(() => next(file));
}

async function next(file) {
  find("status").textContent = `${waiting} to go…`;
  const failed = ({ message }) => make("li", { class: "columns bad" }, `${file.name}: ${message}`);
  find("results").append(await card(file).catch(failed));
  waiting -= 1;
  find("status").textContent = waiting ? "" : "Done.";
}

try {
  if (!ort) throw new Error(facts.missing);
  await model;
  find("promise").textContent = facts.promise;
  find("status").textContent = "";
  find("stage").hidden = false;
  acceptChoices(find("choose"), classify);
  acceptDrops(document.documentElement, classify);
} catch (error) {
  find("status").textContent = error.message;
}
