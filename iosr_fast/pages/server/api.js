// The HTTP API. URLs are relative, so the page also works under a path of a reverse proxy.

import { count, find, say, sayNothing } from "./dom.js";

/** Of several classifiers the name of this page's, below whose path its API is; "" of a single one. */
export const name = /\/v1\/classifiers\/([^/]+)\/$/.exec(location.pathname)?.[1] ?? "";
const V1 = name ? "" : "v1/";
const LONGEST_WAIT_S = 60;
const TRIES = 10; // Of a request that the server is too busy for.
const TOKEN = "iosr_fast.token";

const token = () => sessionStorage.getItem(TOKEN) ?? "";
let asked = null; // Of the token, if its dialog is open: whether it was entered.

/** Ask for the token, above all that is on the page: requests that need it wait together. */
function askToken(words) {
  asked ??= new Promise((done) => {
    const close = () => {
      const entered = find("ask").returnValue === "send";
      if (entered) sessionStorage.setItem(TOKEN, find("token").value.replace(/[^!-~]/g, "")); // As a header takes it.
      asked = null;
      done(entered);
    };
    find("ask-words").textContent = words;
    find("ask").returnValue = "";
    find("ask").addEventListener("close", close, { once: true });
    find("ask").showModal();
  });
  return asked;
}

/**
 * Send a request, with the token if it is no GET, and read its JSON. After a 503 with Retry-After, say so, wait that
 * long and send it again; where another token is needed, ask for it and send it again. Other failures throw an Error
 * with `status` and `code` of the server, if it answered.
 */
async function call(path, { method = "GET", body } = {}) {
  for (let tries = 1; ; tries += 1) {
    const sent = method === "GET" ? "" : token();
    const headers = sent ? { Authorization: `Bearer ${sent}` } : {};
    const { response, text } = await fetchText(path, { method, body, headers, cache: "no-store" });
    const wait = Number.parseFloat(response.headers.get("Retry-After"));
    const again = response.status === 503 && tries < TRIES && wait <= LONGEST_WAIT_S;
    try {
      if (!again) return checked(response, text);
    } catch (error) {
      if (error.code === "unauthorized") error.message = sent ? "Wrong token." : "Enter the token.";
      else if (error.code !== "predict_only") throw error;
      // Another request may have got the token meanwhile.
      if (sent === token() && !(await askToken(error.message))) throw error;
      continue;
    }
    const words = say(`The server is busy. The page tries again in ${count(Math.ceil(wait), "second")}.`);
    await new Promise((done) => setTimeout(done, wait * 1000));
    if (words.isConnected) sayNothing();
  }
}

async function fetchText(path, options) {
  try {
    const response = await fetch(path, options);
    return { response, text: await response.text() };
  } catch {
    throw new Error("The server can't be reached. Is it still running?");
  }
}

function checked({ ok, status, statusText }, text) {
  let data = null;
  try {
    data = JSON.parse(text);
  } catch {
    // Reported below: a proxy may answer with its own page.
  }
  // If the picture is bad, the answer is a 422 with its error.
  if (data !== null && (ok || data.predictions)) return data;
  const { code, message = `The server answered ${status} ${statusText}`.trim() + "." } = data?.error ?? {};
  throw Object.assign(new Error(message), { status, code });
}

function form(pictures, fields = {}) {
  const body = new FormData();
  for (const [name, values] of Object.entries(fields)) for (const value of [values].flat()) body.append(name, value);
  for (const picture of pictures) body.append("images", picture, picture.name || "picture");
  return body;
}

const classPath = (id) => `${V1}classes/${encodeURIComponent(id)}`;
const examplePath = (id) => `${V1}examples/${encodeURIComponent(id)}`;

export const pictureAddress = (exampleId) => `${examplePath(exampleId)}/picture`;

export const predict = (picture, reject) =>
  call(`${V1}predict?top=5&nearest=6${reject ? "&unknown=reject" : ""}`, { method: "POST", body: form([picture]) });

/** All pages of a list, joined in `field` of the first. A change in between shows in the version of a later answer. */
async function allPages(path, field) {
  const all = await call(path);
  for (let { next } = all; next; ) {
    const more = await call(`${path}${path.includes("?") ? "&" : "?"}after=${encodeURIComponent(next)}`);
    all[field].push(...more[field]);
    next = more.next;
  }
  return all;
}

export const classifier = () => call(`${V1}classifier`);
export const classes = () => allPages(`${V1}classes`, "classes");
/** The examples of a class with their `class_ids`; of the id "" those of no class. */
export const examples = (classId) => allPages(`${V1}examples?class_id=${encodeURIComponent(classId)}`, "examples");
export const firstExample = async (classId) =>
  (await call(`${classPath(classId)}/examples?limit=1`)).example_ids[0];
export const unlabelled = async () => (await call(`${V1}examples?class_id=&limit=1`)).total;

export const addClass = (name, pictures) => call(`${V1}classes`, { method: "POST", body: form(pictures, { name }) });
const labels = (ids) => ({ class_id: ids.length ? ids : "" }); // An empty one is no label.
export const addExamples = (ids, pictures) =>
  call(`${V1}examples`, { method: "POST", body: form(pictures, labels(ids)) });
export const relabel = (id, classIds) => call(examplePath(id), { method: "PATCH", body: form([], labels(classIds)) });
export const renameClass = (id, name) => call(classPath(id), { method: "PATCH", body: form([], { name }) });
export const removeClass = (id) => call(classPath(id), { method: "DELETE" });
export const removeExample = (id) => call(examplePath(id), { method: "DELETE" });
