// The result of one picture: label, bars in parts, numbers, nearest examples.

import { pictureAddress } from "./api.js";
import { breakable, count, find, make, percent, quoted, signed, span } from "./dom.js";

const UNSURE = 0.5; // A less probable label is more likely wrong than right.
const START = 0.1; // Length of the shortest part of a bar, as a share of the range of that part.

/**
 * The labels of an answer, each {label, probability, isSure}: one, none of a picture of none of the classes, or where
 * pictures may have several any number. The server's promise decides what is sure, if it has one.
 */
export function labelsOf({ top, label, probability, accepted }, several) {
  const given = several ? top : label === null ? [] : [{ label, probability }];
  return given.map((one, i) => ({ ...one, isSure: [accepted].flat()[i] ?? one.probability >= UNSURE }));
}

/** "unknown" (of none of the classes), "unsure" (of a label) or "sure". */
export const verdict = ({ labels }) => (!labels.length ? "unknown" : labels.every((one) => one.isSure) ? "sure" : "unsure");

/** The labels in few words. */
export const naming = ({ labels, several }) =>
  labels.map(({ label, isSure }) => (isSure ? label : `? ${label}`)).join(", ") || (several ? "no label" : "unknown");

// The parts of a logit, in the order of a bar. `cache` is the sum of the last two.
const PARTS = {
  texts: (score) => score.zero_shot,
  examples: (score) => score.cache - score.adapter,
  adapter: (score) => score.adapter,
};

/**
 * Lengths of the bars as shares of the longest. The logit of a class is the sum of its parts. Each can be negative, and
 * softmax depends on differences between classes only. So each part starts a little below its minimum over the shown
 * classes: every length is positive, and the ends of two bars differ as their logits do. A part that is the same for
 * all of them has no length.
 */
function barLengths(top, parts) {
  const bars = top.map((score) => parts.map(([, part]) => part(score)));
  parts.forEach((_, j) => {
    const values = bars.map((lengths) => lengths[j]);
    const start = Math.min(...values) - START * (Math.max(...values) - Math.min(...values));
    for (const lengths of bars) lengths[j] -= start;
  });
  const longest = Math.max(...bars.map((lengths) => lengths.reduce((sum, length) => sum + length)));
  return bars.map((lengths) => lengths.map((length) => (longest > 0 ? length / longest : 0)));
}

function bar(lengths, parts) {
  const spans = parts.map(([name], j) => {
    const part = span(name);
    part.style.width = `${100 * lengths[j]}%`; // The page's policy allows no style attribute in markup.
    return part;
  });
  return make("span", { class: "bar", "aria-hidden": "true" }, ...spans);
}

function bars(top, parts, classCount, several) {
  const lengths = barLengths(top, parts);
  const rows = top.map(({ label, probability }, i) =>
    make("li", {}, span("name", ...breakable(label)), bar(lengths[i], parts), span("probability", percent(probability))),
  );
  if (classCount > top.length && !several) {
    const rest = Math.max(0, 1 - top.reduce((sum, score) => sum + score.probability, 0));
    const name = count(classCount - top.length, "other class", "other classes");
    rows.push(make("li", { class: "rest quiet" }, span("name", name), span("probability", percent(rest))));
  }
  return rows;
}

function numbers(top, parts) {
  const names = ["class", ...parts.map(([name]) => name), "sum"];
  const head = names.map((name, i) => make("th", { scope: "col", class: i ? "number" : "" }, name));
  const rows = top.map((score) => {
    const values = [...parts.map(([, part]) => part(score)), score.logit];
    const cells = values.map((value) => make("td", { class: "number" }, signed(value)));
    return make("tr", {}, make("th", { scope: "row" }, ...breakable(score.label)), ...cells);
  });
  return [make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)];
}

/** A support picture; an empty place if none is stored. */
export function supportPicture(exampleId, words) {
  const place = make("span", { class: "missing", role: "img", "aria-label": words });
  const missing = (event) => event.target.replaceWith(place);
  return make("img", { src: pictureAddress(exampleId), alt: words, loading: "lazy", error: missing });
}

