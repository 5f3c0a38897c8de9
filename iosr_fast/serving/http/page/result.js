// The result of one picture: label, bars in two parts, numbers, nearest support pictures.

import { pictureAddress } from "./api.js";
import { count, find, make, makeSvg, percent, quoted, signed } from "./dom.js";

const FACTORS = [
  [1e6, "a million times"],
  [1000, "1,000 times"],
  [100, "100 times"],
  [10, "10 times"],
  [2, "twice"],
];

/**
 * Lengths of the bars as shares of the longest. The logit of a class is zero_shot + cache. Either can be negative, and
 * softmax depends on differences between classes only. So each part starts at its minimum over the shown classes: no
 * length is negative, and the ends of two bars differ as their logits do.
 */
export function barLengths(top) {
  const lowest = (part) => Math.min(...top.map((score) => score[part]));
  const [textsFrom, picturesFrom] = [lowest("zero_shot"), lowest("cache")];
  const parts = top.map((score) => ({ texts: score.zero_shot - textsFrom, pictures: score.cache - picturesFrom }));
  const longest = Math.max(...parts.map(({ texts, pictures }) => texts + pictures));
  const share = (length) => (longest > 0 ? length / longest : 0);
  return {
    bars: parts.map(({ texts, pictures }) => ({ texts: share(texts), pictures: share(pictures) })),
    longest,
  };
}

function bar({ texts, pictures }, score) {
  const rect = (part, from, share) =>
    makeSvg("rect", { class: part, x: `${100 * from}%`, width: `${100 * share}%`, height: "100%" });
  const words = `texts ${signed(score.zero_shot)}, pictures ${signed(score.cache)}, sum ${signed(score.logit)}`;
  return makeSvg(
    "svg",
    { class: "bar", "aria-hidden": "true" },
    makeSvg("title", {}, words),
    rect("texts", 0, texts),
    rect("pictures", texts, pictures),
  );
}

/** A length on the scale of the bars, and how much likelier a class is whose bar ends that much further right. */
function scale(longest) {
  const entry = FACTORS.find(([candidate]) => Math.log(candidate) <= 0.45 * longest);
  if (entry === undefined) return null;
  const [factor, words] = entry;
  const width = (100 * Math.log(factor)) / longest;
  const line = (x1, y1, x2, y2) => makeSvg("line", { x1, y1, x2, y2 });
  return make(
    "div",
    { class: "scale" },
    makeSvg(
      "svg",
      { "aria-hidden": "true" },
      line("0.5", "0", "0.5", "9"),
      line("0", "4.5", `${width}%`, "4.5"),
      line(`${width}%`, "0", `${width}%`, "9"),
    ),
    make(
      "p",
      { class: "quiet" },
      `This much longer means ${words} as likely. Only differences count, so each part starts at its minimum.`,
    ),
  );
}

function bars(top, mark, classCount) {
  const { bars: lengths, longest } = barLengths(top);
  const rows = top.map((score, i) => {
    const tag = score.class_id === mark?.classId ? make("span", { class: "tag" }, mark.word) : null;
    return make(
      "li",
      { "data-class": score.class_id },
      make("span", { class: "name" }, score.label, tag && " ", tag),
      bar(lengths[i], score),
      make("span", { class: "probability" }, percent(score.probability)),
    );
  });
  if (classCount > top.length) {
    const rest = Math.max(0, 1 - top.reduce((sum, score) => sum + score.probability, 0));
    const name = count(classCount - top.length, "other class", "other classes");
    const probability = make("span", { class: "probability" }, percent(rest));
    rows.push(make("li", { class: "rest" }, make("span", { class: "name" }, name), probability));
  }
  return [make("ol", { class: "bars", "aria-label": "Most probable classes" }, ...rows), scale(longest)];
}

function numbers(top) {
  const row = (score) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, score.label),
      ...[score.zero_shot, score.cache, score.logit].map((value) => make("td", {}, signed(value))),
    );
  const heads = ["class", "texts", "pictures", "sum"];
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
  const figures = nearest.map(({ example_id, label, similarity }) =>
    make(
      "li",
      {},
      supportPicture(example_id, `labelled picture of ${label}`),
      make("span", { class: "name" }, label),
      make("span", { class: "quiet" }, signed(similarity)),
    ),
  );
  return [
    make("h3", {}, "Nearest labelled pictures ", make("span", { class: "quiet" }, "with their cosine similarity")),
    make("ul", { class: "nearest" }, ...figures),
  ];
}

function heading({ prediction, before, marked }) {
  const probability = make("span", {}, percent(prediction.probability));
  const lines = [make("p", { class: "label" }, prediction.label, " ", probability)];
  if (before) {
    lines.push(make("p", {}, `Before the change: ${quoted(before.label)}, ${percent(before.probability)}.`));
  }
  if (marked && !prediction.top.some((score) => score.class_id === marked.classId)) {
    const first = prediction.top.length;
    lines.push(make("p", {}, `${quoted(marked.name)} is not among the top ${first} for this picture.`));
  }
  return lines;
}

const refusal = ({ name, error }) => [
  make("p", { class: "label error" }, "Not classified"),
  make("p", { class: "error" }, `${name}: ${error}`),
];

/** Show an item: its answer, its error, or that it is being classified. */
export function show(item, mark, classCount) {
  const notes = item.sent?.notes.length ? ` (${item.sent.notes.join(", ")} before sending)` : "";
  find("file-name").textContent = item.name + notes;
  find("picture").hidden = false;
  find("picture").replaceChildren(item.picture ?? make("span", { class: "missing" }, "no preview"));
  find("result").setAttribute("aria-busy", String(item.busy));
  const { prediction, error, latencyMs, roundTripMs, version } = item;
  find("scores").hidden = !prediction;
  if (prediction) {
    find("answer").replaceChildren(...heading(item));
    const times = `${latencyMs.toFixed(1)} ms in the server, ${roundTripMs.toFixed(1)} ms round trip`;
    find("times").textContent = `${times}, model version ${version}`;
    const { top, nearest } = prediction;
    const parts = [...bars(top, mark, classCount), numbers(top), ...neighbours(nearest)];
    find("scores").replaceChildren(...parts.filter((part) => part !== null));
  } else {
    find("times").textContent = "";
    const waiting = make("p", { class: "label quiet-label" }, "Classifying\u2026");
    find("answer").replaceChildren(...(error ? refusal(item) : [waiting]));
  }
}
