// Pictures of the user: chosen, dropped, and prepared for upload. The server takes JPEG, PNG and WebP, and photos of
// phones are far larger than the input of a classifier. Pictures are sent whole, in their own aspect ratio: the server
// crops, pads or squashes them as its model does, so both sides must keep enough pixels.

import { complain, make, span } from "./dom.js";

const SUPPORTED = ["image/jpeg", "image/png", "image/webp"];
const MAX_BYTES = 2 << 20; // Larger files are redrawn.
const SHORTER = 768; // Pixels of a redrawn picture's shorter side: no model takes more;
const LONGER = 8192; // of its longer side at most these: every browser has a canvas so large.

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
 * The file to send: itself if possible, or if this browser can't decode it (the server then reports the error);
 * otherwise a redrawn one.
 */
export async function prepared(file) {
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    throw new Error("The file can't be read. Is it a folder, or was it moved?");
  }
  const isTaken = !file.type.startsWith("image/") || SUPPORTED.includes(file.type);
  return file.size <= MAX_BYTES && isTaken ? file : ((await redrawn(file)) ?? file);
}

async function redrawn(file) {
  const canvas = await drawn(file, SHORTER, LONGER);
  const type = file.type === "image/jpeg" ? "image/jpeg" : "image/png";
  const blob = canvas && (await new Promise((done) => canvas.toBlob(done, type, 0.95)));
  return blob && new File([blob], `${file.name || "picture"}.${type.slice("image/".length)}`, { type });
}

/** The file on a canvas, upright, with at most so many pixels on its sides; null if the browser can't decode it. */
async function drawn(file, shorter, longer) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return null;
  }
  const sides = [bitmap.width, bitmap.height];
  const scale = Math.min(1, shorter / Math.min(...sides), longer / Math.max(...sides));
  const [width, height] = sides.map((pixels) => Math.max(1, Math.round(pixels * scale)));
  const canvas = make("canvas", { width, height, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  return canvas;
}

/** The picture of a file, with at most `side` pixels each way; or that there is none. */
export const preview = async (file, side = 96) => (await drawn(file, side, side)) ?? span("missing", "no preview");
