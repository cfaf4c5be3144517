// What can be done to an adapter, one call each.

import { address, call } from "./api.js";

/** Begin to load an adapter into a tier, and pin it there if `pin` is true; the table shows the progress. */
export function load(name, tier, pin) {
  const url = address("adapters", name, "load");
  url.searchParams.set("wait", "false");
  return call("POST", url, { body: { tier, pin } });
}

/** Free its memory in a tier and in every faster one. */
export const unload = (name, tier) => call("POST", address("adapters", name, "unload"), { body: { tier } });

export const setPinned = (name, pinned) => call("PATCH", address("adapters", name), { body: { pinned } });

/** Delete what was shown: if the name points to other content by now, the server refuses. */
export function remove({ name, digest }, force) {
  const url = address("adapters", name);
  if (force) url.searchParams.set("force", "true");
  return call("DELETE", url, { given: digest === null ? {} : { "if-match": `"${digest}"` } });
}
