// What stands on the page before the first picture: facts about the classifier, and examples to try.

import * as api from "./api.js";
import { complain, count, find, make, percent } from "./dom.js";

const SAMPLES = 6;

/** Show model, method and measured accuracy in the headline: the server's answer, or null after an error. */
export async function showFacts() {
  try {
    const data = await api.classifier();
    const { model, method, measured } = data;
    find("facts").textContent = [model, method, accuracy(measured)].filter((words) => words).join(" \u00b7 ");
    find("facts").title = measured?.summary ?? ""; // With what was not judged.
    return data;
  } catch (error) {
    complain(error.message);
    return null;
  }
}

function accuracy(measured) {
  if (!measured?.interval) return "accuracy not measured";
  const [low, high] = measured.interval.map(percent);
  const images = count(measured.images, measured.protocol === "validation" ? "validation picture" : "left-out picture");
  const stale = measured.stale ? "; measured before the last changes" : "";
  return `${percent(measured.accuracy)} of ${images} right (95%: ${low} to ${high})${stale}`;
}

/** Offer stored pictures of some classes; a click passes one to `take`. */
export async function showSamples(classes, take) {
  const taught = classes.filter(({ examples }) => examples);
  const step = Math.max(1, Math.floor(taught.length / SAMPLES));
  const chosen = taught.filter((info, i) => i % step === 0).slice(0, SAMPLES);
  try {
    const ids = await Promise.all(chosen.map(({ class_id: id }) => api.firstExample(id)));
    find("samples-list").replaceChildren(...ids.map((id, i) => sample(id, chosen[i].name, take)));
  } catch (error) {
    complain(error.message);
  }
}

function sample(id, name, take) {
  const address = api.pictureAddress(id);
  const picture = make("img", { src: address, alt: `Classify an example of ${name}`, error: () => item.remove() });
  const choose = async () => {
    const blob = await (await fetch(address)).blob();
    find("choose").focus({ preventScroll: true }); // The samples are about to disappear.
    take([new File([blob], `example of ${name}`, { type: blob.type })]);
  };
  const item = make("li", {}, make("button", { type: "button", click: choose }, picture));
  return item;
}
