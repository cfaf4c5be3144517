// Run in the page: what a person who sees badly, or uses the keyboard, would miss.

/** Texts whose contrast to what is behind them is too low, as `[text, contrast]`. */
function tooFaint() {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const ground = (node) => {
    for (let each = node; each; each = each.parentElement) {
      const colour = rgba(getComputedStyle(each).backgroundColor);
      if (colour[3] > 0) return colour;
    }
    return [255, 255, 255, 255];
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.slice(0, 3).map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const { parentElement: parent, data } = walker.currentNode;
    if (!data.trim() || !parent.checkVisibility() || parent.closest("svg, noscript, :disabled")) continue;
    const both = [getComputedStyle(parent).color, null].map((colour) => luminance(colour ? rgba(colour) : ground(parent)));
    const contrast = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
    if (contrast < 4.5) found.push([data.trim(), contrast]);
  }
  return found;
}

/** Controls without a name, as their HTML. */
function nameless() {
  const controls = [...document.querySelectorAll("button, input, select, textarea, [role=button], dialog, table")];
  const named = (node) =>
    node.getAttribute("aria-label") || node.getAttribute("aria-labelledby") || node.labels?.length
    || node.textContent.trim();
  return controls.filter((node) => !named(node)).map((node) => node.outerHTML.slice(0, 200));
}

/** Elements that reach beyond the inside of their section, as their HTML. */
function outside() {
  const found = [];
  for (const section of document.querySelectorAll("section")) {
    const end = section.getBoundingClientRect().right - parseFloat(getComputedStyle(section).paddingRight);
    for (const node of section.querySelectorAll(":not(svg, svg *)")) {
      if (node.checkVisibility() && node.getBoundingClientRect().right > end + 1) found.push(node.outerHTML.slice(0, 200));
    }
  }
  return found;
}
