// The result of one picture: label, bars in parts, numbers, nearest examples.

import { pictureAddress } from "./api.js";
import { count, find, make, noPreview, percent, quoted, signed, span } from "./dom.js";
import { drawn } from "./upright.js";

const UNSURE = 0.5; // A less probable label is more likely wrong than right.
const SIDE = 640; // Of the picture, in pixels.
const START = 0.1; // Length of the shortest part of a bar, as a share of the range of that part.

/** "unknown" (of none of the classes), "unsure" or "sure". The server's promise decides what is sure, if it has one. */
export const verdict = ({ unknown, accepted, probability }) =>
  unknown?.rejected ? "unknown" : (accepted ?? probability >= UNSURE) ? "sure" : "unsure";

/** The label in few words. */
export const naming = (prediction) =>
  ({ unknown: "unknown", unsure: `? ${prediction.label}`, sure: prediction.label })[verdict(prediction)];

// The parts of a logit, in the order of a bar. `cache` is the sum of the last two.
const PARTS = {
  texts: (score) => score.zero_shot,
  examples: (score) => score.cache - score.adapter,
  adapter: (score) => score.adapter,
};

/** The parts that any of these classes has; texts and examples always. */
const partsOf = (top) =>
  Object.entries(PARTS).filter(([name]) => name !== "adapter" || top.some((score) => score.adapter !== 0));

/**
 * Lengths of the bars as shares of the longest. The logit of a class is the sum of its parts. Each can be negative, and
 * softmax depends on differences between classes only. So each part starts a little below its minimum over the shown
 * classes: every length is positive, and the ends of two bars differ as their logits do. A part that is the same for
 * all of them has no length.
 */
export function barLengths(top) {
  const bars = top.map(() => ({}));
  for (const [name, part] of Object.entries(PARTS)) {
    const values = top.map(part);
    const [lowest, highest] = [Math.min(...values), Math.max(...values)];
    values.forEach((value, i) => (bars[i][name] = value - lowest + START * (highest - lowest)));
  }
  const longest = Math.max(...bars.map((lengths) => lengths.texts + lengths.examples + lengths.adapter));
  for (const lengths of bars) {
    for (const name in lengths) lengths[name] = longest > 0 ? lengths[name] / longest : 0;
  }
  return bars;
}

function bar(lengths, parts) {
  const spans = parts.map(([name]) => {
    const part = span(name);
    part.style.width = `${100 * lengths[name]}%`; // The page's policy allows no style attribute in markup.
    return part;
  });
  return make("span", { class: "bar", "aria-hidden": "true" }, ...spans);
}

function bars(top, classCount) {
  const lengths = barLengths(top);
  const parts = partsOf(top);
  const rows = top.map(({ class_id, label, probability }, i) => {
    const cells = [span("name", label), bar(lengths[i], parts), span("probability", percent(probability))];
    return make("li", { "data-class": class_id }, ...cells);
  });
  if (classCount > top.length) {
    const rest = Math.max(0, 1 - top.reduce((sum, score) => sum + score.probability, 0));
    const name = count(classCount - top.length, "other class", "other classes");
    rows.push(make("li", { class: "rest quiet" }, span("name", name), span("probability", percent(rest))));
  }
  return make("ol", { class: "bars", "aria-label": "Most probable classes" }, ...rows);
}

function numbers(top, { prediction, unchecked, latencyMs, roundTripMs, version }) {
  const parts = partsOf(top);
  const row = (score) => {
    const cells = [...parts.map(([, part]) => part(score)), score.logit].map((value) => make("td", {}, signed(value)));
    return make("tr", {}, make("th", { scope: "row" }, score.label), ...cells);
  };
  const heads = ["class", ...parts.map(([name]) => name), "sum"];
  const times = `${latencyMs.toFixed(1)} ms in the server, ${roundTripMs.toFixed(1)} ms round trip`;
  return make(
    "details",
    { class: "numbers", open: find("scores").querySelector("details.numbers")?.open },
    make("summary", {}, "The numbers"),
    make(
      "table",
      {},
      make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))),
      make("tbody", {}, ...top.map(row)),
    ),
    make(
      "p",
      { class: "quiet" },
      prediction.unknown
        ? `Unlikeness to all classes: ${signed(prediction.unknown.score)}, about 0 for pictures of the classes.`
        : `Not checked for \u201cunknown\u201d: ${unchecked}.`,
    ),
    make("p", { class: "quiet" }, "Bars show differences: each part of a bar starts just below its lowest number."),
    make("p", { class: "quiet" }, `${times}, model version ${version}`),
  );
}

/** A support picture; an empty place if none is stored. */
export function supportPicture(exampleId, words) {
  const place = make("span", { class: "missing", role: "img", "aria-label": words });
  const missing = (event) => event.target.replaceWith(place);
  return make("img", { src: pictureAddress(exampleId), alt: words, loading: "lazy", error: missing });
}

function neighbours(nearest) {
  if (!nearest.length) return [];
  const figures = nearest.map(({ example_id, label, similarity }) => {
    const words = [span("name", label), span("quiet", signed(similarity))];
    return make("li", {}, supportPicture(example_id, `example of ${label}`), ...words);
  });
  return [
    make("h3", {}, "Nearest examples ", span("quiet", "with their cosine similarity")),
    make("ul", { class: "nearest" }, ...figures),
  ];
}

const VERDICTS = {
  unknown: ({ top: [best] }) => [
    make("p", { class: "label" }, "Unknown"),
    make("p", {}, `This picture is unlike all classes. The nearest is ${described(best)}.`),
  ],
  unsure: ({ accepted, top: [best, second] }) => [
    likely(`${accepted === false ? "Needs a look" : "Not sure"}: ${best.label}?`, best.probability),
    second && make("p", {}, `It may also be ${described(second)}.`),
  ],
  sure: ({ label, probability }) => [likely(label, probability)],
};

const likely = (words, probability) => make("p", { class: "label" }, words, " ", make("span", {}, percent(probability)));

const described = ({ label, probability }) => `${quoted(label)}, ${percent(probability)}`;

function heading({ prediction, busy, before }) {
  const lines = VERDICTS[verdict(prediction)](prediction);
  if (before && !busy) {
    const words = verdict(before) === "unknown" ? "unknown" : described(before);
    lines.push(make("p", {}, `Before the change: ${words}.`));
  }
  return lines.filter((line) => line);
}

const refusal = ({ name, error }) => [
  make("p", { class: "label bad" }, "Not classified"),
  make("p", { class: "bad" }, `${name}: ${error}`),
];

/** Show the picture of an item; `isShown()` is false if another was chosen while it was read. */
export async function showPicture({ file }, isShown) {
  const picture = await drawn(file, SIDE);
  if (isShown()) find("picture").replaceChildren(picture ?? noPreview());
}

/** Show the answer of an item, its error, or that it is being classified. */
export function show(item, classCount) {
  const { busy, prediction, error } = item;
  find("result").setAttribute("aria-busy", String(busy));
  find("scores").hidden = !prediction;
  find("answer").className = `answer ${prediction ? verdict(prediction) : ""}`;
  if (prediction) {
    find("answer").replaceChildren(...heading(item));
    const { top, nearest } = prediction;
    find("through-adapter").hidden = !partsOf(top).some(([name]) => name === "adapter");
    find("parts").replaceChildren(bars(top, classCount), numbers(top, item), ...neighbours(nearest));
  } else {
    const waiting = make("p", { class: "label quiet" }, "Classifying\u2026");
    find("answer").replaceChildren(...(error ? refusal(item) : [waiting]));
  }
}
