// Elements and figures. Text goes in as text nodes only: nothing here, or anywhere on the page, parses HTML.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** An element. Of `attributes`, functions become listeners and booleans are set or left out. */
export function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

/** An element of a picture. */
export function shape(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== undefined && value !== null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Change a text only where it differs: screen readers say again what is written again. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/**
 * Make the children of `parent` those of `items`, in their order. `nodes` is a Map by key that lives as long as the
 * parent; `make` gives the node of a new item. A node that stays is not touched, so it keeps the focus; from one that
 * goes the focus moves to its neighbour.
 */
export function keep(parent, nodes, items, key, make) {
  const wanted = new Set(items.map(key));
  for (const [name, node] of nodes) {
    if (wanted.has(name)) continue;
    const focused = node.contains(document.activeElement), next = node.nextElementSibling ?? node.previousElementSibling;
    node.remove();
    if (focused) (next?.querySelector("button") ?? parent.closest("[tabindex]"))?.focus();
    nodes.delete(name);
  }
  items.forEach((item, index) => {
    const name = key(item);
    if (!nodes.has(name)) nodes.set(name, make(item));
    const node = nodes.get(name);
    if (parent.children[index] !== node) parent.insertBefore(node, parent.children[index] ?? null);
  });
}

export function bytes(count) {
  if (count === null || count === undefined) return "–";
  const units = ["B", "KB", "MB", "GB", "TB"];
  let value = count, unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${short(value)} ${units[unit]}`;
}

/** Three digits at most, where that says enough. */
export function short(value) {
  if (value >= 100 || Number.isInteger(value)) return Math.round(value).toLocaleString("en");
  return value.toFixed(value >= 10 ? 1 : 2);
}

export function seconds(value) {
  return value < 1 ? `${short(value * 1000)} ms` : `${short(value)} s`;
}

export function percent(share) {
  if (share > 0 && share < 0.0005) return "< 0.1 %";
  return `${(share * 100).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
}
