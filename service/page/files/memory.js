// Pictures of memory: adapters by tier, K/V by tier and namespace; and dropping a namespace.

import { address, call } from "./api.js";
import { byId, bytes, element, keep, percent, setText, shape, short } from "./dom.js";
import { Notices, attempt } from "./notices.js";

const COLOURS = 8; // of the style; namespaces beyond them share one
const USED = "rootstock_tier_bytes_used", TOTAL = "rootstock_tier_bytes_total", PINNED = "rootstock_tier_bytes_pinned";
const COUNTS = ["adapters", "hits_total", "misses_total", "evictions_total"];
export const NAMES = [USED, TOTAL, PINNED, ...COUNTS.map((name) => `rootstock_tier_${name}`)];

/** A bar of memory that stays, with a line of text above it. */
class Bar {
  constructor(title) {
    this.#title = title;
    this.#text = element("span");
    this.#picture = shape("svg", { class: "memory", viewBox: "0 0 1000 20", preserveAspectRatio: "none", "aria-hidden": "true" });
    this.node = element("div", {}, element("p", { class: "caption" }, element("strong", {}, title), " ", this.#text), this.#picture);
  }

  #title;
  #text;
  #picture;

  /** `parts` are `[amount, class, what it is]`, drawn from left to right; `total` is the whole bar. */
  update(text, parts, total) {
    setText(this.#text, text);
    let x = 0;
    const drawn = parts.filter(([amount]) => amount > 0).map(([amount, style, what]) => {
      const width = total > 0 ? (1000 * amount) / total : 0;
      x += width;
      const title = shape("title", {}, `${this.#title}: ${what}`);
      return shape("rect", { x: x - width, y: 0, width, height: 20, class: style }, title);
    });
    this.#picture.replaceChildren(shape("rect", { width: 1000, height: 20, class: "free" }), ...drawn);
  }
}

export class AdapterMemory {
  #bars = new Map();
  #nodes = new Map();

  /** Take in the samples of one reading of /metrics. */
  update(samples) {
    const of = (name, tier) => samples.get(name)?.find(({ labels }) => labels.tier === tier)?.value ?? 0;
    const tiers = (samples.get(TOTAL) ?? []).map(({ labels }) => labels.tier);
    keep(byId("tiers"), this.#nodes, tiers, (tier) => tier, (tier) => {
      const bar = new Bar(tier);
      this.#bars.set(tier, bar);
      return bar.node;
    });
    for (const tier of tiers) {
      const [used, total, pinned] = [USED, TOTAL, PINNED].map((name) => of(name, tier));
      const [adapters, hits, misses, evictions] = COUNTS.map((name) => short(of(`rootstock_tier_${name}`, tier)));
      const text = `${bytes(used)} of ${bytes(total)}, ${bytes(pinned)} pinned · adapters: ${adapters}, `
        + `hits ${hits}, misses ${misses}, evictions ${evictions}`;
      const parts = [[pinned, "part pinned", `${bytes(pinned)} pinned`], [used - pinned, "part", `${bytes(used - pinned)} not pinned`]];
      this.#bars.get(tier).update(text, parts, total);
    }
  }
}

export class KvMemory {
  constructor(changed) {
    this.notices = new Notices(byId("memory"));
    this.#changed = changed;
    byId("kv-bars").append(this.#device.node, this.#host.node);
  }

  #changed;
  #device = new Bar("device");
  #host = new Bar("host");
  #rows = new Map();
  #nodes = new Map();

  /** Take in an answer of /kv. */
  update({ blocks, block_size: size, host, namespaces }) {
    const named = namespaces.map((share, index) => ({ ...share, colour: Math.min(index, COLOURS - 1), label: labelOf(share) }));
    const device = named.flatMap(({ label, colour, blocks_used: used, blocks_cached: cached }) => [
      [used, `part c${colour}`, `${label}: ${used} in use`],
      [cached, `part cached c${colour}`, `${label}: ${cached} cached`],
    ]);
    this.#device.node.hidden = blocks === null; // a key that is not an admin's sees its own namespaces only
    if (blocks !== null) {
      const text = `${short(blocks.used)} in use (${blocks.held} held), ${short(blocks.cached)} cached, ${short(blocks.free)} free `
        + `of ${short(blocks.total)} blocks of ${size} tokens`;
      this.#device.update(text, device, blocks.total);
    }
    this.#host.node.hidden = host === null;
    if (host !== null) {
      // Blocks of namespaces are counted, memory is in bytes: one block's bytes follow from both
      const each = host.blocks ? host.bytes_used / host.blocks : 0;
      const parts = named.map(({ label, colour, blocks_host: count }) => [count * each, `part cached c${colour}`, `${label}: ${count}`]);
      const counts = `${bytes(host.bytes_used)} of ${bytes(host.bytes_total)} in ${short(host.blocks)} blocks · stored `
        + `${short(host.stores)}, loaded back ${short(host.hits)}, evicted ${short(host.evictions)}`;
      this.#host.update(counts, parts, host.bytes_total);
    }
    this.#table(named);
  }

  #table(named) {
    keep(byId("kv-rows"), this.#nodes, named, ({ namespace }) => namespace, ({ namespace }) => {
      const row = new NamespaceRow((button, label) => this.#drop(button, namespace, label));
      this.#rows.set(namespace, row);
      return row.node;
    });
    for (const share of named) this.#rows.get(share.namespace).update(share);
    byId("kv-table").hidden = named.length === 0;
    byId("no-kv").hidden = named.length > 0;
  }

  async #drop(button, namespace, label) {
    const work = () => call("DELETE", address("kv", "namespaces", namespace));
    await attempt(button, this.notices, `Dropping the K/V of ${label}`, work);
    this.#changed();
  }
}

class NamespaceRow {
  constructor(drop) {
    this.swatch = shape("rect", { width: 10, height: 10 });
    this.name = element("span");
    this.cells = ["In use", "Cached", "Host", "Hits"].map((label) => element("td", { class: "number", "data-label": label }));
    this.button = element("button", { type: "button", click: () => drop(this.button, this.name.textContent) }, "Drop");
    const picture = shape("svg", { class: "swatch", viewBox: "0 0 10 10", "aria-hidden": "true" }, this.swatch);
    const head = element("th", { scope: "row", "data-label": "Namespace" }, element("span", {}, picture, " ", this.name));
    this.node = element("tr", {}, head, ...this.cells, element("td", { class: "actions" }, this.button));
  }

  update({ label, colour, blocks_used: used, blocks_cached: cached, blocks_host: host, hit_rate: hits }) {
    this.swatch.setAttribute("class", `part c${colour}`);
    setText(this.name, label);
    const texts = [short(used), short(cached), short(host), hits === null ? "–" : percent(hits)];
    texts.forEach((text, index) => setText(this.cells[index], text));
    this.button.setAttribute("aria-label", `Drop the K/V of ${label}`);
    this.button.hidden = used + cached + host === 0;
  }
}

function labelOf({ namespace, names, kind }) {
  if (names.length === 0) return `${namespace.slice(0, 12)}, without a name`;
  return kind === "alora" ? `${names.join(", ")} (aLoRA)` : names.join(", ");
}
