// Pictures of the user: chosen, dropped, drawn, and prepared for upload. The server takes JPEG, PNG and WebP, and photos
// of phones are far larger than the input of a classifier. Pictures are sent whole, in their own aspect ratio: the server
// crops, pads or squashes them as its model does, so both sides must keep enough pixels.

import { complain, make, span } from "./dom.js";

const SUPPORTED = ["image/jpeg", "image/png", "image/webp"];
const MAX_BYTES = [2 << 20, 8 << 20]; // Larger files are redrawn; the second number is for parts of a picture.
const SIDE = [1024, 2048]; // Longer side of a redrawn picture, in pixels,
const SHORTER = 512; // unless its shorter side would have fewer than this: no model takes more,
const LONGEST = 8192; // as long as every browser has a canvas so large.

/** Pass files dropped on `element` to `take`; it is marked while something hovers over it. */
export function acceptDrops(element, take) {
  const over = (event) => {
    event.preventDefault();
    event.stopPropagation();
    element.classList.toggle("hovered", event.type === "dragover");
  };
  element.addEventListener("dragover", over);
  element.addEventListener("dragleave", (event) => {
    if (!element.contains(event.relatedTarget)) over(event);
  });
  element.addEventListener("drop", (event) => {
    over(event);
    const files = [...event.dataTransfer.files];
    if (files.length) take(files);
    else complain("No file was dropped. Save the picture first, or copy and paste it.");
  });
}

/** Pass files of an <input type="file"> to `take`; the same file can be chosen again. */
export function acceptChoices(input, take) {
  input.addEventListener("change", () => {
    const files = [...input.files];
    input.value = "";
    if (files.length) take(files);
  });
}

/**
 * The file to send: {file, notes}. The file itself if possible, or if this browser can't decode it (the server then
 * reports the error); otherwise a redrawn one, and `notes` has the reasons. With a box more of the picture is kept.
 */
export async function prepared(file, box) {
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    throw new Error("The file can't be read. Is it a folder, or was it moved?");
  }
  const notes = [];
  if (file.size > MAX_BYTES[box ? 1 : 0]) notes.push("made smaller");
  if (file.type.startsWith("image/") && !SUPPORTED.includes(file.type)) notes.push("converted");
  const redrawn = notes.length ? await redraw(file, SIDE[box ? 1 : 0]) : null;
  return redrawn ? { file: redrawn, notes } : { file, notes: [] };
}

async function redraw(file, side) {
  const canvas = await drawn(file, side, SHORTER);
  const type = file.type === "image/jpeg" ? "image/jpeg" : "image/png";
  const blob = canvas && (await new Promise((done) => canvas.toBlob(done, type, 0.95)));
  return blob && new File([blob], `${file.name || "picture"}.${type.slice("image/".length)}`, { type });
}

/**
 * The file, or its part in a box, on a canvas, upright, with at most `side` pixels each way, more if the shorter side
 * would have fewer than `shorter`; null if the browser can't decode it.
 */
async function drawn(file, side, shorter = 0, box = [0, 0, 1, 1]) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return null;
  }
  const [left, top, ...sides] = box.map((share, i) => share * (i % 2 ? bitmap.height : bitmap.width));
  const [short, long] = [...sides].sort((a, b) => a - b);
  const scale = Math.min(1, Math.max(side / long, Math.min(shorter / short, LONGEST / long)));
  const [width, height] = sides.map((pixels) => Math.max(1, Math.round(pixels * scale)));
  const canvas = make("canvas", { width, height, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, left, top, ...sides, 0, 0, width, height);
  bitmap.close();
  return canvas;
}

/** The picture of a file, or of its part in a box, with at most `side` pixels each way; or that there is none. */
export const preview = async (file, box, side = 96) =>
  (await drawn(file, side, 0, box)) ?? span("missing", "no preview");