const neighbour = ({ example_id, label, similarity }, several) => {
  const name = several ? label.replaceAll(";", ", ") || "no label" : label;
  const words = [span("name", name), span("quiet", signed(similarity))];
  return make("li", {}, supportPicture(example_id, `example of ${name}`), ...words);
};

const VERDICTS = {
  unknown: ({ top: [best] }) => [
    make("p", { class: "label" }, "Unknown"),
    make("p", {}, `This picture is unlike all classes. The nearest is ${described(best)}.`),
  ],
  unsure: ({ accepted, path, top: [best, ...others] }) => [
    likely(`${accepted === false ? "Needs a look" : "Not sure"}: ${best.label}?`, best.probability),
    ...place(best.label, path),
    ...others.slice(0, 1).map((second) => make("p", {}, `It may also be ${described(second)}.`)),
  ],
  sure: ({ label, probability, path }) => [likely(label, probability), ...place(label, path)],
};

/** Several labels, or none. */
const chips = ({ labels, accepted, probability }) =>
  labels.length
    ? [make("ul", { class: "chips" }, ...labels.map((one) => chip(one, accepted)))]
    : [
        make("p", { class: "label" }, "No label"),
        make("p", {}, `This picture has none of the classes: the most likely one has ${percent(probability)}.`),
      ];

function chip({ label, probability, isSure }, accepted) {
  const words = isSure ? accepted && "accepted" : accepted ? "look at it" : "not sure";
  const facts = span("quiet", [percent(probability), words].filter(Boolean).join(", "));
  return make("li", { class: isSure ? "chip" : "chip unsure" }, span("name", ...breakable(label)), " ", facts);
}

/** Where a label is in the classifier's tree, from the root down, if that is not directly below the root. */
const place = (label, path) => (path?.length ? [make("p", { class: "quiet" }, [...path, label].join(" > "))] : []);

const likely = (words, probability) => make("p", { class: "label" }, `${words} `, make("span", {}, percent(probability)));

const described = ({ label, probability }) => `${quoted(label)}, ${percent(probability)}`;

function heading({ name, prediction, error, busy, before }) {
  if (error) {
    return [make("p", { class: "label bad" }, "Not classified"), make("p", { class: "bad" }, ...breakable(`${name}: ${error}`))];
  }
  if (!prediction) return [make("p", { class: "label quiet" }, "Classifying\u2026")];
  const lines = prediction.several ? chips(prediction) : VERDICTS[verdict(prediction)](prediction);
  if (before && !busy) {
    const words = before.several || !before.labels.length ? naming(before) : described(before);
    lines.push(make("p", {}, `Before the change: ${words}.`));
  }
  return lines;
}

/** Show the answer of an item, its error, or that it is being classified. */
export function show(item, classCount) {
  const { busy, prediction, unchecked, latencyMs, roundTripMs, version } = item;
  find("result").setAttribute("aria-busy", String(busy));
  find("answer").className = `answer ${prediction ? verdict(prediction) : ""}`;
  find("answer").replaceChildren(...heading(item));
  find("scores").hidden = !prediction;
  if (!prediction) return;
  const { top, nearest, unknown, several } = prediction;
  const isUsed = (name) => name === "examples" || top.some((score) => PARTS[name](score) !== 0);
  const parts = Object.entries(PARTS).filter(([name]) => isUsed(name));
  for (const name of ["texts", "adapter"]) find(`through-${name}`).hidden = !isUsed(name);
  find("why").hidden = !top.length;
  for (const id of ["bars", "bars-hint"]) find(id).hidden = top.length < 2; // They compare.
  find("bars").replaceChildren(...bars(top, parts, classCount, several));
  find("numbers").replaceChildren(...numbers(top, parts));
  find("unlikeness").hidden = several;
  find("unlikeness").textContent = unknown
    ? `Unlikeness to all classes: ${signed(unknown.score)}, about 0 for pictures of the classes.`
    : `Not checked for \u201cunknown\u201d: ${unchecked}.`;
  find("times").textContent =
    `${latencyMs.toFixed(1)} ms in the server, ${roundTripMs.toFixed(1)} ms round trip, model version ${version}`;
  find("near").hidden = !nearest.length;
  find("nearest").replaceChildren(...nearest.map((one) => neighbour(one, several)));
}
