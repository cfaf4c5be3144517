// Errors and other news of a section, in a live region of its own.

import { element } from "./dom.js";
import { Refusal } from "./api.js";

const SHOWN = 4; // of a section at a time

/** The live region of a section or form. */
export class Notices {
  constructor(parent) {
    this.node = parent.matches(".notices") ? parent : parent.querySelector(":scope > .notices");
    this.node.setAttribute("role", "alert");
  }

  clear() {
    this.node.replaceChildren();
  }

  say(text) {
    this.#add(element("p", { class: "news" }, text));
  }

  /** Say what went wrong; `doing` is what was tried. */
  error(error, doing) {
    this.#add(noticeOf(error, doing));
  }

  /** Keep one notice of what goes wrong again and again, and take it back when it goes well: `error` is null then. */
  standing(error, doing) {
    const notice = error === null ? null : noticeOf(error, doing);
    if (notice?.textContent === this.#standing?.dataset.words) return;
    this.#standing?.remove();
    this.#standing = notice;
    if (notice === null) return;
    notice.dataset.words = notice.textContent;
    this.#add(notice);
  }

  #standing = null;

  #add(notice) {
    const close = () => notice.remove();
    notice.append(element("button", { type: "button", class: "close", "aria-label": "Close", click: close }, "×"));
    this.node.append(notice);
    while (this.node.children.length > SHOWN) this.node.firstElementChild.remove();
  }
}

function noticeOf(error, doing) {
  const facts = error instanceof Refusal ? factsOf(error) : [];
  return element(
    "div", { class: "error" },
    element("p", {}, element("strong", {}, `${doing}: `), error.message),
    facts.length ? element("p", { class: "quiet" }, facts.join(" · ")) : null,
  );
}

function factsOf(refusal) {
  const facts = [];
  if (refusal.param) facts.push(`field ${refusal.param}`);
  if (refusal.code) facts.push(refusal.code);
  if (refusal.status >= 400) facts.push(`status ${refusal.status}`);
  if (refusal.retrySeconds) facts.push(`try again in ${refusal.retrySeconds} s`);
  return facts;
}

/** Do something for a button, once at a time; what goes wrong is said. Returns whether it went well. */
export async function attempt(button, notices, doing, work) {
  if (button.hasAttribute("aria-busy")) return false;
  button.setAttribute("aria-busy", "true"); // not disabled: that would take the focus away
  try {
    await work();
    return true;
  } catch (error) {
    notices.error(error, doing);
    return false;
  } finally {
    button.removeAttribute("aria-busy");
  }
}
