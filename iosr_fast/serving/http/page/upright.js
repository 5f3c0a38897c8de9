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
const [EXIF, ORIENTATION] = [0x45786966, 0x0112];

/**
 * The file to send: {file, notes}. The file itself if possible, or if this browser can't decode it (the server then
 * reports the error); otherwise a redrawn one, and `notes` has the reasons.
 */
export async function prepared(file) {
  let head;
  try {
    head = new DataView(await file.slice(0, HEAD_BYTES).arrayBuffer());
  } catch {
    throw new Error("The file can't be read. Is it a folder, or was it moved?");
  }
  const notes = [];
  if (orientation(head) !== 1) notes.push("turned upright");
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

/** The EXIF orientation, 1 to 8, of a JPEG that begins with these bytes; 1 (upright) if there is none. */
export function orientation(view) {
  try {
    if (view.getUint16(0) !== 0xffd8) return 1;
    for (let at = 2; view.getUint8(at) === 0xff && view.getUint8(at + 1) !== 0xda; at += 2 + view.getUint16(at + 2)) {
      if (view.getUint8(at + 1) === 0xe1 && view.getUint32(at + 4) === EXIF) return orientationInTiff(view, at + 10);
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // Not a JPEG, or truncated.
  }
  return 1;
}

function orientationInTiff(view, start) {
  const little = view.getUint16(start) === 0x4949;
  const folder = start + view.getUint32(start + 4, little);
  const entries = view.getUint16(folder, little);
  for (let at = folder + 2; at < folder + 2 + 12 * entries; at += 12) {
    if (view.getUint16(at, little) === ORIENTATION) return view.getUint16(at + 8, little);
  }
  return 1;
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
