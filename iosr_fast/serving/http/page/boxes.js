// Boxes on the shown picture, drawn by mouse, touch or pen. Each is a part with an item of its own on the list.

import { find, span } from "./dom.js";
import * as list from "./list.js";
import { preview } from "./pictures.js";
import { classify } from "./queue.js";
import { naming } from "./result.js";

const SIDE = 1280; // Of the shown picture, in pixels.
const SHORTEST = 8; // Side of a box, in pixels of the screen: a shorter drag is a click.
const draft = span("box");
let file = null; // Whose picture is shown.
let start = null; // Where the pointer went down,
let hit = null; // and on what.

/** Show the picture of the selected item, and the boxes on it. */
export async function show() {
  if (list.shown.file !== file) {
    file = list.shown.file;
    find("boxes").replaceChildren();
    find("frame").classList.remove("drawable"); // It shows another picture still.
    const picture = await preview(file, undefined, SIDE);
    if (list.shown?.file !== file) return;
    find("frame").style.setProperty("--ratio", picture.width / picture.height || 1);
    find("frame").classList.toggle("drawable", Boolean(picture.width));
    find("picture").replaceChildren(picture);
  }
  draw();
}

/** Draw the boxes anew: their numbers, and their labels as far as they came. */
export function draw() {
  const parts = list.partsOf(file);
  find("boxes").replaceChildren(...parts.map(rectangle), ...(start ? [draft] : []));
  find("remove-box").hidden = !parts.includes(list.shown);
}

function rectangle(item) {
  const { box, number, prediction } = item;
  const words = prediction ? `${number} ${naming(prediction)}` : number;
  const drawn = span(item === list.shown ? "box selected" : "box", span("tag", words));
  drawn.item = item;
  return place(drawn, box);
}

function place(element, box) {
  ["left", "top", "width", "height"].forEach((side, i) => element.style.setProperty(side, `${100 * box[i]}%`));
  return element;
}

/** Where a pointer is, in shares of the picture's sides. */
function at({ clientX, clientY }) {
  const { left, top, width, height } = find("frame").getBoundingClientRect();
  return [(clientX - left) / width, (clientY - top) / height].map((share) => Math.min(1, Math.max(0, share)));
}

/** The box from the start to a pointer. */
function boxTo(pointer) {
  const [x, y] = at(pointer);
  return [Math.min(x, start[0]), Math.min(y, start[1]), Math.abs(x - start[0]), Math.abs(y - start[1])];
}

function begin(event) {
  if (!event.isPrimary || event.button || !find("frame").matches(".drawable")) return;
  [start, hit] = [at(event), event.target];
  find("frame").setPointerCapture(event.pointerId);
  find("boxes").append(place(draft, boxTo(event)));
}

function cancel() {
  start = null;
  draft.remove();
}

function move(event) {
  if (start && event.isPrimary) place(draft, boxTo(event));
}

function end(event) {
  if (!start || !event.isPrimary) return;
  const box = boxTo(event);
  const { width, height } = find("frame").getBoundingClientRect();
  cancel();
  const isDrawn = Math.min(box[2] * width, box[3] * height) >= SHORTEST;
  if (isDrawn) classify(list.addPart(box), true);
  else list.select(hit.closest(".box")?.item ?? list.wholeOf(file));
}

export function setUp() {
  const handlers = { pointerdown: begin, pointermove: move, pointerup: end, pointercancel: cancel };
  for (const [name, handle] of Object.entries(handlers)) find("frame").addEventListener(name, handle);
  find("remove-box").addEventListener("click", list.removePart);
}
