// Bars along the response, the histogram, and where the loss goes; then the first drawing of the page.

const BINS = 20, TENTHS = 10, HEAVIEST = 6;

function drawAlong() {
  const response = current(), scale = scales[state.colour], heights = values(response, state.colour);
  const positions = heights.map((value) => (value === null ? 0 : scale.position(value)));
  const up = Math.max(0, ...positions), down = Math.max(0, ...positions.map((p) => -p)), span = up + down || 1;
  const zero = (100 * up) / span;
  at("along-title").replaceChildren(label(term(state.colour).label), " along the response");
  at("along").replaceChildren(
    element("hr", { style: `top: ${zero}%` }),
    ...positions.map((position, index) => {
      const height = (100 * Math.abs(position)) / span, top = position < 0 ? zero : zero - height;
      const shade = `rgb(var(--${position < 0 ? "less" : "more"}))`;
      const bar = element("i", { style: `top: ${top}%; height: ${height}%; background: ${shade}` });
      const place = `left: ${(100 * index) / positions.length}%; width: ${100 / positions.length}%`;
      const title = `${response.tokens[index][0]}: ${written(heights[index])}`;
      const column = element("button", { type: "button", tabIndex: -1, style: place, title, onclick: () => select(index) }, bar);
      column.addEventListener("pointerenter", () => hover(index));
      column.addEventListener("pointerleave", () => hover(null));
      return column;
    }),
  );
  at("along").setAttribute("aria-hidden", "true");
  markAlong();
}

function markAlong() {
  at("along").querySelectorAll("button").forEach((bar, index) => bar.classList.toggle("on", index === shown()));
}

function scope() {
  return state.scope === "this response" ? [current()] : data.responses;
}

function drawHistogram() {
  const scale = scales[state.histogram], bins = binsOf(scale, scale.same ? 1 : BINS);
  const count = bins.edges.length - 1, tokens = Array(count).fill(0), lost = Array(count).fill(0);
  const withLoss = scope().every((response) => response.loss) && state.histogram !== LOSS;
  for (const response of scope()) {
    values(response, state.histogram).forEach((value, index) => {
      if (value === null) return;
      tokens[bins.of(value)] += 1;
      if (withLoss) lost[bins.of(value)] += response.loss[index];
    });
  }
  const inTokens = tokens.map((n) => n / sum(tokens)), inLoss = lost.map((n) => n / (sum(lost) || 1));
  const largest = Math.max(...inTokens, ...inLoss);
  const bar = (name, share) => element("i", { className: name, style: `height: ${(100 * share) / largest}%` });
  at("histogram").replaceChildren(...inTokens.map((share, bin) => {
    const range = `${written(bins.edges[bin])} to ${written(bins.edges[bin + 1])}: ${percent(share)} % of the tokens`;
    const title = withLoss ? `${range}, ${percent(inLoss[bin])} % of the loss` : range;
    return element("div", { title }, bar("tokens", share), withLoss ? bar("lost", inLoss[bin]) : null);
  }));
  const middle = bins.edges[Math.floor(count / 2)];
  at("histogram").setAttribute("aria-label", `${sum(tokens)} tokens from ${written(scale.low)} to ${written(scale.high)}`);
  at("histogram-axis").replaceChildren(...[scale.low, middle, scale.high].map((edge) => element("span", {}, written(edge))));
  const name = label(term(state.histogram).label);
  at("histogram-title").replaceChildren(name, ` of ${sum(tokens)} tokens${scale.logBins ? ", logarithmic" : ""}`);
  const key = [element("i", { className: "tokens" }), "tokens"];
  at("histogram-key").replaceChildren(...key, ...(withLoss ? [element("i", { className: "lost" }), "loss"] : []));
}

function drawPositions() {
  const tenths = Array(TENTHS).fill(0);
  for (const response of scope()) {
    (response.loss || []).forEach((part, index) => {
      // A token that lies in two tenths gives each its part.
      const from = (index / response.loss.length) * TENTHS, to = ((index + 1) / response.loss.length) * TENTHS;
      for (let tenth = Math.floor(from); tenth < to && tenth < TENTHS; tenth += 1) {
        tenths[tenth] += (part * (Math.min(to, tenth + 1) - Math.max(from, tenth))) / (to - from);
      }
    });
  }
  const total = sum(tenths) || 1, largest = Math.max(...tenths) / total;
  at("positions").replaceChildren(
    ...tenths.map((part, tenth) => {
      const bar = element("i", { className: "lost", style: `height: ${(100 * part) / total / largest}%` });
      return element("div", { title: `tenth ${tenth + 1}: ${percent(part / total)} % of the loss` }, bar);
    }),
    element("div", { className: "even", title: "an even share", style: `bottom: ${100 / TENTHS / largest}%` }),
  );
  at("positions").setAttribute("aria-label", tenths.map((part) => `${percent(part / total)} %`).join(", "));
}

function drawLoss() {
  const lossless = !scope().every((response) => response.loss);
  at("positions-figure").hidden = lossless;
  if (lossless) {
    at("loss").replaceChildren("This objective's loss is no sum over tokens, so no token has a share of it.");
    return;
  }
  const parts = scope().flatMap((response) => {
    const number = data.responses.indexOf(response);
    return response.loss.map((part, index) => ({ part, number, index, token: response.tokens[index] }));
  }).sort((a, b) => b.part - a.part);
  const total = sum(parts.map(({ part }) => part)) || 1;
  let half = 0, reached = 0;
  while (reached < total / 2 && half < parts.length) reached += parts[half++].part;
  at("loss").replaceChildren(
    element("p", {}, `Half of the loss falls on ${half} of ${parts.length} tokens (${percent(half / parts.length)} %).`),
    "Heaviest:",
    ...parts.slice(0, HEAVIEST).map(({ part, number, index, token }) => {
      const go = () => { if (number !== state.response) show(number, index); select(index); };
      const title = `token ${index + 1}, ${data.responses[number].label}`, share = `${percent(part / total)} %`;
      return element("button", { type: "button", title, onclick: go }, tokenText(token, false), element("b", {}, share));
    }),
  );
}

function drawCharts() {
  drawHistogram();
  drawPositions();
  drawLoss();
}

function recolour() {
  drawTokens();
  drawLegend();
  drawAlong();
}

function draw() {
  drawTabs();
  recolour();
  drawCharts();
  drawPanel();
}

function start() {
  for (const { key } of data.terms) scales[key] = scaleOf(key);
  const fragment = new URLSearchParams(location.hash.slice(1));
  const number = (name, limit) => Math.min(limit - 1, Math.max(0, parseInt(fragment.get(name) || "0", 10) || 0));
  state.colour = term(fragment.get("colour")) ? fragment.get("colour") : data.terms[0].key;
  state.histogram = term("alpha") ? "alpha" : state.colour;
  state.response = number("response", data.responses.length);
  state.token = number("token", current().tokens.length);
  if (data.responses.length > 1) state.scope = "all responses";
  drawHeader();
  radios("colours", data.terms.map((one) => [one.key, label(one.label)]), "colour", () => { recolour(); drawPanel(); });
  for (const { key, label: name } of data.terms) {
    at("histogram-of").append(element("option", { value: key, selected: key === state.histogram }, name.replace("_t", "ₜ")));
  }
  at("histogram-of").addEventListener("change", (event) => { state.histogram = event.target.value; drawHistogram(); });
  at("scopes").hidden = data.responses.length < 2;
  radios("scopes", [["this response", "this response"], ["all responses", `all ${data.responses.length}`]], "scope", drawCharts);
  at("tokens").addEventListener("keydown", moved);
  draw();
}

start();
