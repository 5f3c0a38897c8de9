"use strict";
// A picture opens larger. Cards are filtered by words of their path and label, and by the label of their section.
const dialog = document.body.appendChild(document.createElement("dialog"));
document.addEventListener("click", ({ target }) => {
  const picture = target.closest(".larger")?.querySelector("img");
  dialog.close();
  if (!picture) return;
  dialog.replaceChildren(Object.assign(new Image(), { src: picture.src, alt: picture.alt, style: "max-width: 100%" }));
  dialog.showModal();
});
document.querySelector("#filter")?.addEventListener("input", ({ currentTarget }) => {
  const [words, label] = [...currentTarget.querySelectorAll("input, select")].map((field) => field.value.toLowerCase());
  for (const section of document.querySelectorAll("section:has(.large)")) {
    const name = section.querySelector("h2").textContent.toLowerCase();
    for (const card of section.querySelectorAll("li")) {
      const input = card.querySelector("input");
      card.hidden = !`${input.dataset.path} ${name} ${input.value}`.toLowerCase().includes(words);
    }
    section.hidden = (label && label !== name) || !section.querySelector("li:not([hidden])");
    for (const more of section.querySelectorAll("details")) more.open ||= words !== "";
  }
});
