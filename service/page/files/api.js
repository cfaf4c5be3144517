// Calls to the server, and its refusals in its own words.

// Found from this file's own address, so that the page works below a path of a proxy as well.
const ROOT = new URL("../../", import.meta.url);
const KEY = "rootstock.key";
const PATIENCE = 15_000; // milliseconds for what is only read; a load or an upload takes its time

export function key() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function setKey(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

/** A refusal: `message` is the server's, `code` and `param` (the field that it is about) too, where it gave them. */
export class Refusal extends Error {
  constructor(status, message, code = null, param = null, retrySeconds = null) {
    super(message);
    Object.assign(this, { status, code, param, retrySeconds });
  }
}

export function address(...steps) {
  return new URL(steps.map((step) => step.split("/").map(encodeURIComponent).join("/")).join("/"), ROOT);
}

/** The headers of every call. */
export function headers(given = {}) {
  return key() ? { authorization: `Bearer ${key()}`, ...given } : given;
}

export async function call(method, url, { body, given, signal } = {}) {
  signal ??= method === "GET" ? AbortSignal.timeout(PATIENCE) : undefined;
  const sent = body === undefined ? given : { "content-type": "application/json", ...given };
  const text = body === undefined ? undefined : JSON.stringify(body);
  let answer;
  try {
    answer = await fetch(url, { method, headers: headers(sent), body: text, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "the server does not answer: is it running, and is this machine on its network?");
  }
  if (!answer.ok) throw refusalOf(answer.status, await answer.text(), answer.headers.get("retry-after"));
  return answer;
}

export const getJson = async (...steps) => (await call("GET", address(...steps))).json();

/** What an answer with an error status says. */
export function refusalOf(status, text, retryAfter) {
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // a proxy's own page: its words follow as they are
  }
  const message = error.message ?? (text.slice(0, 300) || `the answer has status ${status} and no text`);
  return new Refusal(status, message, error.code, error.param, retryAfter);
}

/** The events of a streamed answer, as objects. An event with an error is thrown. */
export async function* events(answer) {
  let rest = "";
  for await (const text of chunks(answer.body)) {
    const lines = (rest + text).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Refusal(200, event.error.message, event.error.code, event.error.param);
      yield event;
    }
  }
}

/** The text of a body as it comes. Not every browser can iterate over a stream. */
async function* chunks(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
