// Prepares files for upload. The server takes JPEG, PNG and WebP, and photos of phones are far larger than the input of a
// classifier. Pictures are sent whole, in their own aspect ratio: the server crops, pads or squashes them as its model
// does, so both sides must keep enough pixels. Photos are turned upright here, because a classifier may use pixels as
// they are stored; a redrawn picture has no EXIF, so the server does not turn it again.

const SUPPORTED = ["image/jpeg", "image/png", "image/webp"];
const MAX_BYTES = 2 << 20; // Larger files are redrawn.
const SIDE = 1024; // Longer side of a redrawn picture, in pixels,
const SHORTER = 512; // unless its shorter side would have fewer than this: no model takes more,
const LONGEST = 8192; // as long as every browser has a canvas so large.
const HEAD_BYTES = 256 << 10; // EXIF is near the start, in a segment of at most 64 KiB.
// A JPEG whose EXIF has another orientation (tag 0x0112, one number of 16 bits) than 1, in either order of bytes.
const TURNED =
  /^\xff\xd8[^]*Exif\0\0[^]*(?:\x12\x01\x03\0\x01\0\0\0[\x02-\x08]|\x01\x12\0\x03\0\0\0\x01\0[\x02-\x08])/;

/**
 * The file to send: {file, notes}. The file itself if possible, or if this browser can't decode it (the server then
 * reports the error); otherwise a redrawn one, and `notes` has the reasons.
 */
export async function prepared(file) {
  let head;
  try {
    head = new TextDecoder("latin1").decode(await file.slice(0, HEAD_BYTES).arrayBuffer());
  } catch {
    throw new Error("The file can't be read. Is it a folder, or was it moved?");
  }
  const notes = [];
  if (TURNED.test(head)) notes.push("turned upright");
  if (file.size > MAX_BYTES) notes.push("made smaller");
  if (file.type.startsWith("image/") && !SUPPORTED.includes(file.type)) notes.push("converted");
  const redrawn = notes.length ? await redraw(file) : null;
  return redrawn ? { file: redrawn, notes } : { file, notes: [] };
}

/** The files to send for several files. */
export async function preparedAll(files) {
  const all = [];
  for (const file of files) all.push((await prepared(file)).file); // One by one: decoded photos are large.
  return all;
}

async function redraw(file) {
  const canvas = await drawn(file, SIDE, SHORTER);
  const type = file.type === "image/jpeg" ? "image/jpeg" : "image/png";
  const blob = canvas && (await new Promise((done) => canvas.toBlob(done, type, 0.95)));
  return blob && new File([blob], `${file.name || "picture"}.${type.slice("image/".length)}`, { type });
}

/**
 * The file on a canvas, upright, with at most `side` pixels each way, more if the shorter side would have fewer than
 * `shorter`; null if the browser can't decode it.
 */
export async function drawn(file, side, shorter = 0) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return null;
  }
  const [short, long] = [bitmap.width, bitmap.height].sort((a, b) => a - b);
  const scale = Math.min(1, Math.max(side / long, Math.min(shorter / short, LONGEST / long)));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.setAttribute("aria-hidden", "true");
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas;
}
