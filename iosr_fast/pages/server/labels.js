// The dialog that asks for the labels of a picture that may have several.

import { breakable, find, make, span } from "./dom.js";

/** Ask which classes `content` shows, at first those of these names: null if that is cancelled. */
export function askLabels(content, first) {
  const others = [...find("names").options].map(({ value }) => value).filter((name) => !first.includes(name));
  const box = (name) => {
    const input = make("input", { type: "checkbox", value: name, checked: first.includes(name) });
    return make("li", {}, make("label", { class: "row" }, input, span("name", ...breakable(name))));
  };
  find("labels-words").replaceChildren(...content);
  find("labels-list").replaceChildren(...[...first, ...others].map(box));
  find("labels").returnValue = "";
  find("labels").showModal();
  return new Promise((done) => {
    const close = () => {
      const chosen = [...find("labels-list").querySelectorAll(":checked")].map(({ value }) => value);
      done(find("labels").returnValue === "send" ? chosen : null);
    };
    find("labels").addEventListener("close", close, { once: true });
  });
}
