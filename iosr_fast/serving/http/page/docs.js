// The description of the HTTP API, made of openapi.json. It loads nothing from elsewhere.

import { find, make } from "./dom.js";

const METHODS = ["get", "post", "patch", "delete"];

/** Text with `code` in backticks, without the examples in Python of a docstring. */
const prose = (text) => text.split(">>>")[0].split("`").map((part, i) => (i % 2 ? make("code", {}, part) : part));

const anchor = (name) => `schema-${name}`;
const reference = (schema) => schema.$ref?.split("/").pop();

/** A schema in a few words, with links to the named ones. */
function words(schema) {
  if (!schema) return ["anything"];
  const name = reference(schema);
  if (name) return [make("a", { href: `#${anchor(name)}` }, name)];
  const choices = schema.anyOf ?? schema.oneOf;
  if (choices) return choices.flatMap((choice, i) => (i ? [" or ", ...words(choice)] : words(choice)));
  if (schema.enum) return [schema.enum.map((value) => JSON.stringify(value)).join(", ")];
  if ("const" in schema) return [JSON.stringify(schema.const)];
  if (schema.type === "array") return ["list of ", ...(schema.prefixItems ?? [schema.items]).flatMap(listed)];
  const format = schema.format === "binary" ? "file" : schema.type;
  const bounds = [
    ["from", schema.minimum],
    ["to", schema.maximum],
    ["above", schema.exclusiveMinimum],
    ["below", schema.exclusiveMaximum],
    ["at most", schema.maxLength, "characters"],
  ];
  const limits = bounds.filter(([, value]) => value !== undefined).map((bound) => ` ${bound.join(" ")}`);
  return [format ?? "anything", ...limits];
}

const listed = (schema, i) => (i ? [", ", ...words(schema)] : words(schema));

const table = (rows) =>
  make("table", {}, ...rows.map(([head, ...cells]) =>
    make("tr", {}, make("th", { scope: "row" }, make("code", {}, head)), ...cells.map((cell) => make("td", {}, ...cell)))));

const titled = (title, rows) => (rows.length ? [make("h4", {}, title), table(rows)] : []);

function parameters(list = []) {
  return list.map(({ name, schema, description, in: where }) => {
    const given = schema.default === undefined ? [] : [`, default ${schema.default}`];
    return [name, [...words(schema), ...given], prose(description ?? schema.description ?? `in the ${where}`)];
  });
}

const bodies = (content = {}) =>
  Object.entries(content).flatMap(([type, { schema }]) => {
    if (!schema.properties) return [[type, words(schema)]];
    return Object.entries(schema.properties).map(([name, field]) => [`${type}: ${name}`, words(field)]);
  });

const answers = (responses) =>
  Object.entries(responses).map(([status, { description, content = {} }]) => [
    status,
    Object.entries(content).flatMap(([type, { schema }]) => (reference(schema) || schema.anyOf ? words(schema) : [type])),
    prose(description),
  ]);

/** A call of the operation with curl. */
function curl(path, method, { security, requestBody }) {
  const parts = ["curl"];
  if (method !== "get") parts.push(`-X ${method.toUpperCase()}`);
  if (security) parts.push('-H "Authorization: Bearer $IOSR_FAST_TOKEN"');
  const content = requestBody?.content ?? {};
  if (content["image/jpeg"]) parts.push("-H 'Content-Type: image/jpeg' --data-binary @picture.jpg");
  else if (content["multipart/form-data"]) {
    const fields = Object.keys(content["multipart/form-data"].schema.properties);
    parts.push(...fields.map((name) => (name === "images" ? "-F images=@picture.jpg" : `-F ${name}=pear`)));
  } else if (content["application/json"]) parts.push(`-H 'Content-Type: application/json' -d '{"name": "pear"}'`);
  return `${parts.join(" ")} ${new URL(path.slice(1), document.baseURI).href}`;
}

function operation(path, method, about) {
  return make(
    "article",
    { "aria-label": `${method.toUpperCase()} ${path}` },
    make("h3", {}, make("code", {}, `${method.toUpperCase()} ${path}`)),
    make("p", {}, about.summary, about.security ? make("span", { class: "quiet" }, " (with the token)") : null),
    about.description && about.description !== about.summary ? make("p", {}, ...prose(about.description)) : null,
    make("pre", {}, curl(path, method, about)),
    ...titled("Parameters", parameters(about.parameters)),
    ...titled("Body", bodies(about.requestBody?.content)),
    make("details", {}, make("summary", {}, "Answers"), table(answers(about.responses))),
  );
}

function schema(name, about) {
  const required = new Set(about.required ?? []);
  const rows = Object.entries(about.properties ?? {}).map(([field, of]) => [
    field,
    [...words(of), ...(required.has(field) ? [] : [" (optional)"])],
  ]);
  return make(
    "article",
    { id: anchor(name) },
    make("h3", {}, name),
    about.description ? make("p", {}, ...prose(about.description)) : null,
    table(rows),
  );
}

async function draw() {
  const { paths, components, info } = await (await fetch("openapi.json", { cache: "no-store" })).json();
  const groups = new Map();
  for (const [path, operations] of Object.entries(paths)) {
    for (const method of METHODS.filter((name) => operations[name])) {
      const about = operations[method];
      const [tag] = about.tags ?? ["other"];
      groups.set(tag, [...(groups.get(tag) ?? []), operation(path, method, about)]);
    }
  }
  const section = (title, articles) => make("section", { "aria-label": title }, make("h2", {}, title), ...articles);
  find("main").replaceChildren(
    make("p", { class: "quiet" }, `${info.summary}. Version ${info.version}.`),
    ...[...groups].map(([tag, articles]) => section(tag, articles)),
    section("schemas", Object.entries(components.schemas).map(([name, about]) => schema(name, about))),
  );
  find("main").setAttribute("aria-busy", "false");
}

draw().catch((error) => find("main").append(make("p", { class: "error" }, `openapi.json can't be read: ${error.message}`)));
