// Numbers: how a term is coloured, binned and written. A term's scale is the same for all responses of the page.

const data = JSON.parse(document.getElementById("data").textContent);
const LOSS = "loss_share";

function pooled(key) {
  return data.responses.flatMap((response) => values(response, key));
}

function values(response, key) {
  return (key === LOSS ? shares(response) : response.terms[key]) || [];
}

function shares(response) {
  if (!response.loss) return null;
  const total = sum(response.loss);
  return response.loss.map((part) => part / total);
}

function sum(numbers) {
  return numbers.reduce((total, number) => total + number, 0);
}

function quantile(numbers, share) {
  const sorted = [...numbers].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

// The colours of all but the outermost values: a single outlier must not take the contrast from the others. Positive terms
// that span more than two orders of magnitude, such as a weight per token, are shown by their logarithm.
function scaleOf(key) {
  const known = pooled(key).filter((value) => value !== null);
  const low = Math.min(...known), high = Math.max(...known), from = quantile(known, 0.02), to = quantile(known, 0.98);
  const log = low > 0 && to / from > 100;
  const same = !(high > low);
  const size = Math.max(quantile(known.map(Math.abs), 0.98) || 0, 1e-12);
  const place = log ? (value) => Math.log(value / from) / Math.log(to / from) : (value) => value / size;
  const position = (value) => (same ? 0 : Math.max(log ? 0 : -1, Math.min(1, place(value))));
  return { key, low, high, from, to, log, logBins: low > 0 && high / low > 100, same, size, position };
}

function colour(scale, value) {
  if (value === null) return "transparent";
  const position = scale.position(value);
  return `rgba(var(--${position < 0 ? "less" : "more"}), ${(0.62 * Math.abs(position)).toFixed(3)})`;
}

function gradient(scale) {
  const stops = scale.log || scale.low >= 0 ? [0, 0.5, 1] : scale.high <= 0 ? [-1, -0.5, 0] : [-1, -0.5, 0, 0.5, 1];
  const shade = (stop) => `rgba(var(--${stop < 0 ? "less" : "more"}), ${0.62 * Math.abs(stop)})`;
  const ends = scale.log
    ? [scale.from, scale.to]
    : [stops[0] < 0 ? -scale.size : 0, stops[stops.length - 1] > 0 ? scale.size : 0];
  return { css: `linear-gradient(90deg, ${stops.map(shade).join(", ")})`, ends };
}

// Equal steps of the value, or of its logarithm; the last bin holds the largest value.
function binsOf(scale, count) {
  const to = scale.logBins ? Math.log : (value) => value, from = scale.logBins ? Math.exp : (value) => value;
  const low = to(scale.low), width = (to(scale.high) - low) / count || 1;
  return {
    edges: Array.from({ length: count + 1 }, (_, bin) => from(low + bin * width)),
    of: (value) => Math.max(0, Math.min(count - 1, Math.floor((to(value) - low) / width))),
  };
}

function written(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-4) return value.toExponential(1).replace("-", "−").replace("e-", "e−").replace("e−−", "e−");
  const digits = size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : size >= 0.01 ? 3 : 4;
  return value.toFixed(digits).replace("-", "−");
}

function percent(share) {
  const value = 100 * share;
  if (value === 0) return "0";
  if (value > 0 && value < 0.01) return "<0.01";
  return value.toFixed(value >= 99.95 ? 0 : value >= 0.95 ? 1 : 2);
}
