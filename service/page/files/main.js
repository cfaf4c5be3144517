// The wiring of the page: the key, and asking the server again and again while the page is visible.

import { AdapterTable } from "./adapters.js";
import { address, call, getJson, key, setKey } from "./api.js";
import { byId, element, setText } from "./dom.js";
import { AdapterMemory, KvMemory, NAMES as MEMORY_NAMES } from "./memory.js";
import { parse, total } from "./metrics.js";
import { Notices } from "./notices.js";
import { Playground } from "./playground.js";
import { NAMES as PLOT_NAMES, Plots } from "./plots.js";
import { ImportForm, UploadForm } from "./upload.js";

const EVERY = 2000; // milliseconds between two readings,
const PAUSE = 10; // or so many times as long as one takes, if that is longer
const ENGINE_UP = "rootstock_engine_up";
const WANTED = new Set([...PLOT_NAMES, ...MEMORY_NAMES, ENGINE_UP]);

const adapters = new AdapterTable(refresh);
const adapterMemory = new AdapterMemory();
const kv = new KvMemory(refresh);
const plots = new Plots(byId("plots"));
const loadNotices = new Notices(byId("load"));
const playground = new Playground();
const keyNotices = new Notices(byId("key-notices"));
new UploadForm((name) => adapters.find(name), refresh);
new ImportForm(refresh);

let base = null; // the name of the base model, once it is known
let names = []; // of the adapters

// What is read each time: what it is called, where its errors are said, what takes it in, and what of the page shows
// it. Where the key may not read it, this is closed, and another reading may take its place.
const readings = [
  {
    doing: "Listing the adapters", notices: adapters.notices, parts: ["adapters"], take: readAdapters,
    instead: { doing: "Listing the models", notices: playground.notices, parts: [], take: readModels },
  },
  { doing: "Reading the K/V cache", notices: kv.notices, parts: ["kv"], take: async () => kv.update(await getJson("kv")) },
  {
    doing: "Reading the metrics", notices: loadNotices, parts: ["load", "adapter-memory"], take: readMetrics,
    instead: { doing: "Asking for the state", notices: loadNotices, parts: [], take: readState },
  },
];

async function readAdapters() {
  const found = (await getJson("adapters")).adapters;
  adapters.update(found);
  names = found.map(({ name }) => name);
}

async function readModels() {
  const { data } = await getJson("v1", "models");
  names = data.filter(({ parent }) => parent !== null).map(({ id }) => id);
}

async function readState() {
  try {
    await call("GET", address("health", "ready"));
    showState("ready", "ready");
  } catch (error) {
    if (error.status !== 503) throw error;
    showState("failed", error.message);
  }
}

async function readMetrics() {
  const samples = parse(await (await call("GET", address("metrics"))).text(), WANTED);
  plots.update(samples);
  adapterMemory.update(samples);
  const up = total(samples, ENGINE_UP) === 1;
  showState(up ? "ready" : "failed", up ? "ready" : "the engine is not running");
}

/** Who serves; asked until it is known. */
async function introduce() {
  const [{ data }, { version, dtype, kernels }] = await Promise.all([getJson("v1", "models"), getJson("version")]);
  base = (data.find(({ parent }) => parent === null) ?? data[0]).id;
  setText(byId("model"), base);
  setText(byId("version"), ["version " + version, kernels && `${kernels} kernels`, dtype].filter(Boolean).join(" · "));
  document.title = `${base} · Rootstock`;
}

let timer = null, reading = false, again = false;

/** Read now, or once more after the reading that runs. */
function refresh() {
  clearTimeout(timer);
  again = reading;
  if (!reading) read();
}

async function read() {
  const begun = performance.now();
  reading = true;
  const refused = await readAll();
  reading = false;
  if (refused === 401) return; // until there is another key
  const next = again ? 0 : Math.max(EVERY, PAUSE * (performance.now() - begun));
  again = false;
  if (!document.hidden) timer = setTimeout(read, next);
}

/** Read everything. Returns 401 if the key is missing or wrong, which is said once and not in each section. */
async function readAll() {
  const done = await Promise.allSettled([base === null ? introduce() : null, ...readings.map(({ take }) => take())]);
  const errors = done.map(({ reason }) => reason ?? null);
  const unknown = errors.find((error) => error?.status === 401);
  const silent = errors.find((error) => error?.status === 0);
  const single = unknown ?? silent ?? null;
  const what = unknown ? (key() ? "The key is refused" : "A key is needed") : silent ? "No answer" : "Asking who serves";
  keyNotices.standing(single ?? errors[0], what);
  byId("main").hidden = unknown !== undefined;
  if (unknown) {
    byId("key-form").hidden = false; // there is none to give where none is asked for
    byId("key").placeholder = "";
  }
  if (single !== null) showState("failed", unknown ? "needs a key" : "no answer");
  [...readings].forEach((reading, index) => {
    const error = single === null ? errors[index + 1] : null;
    if (error?.code === "missing_scope") giveUp(reading, error.message);
    else reading.notices.standing(error, reading.doing);
  });
  if (single === null && base !== null) playground.update([base, ...names]);
  return unknown?.status;
}

/** Read something no more, as another key begins anew; say why in place of what it would show. */
function giveUp(reading, reason) {
  reading.notices.standing(null);
  for (const part of reading.parts.map(byId)) {
    part.dataset.closed = "";
    part.append(element("p", { class: "quiet reason-closed" }, reason));
  }
  const others = reading.instead ? [reading.instead] : [];
  readings.splice(readings.indexOf(reading), 1, ...others);
  again ||= others.length > 0;
}

function showState(state, text) {
  byId("state").dataset.state = state;
  setText(byId("state"), text);
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value.trim());
});
byId("forget-key").addEventListener("click", () => useKey(""));

/** Begin anew with another key, or none: nothing stays that the last one could see. */
function useKey(value) {
  setKey(value);
  location.reload();
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else refresh();
});
// A file that misses the field must not take the place of the page
for (const type of ["dragover", "drop"]) window.addEventListener(type, (event) => event.preventDefault());
byId("key-form").hidden = byId("forget-key").hidden = key() === "";
byId("key").placeholder = key() === "" ? "" : "in use";
refresh();
