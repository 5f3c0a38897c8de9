// The page of a server of several classifiers: a list of them, with links to their pages.

import { count, find, make, span } from "./dom.js";

function line({ name, error, classes, version, model }) {
  if (classes === null) return make("li", {}, `${name} `, span("bad", error));
  const facts = [count(classes, "class", "classes"), `version ${version}`, model].filter(Boolean).join(", ");
  const link = make("a", { href: `v1/classifiers/${encodeURIComponent(name)}/` }, name);
  return make("li", {}, link, " ", span("quiet", facts), " ", span("bad", error ?? ""));
}

try {
  const { classifiers } = await (await fetch("v1/classifiers", { cache: "no-store" })).json();
  find("classifiers").append(...classifiers.map(line));
} catch {
  find("problem").textContent = "The server can't be reached, or doesn't list its classifiers. Reload the page.";
}
