// The form that adds a class: name, pictures, token.

import * as api from "./api.js";
import { complain, count, find, make, quoted, removable } from "./dom.js";
import { acceptChoices, acceptDrops } from "./pictures.js";
import { drawn, preparedAll } from "./upright.js";

const THUMBNAIL = 96;
let pictures = [];

/** Add pictures to the form. */
export async function collect(files) {
  const added = await Promise.all(files.map(async (file) => ({ file, canvas: await drawn(file, THUMBNAIL) })));
  pictures.push(...added);
  draw();
}

function draw() {
  const strip = find("new-strip");
  strip.hidden = !pictures.length;
  strip.replaceChildren(
    ...pictures.map((picture) =>
      removable(
        picture.canvas ?? make("span", { class: "missing" }, "no preview"),
        `Leave out ${picture.file.name}`,
        () => leaveOut(picture),
      ),
    ),
  );
  const words = pictures.length ? ` with ${count(pictures.length, "picture")}` : "";
  find("add-class").textContent = `Add the class${words}`;
}

function leaveOut(picture) {
  const place = pictures.indexOf(picture);
  pictures = pictures.filter((other) => other !== picture);
  draw();
  const buttons = find("new-strip").querySelectorAll("button");
  (buttons[Math.min(place, buttons.length - 1)] ?? find("new-pictures")).focus();
}

async function send(change) {
  const name = find("new-name").value.trim();
  if (!name) return refuse("The class needs a name.", find("new-name"));
  if (!pictures.length) return refuse("The class needs at least one picture.", find("new-pictures"));
  const sent = pictures.map((picture) => picture.file);
  const added = await change(
    async (onWait) => api.addClass(name, await preparedAll(sent), onWait),
    ({ version, class_id }) => ({
      words: `Class ${quoted(name)} added with ${count(sent.length, "picture")}: model version ${version}.`,
      mark: { classId: class_id, name, word: "new" },
      look: true,
    }),
  );
  if (!added) return;
  find("new-name").value = "";
  pictures = [];
  draw();
}

function refuse(words, field) {
  complain(words);
  field.focus();
}

/** `change(request, describe)` sends a change and announces it; see page.js. */
export function setUp(change) {
  find("token").value = api.token.get();
  find("token").addEventListener("input", (event) => {
    api.token.set(event.target.value.trim());
    event.target.removeAttribute("aria-invalid");
  });
  acceptChoices(find("new-pictures"), collect);
  acceptDrops(find("teach-stage"), collect);
  const button = find("add-class");
  find("teach").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (button.getAttribute("aria-disabled") === "true") return; // A disabled button would lose the focus.
    button.setAttribute("aria-disabled", "true");
    await send(change);
    button.removeAttribute("aria-disabled");
  });
}
