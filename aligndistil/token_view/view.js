// What is on the page and how one moves in it. Text of models and data only ever becomes a text node.

const SPECIAL = 1, BYTES = 2;
const state = { response: 0, token: 0, over: null, colour: null, histogram: null, scope: "this response" };
const at = (id) => document.getElementById(id);
let scales = {};

function element(tag, properties, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name in made && name !== "style") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// `alpha_t` with its index set low.
function label(text) {
  const [, name, index, rest] = text.match(/^(.*?)(?:_(\w+))?( .*)?$/);
  return element("span", {}, name, index ? element("sub", {}, index) : null, rest);
}

// A token's text with white space that can be seen; `inline` keeps spaces between words as they are.
function tokenText([text, kind], inline) {
  if (kind === SPECIAL || kind === BYTES) {
    return element("span", { className: kind === SPECIAL ? "special" : "bytes" }, text);
  }
  const made = element("span");
  const blank = !text.trim();
  for (const piece of text.match(/[ \n\t\r]|[^ \n\t\r]+/g) || []) {
    const sign = { "\n": "↵", "\t": "⇥", "\r": "␍", " ": inline && !blank ? null : "·" }[piece];
    made.append(sign ? element("span", { className: "white" }, sign) : piece);
  }
  return made;
}

const current = () => data.responses[state.response];
const shown = () => (state.over === null ? state.token : state.over);
const term = (key) => data.terms.find((one) => one.key === key);

function drawHeader() {
  at("run").append(element("b", {}, data.stage), ` · ${data.objective} · ${data.steps} steps · ${data.paper}`);
  for (const [name, value] of data.settings) {
    at("facts").append(element("div", {}, element("dt", {}, name), element("dd", {}, String(value))));
  }
  at("footer").append(
    element("kbd", {}, "←"), " ", element("kbd", {}, "→"), " token   ", element("kbd", {}, "↑"), " ",
    element("kbd", {}, "↓"), " line   ", element("kbd", {}, "Home"), " ", element("kbd", {}, "End"),
    `   ·   aligndistil ${data.version} inspect; this page loads nothing from anywhere.`,
  );
}

function drawTabs() {
  at("responses").hidden = data.responses.length < 2;
  at("responses").replaceChildren(...data.responses.map((response, index) =>
    element(
      "button",
      { type: "button", "aria-current": String(index === state.response), onclick: () => show(index, 0) },
      element("b", {}, response.label),
      element("span", {}, response.tokens.slice(0, 40).map(([text]) => text).join("").trim() || " "),
    )));
}

function radios(id, options, key, changed) {
  for (const [value, content] of options) {
    const input = element("input", { type: "radio", name: id, value, checked: state[key] === value });
    input.addEventListener("change", () => { state[key] = value; changed(); });
    at(id).append(element("label", {}, input, element("span", {}, content)));
  }
}

function drawTokens() {
  const response = current(), scale = scales[state.colour], coloured = values(response, state.colour);
  at("prompt").replaceChildren(...response.prompt.map((token) => tokenText(token, true)));
  const nodes = response.tokens.flatMap((token, index) => {
    const node = element("span", {
      className: "token",
      role: "option",
      id: `token-${index}`,
      tabIndex: index === state.token ? 0 : -1,
      "aria-selected": String(index === state.token),
      "aria-label": `${token[0]}, token ${index + 1} of ${response.tokens.length}, ${term(state.colour).label} ${written(coloured[index])}`,
      style: `background: ${colour(scale, coloured[index])}`,
    }, tokenText(token, true));
    node.addEventListener("pointerenter", () => hover(index));
    node.addEventListener("pointerleave", () => hover(null));
    node.addEventListener("click", () => select(index));
    node.addEventListener("focus", () => select(index, false));
    return token[0].includes("\n") ? [node, "\n"] : [node];
  });
  if (!response.finished) nodes.push(element("span", { className: "cut" }, "  … cut here"));
  at("tokens").replaceChildren(...nodes);
}

function drawLegend() {
  const scale = scales[state.colour], { css, ends } = gradient(scale);
  at("about").textContent = term(state.colour).about + (scale.log ? " (logarithmic scale)" : "");
  if (scale.same) {
    at("scale").replaceChildren(`${written(scale.low)} everywhere`);
    return;
  }
  const low = (ends[0] > scale.low ? "≤ " : "") + written(ends[0]), high = (ends[1] < scale.high ? "≥ " : "") + written(ends[1]);
  at("scale").setAttribute("aria-label", `colours from ${low} to ${high}`);
  at("scale").replaceChildren(low, element("i", { style: `background: ${css}` }), high);
}

