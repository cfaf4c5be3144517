// The table of adapters: what each is and where it lies; load, unload, pin, delete.

import { load, remove, setPinned, unload } from "./adapter_calls.js";
import { byId, bytes, element, keep, setText } from "./dom.js";
import { Notices, attempt } from "./notices.js";
import { confirmDelete, showDetails } from "./dialogs.js";

const SHOWN = 100; // rows; the filter finds the others
const KINDS = { lora: "LoRA", alora: "aLoRA" };

export class AdapterTable {
  /** `changed` is called after an adapter has been changed from here. */
  constructor(changed) {
    this.adapters = [];
    this.notices = new Notices(byId("adapters"));
    this.#changed = changed;
    byId("filter").addEventListener("input", () => this.#draw());
  }

  #changed;
  #rows = new Map();
  #nodes = new Map();

  find(name) {
    return this.adapters.find((adapter) => adapter.name === name);
  }

  update(adapters) {
    this.adapters = adapters;
    this.#draw();
  }

  #draw() {
    const wanted = byId("filter").value.trim().toLowerCase();
    const found = this.adapters.filter(({ name, digest }) =>
      name.toLowerCase().includes(wanted) || (digest ?? "").startsWith(wanted));
    const shown = found.slice(0, SHOWN);
    keep(byId("adapter-rows"), this.#nodes, shown, ({ name }) => name, ({ name }) => {
      const row = new Row((doing, button, work) => this.#do(doing, button, work), () => this.find(name));
      this.#rows.set(name, row);
      return row.node;
    });
    for (const name of this.#rows.keys()) if (!this.#nodes.has(name)) this.#rows.delete(name);
    for (const adapter of shown) this.#rows.get(adapter.name).update(adapter);
    const all = this.adapters.length;
    setText(byId("adapter-count"), `${shown.length} of ${all.toLocaleString("en")}`);
    byId("no-adapters").hidden = all > 0;
  }

  async #do(doing, button, work) {
    await attempt(button, this.notices, doing, work);
    this.#changed();
  }
}

class Row {
  constructor(act, current) {
    const cell = (label, type = "") => element("td", { "data-label": label, class: type });
    this.name = element("button", { type: "button", class: "link", click: () => showDetails(current(), act) });
    this.digest = element("code");
    this.tier = element("span", { class: "tier" });
    this.state = element("span", { class: "state" });
    this.progress = element("progress", { hidden: true });
    this.reason = element("p", { class: "reason" });
    this.load = this.#button(() => act(...loadOrUnload(current(), this.load)));
    this.pin = this.#button(() => act(...pinOrUnpin(current(), this.pin)));
    this.delete = this.#button(async () => {
      const adapter = current();
      const choice = await confirmDelete(adapter);
      if (choice) act(`Deleting ${adapter.name}`, this.delete, () => remove(adapter, choice.force));
    });
    setText(this.delete, "Delete");
    this.kind = cell("Kind");
    this.rank = cell("Rank", "number");
    this.pinned = cell("Pin");
    this.running = cell("Running", "number");
    this.size = cell("Size", "number");
    const cells = [cell("Digest"), cell("Tier"), cell("State"), cell("Actions", "actions")];
    const [digest, tier, state, actions] = cells;
    digest.append(this.digest);
    tier.append(this.tier);
    state.append(this.state, this.progress, this.reason);
    actions.append(this.load, this.pin, this.delete);
    const head = element("th", { scope: "row", "data-label": "Name" }, this.name);
    this.node = element(
      "tr", {}, head, digest, this.kind, this.rank, tier, state, this.pinned, this.running, this.size, actions,
    );
  }

  update(adapter) {
    const { name, digest, tier, state, progress } = adapter;
    setText(this.name, name);
    setText(this.digest, digest?.slice(0, 12) ?? "–");
    this.digest.title = digest ?? "";
    setText(this.kind, KINDS[adapter.kind] ?? "–");
    setText(this.rank, `${adapter.rank ?? "–"}`);
    setText(this.tier, tier);
    this.tier.dataset.tier = tier;
    setText(this.state, progress === null ? state : stageOf(progress));
    this.state.dataset.state = state;
    this.#showProgress(progress);
    setText(this.reason, adapter.reason ?? "");
    setText(this.pinned, adapter.pin_tier ?? "–");
    setText(this.running, `${adapter.requests_in_flight}`);
    setText(this.size, bytes(adapter.bytes));
    this.#label(this.load, tier === "device" ? "Unload" : "Load", name, digest === null);
    this.#label(this.pin, adapter.pinned ? "Unpin" : "Pin", name, digest === null);
    this.#label(this.delete, "Delete", name, false);
  }

  #showProgress(progress) {
    this.progress.hidden = progress === null;
    if (progress === null) return;
    this.progress.setAttribute("aria-label", stageOf(progress));
    if (progress.total_bytes && progress.bytes) {
      this.progress.max = progress.total_bytes;
      this.progress.value = progress.bytes;
    } else this.progress.removeAttribute("value"); // no share is known
  }

  #button(click) {
    return element("button", { type: "button", click });
  }

  #label(button, text, name, hidden) {
    setText(button, text);
    button.setAttribute("aria-label", `${text} ${name}`);
    button.hidden = hidden;
  }
}

function stageOf({ stage, bytes: done, total_bytes: total }) {
  const verb = stage === "download" ? "downloading" : "loading";
  if (!total) return done ? `${verb}, ${bytes(done)}` : verb;
  return done ? `${verb}, ${bytes(done)} of ${bytes(total)}` : `${verb} ${bytes(total)}`;
}

function loadOrUnload({ name, tier }, button) {
  if (tier === "device") return [`Unloading ${name}`, button, () => unload(name, "host")];
  return [`Loading ${name}`, button, () => load(name, "device")];
}

function pinOrUnpin({ name, pinned }, button) {
  const doing = pinned ? `Unpinning ${name}` : `Pinning ${name}`;
  return [doing, button, () => setPinned(name, !pinned)];
}
