// What is sent of a file. The server takes JPEG, PNG and WebP, and a phone's photo is far larger than what a classifier
// looks at. It is turned upright here, for a classifier may take pixels as they are stored; what is drawn anew has no EXIF
// left by which the server could turn it again.

const TAKEN = ["image/jpeg", "image/png", "image/webp"];
const LARGEST = 2 << 20; // Bytes that are sent as they are.
const SIDE = 1024; // Pixels each way of what is drawn anew.
const BEGINNING = 256 << 10; // EXIF comes first, in a segment of at most 64 KiB.
const [EXIF, ORIENTATION] = [0x45786966, 0x0112];

/**
 * What to send of the file: {file, notes}. The file itself where that will do, or where this browser can't decode it
 * (the server then says what is wrong); otherwise it is drawn anew, and `notes` says why.
 */
export async function prepared(file) {
  let beginning;
  try {
    beginning = new DataView(await file.slice(0, BEGINNING).arrayBuffer());
  } catch {
    throw new Error("The file can't be read. Was it moved or changed?");
  }
  const notes = [];
  if (orientation(beginning) !== 1) notes.push("turned upright");
  if (file.size > LARGEST) notes.push("made smaller");
  if (file.type.startsWith("image/") && !TAKEN.includes(file.type)) notes.push("converted");
  const redrawn = notes.length ? await redraw(file) : null;
  return redrawn ? { file: redrawn, notes } : { file, notes: [] };
}

/** The files to send for these. */
export const preparedAll = (files) => Promise.all(files.map(async (file) => (await prepared(file)).file));

/** EXIF's orientation of a JPEG that begins with these bytes, 1 to 8; 1, upright, where there is none. */
export function orientation(view) {
  try {
    if (view.getUint16(0) !== 0xffd8) return 1;
    for (let at = 2; view.getUint8(at) === 0xff && view.getUint8(at + 1) !== 0xda; at += 2 + view.getUint16(at + 2)) {
      if (view.getUint8(at + 1) === 0xe1 && view.getUint32(at + 4) === EXIF) return orientationInTiff(view, at + 10);
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // The bytes are no JPEG, or end too early.
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
  const canvas = await drawn(file, SIDE);
  if (!canvas) return null;
  const [type, end] = file.type === "image/jpeg" ? ["image/jpeg", "jpg"] : ["image/png", "png"];
  const blob = await new Promise((done) => canvas.toBlob(done, type, 0.95));
  return blob && new File([blob], `${file.name || "picture"}.${end}`, { type });
}

/** The file on a canvas, upright and of at most `side` pixels each way; null where the browser can't decode it. */
export async function drawn(file, side) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return null;
  }
  const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
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
