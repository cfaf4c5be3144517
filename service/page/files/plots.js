// Plots of the last minutes, drawn from readings of /metrics.

import { element, seconds, setText, shape, short } from "./dom.js";
import { histogram, quantile, rate, total } from "./metrics.js";

const MINUTE = 60_000;
const SPANS = [1, 2, 5]; // minutes that a plot shows: as few as have all readings of the last five
const WINDOW = 10_000; // rates and quantiles are those of the last ten seconds
const GAP = 15_000; // readings that lie further apart are not joined: the page was hidden
const WIDTH = 300, HEIGHT = 80;

const GENERATED = "vllm:generation_tokens_total", PROMPT = "vllm:prompt_tokens_total";
const FIRST = "vllm:time_to_first_token_seconds", BETWEEN = "rootstock_inter_token_seconds";
const RUNNING = "vllm:num_requests_running", WAITING = "vllm:num_requests_waiting";
export const NAMES = [GENERATED, PROMPT, `${FIRST}_bucket`, `${BETWEEN}_bucket`, RUNNING, WAITING];

const tokens = (name) => (before, after, time) => rate(before.counters, after.counters, name, time);
const share = (name, part) => (before, after) => quantile(before.histograms.get(name), after.histograms.get(name), part);
const now = (name) => (before, after) => after.gauges.get(name);
const perSecond = (value) => `${short(value)} tok/s`;

// Each line: its name, how its value comes from two readings, and how that is written
const PLOTS = [
  ["Throughput", 10, perSecond, [["generated", tokens(GENERATED)], ["prompts", tokens(PROMPT)]]],
  ["Time to first token", 0.05, seconds, [["median", share(FIRST, 0.5)], ["95 %", share(FIRST, 0.95)]]],
  ["Time between tokens", 0.02, seconds, [["median", share(BETWEEN, 0.5)], ["95 %", share(BETWEEN, 0.95)]]],
  ["Sequences", 4, short, [["running", now(RUNNING)], ["waiting", now(WAITING)]]],
];

export class Plots {
  constructor(parent) {
    this.#plots = PLOTS.map((plot) => new Plot(...plot));
    parent.append(...this.#plots.map(({ node }) => node));
  }

  #plots;
  #readings = [];

  /** Take in the samples of one reading of /metrics. */
  update(samples) {
    const time = performance.now();
    const of = (read, names) => new Map(names.map((name) => [name, read(samples, name)]));
    const reading = {
      time,
      counters: of(total, [GENERATED, PROMPT]),
      gauges: of(total, [RUNNING, WAITING]),
      histograms: of(histogram, [FIRST, BETWEEN]),
    };
    this.#readings = this.#readings.filter((earlier) => time - earlier.time <= WINDOW);
    const before = this.#readings[0];
    this.#readings.push(reading);
    if (before !== undefined) for (const plot of this.#plots) plot.add(before, reading);
  }
}

class Plot {
  constructor(title, least, format, lines) {
    this.#least = least;
    this.#format = format;
    this.#lines = lines.map(([name, value], index) => ({
      name, value, points: [], path: shape("path", { class: `line line${index}` }), text: element("span"),
    }));
    this.#top = element("span", { class: "top" });
    this.#begin = element("span");
    const id = `plot-${title.toLowerCase().replaceAll(" ", "-")}`;
    const legend = this.#lines.map(({ text }, index) =>
      element("span", { class: "entry" }, shape(
        "svg", { class: "swatch", viewBox: "0 0 16 4", "aria-hidden": "true" },
        shape("path", { class: `line line${index}`, d: "M0 2H16" }),
      ), text));
    this.node = element(
      "figure", {},
      element("figcaption", { id }, element("strong", {}, title), ...legend),
      element(
        "div", { class: "plot" }, this.#top,
        shape(
          "svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-labelledby": id },
          shape("path", { class: "grid", d: `M0 0H${WIDTH}M0 ${HEIGHT / 2}H${WIDTH}M0 ${HEIGHT}H${WIDTH}` }),
          ...this.#lines.map(({ path }) => path),
        ),
        element("span", { class: "axis" }, this.#begin, element("span", {}, "now")),
      ),
    );
    this.#draw(performance.now());
  }

  #least; // what the top of the plot stands for at least
  #format;
  #lines;
  #top;
  #begin;

  add(before, after) {
    for (const { points, value } of this.#lines) {
      points.push({ time: after.time, value: value(before, after, (after.time - before.time) / 1000) });
      while (points[0].time < after.time - SPANS.at(-1) * MINUTE) points.shift();
    }
    this.#draw(after.time);
  }

  #draw(time) {
    const age = time - (this.#lines[0].points[0]?.time ?? time);
    const minutes = SPANS.find((span) => span * MINUTE >= age);
    setText(this.#begin, minutes === 1 ? "a minute ago" : `${minutes} minutes ago`);
    const values = this.#lines.flatMap(({ points }) => points.map(({ value }) => value ?? 0));
    const top = rounded(Math.max(this.#least, ...values));
    setText(this.#top, this.#format(top));
    for (const { name, points, path, text } of this.#lines) {
      path.setAttribute("d", drawn(points, time, minutes * MINUTE, top));
      const value = points.at(-1)?.value ?? null;
      setText(text, `${name} ${value === null ? "–" : this.#format(value)}`);
    }
  }
}

/** A path through the points, with a break where there is no value. */
function drawn(points, time, span, top) {
  let path = "", last = -Infinity;
  for (const point of points) {
    if (point.value === null) {
      last = -Infinity;
      continue;
    }
    const x = WIDTH * (1 - (time - point.time) / span), y = HEIGHT * (1 - point.value / top);
    const place = `${x.toFixed(1)} ${y.toFixed(1)}`;
    path += point.time - last > GAP ? `M${place}h0` : `L${place}`;
    last = point.time;
  }
  return path;
}

/** The next of 1, 2, 5, 10, 20, … */
function rounded(value) {
  const unit = 10 ** Math.floor(Math.log10(value));
  return unit * [1, 2, 5, 10].find((step) => step * unit >= value * 0.999);
}
