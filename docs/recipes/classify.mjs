// Pictures to labels by a classifier that is one ONNX file: node classify.mjs pets.onnx a.jpg b.png
// Prints a line of JSON for each. With "onnxruntime-web" in place of "onnxruntime-node" the same runs in wasm.
import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-node";
import sharp from "sharp";

const [model, ...paths] = process.argv.slice(2);
const bytes = readFileSync(model);
const session = await ort.InferenceSession.create(bytes);
// Metadata stand at the end of the file as text; this runtime does not give them.
const size = parseInt(bytes.toString("latin1", bytes.lastIndexOf('"image_size": ') + '"image_size": '.length), 10);

/** uint8 (1, height, width, 3): upright, on white, profiles not applied, a large JPEG shrunk as iosr_fast does. */
async function picture(path) {
  const { format, space } = await sharp(path).metadata();
  let image = sharp(path, { ignoreIcc: true }).autoOrient();
  if (space === "cmyk") image = image.pipelineColourspace("cmyk").toColourspace("cmyk");
  else image = image.toColourspace("srgb").ensureAlpha();
  const { data, info } = await image.raw().toBuffer({ resolveWithObject: true });
  const least = Math.min(info.width, info.height) / size;
  const scale = (format === "jpeg" && [8, 4, 2].find((each) => least >= 3 * each)) || 1;
  return blockMeans(opaque(data, space === "cmyk"), info.width, info.height, scale);
}

/** RGBA on white, or CMYK as (1 - ink)(1 - black). */
function opaque(data, inks) {
  const rgb = new Uint8Array((data.length / 4) * 3);
  for (let i = 0; i < rgb.length; i++) {
    const at = 4 * Math.floor(i / 3);
    const [dark, last] = [255 - data[at + (i % 3)], data[at + 3]];
    rgb[i] = Math.round(inks ? (dark * (255 - last)) / 255 : 255 - (dark * last) / 255);
  }
  return rgb;
}

/** A tensor of the means of blocks of scale x scale pixels, those at the edges smaller. */
function blockMeans(rgb, width, height, scale) {
  const [columns, rows] = [Math.ceil(width / scale), Math.ceil(height / scale)];
  const means = Uint8Array.from({ length: rows * columns * 3 }, (_, i) => {
    const [left, top] = [scale * (Math.floor(i / 3) % columns), scale * Math.floor(i / (3 * columns))];
    const [right, bottom] = [Math.min(left + scale, width), Math.min(top + scale, height)];
    let sum = 0;
    for (let y = top; y < bottom; y++) for (let x = left; x < right; x++) sum += rgb[3 * (y * width + x) + (i % 3)];
    return Math.round(sum / ((right - left) * (bottom - top)));
  });
  return new ort.Tensor("uint8", means, [1, rows, columns, 3]);
}

for (const path of paths) {
  const input = await picture(path);
  const start = performance.now();
  const outputs = await session.run({ picture: input });
  const ms = performance.now() - start;
  const [label, accepted] = [Number(outputs.label.data[0]), Boolean(outputs.accepted?.data[0])];
  console.log(JSON.stringify({ path, label, accepted, probabilities: [...outputs.probabilities.data], ms }));
}
