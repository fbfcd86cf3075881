// The HTTP API, from openapi.json.

const main = document.getElementById("operations");

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function typeOf(schema) {
  if (!schema) return "";
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" | ");
  return schema.contentMediaType ? "file" : schema.format === "binary" ? "file" : schema.type || "";
}

function table(rows) {
  const made = element("table");
  for (const cells of rows) {
    const row = element("tr");
    cells.forEach((cell) => row.append(element("td", cell)));
    made.append(row);
  }
  return made;
}

function resolve(api, schema) {
  return schema.$ref ? schema.$ref.split("/").slice(1).reduce((value, key) => value[key], api) : schema;
}

function fields(api, operation) {
  const rows = (operation.parameters || []).map((item) => [item.name, typeOf(item.schema), item.description || ""]);
  for (const { schema } of Object.values(operation.requestBody?.content || {})) {
    const body = resolve(api, schema);
    for (const [name, field] of Object.entries(body.properties || {})) {
      const standard = field.default === undefined ? ((body.required || []).includes(name) ? "required" : "") : `default ${JSON.stringify(field.default)}`;
      rows.push([name, typeOf(field), [field.description, standard].filter(Boolean).join(" – ")]);
    }
  }
  return rows;
}

function section(api, method, path, operation) {
  const card = element("section", "", "card");
  const title = element("h2");
  title.append(element("b", method.toUpperCase()), ` ${path}`);
  card.append(title, element("p", operation.description || operation.summary));
  const rows = fields(api, operation);
  if (rows.length) card.append(table(rows));
  const answers = Object.entries(operation.responses).map(([status, answer]) => `${status} ${Object.keys(answer.content || {}).join(", ") || answer.description}`);
  card.append(element("p", `Answers: ${answers.join("; ")}`, "dim"));
  return card;
}

function example() {
  const card = element("section", "", "card");
  const body = '{"prompt": "a slow waltz on a harp", "duration": 5}';
  card.append(element("h2", "Example"));
  card.append(element("pre", `curl ${new URL(".", location.href)}v1/generate --json '${body}' -o waltz.wav`));
  card.append(element("p", "Every error is {\"error\": \"one line\"}. Streams: the WebSocket v1/stream, described in docs/web.md.", "dim"));
  return card;
}

const api = await (await fetch("openapi.json")).json();
const operations = Object.entries(api.paths).flatMap(([path, methods]) =>
  Object.entries(methods).map(([method, operation]) => section(api, method, path, operation)));
main.replaceChildren(example(), ...operations);