function probabilityCell(share, isTop) {
  const bar = element("span", { style: `--width: ${(100 * share).toFixed(1)}%` }, percent(share));
  return element("td", { className: isTop ? "" : "minor" }, bar);
}

function drawPanel() {
  const response = current(), index = shown(), token = response.tokens[index];
  const candidates = response.candidates[index];
  const columns = data.distributions.map(({ key }) => response.probabilities[key][index]);
  const largest = (row) => Math.max(...columns.map((column) => column[row]));
  const thresholds = columns.map((column) => [...column].sort((a, b) => b - a)[data.top - 1] || 0);
  const rows = candidates.map((id, row) => row).sort((a, b) => largest(b) - largest(a));
  const terms = data.terms.map(({ key, label: name, about }) => {
    const value = values(response, key)[index];
    const shade = value === undefined ? "" : `--shade: ${colour(scales[key], value)}`;
    return element("div", { style: shade, title: about }, element("dt", {}, label(name)), element("dd", {}, key === LOSS ? `${percent(value)} %` : written(value)));
  });
  const head = element("tr", {}, element("th", { scope: "col" }, "token"), ...data.distributions.map((one) =>
    element("th", { scope: "col" }, one.label, element("small", {}, one.path))));
  const body = rows.map((row) =>
    element("tr", { className: candidates[row] === token[2] ? "came" : "" },
      element("th", { scope: "row" }, tokenText(data.vocabulary[candidates[row]], false)),
      ...columns.map((column, c) => probabilityCell(column[row], column[row] >= thresholds[c]))));
  const ranks = data.distributions.map(({ key }) => element("td", {}, String(response.ranks[key][index] + 1)));
  at("panel").replaceChildren(
    element("h2", { id: "panel-token" }, tokenText(token, false)),
    element("p", { className: "where" }, `token ${index + 1} of ${response.tokens.length}, id ${token[2]}, ${response.label}`),
    element("dl", { className: "terms" }, ...terms.filter((_, t) => values(response, data.terms[t].key).length)),
    element("table", {},
      element("caption", {}, `The ${data.top} likeliest tokens of each model, in per cent`),
      element("thead", {}, head),
      element("tbody", {}, ...body),
      element("tfoot", {}, element("tr", {}, element("th", { scope: "row" }, "rank of this"), ...ranks))),
  );
}

function hover(index) {
  state.over = index;
  drawPanel();
  markAlong();
}

function select(index, focus = true) {
  const old = at(`token-${state.token}`), next = at(`token-${index}`);
  old.setAttribute("aria-selected", "false");
  old.tabIndex = -1;
  next.setAttribute("aria-selected", "true");
  next.tabIndex = 0;
  Object.assign(state, { token: index, over: null });
  if (focus) next.focus();
  drawPanel();
  markAlong();
}

function show(response, token) {
  Object.assign(state, { response, token, over: null });
  draw();
}

// The token above or below: the one of the next line whose middle is nearest.
function neighbour(direction) {
  const boxes = current().tokens.map((_, index) => at(`token-${index}`).getClientRects()[0]);
  const here = boxes[state.token], middle = here.left + here.width / 2;
  const lines = boxes.map((box) => Math.round(box.top)).filter((top) => (top - Math.round(here.top)) * direction > 4);
  if (!lines.length) return state.token;
  const line = direction > 0 ? Math.min(...lines) : Math.max(...lines);
  const distance = (index) => Math.abs(boxes[index].left + boxes[index].width / 2 - middle);
  const candidates = boxes.flatMap((box, index) => (Math.round(box.top) === line ? [index] : []));
  return candidates.reduce((best, index) => (distance(index) < distance(best) ? index : best));
}

function moved(event) {
  const last = current().tokens.length - 1;
  const target = {
    ArrowRight: () => Math.min(last, state.token + 1), ArrowLeft: () => Math.max(0, state.token - 1),
    ArrowDown: () => neighbour(1), ArrowUp: () => neighbour(-1), Home: () => 0, End: () => last,
  }[event.key];
  if (!target || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  select(target());
}
