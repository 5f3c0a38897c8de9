// The result of one picture: label, probabilities, nearest examples.

import { pictureAddress } from "./api.js";
import { breakable, count, find, make, percent, signed, span } from "./dom.js";

const UNSURE = 0.5; // A less probable label is more likely wrong than right.

/**
 * The labels of an answer, each {label, probability, isSure}: one, none of a picture of none of the classes, or where
 * pictures may have several any number. The server's promise decides what is sure, if it has one.
 */
export function labelsOf({ top, label, probability, accepted }, several) {
  const given = several ? top : label === null ? [] : [{ label, probability }];
  return given.map((one, i) => ({ ...one, isSure: [accepted].flat()[i] ?? one.probability >= UNSURE }));
}

/** "unknown" (of none of the classes), "unsure" (of a label) or "sure". */
export const verdict = ({ labels }) =>
  !labels.length ? "unknown" : labels.every((one) => one.isSure) ? "sure" : "unsure";

/** The labels in few words. */
export const naming = ({ labels, several }) =>
  labels.map(({ label, isSure }) => (isSure ? label : `? ${label}`)).join(", ") || (several ? "no label" : "unknown");

function bar(label, probability, look = "") {
  const length = make("span");
  length.style.width = `${100 * probability}%`; // The page's policy allows no style attribute in markup.
  const whole = make("span", { class: "bar", "aria-hidden": "true" }, length);
  const name = span("name", ...breakable(label));
  return make("li", { class: look }, name, whole, span("probability", percent(probability)));
}

/** The most probable classes, and all others together. */
function bars(top, classCount) {
  const others = classCount - top.length;
  const rest = Math.max(0, 1 - top.reduce((sum, { probability }) => sum + probability, 0));
  const last = others > 0 ? [bar(count(others, "other class", "other classes"), rest, "quiet")] : [];
  return [...top.map(({ label, probability }) => bar(label, probability)), ...last];
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

/** The label, or that there is none. */
function single({ labels: [given], accepted, path, top: [best] }) {
  if (!given) return [make("p", { class: "label" }, "Unknown"), make("p", {}, "This picture is unlike all classes.")];
  const { label, probability } = given.isSure ? given : best;
  const words = given.isSure ? label : `${accepted === false ? "Needs a look" : "Not sure"}: ${label}?`;
  const line = make("p", { class: "label" }, `${words} `, make("span", {}, percent(probability)));
  // Where the label is in the classifier's tree, from the root down, if that is not directly below the root.
  return path?.length ? [line, make("p", { class: "quiet" }, [...path, label].join(" > "))] : [line];
}

/** Several labels, or none. */
const chips = ({ labels, accepted, probability }) =>
  labels.length
    ? [make("ul", { class: "row" }, ...labels.map((one) => chip(one, accepted)))]
    : [
        make("p", { class: "label" }, "No label"),
        make("p", {}, `This picture has none of the classes: the most likely one has ${percent(probability)}.`),
      ];

function chip({ label, probability, isSure }, accepted) {
  const words = isSure ? accepted && "accepted" : accepted ? "look at it" : "not sure";
  const facts = span("quiet", [percent(probability), words].filter(Boolean).join(", "));
  return make("li", { class: isSure ? "chip" : "chip unsure" }, span("name", ...breakable(label)), " ", facts);
}

function heading({ name, prediction, error }) {
  if (error) {
    const words = breakable(`${name}: ${error}`);
    return [make("p", { class: "label bad" }, "Not classified"), make("p", { class: "bad" }, ...words)];
  }
  if (!prediction) return [make("p", { class: "label quiet" }, "Classifying\u2026")];
  return prediction.several ? chips(prediction) : single(prediction);
}

/** Show the answer of an item, its error, or that it is being classified. */
export function show(item, classCount) {
  const { busy, prediction, unchecked } = item;
  find("result").setAttribute("aria-busy", String(busy));
  find("answer").className = `answer ${prediction ? verdict(prediction) : ""}`;
  find("answer").replaceChildren(...heading(item));
  find("scores").hidden = !prediction;
  if (!prediction) return;
  const { top, nearest, several } = prediction;
  find("bars").hidden = several; // The answer has the probability of each label.
  find("bars").replaceChildren(...bars(top, classCount));
  find("unchecked").textContent = unchecked && !several ? `Not checked for \u201cunknown\u201d: ${unchecked}.` : "";
  find("near").hidden = !nearest.length;
  find("nearest").replaceChildren(...nearest.map((one) => neighbour(one, several)));
}
