// One prompt, answered by the base and adapters side by side; a token shows what else could have stood in its place.

import { address, call, events } from "./api.js";
import { byId, element, keep, percent, seconds, setText, short } from "./dom.js";
import { Notices } from "./notices.js";

const COLUMNS = 4; // browsers keep six connections to a server, and the rest of the page needs some
const ALTERNATIVES = 5;

export class Playground {
  constructor() {
    this.notices = new Notices(byId("ask-form"));
    byId("add-column").addEventListener("click", () => this.#add(byId("add-model").value));
    byId("stop").addEventListener("click", () => this.#columns.forEach((column) => column.stop()));
    byId("ask-form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (!this.#running) this.#ask();
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask-form").requestSubmit();
    });
  }

  #columns = [];
  #options = new Map();
  #running = false; // whether answers come

  /** Say which models there are; the first is the base. */
  update(models) {
    const option = (name) => element("option", { value: name }, name);
    keep(byId("add-model"), this.#options, models, (name) => name, option);
    if (this.#columns.length === 0 && models.length > 0) this.#add(models[0]);
  }

  #add(model) {
    this.notices.clear();
    if (this.#columns.some((column) => column.model === model)) return;
    if (this.#columns.length === COLUMNS) {
      this.notices.error(new Error(`${COLUMNS} stand side by side at most: remove one first`), `Adding ${model}`);
      return;
    }
    const column = new Column(model, () => this.#remove(column));
    this.#columns.push(column);
    byId("answers").append(column.node);
  }

  #remove(column) {
    column.stop();
    this.#columns = this.#columns.filter((other) => other !== column);
    column.node.remove();
    byId("add-model").focus();
  }

  async #ask() {
    const shared = {
      messages: [{ role: "user", content: byId("prompt").value }],
      temperature: byId("temperature").valueAsNumber,
      max_tokens: byId("max-tokens").valueAsNumber,
      stream: true,
      stream_options: { include_usage: true },
    };
    if (byId("logprobs").checked) Object.assign(shared, { logprobs: true, top_logprobs: ALTERNATIVES });
    this.#running = true;
    byId("stop").disabled = false;
    await Promise.all(this.#columns.map((column) => column.ask(shared)));
    byId("stop").disabled = true;
    this.#running = false;
  }
}

class Column {
  constructor(model, remove) {
    this.model = model;
    this.#facts = element("p", { class: "facts", role: "status" });
    this.#alternatives = element("div", { class: "alternatives" });
    this.#text = new TokenText(model, (tokens) => this.#show(tokens));
    const close = { type: "button", class: "close", "aria-label": `Remove ${model}`, click: remove };
    this.node = element(
      "article", { class: "answer" },
      element("div", { class: "title" }, element("h3", {}, model), element("button", close, "×")),
      this.#text.node, this.#facts, element("div", { class: "notices" }), this.#alternatives,
    );
    this.#notices = new Notices(this.node);
  }

  #facts;
  #alternatives;
  #text;
  #notices;
  #call = null; // the AbortController of an answer that comes

  stop() {
    this.#call?.abort();
  }

  async ask(shared) {
    this.#call = new AbortController();
    const { signal } = this.#call;
    this.#notices.clear();
    this.#alternatives.replaceChildren();
    this.#text.clear();
    setText(this.#facts, "waiting …");
    const seen = { begun: performance.now(), first: null, usage: null, finish: null, headers: new Headers() };
    try {
      const answer = await call("POST", address("v1", "chat", "completions"), { body: { model: this.model, ...shared }, signal });
      seen.headers = answer.headers;
      for await (const event of events(answer)) this.#take(event, seen);
    } catch (error) {
      if (error.name === "AbortError") seen.finish = "stopped here";
      else this.#notices.error(error, `Asking ${this.model}`);
    }
    this.#text.end();
    setText(this.#facts, factsOf(seen));
  }

  #take({ choices, usage }, seen) {
    if (usage) seen.usage = usage;
    const [choice] = choices;
    if (choice === undefined) return;
    const { delta, logprobs, finish_reason: finish } = choice;
    const text = (delta.reasoning_content ?? "") + (delta.content ?? "");
    if (text || logprobs?.content.length) seen.first ??= performance.now() - seen.begun;
    if (finish) {
      seen.finish = finish;
      seen.ended = performance.now() - seen.begun;
    }
    if (logprobs) this.#text.addTokens(logprobs.content);
    else this.#text.addText(text);
  }

  #show(tokens) {
    this.#alternatives.replaceChildren(...tokens.map(alternativesOf));
  }
}

function factsOf({ first, ended, usage, finish, headers }) {
  const facts = [];
  if (usage) {
    const { prompt_tokens: prompt, completion_tokens: count, prompt_tokens_details: details } = usage;
    facts.push(`${count} tokens`);
    if (first !== null) facts.push(`first after ${seconds(first / 1000)}`);
    if (count > 1 && ended > first) facts.push(`${short((count - 1) / ((ended - first) / 1000))} tok/s`);
    facts.push(`prompt ${prompt}, ${details.cached_tokens} of it cached`);
  } else if (first !== null) facts.push(`first after ${seconds(first / 1000)}`);
  const invocation = headers.get("x-alora-invocation");
  if (invocation) facts.push(`invocation ${invocation}`);
  if (finish) facts.push(`ended by: ${finish}`);
  const digest = headers.get("x-adapter-digest");
  if (digest) facts.push(`digest ${digest.slice(0, 12)}`);
  return facts.join(" · ");
}

/** An answer's text; if its tokens are known, each can be chosen, by pointer or by the arrow keys. */
class TokenText {
  /** `choose` is called with the tokens of the piece that is chosen. */
  constructor(model, choose) {
    this.#choose = choose;
    this.node = element("div", { class: "tokens", role: "group", "aria-label": `Answer of ${model}` });
    this.node.addEventListener("click", ({ target }) => this.#select(target));
    this.node.addEventListener("keydown", (event) => this.#onKey(event));
  }

  #choose;
  #tokens = new Map(); // by piece of text
  #waiting = []; // tokens that are parts of a character which is not complete yet
  #decoder = new TextDecoder();

  clear() {
    this.node.replaceChildren();
    this.#tokens.clear();
    this.#waiting = [];
    this.#decoder = new TextDecoder();
  }

  addText(text) {
    if (text) this.node.append(text);
  }

  addTokens(tokens) {
    for (const token of tokens) {
      this.#waiting.push(token);
      const text = this.#decoder.decode(new Uint8Array(token.bytes), { stream: true });
      if (text !== "") this.#addPiece(text);
    }
  }

  /** Show what is left of a character that was never completed. */
  end() {
    if (this.#waiting.length) this.#addPiece(this.#decoder.decode() || "\ufffd");
  }

  #addPiece(text) {
    const likely = Math.min(...this.#waiting.map(({ logprob }) => Math.exp(logprob)));
    const unsure = likely < 0.2 ? "3" : likely < 0.5 ? "2" : likely < 0.9 ? "1" : "0";
    // Not a button element, whose text would not flow over lines
    const tabindex = this.node.firstElementChild === null ? "0" : "-1";
    const piece = element("span", { role: "button", tabindex, "aria-pressed": "false", "data-unsure": unsure }, text);
    this.#tokens.set(piece, this.#waiting);
    this.#waiting = [];
    this.node.append(piece);
  }

  #onKey(event) {
    const { key, target } = event;
    if (!this.#tokens.has(target)) return;
    const next = { ArrowRight: target.nextElementSibling, ArrowLeft: target.previousElementSibling }[key];
    if (key === "Enter" || key === " ") this.#select(target);
    else if (next) this.#focus(next);
    else return;
    event.preventDefault();
  }

  #select(piece) {
    if (!this.#tokens.has(piece)) return;
    this.node.querySelector("[aria-pressed=true]")?.setAttribute("aria-pressed", "false");
    piece.setAttribute("aria-pressed", "true");
    this.#focus(piece);
    this.#choose(this.#tokens.get(piece));
  }

  #focus(piece) {
    this.node.querySelector("[tabindex='0']")?.setAttribute("tabindex", "-1");
    piece.setAttribute("tabindex", "0");
    piece.focus();
  }
}

function alternativesOf({ token, logprob, top_logprobs: top }) {
  const rows = [...top].sort((a, b) => b.logprob - a.logprob).map((other) => {
    const chosen = other.token === token && other.logprob === logprob;
    return element(
      "tr", { class: chosen ? "chosen" : "" },
      element("th", { scope: "row" }, element("code", {}, JSON.stringify(other.token)), chosen ? " chosen" : ""),
      element("td", {}, element("meter", { min: 0, max: 1, value: Math.exp(other.logprob), "aria-hidden": "true" })),
      element("td", { class: "number" }, percent(Math.exp(other.logprob))),
      element("td", { class: "number" }, other.logprob.toFixed(3)),
    );
  });
  const heads = [["Token", ""], ["", ""], ["Probability", "number"], ["Logarithm", "number"]];
  return element(
    "table", {},
    element("caption", {}, "In place of ", element("code", {}, JSON.stringify(token))),
    element("thead", {}, element("tr", {}, ...heads.map(([text, style]) => element("th", { scope: "col", class: style }, text)))),
    element("tbody", {}, ...rows),
  );
}
