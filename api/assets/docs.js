// Renders the OpenAPI document of this very server: every operation, what it takes and gives, what can go wrong.
const METHODS = ["get", "post", "put", "patch", "delete"];

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** What stands between backticks is code. */
function words(text) {
  return (text ?? "").split("`").map((part, index) => index % 2 ? element("code", {}, part) : part);
}

/** A schema as a reader needs it: references followed once each, so that cycles end. */
function resolved(schema, schemas, seen = new Set()) {
  if (Array.isArray(schema)) return schema.map((one) => resolved(one, schemas, seen));
  if (schema === null || typeof schema !== "object") return schema;
  if (schema.$ref) {
    const name = schema.$ref.split("/").pop();
    return seen.has(name) ? name : resolved(schemas[name], schemas, new Set(seen).add(name));
  }
  return Object.fromEntries(Object.entries(schema).map(([key, value]) => [key, resolved(value, schemas, seen)]));
}

function shownType(schema, schemas) {
  const plain = resolved(schema, schemas);
  if (plain.enum) return plain.enum.length > 12 ? `one of ${plain.enum.length}` : plain.enum.join(" | ");
  return plain.format ?? plain.type ?? (plain.anyOf ?? []).map((one) => one.format ?? one.type).join(" | ");
}

function content(title, holder, schemas) {
  const [type, media] = Object.entries(holder?.content ?? {})[0] ?? [];
  if (!media) return null;
  const schema = element("pre", {}, JSON.stringify(resolved(media.schema, schemas), null, 2));
  const heading = element("h4", {}, `${title} (${type}${media.example ? ", example" : ""})`);
  if (!media.example) return element("div", {}, heading, schema);
  return element("div", {}, heading, element("pre", {}, JSON.stringify(media.example, null, 2)),
    element("details", { class: "schema" }, element("summary", {}, "Schema"), schema));
}

function table(heads, rows) {
  const head = element("tr", {}, ...heads.map((one) => element("th", {}, one)));
  return element("div", { class: "scroll" }, element("table", {}, head,
    ...rows.map((row) => element("tr", {}, ...row.map((cell) => element("td", {}, ...[cell].flat()))))));
}

function details(operation, schemas, server) {
  const body = element("div", {});
  if (operation.description) body.append(element("p", {}, ...words(operation.description)));
  if (server) body.append(element("p", {}, "At ", element("code", {}, server)));
  const parameters = (operation.parameters ?? []).map((one) => [
    element("code", {}, one.name), one.in + (one.required ? ", required" : ""),
    shownType(one.schema, schemas), words(one.schema.description)]);
  if (parameters.length) body.append(element("h4", {}, "Parameters"), table(["name", "in", "type", "meaning"], parameters));
  const request = content("Request", operation.requestBody, schemas);
  if (request) body.append(request);
  const [status, answer] = Object.entries(operation.responses)[0];
  body.append(content(`Answer ${status}`, answer, schemas) ?? element("h4", {}, `Answer ${status}`));
  const errors = Object.entries(operation.responses).filter(([code]) => code >= "400")
    .flatMap(([code, one]) => one.description.split("\n").map((line) => [code, ...line.split(/`: (.*)/)]))
    .map(([code, name, meaning]) => [code, element("code", {}, name.replaceAll("`", "")), words(meaning)]);
  body.append(element("h4", {}, "Errors"), table(["status", "code", "meaning"], errors));
  return body;
}

function section(path, method, operation, schemas, server) {
  const opened = element("details", { class: "operation", id: operation.operationId },
    element("summary", {}, element("span", { class: `method ${method}` }, method.toUpperCase()),
      element("span", { class: "path" }, path), element("span", { class: "summary" }, operation.summary)));
  opened.dataset.words = `${method} ${path} ${operation.summary}`.toLowerCase();
  opened.addEventListener("toggle", () => {
    if (opened.open && opened.children.length === 1) opened.append(details(operation, schemas, server));
  });
  return opened;
}

/** Shows the operations whose words hold the text, and the headings of faces that have any. */
function find(text) {
  for (const face of document.querySelectorAll("section")) {
    const operations = [...face.querySelectorAll(".operation")];
    for (const one of operations) one.hidden = !one.dataset.words.includes(text);
    face.hidden = operations.every((one) => one.hidden);
  }
}

const main = document.getElementById("operations");
try {
  const answer = await fetch("/api/v3/api-docs");
  if (!answer.ok) throw new Error(`the document answers ${answer.status}`);
  const whole = await answer.json();
  document.getElementById("version").textContent = whole.info.version;
  main.replaceChildren(...whole.tags.map(({ name }) => element("section", {}, element("h2", {}, name),
    ...Object.entries(whole.paths).flatMap(([path, methods]) => METHODS.filter((method) => methods[method]?.tags[0] === name)
      .map((method) => section(path, method, methods[method], whole.components.schemas, methods.servers?.[0].url))))));
  document.getElementById("search").addEventListener("input", (event) => find(event.target.value.trim().toLowerCase()));
} catch (error) {
  main.replaceChildren(element("p", {}, `The document could not be loaded: ${error.message}`));
}
