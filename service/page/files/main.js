// The wiring of the page: the key, and asking the server again and again while the page is visible.

import { AdapterTable } from "./adapters.js";
import { address, call, getJson, key, setKey } from "./api.js";
import { byId, setText } from "./dom.js";
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

// What is read each time: what it is called, where its errors are said, and what takes it in
const READINGS = [
  ["Listing the adapters", adapters.notices, async () => adapters.update((await getJson("adapters")).adapters)],
  ["Reading the K/V cache", kv.notices, async () => kv.update(await getJson("kv"))],
  ["Reading the metrics", loadNotices, readMetrics],
];

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
  const done = await Promise.allSettled([base === null ? introduce() : null, ...READINGS.map(([, , take]) => take())]);
  const errors = done.map(({ reason }) => reason ?? null);
  const unknown = errors.find((error) => error?.status === 401);
  const silent = errors.find((error) => error?.status === 0);
  const single = unknown ?? silent ?? null;
  const what = unknown ? "A key is needed" : silent ? "No answer" : "Asking who serves";
  keyNotices.standing(single ?? errors[0], what);
  if (single !== null) showState("failed", unknown ? "needs a key" : "no answer");
  READINGS.forEach(([doing, notices], index) => notices.standing(single === null ? errors[index + 1] : null, doing));
  if (single === null) playground.update([base, ...adapters.adapters.map(({ name }) => name)].filter(Boolean));
  return unknown?.status;
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
byId("forget-key").hidden = key() === "";
byId("key").placeholder = key() === "" ? "" : "in use";
refresh();
