// Two dialogs: everything about an adapter, and the question before one is deleted.

import { load, unload } from "./adapter_calls.js";
import { byId, bytes, element } from "./dom.js";

/** `act` does something to an adapter for a button: its words, the button, the work. */
export function showDetails(adapter, act) {
  const dialog = byId("details");
  const facts = factsOf(adapter).flatMap(([term, text]) => [element("dt", {}, term), element("dd", {}, text)]);
  const button = (text, doing, work) => {
    const click = () => {
      act(`${doing} ${adapter.name}`, click.button, work);
      dialog.close();
    };
    click.button = element("button", { type: "button", click }, text);
    return click.button;
  };
  const { name } = adapter;
  const actions = adapter.digest === null ? [] : [
    button("Load into host memory", "Loading", () => load(name, "host")),
    button("Pin in host memory", "Pinning", () => load(name, "host", true)),
    button("Unload from the device", "Unloading", () => unload(name, "device")),
    button("Unload from device and host", "Unloading", () => unload(name, "host")),
  ];
  dialog.replaceChildren(
    element(
      "div", { class: "title" },
      element("h2", { id: "details-title" }, name),
      element("button", { type: "button", class: "close", "aria-label": "Close", autofocus: true, click: () => dialog.close() }, "×"),
    ),
    element("dl", {}, ...facts),
    element("p", { class: "buttons" }, ...actions),
  );
  dialog.showModal();
}

function factsOf(adapter) {
  const time = (seconds) => (seconds === null ? "never" : new Date(seconds * 1000).toLocaleString());
  const facts = [
    ["Digest", adapter.digest ?? "not known yet"],
    ["Generation", adapter.generation],
    ["Source", adapter.source],
    ["Size", bytes(adapter.bytes)],
    ["Rank", adapter.rank],
    ["Modules", adapter.targets.join(", ")],
    ["Created", time(adapter.created_at)],
    ["Last used", time(adapter.last_used_at)],
    ["K/V blocks", adapter.kv_blocks],
    ["Kept", adapter.ephemeral ? "in memory only" : "durably"],
    ["Chat template", adapter.chat_template ? "its own" : "the base's"],
    ["Invocation tokens", adapter.invocation_tokens?.join(" ")],
    ["Without its invocation", adapter.alora_on_missing],
    ["Reason", adapter.reason],
    ...adapter.warnings.map((warning) => ["Warning", warning]),
  ];
  return facts.filter(([, text]) => text !== null && text !== undefined && text !== "").map(([term, text]) => [term, `${text}`]);
}

/** Ask before a deletion. Resolves to `{force}`, or to null if the answer is no. */
export function confirmDelete({ name, digest, requests_in_flight: running }) {
  const dialog = byId("confirm");
  const force = element("input", { type: "checkbox" });
  const end = (value) => () => dialog.close(value);
  const what = digest === null ? "Its import ends." : `Its digest is ${digest.slice(0, 12)}.`;
  const requests = running === 1 ? "the request that runs" : `the ${running} requests that run`;
  dialog.returnValue = "";
  dialog.replaceChildren(
    element("h2", { id: "confirm-title" }, `Delete ${name}?`),
    element("p", {}, `${what} New requests for it get status 404 at once.`),
    ...(running ? [element("p", {}, element("label", {}, force, ` also end ${requests} on it`))] : []),
    element(
      "p", { class: "buttons" },
      element("button", { type: "button", autofocus: true, click: end("") }, "Keep it"),
      element("button", { type: "button", class: "danger", click: end("delete") }, "Delete"),
    ),
  );
  dialog.showModal();
  return new Promise((resolve) => {
    const closed = () => resolve(dialog.returnValue === "delete" ? { force: force.checked } : null);
    dialog.addEventListener("close", closed, { once: true });
  });
}
