// The HTTP API. URLs are relative, so the page also works under a path of a reverse proxy.

import { pause } from "./dom.js";

const LONGEST_WAIT_S = 60;
const TRIES = 10; // Of a request that the server is too busy for.
const TOKEN = "iosr_fast.token";
// Instead of messages for programs.
const WORDS = {
  unauthorized: "Wrong token.",
  changes_disabled: "This server takes no changes. Its operator enables them with IOSR_FAST_TOKEN or --token-file.",
  name_taken: "Another class has this name.",
};

/** An error of the server or the network; `status` is 0 and `code` null without an answer. */
export class ServerError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    Object.assign(this, { status, code });
  }
}

export const token = {
  get: () => sessionStorage.getItem(TOKEN) ?? "",
  set: (value) => sessionStorage.setItem(TOKEN, value),
};

/**
 * Send a request and read its JSON: {data, roundTripMs}. After a 503 with Retry-After, call `onWait(seconds)`, wait
 * that long and send it again. Other failures throw a ServerError with the message of the server.
 */
async function call(path, { method = "GET", body, headers = new Headers(), onWait = () => {} } = {}) {
  for (let tries = 1; ; tries += 1) {
    const start = performance.now();
    const { response, text } = await fetchText(path, { method, body, headers });
    const roundTripMs = performance.now() - start;
    const wait = response.status === 503 && tries < TRIES ? retryAfter(response) : null;
    if (wait === null) return { data: checked(response, text), roundTripMs };
    onWait(wait);
    await pause(wait * 1000);
  }
}

async function fetchText(path, options) {
  try {
    const response = await fetch(path, { ...options, cache: "no-store", credentials: "same-origin" });
    return { response, text: await response.text() };
  } catch {
    throw new ServerError("The server can't be reached. Is it still running?");
  }
}

function retryAfter(response) {
  const seconds = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  return seconds >= 0 && seconds <= LONGEST_WAIT_S ? seconds : null;
}

function checked(response, text) {
  let data = null;
  try {
    data = JSON.parse(text);
  } catch {
    // Reported below: a proxy may answer with its own page.
  }
  // If all pictures are bad, the answer is a 422 with an error for each.
  if (data !== null && (response.ok || data.predictions)) return data;
  const words = data?.error?.message ?? `The server answered ${response.status} ${response.statusText}`.trim() + ".";
  const code = data?.error?.code ?? null;
  throw new ServerError(WORDS[code] ?? words, response.status, code);
}

function form(pictures, fields = {}) {
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) body.append(name, value);
  for (const picture of pictures) body.append("images", picture, picture.name || "picture");
  return body;
}

const classPath = (id) => `v1/classes/${encodeURIComponent(id)}`;
const examplePath = (id) => `v1/examples/${encodeURIComponent(id)}`;

export const pictureAddress = (exampleId) => `${examplePath(exampleId)}/picture`;

/** Answers to pictures, in their order. */
export function predict(pictures, { top, nearest, reject, onWait }) {
  const path = `v1/predict?top=${top}&nearest=${nearest}${reject ? "&unknown=reject" : ""}`;
  return call(path, { method: "POST", body: form(pictures), onWait });
}

/** All pages of a list, joined in `field` of the first. A change in between shows in the version of a later answer. */
async function allPages(path, field) {
  const first = await call(path);
  for (let { next } = first.data; next; ) {
    const { data } = await call(`${path}?after=${encodeURIComponent(next)}`);
    first.data[field].push(...data[field]);
    next = data.next;
  }
  return first;
}

export const classifier = async () => (await call("v1/classifier")).data;
export const classes = () => allPages("v1/classes", "classes");
export const examples = (classId) => allPages(`${classPath(classId)}/examples`, "example_ids");
export const firstExample = async (classId) =>
  (await call(`${classPath(classId)}/examples?limit=1`)).data.example_ids[0];

// Changes: each a function of `onWait` that sends it, with the token.
const change = (method, path, body) => async (onWait) => {
  const headers = new Headers(typeof body === "string" ? { "Content-Type": "application/json" } : {});
  try {
    if (token.get()) headers.set("Authorization", `Bearer ${token.get()}`);
  } catch {
    throw new ServerError("The token contains invalid characters. Copy it again.", 401);
  }
  return call(path, { method, body, headers, onWait });
};
export const addClass = (name, pictures) => change("POST", "v1/classes", form(pictures, { name }));
export const addExamples = (id, pictures) => change("POST", `${classPath(id)}/examples`, form(pictures));
export const renameClass = (id, name) => change("PATCH", classPath(id), JSON.stringify({ name }));
export const removeClass = (id) => change("DELETE", classPath(id));
export const removeExample = (id) => change("DELETE", examplePath(id));
