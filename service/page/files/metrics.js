// Reading /metrics: Prometheus' text, sums, and quantiles of what a histogram gained between two readings.

/** The samples of the text, by name: `{labels, value}` each. Other names than the wanted ones are left out. */
export function parse(text, wanted) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    const name = line.match(/^[A-Za-z_:][\w:]*/)?.[0]; // no comment has one
    if (name === undefined || !wanted.has(name)) continue;
    const end = line.lastIndexOf(" ");
    const labels = {};
    for (const [, label, value] of line.slice(name.length, end).matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[label] = value;
    }
    if (!samples.has(name)) samples.set(name, []);
    samples.get(name).push({ labels, value: numberOf(line.slice(end + 1)) });
  }
  return samples;
}

const numberOf = (text) => (text === "+Inf" ? Infinity : Number(text));

/** The sum of a name's samples; null if there are none. */
export function total(samples, name) {
  const found = samples.get(name);
  return found === undefined ? null : found.reduce((sum, { value }) => sum + value, 0);
}

/** The counts of a histogram by upper bound, summed over its label sets: `[bound, count]`, in order. */
export function histogram(samples, name) {
  const counts = new Map();
  for (const { labels, value } of samples.get(`${name}_bucket`) ?? []) {
    const bound = numberOf(labels.le);
    counts.set(bound, (counts.get(bound) ?? 0) + value);
  }
  return [...counts].sort(([a], [b]) => a - b);
}

/** What a counter gained in a second; null where it is not known, as after a restart of the server. */
export function rate(before, after, name, seconds) {
  const [first, last] = [before.get(name), after.get(name)];
  return first === null || last === null || last < first ? null : (last - first) / seconds;
}

/**
 * The quantile of what a histogram gained between two readings, linear within a bucket as Prometheus has it; null if
 * it gained nothing. Beyond the last bound it is that bound.
 */
export function quantile(before, after, share) {
  const earlier = new Map(before);
  const gained = after.map(([bound, count]) => [bound, count - (earlier.get(bound) ?? 0)]);
  const all = gained.at(-1)?.[1] ?? 0;
  if (!(all > 0)) return null;
  let [low, below] = [0, 0];
  for (const [bound, count] of gained) {
    if (count >= share * all) {
      if (bound === Infinity) return low;
      return count === below ? bound : low + ((bound - low) * (share * all - below)) / (count - below);
    }
    [low, below] = [bound, count];
  }
  return low;
}
